"""Every error that hexswarm raises on purpose, in one tree.

An error carries what happened and what to do about it (`remedy`), as separate fields: a door
prints both in one line, code reads the attributes. Mistakes of our own caller and mistakes of the
machine at the other end are different types (the h11 habit), because the first is mended by
changing a call and the second by leaving that peer.

    HexswarmError
    ├── UsageError              an argument is out of range or inconsistent        (exit status 2)
    │   └── ContextTooLong      prompt + answer do not fit the model's context
    ├── ModelError
    │   ├── UnknownModel        no such folder, file or Hub id
    │   ├── UnsupportedModel    an architecture or weight format that we do not serve
    │   └── CorruptWeights      a weight file is damaged, truncated or not the one expected
    ├── OutOfMemory             the span (or its KV) does not fit the device
    ├── NetworkError
    │   ├── BootstrapUnreachable  none of the given seeds answered
    │   ├── AddressInUse        the port to listen on is taken
    │   ├── ClockSkew           this machine's clock differs too much from the swarm's
    │   ├── PeerLost            a peer of the route vanished or stopped answering
    │   ├── WrongPeer           somebody else answered, or showed no key for the name it gave
    │   └── MemberLost          a member of a tensor-parallel group died, froze or left
    ├── NoRoute                 no pipeline covers all layers within the limits
    ├── Refused                 a peer declined a session (full, draining, other model)
    ├── SessionClosed           the session ended or its lease expired
    └── ProtocolError
        ├── LocalProtocolError  we tried to send something illegal (a bug of ours)
        └── RemoteProtocolError the other end sent something illegal
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class HexswarmError(Exception):
    """Base of all; `str()` is one line with the cause and, if known, the remedy."""

    exit_status: ClassVar[int] = 1

    def __init__(self, cause: str, *, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}" if self.remedy else self.cause


class UsageError(HexswarmError, ValueError):
    exit_status = 2


class ContextTooLong(UsageError):
    def __init__(self, prompt_tokens: int, new_tokens: int, limit: int) -> None:
        super().__init__(
            f"prompt of {prompt_tokens} tokens + {new_tokens} new tokens exceeds the context "
            f"of {limit}",
            remedy="shorten the prompt or lower max_new_tokens",
        )
        self.prompt_tokens, self.new_tokens, self.limit = prompt_tokens, new_tokens, limit


class ModelError(HexswarmError):
    pass


class UnknownModel(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class CorruptWeights(ModelError):
    pass


class OutOfMemory(HexswarmError):
    pass


class NetworkError(HexswarmError):
    pass


class BootstrapUnreachable(NetworkError):
    pass


class AddressInUse(NetworkError):
    pass


class ClockSkew(NetworkError):
    pass


class PeerLost(NetworkError):
    """`peer` is the id of the lost peer, `layers` the (first, end) that it served in the route.

    If what is known is that a neighbour in the ring does not hear or reach it, `beside` is that
    neighbour: the way between the two may be all that is lost.
    """

    def __init__(
        self,
        peer: str,
        layers: tuple[int, int] | None,
        how: str,
        *,
        beside: str | None = None,
    ) -> None:
        where = f" (layers {layers[0]}-{layers[1] - 1})" if layers else ""
        super().__init__(f"peer {peer[-8:]}{where} {how}", remedy="send the request again")
        self.peer, self.layers, self.how, self.beside = peer, layers, how, beside


class WrongPeer(NetworkError):
    """`expected` should have answered; `answered` is who said it was there ("" if nobody did)."""

    def __init__(self, expected: str, answered: str, how: str) -> None:
        super().__init__(
            f"expected peer {expected[-8:]}, {how}",
            remedy="check its address and its identity file",
        )
        self.expected, self.answered, self.how = expected, answered, how


class MemberLost(NetworkError):
    """`rank` of a group is lost, and with it this `epoch` of the group; `peer` is its id."""

    def __init__(self, rank: int, peer: str, epoch: int, how: str) -> None:
        super().__init__(
            f"rank {rank} of the group (peer {peer[-8:]}, epoch {epoch}) {how}",
            remedy="form the group again",
        )
        self.rank, self.peer, self.epoch, self.how = rank, peer, epoch, how


class NoRoute(HexswarmError):
    """No route meets the request.

    `binding` names the constraint that decided: coverage, state, peers, trust, dtype, bandwidth,
    kv, tpot, ttft, or both (each limit alone could be kept). `missing` lists the [first, end) layer
    ranges that no usable peer serves; `achievable` the best predicted seconds of each limit alone
    ("ttft_s", "tpot_s"), at the percentile asked for; `retry_s` when to ask again, where those who
    could serve it are full (0: nobody can say).
    """

    retry_s = 0.0

    def __init__(
        self,
        cause: str,
        *,
        missing: Sequence[tuple[int, int]] = (),
        remedy: str = "",
        binding: str = "coverage",
        achievable: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(cause, remedy=remedy)
        self.missing = tuple(missing)
        self.binding = binding
        self.achievable = dict(achievable or {})


class Refused(HexswarmError):
    """A peer said no to a session; `retry_s` is when to ask again (0: do not)."""

    def __init__(self, peer: str, code: str, reason: str, retry_s: float = 0.0) -> None:
        again = f"try again in {retry_s:.0f} s" if retry_s else ""
        super().__init__(f"peer {peer[-8:]} refused: {reason}", remedy=again)
        self.peer, self.code, self.reason, self.retry_s = peer, code, reason, retry_s


class SessionClosed(HexswarmError):
    pass


class ProtocolError(HexswarmError):
    pass


class LocalProtocolError(ProtocolError):
    pass


class RemoteProtocolError(ProtocolError):
    pass
