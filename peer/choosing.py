"""The end of a batch at the tail: a token or logits for each row that wants one.

What needs nothing but the logits and a draw is chosen where they lie, on the device, and only the
tokens come to the host; `ahead` names those rows, since the next step can begin with such a token
before the host has seen it. The others' logits come to the host and are chosen from there, one row
after the other (`hexswarm.peer.sampling`), with the session's history, which the host keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hexswarm.errors import UsageError
from hexswarm.kernels.choice import GREEDY, Draw
from hexswarm.peer.flight import down
from hexswarm.peer.sampling import choose, choose_all, draw_of
from hexswarm.peer.steps import Result, Row, TailPolicy

Wanted = Sequence[tuple[Row, TailPolicy | None]]


def on_device(policy: TailPolicy | None) -> bool:
    """Whether the choice depends on the logits and a draw alone, not on what was said before."""
    if policy is None or policy.logits:
        return False
    return policy.sampling.repetition_penalty == 1


class Choice:
    """Made by the thread of the device, when the logits are told; `results` when they are there."""

    def __init__(self, logits: Tensor, rows: Wanted) -> None:
        self._rows = rows
        self.ahead = [at for at, (_, policy) in enumerate(rows) if on_device(policy)]
        """Rows whose token the device chooses."""
        self.tokens = choose_all(logits, [_draw(row, policy) for row, policy in rows])
        """Of all rows, on the device."""
        self._chosen = down(torch.stack((self.tokens, logits.isfinite().all(-1).long())))
        others = sorted(set(range(len(rows))) - set(self.ahead))
        self._others = dict(zip(others, _lines(logits, others), strict=True))

    def results(self) -> list[Result]:
        """One per row, once all has come to the host."""
        best, fine = self._chosen.tolist()
        results = []
        for at, (row, policy) in enumerate(self._rows):
            if not fine[at]:
                results.append(Result(row, error="computed logits are not finite"))
            elif at not in self._others:
                results.append(Result(row, token=best[at]))
            else:
                assert policy is not None, "rows without one want no token"
                results.append(_by_host(self._others[at], row, policy))
        return results


def _draw(row: Row, policy: TailPolicy | None) -> Draw:
    """How the device chooses; for rows of which it does not, the cheapest way."""
    if policy is None or not on_device(policy):
        return GREEDY
    return draw_of(policy.sampling, row.position + row.count)


def _lines(logits: Tensor, rows: list[int]) -> Sequence[Tensor]:
    """These rows of the logits, on their way to the host."""
    if not rows:
        return ()
    return down(logits if len(rows) == len(logits) else logits[rows]).unbind()


def _by_host(line: Tensor, row: Row, policy: TailPolicy) -> Result:
    if policy.logits:
        return Result(row, logits=line.contiguous().view(torch.uint8).numpy().tobytes())
    position = row.position + row.count  # of the token to come
    try:
        return Result(row, token=choose(line, policy.sampling, policy.history, position))
    except UsageError as error:
        return Result(row, error=error.cause)
