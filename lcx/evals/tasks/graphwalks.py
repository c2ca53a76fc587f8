"""Walks over a graph that is given as a list of edges, as in Graphwalks (OpenAI, 2025): nodes at a distance, and parents."""

from __future__ import annotations

import dataclasses
import random

from lcx.evals.base import Item
from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import last_list, set_f1
from lcx.evals.text.questions import Draw, TextQuestions

MOST = 12
"""Most nodes of an answer."""


@dataclasses.dataclass(frozen=True)
class GraphWalks(TextQuestions):
    """A random directed graph; asked for are the nodes at exactly `distance` steps from one, or with 0 those that point to it.

    A unit is an edge. The score is F1 of the set in the last brackets; two empty sets score 1, where other harnesses score 0.
    Chance is that of guessing nodes.
    """

    distance: int = 1

    answer_tokens = 128
    units_per_1024 = 32

    def least(self, length: int) -> int:
        """A few edges."""
        return 8

    def answer(self, sample: Sample) -> str:
        """The nodes in brackets."""
        return f" [{', '.join(sample.references)}]"

    def new_tokens(self, length: int) -> int:
        """Enough for the longest answer."""
        longest = len(self.format.tokenizer.encode(f" [{', '.join(['a1b2c3'] * MOST)}]"))
        return max(self.answer_tokens, longest + longest // 4)

    def compose(self, draw: Draw, units: int) -> Sample:
        """As many nodes as edges, so that walks neither die out nor reach everything."""
        rng, distinct = random.Random(draw.rng.random()), words.Distinct()
        nodes = [distinct(lambda: f"{rng.getrandbits(24):06x}") for _ in range(max(4, units))]
        edges = [tuple(rng.sample(nodes, 2)) for _ in range(units)]
        start = self._start(draw.rng, nodes, edges)
        reached = self.reached(edges, start)
        listed = "\n".join(f"{a} -> {b}" for a, b in edges)
        asked = (
            f"all nodes that have an edge to the node {start}"
            if not self.distance
            else f"all nodes that are exactly {self.distance} steps from the node {start}, along the edges and no fewer"
        )
        prompt = (
            f"Below are the edges of a directed graph, one a line.\n{listed}\nFind {asked}. Write them in brackets, with commas "
            "between them, as in: Final Answer: [a, b]"
        )
        return Sample(prompt, " Final Answer:", tuple(sorted(reached)))

    def _start(self, rng: random.Random, nodes: list[str], edges: list[tuple[str, ...]]) -> str:
        """A node with an answer of one to `MOST` nodes if one is soon found."""
        ends = [edge[1 if self.distance == 0 else 0] for edge in edges]
        for _ in range(50):
            start = rng.choice(ends)
            if 1 <= len(self.reached(edges, start)) <= MOST:
                return start
        return rng.choice([node for node in nodes if len(self.reached(edges, node)) <= MOST])

    def reached(self, edges: list[tuple[str, ...]], start: str) -> set[str]:
        """The nodes that are asked for."""
        if not self.distance:
            return {a for a, b in edges if b == start}
        seen = front = {start}
        for _ in range(self.distance):
            front = {b for a, b in edges if a in front} - seen
            seen = seen | front
        return front

    def score(self, item: Item, output: str) -> float:
        """F1 of the nodes."""
        return set_f1(last_list(output), set(item.references))
