"""Plots as inline SVG: points and lines on two axes, in plain text, for pages without scripts.

    scatter([Series("int8", [(1.0, 2.0)])], title="...", x="bytes", y="KL")

Axes are linear or logarithmic; every point tells its label when the
pointer rests on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 150, 30, 46
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
      name: in the legend.
      points: (x, y) of each; those that an axis can't show (0 on a logarithmic one) are left out.
      labels: of the points, shown beside them where `named`, else under the pointer.
      line: joins the points in their order.
      low_high: ends of the y interval of each point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    line: bool = False
    named: bool = False
    low_high: Sequence[tuple[float, float]] = ()


class _Axis:
    """Numbers to pixels along one direction."""

    def __init__(self, values: Sequence[float], *, begin: float, end: float, log: bool):
        self._log = log
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        elif 0 < low < 0.5 * high:
            low = 0.0
        spare = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.low = low if low == 0 and not log else low - spare
        self.high, self._begin, self._end = high + spare, begin, end

    def place(self, value: float) -> float:
        value = math.log10(value) if self._log else value
        share = (value - self.low) / (self.high - self.low)
        return self._begin + share * (self._end - self._begin)

    def ticks(self) -> list[float]:
        if self._log:
            whole = [10.0**k for k in range(math.ceil(self.low), math.floor(self.high) + 1)]
            if len(whole) >= 2:
                return whole
            fine = [m * 10.0**k for k in range(math.floor(self.low), math.ceil(self.high) + 1)
                    for m in (1, 2, 3, 5, 7)]  # fmt: skip
            return [t for t in fine if self.low <= math.log10(t) <= self.high]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def scatter(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    log_y: bool = False,
    from_zero: bool = False,
) -> str:
    """An <svg> with a legend to its right. `x` and `y` name the axes; they may begin
    at 0 where they aren't logarithmic.
    """
    shown = [_shown(s, log_y=log_y) for s in series]
    xs = [p[0] for s in shown for p in s.points]
    ys = [p[1] for s in shown for p in s.points]
    ys += [end for s in shown for pair in s.low_high for end in pair if end > 0 or not log_y]
    if from_zero:
        xs, ys = [0.0, *xs], ys if log_y else [0.0, *ys]
    across = _Axis(xs, begin=_LEFT, end=_WIDTH - _RIGHT, log=False)
    up = _Axis(ys, begin=_HEIGHT - _BOTTOM, end=_TOP, log=log_y)
    parts = [_frame(across, up, title=title, x=x, y=y)]
    for number, one in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_drawn(one, across, up, colour=colour, log_y=log_y))
        at = _TOP + 10 + 18 * number
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 16}" cy="{at - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(_WIDTH - _RIGHT + 26, at, one.name))
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" role="img"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg>'


def _shown(series: Series, *, log_y: bool) -> Series:
    keep = [
        i
        for i, (x, y) in enumerate(series.points)
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)
    ]

    def kept(values: Sequence) -> list:
        return [values[i] for i in keep] if values else []

    return dataclasses.replace(
        series,
        points=kept(series.points),
        labels=kept(series.labels),
        low_high=kept(series.low_high),
    )


def _frame(across: _Axis, up: _Axis, *, title: str, x: str, y: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [_text(_LEFT, 16, title, weight="bold")]
    for tick in across.ticks():
        at = across.place(tick)
        parts.append(f'<path d="M{at:.1f} {_TOP}V{bottom}" stroke="#e5e7eb"/>')
        parts.append(_text(at, bottom + 16, _number(tick), anchor="middle"))
    for tick in up.ticks():
        at = up.place(tick)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="#e5e7eb"/>')
        parts.append(_text(_LEFT - 6, at + 4, _number(tick), anchor="end"))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" stroke="#374151" fill="none"/>')
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 8, x, anchor="middle"))
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(_text(14, middle, y, anchor="middle", extra=turned))
    return "".join(parts)


def _drawn(series: Series, across: _Axis, up: _Axis, *, colour: str, log_y: bool) -> str:
    places = [(across.place(x), up.place(y)) for x, y in series.points]
    parts = []
    if series.line and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
    for (x, _), (low, high) in zip(places, series.low_high, strict=False):
        if low > 0 or not log_y:
            ends = f"M{x:.1f} {up.place(low):.1f}V{up.place(high):.1f}"
            parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="1.5"/>')
    labels = series.labels or [series.name] * len(places)
    for (x, y), label, point in zip(places, labels, series.points, strict=True):
        told = escape(f"{label}: {_number(point[0])}, {_number(point[1])}")
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
        parts.append(f"{circle}<title>{told}</title></circle>")
        if series.named:
            late = x > _LEFT + 0.7 * (_WIDTH - _LEFT - _RIGHT)
            parts.append(
                _text(x - 6 if late else x + 6, y - 5, label, anchor="end" if late else "start")
            )
    return "".join(parts)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", extra: str = ""
) -> str:
    look = f'font-size="11" text-anchor="{anchor}" font-weight="{weight}" fill="#111827"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look} {extra}>{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.3g}"
