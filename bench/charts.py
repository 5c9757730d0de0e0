"""Charts that more than one report draws: curves, bars and Gantt rows, as inline SVG.

Colours come from the page's CSS classes (`p0` to `p8`, `bench.report.STYLE`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench import svg
from bench.common import format_number
from bench.svg import Frame, Scale

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """A named row of values: (x, y) for curves; for bars x is the number of the group.

    Of curves `has_line` and `has_dots` say what is drawn.
    """

    name: str
    css: str
    points: Points
    has_line: bool = True
    has_dots: bool = True


def lines(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    levels: Mapping[str, float] | None = None,
    is_log_x: bool = False,
    is_log_y: bool = False,
    width: float = 470.0,
    height: float = 300.0,
) -> str:
    """One curve per series; `levels` are dashed lines across, by name. Empty without points."""
    known = [point for one in series for point in one.points if _is_drawable(point, is_log_y)]
    if not known:
        return ""
    shown = {k: v for k, v in (levels or {}).items() if v <= 1.2 * max(y for _, y in known)}
    frame = Frame(56, 46, width - 14, height - 50)
    x = _scale([x for x, _ in known], frame.left, frame.right, is_log_x)
    ys = [*(y for _, y in known), *shown.values()]
    y = _scale(ys if is_log_y else [0.0, *ys], frame.bottom, frame.top, is_log_y)
    return svg.image(
        width,
        height,
        f"{title}: {y_label} by {x_label}",
        svg.text(frame.left - 34, 14, title, class_="heading"),
        frame.x_axis(x, x_label, x.ticks(5)),
        frame.y_axis(y, y_label, y.ticks(5)),
        *(_level(frame, y, name, value) for name, value in shown.items()),
        *(_curve(one, x, y) for one in series),
    )


def _is_drawable(point: tuple[float, float], is_log_y: bool) -> bool:
    return math.isfinite(point[1]) and (point[1] > 0 or not is_log_y)


def _scale(values: Sequence[float], start: float, stop: float, is_log: bool) -> Scale:
    low, high = min(values), max(values)
    if is_log:
        return Scale(low / 1.1, high * 1.1, start, stop, is_log=True)
    return Scale(low, high * 1.05 if high > 0 else 1.0, start, stop)


def _level(frame: Frame, y: Scale, name: str, value: float) -> str:
    return svg.line(
        frame.left, y(value), frame.right, y(value), class_="level"
    ) + svg.text(frame.right, y(value) - 4, name, class_="tick", text_anchor="end")  # fmt: skip


def _curve(series: Series, x: Scale, y: Scale) -> str:
    points = [p for p in series.points if _is_drawable(p, y.is_log)]
    if not points:
        return ""
    path = "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in points)
    dots = [
        svg.element(
            "circle",
            svg.title(f"{series.name}: {format_number(py)} at {format_number(px)}"),
            cx=x(px),
            cy=y(py),
            r=2.6,
            class_=series.css,
        )
        for px, py in points
    ]
    curve = svg.element("path", svg.title(series.name), d=f"M{path}", class_=f"curve {series.css}")
    return (curve if series.has_line else "") + ("".join(dots) if series.has_dots else "")


def bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    y_label: str,
    *,
    is_log_y: bool = False,
    width: float = 470.0,
    height: float = 300.0,
) -> str:
    """Bars side by side in named groups, each with its value. Empty without values."""
    known = [y for one in series for _, y in one.points if y > 0 or not is_log_y]
    if not known:
        return ""
    frame = Frame(56, 46, width - 10, height - 40)
    low = min(known) / 1.5 if is_log_y else 0.0
    high = max(known) * 1.12 or 1.0
    y = Scale(low, high, frame.bottom, frame.top, is_log=is_log_y)
    pitch = (frame.right - frame.left) / len(groups)
    wide = min(56.0, pitch * 0.8 / len(series))
    drawn = []
    for i, one in enumerate(series):
        for group, value in one.points:
            middle = frame.left + (group + 0.5) * pitch
            left = middle + (i - len(series) / 2) * wide
            drawn.append(_bar(left, wide, y, low, value, one, groups[int(group)]))
    names = [
        svg.text(
            frame.left + (g + 0.5) * pitch, frame.bottom + 20, name,
            class_="tick", text_anchor="middle",
        )
        for g, name in enumerate(groups)
    ]  # fmt: skip
    return svg.image(
        width,
        height,
        f"{title}: {y_label}",
        svg.text(frame.left - 34, 14, title, class_="heading"),
        frame.y_axis(y, y_label, y.ticks(5)),
        *drawn,
        *names,
    )


def _bar(
    left: float, width: float, y: Scale, low: float, value: float, series: Series, group: str
) -> str:
    top, bottom = sorted((y(max(value, low)), y(low)))
    tip = svg.title(f"{series.name}, {group}: {format_number(value)}")
    bar = svg.rectangle(left + 1, top, width - 2, bottom - top, tip, class_=series.css, rx=2)
    words = format_number(value) if width >= 24 else ""
    label = svg.text(left + width / 2, top - 4, words, class_="value", text_anchor="middle")
    return bar + label


@dataclass(frozen=True, slots=True)
class Block:
    """Time `start` to `stop` of one row of a Gantt chart; `words` are shown inside it."""

    row: int
    start: float
    stop: float
    css: str
    words: str = ""


def gantt(
    title: str, rows: Sequence[str], blocks: Sequence[Block], end: float, x_label: str
) -> str:
    """Rows of blocks over time, `end` being the right edge."""
    width, row_height = 470.0, 26.0
    frame = Frame(40, 30, width - 14, 30 + row_height * len(rows))
    x = Scale(0, end, frame.left, frame.right)
    names = [
        svg.text(frame.left - 10, frame.top + (i + 0.66) * row_height, name, class_="group",
                 text_anchor="end")
        for i, name in enumerate(rows)
    ]  # fmt: skip
    return svg.image(
        width,
        frame.bottom + 46,
        title,
        svg.text(6, 14, title, class_="heading"),
        frame.x_axis(x, x_label),
        *(_block(block, x, frame, row_height) for block in blocks),
        *names,
    )


def _block(block: Block, x: Scale, frame: Frame, row_height: float) -> str:
    left, right = x(block.start), x(block.stop)
    top = frame.top + block.row * row_height
    tip = svg.title(f"{block.words} {block.start:g} to {block.stop:g}".strip())
    box = svg.rectangle(
        left, top + 3, right - left - 1, row_height - 6, tip, class_=block.css, rx=2
    )
    middle = (left + right) / 2
    return box + svg.text(middle, top + 18, block.words, class_="inside", text_anchor="middle")
