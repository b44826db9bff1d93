"""The sum over linked memory: one rank's launch, the others played by what lies in their memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels.linked import ALONE, TURNS, Linked, Totals

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


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 2)])
def test_totals_of_any_size_go_piece_by_piece(dtype, size, rank):
    torch.manual_seed(size + rank)
    words = 512
    terms, flags, linked = group(size, rank, 1, words, torch.float32)
    x = torch.randn(7, 100, device=DEVICE).to(dtype)
    kept = x.clone()
    found = Totals(linked, words).total(x)
    own = x.float().view(-1)
    for first, turn in ((0, 1), (words, 0)):
        count = min(words, 700 - first)
        expected = torch.zeros(count, device=DEVICE)
        for one in range(size):
            term = terms[one][turn, 0, :count]
            expected += own[first : first + count] if one == rank else term
        assert torch.equal(found.view(-1)[first : first + count], expected)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    assert torch.equal(x, kept)
    for other in range(size):
        if other != rank:
            assert flags[other][:, 0, rank].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
@pytest.mark.parametrize("source", [0, 1])
def test_what_one_rank_has_is_handed_to_all_bit_by_bit(dtype, source):
    rank, words = 1, 256
    terms, _, linked = group(2, rank, 1, words, torch.float32)
    bits = torch.randint(-128, 127, (2, 4 * words), dtype=torch.int8, device=DEVICE)
    for turn, lies in zip((1, 0), bits, strict=True):
        terms[0][turn, 0] = lies.view(torch.float32)  # nan and minus zero among them
    size = 1501 if dtype == torch.uint8 else 1504
    x = torch.randint(0, 100, (size,), dtype=torch.uint8, device=DEVICE).view(dtype)
    own = x.view(torch.uint8).clone()
    found = Totals(linked, words).share(x, source)
    assert found.data_ptr() == x.data_ptr()
    theirs = bits.view(-1)[:size].view(torch.uint8)
    assert torch.equal(found.view(torch.uint8), own if source == rank else theirs)
    assert not linked.lost
