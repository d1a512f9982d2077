"""Pictures as SVG: boxes, lines and text on a card that follows the reader's light or dark scheme.

Text stays text, nothing depends on the machine, and every picture is narrow enough for a phone. Coordinates are in
units of the picture, from its upper left corner.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH = 440
"""Width of every picture. A phone shows it nearly unscaled, so its text is at least 12 units high."""
STYLE = """
.card { fill: #ffffff; stroke: #d4d8e4 } text { fill: #1f2433; text-anchor: middle }
text.small { font-size: 12px } text.muted { fill: #565d70 } text.bold { font-weight: 600 }
text.left { text-anchor: start } text.right { text-anchor: end }
.plain { fill: #f3f4f8; stroke: #9aa1b5 } .blue { fill: #e3e8fb; stroke: #4a5fc1 }
.orange { fill: #fdebd2; stroke: #c26a12 } .green { fill: #dff2e1; stroke: #2e7d32 }
.red { fill: #fbe1e1; stroke: #b3261e }
.line { fill: none; stroke: #565d70 } .line.blue { stroke: #4a5fc1 } .line.orange { stroke: #c26a12 }
.line.green { stroke: #2e7d32 } .line.red { stroke: #b3261e } .faint { fill: none; stroke: #d4d8e4 }
.dashed { stroke-dasharray: 5 4 } .thick { stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
  .card { fill: #20242f; stroke: #3c4354 } text { fill: #e7e9f0 } text.muted { fill: #a9b0c3 }
  .plain { fill: #2a2f3c; stroke: #6b7389 } .blue { fill: #2b3463; stroke: #8c9df0 }
  .orange { fill: #4a3318; stroke: #eda55a } .green { fill: #1f3d24; stroke: #7fc685 }
  .red { fill: #4b2323; stroke: #f0928b }
  .line { fill: none; stroke: #a9b0c3 } .line.blue { stroke: #8c9df0 } .line.orange { stroke: #eda55a }
  .line.green { stroke: #7fc685 } .line.red { stroke: #f0928b } .faint { fill: none; stroke: #3c4354 }
}
"""


class Drawing:
    """One picture.

    Args:
        title: what it shows, for those who do not see it and for the tab of a browser.
        height: of the picture.
    """

    def __init__(self, title: str, height: float):
        self.title, self.height = title, height
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "plain", round_: float = 6) -> None:
        """A rectangle; its kind is a class of the style."""
        size = f'width="{_number(width)}" height="{_number(height)}" rx="{_number(round_)}"'
        self._parts.append(f'<rect class="{kind}" x="{_number(x)}" y="{_number(y)}" {size}/>')

    def dot(self, x: float, y: float, radius: float, kind: str = "plain") -> None:
        """A circle around a point."""
        self._parts.append(f'<circle class="{kind}" cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """A line of text, centred at x on the base line y; `left` and `right` begin and end there instead."""
        kind = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text{kind} x="{_number(x)}" y="{_number(y)}">{escape(words, quote=False)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str = "line", arrow: bool = False) -> None:
        """A line through points, with a head at its end if it is an arrow."""
        way = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._parts.append(f'<polyline class="{kind}" points="{way}"/>')
        if arrow:
            (x, y), end = points[-2], points[-1]
            angle = math.atan2(end[1] - y, end[0] - x)
            sides = (
                (end[0] - 8 * math.cos(angle + turn), end[1] - 8 * math.sin(angle + turn)) for turn in (-0.45, 0.45)
            )
            first, second = sides
            self.line([first, end, second], kind.replace(" dashed", ""))

    def labelled(self, x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str) -> None:
        """A box with lines of text in its middle, the first in bold where there are several."""
        self.box(x, y, width, height, kind)
        first = y + height / 2 + 5 - 8 * (len(lines) - 1)
        for number, words in enumerate(lines):
            style = "bold" if len(lines) > 1 and number == 0 else "small" if number else ""
            self.text(x + width / 2, first + 17 * number, words, style)

    def svg(self) -> str:
        """The file."""
        size = f'viewBox="0 0 {WIDTH} {_number(self.height)}" width="560" height="{_number(self.height * 560 / WIDTH)}"'
        font = 'font-family="system-ui, Roboto, Helvetica, Arial, sans-serif" font-size="14"'
        card = f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{_number(self.height - 1)}" rx="8"/>'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {font}>',
                f"<title>{escape(self.title, quote=False)}</title>",
                f"<style>{STYLE}</style>",
                card,
                *self._parts,
                "</svg>\n",
            ]
        )


def _number(value: float) -> str:
    """To a tenth of a unit, without digits that only a machine sees."""
    return f"{value:.1f}".removesuffix(".0")
