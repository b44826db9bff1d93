"""Filters keep what transformers' processors keep; draws are right in frequency and repeatable."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hexswarm.errors import UsageError
from hexswarm.kernels import choice as module
from hexswarm.peer.sampling import (
    choose,
    choose_all,
    choose_greedy,
    distribution,
    draw_of,
    penalise,
    uniform,
)
from hexswarm.records import Sampling

torch.set_num_threads(1)


def logits(vocabulary, seed, spread=3.0):
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def reference(row, sampling, history):
    """Probabilities over the whole vocabulary by transformers' own processors."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    ids = torch.tensor([history or [0]])
    return steps(ids, row.clone()[None])[0].softmax(-1)


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=5.0),
    Sampling(temperature=1.0, repetition_penalty=1.3),
    Sampling(temperature=1.0, repetition_penalty=0.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=17),
    Sampling(temperature=1.0, top_k=100_000),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=0.8, top_k=50, top_p=0.9),
    Sampling(temperature=1.7, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_filters_keep_the_tokens_and_probabilities_of_transformers(sampling, vocabulary):
    for seed in range(5):
        row = logits(vocabulary, seed)
        history = random.Random(seed).choices(range(vocabulary), k=20)
        expected = reference(row, sampling, history)
        ids, probabilities = distribution(row, sampling, history)
        got = torch.zeros(vocabulary, dtype=torch.float64)
        got[ids] = probabilities
        assert set(ids.tolist()) == set(expected.nonzero().flatten().tolist())
        torch.testing.assert_close(got, expected.double(), rtol=1e-4, atol=1e-7)
        assert (probabilities.diff() <= 0).all()


@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.05, 10),
    top_k=st.sampled_from([0, 0, 1, 40, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_the_shortlist_never_changes_the_token(seed, temperature, top_k, top_p, min_p):
    """choose() equals the inverse distribution function over the complete, sorted distribution."""
    row = logits(3000, seed, spread=2.0)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    ids, probabilities = distribution(row, sampling)
    place = int((probabilities.cumsum(0) <= uniform(seed, 9) * (1 - 1e-12)).sum())
    near = ids[max(0, place - 1) : place + 2].tolist()  # the sums differ in the last bits
    token = choose(row, sampling, [], 9)
    assert token in near
    shortlist, module.SHORTLIST = module.SHORTLIST, 7
    try:
        assert choose(row, sampling, [], 9) == token
        module.SHORTLIST = 3000
        assert choose(row, sampling, [], 9) == token
    finally:
        module.SHORTLIST = shortlist


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=7),
        Sampling(temperature=0.7, top_k=8, seed=8),
        Sampling(temperature=1.3, top_p=0.8, min_p=0.05, seed=2**64 - 1),
    ],
    ids=str,
)
def test_frequencies_over_positions_follow_the_probabilities(sampling):
    row, draws = logits(30, 3, spread=1.5), 4000
    ids, probabilities = distribution(row, sampling)
    counts = torch.zeros(30)
    for position in range(draws):
        counts[choose(row, sampling, [], position)] += 1
    assert counts.sum() == counts[ids].sum()
    expected = probabilities * draws
    chi_square = float(((counts[ids] - expected) ** 2 / expected).sum())
    freedom = len(ids) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_the_uniform_numbers_are_pinned_and_uniform():
    """Peers of all versions must draw alike: these values are part of the protocol."""
    assert uniform(0, 0) == 0.7606128826055715
    assert uniform(2**64 - 1, 123456) == 0.6730443982441463
    numbers = [uniform(seed, position) for seed in range(20) for position in range(200)]
    assert len(set(numbers)) == len(numbers)
    buckets = [0] * 16
    for number in numbers:
        assert 0 <= number < 1
        buckets[int(number * 16)] += 1
    assert max(abs(count - 250) for count in buckets) < 5 * math.sqrt(250)


def test_greedy_takes_the_lowest_id_among_equals():
    row = torch.zeros(500)
    row[[77, 300, 301]] = 2.0
    assert choose(row, Sampling(), [], 0) == 77
    assert choose_greedy(torch.stack((row, -row, row.roll(3)))) == [77, 0, 80]


def test_ties_are_ordered_by_id():
    ids, _ = distribution(torch.tensor([1.0, 2.0, 1.0, 2.0]), Sampling(temperature=1.0))
    assert ids.tolist() == [1, 3, 0, 2]


def test_greedy_applies_the_repetition_penalty():
    row = torch.tensor([3.0, 2.9, -1.0])
    assert choose(row, Sampling(repetition_penalty=1.5), [0], 0) == 1
    assert choose(row, Sampling(repetition_penalty=1.5), [], 0) == 0
    assert row.tolist() == torch.tensor([3.0, 2.9, -1.0]).tolist()  # the input is left alone


def test_a_history_outside_the_vocabulary_is_refused():
    for history in ([3], [-1]):
        with pytest.raises(UsageError):
            penalise(torch.zeros(3), history, 2.0)


def test_the_smallest_temperature_is_still_finite():
    row = logits(100, 1)
    assert choose(row, Sampling(temperature=5e-324), [], 4) == int(row.argmax())


def test_rows_chosen_together_are_those_chosen_one_by_one():
    rows = torch.stack([logits(3000, seed) for seed in range(len(SETTINGS))])
    plain = [replace(sampling, repetition_penalty=1.0) for sampling in SETTINGS] + [Sampling()]
    rows = torch.cat((rows, logits(3000, 99)[None]))
    found = choose_all(rows, [draw_of(sampling, 11) for sampling in plain])
    wanted = [choose(row, some, [], 11) for row, some in zip(rows, plain, strict=True)]
    assert found.tolist() == wanted


@pytest.mark.gpu
def test_a_gpu_chooses_the_same_tokens():
    rows = torch.stack([logits(40_000, seed, spread=1 + seed % 4) for seed in range(20)])
    for sampling in SETTINGS:
        draws = [draw_of(sampling, position) for position in range(20)]
        expected = choose_all(rows, draws)
        assert torch.equal(choose_all(rows.cuda(), draws).cpu(), expected)
