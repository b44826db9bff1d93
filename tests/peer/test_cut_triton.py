"""A part on the backend "triton": what it adds to the group's sums is what "torch" adds.

One rank alone with sums that lack the others' terms, interpreted on a CPU, compiled on a GPU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hexswarm.kernels import gpu
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.peer.cuts import cut_by_heads
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.shard import Shard
from hexswarm.peer.slices import read_sizes
from hexswarm.records import Span
from tests.peer.ranks import take_slices
from tests.peer.test_shard_triton import BASE, DEVICE, LAYERS, MODELS, tensors

SPAN = Span(0, LAYERS)


class Alone:
    """The others' terms are zero."""

    capturable = True

    def total(self, x):
        return x.float()

    def beside(self, x, columns, width):
        return x


def logits(name, heads, rank, backend, device):
    """Of a prompt and of two decode steps of one session."""
    config = {**BASE, **MODELS[name]}
    part = cut_by_heads(read_sizes(config, SPAN), heads).parts[rank]
    own = take_slices(config, SPAN, part, tensors(name))
    shard = Shard(*(architecture(config), SPAN, LAYERS, own), device=device, backend=backend,
                  part=part, sums=Alone())  # fmt: skip
    pool, found = shard.make_pool(4), []
    pool.data.fill_(float("nan"))
    with torch.inference_mode():
        for position, count in ((0, 3), (3, 1), (4, 1)):
            batch = ragged([Extent(position, count, (2,), 16)], torch.device(device))
            ids = torch.arange(position, position + count, device=device)
            x = shard.forward(shard.embed(ids), batch, pool)
            found.append(shard.head(x[-1:]).cpu())
    return torch.cat(found)


@pytest.mark.parametrize(
    ("heads", "rank", "graphs"), [([2, 2], 0, 2), ([2, 2], 1, 2), ([3, 1], 0, 0), ([3, 1], 1, 2)]
)
def test_a_part_computes_what_torch_computes(heads, rank, graphs, monkeypatch):
    """Its decode steps are the graph's, unless its heads come in unequal groups."""
    graphed, decode = [], gpu.GpuLayers.decode

    def counted(self, *given):
        graphed.append(given)
        return decode(self, *given)

    monkeypatch.setattr(gpu.GpuLayers, "decode", counted)
    got = logits("llama biased", heads, rank, "triton", DEVICE)
    assert len(graphed) == graphs
    expected = logits("llama biased", heads, rank, "torch", "cpu")
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
