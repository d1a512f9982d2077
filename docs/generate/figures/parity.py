"""Where two runs are compared."""

from figures.drawing import WIDTH, Drawing
from moeport.parity.options import PARTS
from moeport.parity.thresholds import LIMITS

SINGLE = LIMITS["float32"]
ROWS: dict[str, tuple[str, str]] = {
    "weights and inputs": ("one rounding", "parameters, tokens, noise"),
    "forward": (f"{SINGLE.forward:.0e}", "activations, scores, losses"),
    "routing": ("the same choices", "or a near tie"),
    "gradients": (f"{SINGLE.gradient:.0e}", "of the first pass"),
    "optimizer": (f"{SINGLE.moment:.0e}", "moments and updates"),
    "trajectory": (f"{SINGLE.trajectory:.0e}", "losses of the next steps"),
}
"""Of each part the largest difference in float32, and what it holds."""
STEP, HEIGHT, BOX = 68, 44, 112


def parity() -> str:
    """Both sides from top to bottom, and between them what is compared and how closely."""
    drawing = Drawing("Where two runs are compared: six parts, each with its limit", 42 + STEP * len(ROWS) + 62)
    left, right = 16.0, WIDTH - 16.0 - BOX
    drawing.text(left + BOX / 2, 28, "run A", "bold")
    drawing.text(right + BOX / 2, 28, "run B", "bold")
    drawing.text(WIDTH / 2, 28, "limit in float32", "small muted")
    assert tuple(ROWS)[1:] == PARTS
    for number, (name, (limit, what)) in enumerate(ROWS.items()):
        y = 42 + STEP * number
        words = name.split(" and ")
        lines = [words[0], f"and {words[1]}"] if len(words) > 1 else [name]
        for x, kind in ((left, "blue"), (right, "orange")):
            drawing.labelled(x, y, BOX, HEIGHT, lines, kind)
            if number:
                drawing.line([(x + BOX / 2, y - STEP + HEIGHT), (x + BOX / 2, y - 1)], arrow=True)
        drawing.line([(left + BOX, y + 22), (right, y + 22)], "line dashed")
        drawing.text(WIDTH / 2, y + 15, limit, "bold")
        drawing.text(WIDTH / 2, y + 38, what, "small muted")
    y = 42 + STEP * len(ROWS)
    drawing.labelled(
        16, y, WIDTH - 32, 46, ["verdict", "the first tensor, in the order of execution, beyond its limit"], "green"
    )
    return drawing.svg()
