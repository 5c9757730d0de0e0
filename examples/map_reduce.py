"""Map-reduce: every part of a text is summarised at once, then the summaries are.

python examples/map_reduce.py [BASE_URL] [FILE]
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import openai

from autellix_sglang.client import program, register


async def ask(client: openai.AsyncOpenAI, prompt: str, max_tokens: int) -> str:
    reply = await client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens
    )
    return reply.choices[0].message.content or ""


@program("map-reduce")
async def summarise(client: openai.AsyncOpenAI, parts: Sequence[str], max_tokens: int = 48) -> str:
    """Each map is a thread of the program; all of them are parents of the reduce."""
    asked = (ask(client, f"Summarise in one line:\n{part}", max_tokens) for part in parts)
    summaries = await asyncio.gather(*asked)
    return await ask(client, "Make one summary of these:\n" + "\n".join(summaries), max_tokens)


async def run(base_url: str, text: str) -> str:
    register(base_url)
    parts = [text[start : start + 400] for start in range(0, min(len(text), 3200), 400)]
    async with openai.AsyncOpenAI(base_url=base_url + "/v1", api_key="none") as client:
        return await summarise(client, parts)


def main(base_url: str = "http://localhost:30000", file: str = __file__) -> None:
    print(asyncio.run(run(base_url, Path(file).read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
