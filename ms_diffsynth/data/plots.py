"""Curves of a run as images, drawn with Pillow alone."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import DataError

_SIZE = 800, 480
_BOX = 78, 64, 772, 420  # left, top, right, bottom of the plotting area
_FINE = 3  # everything is drawn three times as large and scaled down, which smooths lines and letters
_INK, _GRAY, _GRID, _RAW, _STRONG = "#222222", "#6b7280", "#e5e7eb", "#aac6f0", "#1d4ed8"
_PALE = "#e4eefb"


def loss_curve(
    steps: Sequence[float], losses: Sequence[float], title: str = "Loss", smoothing: float | None = None
) -> Image.Image:
    """A line chart of a loss over steps: as it was (pale) and smoothed (strong).

    The smoothed line is an exponential average, corrected for its start; ``smoothing`` in [0, 1) is the share kept at
    each point, by default so that it looks back over a twentieth of the points. Points that are not finite are left
    out. The scale shows the whole smoothed line and 98 % of the raw points; what is beyond lies on the border.

    Returns: an RGB image of 800x480 pixels.
    """
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if steps.shape != losses.shape or steps.ndim != 1:
        raise DataError(f"{steps.shape} steps and {losses.shape} losses were given; expected two lists of equal length")
    good = np.isfinite(losses) & np.isfinite(steps)
    if not good.any():
        raise DataError(f"none of {losses.size} losses is finite; expected at least one number. Nothing can be drawn")
    steps, losses = steps[good], losses[good]
    smooth = _smoothed(losses, 1 - 1 / max(1.0, losses.size / 20) if smoothing is None else smoothing)
    lows, highs = np.percentile(losses, [1, 99])
    sheet, draw, to_x, to_y = _axes(steps, min(lows, smooth.min()), max(highs, smooth.max()))
    _draw_legend(draw, title, (("smoothed", _STRONG), ("each point", _RAW)))
    for values, colour, width in ((losses, _RAW, 1), (smooth, _STRONG, 2)):
        _draw_line(draw, to_x(steps), to_y(values), colour, width)
    return sheet.resize(_SIZE, Image.Resampling.LANCZOS)


def kid_curve(rows: Sequence[Mapping[str, float]], title: str = "KID") -> Image.Image:
    """A line chart of a kernel inception distance over steps, with its interval and the floor of real images.

    Args:
        rows: with the keys ``step``, ``kid``, ``kid_low``, ``kid_high`` and ``kid_floor``; at least one.

    Returns: an RGB image of 800x480 pixels.
    """
    steps, kid, low, high, floor = (np.array([row[key] for row in rows], np.float64)
                                    for key in ("step", "kid", "kid_low", "kid_high", "kid_floor"))
    sheet, draw, to_x, to_y = _axes(steps, min(low.min(), 0.0), max(high.max(), floor.max()))
    _draw_legend(draw, title, (("KID", _STRONG), ("95 % interval", _RAW), ("real images", _GRAY)))
    x = to_x(steps)
    draw.polygon([*zip(x, to_y(low)), *zip(x[::-1], to_y(high)[::-1])], fill=_PALE)
    for edge in (low, high):
        _draw_line(draw, x, to_y(edge), _RAW, 1)
    _draw_line(draw, x, to_y(floor), _GRAY, 1)
    _draw_line(draw, x, to_y(kid), _STRONG, 2)
    return sheet.resize(_SIZE, Image.Resampling.LANCZOS)


_Scale = Callable[[np.ndarray], np.ndarray]


def _axes(steps: np.ndarray, low: float, high: float) -> tuple[Image.Image, ImageDraw.ImageDraw, _Scale, _Scale]:
    """A sheet with axes for steps and for values from low to high, and how these become its pixels."""
    y_ticks = nice_ticks(low, high, 6)
    lone = float(steps.min() == steps.max())
    x_range = steps.min() - lone, steps.max() + lone
    x_ticks = nice_ticks(*x_range, 8)
    if (steps == np.rint(steps)).all():  # steps are whole numbers
        x_ticks = [tick for tick in x_ticks if abs(tick - round(tick)) < 1e-9]
    sheet = Image.new("RGB", (_SIZE[0] * _FINE, _SIZE[1] * _FINE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13 * _FINE)
    left, top, right, bottom = (edge * _FINE for edge in _BOX)

    def to_x(values: np.ndarray) -> np.ndarray:
        return left + (values - x_range[0]) / (x_range[1] - x_range[0]) * (right - left)

    def to_y(values: np.ndarray) -> np.ndarray:
        return np.clip(bottom - (values - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top), top, bottom)

    for tick in y_ticks:
        y = bottom - (tick - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)
        draw.line((left, y, right, y), fill=_GRID, width=_FINE)
        draw.text((left - 9 * _FINE, y), _label(tick, y_ticks[1] - y_ticks[0]), _GRAY, font, anchor="rm")
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x = to_x(tick)
            draw.line((x, top, x, bottom), fill=_GRID, width=_FINE)
            draw.text((x, bottom + 8 * _FINE), _label(tick, x_ticks[1] - x_ticks[0]), _GRAY, font, anchor="ma")
    draw.line((left, bottom, right, bottom), fill=_GRAY, width=_FINE)
    draw.line((left, top, left, bottom), fill=_GRAY, width=_FINE)
    draw.text(((left + right) / 2, (_SIZE[1] - 12) * _FINE), "step", _GRAY, font, anchor="ms")
    return sheet, draw, to_x, to_y


def _draw_line(draw: ImageDraw.ImageDraw, x: np.ndarray, y: np.ndarray, colour: str, width: int) -> None:
    points = list(zip(x.tolist(), y.tolist()))
    if len(points) == 1:
        draw.circle(points[0], 3 * _FINE, fill=colour)
    draw.line(points, fill=colour, width=width * _FINE, joint="curve")


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """About ``most`` evenly spaced round numbers, 1, 2 or 5 times a power of ten apart, that enclose low and high."""
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _smoothed(values: np.ndarray, keep: float) -> np.ndarray:
    total, weight, result = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result[i] = total / weight
    return result


def _label(value: float, step: float) -> str:
    if abs(value) < step * 1e-6:
        return "0"
    if step < 1e-4 or abs(value) >= 1e7:
        return f"{value:.{max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step)))}e}"
    return f"{value:,.{max(0, -math.floor(math.log10(step)))}f}"


def _draw_legend(draw: ImageDraw.ImageDraw, title: str, lines: Sequence[tuple[str, str]]) -> None:
    """Title and, from the right, the name and colour of each line."""
    left, _, right, _ = (edge * _FINE for edge in _BOX)
    font, middle = ImageFont.load_default(13 * _FINE), 34 * _FINE
    for name, colour in lines:
        start = right - draw.textlength(name, font)
        draw.text((start, middle), name, _GRAY, font, anchor="lm")
        draw.line((start - 30 * _FINE, middle, start - 7 * _FINE, middle), fill=colour, width=2 * _FINE)
        right = start - 50 * _FINE
    large = ImageFont.load_default(19 * _FINE)
    while title and draw.textlength(title, large) > right - left:
        title = title[:-1]
    draw.text((left, middle), title, _INK, large, anchor="lm")
