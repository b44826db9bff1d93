"""Small random clusters and placements for the planner's tests."""

from __future__ import annotations

from hypothesis import strategies as st

from hexswarm.records import Span
from hexswarm.router.placement.cluster import Cluster, Model, Node, NodeType, Profile, Way
from hexswarm.router.placement.plan import Unit

ONWARD, ID = 90.0, 10.0
"""Bytes of a token's hidden state and of its id; together 100, so that rates are easy to read."""


CONSTANTS = {
    "em": 0.6,
    "ed": 0.4,
    "ep": 0.45,
    "fixed_ms": 0.05,
    "hop_ms": 0.02,
    "usable_memory": 0.9,
    "hwm": 0.5,
    "weights_share_max": 0.6,
    "max_batch": 512,
    "in_flight_max": 4096,
}
"""Of analytic profiles, as in the clusters of HexGen."""


def model(layers: int) -> Model:
    return Model("m", layers, 1e6, ONWARD, ID, 10.0, 100.0, 50.0, 200)


def profile(*throughput: float) -> Profile:
    """T(1), T(2), ..."""
    room = (0, *(1000 for _ in throughput))
    return Profile((0.0, *throughput), room, ((1.0, 1e-3),), ((1.0, 1e-3),))


def cluster(
    homes: list[str],
    layers: int,
    *,
    regions: dict[tuple[str, str], float],
    nics: dict[str, tuple[float, float]] | None = None,
) -> Cluster:
    """Machines by their regions, named n0, n1, ...; the coordinator is in the first's region.

    `regions` has links in bytes a second, `nics` what a machine receives and sends.
    """
    wide = (1e12, 1e12)
    nics = nics or {}
    nodes = tuple(
        Node(f"n{at}", "t", home, *nics.get(f"n{at}", wide)) for at, home in enumerate(homes)
    )
    links = {pair: Way(rate, 0.01) for (a, b), rate in regions.items() for pair in ((a, b), (b, a))}
    shape = model(layers)
    types = {"t": NodeType("t", "gpu", 1, 1e9, {})}
    hub = Node("coordinator", "", homes[0], *nics.get("coordinator", wide))
    return Cluster("c", "", {"m": shape}, types, nodes, hub, {}, links, {}, {})


@st.composite
def worlds(
    draw: st.DrawFn, most_units: int = 7, most_layers: int = 6
) -> tuple[Cluster, Model, tuple[Unit, ...]]:
    """Links and connections that bind as often as not; sometimes two units share a machine."""
    layers = draw(st.integers(2, most_layers))
    count = draw(st.integers(1, most_units))
    rates = st.integers(1, 40).map(lambda rate: rate * 100.0)
    names = ["a", "b", "c"]
    homes = [draw(st.sampled_from(names)) for _ in range(count)]
    links = {(x, y): draw(rates) for x in names for y in names if x <= y}
    nics = {f"n{at}": (draw(rates), draw(rates)) for at in range(count)}
    nics["coordinator"] = (draw(rates), draw(rates))
    placed = cluster(homes, layers, regions=links, nics=nics)
    units = []
    for at in range(count):
        most = draw(st.integers(1, layers))
        speeds = sorted((draw(st.integers(1, 40)) for _ in range(most)), reverse=True)
        node = f"n{draw(st.integers(0, at))}" if draw(st.booleans()) else f"n{at}"
        units.append(Unit(f"u{at}", node, profile(*map(float, speeds))))
    return placed, placed.models["m"], tuple(units)


@st.composite
def placements(draw: st.DrawFn, units: tuple[Unit, ...], layers: int) -> tuple[Span | None, ...]:
    spans: list[Span | None] = []
    for unit in units:
        size = draw(st.integers(0, unit.profile.max_layers))
        first = draw(st.integers(0, layers - size))
        spans.append(Span(first, first + size) if size else None)
    return tuple(spans)
