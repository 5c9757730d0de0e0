"""A chatbot in SGLang's frontend language: an ordinary program, and one other backend.

python examples/chatbot_sglang.py [BASE_URL] [QUESTION ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import sglang as sgl

from autellix_sglang.client import ProgramEndpoint


@sgl.function  # type: ignore[untyped-decorator]  # SGLang is untyped
def chat(s: Any, questions: Sequence[str], max_tokens: int = 64) -> None:
    for turn, question in enumerate(questions):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer{turn}", max_tokens=max_tokens))


def main(base_url: str = "http://localhost:30000", *questions: str) -> None:
    questions = questions or ("Who are you?", "And what can you do?")
    state = chat.run(questions=questions, backend=ProgramEndpoint(base_url), stream=True)
    for piece in state.text_iter():
        print(piece, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
