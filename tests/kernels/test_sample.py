"""The choice of tokens on a GPU is that of the plain form, to the token.

Interpreted without a GPU.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels import choice, sample
from hexswarm.kernels.choice import GREEDY, NOT_FINITE, Draw, settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def same(logits, draws):
    """The tokens, which both forms choose."""
    made = settings(draws)
    wanted = choice.pick(logits, made)
    found = sample.pick(logits.to(DEVICE), made.to(DEVICE)).cpu()
    assert found.tolist() == wanted.tolist()
    return found.tolist()


DRAWS = [
    Draw(0.8, 0, 0.9, 0.0, 0.97),
    Draw(1.3, 40, 0.8, 0.05, 0.999),
    GREEDY,
]


def test_tokens_are_those_of_the_plain_form():
    """Peaked, so that the list decides, with equals among the words."""
    logits = (torch.randn(len(DRAWS), 1300) * 5).bfloat16().float()
    tokens = same(logits, DRAWS)
    assert tokens[-1] == int(logits[-1].argmax())


def test_a_vocabulary_of_a_few_words():
    same(torch.randn(1, 50), [Draw(1.0, 0, 0.9, 0.02, 0.8)])


def test_an_answer_beyond_the_list_is_found_in_the_full_row():
    """Flat weights, and a draw among the last."""
    draws = [Draw(5.0, 900, 1.0, 0.0, 0.97)]
    logits = torch.randn(1, 1300)
    for line, token in zip(logits, same(logits, draws), strict=True):
        assert int((line > line[token]).sum()) > 700


def test_a_crowd_of_equals_overflows_the_list(monkeypatch):
    """And the draw says which of them, by id."""
    monkeypatch.setattr(sample, "ROOM", 64)
    logits = torch.zeros(1, 600)
    logits[0, ::3] = 2.0
    draw = Draw(1.0, 1, 1.0, 0.0, 0.5)
    assert same(logits, [draw]) == [300]


def test_a_row_that_is_no_numbers_does_not_disturb_the_others():
    logits = torch.randn(2, 300) * 4
    logits[1, 7] = float("nan")
    tokens = same(logits, [GREEDY, Draw(1.0, 0, 0.5, 0.0, 0.1)])
    assert tokens[0] == int(logits[0].argmax())
    assert tokens[1] == NOT_FINITE


def test_weights_are_exact_to_twenty_bits_and_never_rise_as_logits_fall():
    logits = torch.cat((torch.rand(20_000) * -30, torch.linspace(-1e-6, 0, 50)))
    logits = logits.sort(descending=True).values
    rate = settings([Draw(1.0, 0, 1.0, 0.0, 0.0)])[0, 0].float()
    weights = choice.weigh(logits, logits[0], rate)
    exact = torch.exp2(logits.double() * rate.double()) * choice.LARGEST
    assert ((weights - exact).abs() <= exact * 2.0**-18 + 1).all()
    assert int(weights[0]) == choice.LARGEST
    assert (weights[1:] <= weights[:-1] * (1 + 2.0**-20)).all()


def test_a_shortlist_of_any_length_finds_the_same_token(monkeypatch):
    rng = random.Random(2)
    logits = torch.randn(20, 700) * 2
    draws = [
        Draw(rng.choice((0.5, 2.0)), rng.choice((0, 9)), rng.choice((1.0, 0.7)), 0.01, rng.random())
        for _ in range(20)
    ]
    wanted = choice.pick(logits, settings(draws)).tolist()
    for length in (1, 10, 699):
        monkeypatch.setattr(choice, "SHORTLIST", length)
        assert choice.pick(logits, settings(draws)).tolist() == wanted
