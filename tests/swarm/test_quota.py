"""Token buckets and address blocks: never more than the rate allows, in bounded tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.quota import (
    CONTROL_FRAMES,
    GUEST_FRAMES,
    GUEST_FRAMES_ALL,
    MODEST_FRAMES,
    STREAMS_ALL,
    STREAMS_BLOCK,
    STREAMS_EACH,
    Buckets,
    Quotas,
    Rate,
    address_block,
)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 5), st.integers(1, 6)), max_size=60),
    st.floats(0.1, 10),
    st.floats(1, 10),
)
def test_nobody_gets_more_than_the_rate_and_the_burst(
    asked: list[tuple[str, float, int]], per_s: float, burst: float
) -> None:
    """In any span of time, and what one key does changes nothing for another."""
    buckets, now = Buckets(Rate(per_s, burst)), 0.0
    given_out: dict[str, list[tuple[float, int]]] = {"a": [], "b": []}
    for key, wait_s, amount in asked:
        now += wait_s
        if buckets.take(key, now, amount):
            given_out[key].append((now, amount))
    for times in given_out.values():
        for index, (start, _) in enumerate(times):
            for end in range(index, len(times)):
                total = sum(amount for _, amount in times[index : end + 1])
                assert total <= burst + (times[end][0] - start) * per_s + 1e-6


def test_what_is_refused_costs_nothing() -> None:
    buckets = Buckets(Rate(1.0, 2.0))
    assert not buckets.take("a", 0.0, 3)
    assert buckets.take("a", 0.0, 2)
    assert not buckets.take("a", 0.5)
    assert buckets.take("a", 1.0)
    assert buckets.take("a", 0.0) is False, "a clock that went back gives nothing"


def test_a_debt_is_told_and_paid_in_time() -> None:
    buckets = Buckets(Rate(10.0, 5.0))
    assert buckets.owe("a", 0.0, 5) == 0
    assert buckets.owe("a", 0.0, 20) == pytest.approx(2.0)
    assert buckets.owe("a", 2.0, 0) == pytest.approx(0.0)
    assert not buckets.take("a", 2.0)
    assert buckets.take("a", 2.5, 5)


def test_tables_are_bounded_and_forget_the_longest_silent() -> None:
    buckets = Buckets(Rate(0.001, 1.0), most_keys=3)
    for key in "abc":
        assert buckets.take(key, 0.0)
    buckets.owe("a", 1.0, 0)
    assert buckets.take("d", 1.0)
    assert len(buckets) == 3
    assert not buckets.take("a", 1.0), "it spoke, so it is remembered"
    assert buckets.take("b", 1.0), "forgotten: its bucket is full"


def test_streams_of_one_identity_one_block_and_all() -> None:
    quotas = Quotas()
    taken = sum(quotas.stream("a", "block", 0.0) for _ in range(100))
    assert taken == STREAMS_EACH.burst
    taken += sum(quotas.stream(f"a{n}", "block", 0.0) for n in range(1000))
    assert taken == STREAMS_BLOCK.burst
    taken += sum(quotas.stream(f"b{n}", "", 0.0) for n in range(5000))
    assert taken == STREAMS_ALL.burst
    assert quotas.stream("c", "other", 1.0)


def test_a_loud_crowd_does_not_silence_the_modest() -> None:
    """When all guests together are over their rate, the loud ones are; a newcomer is heard."""
    quotas = Quotas()
    loud = [f"loud {n}" for n in range(int(GUEST_FRAMES_ALL.burst // 1000))]
    for peer in loud:
        assert quotas.guest(peer, 1000, 0.0)
    assert all(quotas.guest(peer, 24, 0.0) for peer in loud)
    assert not quotas.guest(loud[0], 1, 0.0), "its own burst is spent"
    assert not quotas.guest("another loud one", 512, 0.0), "the burst of all is"
    assert quotas.guest("modest", 2, 0.0)
    assert not quotas.guest("modest", MODEST_FRAMES, 0.0)


def test_a_client_may_open_a_thousand_sessions_at_once() -> None:
    assert Quotas().guest("client", 1000, 0.0)
    assert GUEST_FRAMES.burst >= 1000
    assert Quotas().control("client", 4000, 0.0) == 0


def test_a_partner_is_slowed_down_to_the_rate() -> None:
    quotas = Quotas()
    now, heard = 0.0, 0
    while now < 10.0:
        heard += 128
        now += quotas.control("flood", 128, now)
    assert heard <= CONTROL_FRAMES.burst + 10.0 * CONTROL_FRAMES.per_s + 256


@pytest.mark.parametrize(
    ("address", "block"),
    [
        ("/ip4/8.8.4.4/tcp/1", "8.8.4.0/24"),
        ("/ip4/8.8.4.200/udp/9/quic-v1", "8.8.4.0/24"),
        ("/ip6/2a00:1450:4001:81c::200e/tcp/1", "2a00:1450:4001::/48"),
        ("/ip6/::ffff:8.8.4.4/tcp/1", "8.8.4.0/24"),
        ("/ip4/127.0.0.1/tcp/1", ""),
        ("/ip4/10.1.2.3/tcp/1", ""),
        ("/ip4/192.168.1.4/tcp/1", ""),
        ("/ip6/::1/tcp/1", ""),
        ("/ip6/fe80::1%eth0/tcp/1", ""),
        ("/ip4/8.8.4.4/tcp/1/p2p/relay/p2p-circuit", ""),
        ("/dns4/example.org/tcp/1", ""),
        ("/ip4/999.1.1.1/tcp/1", ""),
        ("/ip4", ""),
        ("", ""),
    ],
)
def test_blocks_of_addresses(address: str, block: str) -> None:
    assert address_block(address) == block


@given(st.text(max_size=40))
def test_any_text_has_a_block_or_none(text: str) -> None:
    assert "/" in (address_block(text) or "/")
    assert "/" in (address_block(f"/ip4/{text}") or "/")
