"""A ReAct agent: calls that choose an action take turns with a tool that carries it out.

python examples/react.py [BASE_URL] [QUESTION]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import openai

from autellix_sglang.client import program, register

FACTS = {
    "program": "A program is one run of an agent: many calls that depend on each other.",
    "level": "A level is a discretised priority; level 0 is served first.",
    "quantum": "A quantum is the service a call may use before it moves down a level.",
}
PROMPT = """Answer the question. In each turn write one line, either
look up: TOPIC        to read about one of: program, level, quantum
answer: TEXT          when you know the answer
Question: {question}
"""


def look_up(topic: str) -> str:
    """The tool. It takes its time, as tools do, and the engine serves others meanwhile."""
    time.sleep(0.05)
    words = [name for name in FACTS if name in topic.lower()]
    return " ".join(FACTS[name] for name in words) or f"Nothing is known about {topic[:40]!r}."


@program("react")
def react(
    client: openai.OpenAI, question: str, max_turns: int = 4, max_tokens: int = 48
) -> list[Any]:
    """The messages of one run, which is one program: a chain of calls with pauses."""
    messages: list[Any] = [{"role": "user", "content": PROMPT.format(question=question)}]
    for _ in range(max_turns):
        reply = client.chat.completions.create(
            model="default", messages=messages, max_tokens=max_tokens
        )
        text = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        action, _, value = text.partition(":")
        if action.strip().lower() == "answer":
            break
        messages.append({"role": "user", "content": "Result: " + look_up(value or text)})
    return messages


def main(base_url: str = "http://localhost:30000", question: str = "What is a quantum?") -> None:
    register(base_url)
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none")
    for message in react(client, question)[1:]:
        print(f"{message['role']:>9}  {message['content']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
