"""Mixtures in Triton against float64: interpreted without a GPU, compiled with one.

Weights of an expert that nobody chose are no numbers, nor is what a launch is to write.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels import compiled, experts, reference
from hexswarm.kernels.experts import FEW, MANY, ROWS
from hexswarm.kernels.quantise import dequantise, quantise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""The interpreter multiplies the bits of bfloat16 as integers."""
BOUNDS = {torch.float32: 1e-5, HALF: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=["float32", "half"])
HIDDEN, WIDTH = 136, 40
NAN = float("nan")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What `torch.empty` gives is full of what is wrong anywhere."""
    torch.manual_seed(0)

    def empty(*shape, dtype=torch.float32, device=None):
        return torch.full(
            shape, NAN if dtype.is_floating_point else 1 << 30, dtype=dtype, device=device
        )

    monkeypatch.setattr(torch, "empty", empty)


class Mixture:
    """Random experts and tokens, and where those go."""

    def __init__(self, rows, count, chosen, dtype=torch.float32, crowd=None):
        """`crowd`: how many experts there are to choose from."""

        def matrices(outputs, inputs):
            lying = torch.randn(count, outputs, inputs, device=DEVICE) / inputs**0.5
            return lying.to(dtype).transpose(1, 2)

        self.x = torch.randn(rows, HIDDEN, device=DEVICE).to(dtype)
        scores = torch.randn(rows, count, device=DEVICE)
        scores[:, crowd or count :] = float("-inf")
        self.shares, self.experts = reference.route(scores, chosen, True)
        self.gate_up, self.down = matrices(2 * WIDTH, HIDDEN), matrices(HIDDEN, WIDTH)
        for expert in set(range(count)) - set(self.experts.flatten().tolist()):
            self.gate_up[expert] = self.down[expert] = NAN

    def exact(self, first=0, end=None):
        """Token by token, expert by expert, of the experts [first, end)."""
        wanted = torch.zeros(self.x.shape, dtype=torch.float64, device=DEVICE)
        held = range(first, len(self.down) if end is None else end)
        for row, (shares, chosen) in enumerate(
            zip(self.shares, self.experts.tolist(), strict=True)
        ):
            for share, expert in zip(shares.double(), chosen, strict=True):
                if expert in held:
                    gate, up = (self.x[row].double() @ self.gate_up[expert].double()).chunk(2)
                    inner = torch.nn.functional.silu(gate) * up
                    wanted[row] += share * (inner @ self.down[expert].double())
        return wanted

    def mix(self, rows=slice(None), first=0, end=None, **options):
        weights = self.gate_up[first:end], self.down[first:end]
        given = self.x[rows], self.shares[rows], self.experts[rows]
        return experts.mix(*given, *weights, first, **options)


def near(out, wanted):
    error = (out.double() - wanted).norm() / wanted.norm()
    return bool(error < BOUNDS[out.dtype])


@DTYPES
@pytest.mark.parametrize(
    ("rows", "count", "chosen", "crowd"),
    [(1, 9, 3, None), (5, 4, 2, None), (21, 3, 2, 2), (FEW + 6, 3, 1, None)],
    ids=["one token", "few", "all to the same two", "a prompt"],
)
def test_a_mixture_equals_its_definition(rows, count, chosen, crowd, dtype):
    mixture = Mixture(rows, count, chosen, dtype, crowd)
    wanted = mixture.exact()
    assert near(mixture.mix(), wanted)
    given = mixture.x, mixture.shares, mixture.experts, mixture.gate_up, mixture.down
    assert near(reference.mix(*given), wanted)


def test_experts_of_other_ranks_add_nothing():
    """The parts of all ranks, one of which has none, add up to the whole."""
    mixture = Mixture(6, 7, 3)
    every = torch.zeros_like(mixture.x)
    for first, end in ((0, 2), (2, 5), (5, 7), (3, 3)):
        part = mixture.mix(first=first, end=end)
        wanted = mixture.exact(first, end)
        assert torch.allclose(part.double(), wanted, rtol=1e-5, atol=1e-6)
        every += part
    assert near(every, mixture.exact())


def test_a_row_does_not_depend_on_its_neighbours():
    """Bit for bit, alone and among as many as there may be, wherever the tiles end."""
    mixture = Mixture(FEW, 3, 2)
    every = mixture.mix()
    for rows in ([17], [63, 5], list(range(20, 37))):
        assert torch.equal(mixture.mix(rows), every[rows])


def test_adding_to_what_is_there():
    mixture = Mixture(3, 4, 2)
    room = torch.randn(5, 2 * HIDDEN, device=DEVICE)
    kept = room.clone()
    out = room[1:4, :HIDDEN]
    assert mixture.mix(out=out, add=True) is out
    assert near(out, kept[1:4, :HIDDEN].double() + mixture.exact())
    room[1:4, :HIDDEN] = kept[1:4, :HIDDEN]
    assert torch.equal(room, kept)
    mixture.mix(first=2, end=2, out=out, add=True)
    assert torch.equal(room, kept)


@pytest.mark.parametrize("tile", [ROWS, MANY])
@pytest.mark.parametrize(
    "counts", [[1], [0, 0, 3], [16, 0, 17, 64, 1], [700, 0, 500, 1, 15]], ids=str
)
def test_every_pair_has_its_place_in_a_slot_of_its_expert(counts, tile):
    """Experts before `FIRST` and after the last one held leave no trace."""
    first, held = 2, len(counts)
    numbers = [0] * 3 + [e + first for e, n in enumerate(counts) for _ in range(n)] + [first + held]
    shuffled = torch.tensor(numbers, device=DEVICE)[torch.randperm(len(numbers), device=DEVICE)]
    order, plan = experts.sort(shuffled.view(-1, 1), first, held, tile)
    assert plan.shape[1] == experts.most_slots(len(numbers), held, tile)
    found, tiles = [], 0
    for expert, begin, end in plan.t().tolist():
        if expert < 0:
            continue
        pairs = order[begin : min(begin + tile, end)]
        assert (shuffled[pairs] == expert + first).all()
        found += pairs.tolist()
        tiles += 1
    assert found == [
        p for e in range(held) for p in (shuffled == e + first).nonzero()[:, 0].tolist()
    ]
    assert tiles == sum(-(-count // tile) for count in counts)


@DTYPES
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("normalised", [False, True])
def test_routing(normalised, dtype):
    scores = (3 * torch.randn(12, 70, device=DEVICE)).to(dtype)[:, :67]
    scores[3] = scores[3].round()  # ties
    scores[7] = NAN
    slots = torch.arange(12, device=DEVICE)
    slots[9] = -1
    shares, found = experts.route(scores, 5, normalised, slots)
    exact = scores.double().softmax(-1)
    assert (found[[7, 9]] == 67).all()
    for row in sorted(set(range(12)) - {7, 9}):
        chosen = sorted(range(67), key=lambda expert: (-exact[row, expert], expert))[:5]
        assert found[row].tolist() == chosen
        wanted = exact[row, chosen] / (exact[row, chosen].sum() if normalised else 1)
        torch.testing.assert_close(shares[row].double(), wanted, rtol=1e-5, atol=0)


def test_rows_without_a_session_read_nothing():
    """Their experts are none, so they get nothing but zeros and take no slot."""
    mixture = Mixture(4, 6, 2)
    mixture.experts[1] = 6
    wanted = mixture.exact()
    assert not wanted[1].any()
    got = mixture.mix()
    assert near(got, wanted)
    assert not got[1].any()
    _, plan = experts.sort(mixture.experts, 0, 6, ROWS)
    assert (plan[0] >= 0).sum() == len(mixture.experts[[0, 2, 3]].unique())


def test_experts_in_few_bits_go_one_after_another():
    mixture = Mixture(5, 3, 2)
    few = [[quantise(e.t(), 8) for e in m] for m in (mixture.gate_up, mixture.down)]
    got = compiled.mix(mixture.x, mixture.shares, mixture.experts, *map(tuple, few))
    for matrix, rounded in zip((mixture.gate_up, mixture.down), few, strict=True):
        for place, weight in zip(matrix, rounded, strict=True):
            place.copy_(dequantise(weight, torch.float32).t())
    assert near(got, mixture.exact())
