"""The row `group` of tensor_parallel.py: real peers that hold a model together, and are lost.

A leader, a member and a spare on one machine, as a LAN would have them. In the midst of an answer
the member is killed or frozen. Measured from the signal: when the client knows (its session stands
still), when no record says any more that the epoch serves, when a record says that a later one
does, and whether the answer was completed with the tokens of one that nobody disturbed. Then a
fresh peer comes as the next spare.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hexswarm.blocking import BlockingConversation, Client
from hexswarm.demo import READY_S, LocalSwarm, Process
from hexswarm.errors import HexswarmError
from hexswarm.records import Announcement, PeerId

PROMPT = [5, 6, 7, 8]
BEGUN = 10
TOKENS = 60
WATCH_S = 60.0
EVERY_S = 0.03
BARS_S = {"told_s": 2.0, "gone_s": 5.0, "again_s": 15.0}
KV_TOKENS = 4096


@dataclass(slots=True)
class Loss:
    """What came of one strike: seconds from it, or None for not within WATCH_S."""

    how: str
    told_s: float | None = None
    gone_s: float | None = None
    again_s: float | None = None
    same: bool = False
    """The answer was completed, with the same tokens."""

    @property
    def over(self) -> bool:
        return None not in (self.told_s, self.gone_s, self.again_s)


class Lan(LocalSwarm):
    """A leader of the whole model, a member and a spare."""

    def __init__(self, layers: int, **more: Any) -> None:
        extra = ("--group", "lan", "--kv-tokens", str(KV_TOKENS))
        super().__init__((), threads=1, extra=extra, **more)
        self._layers = layers

    def start(self, started: Callable[[str], None] = lambda _: None) -> None:
        self.start_seed()
        leader = self.spawn_peer(f"0:{self._layers}")
        for _ in range(2):
            self.add_peer(None)
        leader.wait_for("serving", READY_S)

    def process_of(self, peer: PeerId) -> Process:
        return next(one for one in self.peers if any(peer in line for line in one.lines))

    def stop(self) -> list[int]:
        """The frozen cannot end."""
        for one in self.peers:
            one.send(signal.SIGCONT)
        return super().stop()


def view(client: Client) -> list[Announcement]:
    """Who says now to be in a group."""
    member, digest = client._client._member, client.spec.digest
    client._wait(member.refresh(digest))
    return [item for item in client.snapshot().of_model(digest) if item.group is not None]


def served(found: list[Announcement]) -> int:
    """The epoch that serves, 0 for none."""
    return max((one.group.epoch for one in found if one.group and one.serving), default=0)


def member_of(found: list[Announcement], epoch: int) -> PeerId | None:
    for one in found:
        if one.group is not None and (one.group.rank, one.group.epoch) == (1, epoch):
            return one.peer
    return None


def settled(client: Client) -> tuple[int, PeerId]:
    """The epoch that serves and its member, once both say so."""
    end_s = time.monotonic() + WATCH_S
    while time.monotonic() < end_s:
        found = view(client)
        epoch = served(found)
        member = member_of(found, epoch) if epoch else None
        if member is not None:
            return epoch, member
        time.sleep(EVERY_S)
    raise TimeoutError("the group does not serve")


def strike(client: Client, lan: Lan, how: str, whole: tuple[int, ...]) -> Loss:
    epoch, member = settled(client)
    victim, loss = lan.process_of(member), Loss(how)
    with client.conversation() as talk:
        stream = talk.generate(PROMPT, stream=True, max_new_tokens=TOKENS)
        for _ in range(BEGUN):
            next(stream)
        victim.send(getattr(signal, f"SIG{how}"))
        struck_s = time.monotonic()
        rest = threading.Thread(target=lambda: _drain(stream))
        rest.start()
        _watch(client, talk, loss, epoch, struck_s, rest)
        rest.join(WATCH_S)
        with contextlib.suppress(HexswarmError, RuntimeError):
            loss.same = stream.completion.ids == whole
    victim.send(signal.SIGKILL)
    victim.wait()
    lan.add_peer(None)
    return loss


def _drain(stream: Any) -> None:
    with contextlib.suppress(HexswarmError):
        for _ in stream:
            pass


def _watch(
    client: Client,
    talk: BlockingConversation,
    loss: Loss,
    epoch: int,
    struck_s: float,
    rest: threading.Thread,
) -> None:
    session = talk._conversation._session
    assert session is not None
    machine = session.machine

    def hear() -> None:
        """Beside: a read of the directory may wait seconds for a node that is frozen."""
        while not machine.mending and time.monotonic() - struck_s < WATCH_S:
            time.sleep(EVERY_S)
        loss.told_s = time.monotonic() - struck_s if machine.mending else None

    telling = threading.Thread(target=hear)
    telling.start()
    while time.monotonic() - struck_s <= WATCH_S and (not loss.over or rest.is_alive()):
        now_served = served(view(client))
        since_s = time.monotonic() - struck_s
        if loss.gone_s is None and now_served != epoch:
            loss.gone_s = since_s
        if loss.again_s is None and now_served > epoch:
            loss.again_s = since_s
        time.sleep(EVERY_S)
    telling.join()


def summary(losses: list[Loss]) -> dict[str, Any]:
    """Median and worst of each figure; a figure that was never reached counts as WATCH_S."""
    found: dict[str, Any] = {"losses": len(losses), "same_tokens": sum(one.same for one in losses)}
    for name, bar_s in BARS_S.items():
        times = [WATCH_S if (t := getattr(one, name)) is None else t for one in losses]
        found[name] = {
            "median": round(statistics.median(times), 2),
            "worst": round(max(times), 2),
            "bar": bar_s,
        }
    return found


def group(model: str, layers: int, strikes: int) -> dict[str, Any]:
    """`strikes` kills and as many freezes, by turns."""
    load, losses = round(os.getloadavg()[0], 1), list[Loss]()
    with (
        Lan(layers, model=model) as lan,
        Client(lan.bootstrap, model=model, home=lan.home / "client") as client,
    ):
        settled(client)
        answer = client.generate(PROMPT, max_new_tokens=TOKENS)
        for _ in range(strikes):
            for how in ("KILL", "STOP"):
                losses.append(strike(client, lan, how, answer.ids))
                print(f"  {asdict(losses[-1])}", flush=True)
    report: dict[str, Any] = {"tokens_per_s": round(answer.tokens_per_s, 1), "load_before": load}
    for how in ("KILL", "STOP"):
        report[how] = summary([one for one in losses if one.how == how])
    return report
