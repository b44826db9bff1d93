"""Who is here without taking part: what partners and guests may hold, and who has to go; pure.

A neighbour with which we share a session is a *partner* (the owner of the session watches it, see
`Links.watch`); everybody else is a *guest*. Honest guests are few things: clients between their
greeting and the answer to their `Open`, peers and clients that measure ways (`hexswarm.measuring`),
and those whose session is over. None of them needs more than this:

    guest      headers; the payload of a `Probe`, `MAX_PROBE_BYTES`, and less than that of names
               (`hexswarm.prefix`); prompts and activations come after all stages have granted,
               when we are partners
    partner    pieces of prompts, up to the frame's own limit

Somebody who was a partner stays one for `GRACE_S`, since what was sent before the session ended is
still under way, perhaps megabytes on a slow line. Both sides change a role at the moment when they
begin to depend on each other, a client before it says `Open`, a stage when it grants, so that no
honest frame meets the smaller limit.

What all hold together is bounded too, since identities cost nothing: bytes of frames that are not
complete (`UNFINISHED_BYTES`, of guests `GUESTS_UNFINISHED_BYTES`) and what waits for a neighbour
that does not read (`BACKLOG_BYTES`): whoever holds most loses its link. Of guests there are at most
`MAX_GUESTS`: a newcomer takes the place of the one that has been of no use for longest, in the most
crowded address block. Talking does not help it, or a chatty crowd could keep everybody else out.

Rejected: a stranger's limit on the first frame only (a slow client may need several); counting
what a guest sends (a `Probe` a minute for ever is honest); judging by the message in the header
before its payload is read (the decoder would have to know what messages mean).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from hexswarm.link import Link
from hexswarm.measuring import MAX_PROBE_BYTES
from hexswarm.wire import Limits

GUEST = Limits(payload_bytes=MAX_PROBE_BYTES, deadline_s=10.0, frames=32)
PARTNER = Limits(frames=128)
"""So few frames at a time that one flood takes a millisecond or two of each turn of the loop."""
GRACE_S = 60.0
"""Twice the deadline of the largest frame."""

UNFINISHED_BYTES = 64 << 20
GUESTS_UNFINISHED_BYTES = 4 << 20
SMALL_BYTES = 1 << 12
"""Less than this, held by one lane, is not worth adding up."""

GUEST_BACKLOG_BYTES = 512 << 10
"""We owe a guest a probe and short answers; one that lets more pile up does not read."""
PARTNER_BACKLOG_BYTES = 256 << 20
"""A whole prompt may wait for a slow line; a neighbour that lets more pile up is lost."""
BACKLOG_BYTES = 512 << 20
"""The same of all together: the one that lets most pile up is lost."""

MAX_GUESTS = 128
MAX_GUESTS_BLOCK = 32


def gives_way(guests: Iterable[Link], newcomer: Link) -> Link | None:
    """Which of the other `guests` has to go when `newcomer` has come, if any."""
    others = [link for link in guests if link is not newcomer]
    crowds = Counter(link.block for link in others if link.block)
    crowded = crowds[newcomer.block] >= MAX_GUESTS_BLOCK
    if crowded:
        others = [link for link in others if link.block == newcomer.block]
    elif len(others) < MAX_GUESTS:
        return None
    return min(others, key=lambda link: (-crowds[link.block], link.useful_s))


def chokes(link: Link, links: Iterable[Link]) -> Link | None:
    """Who has to go after `link` was sent something, if anybody: it, or who reads least of all."""
    limit = PARTNER_BACKLOG_BYTES if link.limits is PARTNER else GUEST_BACKLOG_BYTES
    if link.backlog > limit:
        return link
    return heaviest(links, BACKLOG_BYTES, lambda other: other.backlog)


def hoards(links: Sequence[Link]) -> Link | None:
    """Who has to go for what it does not finish, if all hold too much of that: first a guest."""
    guests = [link for link in links if link.limits is not PARTNER]
    some = heaviest(guests, GUESTS_UNFINISHED_BYTES, lambda link: link.unfinished)
    return some or heaviest(links, UNFINISHED_BYTES, lambda link: link.unfinished)


def heaviest(links: Iterable[Link], limit: int, weight: Callable[[Link], int]) -> Link | None:
    """The one with most weight, if all together weigh more than `limit`."""
    weights = [(weight(link), -link.since_s, link) for link in links]
    if sum(item[0] for item in weights) <= limit:
        return None
    return max(weights, key=lambda item: item[:2])[2]
