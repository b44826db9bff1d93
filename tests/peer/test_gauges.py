"""The engine's numbers: kept by the device thread, read by whoever watches."""

from __future__ import annotations

import asyncio

from hexswarm.metrics import exposition
from hexswarm.peer.gauges import BatchGauges, metrics
from tests.peer.test_engine import A, B, bench, decode, prompt


def test_batches_are_told_apart_by_what_is_in_them() -> None:
    seen = BatchGauges().computed(4, 0, 0.010).computed(1, 0, 0.020).computed(5, 2, 0.3)
    assert (seen.decode_s.count, seen.prompt_s.count, seen.rows.count) == (2, 1, 3)
    assert (round(seen.decode_s.total, 9), seen.prompt_s.total) == (0.03, 0.3)
    assert seen.rows.total == 10
    assert seen.decode_s.quantile(0.5) == 0.016


def test_an_engine_tells_what_it_did_and_what_waits() -> None:
    async def main() -> None:
        async with bench(chunk_tokens=32) as b:
            before = b.engine.gauges()
            assert (before.sessions, before.kv_tokens, before.kv_leased_tokens) == (0, 1024, 0)
            b.engine.open(A, 60)
            b.engine.open(B, 16)
            b.engine.submit([prompt(A, list(range(40)))])
            await b.results()
            await b.results()
            b.engine.submit([decode(A, 40, 7)])
            await b.results()
            now = b.engine.gauges()
            assert (now.sessions, now.kv_leased_tokens, now.kv_cached_tokens) == (2, 80, 41)
            assert (now.computed_rows, now.computed_tokens, now.crashes) == (3, 41, 0)
            assert (now.batches.prompt_s.count, now.batches.decode_s.count) == (2, 1)
            assert now.waiting_steps == 0
            assert now.busy_s > 0
            assert abs(now.batches.prompt_s.total + now.batches.decode_s.total - now.busy_s) < 1e-9
            text = exposition(metrics(now))
            assert "hexswarm_kv_cached_tokens 41\n" in text
            assert "hexswarm_tokens_total 41\n" in text
            assert 'hexswarm_batch_rows_bucket{le="1"} 3\n' in text
            b.engine.close(A)
            b.engine.close(B)
            assert b.engine.gauges().kv_leased_tokens == 0

    asyncio.run(main())


def test_names_have_a_prefix_and_a_unit() -> None:
    async def main() -> None:
        async with bench() as b:
            for metric in metrics(b.engine.gauges()):
                assert metric.name.startswith("hexswarm_")
                assert metric.help.endswith(".")

    asyncio.run(main())
