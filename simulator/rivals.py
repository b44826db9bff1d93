"""The rivals by name: what `hexswarm simulate --policy NAME` and the benchmarks may ask for.

Each routes on a plan that is given to it, its own or any other's; `placements` has the rules by
which they place. What each leaves out is in its file.
"""

from __future__ import annotations

from collections.abc import Sequence

from hexswarm.errors import UsageError
from hexswarm.router.placement.cluster import Cluster, Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.policy import Policy
from hexswarm.simulator.rival_helix import Helix
from hexswarm.simulator.rival_hexgen import HexGen
from hexswarm.simulator.rival_petals import Petals
from hexswarm.simulator.rival_random import Chance
from hexswarm.simulator.rival_separate import Pipeline, Separate
from hexswarm.simulator.rival_swarm import Swarm

NAMES = ("helix", "swarm", "petals", "separate", "random", "hexgen")


def rival(
    name: str,
    cluster: Cluster,
    model: Model,
    plan: Plan,
    *,
    seed: int = 0,
    pipelines: Sequence[Pipeline] | None = None,
) -> Policy:
    """The policy of that name on this plan; `pipelines` for those that have some, else they are
    found in the plan."""
    if name == Chance.name:
        return Chance(cluster, model, plan, seed=seed)
    for disjoint in (Separate, HexGen):
        if disjoint.name == name:
            return disjoint(cluster, model, plan, pipelines)
    for known in (Helix, Swarm, Petals):
        if known.name == name:
            return known(cluster, model, plan)
    raise UsageError(f"there is no policy {name!r}", remedy="there are " + ", ".join(NAMES))
