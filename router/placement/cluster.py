"""A cluster as the planner sees it: machines, links, models and measured speeds.

The common input of the planner, the simulator and the benchmarks is a JSON file of the schema
`swarm-cluster/1` (`docs/planning.md` has the fields). Everything here is in base units: seconds,
bytes, bytes per second, tokens. In the files a Gbit is 1e9 bits and a GiB 2^30 bytes.

A *profile* says how fast a machine (or a group of its GPUs) computes layers of one model: seconds a
layer for a prompt of so many tokens and for a decode batch of so many rows, both interpolated
linearly; T(k), the tokens a second that pass through k held layers at the batch that is expected
in this cluster (Helix, ASPLOS'25: it depends on the company that a machine keeps); and how many
tokens of KV have room beside k layers.

Reading a file is the door's business: `parse` takes what the JSON said and checks it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

from hexswarm.errors import UsageError

SCHEMA = "swarm-cluster/1"
COORDINATOR = "coordinator"
"""Where prompts enter and tokens leave; `source` and `sink` in a file's list of links."""

_GBIT = 1e9 / 8
_GIB = float(2**30)

Points = tuple[tuple[float, float], ...]
"""(tokens or rows, seconds for one layer), ascending."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape, and the lengths of the requests that the speeds were measured for."""

    name: str
    layers: int
    layer_bytes: float
    activation_bytes: float
    """Of one token between two stages."""
    token_bytes: float
    """Of one token id, between the coordinator and the ends of a route."""
    kv_bytes: float
    """Of one token in one layer."""
    input_tokens: float
    output_tokens: float
    max_input_tokens: int


@dataclass(frozen=True, slots=True)
class Profile:
    """How fast something computes layers of one model."""

    throughput: tuple[float, ...]
    """Tokens a second through k held layers, at index k; index 0 is 0."""
    kv_tokens: tuple[int, ...]
    """Tokens of context that have room while k layers are held, at index k; index 0 is 0."""
    prefill: Points
    decode: Points
    most_prompts: int = 0
    """Whole prompts that a batch takes at once, where the file tells it."""
    most_rows: tuple[int, ...] = ()
    """Decode rows of a batch while k layers are held, at index k, where the file tells it."""
    head_s: float = 0.0
    """Seconds of the LM head for a batch that samples, where it was measured apart."""

    @property
    def max_layers(self) -> int:
        """Most layers that fit."""
        return len(self.throughput) - 1

    def prefill_layer_s(self, tokens: float) -> float:
        """Seconds of one layer for a prompt piece of so many tokens.

        Below the least measured piece in proportion, but not below one reading of the weights.
        """
        least, least_s = self.prefill[0]
        if tokens < least:
            return max(least_s * tokens / least, min(least_s, self.decode[0][1]))
        return interpolated(self.prefill, tokens)

    def decode_layer_s(self, rows: float) -> float:
        """Seconds of one layer for a decode batch of so many rows."""
        return interpolated(self.decode, rows)


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU of a machine, where the file tells it; groups of unequal GPUs are estimated by it."""

    flops: float
    """Of 16-bit matrix products, a second, by the data sheet."""
    memory_bytes_per_s: float
    memory_bytes: float
    between_bytes_per_s: float
    """From GPU to GPU of the machine."""


@dataclass(frozen=True, slots=True)
class NodeType:
    """A kind of machine; `profiles[model][degree]` is that of `degree` of its GPUs as one group."""

    name: str
    gpu: str
    gpus: int
    memory_bytes: float
    profiles: Mapping[str, Mapping[int, Profile]]
    spec: GpuSpec | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A machine. What it sends or receives in total is bounded by its own connection."""

    id: str
    type: str
    region: str
    in_bytes_per_s: float
    out_bytes_per_s: float
    access_s: float = 0.0
    """From the machine to its region's network, one way."""


@dataclass(frozen=True, slots=True)
class Way:
    """From one node to another."""

    bytes_per_s: float
    one_way_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines and what lies between them."""

    name: str
    about: str
    models: Mapping[str, Model]
    types: Mapping[str, NodeType]
    nodes: tuple[Node, ...]
    coordinator: Node
    ways: Mapping[tuple[str, str], Way]
    """Where the file lists pairs; the coordinator is `COORDINATOR`."""
    regions: Mapping[tuple[str, str], Way]
    """Where the file lists regions, in both orders; (x, x) is inside. Half the round trip."""
    estimate: Mapping[str, Any]
    """The constants of the analytic profiles, where the file has such: see `groups`."""
    reference: Mapping[str, Any]
    """What others published of this cluster, by model; as in the file."""

    def node(self, id: str) -> Node:
        """The machine of that name, or the coordinator."""
        if id == COORDINATOR:
            return self.coordinator
        for node in self.nodes:
            if node.id == id:
                return node
        raise UsageError(f"cluster {self.name} has no node {id!r}")

    def way(self, a: str, b: str) -> Way:
        """From node `a` to node `b`; between GPUs of one machine there is no way."""
        if a == b:
            return Way(float("inf"), 0.0)
        if held := self.ways.get((a, b)):
            return held
        first, second = self.node(a), self.node(b)
        between = self.regions.get((first.region, second.region))
        if between is None:
            raise UsageError(f"cluster {self.name} says nothing of the way from {a} to {b}")
        rate = min(between.bytes_per_s, first.out_bytes_per_s, second.in_bytes_per_s)
        return Way(rate, between.one_way_s + first.access_s + second.access_s)

    def model(self, name: str) -> Model:
        """The model of that name; UsageError lists those that the cluster has speeds for."""
        if name not in self.models:
            raise UsageError(
                f"cluster {self.name} has no speeds for model {name!r}",
                remedy="it has " + ", ".join(sorted(self.models)),
            )
        return self.models[name]

    def profile(self, node: Node, model: str, degree: int | None = None) -> Profile | None:
        """Of all GPUs of a machine together, or of `degree` of them; None: it does not fit."""
        type = self.types[node.type]
        return type.profiles.get(model, {}).get(degree or type.gpus)


def interpolated(points: Points, at: float) -> float:
    """Linear between the points, flat before the first, on along the last two after the last."""
    row = bisect_right(points, at, key=lambda point: point[0])
    if row == 0:
        return points[0][1]
    if row == len(points):
        if row == 1:
            return points[0][1]
        row -= 1
    (x0, y0), (x1, y1) = points[row - 1], points[row]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def parse(said: Any) -> Cluster:
    """A cluster from the parsed JSON of a file; UsageError names the field that is wrong."""
    if not isinstance(said, dict) or said.get("schema") != SCHEMA:
        raise UsageError(
            "this is not a cluster file", remedy=f'it is JSON whose "schema" is "{SCHEMA}"'
        )
    try:
        return _cluster(said)
    except KeyError as error:
        raise UsageError(f"the cluster file lacks the field {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the cluster file has a field of the wrong kind: {error}") from None


def _cluster(said: dict[str, Any]) -> Cluster:
    links = said["links"]
    place = said["coordinator"]
    _check_names(said)
    return Cluster(
        name=_text(said["name"]),
        about=said.get("about", ""),
        models={name: _model(name, value) for name, value in said["models"].items()},
        types={name: _type(name, value) for name, value in said["node_types"].items()},
        nodes=tuple(_node(value) for value in said["nodes"]),
        coordinator=_node({"id": COORDINATOR, "type": "", "region": "", **place}),
        ways=_listed(links) if links["mode"] == "explicit" else {},
        regions=_regions(links, said["nodes"]) if links["mode"] == "regions" else {},
        estimate=said.get("analytic_profile", {}),
        reference=said.get("reference", {}),
    )


def _model(name: str, said: dict[str, Any]) -> Model:
    return Model(
        name=name,
        layers=int(said["layers"]),
        layer_bytes=_positive(said["layer_bytes"]),
        activation_bytes=_positive(said["activation_bytes_per_token"]),
        token_bytes=_positive(said["token_bytes"]),
        kv_bytes=_positive(said["kv_bytes_per_token_per_layer"]),
        input_tokens=_positive(said["avg_input_tokens"]),
        output_tokens=_positive(said["avg_output_tokens"]),
        max_input_tokens=int(said["max_input_tokens"]),
    )


def _type(name: str, said: dict[str, Any]) -> NodeType:
    whole = int(said.get("tensor_parallel", said["gpu_count"]))
    profiles: dict[str, dict[int, Profile]] = {}
    for model, value in said["profiles"].items():
        profiles.setdefault(model, {})[whole] = _profile(value)
    for degree, models in said.get("profiles_by_tp", {}).items():
        for model, value in models.items():
            profiles.setdefault(model, {})[int(degree)] = _profile(value)
    spec = said.get("gpu_spec")
    return NodeType(
        name=name,
        gpu=_text(said["gpu"]),
        gpus=int(said["gpu_count"]),
        memory_bytes=_positive(said["memory_gib"]) * _GIB,
        profiles=profiles,
        spec=spec
        and GpuSpec(
            flops=_positive(spec["fp16_tflops"]) * 1e12,
            memory_bytes_per_s=_positive(spec["memory_gb_s"]) * 1e9,
            memory_bytes=_positive(spec["memory_gib"]) * _GIB,
            between_bytes_per_s=_positive(spec["intra_machine_gb_s"]) * 1e9,
        ),
    )


def _profile(said: dict[str, Any]) -> Profile:
    most = int(said["max_layers"])
    rate, room = said["throughput_tokens_per_s"], said["kv_capacity_tokens"]
    return Profile(
        throughput=(0.0, *(float(rate[str(k)]) for k in range(1, most + 1))),
        kv_tokens=(0, *(int(room[str(k)]) for k in range(1, most + 1))),
        prefill=_points(said["prefill_layer_ms"]),
        decode=_points(said["decode_layer_ms"]),
        most_prompts=min(map(int, said.get("prefill_max_requests", {"": 0}).values())),
        most_rows=_by_layers(said.get("decode_max_batch", {}), most),
    )


def _by_layers(said: dict[str, Any], most: int) -> tuple[int, ...]:
    """Figures for k = 1 to `most`, at index k; nothing if the file has none."""
    return (0, *(int(said[str(k)]) for k in range(1, most + 1))) if said else ()


def _points(said: Sequence[Sequence[float]]) -> Points:
    """Ascending, as seconds, without the point at zero: that is an empty batch, and a batch of one
    reads all weights as the first measured one does."""
    points = tuple((float(at), float(ms) / 1e3) for at, ms in said if at > 0)
    if not points or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError("layer times need at least one point, in ascending order")
    return points


def _node(said: dict[str, Any]) -> Node:
    return Node(
        id=_text(said["id"]),
        type=_text(said["type"]),
        region=_text(said["region"]),
        in_bytes_per_s=_positive(_either(said, "nic_in_gbit_s", "down_gbit_s")) * _GBIT,
        out_bytes_per_s=_positive(_either(said, "nic_out_gbit_s", "up_gbit_s")) * _GBIT,
        access_s=float(said.get("access_ms", 0.0)) / 1e3,
    )


def _check_names(said: dict[str, Any]) -> None:
    seen: set[str] = set()
    for node in said["nodes"]:
        if node["type"] not in said["node_types"]:
            raise UsageError(
                f"node {node['id']!r} is of type {node['type']!r}, which is not in node_types",
                remedy="it has " + ", ".join(sorted(said["node_types"])),
            )
        if node["id"] in seen or node["id"] == COORDINATOR:
            raise UsageError(f"the cluster file has two nodes called {node['id']!r}")
        seen.add(node["id"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < inf:
        raise ValueError(f"{value!r} is not a positive number")
    return number


def _either(said: dict[str, Any], name: str, other: str) -> Any:
    return said[name] if name in said else said[other]


def _listed(links: dict[str, Any]) -> dict[tuple[str, str], Way]:
    named = {"source": COORDINATOR, "sink": COORDINATOR}
    ways: dict[tuple[str, str], Way] = {}
    for a, b, gbit_s, ms in links["list"]:
        pair = (named.get(a, a), named.get(b, b))
        ways[pair] = Way(_positive(gbit_s) * _GBIT, float(ms) / 1e3)
        if links.get("symmetric"):
            ways.setdefault((pair[1], pair[0]), ways[pair])
    return ways


def _regions(links: dict[str, Any], nodes: Sequence[Any]) -> dict[tuple[str, str], Way]:
    inside = links["intra_region"]
    way = Way(_positive(inside["gbit_s"]) * _GBIT, float(inside["rtt_ms"]) / 2e3)
    ways = {(name, name): way for name in {node["region"] for node in nodes}}
    for a, b, gbit_s, rtt_ms in links["inter_region"]:
        way = Way(_positive(gbit_s) * _GBIT, float(rtt_ms) / 2e3)
        ways[a, b] = ways[b, a] = way
    return ways
