"""Small SVG charts without a library: lines, stacked bars and bars side by side. Colours come from the page's style.

A chart is an ElementTree, so every text in it is escaped. Series differ by colour, dash and marker together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 24, 40
NUM_STYLES = 6
OTHERS = NUM_STYLES  # the grey style without markers, for curves beyond the styles that can be told apart
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "12 4", "")
MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4l4 7h-8z",
    "M0 -4.5l4 4.5l-4 4.5l-4 -4.5z",
    "M-3 -3l6 6m0 -6l-6 6",
    "M0 4l4 -7h-8z",
)

Range = tuple[float, float]
Place = Callable[[float, float], tuple[float, float]]  # from data to places in the drawing


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points in order of x, drawn in the style of that number."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int


@dataclass(frozen=True)
class Bars:
    """One bar a place, in the style of that number. ``spreads`` is how far each may be off, up and down."""

    label: str
    heights: Sequence[float]
    style: int
    spreads: Sequence[float] = ()


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    x_label: str = "round",
    target: tuple[str, float] | None = None,
) -> str:
    """Lines over rounds, from y = 0 on unless a value is negative; ``target`` a labelled level drawn across."""
    values = [y for one in series for _, y in one.points] + ([target[1]] if target else [])
    first = min(x for one in series for x, _ in one.points)
    last = max(x for one in series for x, _ in one.points)
    svg, place = _axes((first, max(last, first + 1)), (min(0.0, *values), max(values)), title, (x_label, y_label))
    if target:
        _, y = place(first, target[1])
        _across(svg, y, "target")
        _text(svg, LEFT + 6, y - 5, target[0], "target-label", "start")
    for one in sorted(series, key=lambda one: -one.style):
        places = [place(x, y) for x, y in one.points]
        line = {"class": f"line s{one.style}", "points": " ".join(f"{x},{y}" for x, y in places)}
        SubElement(svg, "polyline", line | {"stroke-dasharray": DASHES[one.style]})
        every = max(1, math.ceil(len(places) / 14))
        for x, y in places[::-1][::every] if one.style != OTHERS else ():
            _mark(svg, x, y, one.style)
    return _with_legend(svg, [(one.label, one.style) for one in series if one.label])


def stacked_bars(
    bars: Sequence[tuple[float, Sequence[float]]], labels: Sequence[str], *, title: str, y_label: str
) -> str:
    """Bars over rounds: (x, parts from the bottom up), parts in the order of ``labels``."""
    xs = [x for x, _ in bars]
    gap = (xs[1] - xs[0]) if len(xs) > 1 else 1.0
    highest = max(sum(parts) for _, parts in bars)
    svg, place = _axes((xs[0] - gap / 2, xs[-1] + gap / 2), (0.0, highest), title, ("round", y_label))
    for x, parts in bars:
        below = 0.0
        (left, _), (right, _) = place(x - 0.4 * gap, 0), place(x + 0.4 * gap, 0)
        for style, part in enumerate(parts):
            bottom, top = place(x, below)[1], place(x, below + part)[1]
            box = {"x": left, "y": top, "width": round(right - left, 1), "height": round(bottom - top, 1)}
            SubElement(svg, "rect", {"class": f"bar s{style}", **{key: f"{value}" for key, value in box.items()}})
            below += part
    return _with_legend(svg, [(label, -1 - style) for style, label in enumerate(labels)])


def side_by_side(
    bars: Sequence[Bars], places: Sequence[str], *, title: str, labels: tuple[str, str], narrow: bool = False
) -> str:
    """Bars beside each other at every place, with lines as far as each may be off.

    Args:
        bars: as many heights each as there are places; a height can be below 0.
        places: what stands below each; "" for nothing.
        title: for those who hear the page.
        labels: of the horizontal and of the vertical axis.
        narrow: leave the places of a histogram no gap.
    """
    ends = [end for one in bars for height, spread in _spread(one) for end in (height - spread, height + spread)]
    names = {float(number): name for number, name in enumerate(places) if name}
    svg, place = _axes((-0.5, len(places) - 0.5), (min(0.0, *ends), max(0.0, *ends)), title, labels, names)
    room = 0.98 if narrow else 0.8
    _, floor = place(0, 0.0)
    for index, one in enumerate(bars):
        for number, (height, spread) in enumerate(_spread(one)):
            left = number - room / 2 + index * room / len(bars)
            (x, top), (right, _) = place(left, height), place(left + room / len(bars), height)
            box = {"x": x, "y": min(top, floor), "width": max(0.0, right - x - 0.5), "height": abs(floor - top)}
            SubElement(svg, "rect", {"class": f"bar s{one.style}", **{key: f"{v:.1f}" for key, v in box.items()}})
            if spread:
                middle = f"{(x + right) / 2:.1f}"
                low, high = (place(left, end)[1] for end in (height - spread, height + spread))
                line = {"x1": middle, "x2": middle, "y1": f"{low}", "y2": f"{high}"}
                SubElement(svg, "line", {"class": "spread", **line})
    _across(svg, floor, "floor")
    return _with_legend(svg, [(one.label, -1 - one.style) for one in bars if one.label])


def _spread(bars: Bars) -> list[tuple[float, float]]:
    return list(zip(bars.heights, bars.spreads or [0.0] * len(bars.heights), strict=True))


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most ``most`` + 1 round numbers that span [low, high]: 1, 2 or 5 times a power of ten apart."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most)
    step = max(1.0, step) if whole else step
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _axes(
    x_range: Range, y_range: Range, title: str, labels: tuple[str, str], names: Mapping[float, str] | None = None
) -> tuple[Element, Place]:
    """An empty chart with its axes, and where data lie in it; whole numbers below it, or ``names`` at places."""
    (x_low, x_high), (y_low, y_high) = x_range, y_range
    y_high = y_low + 1.12 * ((y_high - y_low) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    svg = Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title})
    for value in ticks(y_low, y_high, 5):
        _, y = place(x_low, value)
        _across(svg, y, "grid")
        _text(svg, LEFT - 6, y + 4, f"{value:g}", "tick", "end")
    for value, name in (names or {each: f"{each:g}" for each in ticks(x_low, x_high, 8, whole=True)}).items():
        _text(svg, place(value, y_low)[0], HEIGHT - BOTTOM + 17, name, "tick", "middle")
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, labels[0], "tick", "middle")
    _text(svg, 4, 13, labels[1], "tick", "start")
    return svg, place


def _across(svg: Element, y: float, kind: str) -> None:
    SubElement(svg, "line", {"class": kind, "x1": f"{LEFT}", "x2": f"{WIDTH - RIGHT}", "y1": f"{y}", "y2": f"{y}"})


def _mark(parent: Element, x: float, y: float, style: int) -> None:
    SubElement(parent, "path", {"class": f"mark s{style}", "d": MARKERS[style], "transform": f"translate({x} {y})"})


def _text(parent: Element, x: float, y: float, text: str, kind: str, anchor: str) -> None:
    SubElement(parent, "text", {"x": f"{x}", "y": f"{y}", "class": kind, "text-anchor": anchor}).text = text


def _with_legend(svg: Element, entries: Sequence[tuple[str, int]]) -> str:
    """The chart with its legend below, as HTML text. A negative number is a bar's style, counted from -1."""
    legend = Element("ul", {"class": "legend"})
    for label, style in entries:
        item = SubElement(legend, "li")
        key = SubElement(item, "svg", {"viewBox": "0 0 34 12", "class": "key", "aria-hidden": "true"})
        if style < 0:
            SubElement(key, "rect", {"class": f"bar s{-1 - style}", "x": "11", "width": "12", "height": "12"})
        else:
            dashes = {"stroke-dasharray": DASHES[style]}
            SubElement(key, "polyline", {"class": f"line s{style}", "points": "0,6 34,6"} | dashes)
            if style != OTHERS:
                _mark(key, 17, 6, style)
        SubElement(item, "span").text = label
    return ElementTree.tostring(svg, "unicode") + ElementTree.tostring(legend, "unicode")
