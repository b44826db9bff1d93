"""Numbers with names: the text that Prometheus reads, and the small server that gives it."""

from __future__ import annotations

import asyncio
import math
import random
import re

import pytest

from hexswarm.errors import UsageError
from hexswarm.metrics import (
    CONTENT_TYPE,
    Histogram,
    Metric,
    Sample,
    counter,
    doubling,
    exposition,
    gauge,
)
from hexswarm.scrape import HEAD_BYTES, MOST, Scrapes, response

LINE = re.compile(r'([a-z][a-z0-9_]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)')


def parse(text):
    """Type by name, and value by name and labels, as a reader of the format takes it."""
    kinds, values = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split(" ")
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            name, labels, number = LINE.fullmatch(line).groups()
            assert (name, labels) not in values
            values[name, labels] = float(number)
    return kinds, values


def test_what_is_written_is_what_is_read():
    metrics = [
        gauge("kv_tokens", "Room.\nAnd a \\ more", 16384),
        counter("rows_total", "Rows.", 2.5, span="0:10", name='a "b"\nc\\'),
        gauge("odd", "Not a number.", math.inf),
    ]
    kinds, values = parse(exposition(metrics))
    assert kinds == {"kv_tokens": "gauge", "rows_total": "counter", "odd": "gauge"}
    assert values["kv_tokens", None] == 16384
    assert values["rows_total", 'span="0:10",name="a \\"b\\"\\nc\\\\"'] == 2.5
    assert values["odd", None] == math.inf
    assert "16384\n" in exposition(metrics)


def test_a_histogram_counts_what_it_saw():
    """Against the sorted values: cumulative counts, sum, and quantiles to the width of a bucket."""
    rng = random.Random(3)
    bounds = doubling(0.001, 10)
    values, made = [rng.lognormvariate(-4, 1.5) for _ in range(300)], Histogram(bounds)
    assert made.quantile(0.5) is None
    for value in values:
        made = made.with_value(value)
    _, read = parse(exposition([made.metric("step_seconds", "Steps.")]))
    for bound in bounds:
        text = re.escape(f"{bound}")
        found = [v for (n, labels), v in read.items() if re.fullmatch(f'le="{text}"', labels or "")]
        assert found == [sum(value <= bound for value in values)]
    assert read["step_seconds_count", None] == read["step_seconds_bucket", 'le="+Inf"'] == 300
    assert read["step_seconds_sum", None] == pytest.approx(sum(values))
    ordered = sorted(values)
    for share in (0.01, 0.5, 0.9, 0.99):
        exact, upper = ordered[math.ceil(share * 300) - 1], made.quantile(share)
        assert exact <= upper
        assert upper == math.inf or upper / 2 < exact or upper == bounds[0]


def test_a_value_on_a_bound_is_below_it():
    made = Histogram((1.0, 2.0)).with_value(1.0).with_value(2.0).with_value(9.0)
    assert made.counts == (1, 1, 1)
    assert (made.quantile(1 / 3), made.quantile(1.0)) == (1.0, math.inf)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gauge("Kv", "", 1),
        lambda: gauge("kv tokens", "", 1),
        lambda: gauge("kv", "", 1, **{"a-b": "c"}),
        lambda: counter("rows", "", 1),
        lambda: gauge("rows_total", "", 1),
        lambda: Histogram(()),
        lambda: Histogram((2.0, 1.0)),
        lambda: Histogram((1.0,), (1,)),
        lambda: exposition([gauge("a", "", 1), gauge("a", "", 2)]),
    ],
)
def test_what_no_reader_would_take_is_refused(make):
    with pytest.raises(UsageError):
        make()


# ---------------------------------------------------------------------------- the server


def collect():
    return [Metric("up", "gauge", "Here.", (Sample(1.0),))]


def test_one_path_and_one_method():
    answer = response(b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n", collect)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Type: {CONTENT_TYPE}".encode() in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert parse(body.decode())[1] == {("up", None): 1.0}
    short = response(b"HEAD /metrics HTTP/1.1\r\n\r\n", collect)
    assert short == head + b"\r\n\r\n"
    assert b" 404 " in response(b"GET / HTTP/1.1\r\n\r\n", collect)
    assert b" 405 " in response(b"POST /metrics HTTP/1.1\r\n\r\n", collect)
    assert b" 405 " in response(b"\r\n\r\n", collect)


async def ask(port, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def test_it_answers_over_a_socket_and_bears_strangers(monkeypatch):
    monkeypatch.setattr("hexswarm.scrape.REQUEST_S", 0.2)

    async def main():
        scrapes = Scrapes(collect)
        port = await scrapes.start("127.0.0.1", 0)
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        assert (await ask(port, request)).endswith(b"\nup 1\n")
        assert await ask(port, b"x" * 2 * HEAD_BYTES) == b""
        slow = [asyncio.create_task(ask(port, b"GET ")) for _ in range(2 * MOST)]
        assert (
            await asyncio.gather(*slow) == [b""] * 2 * MOST
        )  # the first by time, the rest at once
        assert (await ask(port, request)).endswith(b"\nup 1\n")
        other = Scrapes(collect)
        with pytest.raises(UsageError, match="cannot be served"):
            await other.start("127.0.0.1", port)
        await scrapes.close()
        with pytest.raises(ConnectionRefusedError):
            await ask(port, request)

    asyncio.run(main())
