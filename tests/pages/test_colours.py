"""The text of pages can be read: WCAG's contrast of 4.5, light and dark."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moeport"
STYLES = sorted([*PACKAGE.glob("**/templates/*.css"), *PACKAGE.glob("**/templates/*.html")])
TEXT = {path: path.read_text(encoding="utf-8") for path in STYLES}
COLOUR = re.compile(r"(?<![-\w])(?:color|--state): *([^;}]+)")
"""What text is drawn in; --state is that of a run in `moeport watch`."""
VARIABLE = re.compile(r"--(\w+): *(#[0-9a-f]{6})\b")


def variables(dark):
    """The colours of a scheme by name; those of the dark one replace those before them."""
    found = {}
    for text in TEXT.values():
        is_dark = re.compile(r"@media \(prefers-color-scheme: dark\) \{(?:[^{}]|\{[^{}]*\})*\}")
        found |= dict(VARIABLE.findall(" ".join(is_dark.findall(text)) if dark else is_dark.sub("", text)))
    return found


SCHEMES = {"light": variables(dark=False), "dark": variables(dark=True)}


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def test_a_scheme_has_a_colour_for_each_name():
    assert SCHEMES["light"].keys() == SCHEMES["dark"].keys()


@pytest.mark.parametrize("path", STYLES, ids=lambda path: path.name)
def test_text_can_be_read(path):
    for colour in COLOUR.findall(TEXT[path]):
        name = re.fullmatch(r"var\(--(\w+)\)", colour)
        assert name, f"{colour} is the same in both schemes"
        for scheme, colours in SCHEMES.items():
            for ground in ("page", "panel"):
                if name[1] != "state":
                    assert contrast(colours[name[1]], colours[ground]) >= 4.5, (colour, scheme, ground)
