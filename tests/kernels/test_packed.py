"""Q4_0 of a GGUF in our order of bits: the numbers of the `gguf` package, products with them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hexswarm.kernels import linear4
from hexswarm.kernels.linear import linear
from hexswarm.kernels.product import product, widen
from hexswarm.kernels.quantise import (
    FILE_GROUPS,
    dequantise,
    kept_group,
    quantise,
    repack,
    rounded_bytes,
)

Q4_0 = gguf.GGMLQuantizationType.Q4_0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
GROUPS_OF_FILES = pytest.mark.parametrize(("inputs", "group"), [(512, 32), (384, 16)])


def q4_0(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Any bits as weights, any number as scale: more than a converter would write."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, inputs // 32, 18), dtype=np.uint8)
    scales = rng.normal(0, 0.1, (rows, inputs // 32)).astype(np.float16)
    scales.reshape(-1)[:: max(scales.size // 3, 1)] = 0
    blocks[..., :2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_number_changes(data: st.DataObject) -> None:
    """Whatever columns are kept of whatever blocks, they are those that the file's format means."""
    blocks_wide = data.draw(st.integers(4, 40))
    begin = 16 * data.draw(st.integers(0, 2 * blocks_wide - 8))
    count = 128 * data.draw(st.integers(1, (32 * blocks_wide - begin) // 128))
    rows, columns = data.draw(st.integers(1, 9)), range(begin, begin + count)
    raw = q4_0(rows, 32 * blocks_wide, data.draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hexswarm.kernels.quantise.PIECE", data.draw(st.integers(1, 5000)))
        kept = repack(torch.from_numpy(raw), columns)
        widened = dequantise(kept, torch.float32)
    exact = gguf.quants.dequantize(raw, Q4_0)[:, begin : begin + count]
    assert np.array_equal(widened.numpy(), exact)
    assert kept.shape == (rows, count)
    assert count // kept.scales.shape[1] == kept_group(columns)
    if begin % 32 == 0:
        assert kept.nbytes == rounded_bytes(rows, count, 4, FILE_GROUPS)


@pytest.mark.parametrize(
    ("columns", "group"),
    [
        (range(256), 32),
        (range(32, 288), 32),
        (range(16, 272), 16),
        (range(128), 16),
        (range(896), 16),
        (range(8, 264), None),
        (range(576), None),
        (range(64), None),
    ],
)
def test_which_columns_can_be_kept(columns: range, group: int | None) -> None:
    assert kept_group(columns) == group


def test_what_is_rounded_beside_blocks_has_their_groups() -> None:
    weight = torch.randn(6, 512)
    fine, coarse = quantise(weight, 4, FILE_GROUPS), quantise(weight, 4)
    assert fine.scales.shape == (6, 16)
    assert fine.nbytes == rounded_bytes(6, 512, 4, FILE_GROUPS)
    errors = [(dequantise(few, torch.float32) - weight).norm() for few in (fine, coarse)]
    assert errors[0] < errors[1]
    assert quantise(weight[:, :96], 4, FILE_GROUPS).bits == 8


@GROUPS_OF_FILES
@pytest.mark.parametrize(("form", "dtype"), [("vector", torch.float32), ("matrix", HALF)])
@pytest.mark.parametrize("gated", [False, True])
def test_products_read_the_groups_of_files(
    inputs: int, group: int, form: str, dtype: torch.dtype, gated: bool
) -> None:
    weight = repack(torch.from_numpy(q4_0(20, inputs)).to(DEVICE), range(inputs))
    assert inputs // weight.scales.shape[1] == group
    x = torch.randn(3, inputs, device=DEVICE).to(dtype)
    wanted = x.double() @ dequantise(weight, torch.float64).T
    if gated:
        gate, up = wanted.chunk(2, -1)
        wanted = torch.nn.functional.silu(gate) * up
    out = torch.full_like(wanted, float("nan"), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear4, "FORM", form)
        linear(x, weight, out, gated=gated)
    error = (out.double() - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@GROUPS_OF_FILES
def test_many_tokens_widen_them(inputs: int, group: int) -> None:
    weight = repack(torch.from_numpy(q4_0(6, inputs)).to(DEVICE), range(inputs))
    assert inputs // weight.scales.shape[1] == group
    exact = dequantise(weight, torch.float32)
    assert torch.equal(widen(weight, torch.float32), exact)
    x = torch.randn(9, inputs, device=DEVICE)
    out = product(x, weight, torch.empty(9, 6, device=DEVICE))
    torch.testing.assert_close(out, x @ exact.T)
