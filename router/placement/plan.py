"""A plan: which machine, or which group of GPUs, holds which layers.

A *unit* is what holds one span as a whole: a machine with all its GPUs, or a tensor-parallel group
of some GPUs of one machine, or of several machines on one LAN. The planner places units; how a
machine's GPUs are grouped into units is a move of its search (`groups`). A unit may idle.

As JSON, the form that `hexswarm plan -o` writes and `hexswarm simulate --plan` reads:

    {"schema": "hexswarm-plan/1", "model": NAME, "cluster": NAME,
     "nodes": {"n0": [0, 12], "n3": null},
     "groups": [{"id": "n4/0-2", "members": [["n4", 0], ["n4", 1]], "shares": [0.5, 0.5],
                 "layers": [12, 40]}],
     "pipelines": [["n0", "n4/0-2"]]}

A machine that is in a group is not under "nodes". Shares are each member's part of every layer;
they need not be equal (heads and columns are cut in proportion). Units may hand to each other
wherever layers fit, unless "pipelines" lists who serves with whom: ids in order of their layers,
which they hold end to end. Then units of different pipelines hand nothing to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hexswarm.errors import UsageError
from hexswarm.records import Span, uncovered
from hexswarm.router.placement.cluster import Cluster, Node, Profile

SCHEMA = "hexswarm-plan/1"

Gpu = tuple[str, int]
"""(node, index of the GPU in it)."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What holds one span: a machine, or a group."""

    id: str
    node: str
    """The machine that speaks for it: whose connection carries its traffic."""
    profile: Profile
    members: tuple[Gpu, ...] = ()
    """Empty: the whole machine as the cluster file profiles it."""
    shares: tuple[float, ...] = ()

    @property
    def grouped(self) -> bool:
        return bool(self.members)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every unit's layers are; None: it idles."""

    model: str
    cluster: str
    units: tuple[Unit, ...]
    spans: tuple[Span | None, ...]
    """One for each unit."""
    pipelines: tuple[tuple[int, ...], ...] = ()
    """Places of units in `units`; empty: everybody may hand to everybody."""

    def __post_init__(self) -> None:
        if len(self.units) != len(self.spans):
            raise UsageError("a plan has one span for each unit")
        seen: set[Gpu] = set()
        for unit, span in zip(self.units, self.spans, strict=True):
            if span is not None and len(span) > unit.profile.max_layers:
                raise UsageError(
                    f"{unit.id} holds at most {unit.profile.max_layers} layers, not {span}"
                )
            if seen & set(unit.members):
                raise UsageError(f"a GPU of {unit.id} is in two groups")
            seen |= set(unit.members)
        if self.pipelines:
            self._check_pipelines()

    def _check_pipelines(self) -> None:
        """They hold layers end to end, share nobody, and leave nobody out."""
        listed = [at for pipeline in self.pipelines for at in pipeline]
        if doubled := {at for at in listed if listed.count(at) > 1}:
            raise UsageError(f"{self.units[min(doubled)].id} is in two pipelines")
        for at, span in enumerate(self.spans):
            if span is not None and at not in listed:
                raise UsageError(
                    f"{self.units[at].id} holds {span} and is in no pipeline",
                    remedy="list it, let it idle, or leave pipelines out of the plan",
                )
        last = max((span.end for span in self.spans if span), default=0)
        for pipeline in self.pipelines:
            done = 0
            for at in pipeline:
                span = self.spans[at]
                if span is None or span.first != done:
                    raise UsageError(
                        f"pipeline {self._names(pipeline)} breaks off before layer {done}"
                    )
                done = span.end
            if done != last:
                raise UsageError(f"pipeline {self._names(pipeline)} ends before layer {last}")

    def _names(self, pipeline: Iterable[int]) -> str:
        return ", ".join(self.units[at].id for at in pipeline)

    def placed(self) -> Iterable[tuple[Unit, Span]]:
        """Those that hold something."""
        return ((unit, span) for unit, span in zip(self.units, self.spans, strict=True) if span)

    def missing(self, layers: int) -> list[Span]:
        """The runs of layers that nobody holds."""
        return uncovered((span for _, span in self.placed()), layers)

    def to_json(self) -> dict[str, Any]:
        """As in the module's docstring."""
        nodes: dict[str, Any] = {}
        groups = []
        for unit, span in zip(self.units, self.spans, strict=True):
            layers = [span.first, span.end] if span else None
            if unit.grouped:
                groups.append(
                    {
                        "id": unit.id,
                        "members": [list(gpu) for gpu in unit.members],
                        "shares": [round(share, 6) for share in unit.shares],
                        "layers": layers,
                    }
                )
            else:
                nodes[unit.id] = layers
        said = {
            "schema": SCHEMA,
            "model": self.model,
            "cluster": self.cluster,
            "nodes": nodes,
            "groups": groups,
        }
        if self.pipelines:
            said["pipelines"] = [
                [self.units[at].id for at in pipeline] for pipeline in self.pipelines
            ]
        return said


def whole_units(cluster: Cluster, model: str) -> tuple[Unit, ...]:
    """Every machine as one unit with all its GPUs, but for those that cannot hold one layer."""
    found = ((node, cluster.profile(node, model)) for node in cluster.nodes)
    return tuple(Unit(node.id, node.id, profile) for node, profile in found if profile)


def parse_spans(said: Mapping[str, Any]) -> dict[str, Span | None]:
    """{id: [first, end]} as spans; UsageError names what is wrong."""
    spans: dict[str, Span | None] = {}
    for name, layers in said.items():
        if layers is None:
            spans[name] = None
            continue
        try:
            first, end = (int(layer) for layer in layers)
        except (TypeError, ValueError):
            raise UsageError(f"{name} holds {layers!r}; layers are written [first, end]") from None
        spans[name] = Span(first, end)
    return spans


def leader(cluster: Cluster, members: Iterable[Gpu]) -> Node:
    """The machine that speaks for a group: its first member's."""
    for name, _ in members:
        return cluster.node(name)
    raise UsageError("a group has at least one member")
