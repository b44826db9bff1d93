"""What a request asks for besides its prompt: how to answer, and what its route must keep.

Checked at construction, before anything takes time. The command line derives its flags from these
classes (`hexswarm.config.add_flags`), so that both doors ask in the same words.

A latency limit means "nearly always": with a limit the percentile is 95 unless another is asked
for, because a route whose median just keeps the limit breaks it with every second token.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hexswarm.config import byte_rate, option, seconds
from hexswarm.errors import UsageError
from hexswarm.records import NUMERICS, PeerId, Sampling

LIMIT_PERCENTILE = 95.0
"""Of requests that state a limit and no percentile."""


def _whole_id(text: str) -> str:
    """A peer's name as typed; its last letters alone, as tables print them, name nobody."""
    if len(text) < 40:
        raise UsageError(f"{text!r} is no whole peer id", remedy="see hexswarm status --json")
    return text


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the route of a request must keep; by default anything that serves, the fastest."""

    max_latency: float | None = option(
        None, "limit of the seconds per token, as 0.25 or 250ms", parse=seconds, metavar="TIME"
    )
    ttft: float | None = option(
        None, "limit of the seconds to the first token, as 2 or 800ms", parse=seconds,
        metavar="TIME",
    )  # fmt: skip
    percentile: float | None = option(
        None, "share of the time that a limit is to be kept, 50-99 (with a limit: 95)", metavar="P"
    )
    allow: Collection[str] | None = option(
        None, "use this peer and others so named only; may be given several times", parse=_whole_id,
        many=True, metavar="PEER",
    )  # fmt: skip
    deny: Collection[str] = option(
        (), "do without this peer; may be given several times", parse=_whole_id, many=True,
        metavar="PEER",
    )  # fmt: skip
    trusted: Collection[str] | None = option(
        None, "only peers so named may see the request; may be given several times",
        parse=_whole_id, many=True, metavar="PEER",
    )  # fmt: skip
    dtypes: Collection[str] | None = option(
        None, "weights of this type and others so named only; may be given several times",
        flag="--dtype", parse=str, many=True, metavar="DTYPE",
    )  # fmt: skip
    min_bandwidth: float = option(
        0.0, "bytes per second that each peer must send and receive, as 1.5MB", parse=byte_rate,
        metavar="RATE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("max_latency", "ttft"):
            limit = getattr(self, name)
            if limit is not None and not (_is_number(limit) and 0 < limit < math.inf):
                raise UsageError(f"{name} = {limit!r} is not a positive number of seconds")
        share = self.percentile
        if share is not None and not (_is_number(share) and 50 <= share <= 99):
            raise UsageError(f"percentile = {share!r} is outside 50-99")
        if not (_is_number(self.min_bandwidth) and 0 <= self.min_bandwidth < math.inf):
            raise UsageError(f"min_bandwidth = {self.min_bandwidth!r} is not bytes per second")
        for name in ("allow", "deny", "trusted", "dtypes"):
            _check_names(name, getattr(self, name))
        for dtype in self.dtypes or ():
            if dtype not in NUMERICS:
                raise UsageError(f"unknown dtype {dtype!r}", remedy=f"use {', '.join(NUMERICS)}")

    @property
    def limited(self) -> bool:
        return self.max_latency is not None or self.ttft is not None

    def request(self) -> dict[str, Any]:
        """The fields of a `RouteRequest` that say the same."""
        percentile = LIMIT_PERCENTILE if self.limited else 50.0
        return {
            "tpot_s": self.max_latency,
            "ttft_s": self.ttft,
            "percentile": percentile if self.percentile is None else float(self.percentile),
            "deny": _peers(self.deny),
            "allow": None if self.allow is None else _peers(self.allow),
            "trusted": None if self.trusted is None else _peers(self.trusted),
            "dtypes": None if self.dtypes is None else frozenset(self.dtypes),
            "min_bytes_per_s": float(self.min_bandwidth),
        }


@dataclass(frozen=True, slots=True)
class Options(Wishes):
    """All options of `generate`."""

    max_new_tokens: int = option(256, "longest answer", metavar="N")
    temperature: float = option(0.0, "0 is greedy", metavar="T")
    top_p: float = option(1.0, "draw from the likeliest tokens of this mass", metavar="P")
    top_k: int = option(0, "draw from so many likeliest tokens; 0: all", metavar="K")
    min_p: float = option(0.0, "drop tokens less likely than this share of the top", metavar="P")
    repetition_penalty: float = option(1.0, "above 1 makes said words less likely", metavar="R")
    stop: str | Sequence[str] = option(
        (), "text that ends the answer; may be given several times", parse=str, many=True,
        metavar="TEXT",
    )  # fmt: skip
    seed: int | None = option(None, "makes the draw repeatable", metavar="N")

    def __post_init__(self) -> None:
        Wishes.__post_init__(self)
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "seed" and value is None):
                raise UsageError(f"{name} = {value!r} is not a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float):
                raise UsageError(f"{name} = {getattr(self, name)!r} is not a number")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {self.max_new_tokens} is below 1")
        if not isinstance(self.stop, str | Sequence) or not all(
            isinstance(text, str) and text for text in self.stops
        ):
            raise UsageError("stop strings are texts and not empty")
        self.sampling()

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> Sampling:
        """Raises UsageError if a value is out of range. No seed means a fresh one."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_names(name: str, given: object) -> None:
    """A collection of short texts; one text alone would be taken letter by letter."""
    if given is None:
        return
    if isinstance(given, str) or not isinstance(given, Collection):
        raise UsageError(f"{name} is a list of texts", remedy=f"give {name}=[...]")
    if not all(isinstance(item, str) and 0 < len(item) <= 128 for item in given):
        raise UsageError(f"{name} holds something else than names")


def _peers(names: Collection[str]) -> frozenset[PeerId]:
    return frozenset(PeerId(name) for name in names)
