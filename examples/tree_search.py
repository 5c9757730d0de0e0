"""Tree search (MCTS-like): steps towards an answer are proposed and graded, the best are pursued.

python examples/tree_search.py [BASE_URL] [QUESTION]
"""

from __future__ import annotations

import asyncio
import math
import sys
from dataclasses import dataclass, field

import openai

from autellix_sglang.client import program, register


@dataclass(eq=False)
class Node:
    """A partial answer, with the grades of everything below it."""

    text: str
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    def worth(self) -> float:
        """The upper confidence bound by which the search chooses where to go on."""
        above = self.parent.visits if self.parent else self.visits
        return self.total / self.visits + math.sqrt(2 * math.log(above) / self.visits)

    def best_leaf(self) -> Node:
        return max(self.children, key=Node.worth).best_leaf() if self.children else self


@dataclass
class Search:
    """One search: its engine, its question, and how wide and long it is."""

    client: openai.AsyncOpenAI
    question: str
    width: int = 3
    rounds: int = 3
    max_tokens: int = 32

    async def ask(self, prompt: str, max_tokens: int) -> str:
        reply = await self.client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens
        )
        return reply.choices[0].message.content or ""

    async def grow(self, node: Node) -> None:
        """One new child: a call that proposes a step, then one that grades it."""
        prompt = f"Question: {self.question}\nSo far: {node.text}\nNext step:"
        child = Node(node.text + await self.ask(prompt, self.max_tokens), node)
        grade = await self.ask(f"{prompt}{child.text}\nGrade from 0 to 9:", 2)
        score = next((int(char) for char in grade if char in "0123456789"), 0) / 9
        node.children.append(child)
        above: Node | None = child
        while above is not None:
            above.visits, above.total = above.visits + 1, above.total + score
            above = above.parent

    async def run(self) -> str:
        """The best answer; each branch is a thread, each round waits for those before it."""
        root = Node("")
        with program("tree-search"):
            for _ in range(self.rounds):
                leaf = root.best_leaf()
                await asyncio.gather(*(self.grow(leaf) for _ in range(self.width)))
        return max(root.children, key=lambda node: node.total / node.visits).best_leaf().text


async def search(base_url: str, question: str) -> str:
    register(base_url)
    async with openai.AsyncOpenAI(base_url=base_url + "/v1", api_key="none") as client:
        return await Search(client, question).run()


def main(base_url: str = "http://localhost:30000", question: str = "What is 17 * 23?") -> None:
    print(asyncio.run(search(base_url, question)))


if __name__ == "__main__":
    main(*sys.argv[1:])
