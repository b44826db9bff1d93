"""The swarm as text: which peer holds which layers, drawn over the layer axis."""

from __future__ import annotations

from collections.abc import Sequence

from hexswarm.groups import group_line, groups, standing
from hexswarm.records import Announcement, ModelSpec, Span
from hexswarm.router.network import Snapshot

WIDTH = 48


def swarm_table(spec: ModelSpec, view: Snapshot, missing: Sequence[Span]) -> str:
    """One row a peer with its span as a bar, and how often each layer is held."""
    head = (
        f"{'peer':8}  {'layers':>7}  {'state':8} {'device':7} {'dtype':8} "
        f"{'ms/token':>8} {'queue ms':>8} {'busy':>4} {'free KV':>8}  "
    )
    rows = [
        f"{spec.name}: {spec.layers} layers, context {spec.context}, digest {spec.digest[:12]}",
        "",
        f"{head}0{' ' * (WIDTH - 2)}{spec.layers}",
    ]
    peers = [item for item in view.announcements if item.model == spec.digest]
    for item in sorted(peers, key=lambda a: (a.span, a.peer)):
        head_s = item.speed.head_s if item.span.end == spec.layers else 0.0
        step_ms = (item.speed.decode_layer_s * len(item.span) + head_s) * 1e3
        rows.append(
            f"{item.peer[-8:]}  {item.span!s:>7}  {standing(item):8} {item.device:7} "
            f"{item.dtype:8} {step_ms:8.1f} {item.queue_s * 1e3:8.1f} {item.busy:4.0%} "
            f"{item.free_kv_tokens:8d}  {_bar(item, spec.layers)}"
        )
    rows.append(f"{' ' * len(head)}{_counts(view.coverage(spec.digest), spec.layers)}")
    lines = [group_line(group) for group in groups(peers)]
    if lines:
        rows += ["", *lines]
    if missing:
        text = ", ".join(f"{span.first}-{span.end - 1}" for span in missing)
        rows.append(f"\nno peer serves layers {text}: the model cannot answer")
    else:
        rows.append(f"\nevery layer is served; {len(peers)} peer(s)")
    return "\n".join(rows)


def _column(layer: int, layers: int) -> int:
    return layer * WIDTH // layers


def _bar(item: Announcement, layers: int) -> str:
    """Solid for who speaks for its layers; a member's are its leader's, and stippled."""
    first, end = _column(item.span.first, layers), _column(item.span.end, layers)
    mark = "█" if item.stands else "▒"
    return "·" * first + mark * max(1, end - first) + "·" * (WIDTH - end)


def _counts(coverage: Sequence[int], layers: int) -> str:
    """How many peers hold each layer, one digit a column (+ for ten and more)."""
    held = list(coverage) or [0] * layers
    digits = [held[column * layers // WIDTH] for column in range(WIDTH)]
    return "".join(str(count) if count < 10 else "+" for count in digits)
