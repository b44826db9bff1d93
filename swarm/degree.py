"""`--tensor-parallel`: over how many devices of its own machine a peer cuts its layers, and how.

    off        one device
    2          two, each as much as it can do in the same time
    auto       all GPUs of the machine; a CPU is one device already, whatever its cores
    3:1        two, the first with three parts of four, as for a card beside one a third as fast

How much each gets of what may not be cut that finely is `hexswarm.peer.cuts`' matter. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from hexswarm.errors import UsageError

MOST_RANKS = 64
_MOST_SHARE = 1000
_REMEDY = 'use off, auto, a number as "2", or shares as "3:1"'


@dataclass(frozen=True, slots=True)
class Degree:
    """How a peer cuts its layers inside its machine."""

    count: int = 1
    """Ranks; 0: as many as there are GPUs."""
    shares: tuple[int, ...] = ()
    """Of each rank, in proportion; none: as fast and as large as each is."""

    def __post_init__(self) -> None:
        if not 0 <= self.count <= MOST_RANKS:
            raise UsageError(
                f"a machine cuts its layers over 1 to {MOST_RANKS} devices, not {self.count}",
                remedy=_REMEDY,
            )
        if self.shares and len(self.shares) != self.count:
            raise UsageError(f"{len(self.shares)} shares for {self.count} ranks", remedy=_REMEDY)
        if not all(0 < share <= _MOST_SHARE for share in self.shares):
            raise UsageError(f"a share is within 1-{_MOST_SHARE}", remedy=_REMEDY)

    def __str__(self) -> str:
        if self.shares:
            return ":".join(map(str, self.shares))
        return {0: "auto", 1: "off"}.get(self.count, str(self.count))

    @classmethod
    def parse(cls, text: str) -> Degree:
        """The degree of "off", "auto", "2" or "3:1". Raises UsageError."""
        named = {"off": 1, "auto": 0}.get(text.lower())
        if named is not None:
            return cls(named)
        words = text.split(":")
        if not all(word.isascii() and word.isdigit() and len(word) < 5 for word in words):
            raise UsageError(f"{text!r} is no way to cut layers", remedy=_REMEDY)
        numbers = tuple(map(int, words))
        if len(numbers) > 1:
            return cls(len(numbers), numbers)
        if not numbers[0]:
            raise UsageError("no layers run on 0 devices", remedy=_REMEDY)
        return cls(numbers[0])
