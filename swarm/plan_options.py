"""What `hexswarm plan` and `hexswarm simulate` are asked, checked before anything takes time.

The flags derive from these classes (`hexswarm.config.add_flags`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hexswarm.config import option
from hexswarm.config import seconds as duration
from hexswarm.errors import UsageError

OBJECTIVES = ("flow", "service", "slo")
OURS = "hexswarm"
ARRIVALS = ("poisson", "azure")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What to look for, and how long."""

    model: str | None = option(None, "which model of the cluster file (default: its only one)")
    load: float | None = option(
        None, "tokens a second, prompts and answers, that the plan shall carry", metavar="TOK_S"
    )
    ttft: float | None = option(
        None, "limit of the time to the first token, as 5 or 800ms", parse=duration, metavar="TIME"
    )
    tpot: float | None = option(
        None, "limit of the time per token, as 1 or 250ms", parse=duration, metavar="TIME"
    )
    seconds: float = option(5.0, "how long to search", parse=duration, metavar="TIME")
    seed: int = option(0, "chance of the search", metavar="N")
    objective: str | None = option(
        None,
        "flow: most tokens a second; service: soonest tokens at --load; slo: disjoint pipelines, "
        "most requests within --ttft and --tpot (default: service with a load, else flow)",
    )

    def __post_init__(self) -> None:
        for name in ("load", "ttft", "tpot", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name} is a positive number")
        if self.objective not in (None, *OBJECTIVES):
            raise UsageError(
                f"there is no objective {self.objective!r}", remedy="use " + ", ".join(OBJECTIVES)
            )
        if self.objective == "service" and self.load is None:
            raise UsageError("a plan for service needs the load", remedy="give --load TOK_S")
        if self.wanted == "flow" and (self.ttft is not None or self.tpot is not None):
            raise UsageError(
                "a plan for flow keeps no limits of time, as --ttft and --tpot are",
                remedy="give --load TOK_S too, or --objective slo",
            )

    @property
    def wanted(self) -> str:
        """The objective."""
        return self.objective or ("flow" if self.load is None else "service")


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What comes, who routes, and for how long."""

    plan: Path | None = option(None, "file of `hexswarm plan -o`", metavar="FILE")
    trace: Path | None = option(
        None,
        "CSV of input_tokens,output_tokens (default: the lengths in the cluster file)",
        metavar="FILE",
    )
    rate: float | None = option(None, "requests a second", metavar="REQ_S")
    load: float | None = option(
        None, "instead of a rate: tokens a second, prompts and answers", metavar="TOK_S"
    )
    policy: str = option(
        OURS, f"who routes: {OURS}, helix, swarm, petals, separate, random or hexgen"
    )
    seconds: float = option(300.0, "virtual seconds", parse=duration, metavar="TIME")
    warmup: float = option(60.0, "of them not counted", parse=duration, metavar="TIME")
    seed: int = option(0, "chance of arrivals and world", metavar="N")
    arrivals: str | None = option(
        None,
        "poisson, or azure: as bursty as the trace's own (default: azure with --arrivals-file)",
    )
    arrivals_file: Path | None = option(
        None,
        "requests in each 3 s of the trace's hour, a line each "
        "(default for azure: TRACE-arrivals.csv beside TRACE.csv)",
        metavar="FILE",
    )
    churn: float | None = option(
        None, "mean life of a machine; without it none dies", parse=duration, metavar="TIME"
    )
    absence: float | None = option(
        None,
        "with --churn: mean time until it is back and loaded (default: 120)",
        parse=duration,
        metavar="TIME",
    )

    def __post_init__(self) -> None:
        if self.plan is None:
            raise UsageError(
                "a simulation needs a plan", remedy="hexswarm plan -o FILE, --plan FILE"
            )
        if (self.rate is None) == (self.load is None):
            raise UsageError(
                "a simulation needs either --rate or --load",
                remedy="requests a second, or tokens a second",
            )
        for name in ("rate", "load", "seconds", "churn", "absence"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name} is a positive number")
        if not 0 <= self.warmup < self.seconds:
            raise UsageError("--warmup is shorter than --seconds")
        if self.absence is not None and self.churn is None:
            raise UsageError("nobody is absent if nobody dies", remedy="give --churn TIME too")
        self._check_arrivals()

    def _check_arrivals(self) -> None:
        if self.arrivals not in (None, *ARRIVALS):
            raise UsageError(
                f"there are no arrivals {self.arrivals!r}", remedy="use " + " or ".join(ARRIVALS)
            )
        if self.arrivals == "poisson" and self.arrivals_file is not None:
            raise UsageError(
                "Poisson arrivals come from no file", remedy="leave out --arrivals or the file"
            )
        if self.arrivals == "azure" and self.trace is None and self.arrivals_file is None:
            raise UsageError(
                "arrivals as a trace had them need that trace",
                remedy="give --arrivals-file FILE or --trace FILE",
            )

    @property
    def bins(self) -> Path | None:
        """The file of arrivals; None: they are Poisson's."""
        if self.arrivals_file is not None or self.arrivals != "azure":
            return self.arrivals_file
        assert self.trace is not None
        return self.trace.with_name(f"{self.trace.stem}-arrivals.csv")
