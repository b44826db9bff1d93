"""A client's view out of its plain form, and the same at the speeds that peers really had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from hexswarm.records import Announcement, Coordinates, Link, ModelSpec, PeerId, Span, Speed
from hexswarm.router.network import Snapshot, snapshot


def read_view(said: Mapping[str, Any]) -> Snapshot:
    """The reverse of `Snapshot.to_json`, with the client's id beside it."""
    links = {
        (PeerId(way["a"]), PeerId(way["b"])): Link(
            way["rtt_s"], way["bytes_per_s"] or float("inf"), way["jitter_s"], way["relayed"]
        )
        for way in said["links"]
    }
    words = map(_word, said["peers"])
    return snapshot(words, links, said["taken_s"], client=said["client"])


def paced(view: Snapshot, ratios: Mapping[PeerId, float], usual: float) -> Snapshot:
    """The same peers at other speeds: times their ratio, or the usual one."""
    words = []
    for word in view.announcements:
        ratio = ratios.get(word.peer, usual)
        speed = Speed(**{name: ratio * value for name, value in asdict(word.speed).items()})
        words.append(replace(word, speed=speed))
    return snapshot(words, view.links, view.taken_s, client=view.client)


def _word(said: Mapping[str, Any]) -> Announcement:
    left = ("serving", "group", "offer")
    facts = {name: value for name, value in said.items() if name not in left}
    place = facts["coordinates"]
    return Announcement(
        **{
            **facts,
            "span": Span(*facts["span"]),
            "speed": Speed(**facts["speed"]),
            "addresses": tuple(facts["addresses"]),
            "neighbours": tuple((peer, rtt_s) for peer, rtt_s in facts["neighbours"]),
            "coordinates": place
            and Coordinates(**{**place, "position_s": tuple(place["position_s"])}),
        }
    )


def paces(
    view: Snapshot, spec: ModelSpec, answers: Sequence[Mapping[str, Any]]
) -> dict[PeerId, float]:
    """How much longer the batches of each peer took than it had announced."""
    took_s: dict[PeerId, float] = {}
    said_s: dict[PeerId, float] = {}
    for hop in [hop for answer in answers for hop in answer["trace"]["hops"]]:
        if hop["measured"] is None:
            continue
        first, end = hop["span"]
        speed = view.announcement(spec.digest, hop["peer"]).speed
        layer_s = speed.decode_layer_s + max(0.0, hop["rows"] - 1) * speed.row_layer_s
        expected_s = (end - first) * layer_s + (speed.head_s if end == spec.layers else 0.0)
        took_s[hop["peer"]] = took_s.get(hop["peer"], 0.0) + hop["measured"]["compute_s"]
        said_s[hop["peer"]] = said_s.get(hop["peer"], 0.0) + expected_s
    return {peer: took_s[peer] / said_s[peer] for peer in took_s}
