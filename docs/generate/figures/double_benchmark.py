"""The double benchmark: how far two runs may be from a golden, and from each other."""

from figures.drawing import WIDTH, Drawing
from moeport.parity.thresholds import RATIO_MAX, RATIO_RMS

EXAMPLES = (
    ("B is as near as A: rounding", 1.3, "pass", "green"),
    ("B is further than it may be: a fault", 3.2, "fail", "red"),
)
"""What it shows, the error of B in those of A, and what becomes of a tensor beyond its limit."""
ZERO, UNIT = 60, 90


def double_benchmark() -> str:
    """The three that are compared, and two outcomes."""
    drawing = Drawing("The double benchmark: the errors of A and B against a golden in float64", 416)
    drawing.labelled(140, 18, 160, 44, ["golden", "float64, A's routing"], "green")
    drawing.labelled(28, 132, 130, 44, ["run A", "the reference"], "blue")
    drawing.labelled(282, 132, 130, 44, ["run B", "judged"], "orange")
    drawing.line([(180, 62), (108, 131)], "line thick blue")
    drawing.line([(260, 62), (332, 131)], "line thick orange")
    drawing.line([(158, 154), (282, 154)], "line dashed")
    drawing.text(130, 94, "error of A", "small right")
    drawing.text(312, 94, "error of B", "small left")
    drawing.text(WIDTH / 2, 147, "first: a limit", "small")
    drawing.text(
        WIDTH / 2, 202, f"beyond the limit, B passes if it is at most {RATIO_RMS:g} times as far from", "small"
    )
    drawing.text(WIDTH / 2, 219, f"the golden as A, and {RATIO_MAX:g} times in the worst entry", "small")
    for number, (words, error, verdict, kind) in enumerate(EXAMPLES):
        y = 262 + 78 * number
        allowed = ZERO + UNIT * RATIO_RMS
        drawing.text(16, y - 14, words, "small left")
        drawing.box(ZERO, y + 14, UNIT * RATIO_RMS, 8, "plain", 0)
        drawing.line([(ZERO, y + 18), (WIDTH - 80, y + 18)])
        drawing.line([(allowed, y + 8), (allowed, y + 28)])
        drawing.text(ZERO - 8, y + 22, "golden", "small right")
        for name, place, colour in (("A", 1.0, "blue"), ("B", error, "orange")):
            drawing.dot(ZERO + UNIT * place, y + 18, 6, colour)
            drawing.text(ZERO + UNIT * place, y + 6, name, "small")
        drawing.text(allowed, y + 42, f"{RATIO_RMS:g} times error of A", "small muted")
        drawing.labelled(WIDTH - 66, y + 5, 50, 26, [verdict], kind)
    return drawing.svg()
