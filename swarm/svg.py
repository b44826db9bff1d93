"""Writing SVG: elements, numbers, and text that came from strangers.

A drawing here is a list of strings that `document` joins. Whatever text goes in was announced by
somebody unknown, therefore there is one way in, `element`, and it makes text harmless: markup is
escaped, and characters that are no text (controls, which XML forbids and terminals obey; marks
that turn the direction of writing; halves of surrogate pairs) become U+FFFD.

Numbers have one decimal: a tenth of a pixel is less than anybody sees, it halves the file, and
the last bits of a float, which differ between machines, do not show.

Colours are classes and not attributes, so that one `<style>` says them twice, for light and dark.
Rejected: CSS variables, which halve that sheet and which converters outside browsers (librsvg,
cairosvg) do not know; xml.etree, which escapes markup and lets control characters through.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable

Point = tuple[float, float]


def number(value: float) -> str:
    """A coordinate with at most one decimal."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def harmless(text: str, most: int = 80) -> str:
    """`text` without characters that are none, shortened to `most`."""
    short = text if len(text) <= most else text[: most - 1] + "…"
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in short)


def escape(text: str) -> str:
    """Text as it may stand in an element or between quotation marks."""
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(raw, safe)
    return text.replace("'", "&#39;")


def element(name: str, *content: str, tip: str = "", **attributes: float | str) -> str:
    """One element; `content` is finished SVG, `tip` is text that shows under the mouse.

    `class_` stands for class, and an underscore in a name for a hyphen.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value != ""
    )
    inner = [f"<title>{escape(harmless(tip, 300))}</title>"] if tip else []
    inner += content
    return f"<{name}{said}>{''.join(inner)}</{name}>" if inner else f"<{name}{said}/>"


def _value(value: float | str) -> str:
    return escape(harmless(value, 1 << 20)) if isinstance(value, str) else number(value)


def text(at: Point, words: str, class_: str = "", anchor: str = "") -> str:
    """One line of text; `anchor` is middle or end, start if empty."""
    x, y = at
    said = escape(harmless(words, 200))
    return element("text", said, x=x, y=y, class_=class_, text_anchor=anchor)


def path(points: Iterable[Point], *, closed: bool = False) -> str:
    """The `d` of straight lines through the points."""
    steps = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f"M{steps}{'Z' if closed else ''}"


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def width(words: str, size: float) -> float:
    """About how wide a line of text is in a sans-serif font of `size`, rather too much."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in words)
    return size * (0.58 * (len(words) - wide) + wide)


def fit(words: str, size: float, room: float) -> str:
    """As much of the words as fits into `room`, or nothing if that would say nothing."""
    if width(words, size) <= room:
        return words
    short = words[: max(0, int(room / size / 0.58) - 1)]
    while short and width(short + "…", size) > room:
        short = short[:-1]
    return f"{short}…" if len(short) >= 3 else ""


def milliseconds(seconds: float) -> str:
    """A time for people: "0.4 ms", "12 ms", "1.3 s"."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 9.95 or ms == 0 else f"{ms:.1f} ms"


def document(size: Point, title: str, description: str, style: str, parts: Iterable[str]) -> str:
    """A whole file: nothing in it is fetched from elsewhere or runs."""
    w, h = size
    body = "\n".join(part for part in parts if part)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(w)} {number(h)}" '
        f'width="{number(w)}" height="{number(h)}" role="img" '
        'aria-labelledby="swarm-title swarm-description">\n'
        f'<title id="swarm-title">{escape(harmless(title, 200))}</title>\n'
        f'<desc id="swarm-description">{escape(harmless(description, 600))}</desc>\n'
        f"<style>{style}</style>\n{body}\n</svg>\n"
    )
