"""Small clusters with layer times, for the tests of latency and service."""

from __future__ import annotations

from collections.abc import Sequence

from hexswarm.router.placement.cluster import Cluster, Model, Node, NodeType, Profile, Way
from hexswarm.router.placement.expected import Load
from hexswarm.router.placement.plan import Unit

LAYERS = 8
MODEL = Model("m", LAYERS, 1e6, 1000.0, 2.0, 100.0, 256.0, 64.0, 2048)
NEAR, FAR = Way(1e8, 0.001), Way(1e6, 0.05)


def profile(most: int, slower: float = 1.0, kv: int = 100_000) -> Profile:
    """2 ms a layer and 10 us a row; 10 us a prompt token from 128 on; T(k) = 4000 / k."""
    prefill = tuple((float(tokens), slower * 1e-5 * tokens) for tokens in (128, 4096))
    decode = tuple((float(rows), slower * (2e-3 + 1e-5 * rows)) for rows in (1, 512))
    speed = (0.0, *(4000.0 / slower / k for k in range(1, most + 1)))
    return Profile(speed, (0, *[kv] * most), prefill, decode)


def world(
    profiles: Sequence[Profile], regions: Sequence[str] | None = None
) -> tuple[Cluster, tuple[Unit, ...]]:
    """One machine for each profile; the coordinator is in region "a"."""
    homes = list(regions or ["a"] * len(profiles))
    nodes = tuple(Node(f"n{at}", "t", home, 1e10, 1e10) for at, home in enumerate(homes))
    names = {"a", *homes}
    links = {(x, y): NEAR if x == y else FAR for x in names for y in names}
    kinds = {"t": NodeType("t", "gpu", 1, 1e9, {})}
    hub = Node("coordinator", "", "a", 1e10, 1e10)
    cluster = Cluster("c", "", {"m": MODEL}, kinds, nodes, hub, {}, links, {}, {})
    units = tuple(Unit(f"n{at}", f"n{at}", one) for at, one in enumerate(profiles))
    return cluster, units


def load(tokens_per_s: float) -> Load:
    """Two chunks to a prompt, three to a long one."""
    return Load(tokens_per_s, 256.0, 64.0, 384.0)
