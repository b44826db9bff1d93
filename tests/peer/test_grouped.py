"""What the daemon of a peer in a LAN group is told, and when."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hexswarm.errors import MemberLost
from hexswarm.peer.groups.grouped import Grouped
from tests import virtual


def grouped() -> Grouped:
    """Of a peer that serves in its group or not at all."""
    life: Any = SimpleNamespace(
        member=SimpleNamespace(links=None), clock=None, identity=None, server=None, claimed=None
    )
    formation: Any = SimpleNamespace(single=lambda own: False)
    made = Grouped(life, None, formation, None, None, None)  # type: ignore[arg-type]
    made.own = lambda: None  # type: ignore[assignment,method-assign]
    return made


def test_an_epoch_that_is_lost_already_is_not_ready() -> None:
    """Its end is about to be told; a daemon that took it up would lose it again at once, for as
    long as nobody else had a turn of the loop."""

    async def act() -> None:
        group = grouped()
        group._complete = SimpleNamespace(lost=MemberLost(1, "b", 3, "is gone"))  # type: ignore[assignment]
        ready = asyncio.create_task(group.ready())
        await asyncio.sleep(5.0)
        assert not ready.done()
        again: Any = SimpleNamespace(lost=None)
        group._complete = again
        group._changed.set()
        await asyncio.wait_for(ready, 1.0)
        given: Any = (None,) * 5
        assert group.start(*given) is again

    virtual.run(act())
