"""A mixed swarm of volunteers, generated from a seed: the planner's large case.

Single GPUs of 16 to 80 GB in six regions of the world, most of them cards of 24 GB. Two in three
stand in data centres and universities (1 to 10 Gbit/s both ways, 0.2 ms to the region's network),
one in three at home (uplink 20 to 500 Mbit/s, evenly on a logarithmic scale, downlink four times
that, 3 to 15 ms of access). Inside a region one flow reaches 5 Gbit/s at 4 ms round trip, between
regions 0.3 Gbit/s at the public internet's usual round trips. Layer times and T(k) are estimated by
`hexswarm.router.placement.speeds` with the constants of the cluster files of HexGen's pools.

The GPUs' figures are those of the data sheets (16-bit dense, without sparsity).
"""

from __future__ import annotations

from random import Random

from hexswarm.router.placement.cluster import Cluster, GpuSpec, Model, Node, NodeType, Way
from hexswarm.router.placement.speeds import Estimate, profile

LLAMA_70B = Model(
    name="llama-70b",
    layers=80,
    layer_bytes=1.711e9,
    activation_bytes=16384,
    token_bytes=2,
    kv_bytes=4096,
    input_tokens=750,
    output_tokens=240,
    max_input_tokens=2048,
)

GPUS = {
    "T4": (65, 320, 16, 4),
    "A4000": (77, 448, 16, 6),
    "L4": (121, 300, 24, 10),
    "RTX3090": (71, 936, 24, 24),
    "RTX4090": (165, 1008, 24, 20),
    "V100": (125, 900, 32, 6),
    "A6000": (155, 768, 48, 12),
    "L40S": (362, 864, 48, 6),
    "A100": (312, 2039, 80, 8),
    "H100": (989, 3350, 80, 4),
}
"""TFLOP/s, GB/s, GiB, and how many of a hundred volunteers have it."""

REGIONS = {
    "europe-west": 25,
    "europe-north": 15,
    "us-east": 25,
    "us-west": 15,
    "asia-east": 15,
    "south-america": 5,
}
"""How many of a hundred volunteers live there."""

ROUND_TRIPS_MS = (
    (35, 80, 140, 220, 190),
    (105, 160, 230, 215),
    (65, 190, 120),
    (130, 170),
    (290,),
)
"""From each region to those behind it in the list."""

ESTIMATE = Estimate(
    memory_efficiency=0.6,
    decode_efficiency=0.4,
    prefill_efficiency=0.45,
    fixed_s=5e-5,
    hop_s=2e-5,
    usable_memory=0.9,
    high_water=0.5,
    weights_share=0.6,
    max_batch=512,
    in_flight_max=4096,
)

_GBIT = 1e9 / 8


def volunteers(count: int, seed: int, model: Model = LLAMA_70B) -> Cluster:
    """So many machines."""
    rng = Random(seed)
    return Cluster(
        name=f"volunteers-{count}-{seed}",
        about="generated: single GPUs in six regions, a third of them at home",
        models={model.name: model},
        types={name: _type(name, model) for name in GPUS},
        nodes=tuple(_node(index, rng) for index in range(count)),
        coordinator=Node("coordinator", "", "us-east", 10 * _GBIT, 10 * _GBIT, 2e-4),
        ways={},
        regions=_ways(),
        estimate={},
        reference={},
    )


def _type(name: str, model: Model) -> NodeType:
    tflops, gb_s, gib, _ = GPUS[name]
    spec = GpuSpec(tflops * 1e12, gb_s * 1e9, gib * 2.0**30, gb_s * 1e9)
    speeds = profile(model, ESTIMATE, [spec], [1.0])
    assert speeds is not None, "every card of the list holds some layers"
    return NodeType(name, name, 1, spec.memory_bytes, {model.name: {1: speeds}}, spec)


def _node(index: int, rng: Random) -> Node:
    gpu = rng.choices(list(GPUS), [share for *_, share in GPUS.values()])[0]
    region = rng.choices(list(REGIONS), list(REGIONS.values()))[0]
    if rng.random() < 1 / 3:
        up = 0.02 * 25 ** rng.random() * _GBIT
        return Node(f"n{index}", gpu, region, 4 * up, up, rng.uniform(3e-3, 15e-3))
    rate = 10 ** rng.random() * _GBIT
    return Node(f"n{index}", gpu, region, rate, rate, 2e-4)


def _ways() -> dict[tuple[str, str], Way]:
    names = list(REGIONS)
    ways = {(name, name): Way(5 * _GBIT, 2e-3) for name in names}
    for row, (a, trips) in enumerate(zip(names, ROUND_TRIPS_MS, strict=False)):
        for b, milliseconds in zip(names[row + 1 :], trips, strict=True):
            ways[a, b] = ways[b, a] = Way(0.3 * _GBIT, milliseconds / 2e3)
    return ways
