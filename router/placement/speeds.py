"""How fast a group of GPUs computes layers, where nobody has measured it: an analytic model.

The cluster files of HexGen's pools carry no measured times, only constants (`analytic_profile`) and
tables made from them. This module is that formula, so that a group which no table covers (other
degrees, unlike GPUs, unequal cuts, machines of one LAN) is valued by the same rule as the tables;
a test holds it to every table of the files. Per layer, with a member's share `x` of the weights:

- reading weights: x layer_bytes / (memory rate em);
- prompt of n tokens: the longer of that and the products, x layer_bytes n / (flops ep), because two
  bytes of weights take part in two operations a token; attention is left out (short prompts);
- decode of n rows: weights *plus* products, x layer_bytes n / (flops ed), plus each row's context
  of KV (the prompt and half the answer): batches of a few rows do not overlap the two;
- the slowest member decides, then two all-reduces of n activations: 4 (g - 1) steps that each wait
  one hop and together move 4 (g - 1)/g of the data over the slowest link, as HexGen writes it
  (arXiv 2311.11514); over machines of one LAN once more between the machines; and a fixed cost.

T(k), the throughput of k held layers, is at the batch that Helix expects in spirit: requests for
which half the free KV has room (at most `in_flight_max`), k/layers of them here at a time, at most
`max_batch` rows; every row brings 1/output_tokens of a whole prompt of its own.

Rejected: measuring on a GPU (the pools name cards that we have not); summing the members' speeds
(a tensor-parallel step waits for its slowest member); HexGen's own constants (they rank plans, but
its KV term ignores grouped-query attention and its step has no fixed cost).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import Cluster, GpuSpec, Model, NodeType, Points, Profile

PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
"""Prompt pieces at which a profile's points lie, as in the files."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Decode batches at which they lie."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The constants of the formula."""

    memory_efficiency: float
    decode_efficiency: float
    prefill_efficiency: float
    fixed_s: float
    hop_s: float
    """One step of an all-reduce inside a machine."""
    usable_memory: float
    high_water: float
    """Part of the KV room that requests are expected to fill."""
    weights_share: float
    """Most of a member's memory that weights may take."""
    max_batch: int
    in_flight_max: int


@dataclass(frozen=True, slots=True)
class Lan:
    """What an all-reduce crosses between the machines of a group."""

    machines: int
    one_way_s: float
    bytes_per_s: float


def estimate_of(cluster: Cluster) -> Estimate:
    """A cluster file's constants; UsageError when it has none (its times were measured)."""
    said: Mapping[str, Any] = cluster.estimate
    try:
        return Estimate(
            memory_efficiency=float(said["em"]),
            decode_efficiency=float(said["ed"]),
            prefill_efficiency=float(said["ep"]),
            fixed_s=float(said["fixed_ms"]) / 1e3,
            hop_s=float(said["hop_ms"]) / 1e3,
            usable_memory=float(said["usable_memory"]),
            high_water=float(said["hwm"]),
            weights_share=float(said["weights_share_max"]),
            max_batch=int(said["max_batch"]),
            in_flight_max=int(said["in_flight_max"]),
        )
    except KeyError as error:
        raise UsageError(
            f"cluster {cluster.name} has no constants for estimated speeds ({error})",
            remedy='only files with "analytic_profile" can be regrouped or given other lengths',
        ) from None


def profile(
    model: Model,
    estimate: Estimate,
    members: Sequence[GpuSpec],
    shares: Sequence[float],
    lan: Lan | None = None,
) -> Profile | None:
    """What a group is worth whose members hold these parts of every layer; None: no layer fits."""
    if len(members) != len(shares) or abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
        raise UsageError("a group's shares are positive, one for each member, and sum to one")
    prefill, decode = _times(model, estimate, tuple(zip(members, shares, strict=True)), lan)
    room = _room(model, estimate, members, shares)
    if not room:
        return None
    rates = (
        _throughput(model, estimate, held, tokens, prefill, decode)
        for held, tokens in enumerate(room, 1)
    )
    return Profile(
        throughput=(0.0, *rates),
        kv_tokens=(0, *room),
        prefill=_points(PROMPTS, prefill),
        decode=_points(ROWS, decode),
    )


def for_lengths(cluster: Cluster, name: str, input_tokens: float, output_tokens: float) -> Cluster:
    """The same cluster and its profiles of one model as requests of other lengths find them."""
    estimate = estimate_of(cluster)
    model = replace(cluster.model(name), input_tokens=input_tokens, output_tokens=output_tokens)
    types = {key: _retyped(type, model, estimate) for key, type in cluster.types.items()}
    return replace(cluster, models={**cluster.models, name: model}, types=types)


def within(
    profile: Profile, model: Model, layer_budget_s: float, max_rows: int = 512
) -> Profile | None:
    """The profile with T(k) at the largest batch whose step keeps to a budget for each layer.

    A step that serves b rows comes with b/output_tokens prompts. Under a latency limit this, not
    the batch that memory allows, is what a unit can carry; None: even one row takes too long. The
    KV of all requests in flight must fit too: k/layers of them are here at a time.
    """
    rows = _largest(lambda rows: step_layer_s(profile, model, rows) <= layer_budget_s, max_rows)
    if rows < 1:
        return None
    length = model.input_tokens + model.output_tokens
    rates = [0.0]
    for held in range(1, profile.max_layers + 1):
        fits = profile.kv_tokens[held] / length * held / model.layers
        batch = max(1.0, min(rows, fits))
        rates.append(
            batch * length / model.output_tokens / step_layer_s(profile, model, batch) / held
        )
    return replace(profile, throughput=tuple(rates))


def step_layer_s(profile: Profile, model: Model, rows: float) -> float:
    """Seconds of one layer for decode rows and the prompts that come with them.

    Fewer than one prompt a step: some steps have one, the others none.
    """
    prompts = rows / model.output_tokens
    return profile.decode_layer_s(rows) + (
        prompts * profile.prefill_layer_s(model.input_tokens)
        if prompts < 1
        else profile.prefill_layer_s(prompts * model.input_tokens)
    )


def _largest(holds: Callable[[float], bool], most: int) -> float:
    """The largest number in [1, most] for which a falling condition holds; 0: for none."""
    if not holds(1.0):
        return 0.0
    if holds(float(most)):
        return float(most)
    low, high = 1.0, float(most)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _retyped(type: NodeType, model: Model, estimate: Estimate) -> NodeType:
    if type.spec is None:
        raise UsageError(f"machines {type.name} have no gpu_spec to estimate speeds by")
    degrees = type.profiles.get(model.name, {})
    made = {
        degree: profile(model, estimate, [type.spec] * degree, [1 / degree] * degree)
        for degree in degrees
    }
    kept = {degree: value for degree, value in made.items() if value is not None}
    return replace(type, profiles={**type.profiles, model.name: kept})


def _times(
    model: Model, estimate: Estimate, parts: Sequence[tuple[GpuSpec, float]], lan: Lan | None
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Seconds of one layer for a prompt of n tokens, and for n decode rows."""
    context = (model.input_tokens + model.output_tokens / 2) * model.kv_bytes
    read = [
        share * model.layer_bytes / (gpu.memory_bytes_per_s * estimate.memory_efficiency)
        for gpu, share in parts
    ]
    compute = [share * model.layer_bytes / gpu.flops for gpu, share in parts]
    kv = [
        share * context / (gpu.memory_bytes_per_s * estimate.memory_efficiency)
        for gpu, share in parts
    ]
    waits, token = _reduction(model, estimate, [gpu for gpu, _ in parts], lan)

    def prefill(tokens: float) -> float:
        longest = max(
            max(weights, products * tokens / estimate.prefill_efficiency)
            for weights, products in zip(read, compute, strict=True)
        )
        return longest + tokens * token + waits + estimate.fixed_s

    def decode(rows: float) -> float:
        longest = max(
            weights + rows * (products / estimate.decode_efficiency + held)
            for weights, products, held in zip(read, compute, kv, strict=True)
        )
        return longest + rows * token + waits + estimate.fixed_s

    return prefill, decode


def _reduction(
    model: Model, estimate: Estimate, members: Sequence[GpuSpec], lan: Lan | None
) -> tuple[float, float]:
    """Both all-reduces of a layer: seconds that they wait, and seconds for each token."""
    inside = len(members) if lan is None else -(-len(members) // lan.machines)
    slowest = min(gpu.between_bytes_per_s for gpu in members)
    waits = 4 * (inside - 1) * estimate.hop_s
    token = 4 * (inside - 1) / inside * model.activation_bytes / slowest
    if lan is not None:
        waits += 4 * (lan.machines - 1) * lan.one_way_s
        token += 4 * (lan.machines - 1) / lan.machines * model.activation_bytes / lan.bytes_per_s
    return waits, token


def _room(
    model: Model, estimate: Estimate, members: Sequence[GpuSpec], shares: Sequence[float]
) -> tuple[int, ...]:
    """Tokens of KV beside 1, 2, ... layers: what the fullest member has room for."""
    most = min(
        int(estimate.weights_share * gpu.memory_bytes / (share * model.layer_bytes))
        for gpu, share in zip(members, shares, strict=True)
    )
    usable = min(
        gpu.memory_bytes * estimate.usable_memory / share
        for gpu, share in zip(members, shares, strict=True)
    )
    return tuple(
        int((usable - held * model.layer_bytes) / (held * model.kv_bytes))
        for held in range(1, min(most, model.layers) + 1)
    )


def _throughput(
    model: Model,
    estimate: Estimate,
    held: int,
    kv_tokens: int,
    prefill: Callable[[float], float],
    decode: Callable[[float], float],
) -> float:
    length = model.input_tokens + model.output_tokens
    in_flight = min(estimate.in_flight_max, kv_tokens * estimate.high_water / length)
    rows = min(estimate.max_batch, max(1.0, in_flight * held / model.layers))
    layer_s = decode(rows) + rows / model.output_tokens * prefill(model.input_tokens)
    return rows * length / model.output_tokens / (held * layer_s)


def _points(at: Sequence[int], seconds: Callable[[float], float]) -> Points:
    return tuple((float(x), seconds(x)) for x in at)
