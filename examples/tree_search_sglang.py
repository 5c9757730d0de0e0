"""Tree search in SGLang's frontend language: every level forks, and keeps the best branch.

python examples/tree_search_sglang.py [BASE_URL] [QUESTION]
"""

from __future__ import annotations

import sys
from typing import Any

import sglang as sgl

from autellix_sglang.client import ProgramEndpoint

GRADES = ["bad", "fair", "good"]


@sgl.function  # type: ignore[untyped-decorator]  # SGLang is untyped
def search(s: Any, question: str, width: int = 3, depth: int = 2, max_tokens: int = 24) -> None:
    s += f"Question: {question}\n"
    for level in range(depth):
        forks = s.fork(width)
        forks += f"Step {level + 1}: " + sgl.gen("step", max_tokens=max_tokens)
        forks += "\nThis step is " + sgl.select("grade", GRADES)
        best = max(forks.states, key=lambda fork: GRADES.index(fork["grade"]))
        s += f"Step {level + 1}: {best['step']}\n"
    s += "Answer: " + sgl.gen("answer", max_tokens=max_tokens)


def main(base_url: str = "http://localhost:30000", question: str = "What is 17 * 23?") -> None:
    print(search.run(question=question, backend=ProgramEndpoint(base_url))["answer"])


if __name__ == "__main__":
    main(*sys.argv[1:])
