"""A stage cut over the GPUs of one machine against one GPU: `tensor_parallel.py --device cuda`.

One process a GPU, NCCL, decode steps as one CUDA graph each, sums included. First parity: a small
model in float32, cut over all ranks, against itself on one GPU. Then the decode step of layers of
the middle of a model, random weights, bfloat16, context as asked: all GPUs together, and GPU 0
alone with whole layers, in the same process, by turns. Medians by CUDA events at rank 0.

Then the same through the peer's own door, see `tensor_parallel_product.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensor_parallel_product
import torch
from engine_gpu import BLOCK, SHAPES, STEPS, RandomTensors, timed
from torch import distributed, multiprocessing

from hexswarm.architecture import span_shapes
from hexswarm.kernels.ragged import Extent, Ragged, ragged
from hexswarm.peer.cuts import Member, Part, plan_cut
from hexswarm.peer.device_sums import DeviceSums
from hexswarm.peer.kv import KvPool
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.shard import Shard
from hexswarm.peer.slices import part_slices, read_sizes
from hexswarm.records import Span

SMALL = replace(SHAPES["tiny"], layers=3, hidden=256, intermediate=768, heads=16, kv_heads=8)


def batch_of(rows: int, count: int, position: int, device: str) -> Ragged:
    """`rows` sessions of `count` tokens from `position` on, in blocks one after another."""
    each = -(-(position + count) // BLOCK)
    extents = [
        Extent(position, count, tuple(range(row * each, (row + 1) * each)), BLOCK)
        for row in range(rows)
    ]
    return ragged(extents, torch.device(device))


def slices_of(config: dict[str, Any], span: Span, part: Part | None) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in part_slices(config, span, part).items()}


def parity(rank: int, ranks: int, sums: DeviceSums, device: str) -> float:
    """Largest difference of the logits from those of one GPU, over the largest of them."""
    config = {**SMALL.config(SMALL.layers - 2), "head_dim": 32}
    span, dtype = Span(0, SMALL.layers), torch.float32
    generator = torch.Generator().manual_seed(5)
    whole = {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in span_shapes(config, span).items()
    }
    cut = plan_cut(read_sizes(config, span), [Member(2.0 if n == 0 else 1.0) for n in range(ranks)])
    own = {}
    for name, one in part_slices(config, span, cut.parts[rank]).items():
        tensor = whole[name][one.rows.start : one.rows.stop]
        own[name] = (
            tensor if one.columns is None else tensor[:, one.columns.start : one.columns.stop]
        )
    a = architecture(config)
    shards = [
        Shard(a, span, a.layers, own, dtype, device, part=cut.parts[rank], sums=sums),
        Shard(a, span, a.layers, dict(whole), dtype, device),
    ]
    found = [_logits(shard, shard.make_pool(64, BLOCK), device) for shard in shards]
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


@torch.inference_mode()
def _logits(shard: Shard, pool: KvPool, device: str) -> torch.Tensor:
    """After a prompt and four decode steps of two sessions, the later ones from a graph."""
    ids = torch.arange(40).view(2, 20).to(device)
    shard.forward(shard.embed(ids.flatten()), batch_of(2, 20, 0, device), pool)
    for step in range(4):
        extents = [Extent(20 + step, 1, (2 * row, 2 * row + 1), BLOCK) for row in range(2)]
        batch = ragged(extents, torch.device(device))
        x = shard.forward(shard.embed(ids[:, step].contiguous()), batch, pool)
    return shard.head(x)


@torch.inference_mode()
def step_s(shard: Shard, pool: KvPool, rows: int, ctx: int, device: str) -> float:
    """Median seconds of a decode step."""
    batch = batch_of(rows, 1, ctx - 1, device)
    x = torch.randn(rows, shard.architecture.hidden, device=device).to(shard.dtype)
    for _ in range(3):
        shard.forward(x.clone(), batch, pool)
    return timed(lambda: shard.forward(x, batch, pool).mul_(0).add_(0.5), device, STEPS)


def work(rank: int, ranks: int, port: int, given: argparse.Namespace) -> None:
    """One process."""
    on_gpu = given.device != "cpu"
    device = f"cuda:{rank}" if on_gpu else "cpu"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
    )
    sums = DeviceSums(distributed.group.WORLD, capturable=on_gpu)
    report: dict[str, Any] = {"gpus": ranks, "torch": torch.__version__, "ctx": given.ctx}
    report["parity"] = {"library": parity(rank, ranks, sums, device)}
    if on_gpu and sums.link(SMALL.hidden, torch.float32, torch.device(device)):
        report["parity"]["linked"] = parity(rank, ranks, sums, device)
        sums.linked = sums.totals = None
    shape = SHAPES[given.shape]
    layers = given.layers or shape.layers
    config, span = shape.config(layers), Span(1, 1 + layers)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    cut = plan_cut(read_sizes(config, span, dtype.itemsize), [Member()] * ranks)
    a, blocks = architecture(config), max(given.batch) * -(-given.ctx // BLOCK)

    def build(part: Part | None) -> tuple[Shard, KvPool]:
        tensors = RandomTensors(slices_of(config, span, part), device)
        shard = Shard(a, span, a.layers, tensors, dtype, device, part=part, sums=part and sums)
        return shard, shard.make_pool(blocks, BLOCK)

    shard, pool = build(cut.parts[rank])
    linked_pool = None  # a pool has its own graphs
    if on_gpu and sums.link(shape.hidden, dtype, torch.device(device)):
        linked, sums.linked, sums.totals = sums.linked, None, None
        linked_pool = shard.make_pool(blocks, BLOCK)
    whole = build(None) if rank == 0 else None
    report["rows"] = {}
    for rows in given.batch:
        distributed.barrier()
        together = step_s(shard, pool, rows, given.ctx, device)
        distributed.barrier()
        through_links = None
        if linked_pool is not None:
            sums.linked = linked
            through_links = step_s(shard, linked_pool, rows, given.ctx, device)
            assert not linked.lost
            sums.linked = None
            distributed.barrier()
        if whole is not None:
            alone = step_s(*whole, rows, given.ctx, device)
            report["rows"][str(rows)] = {
                "one_ms": round(alone * 1e3, 3),
                "library_ms": round(together * 1e3, 3),
                "library_ratio": round(alone / together, 3),
            }
            if through_links is not None:
                report["rows"][str(rows)] |= {
                    "linked_ms": round(through_links * 1e3, 3),
                    "ratio": round(alone / through_links, 3),
                }
        distributed.barrier()
    if rank == 0:
        report["device"] = torch.cuda.get_device_name(0) if on_gpu else "cpu"
        report["backend"] = shard.backend
        for rows, found in report["rows"].items():
            print(f"decode batch {rows}: {found}", flush=True)
        Path(given.report).write_text(json.dumps(report))
    distributed.barrier()
    os._exit(0)  # NCCL may wait for ever for graphs that hold its sums


def main(given: argparse.Namespace) -> None:
    ranks = given.ranks or (torch.cuda.device_count() if given.device != "cpu" else 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        given.report = str(Path(temporary) / "report.json")
        multiprocessing.spawn(work, args=(ranks, port, given), nprocs=ranks)
        report = json.loads(Path(given.report).read_text())
    print(json.dumps(report), flush=True)  # in case that what follows fails
    config = SHAPES[given.shape].config(given.product_layers - 2)
    report["product"] = tensor_parallel_product.main(given, config)
    print(json.dumps(report), flush=True)
