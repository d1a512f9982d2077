"""LocMoE's lower bound of the expert capacity against the angle between a token and its expert's gate row."""

import math

from figures.drawing import Drawing
from moeport.core.bounds import lower_bound

EXPERTS, DIMS = 16, (64, 256, 1024, 4096)
KINDS = ("green", "blue", "orange", "red")
LEFT, TOP, WIDE, HIGH = 64, 44, 352, 250
FLATTEST = 45
"""Degrees at the right end; the left end is 90, no likeness at all."""
MOST = 10_000
"""Tokens at the upper end."""


def bound() -> str:
    """A curve per width of the gate rows, on a logarithmic scale."""
    drawing = Drawing("LocMoE's capacity bound against the angle, for gate rows of four widths", TOP + HIGH + 78)
    drawing.text(16, 26, f"tokens that an expert must take; {EXPERTS} experts", "small left")
    for power in range(int(math.log10(MOST)) + 1):
        y = _y(10.0**power)
        drawing.line([(LEFT, y), (LEFT + WIDE, y)], "faint")
        drawing.text(LEFT - 8, y + 4, f"{10**power:,}", "small right")
    for angle in range(90, FLATTEST - 1, -15):
        drawing.text(_x(angle), TOP + HIGH + 18, f"{angle}°", "small")
    drawing.text(LEFT + WIDE / 2, TOP + HIGH + 38, "largest angle between token and gate row", "small")
    drawing.text(LEFT + WIDE / 2, TOP + HIGH + 60, "d: dimension of tokens and gate rows", "small muted")
    for dim, kind in zip(DIMS, KINDS, strict=True):
        drawing.line([(_x(angle), _y(tokens)) for angle, tokens in curve(dim)], f"line thick {kind}")
        y = TOP + 110 + 22 * DIMS.index(dim)
        drawing.line([(LEFT + 246, y - 4), (LEFT + 274, y - 4)], f"line thick {kind}")
        drawing.text(LEFT + 282, y, f"d = {dim:,}", "small left")
    return drawing.svg()


def curve(dim: int) -> list[tuple[float, float]]:
    """Angles in degrees and tokens, up to the upper end of the picture."""
    points = []
    for step in range(4 * (90 - FLATTEST) + 1):
        angle = 90 - step / 4
        tokens = lower_bound(math.cos(math.radians(angle)), dim, EXPERTS, probability="independent")
        if tokens > MOST:
            break
        points.append((angle, tokens))
    return points


def _x(angle: float) -> float:
    return LEFT + WIDE * (90 - angle) / (90 - FLATTEST)


def _y(tokens: float) -> float:
    return TOP + HIGH * (1 - math.log10(tokens) / math.log10(MOST))
