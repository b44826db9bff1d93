"""The announcements of one model as arrays: what the search reads instead of 10,000 records.

One row for each announcement, in order of peer id. A changed record is a changed row of copied
arrays (less than 1 ms for 10,000 rows), so that a snapshot never has to be built again for one
word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexswarm.records import Announcement, PeerId
from hexswarm.router import vivaldi
from hexswarm.router.regions import Flags, Floats, Regions, find_regions

Integers = NDArray[np.int64]
Small = NDArray[np.int32]

LEAST_BYTES_PER_S = 1.0
"""No bandwidth that is told counts as less, so that its reciprocal stays finite."""


@dataclass(frozen=True, slots=True)
class Columns:
    """All announcements of a model; every array has one row each, and none may be written to."""

    peers: tuple[PeerId, ...]
    announcements: tuple[Announcement, ...]
    index: Mapping[PeerId, int]
    """The row of a peer."""
    first: Small
    end: Small
    layers: Small
    serving: Flags
    decode_layer_s: Floats
    row_layer_s: Floats
    prefill_layer_s: Floats
    head_s: Floats
    queue_s: Floats
    rows: Floats
    busy: Floats
    free_kv_tokens: Integers
    kv_tokens: Integers
    position: Floats
    """(n, 3) seconds; nan without coordinates."""
    height: Floats
    error: Floats
    up_s_per_byte: Floats
    """0 if not known; a known bandwidth is finite, so never 0."""
    down_s_per_byte: Floats
    relayed: Flags
    rounded: Flags
    """Weights in fewer bits than the model has."""
    regions: Regions
    region: NDArray[np.int16]
    """0: the unknown place."""
    access_s: Floats

    @property
    def region_rtt_s(self) -> Floats:
        """(R, R) seconds between members of two regions, without their access."""
        return self.regions.rtt_s

    @property
    def placed(self) -> Flags:
        """Rows whose coordinates serve for estimates (False where error is nan)."""
        return self.error < vivaldi.NOTHING


def build(items: Sequence[Announcement], words: Mapping[PeerId, Announcement]) -> Columns:
    """Columns of `items`, which are in order of peer id; `words` has the newest word of each peer
    on any model, which tells its place and bandwidth."""
    table = list(zip(*(_values(item, words[item.peer]) for item in items), strict=True))
    arrays: dict[str, Any] = {
        name: np.array(table[at] if table else (), dtype=dtype)
        for at, (name, dtype) in enumerate(_DTYPES.items())
    }
    arrays["position"] = arrays["position"].reshape(-1, 3)
    error = arrays["error"]
    regions = find_regions(arrays["position"], error < vivaldi.NOTHING)
    region, access_s = regions.assign(arrays["position"], arrays["height"], error < vivaldi.NOTHING)
    peers = tuple(item.peer for item in items)
    return _frozen(
        Columns(
            peers=peers,
            announcements=tuple(items),
            index={peer: row for row, peer in enumerate(peers)},
            regions=regions,
            region=region,
            access_s=access_s,
            **arrays,
        )
    )


def with_rows(held: Columns, changed: Mapping[int, tuple[Announcement, Announcement]]) -> Columns:
    """The same peers with other words (item, newest word) in some rows."""
    rows = list(changed)
    table = zip(*(_values(*changed[row]) for row in rows), strict=True)
    new: dict[str, Any] = {}
    for (name, dtype), values in zip(_DTYPES.items(), table, strict=True):
        array: NDArray[Any] = getattr(held, name)
        value: NDArray[Any] = np.array(values, dtype=dtype)
        if not np.array_equal(array[rows], value, equal_nan=dtype is np.float64):
            new[name] = array.copy()
            new[name][rows] = value
    items = list(held.announcements)
    for row in rows:
        items[row] = changed[row][0]
    result = replace(held, announcements=tuple(items), **new)
    if "position" in new or "error" in new or "height" in new:
        result = _placed_again(result, rows)
    return _frozen(result)


def with_peer(held: Columns, row: int, item: Announcement, word: Announcement) -> Columns:
    """One peer more, at `row`."""
    new: dict[str, Any] = {
        name: np.insert(getattr(held, name), row, np.array(value, dtype=dtype), axis=0)
        for (name, dtype), value in zip(_DTYPES.items(), _values(item, word), strict=True)
    }
    new["region"] = np.insert(held.region, row, 0)
    new["access_s"] = np.insert(held.access_s, row, 0.0)
    peers = (*held.peers[:row], item.peer, *held.peers[row:])
    items = (*held.announcements[:row], item, *held.announcements[row:])
    index = {peer: at for at, peer in enumerate(peers)}
    result = replace(held, peers=peers, announcements=items, index=index, **new)
    return _frozen(_placed_again(result, [row]))


def without_row(held: Columns, row: int) -> Columns:
    """One peer less."""
    arrays = [*_DTYPES, "region", "access_s"]
    new: dict[str, Any] = {name: np.delete(getattr(held, name), row, axis=0) for name in arrays}
    peers = (*held.peers[:row], *held.peers[row + 1 :])
    items = (*held.announcements[:row], *held.announcements[row + 1 :])
    index = {peer: at for at, peer in enumerate(peers)}
    result = replace(held, peers=peers, announcements=items, index=index, **new)
    return _frozen(_placed_again(result, []))


def _placed_again(held: Columns, rows: Sequence[int]) -> Columns:
    """Regions for changed rows: the nearest centre's, or new centres for all."""
    placed = held.placed
    count = int(placed.sum())
    if held.regions.stale(len(placed), count):
        regions = find_regions(held.position, placed)
        region, access_s = regions.assign(held.position, held.height, placed)
        return replace(held, regions=regions, region=region, access_s=access_s)
    if not rows:
        return held
    at = np.array(rows)
    region, access_s = held.region.copy(), held.access_s.copy()
    region[at], access_s[at] = held.regions.assign(held.position[at], held.height[at], placed[at])
    return replace(held, region=region, access_s=access_s)


_DTYPES: dict[str, type] = {
    "first": np.int32,
    "end": np.int32,
    "layers": np.int32,
    "serving": np.bool_,
    "decode_layer_s": np.float64,
    "row_layer_s": np.float64,
    "prefill_layer_s": np.float64,
    "head_s": np.float64,
    "queue_s": np.float64,
    "rows": np.float64,
    "busy": np.float64,
    "free_kv_tokens": np.int64,
    "kv_tokens": np.int64,
    "position": np.float64,
    "height": np.float64,
    "error": np.float64,
    "up_s_per_byte": np.float64,
    "down_s_per_byte": np.float64,
    "relayed": np.bool_,
    "rounded": np.bool_,
}
"""The columns that are read off a record, in the order of `_values`."""

_NOWHERE = (np.nan, np.nan, np.nan)


def _values(item: Announcement, word: Announcement) -> tuple[Any, ...]:
    """One row, in the order of `_DTYPES`."""
    span, speed, place = item.span, item.speed, word.coordinates
    up, down = word.up_bytes_per_s, word.down_bytes_per_s
    return (
        *(span.first, span.end, item.layers, item.serving),
        *(speed.decode_layer_s, speed.row_layer_s, speed.prefill_layer_s, speed.head_s),
        *(item.queue_s, item.rows, item.busy, item.free_kv_tokens, item.kv_tokens),
        *((place.position_s, place.height_s, place.error) if place else (_NOWHERE, *_NOWHERE[:2])),
        *(_s_per_byte(up), _s_per_byte(down), word.relayed, "+" in item.dtype),
    )


def _s_per_byte(bytes_per_s: float | None) -> float:
    return 0.0 if bytes_per_s is None else 1 / max(LEAST_BYTES_PER_S, bytes_per_s)


def _frozen(columns: Columns) -> Columns:
    """`columns` whose arrays refuse to be written to."""
    for field in fields(columns):
        value = getattr(columns, field.name)
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    return columns
