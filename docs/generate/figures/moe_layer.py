"""A token's way through a mixture-of-experts layer."""

from figures.drawing import WIDTH, Drawing

STAGES = (
    ("hidden states", "x: T tokens of width D", "plain"),
    ("router", "a score per expert; K choices and gates", "blue"),
    ("capacity", "choices beyond it are dropped: gate 0", "blue"),
    ("dispatch", "a row per choice, sorted by expert", "blue"),
    ("all-to-all", "rows go to the ranks of their experts", "orange"),
    ("experts", "each multiplies the rows that it was given", "green"),
    ("all-to-all", "the rows return", "orange"),
    ("combine", "rows weighted by their gates and summed", "blue"),
    ("output", "y: T tokens of width D", "plain"),
)
HEIGHT, STEP, LEFT, BOX = 42, 60, 16, 286


def moe_layer() -> str:
    """From top to bottom; what runs beside it on the right."""
    drawing = Drawing("A token's way through a mixture-of-experts layer", 20 + STEP * len(STAGES))
    middle = LEFT + BOX / 2
    for number, (name, what, kind) in enumerate(STAGES):
        y = 18 + STEP * number
        drawing.labelled(LEFT, y, BOX, HEIGHT, [name, what], kind)
        if number:
            drawing.line([(middle, y - STEP + HEIGHT), (middle, y - 1)], arrow=True)
    first, last = 18 + HEIGHT / 2, 18 + STEP * (len(STAGES) - 1) + HEIGHT / 2
    right = LEFT + BOX
    side = WIDTH - 50
    drawing.line([(right, first), (side, first), (side, 280)])
    drawing.labelled(side - 40, 280, 80, 42, ["shared", "experts"], "green")
    drawing.line([(side, 322), (side, last), (right + 1, last)], arrow=True)
    drawing.line([(right, 99), (right + 14, 99)], "line dashed", arrow=True)
    drawing.text(right + 19, 96, "auxiliary", "small left")
    drawing.text(right + 19, 112, "losses", "small left")
    return drawing.svg()
