"""A line chart as one SVG file: axes with ticks, a legend, a title and a description that a screen reader finds.

It is markup alone, without scripts, fonts or addresses, so it may stand in a page, a README or by itself, on light and
on dark. Curves differ in colour, in dashes and in the shape of their points. Names are taken as hostile. It knows
nothing about what it draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 420  # of the chart without its legend
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 44, 58
_LEGEND = 20  # a line of it
_LABEL = 84  # the longest label that is shown whole

# Hues that differ for every kind of colour vision (Okabe & Ito 2008), none too light or too dark for either background
_COLOURS = ("#0a7cc4", "#d55e00", "#009e73", "#c4629f", "#8a7d00", "#7a6ff0")
_DASHES = ("", "7 4", "2 4", "10 4 2 4", "14 5", "5 2 1 2")
_MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",  # a circle
    "M-4-4H4V4H-4Z",
    "M0-5.5 5.5 0 0 5.5-5.5 0Z",
    "M0-5 5 4H-5Z",
    "M0 5-5-4H5Z",
    "M-5-1.5H-1.5V-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5Z",
)
_STYLE = (
    ".chart{font:13px system-ui,sans-serif;color:#333}"
    ".chart text{fill:currentColor}.chart .title{font-size:16px;font-weight:600}"
    ".chart .axis{stroke:currentColor;fill:none}.chart .grid{stroke:currentColor;stroke-opacity:.18}"
    ".chart .line{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){.chart{color:#ddd}}"
)


@dataclass(frozen=True)
class Line:
    """A curve: `points` (x, y), finite, every y above zero. They are joined in the order of x; one alone is a mark."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    """Where values lie on the picture: `low` at pixel `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def draw(lines: Sequence[Line], *, title: str, description: str, x_label: str, y_label: str) -> str:
    """The chart of `lines`, x linear and y logarithmic. Raises ValueError where there is nothing that can be drawn."""
    points = [point for line in lines for point in line.points]
    if not points or not all(math.isfinite(x) and math.isfinite(y) and y > 0 for x, y in points):
        raise ValueError("a chart needs points that are finite, with y above 0")
    x = Axis(*_around([x for x, _ in points]), _LEFT, WIDTH - _RIGHT)
    y = Axis(*_beyond([y for _, y in points]), HEIGHT - _BOTTOM, _TOP, logarithmic=True)
    height = HEIGHT + _LEGEND * len(lines) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-labelledby="chart-title chart-description">',
        f'<title id="chart-title">{_safe(title)}</title>',
        f'<desc id="chart-description">{_safe(description)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="24">{_safe(_short(title))}</text>',
        *_axes(x, y, x_label, y_label),
    ]
    for index, line in enumerate(lines):
        parts += _curve(index, line, x, y)
        parts += _entry(index, line, HEIGHT + 8 + _LEGEND * index)
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`, evenly spaced."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis: as few to each decade as leave four at least."""
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 4:
            return found[:: -(-len(found) // 10)]
    return ticks(low, high, 6)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The range of a linear axis: a little more than the values'."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _beyond(values: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis."""
    low, high = min(values), max(values)
    room = max(math.exp(0.06 * (math.log(high) - math.log(low))), 1.05)
    return low / room, min(high * room, 1e307)


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    bottom, middle = y.start, (y.start + y.stop) / 2
    parts = []
    for value in ticks(x.low, x.high):
        at = x.at(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v6"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 22}" text-anchor="middle">{_number(value)}</text>')
    for value in log_ticks(y.low, y.high):
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<path class="axis" d="M{_LEFT - 6} {at:.1f}h6"/>')
        parts.append(f'<text x="{_LEFT - 10}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    return [
        *parts,
        f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>',
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{bottom + 44}" text-anchor="middle">{_safe(x_label)}</text>',
        f'<text transform="translate(20 {middle}) rotate(-90)" text-anchor="middle">{_safe(y_label)}</text>',
    ]


def _curve(index: int, line: Line, x: Axis, y: Axis) -> list[str]:
    points = sorted(line.points)
    placed = [(x.at(px), y.at(py)) for px, py in points]
    parts = [f"<g><title>{_safe(line.label)}</title>"]
    if len(placed) > 1:
        parts.append(f'<path class="line" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in placed)}"{_stroke(index)}/>')
    for (value, height), (px, py) in zip(points, placed, strict=True):
        parts.append(_mark(index, px, py, f"<title>{_number(value)}: {_number(height)}</title>"))
    return [*parts, "</g>"]


def _entry(index: int, line: Line, top: float) -> list[str]:
    """A line of the legend."""
    parts = [f'<path class="line" d="M{_LEFT} {top}h40"{_stroke(index)}/>'] if len(line.points) > 1 else []
    label = f'<text x="{_LEFT + 52}" y="{top + 4}">{_safe(_short(line.label))}</text>'
    return [*parts, _mark(index, _LEFT + 20, top), label]


def _stroke(index: int) -> str:
    dashes = _DASHES[index % len(_DASHES)]
    return f' stroke="{_COLOURS[index % len(_COLOURS)]}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _mark(index: int, x: float, y: float, inside: str = "") -> str:
    # Beyond six, shapes and colours come in other pairs
    shape = _MARKS[(index + index // len(_COLOURS)) % len(_MARKS)]
    colour = _COLOURS[index % len(_COLOURS)]
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shape}" fill="{colour}">{inside}</path>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def _safe(text: str) -> str:
    """As it may stand in XML, which knows no control characters even escaped."""
    return escape("".join(character if character.isprintable() else "?" for character in text))
