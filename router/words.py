"""What peers said, in order and indexed: the newest word counts.

A peer numbers its announcements, so the higher sequence is the later word on a model. Its words on
different models are numbered apart; which of them tells best where the peer is, its clock says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

from hexswarm.records import Announcement, PeerId

Models = Mapping[str, tuple[Announcement, ...]]
"""For each model its announcements by peer id."""

_by_peer = attrgetter("peer")
_by_peer_and_model = attrgetter("peer", "model")


def latest(announcements: Iterable[Announcement]) -> tuple[Announcement, ...]:
    """The last word of each peer on each model, by (peer, model)."""
    found: dict[tuple[PeerId, str], Announcement] = {}
    for item in announcements:
        key = (item.peer, item.model)
        held = found.get(key)
        if held is None or newer(item, held):
            found[key] = item
    return tuple(found[key] for key in sorted(found))


def by_model(announcements: Iterable[Announcement]) -> Models:
    """Ordered announcements apart by model."""
    models: dict[str, list[Announcement]] = {}
    for item in announcements:
        models.setdefault(item.model, []).append(item)
    return {name: tuple(items) for name, items in models.items()}


def by_peer(announcements: Iterable[Announcement]) -> dict[PeerId, Announcement]:
    """The last word of each peer on any model."""
    words: dict[PeerId, Announcement] = {}
    for item in announcements:
        held = words.get(item.peer)
        if held is None or _spoken(item) > _spoken(held):
            words[item.peer] = item
    return words


def newest(models: Models, peer: PeerId) -> Announcement | None:
    """The last word of one peer on any model."""
    rows = ((items, row_of(items, peer)) for items in models.values())
    return max((items[row] for items, row in rows if row is not None), key=_spoken, default=None)


def newer(item: Announcement, held: Announcement) -> bool:
    """Whether `item` is the later word; of two that claim the same time always the same one."""
    a, b = (item.sequence, item.issued_s), (held.sequence, held.issued_s)
    return a > b or (a == b and item is not held and repr(item) > repr(held))


def row_of(items: Sequence[Announcement], peer: PeerId) -> int | None:
    """Where in one model's announcements that of `peer` is."""
    row = row_for(items, peer)
    return row if row < len(items) and items[row].peer == peer else None


def row_for(items: Sequence[Announcement], peer: PeerId) -> int:
    """Where in one model's announcements that of `peer` is or would be."""
    return bisect_left(items, peer, key=_by_peer)


def index_for(every: Sequence[Announcement], item: Announcement) -> int:
    """Where in all announcements the one of this peer and model is or would be."""
    return bisect_left(every, (item.peer, item.model), key=_by_peer_and_model)


def _spoken(item: Announcement) -> tuple[float, int, str]:
    """The order of one peer's words on different models."""
    return item.issued_s, item.sequence, item.model
