"""Sums over the GPUs of one machine in one launch, through memory that each can read (Triton).

Each rank's product writes its term into memory of its own GPU that the others have mapped; then one
kernel waits until all have done so, reads the terms over the links in the order of ranks, adds them
in float32 to the hidden states, and is through. NCCL takes four launches for that (widen, sum, add)
and 27 us for 16 KB between two H200s; a decode step of 16 layers has 32 such sums.

Waiting is by flags: who comes to a sum sets one at each other rank and takes back those that were
set here, so that a graph can be replayed without counting. Buffers and flags are two of each, which
take turns, one for the sums after attention and one for those after the MLP. Who comes to a sum has
finished reading in the one before it, and has taken back the flags of the one before that: so no
term is written over while somebody reads it, no flag is set that is still up, and a flag is a write
that nobody waits for.

Up to `ALONE` programs each have flags of their own, in one launch (6 us for a row of 8,192 between
two H200s). For more, one program waits, and a second launch adds: 7.5 us for 32 rows, 9 for 64. One
launch of 32 programs that take eight times as much each is as fast, and needs flags for all.

No rank waits for ever: who has polled `MOST` times without an answer writes 1 where the host looks
(`lost`), and what it computes from there on is worth nothing.

`Totals` are the sums and copies of any size beside those of decode steps: prompts, logits, what one
rank hands to all. They go through two pieces of memory in float32, piece by piece. Between two
GPUs that costs what NCCL costs, and it ends by itself when a rank is gone, which NCCL does not: its
communicators wait for the dead even while they are aborted.

Rejected: NVLink multicast (needs rights that machines shared with others do not give), pushing
terms to all others instead of reading them (the same bytes, and buffers for each rank).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TURNS = 2
ALONE = 8
"""Most programs that wait for themselves."""
MOST = 4_000_000
"""Polls of memory before a rank is taken for lost: some seconds."""
_BLOCK = 1024


@triton.jit
def _meet(flags_ptr, lost_ptr, place, most, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Tell the others that we are here, and wait until all of them are; `place` is of the flags."""
    patience = tl.where(tl.load(lost_ptr) == 0, most, 0)
    for other in tl.static_range(SIZE):
        if other != RANK:
            flags = tl.load(flags_ptr + other).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + place + RANK, 1, sem="release", scope="sys")
    late = 0
    for other in tl.static_range(SIZE):
        if other != RANK:
            flag = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + place + other
            seen = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
            tries = 0
            while (seen != 1) & (tries < patience):
                seen = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
                tries += 1
            late += 1 - seen
    if late > 0:
        tl.store(lost_ptr, 1)


@triton.jit
def _wait(flags_ptr, lost_ptr, place, most, RANK: tl.constexpr, SIZE: tl.constexpr):
    _meet(flags_ptr, lost_ptr, place, most, RANK, SIZE)


@triton.jit
def _aligned(address, kind: tl.constexpr):
    """A pointer that is read 16 bytes at a time. Triton knows nothing of addresses that come out of
    a table, and would read number by number, each warp's lines once for every number in them."""
    return tl.multiple_of(address.to(tl.pointer_type(kind)), 16)


@triton.jit
def _add_terms(
    x_ptr,
    terms_ptr,
    flags_ptr,
    lost_ptr,
    place,
    start,
    count,
    most,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    MEET: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """x += all terms; or x = that of the rank SOURCE, if it is none of -1."""
    program = tl.program_id(0)
    if MEET:
        _meet(flags_ptr, lost_ptr, place + program * SIZE, most, RANK, SIZE)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    if SOURCE >= 0:
        terms = _aligned(tl.load(terms_ptr + SOURCE), x_ptr.dtype.element_ty)
        term = tl.load(terms + start + at, mask=inside, other=0, cache_modifier=".cg")
        tl.store(x_ptr + at, term, mask=inside)
        return
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(SIZE):
        terms = _aligned(tl.load(terms_ptr + rank), x_ptr.dtype.element_ty)
        # Past the first cache, which may hold what lay there two sums ago.
        term = tl.load(terms + start + at, mask=inside, other=0.0, cache_modifier=".cg")
        total += term.to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, (x + total).to(x_ptr.dtype.element_ty), mask=inside)


class Linked:
    """One rank's door to sums over memory that all ranks of a machine can read."""

    def __init__(
        self, terms: Sequence[Tensor], flags: Sequence[Tensor], rank: int, lost: Tensor
    ) -> None:
        """`terms` `[TURNS, rows, width]` and `flags` `[TURNS, ALONE, ranks]` int32 of each rank.

        Flags are 0 at the start. `lost` is one int32 that this GPU can write, best of pinned memory
        of the host, which then can look without asking the GPU.
        """
        own = terms[rank]
        self._terms, self._flags, self._rank, self._lost = list(terms), list(flags), rank, lost
        self._tables = [
            torch.tensor([one.data_ptr() for one in some], dtype=torch.int64, device=own.device)
            for some in (terms, flags)
        ]
        self.most = self.usual = MOST
        """Polls, now and when nothing is compiled any more."""
        self.owner: object = None
        """Whoever must live as long as the memory is used."""

    @property
    def lost(self) -> bool:
        """A rank did not come to a sum: what was computed since is worth nothing."""
        return bool(self._lost.item())

    def place(self, turn: int, rows: int) -> Tensor:
        """Where this rank's term of the next sum belongs: `[rows, width]`."""
        return self._terms[self._rank][turn, :rows]

    def add_(self, x: Tensor, turn: int) -> Tensor:
        """x += the ranks' terms that lie in their places of this turn; `x` as contiguous as they.

        All ranks call it for the same rows, turn by turn.
        """
        return self._launch(x, turn, source=-1)

    def take_(self, x: Tensor, turn: int, source: int) -> Tensor:
        """x = what the rank `source` has laid in its place, bits as they are; all ranks call it."""
        return self._launch(x, turn, source)

    def _launch(self, x: Tensor, turn: int, source: int) -> Tensor:
        own, size = self._terms[self._rank], len(self._terms)
        programs = triton.cdiv(x.numel(), _BLOCK)
        place = turn * ALONE * size
        if programs > ALONE:
            given = (*self._tables[1:], self._lost, place, self.most)
            _wait[(1,)](*given, RANK=self._rank, SIZE=size, num_warps=1)
        _add_terms[(programs,)](
            *(x, *self._tables, self._lost, place),
            *(turn * own[0].nbytes // x.itemsize, x.numel(), self.most),
            RANK=self._rank,
            SIZE=size,
            BLOCK=_BLOCK,
            MEET=programs <= ALONE,
            SOURCE=source,
            num_warps=4,
        )
        return x


class Totals:
    """Sums and copies of any size over linked memory of `[TURNS, 1, words]` in float32."""

    def __init__(self, linked: Linked, words: int) -> None:
        self.linked = linked
        self._words = words
        self._turn = 0

    def total(self, x: Tensor) -> Tensor:
        """The ranks' `x`, widened to float32, added in the order of ranks; of any shape."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        terms, sums = x.reshape(-1), out.view(-1)
        for first in range(0, len(sums), self._words):
            piece = slice(first, first + self._words)
            turn, place = self._place()
            place[: len(terms[piece])].copy_(terms[piece])
            self.linked.add_(sums[piece], turn)
        return out

    def share(self, x: Tensor, source: int = 0) -> Tensor:
        """The bits of `x` of the rank `source` in everybody's contiguous `x`."""
        kind = torch.int32 if x.nbytes % 4 == 0 else torch.uint8
        bits = x.view(-1).view(torch.uint8).view(kind)
        words = self._words * 4 // kind.itemsize
        for first in range(0, len(bits), words):
            piece = bits[first : first + words]
            turn, place = self._place()
            place.view(kind)[: len(piece)].copy_(piece)
            self.linked.take_(piece, turn, source)
        return x

    def _place(self) -> tuple[int, Tensor]:
        self._turn = 1 - self._turn
        return self._turn, self.linked.place(self._turn, 1)[0]
