"""Where peers go by themselves: against trying every span, and swarms that must come out whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.records import Span, uncovered
from hexswarm.router.placement import joining
from hexswarm.router.placement.joining import Holder, Offer

LAYERS = 10
ways = st.sampled_from((0.0, 5.0, 40.0, math.inf))


@st.composite
def spans(draw: st.DrawFn, most: int = 5) -> Span:
    k = draw(st.integers(1, most))
    first = draw(st.integers(0, LAYERS - k))
    return Span(first, first + k)


@st.composite
def holders(draw: st.DrawFn, most: int = 6) -> list[Holder]:
    count = draw(st.integers(0, most))
    return [
        Holder(
            f"p{number}",
            draw(spans()),
            float(draw(st.integers(1, 60))),
            claimed_s=draw(st.sampled_from((None, None, 1.0, 2.0))),
            leaving=draw(st.integers(0, 5)) == 0,
            to_me_per_s=draw(ways),
            from_me_per_s=draw(ways),
        )
        for number in range(count)
    ]


@st.composite
def offers(draw: st.DrawFn) -> Offer:
    most = draw(st.integers(1, 5))
    full = float(draw(st.integers(10, 100)))
    longest = draw(
        st.one_of(
            st.just(()),
            st.lists(st.integers(0, most), min_size=LAYERS, max_size=LAYERS)
            .map(lambda fits: [min(k, LAYERS - first) for first, k in enumerate(fits)])
            .filter(any)
            .map(tuple),
        )
    )
    return Offer("me", LAYERS, (0.0, *(full / k for k in range(1, most + 1))), longest)


def fitting(offer: Offer) -> list[Span]:
    most = len(offer.rates) - 1
    room = offer.longest or (most,) * LAYERS
    return [
        Span(first, first + k)
        for first in range(LAYERS)
        for k in range(1, min(most, room[first], LAYERS - first) + 1)
    ]


def slow_worth(offer: Offer, span: Span, others: Sequence[Holder]) -> tuple[int, float]:
    """The module's text, one layer and one neighbour at a time."""
    others = [item for item in others if not item.leaving]
    rate = offer.rates[len(span)]
    arrives = math.inf if span.first == 0 else 0.0
    leaves = math.inf if span.end == LAYERS else 0.0
    for item in others:
        if span.first <= item.span.end < span.end:
            arrives += min(item.tokens_per_s, item.to_me_per_s)
        if span.end in item.span:
            leaves += min(item.tokens_per_s, item.from_me_per_s)
    least = joining.UNLINKED * rate
    useful = min(rate, max(arrives, least), max(leaves, least))
    most = max(len(item) for item in fitting(offer))
    eps = joining.EPS_SHARE * offer.rates[most]
    fills, gain = 0, 0.0
    for layer in range(span.first, span.end):
        cover = sum(item.tokens_per_s for item in others if layer in item.span)
        fills += cover == 0
        gain += 1 / (cover + eps) - 1 / (cover + useful + eps)
    return fills, gain


@settings(max_examples=60)
@given(offers(), holders(), st.booleans())
def test_nothing_is_better_than_what_is_chosen(
    offer: Offer, others: list[Holder], filling: bool
) -> None:
    """The choice is worth what all of those spans that fit are worth at most."""
    chosen = joining.choose(offer, others, filling=filling)
    assert chosen.span in fitting(offer)

    def rank(fills: int, gain: float) -> tuple[float, float]:
        return (fills if filling else float(fills > 0)), gain

    assert (chosen.fills, pytest.approx(chosen.gain)) == slow_worth(offer, chosen.span, others)
    mine = rank(chosen.fills, chosen.gain)
    for span in fitting(offer):
        theirs = rank(*slow_worth(offer, span, others))
        assert theirs[0] < mine[0] or theirs[1] <= mine[1] * (1 + 1e-6)


@settings(max_examples=60)
@given(offers(), holders(), st.data())
def test_moving_never_uncovers_a_layer(
    offer: Offer, others: list[Holder], data: st.DataObject
) -> None:
    """Whoever reconsiders leaves no more layers without a holder than there were."""
    current = data.draw(st.sampled_from(fitting(offer)))
    wished = joining.reconsider(offer, current, others)
    if wished is None:
        return
    before = joining.holes(others, LAYERS, current)
    after = joining.holes(others, LAYERS, wished)
    assert after < before or before == 0
    if before == 0:
        served = [item.span for item in others if item.claimed_s is None and not item.leaving]
        assert all(any(layer in span for span in served) for layer in range(*edges(current)))


def edges(span: Span) -> tuple[int, int]:
    return span.first, span.end


def test_a_peer_that_gains_little_stays() -> None:
    offer = Offer("me", 4, (0.0, 20.0, 10.0))
    others = [Holder(f"p{n}", Span(n % 4, n % 4 + 1), 10.0) for n in range(8)]
    assert joining.reconsider(offer, Span(0, 2), others) is None
    much = [*others, Holder("big", Span(0, 2), 500.0)]
    assert joining.reconsider(offer, Span(0, 2), much) == Span(2, 4)


def test_nobody_leaves_layers_to_one_who_only_claims_them() -> None:
    """A claim may come to nothing; only a peer that serves can take over."""
    offer = Offer("me", 4, (0.0, 20.0, 10.0))
    thin = [Holder(f"p{n}", Span(n, n + 1), 10.0) for n in (2, 3)]
    for takes_over, wished in ((None, Span(2, 4)), (1.0, None)):
        big = Holder("big", Span(0, 2), 500.0, claimed_s=takes_over)
        assert joining.reconsider(offer, Span(0, 2), [*thin, big]) == wished
    leaving = Holder("big", Span(0, 2), 500.0, leaving=True)
    assert joining.reconsider(offer, Span(0, 2), [*thin, leaving]) is None


@pytest.mark.parametrize(("from_a", "from_b", "chosen"), [(90.0, 0.0, 2), (0.0, 90.0, 5)])
def test_a_joiner_goes_where_its_links_are_wide(from_a: float, from_b: float, chosen: int) -> None:
    """Layers 2 and 5 are as thin; one has a way from the peer that ends before it."""
    others = [
        Holder("w", Span(0, 6), 10.0, to_me_per_s=0.0),
        Holder("a", Span(0, 2), 50.0, to_me_per_s=from_a),
        Holder("b", Span(3, 5), 50.0, to_me_per_s=from_b),
    ]
    assert joining.choose(Offer("me", 6, (0.0, 30.0)), others).span == Span(chosen, chosen + 1)


def test_a_peer_without_an_offer_is_refused() -> None:
    with pytest.raises(UsageError):
        Offer("me", 4, (0.0,))
    with pytest.raises(UsageError):
        Offer("me", 4, (0.0, 1.0), (0, 0, 0, 0))
    with pytest.raises(UsageError):
        Holder("p", Span(0, 1), 0.0)


@settings(max_examples=20)
@given(st.integers(2, 4), st.integers(0, 1000))
def test_joiners_of_one_moment_end_up_apart(count: int, salt: int) -> None:
    """All choose in the same empty swarm; looking again, round by round, they cover it."""
    layers = 12
    most = -(-layers // count)
    rates = (0.0, *(60.0 / k for k in range(1, most + 1)))
    names = [f"p{(n * 7919 + salt) % 97:02d}-{n}" for n in range(count)]
    offers = {name: Offer(name, layers, rates) for name in names}
    claims = {name: joining.choose(offers[name], []).span for name in names}
    said = dict.fromkeys(names, 0.0)
    seen: dict[str, frozenset[joining.Claim]] = dict.fromkeys(names, frozenset())
    assert len(set(claims.values())) == 1
    for look in range(1, 2 * count + 1):
        view = {
            name: Holder(name, claims[name], rates[len(claims[name])], claimed_s=said[name])
            for name in names
        }
        changed = False
        for name in names:
            others = [item for other, item in view.items() if other != name]
            span = joining.look_again(offers[name], claims[name], said[name], seen[name], others)
            if span != claims[name]:
                seen[name] = joining.claims(others)
                claims[name], said[name], changed = span, float(look), True
        if not changed:
            break
    assert not changed, "they never settle"
    assert not uncovered(claims.values(), layers)
