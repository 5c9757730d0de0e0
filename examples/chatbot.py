"""A chatbot: one session is one program, a chain of calls.

python examples/chatbot.py [BASE_URL]        then type; an empty line ends the session
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import openai

from autellix_sglang.client import program, register


def chat(client: openai.OpenAI, questions: Iterable[str], max_tokens: int = 64) -> list[str]:
    """Answer one question after the other, streaming, with the history in each prompt."""
    history: list[Any] = []
    with program("chatbot"):
        for question in questions:
            history.append({"role": "user", "content": question})
            chunks = client.chat.completions.create(
                model="default", messages=history, max_tokens=max_tokens, stream=True
            )
            answer = ""
            for chunk in chunks:
                piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
                print(piece, end="", flush=True)
                answer += piece
            print()
            history.append({"role": "assistant", "content": answer})
    return [turn["content"] for turn in history if turn["role"] == "assistant"]


def main(base_url: str = "http://localhost:30000") -> None:
    register(base_url)
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none")
    chat(client, iter(lambda: input("> "), ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
