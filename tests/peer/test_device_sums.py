"""Sums by process groups: what NCCL does on GPUs, here with gloo between threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import distributed

from hexswarm.peer.device_sums import DeviceSums

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_totals_and_columns(dtype):
    store = distributed.HashStore()
    terms = [torch.randn(3, 7, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    terms = [term.to(dtype) for term in terms]
    columns = [range(3), range(3, 7)]

    def run(rank):
        group = distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))
        sums = DeviceSums(group, capturable=False)
        own = columns[rank]
        part = terms[0].float()[:, own.start : own.stop]
        return sums.total(terms[rank].clone()), sums.beside(part, own, 7)

    with ThreadPoolExecutor(2) as threads:
        for total, beside in threads.map(run, (0, 1)):
            assert torch.equal(total, terms[0].float() + terms[1].float())
            assert torch.equal(beside, terms[0].float())
