"""What goes over the wire, and how ranges and segments are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hexswarm.peer.reduction import SEGMENT_BYTES, Format, segments

ANY_FLOATS = arrays.arrays(
    np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_subnormal=True)
)


@given(ANY_FLOATS)
def test_bfloat16_is_rounded_as_torch_does(values: np.ndarray) -> None:
    """Nearest, ties to even, infinities, NaN and all."""
    out = np.empty(len(values), np.uint16)
    Format.BFLOAT16.encode(values, out)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    back = np.empty(len(values), np.float32)
    Format.BFLOAT16.decode(out, back)
    assert np.array_equal(back, expected.float().numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F808000, 0x3F80),  # a tie goes to the even one, down
        (0x3F818000, 0x3F82),  # and up
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest number is nearer to infinity
        (0x80000000, 0x8000),
        (0x7F800001, 0x7FC0),  # a NaN whose bits above are those of infinity
    ],
)
def test_bfloat16_at_its_corners(bits: int, rounded: int) -> None:
    values, out = np.array([bits], np.uint32).view(np.float32), np.empty(1, np.uint16)
    Format.BFLOAT16.encode(values, out)
    assert out[0] == rounded


@given(ANY_FLOATS)
def test_rounding_in_place_is_a_way_over_the_wire(values: np.ndarray) -> None:
    for wire in Format:
        payload, there = np.empty(len(values), wire.dtype), np.empty(len(values), np.float32)
        wire.encode(values, payload)
        wire.decode(payload, there)
        here = values.copy()
        wire.round(here)
        assert here.tobytes() == there.tobytes()


@given(st.integers(1, 9), st.integers(0, 200_000), st.sampled_from(Format))
def test_segments_cover_a_vector_once_and_in_order(size: int, count: int, wire: Format) -> None:
    found = [part for owner in range(size) for part in segments(owner, size, count, wire)]
    at = 0
    for first, end in found:
        assert first == at
        assert 0 < (end - first) * wire.value_bytes <= SEGMENT_BYTES
        at = end
    assert at == count
    shares = [
        sum(end - first for first, end in segments(owner, size, count, wire))
        for owner in range(size)
    ]
    assert max(shares) - min(shares) <= 1
