"""Colours and words that the panels of the map share.

Two scales of colour that must not be taken for one another: *load* is a sequence of blues, from
idle to busy, and *stages* are different warm and green hues. Red is for holes alone. The letters
on a colour have a contrast of at least 4.5 to 1 in light and in dark (WCAG 2 AA); a test computes
it from `COLOURS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hexswarm.errors import UsageError
from hexswarm.groups import cut_text, group_name, standing
from hexswarm.records import Announcement, GroupMembership, PeerId, Route, Span
from hexswarm.svg import harmless

STAGE_COLOURS = 6
LOAD_STEPS = 5

COLOURS = {
    "paper": ("#ffffff", "#0d1117"),
    "panel": ("#f6f8fa", "#161b22"),
    "line": ("#d0d7de", "#30363d"),
    "ink": ("#1f2328", "#e6edf3"),
    "mute": ("#57606a", "#9198a1"),
    "hole": ("#cf222e", "#ff7b72"),
    "region": ("#e3e9f0", "#222a35"),
    "l0": ("#d6e6f4", "#1b3350"),
    "l1": ("#abcfe6", "#234b76"),
    "l2": ("#6fb0d9", "#2e6299"),
    "l3": ("#1f6fb2", "#79b0e4"),
    "l4": ("#08468b", "#cfe5fb"),
    "s0": ("#c2410c", "#fb923c"),
    "s1": ("#0f766e", "#2dd4bf"),
    "s2": ("#7e22ce", "#c89bff"),
    "s3": ("#be185d", "#f778ba"),
    "s4": ("#4d7c0f", "#a3e635"),
    "s5": ("#854d0e", "#facc15"),
}
"""Name to colour in light and in dark; l0 to l4 are load, s0 to s5 stages."""

_FIXED = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
    ".big{font-size:22px;font-weight:600}.mid{font-size:16px;font-weight:600}"
    ".strong{font-weight:600}.small{font-size:11px}.bar{font-size:11px}.tiny{font-size:10px}"
    ".arrow{fill:none;stroke-width:2.6;stroke-linecap:round}.guess{stroke-dasharray:7 5}"
    ".way{fill:none;stroke-width:1.4;stroke-dasharray:2 5;stroke-linecap:round}"
    ".halo{stroke-width:4;stroke-linejoin:round;paint-order:stroke}"
    ".soft{stroke-width:44;stroke-linejoin:round;stroke-linecap:round}"
    ".hollow{fill:none;stroke-width:1.6;stroke-dasharray:3 2}.mine{stroke-width:3.2}"
    ".rim{stroke-width:1.2}.stem{stroke-width:1.6}.member{stroke-width:3.5}"
)


def style() -> str:
    """The style sheet: each colour once for light, once for dark."""
    light, dark = (
        "".join(
            f".{name}{{fill:{pair[mode]}}}.{name}-line{{stroke:{pair[mode]}}}"
            for name, pair in COLOURS.items()
        )
        for mode in (0, 1)
    )
    return f"{_FIXED}{light}@media(prefers-color-scheme:dark){{{dark}}}"


def stage_class(index: int) -> str:
    return f"s{index % STAGE_COLOURS}"


def load_class(busy: float) -> str:
    return f"l{min(LOAD_STEPS - 1, int(busy * LOAD_STEPS))}"


def letters_on(load: str) -> str:
    """The class of text that can be read on a load colour."""
    return "paper" if load in ("l3", "l4") else "ink"


def short(peer: PeerId) -> str:
    """The end of a peer id: the beginning is the same for all."""
    return harmless(peer[-6:])


def layers_text(span: Span) -> str:
    """Layers as people count them, the last one included."""
    if len(span) == 1:
        return f"layer {span.first}"
    return f"layers {span.first}-{span.end - 1}"


def counted(number: int, noun: str) -> str:
    """ "1 peer", "1,200 peers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tip(item: Announcement) -> str:
    """What shows when the mouse is over a peer."""
    return (
        f"{harmless(item.peer, 64)}: {layers_text(item.span)}, {harmless(item.device, 40)} "
        f"{item.dtype}, {standing(item)}, {item.busy:.0%} busy{_group(item.group)}"
    )


def _group(told: GroupMembership | None) -> str:
    if told is None:
        return ""
    cut = f", cut {cut_text(told)}" if told.shares else ""
    return f", rank {told.rank} of {told.size} in group {group_name(told)}, epoch {told.epoch}{cut}"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be drawn: the peers of one model, and perhaps a route through them."""

    peers: tuple[Announcement, ...]
    layers: int
    route: Route | None
    stage_of: dict[PeerId, int] = field(init=False)
    """Number of the stage that a peer computes in the route."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise UsageError("a model has at least one layer")
        stages = self.route.stages if self.route else ()
        numbers = {stage.peer: index for index, stage in enumerate(stages)}
        object.__setattr__(self, "stage_of", numbers)
