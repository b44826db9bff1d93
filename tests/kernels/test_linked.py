"""The sum over linked memory: one rank's launch, the others played by what lies in their memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels.linked import ALONE, TURNS, Linked

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter cuts bfloat16 off


def group(size: int, rank: int, rows: int, width: int, dtype: torch.dtype, arrived: bool = True):
    """Memory of `size` ranks; the others have set their flags at this one if they `arrived`."""
    terms = [torch.randn(TURNS, rows, width, device=DEVICE).to(dtype) for _ in range(size)]
    flags = [torch.zeros(TURNS, ALONE, size, dtype=torch.int32, device=DEVICE) for _ in range(size)]
    if arrived:
        for other in range(size):
            if other != rank:
                flags[rank][:, :, other] = 1
    lost = torch.zeros(1, dtype=torch.int32, pin_memory=GPU)
    return terms, flags, Linked(terms, flags, rank, lost)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize(("turn", "width"), [(0, 700), (1, 700), (1, 3100)])
def test_adds_the_terms_in_the_order_of_ranks(dtype, size, rank, turn, width):
    torch.manual_seed(size + rank)
    rows = 3  # a ragged end; more than one program, more than wait for themselves
    terms, flags, linked = group(size, rank, 4, width, dtype)
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    total = torch.zeros(rows, width, device=DEVICE)
    for term in terms:
        total += term[turn, :rows].float()
    expected = (x.float() + total).to(dtype)
    assert linked.place(turn, rows).data_ptr() == terms[rank][turn].data_ptr()
    assert torch.equal(linked.add_(x, turn), expected)
    assert not linked.lost
    programs = -(-rows * width // 1024)
    waiting = programs if programs <= ALONE else 1
    for other in range(size):
        if other != rank:  # told the others, and took back what they told
            there = flags[other][:, :, rank]
            assert there[turn].tolist() == [1] * waiting + [0] * (ALONE - waiting)
            assert not there[1 - turn].any()
            assert not flags[rank][turn, :waiting, other].any()


def test_a_rank_that_does_not_come_is_lost_and_not_waited_for_again():
    _, flags, linked = group(2, 0, 1, 64, torch.float32, arrived=False)
    linked.most = 20
    linked.add_(torch.zeros(1, 64, device=DEVICE), 0)
    assert linked.lost
    linked.most = 1 << 40  # would never end
    flags[1].zero_()
    linked.add_(torch.zeros(1, 64, device=DEVICE), 1)
    assert linked.lost
