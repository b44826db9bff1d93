"""The words around the map: title, what the route promises, legend, description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from hexswarm.axis import holes
from hexswarm.groups import group_line, groups
from hexswarm.paint import LOAD_STEPS, Subject, counted, layers_text
from hexswarm.records import Announcement
from hexswarm.scene import MARGIN, WIDTH, Scene, stem_length
from hexswarm.svg import element, escape, fit, harmless, line, milliseconds, text, width


def model_name(peers: Sequence[Announcement]) -> str:
    """What most peers call the model."""
    names = Counter(item.model_name for item in peers)
    return min(names, key=lambda name: (-names[name], name), default="")


def header(subject: Subject, name: str, model: str) -> list[str]:
    """Name and size of the swarm at the left, what the route promises at the right."""
    promise, terms = _promise(subject)
    room = WIDTH - 2 * MARGIN - width(promise, 16) - 30
    serving = sum(item.serving for item in subject.peers)
    facts = f"{counted(len(subject.peers), 'peer')}, {serving:,} serving · "
    facts += f"{subject.layers:,} layers · digest {harmless(model[:12])}"
    shown = fit(harmless(name or "empty swarm", 80), 23, room) or "swarm"
    missing = holes(subject)
    warning = ""
    if missing:
        words = ", ".join(layers_text(span) for span in missing[:3])
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        warning = element("tspan", f"no peer: {words}{more}", dx=10, class_="strong hole")
    parts = [
        text((MARGIN, 36), shown, "big ink"),
        element("text", escape(facts), warning, x=MARGIN, y=58, class_="mute"),
    ]
    if promise:
        parts.append(text((WIDTH - MARGIN, 36), promise, "mid ink", "end"))
        parts.append(text((WIDTH - MARGIN, 58), terms, "mute", "end"))
    return parts


def _promise(subject: Subject) -> tuple[str, str]:
    """The predicted times of the route, in a line for the eye and one for the careful."""
    route = subject.route
    if route is None:
        return "", ""
    least = "at least " if route.unmeasured else ""
    promise = (
        f"{least}{milliseconds(route.tpot_s)} per token · "
        f"first token after {milliseconds(route.ttft_s)}"
    )
    terms = f"predicted for a ring of {counted(len(route.stages), 'stage')}, medians"
    gone = len(subject.stage_of.keys() - {item.peer for item in subject.peers})
    if gone:
        terms = f"{counted(gone, 'peer')} of the ring no longer announced; {terms}"
    if route.tpot_p95_s > 0:
        slow = f"{milliseconds(route.tpot_p95_s)} and {milliseconds(route.ttft_p95_s)}"
        terms += f"; 95th percentile {slow}"
    return promise, terms


def description(subject: Subject, scene: Scene) -> str:
    serving = sum(item.serving for item in subject.peers)
    words = [
        f"{counted(len(subject.peers), 'peer')}, {serving} serving, in "
        f"{counted(len(scene.groups), 'region')} of two or more."
    ]
    words += [f"There is {group_line(group)}." for group in groups(subject.peers)[:8]]
    missing = holes(subject)
    if missing:
        words.append("No peer: " + ", ".join(layers_text(span) for span in missing[:8]) + ".")
    if subject.route is not None:
        promise, terms = _promise(subject)
        words.append(f"The route: {promise}, {terms}.")
    words.append("Distance is round-trip time; dots are moved apart where they would overlap.")
    return " ".join(words)


def legend(scene: Scene) -> list[str]:
    """What the marks mean, in one row below the map; only marks that occur."""
    x, y = MARGIN, scene.panel.bottom + 26
    parts: list[str] = []

    def item(draw: Callable[[float, float], Sequence[str]], wide: float, words: str) -> None:
        nonlocal x, y
        long = wide + 6 + width(words, 11)
        if x + long > WIDTH - MARGIN:
            x, y = MARGIN, y + 20
        parts.extend(draw(x, y))
        parts.append(text((x + wide + 6, y + 4), words, "small mute"))
        x += long + 18

    drawn, stages = scene.drawn, scene.subject.stage_of
    item(_swatches, 30 + 17 * LOAD_STEPS, "busy")
    item(lambda x, y: [_sample_dot(x + 5, y, 4), _sample_dot(x + 21, y, 8)], 29, "few, many layers")
    if any(not peer.serving for peer in drawn):
        item(lambda x, y: [_sample_dot(x + 6, y, 6, "panel hollow")], 12, "not serving")
    if any(stem_length(peer) >= 3 for peer in drawn):
        item(
            lambda x, y: [line(x + 3, y + 7, x + 3, y - 8, "stem mute-line")],
            6,
            "slow access line",
        )
    if any(peer.group is not None and peer.group.size > 1 for peer in drawn):
        item(lambda x, y: [line(x, y, x + 24, y, "member mute-line")], 24, "tensor-parallel group")
    if len(stages) > 1:
        item(lambda x, y: [line(x, y, x + 24, y, "arrow s0-line")], 26, "ring, times one way")
    if stages and scene.client is not None:
        item(lambda x, y: [line(x, y, x + 24, y, "way mute-line")], 26, "client to head and tail")
    if scene.more:
        item(lambda x, y: [], 0, f"{counted(scene.more, 'peer')} not drawn")
    if scene.beyond:
        far = f"{counted(len(scene.beyond), 'peer')} at the edge: farther away"
        item(lambda x, y: [], 0, far)
    return parts


def _swatches(x: float, y: float) -> list[str]:
    places = [(f"l{step}", x + 30 + 17 * step) for step in range(LOAD_STEPS)]
    return [
        text((x, y + 4), "idle", "small mute"),
        *(element("rect", x=at, y=y - 6, width=16, height=12, class_=load) for load, at in places),
    ]


def _sample_dot(x: float, y: float, r: float, fill: str = "l1") -> str:
    return element("circle", cx=x, cy=y, r=r, class_=f"{fill} mute-line rim")
