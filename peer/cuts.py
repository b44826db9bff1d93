"""How the layers of a span are cut into parts, one for each rank of a tensor-parallel group.

A layer falls apart twice. Attention does by heads: a rank that has some query heads, the KV heads
that they read, and the matching columns of the output projection computes a term of the layer's
sum. The MLP does by columns of its hidden layer in the same way, a mixture by columns of every
expert or by whole experts. Embedding and LM head fall apart by rows, the words of the vocabulary. A
`Cut` is one `Part` for each rank: a range of each of these. Norms and routers are whole everywhere.

Parts need not be equal. HexGen (Jiang et al., ICML 2024) lets stages have unlike degrees but cuts
each stage evenly, so a 24 GB card beside one of 48 GB uses half of the latter. Here each member has
a share of its own: the smaller of its shares of the group's memory and of its speed, never more
than its memory takes. Heads are coarse: SmolLM2 has three KV heads, so shares of 5:3:1 are 1:1:1 of
attention. Columns make up for that (and words, if the span has an end of the model), so that the
bytes of weights follow the shares: memory is what a member cannot stretch, and a decode step takes
as long as the reading of the weights.

Up to as many ranks as there are KV heads, each rank has whole groups of query heads. Beyond, query
heads are dealt out one by one, and a KV head lies with every rank that has one of its queries; what
is held twice is a loss that all bear in proportion.

Rejected: a search over all cuts for the fastest (shares of heads and columns differ by a grain at
most, noise beside how well speeds are known); padding heads to equal groups (multiplies the KV
store). Arithmetic is in fractions: equal members give equal cuts on every machine. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer.shares import apportion, in_order, within

Mixing = Literal["columns", "experts"]
"""What of a mixture is dealt out: columns of every expert, or whole experts."""

MOST_RANKS = 64
"""As many as a group has members."""
FINE = Fraction(1, 100)
"""Of the smallest share: what a grain of columns may be off."""
ROUNDING = Fraction(1, 200)
"""Of a member's memory: left free, since columns and words come whole."""
GRAINS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Columns that stay together: products like multiples of a tile, and int4 rounds in groups."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a span can be cut, by a model's config; see `hexswarm.peer.slices.read_sizes`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    columns: int
    """Of the MLP of a layer that is no mixture."""
    vocabulary: int
    dense_layers: int
    mixed_layers: int = 0
    experts: int = 0
    expert_columns: int = 0
    word_matrices: int = 0
    """Of the span's embedding and LM head: 0, 1 (also where both are one) or 2."""
    weight_bytes: int = 4
    """Of one weight in a matrix."""

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim, self.vocabulary)
        if min(*sizes, self.layers, self.weight_bytes) < 1 or self.heads % self.kv_heads:
            raise UsageError("a span to be cut has layers, heads that share KV heads, and words")
        if self.dense_layers and self.columns < 1:
            raise UsageError("a layer to be cut has columns")
        if self.mixed_layers and min(self.experts, self.expert_columns) < 1:
            raise UsageError("a mixture to be cut has experts and columns")

    @property
    def layers(self) -> int:
        return self.dense_layers + self.mixed_layers

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    def attention(self, part: Part) -> int:
        """Weights of attention that `part` has."""
        rows = 2 * len(part.heads) + 2 * len(part.kv_heads)
        return self.layers * rows * self.head_dim * self.hidden

    def inner(self, part: Part) -> int:
        """Weights of MLPs and experts that it has."""
        mixture = self.mixed_layers * len(part.experts) * len(part.expert_columns)
        return 3 * self.hidden * (self.dense_layers * len(part.columns) + mixture)

    def words(self, part: Part) -> int:
        return self.word_matrices * len(part.words) * self.hidden

    @property
    def kept(self) -> int:
        """Weights that every rank has: norms and routers."""
        return self.hidden * (2 * self.layers + self.mixed_layers * self.experts)

    def part_bytes(self, part: Part) -> int:
        """Bytes of the weights of `part`, without the few of biases and of norms of heads."""
        cut = self.attention(part) + self.inner(part) + self.words(part)
        return (cut + self.kept) * self.weight_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has of every layer, and of the vocabulary."""

    rank: int
    size: int
    """Of the group."""
    heads: range
    kv_heads: range
    """Those that `heads` read; the first and the last may lie with neighbours, too."""
    columns: range = range(0)
    words: range = range(0)
    experts: range = range(0)
    expert_columns: range = range(0)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size <= MOST_RANKS:
            raise UsageError(f"rank {self.rank} of {self.size}: a group has 1 to {MOST_RANKS}")

    @property
    def whole(self) -> bool:
        """Nothing is cut."""
        return self.size == 1


@dataclass(frozen=True, slots=True)
class Cut:
    """The parts of all ranks, in their order: each head, column, expert and word has its place."""

    sizes: Sizes
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        sizes, parts = self.sizes, self.parts
        ranks = [(part.rank, part.size) for part in parts]
        if not parts or ranks != [(rank, len(parts)) for rank in range(len(parts))]:
            raise UsageError("a cut has one part for each rank, in order")
        _check_joined("heads", [part.heads for part in parts], sizes.heads)
        _check_joined("words", [part.words for part in parts], sizes.vocabulary)
        if sizes.dense_layers:
            _check_joined("columns", [part.columns for part in parts], sizes.columns)
        if any(part.kv_heads != _read(part.heads, sizes.group) for part in parts):
            raise UsageError("a part has exactly the KV heads that its heads read")
        if sizes.mixed_layers:
            self._check_mixture()

    def _check_mixture(self) -> None:
        experts, columns = range(self.sizes.experts), range(self.sizes.expert_columns)
        if all(part.experts == experts for part in self.parts):
            _check_joined("columns", [part.expert_columns for part in self.parts], len(columns))
        elif all(part.expert_columns == columns for part in self.parts):
            _check_joined("experts", [part.experts for part in self.parts], len(experts))
        else:
            raise UsageError("mixtures are cut by columns or by experts, not by both")

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the bytes of weights that the group holds, each member's."""
        held = [self.sizes.part_bytes(part) for part in self.parts]
        return tuple(one / sum(held) for one in held)


@dataclass(frozen=True, slots=True)
class Member:
    """One peer of the group to be."""

    speed: float = 1.0
    """In any unit that the members have in common."""
    memory_bytes: int | None = None
    """For weights; None: enough for all of them."""

    def __post_init__(self) -> None:
        if not 0 < self.speed < float("inf"):
            raise UsageError(f"a member's speed is positive, not {self.speed}")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise UsageError("a member has memory for weights")


def whole(sizes: Sizes) -> Part:
    """The only part of what is not cut."""
    return Part(
        *(0, 1, range(sizes.heads), range(sizes.kv_heads)),
        *(range(sizes.columns), range(sizes.vocabulary)),
        *(range(sizes.experts), range(sizes.expert_columns)),
    )


def plan_cut(sizes: Sizes, members: Sequence[Member], mixing: Mixing = "columns") -> Cut:
    """The cut by the members' shares (see the module). Raises UsageError, OutOfMemory."""
    shares = member_shares(sizes, members)
    count = len(members)
    if count <= sizes.kv_heads:
        heads = [n * sizes.group for n in apportion(sizes.kv_heads, shares)]
    else:
        heads = apportion(sizes.heads, shares)
    cut = _fill(sizes, heads, shares, mixing)
    for part, member in zip(cut.parts, members, strict=True):
        needed, room = sizes.part_bytes(part), member.memory_bytes
        if room is not None and needed > room:
            raise OutOfMemory(
                f"rank {part.rank} of {count} would hold {needed / 1e9:.2f} GB of weights and has "
                f"room for {room / 1e9:.2f}",
                remedy="take a member with more memory, or a shorter span",
            )
    return cut


def cut_by_heads(sizes: Sizes, heads: Sequence[int], mixing: Mixing = "columns") -> Cut:
    """The cut that gives each rank so many query heads, and of all the rest in proportion."""
    if not heads or min(heads) < 1 or sum(heads) != sizes.heads:
        raise UsageError(f"{list(heads)} are not all {sizes.heads} heads")
    shares = [Fraction(n, sizes.heads) for n in heads]
    return _fill(sizes, heads, shares, mixing)


def attention_runs(heads: range, group: int) -> tuple[tuple[int, int], ...]:
    """Runs of KV heads that are read by equally many of `heads`: (KV heads, queries of each).

    One run unless the heads begin or end within a group of `group` queries.
    """
    runs: list[tuple[int, int]] = []
    for kv in _read(heads, group):
        queries = min(heads.stop, (kv + 1) * group) - max(heads.start, kv * group)
        if runs and runs[-1][1] == queries:
            runs[-1] = (runs[-1][0] + 1, queries)
        else:
            runs.append((1, queries))
    return tuple(runs)


def member_shares(sizes: Sizes, members: Sequence[Member]) -> list[Fraction]:
    """Of the weights that can be cut, each member's: by memory and speed, within its memory."""
    if not 1 <= len(members) <= MOST_RANKS:
        raise UsageError(f"a group has 1 to {MOST_RANKS} members, not {len(members)}")
    speed = sum(Fraction(member.speed) for member in members)
    wanted = [Fraction(member.speed) / speed for member in members]
    memories = [member.memory_bytes for member in members]
    known = [memory for memory in memories if memory is not None]
    if len(known) == len(members):
        wanted = [min(w, Fraction(m, sum(known))) for w, m in zip(wanted, known, strict=True)]
    alone, kept = whole(sizes), sizes.kept * sizes.weight_bytes
    total = sizes.part_bytes(alone) - kept
    rooms = [None if m is None else m * (1 - ROUNDING) - kept for m in memories]
    limits = [None if room is None else max(room / total, Fraction()) for room in rooms]
    return within(wanted, limits)


def _fill(sizes: Sizes, heads: Sequence[int], shares: Sequence[Fraction], mixing: Mixing) -> Cut:
    """Deal out columns and words so that the weights of all follow the shares."""
    runs = in_order(heads)
    parts = [Part(rank, len(runs), run, _read(run, sizes.group)) for rank, run in enumerate(runs)]
    alone = whole(sizes)
    held = [sizes.attention(part) for part in parts]
    total = sum(held) + sizes.inner(alone) + sizes.words(alone)
    # Columns for what heads are off, with words in proportion; then words for what columns are off.
    rest = [s * (total - sizes.words(alone)) - h for s, h in zip(shares, held, strict=True)]
    parts = _with_columns(sizes, parts, [max(r, Fraction()) for r in rest], mixing)
    held = [h + sizes.inner(part) for h, part in zip(held, parts, strict=True)]
    rest = [max(s * total - h, Fraction()) for s, h in zip(shares, held, strict=True)]
    words = apportion(sizes.vocabulary, rest if sizes.word_matrices else shares)
    dealt = zip(parts, in_order(words), strict=True)
    return Cut(sizes, tuple(replace(part, words=run) for part, run in dealt))


def _with_columns(
    sizes: Sizes, parts: Sequence[Part], shares: Sequence[Fraction], mixing: Mixing
) -> list[Part]:
    """`parts` with columns and experts by `shares`."""
    columns = [range(0)] * len(parts)
    if sizes.dense_layers:
        columns = _columns(sizes.columns, shares)
    experts = [range(sizes.experts)] * len(parts)
    widths = [range(sizes.expert_columns)] * len(parts)
    if sizes.mixed_layers and mixing == "experts":
        experts = in_order(apportion(sizes.experts, shares))
    elif sizes.mixed_layers:
        widths = _columns(sizes.expert_columns, shares)
    return [
        replace(part, columns=some, experts=those, expert_columns=width)
        for part, some, those, width in zip(parts, columns, experts, widths, strict=True)
    ]


def _columns(count: int, shares: Sequence[Fraction]) -> list[range]:
    """`count` columns, in the largest grains that are fine enough."""
    total = sum(shares, Fraction())
    smallest = min(shares) / total if total else Fraction()
    fine = [grain for grain in GRAINS if count % grain == 0 and grain <= FINE * smallest * count]
    return in_order(apportion(count, shares, fine[0] if fine else 1))


def _read(heads: range, group: int) -> range:
    """KV heads that query heads read."""
    return range(heads.start // group, -(-heads.stop // group))


def _check_joined(what: str, ranges: Sequence[range], count: int) -> None:
    """Raise UsageError unless the ranges follow each other from 0 to `count`, none empty."""
    if in_order([len(one) for one in ranges]) != list(ranges) or not all(ranges):
        raise UsageError(f"the {what} of a cut's parts do not follow each other")
    if ranges[-1].stop != count:
        raise UsageError(f"the {what} of a cut's parts end at {ranges[-1].stop} of {count}")
