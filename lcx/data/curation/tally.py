"""How many documents each stage dropped, why, and some of them to read."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable
from typing import Any

SAMPLE_CHARS = 300
"""Characters of a dropped document that the report shows."""

_LENGTHS = 48
"""Sizes are counted up to 2^47 bytes."""


class Tally:
    """Counts of one source by stage and reason, with up to `samples` dropped documents a stage.

    The samples are those whose names have the smallest hashes: a fair draw that does not depend on how the work was split.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.documents = self.bytes = 0
        self.stages: dict[str, dict[str, Any]] = {}
        # By number of binary digits of a document's size: documents and bytes read, then dropped.
        self.lengths = [[0, 0, 0, 0] for _ in range(_LENGTHS)]

    def seen(self, size: int) -> None:
        """Count a document that was read, of `size` bytes."""
        self.documents += 1
        self.bytes += size
        self._measured(size, 0)

    def dropped(self, stage: str, reason: str, name: str, size: int, details: Callable[[], dict[str, Any]]) -> None:
        """Count a dropped document; `details` are asked for only if it is one of the samples."""
        found = self._stage(stage)
        count = found["reasons"].setdefault(reason, [0, 0])
        count[0] += 1
        count[1] += size
        self._measured(size, 2)
        key = hashlib.blake2b(f"{stage}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        self._keep(found["samples"], key, lambda: {"name": name, "reason": reason, "bytes": size, **details()})

    def add(self, other: dict[str, Any]) -> None:
        """Add what `state` of another one gave."""
        self.documents += other["documents"]
        self.bytes += other["bytes"]
        self.lengths = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(self.lengths, other["lengths"], strict=True)]
        for stage, theirs in other["stages"].items():
            found = self._stage(stage)
            for reason, (documents, size) in theirs["reasons"].items():
                count = found["reasons"].setdefault(reason, [0, 0])
                count[0] += documents
                count[1] += size
            for key, sample in theirs["samples"]:
                self._keep(found["samples"], key, lambda sample=sample: sample)

    def state(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"documents": self.documents, "bytes": self.bytes, "lengths": self.lengths, "stages": self.stages}

    def length_histogram(self) -> dict[str, Any]:
        """What a report holds of lengths: documents and bytes, read and kept, from `edges[i]` to below `edges[i + 1]` bytes."""
        used = [i for i, (documents, *_) in enumerate(self.lengths) if documents]
        if not used:
            return {"edges": []}
        low, high = used[0], used[-1] + 1
        read, kept = {}, {}
        for at, what in enumerate(("documents", "bytes")):
            read[what] = [one[at] for one in self.lengths[low:high]]
            kept[what] = [one[at] - one[at + 2] for one in self.lengths[low:high]]
        return {"edges": [(1 << i) >> 1 for i in range(low, high + 1)], "read": read, "kept": kept}

    def summary(self, stages: tuple[str, ...]) -> dict[str, Any]:
        """What a report holds of each stage, in the given order; reasons by number of documents."""
        found = {}
        for stage in stages:
            of = self.stages.get(stage, {"reasons": {}, "samples": []})
            reasons = sorted(of["reasons"].items(), key=lambda item: (-item[1][0], item[0]))
            found[stage] = {
                "documents": sum(count for _, (count, _) in reasons),
                "bytes": sum(size for _, (_, size) in reasons),
                "reasons": {reason: count for reason, (count, _) in reasons},
                "samples": [sample for _, sample in of["samples"]],
            }
        return found

    def _measured(self, size: int, at: int) -> None:
        of = self.lengths[min(size.bit_length(), _LENGTHS - 1)]
        of[at] += 1
        of[at + 1] += size

    def _stage(self, stage: str) -> dict[str, Any]:
        return self.stages.setdefault(stage, {"reasons": {}, "samples": []})

    def _keep(self, samples: list[Any], key: str, sample: Callable[[], dict[str, Any]]) -> None:
        if len(samples) < self._samples or (samples and key < samples[-1][0]):
            bisect.insort(samples, [key, sample()], key=lambda item: item[0])
            del samples[self._samples :]
