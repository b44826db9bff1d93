"""How long a stranger that misbehaved waits until its streams are served again; pure.

To throw somebody out is not the end of it: who is hung up on calls again, and each call costs a
handshake and a stream (1.3 and 0.8 ms of CPU in libp2p's daemon, 0.4 ms in our loop; a crowd of 200
that calls once a second takes a third of a core, from the honest steps beside it). So an *offence*
(a frame against the protocol, one that is not finished in time, more streams than anybody needs)
makes the next streams of that identity *wait*: nothing is read from them and nothing is said
(`Stream.pause`; flow control then stops the sender), 1 s after the first offence and twice as long
after each further one, `LONGEST_S` at most. Who waits does not call. Afterwards the stream is
served as if it had just come, so an honest peer that was unlucky loses a moment, not its way in.
What happens while a wait runs counts as one offence with what began it.

Identities cost nothing, addresses do: the same is counted for the block of addresses
(`hexswarm.quota`), with more patience, since others live there: waits begin after
`BLOCK_OFFENCES`, and stay well below the time for a greeting, so that a newcomer from there still
gets in.
Strikes are forgiven one by one. The tables are bounded; who offended longest ago is forgotten
first.

Rejected: closing streams at once (whoever is closed on comes again, and pays less for it than we
do); refusing connections (libp2p's daemon offers no gate); bans (an address is soon somebody
else's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST_S = 1.0
LONGEST_S = 32.0
BLOCK_OFFENCES = 8.0
BLOCK_LONGEST_S = 4.0
FORGIVE_S = 60.0
"""So long without an offence takes back one strike."""
MOST_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Patience:
    """`free` strikes cost nothing; further ones double the wait up to `longest_s`."""

    free: float
    longest_s: float

    def wait_s(self, strikes: float) -> float:
        over = strikes - self.free
        if over <= 0:
            return 0.0
        return min(self.longest_s, FIRST_S * math.pow(2.0, min(over, 32.0) - 1.0))


@dataclass(frozen=True, slots=True)
class _Record:
    strikes: float
    until_s: float


class Strikes:
    """The offences of many keys."""

    def __init__(self, patience: Patience, most_keys: int = MOST_KEYS) -> None:
        self._patience = patience
        self._most_keys = most_keys
        self._records: dict[str, _Record] = {}
        """In order of the last offence."""

    def __len__(self) -> int:
        return len(self._records)

    def add(self, key: str, now: float) -> None:
        record = self._records.pop(key, None)
        if record is None or now >= record.until_s:
            strikes = self._left(record, now) + 1.0
            record = _Record(strikes, now + self._patience.wait_s(strikes))
        self._records[key] = record
        if len(self._records) > self._most_keys:
            del self._records[next(iter(self._records))]

    def wait_s(self, key: str, now: float) -> float:
        record = self._records.get(key)
        return 0.0 if record is None else max(0.0, record.until_s - now)

    def _left(self, record: _Record | None, now: float) -> float:
        """Strikes not yet forgiven."""
        if record is None:
            return 0.0
        return max(0.0, record.strikes - max(0.0, now - record.until_s) / FORGIVE_S)


class Waits:
    """Who has to wait, in one process."""

    def __init__(self) -> None:
        self._peers = Strikes(Patience(0.0, LONGEST_S))
        self._blocks = Strikes(Patience(BLOCK_OFFENCES, BLOCK_LONGEST_S))

    def offend(self, peer: str, block: str, now: float) -> None:
        """`peer`, which calls from `block` ("" for none), misbehaved."""
        if block and not self.wait_s(peer, "", now):
            self._blocks.add(block, now)
        self._peers.add(peer, now)

    def wait_s(self, peer: str, block: str, now: float) -> float:
        """Seconds until a stream of it is served."""
        own_s = self._peers.wait_s(peer, now)
        return max(own_s, self._blocks.wait_s(block, now)) if block else own_s
