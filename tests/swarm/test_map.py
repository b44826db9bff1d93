"""The picture of a swarm: whole, harmless, bounded, and true to what it shows.

`example()` makes the believable swarm of docs/swarm-map.svg; to write that file again:

    PYTHONPATH=. .venv/bin/python tests/swarm/test_map.py > docs/swarm-map.svg
"""

from __future__ import annotations

import itertools
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.layout import Box
from hexswarm.map import swarm_map
from hexswarm.paint import COLOURS, LOAD_STEPS, STAGE_COLOURS, layers_text, letters_on, style
from hexswarm.records import (
    Announcement,
    Coordinates,
    GroupMembership,
    Link,
    PeerId,
    Route,
    Span,
    Speed,
    Stage,
    uncovered,
)
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.scene import DOTS
from hexswarm.svg import width
from tests.strategies import MODEL, coordinates, snapshots

SVG = "{http://www.w3.org/2000/svg}"
DIGEST = "5eed" * 16


def peer_name(rng: random.Random) -> PeerId:
    letters = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    return PeerId("12D3KooW" + "".join(rng.choices(letters, k=44)))


def announce(peer: PeerId, span: tuple[int, int], layers: int = 32, **more: object) -> Announcement:
    facts: dict[str, object] = {
        "model": DIGEST,
        "model_name": "Llama-3.1-8B-Instruct",
        "state": "online",
        "dtype": "bfloat16",
        "device": "NVIDIA L4",
        "speed": Speed(5e-4, 2e-5, 2e-3),
        "free_kv_tokens": 4096,
        "queue_s": 0.0,
        "addresses": (),
    }
    facts |= more
    return Announcement(peer=peer, span=Span(*span), layers=layers, **facts)  # type: ignore[arg-type]


EXAMPLE = (
    # where a region is, and the spans of its peers
    ((0.0, 0.0, 0.0), "0:9 0:12 8:18 8:16 0:8 4:12 0:16 9:20 0:8"),
    ((0.084, 0.012, 0.004), "16:32 20:32 24:32 22:32 16:32 16:32 18:26 26:32"),
    ((0.048, 0.041, -0.006), "10:20 18:28 12:24 14:24 16:24 6:14 20:28"),
)
DEVICES = ("NVIDIA L4", "RTX 4090", "RTX 3090", "A100 40GB", "RTX 4070", "Apple M3 Max")


def example() -> str:
    """Three regions, 24 peers, 32 layers, and a route of four stages."""
    rng = random.Random(7)
    told: list[Announcement] = []
    for region, (centre, spans) in enumerate(EXAMPLE):
        for number, text in enumerate(spans.split()):
            span = Span.parse(text)
            spread = 0.003 if region == 2 else 0.0012
            x, y, z = (round(value + rng.gauss(0, spread), 5) for value in centre)
            height_s = 0.007 if number % 3 == 2 else 0.0004
            told.append(
                announce(
                    peer_name(rng),
                    (span.first, span.end),
                    device=DEVICES[(region * 2 + number) % len(DEVICES)],
                    busy=round(rng.random() ** 1.5, 2),
                    coordinates=Coordinates((x, y, z), height_s, 0.1),
                )
            )
    told[5] = replace(told[5], state="joining")
    told[22] = replace(told[22], coordinates=None)
    for rank, index in enumerate((13, 14)):
        group = GroupMembership("lyon", rank, 2, 1, (500, 500))
        told[index] = replace(told[index], group=group, device="A100 40GB", busy=0.3)
    spans = {0: (0, 8), 3: (8, 16), 20: (16, 24), 11: (24, 32)}
    stages = tuple(Stage(told[index].peer, Span(*span)) for index, span in spans.items())
    ring = [told[index] for index in spans]
    links = {
        (a.peer, b.peer): Link(estimate(a, b))
        for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)
    }
    on_the_way_s = sum(link.one_way_s for link in links.values())
    route = Route(
        stages, 0.642, on_the_way_s + 0.021, ttft_p95_s=0.731, tpot_p95_s=on_the_way_s + 0.034
    )
    client = Coordinates((0.06, 0.03, 0.002), 0.006, 0.2)
    return swarm_map(snapshot(told, links, now=0.0), DIGEST, 32, route, client)


def estimate(a: Announcement, b: Announcement) -> float:
    """The round trip between two peers by their coordinates, to a tenth of a millisecond."""
    assert a.coordinates is not None
    assert b.coordinates is not None
    trip = math.dist(a.coordinates.position_s, b.coordinates.position_s)
    return round(trip + a.coordinates.height_s + b.coordinates.height_s, 4)


def told_of(count: int, layers: int = 80, seed: int = 1) -> list[Announcement]:
    """A swarm of any size: eight regions, some of them large, spans of all lengths."""
    rng = random.Random(seed)
    centres = [[rng.uniform(0, 0.15), rng.uniform(0, 0.09), rng.gauss(0, 0.01)] for _ in range(8)]
    told = []
    for _ in range(count):
        first = rng.randrange(0, layers - 8)
        x, y, z = (v + rng.gauss(0, 0.004) for v in centres[min(7, int(rng.expovariate(0.5)))])
        told.append(
            announce(
                peer_name(rng),
                (first, min(layers, first + rng.choice([4, 8, 20, 40]))),
                layers,
                busy=rng.random(),
                state="joining" if rng.random() < 0.06 else "online",
                coordinates=None
                if rng.random() < 0.05
                else Coordinates((x, y, z), abs(rng.gauss(0, 0.004)), 0.1),
            )
        )
    return told


def route_over(view: Snapshot, model: str, layers: int) -> Route | None:
    """Any route: from each layer on, the peer that reaches farthest."""
    stages: list[Stage] = []
    reached = 0
    while reached < layers:
        used = {stage.peer for stage in stages}
        able = [a for a in view.of_model(model) if a.serving and reached in a.span]
        able = [a for a in able if a.peer not in used]
        if not able:
            return None
        best = max(able, key=lambda a: (a.span.end, a.peer))
        stages.append(Stage(best.peer, Span(reached, best.span.end)))
        reached = best.span.end
    return Route(tuple(stages), 0.9, 0.2)


def three(*spans: tuple[int, int], **more: object) -> list[Announcement]:
    """A few peers in a row, 10 ms from one to the next."""
    return [
        announce(
            PeerId(f"12D3KooWPeer{index:04d}"),
            span,
            coordinates=Coordinates((index * 0.01, 0.0, 0.0), 0.002, 0.1),
            **more,
        )
        for index, span in enumerate(spans)
    ]


def drawn(told: list[Announcement], layers: int, route: Route | None = None) -> str:
    return swarm_map(snapshot(told, {}, now=0.0), DIGEST, layers, route)


def classes(root: Element, tag: str, wanted: str) -> list[Element]:
    """The elements of a tag and class."""
    return [node for node in root.iter(f"{SVG}{tag}") if wanted in node.get("class", "").split()]


def tips(root: Element, tag: str, wanted: str) -> list[str]:
    found = (node.find(f"{SVG}title") for node in classes(root, tag, wanted))
    return [title.text or "" for title in found if title is not None]


def words(root: Element) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]


@given(snapshots(most=9), st.none() | coordinates)
def test_any_swarm_has_a_picture_with_all_of_it(view: Snapshot, client: Coordinates | None) -> None:
    """It is XML, every peer has a dot and a bar, every stage its label, every hole its band."""
    route = route_over(view, MODEL, 12)
    picture = swarm_map(view, MODEL, 12, route, client)
    root = fromstring(picture)
    peers = {item.peer for item in view.of_model(MODEL)}
    assert {tip.split(":")[0] for tip in tips(root, "g", "peer")} == peers
    assert {tip.split(":")[0] for tip in tips(root, "g", "peer-bar")} == peers
    serving = {item.span for item in view.serving(MODEL)}
    assert tips(root, "rect", "hole") == [
        f"no peer: {layers_text(hole)}" for hole in uncovered(serving, 12)
    ]
    for index, stage in enumerate(route.stages if route else ()):
        assert f"{index + 1} · {layers_text(stage.span)}" in words(root)
    assert ("client" in " ".join(words(root))) == (client is not None)
    assert picture == swarm_map(view, MODEL, 12, route, client)


@given(snapshots(most=9), st.none() | coordinates)
def test_everything_lies_on_the_paper(view: Snapshot, client: Coordinates | None) -> None:
    """No dot and no number of the picture is outside of it or not finite."""
    root = fromstring(swarm_map(view, MODEL, 12, route_over(view, MODEL, 12), client))
    w, h = float(root.get("width", "")), float(root.get("height", ""))
    for node in root.iter():
        for name, most in (("x", w), ("cx", w), ("x1", w), ("y", h), ("cy", h), ("y1", h)):
            assert 0 <= float(node.get(name, "0")) <= most, (node.tag, node.attrib)
        assert "nan" not in node.get("d", "")
        assert "inf" not in node.get("d", "")


def test_strangers_cannot_write_markup_or_control_characters() -> None:
    """Names, devices and peer ids are claims: they end up as text, whatever they contain."""
    evil = "</title><script>alert(1)</script>\x00\x1b[31m\u202e\ud800]]>&\"'"
    told = [
        replace(item, model_name=evil, device=evil, peer=PeerId(item.peer + evil))
        for item in three((0, 16), (16, 32), (0, 32))
    ]
    grouped = [replace(told[2], group=GroupMembership(evil, 0, 2, 0)), *told[:2]]
    route = Route((Stage(told[0].peer, Span(0, 16)), Stage(told[1].peer, Span(16, 32))), 1, 1)
    picture = swarm_map(snapshot(grouped, {}, now=0.0), DIGEST, 32, route)
    root = fromstring(picture.encode())
    assert not list(root.iter(f"{SVG}script"))
    assert "<script" not in picture
    assert {node.tag.removeprefix(SVG) for node in root.iter()} <= {
        *("svg", "title", "desc", "style", "rect", "text", "tspan", "g", "circle", "path", "line")
    }
    assert not {"\x00", "\x1b", "\u202e"} & set(picture)
    assert any("</title><script>" in line for line in words(root))


def test_nothing_is_fetched_from_elsewhere() -> None:
    picture = example()
    for needle in ("href", "url(", "@import", "javascript", "<script", "<image", "<foreignObject"):
        assert needle not in picture
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]


def test_the_ring_bears_the_time_of_each_way() -> None:
    """Head to next to tail and back to the head: half a round trip each; guesses look like some."""
    told = three((0, 10), (10, 20), (20, 32))
    a, b, c = (item.peer for item in told)
    stages = (Stage(a, Span(0, 10)), Stage(b, Span(10, 20)), Stage(c, Span(20, 32)))
    links = {(a, b): Link(0.024), (b, c): Link(0.0031)}
    route = Route(stages, 0.5, 0.1, unmeasured=((a, c),))
    root = fromstring(swarm_map(snapshot(told, links, now=0.0), DIGEST, 32, route))
    shown = words(root)
    assert shown.index("12 ms") < shown.index("1.6 ms") < shown.index("not measured")
    arrows = [node for node in classes(root, "path", "arrow") if "Q" in node.get("d", "")]
    assert len(arrows) == 3
    assert ["guess" in node.get("class", "") for node in arrows] == [False, False, True]
    assert "at least 100 ms per token · first token after 500 ms" in shown
    route = replace(route, unmeasured=(), ttft_p95_s=0.6, tpot_p95_s=0.2)
    root = fromstring(swarm_map(snapshot(told, links, now=0.0), DIGEST, 32, route))
    assert "100 ms per token · first token after 500 ms" in words(root)
    assert any(line.startswith("~") for line in words(root))
    assert any("200 ms and 600 ms" in line for line in words(root))


def test_arrows_go_from_each_stage_to_the_next() -> None:
    """An arrow begins near the dot of its stage and ends near that of the next."""
    told = three((0, 10), (10, 20), (20, 32))
    stages = tuple(Stage(item.peer, item.span) for item in told)
    root = fromstring(drawn(told, 32, Route(stages, 0.5, 0.1)))
    places = {}
    for node in classes(root, "g", "peer"):
        title, circle = node.find(f"{SVG}title"), node.find(f"{SVG}circle")
        assert title is not None
        assert circle is not None
        places[(title.text or "").split(":")[0]] = (
            float(circle.get("cx", "")),
            float(circle.get("cy", "")),
        )
    curves = [node.get("d", "") for node in classes(root, "path", "arrow")]
    ends = [
        [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", d)]
        for d in curves
        if "Q" in d
    ]
    ring = [places[item.peer] for item in told]
    for (start, _, end), here, there in zip(ends, ring, [*ring[1:], ring[0]], strict=True):
        assert math.dist(start, here) < 20
        assert math.dist(end, there) < 20


def test_distance_on_paper_is_round_trip_time() -> None:
    """Three peers in a row lie in a row, and the scale bar has the length that it claims."""
    told = three((0, 10), (10, 20), (20, 32))
    root = fromstring(drawn(told, 32))
    xy = [
        (float(node.get("cx", "")), float(node.get("cy", "")))
        for group in classes(root, "g", "peer")
        for node in group.iter(f"{SVG}circle")
    ]
    step = math.dist(xy[0], xy[1])
    assert step == pytest.approx(math.dist(xy[1], xy[2]), rel=0.02)
    bar = next(node for node in classes(root, "path", "stem") if node.get("fill") == "none")
    x = [float(pair.split(",")[0]) for pair in re.findall(r"[\d.]+,[\d.]+", bar.get("d", ""))]
    label = next(line for line in words(root) if line.endswith("round trip"))
    claimed_s = float(label.split()[0]) / 1e3
    assert (x[-1] - x[0]) / claimed_s == pytest.approx(step / 0.01, rel=0.02)


def test_a_route_over_peers_that_left_is_told_and_not_drawn() -> None:
    told = three((0, 10), (10, 32))
    stages = tuple(Stage(item.peer, item.span) for item in told)
    root = fromstring(drawn(told[:1], 32, Route(stages, 0.5, 0.1)))
    assert not [node for node in classes(root, "path", "arrow") if "Q" in node.get("d", "")]
    assert any("1 peer of the ring no longer announced" in line for line in words(root))


def test_a_model_has_layers() -> None:
    with pytest.raises(UsageError):
        drawn([], 0)


def test_members_of_a_group_are_joined() -> None:
    """Each member to the leader; another epoch is another group."""
    epochs = (4, 4, 4, 5)
    told = [
        replace(item, group=GroupMembership("g", rank % 3, 3, epoch))
        for rank, (item, epoch) in enumerate(zip(three(*[(0, 32)] * 4), epochs, strict=True))
    ]
    root = fromstring(drawn(told, 32))
    joined = classes(root, "line", "member")
    assert len(joined) == 2 + 1  # one stands in the legend
    assert len({(node.get("x1"), node.get("y1")) for node in joined[:2]}) == 1


def test_holes_are_named() -> None:
    root = fromstring(drawn(three((0, 12), (16, 20), (21, 32)), 32))
    assert tips(root, "rect", "hole") == ["no peer: layers 12-15", "no peer: layer 20"]
    assert {"no peer: layers 12-15", "no peer: layer 20"} <= set(words(root))
    assert any("no peer: layers 12-15, layer 20" in line for line in words(root))


def test_a_whole_swarm_has_no_hole() -> None:
    root = fromstring(drawn(three((0, 20), (12, 32)), 32))
    assert not classes(root, "rect", "hole")
    assert "each layer is held 1 to 2 times" in words(root)


def test_who_does_not_serve_is_hollow_and_fills_no_hole() -> None:
    root = fromstring(drawn(three((0, 32), state="joining"), 32))
    assert len(classes(root, "circle", "hollow")) == 2  # the peer, and one in the legend
    assert tips(root, "rect", "hole") == ["no peer: layers 0-31"]


@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_every_peer_of_a_swarm_of_usual_size_is_there(count: int) -> None:
    told = told_of(count)
    root = fromstring(drawn(told, 80))
    seen = {tip.split(":")[0] for tip in tips(root, "g", "peer")}
    assert seen == {item.peer for item in told}
    assert len(classes(root, "g", "peer-bar")) == count


def test_dots_do_not_hide_one_another() -> None:
    root = fromstring(drawn(told_of(200), 80))
    dots = [
        (float(c.get("cx", "")), float(c.get("cy", "")), float(c.get("r", "")))
        for group in classes(root, "g", "peer")
        for c in group.iter(f"{SVG}circle")
    ]
    hidden = [
        (a, b)
        for a, b in itertools.combinations(dots, 2)
        if math.dist(a[:2], b[:2]) < 0.8 * max(a[2], b[2])
    ]
    assert not hidden


def test_a_swarm_of_ten_thousand_is_sampled_and_bounded() -> None:
    """Under 1 MB; every stage is drawn; what is drawn and what is said to be left out add up."""
    told = told_of(10_000)
    view = snapshot(told, {}, now=0.0)
    route = route_over(view, DIGEST, 80)
    assert route is not None
    picture = swarm_map(view, DIGEST, 80, route, Coordinates((0.05, 0.05, 0.0), 0.0, 0.1))
    assert len(picture.encode()) < 1_000_000
    root = fromstring(picture)
    seen = {tip.split(":")[0] for tip in tips(root, "g", "peer")}
    assert {stage.peer for stage in route.stages} <= seen
    placed = [item for item in told if item.coordinates is not None]
    shown = sum(item.peer in seen for item in placed)
    assert DOTS / 2 < shown <= DOTS + len(route.stages)
    assert f"{len(placed) - shown:,} peers not drawn" in words(root)
    assert f"{len(told) - len(placed) - (len(seen) - shown):,} more" in words(root)


def test_liars_far_away_do_not_shrink_the_map() -> None:
    """Coordinates are claims: one peer hours away stands at the edge, the others stay."""
    honest = told_of(40)
    liar = announce(
        PeerId("12D3KooWLiar"), (0, 80), 80, coordinates=Coordinates((9e3, -9e3, 5.0), 9e3, 0.0)
    )
    before, after = drawn(honest, 80), drawn([*honest, liar], 80)
    scales = [
        next(line for line in words(fromstring(p)) if "round trip" in line) for p in (before, after)
    ]
    assert scales[0] == scales[1]
    assert any(tip.endswith("beyond the map") for tip in tips(fromstring(after), "g", "peer"))


def test_a_hostile_swarm_costs_bounded_time_and_space() -> None:
    """2,000 peers, each in a region of its own, with long names."""
    rng = random.Random(3)
    told = [
        announce(
            PeerId(f"{index:05d}" + "<" * 300),
            (0, 32),
            device="&" * 500,
            model_name='"' * 5000,
            coordinates=Coordinates(
                (rng.uniform(-9e3, 9e3), rng.uniform(-9e3, 9e3), rng.uniform(-9e3, 9e3)), 1e3, 0
            ),
        )
        for index in range(2_000)
    ]
    picture = drawn(told, 32)
    fromstring(picture)
    assert len(picture.encode()) < 1_000_000


def test_order_of_announcements_does_not_matter() -> None:
    told = told_of(60)
    assert drawn(told, 80) == drawn(told[::-1], 80)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_letters_can_be_read(mode: int) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3) wherever text stands on a colour."""
    stages = [f"s{n}" for n in range(STAGE_COLOURS)]
    pairs = [
        *itertools.product(["ink", "mute", "hole", *stages], ["paper", "panel"]),
        *(("paper", stage) for stage in stages),
        *((letters_on(f"l{n}"), f"l{n}") for n in range(LOAD_STEPS)),
        ("mute", "region"),
    ]
    for letters, ground in pairs:
        light, dark = sorted(
            (luminance(COLOURS[name][mode]) for name in (letters, ground)), reverse=True
        )
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (letters, ground)


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_light_and_dark_say_the_same_colours() -> None:
    sheet = style()
    light, dark = sheet.split("@media(prefers-color-scheme:dark)")
    for name, (by_day, by_night) in COLOURS.items():
        assert f".{name}{{fill:{by_day}}}" in light
        assert f".{name}{{fill:{by_night}}}" in dark


def test_the_picture_can_be_heard() -> None:
    """Title and description stand for the picture where it is not seen."""
    root = fromstring(example())
    assert root.get("role") == "img"
    named = {node.get("id"): node.text or "" for node in root if node.get("id")}
    assert (root.get("aria-labelledby") or "").split() == list(named)
    title, description = named.values()
    assert title == "The swarm of Llama-3.1-8B-Instruct"
    assert description.startswith("24 peers, 22 serving, in 3 regions")
    assert "per token" in description


def test_labels_of_the_example_do_not_collide() -> None:
    """No two words on the map of docs/swarm-map.svg share more than a sliver."""
    boxes = []
    for node in fromstring(example()).iter(f"{SVG}text"):
        line = "".join(node.itertext())
        size = 22 if "big" in node.get("class", "") else 11
        w = 0.85 * width(line, size)
        x = float(node.get("x", "")) - {"middle": w / 2, "end": w}.get(
            node.get("text-anchor", ""), 0
        )
        boxes.append((Box(x, float(node.get("y", "")) - size, w, size), line))
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert one.shared(other) < 12, (a, b)


def test_the_picture_in_the_documents_is_this_one() -> None:
    """Same marks and words; places may differ in the last digit between machines."""
    file = Path(__file__).parents[2] / "docs" / "swarm-map.svg"
    kept = file.read_text(encoding="utf-8")
    assert len(kept.encode()) < 60_000
    there, here = fromstring(kept), fromstring(example())
    assert [n.tag for n in there.iter()] == [n.tag for n in here.iter()]
    assert words(there) == words(here)
    assert tips(there, "g", "peer") == tips(here, "g", "peer")


if __name__ == "__main__":
    sys.stdout.write(example())
