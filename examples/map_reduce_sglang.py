"""Map-reduce in SGLang's frontend language: forks are threads, and joining them makes parents.

python examples/map_reduce_sglang.py [BASE_URL] [FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sglang as sgl

from autellix_sglang.client import ProgramEndpoint


@sgl.function  # type: ignore[untyped-decorator]  # SGLang is untyped
def summarise(s: Any, parts: Sequence[str], max_tokens: int = 48) -> None:
    s += "Summaries of one line each.\n"
    forks = s.fork(len(parts))
    for fork, part in zip(forks.states, parts, strict=True):
        fork += f"Text: {part}\nSummary: " + sgl.gen("line", max_tokens=max_tokens)
    forks.join()
    s += "\n".join(s["line"]) + "\nAll in one: " + sgl.gen("summary", max_tokens=max_tokens)


def main(base_url: str = "http://localhost:30000", file: str = __file__) -> None:
    text = Path(file).read_text()
    parts = [text[start : start + 400] for start in range(0, min(len(text), 3200), 400)]
    state = summarise.run(parts=parts, backend=ProgramEndpoint(base_url))
    print(state["summary"])


if __name__ == "__main__":
    main(*sys.argv[1:])
