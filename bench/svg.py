"""Just enough SVG for charts: elements, scales with round ticks, axes. Standard library only.

Colours and fonts are the page's business: everything carries a CSS class instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape


def element(name: str, *children: str, **attributes: object) -> str:
    """One element; `class_` is `class`, other underscores are hyphens, children are markup."""
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    text = "".join(f' {key}="{_attribute(value)}"' for key, value in pairs if value is not None)
    return f"<{name}{text}>{''.join(children)}</{name}>" if children else f"<{name}{text}/>"


def _attribute(value: object) -> str:
    return (
        f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value))
    )


def text(x: float, y: float, words: str, **attributes: object) -> str:
    return element("text", escape(words), x=x, y=y, **attributes)


def rectangle(x: float, y: float, width: float, height: float, *more: str, **attrs: object) -> str:
    return element("rect", *more, x=x, y=y, width=max(0.0, width), height=max(0.0, height), **attrs)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def title(words: str) -> str:
    """What a browser shows while the pointer rests on the enclosing element."""
    return element("title", escape(words))


def image(width: float, height: float, label: str, *children: str) -> str:
    """The `<svg>` itself: scales to its container, and says what it shows to screen readers."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        xmlns="http://www.w3.org/2000/svg",
    )


# --- scales -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values `low..high` to pixels `start..stop`, linearly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low / 1e6))
        share = (at - low) / (high - low) if high > low else 0.0
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """About `count` round values inside the scale."""
        return self._log_ticks(count) if self.is_log else self._linear_ticks(count)

    def _linear_ticks(self, count: int) -> list[float]:
        step = _round_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [d * 10.0**e for e in range(low, high + 1) for d in digits]
            inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(inside) <= count + 2:
                break
        return inside


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)


def tick_text(value: float) -> str:
    """A tick's label: `0.5`, `20`, `1.5k`."""
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


# --- axes ---------------------------------------------------------------------------------------

Label = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Frame:
    """The plot area of a chart, in pixels from the top left corner of the image."""

    left: float
    top: float
    right: float
    bottom: float

    def x_axis(
        self,
        scale: Scale,
        label: str,
        ticks: Sequence[float] | None = None,
        show: Label = tick_text,
    ) -> str:
        """Ticks and their labels below the frame, and what is measured, with its unit."""
        marks = [
            line(scale(t), self.top, scale(t), self.bottom, class_="grid")
            + text(scale(t), self.bottom + 18, show(t), class_="tick", text_anchor="middle")
            for t in (scale.ticks() if ticks is None else ticks)
        ]
        middle = (self.left + self.right) / 2
        words = text(middle, self.bottom + 38, label, class_="axis", text_anchor="middle")
        base = line(self.left, self.bottom, self.right, self.bottom, class_="base")
        return "".join([*marks, base, words])

    def y_axis(
        self,
        scale: Scale,
        label: str,
        ticks: Sequence[float] | None = None,
        show: Label = tick_text,
    ) -> str:
        """Grid lines across the frame with labels on the left; the name of the axis above."""
        marks = [
            line(self.left, scale(t), self.right, scale(t), class_="grid")
            + text(self.left - 8, scale(t) + 4, show(t), class_="tick", text_anchor="end")
            for t in (scale.ticks() if ticks is None else ticks)
        ]
        return "".join([*marks, text(self.left - 34, self.top - 14, label, class_="axis")])
