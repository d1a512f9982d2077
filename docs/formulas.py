"""Formulas in LaTeX become MathML, which browsers typeset without a script."""

import re
from html import unescape
from xml.etree import ElementTree

from latex2mathml import exceptions
from latex2mathml.converter import convert

ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">\\[([](.*?)\\[)\]]</\1>', re.DOTALL)
"""What pymdownx.arithmatex leaves of $...$ and of a block of the language math."""
MATHML = "{http://www.w3.org/1998/Math/MathML}"
CHILDREN = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
"""Elements with a fixed number of parts."""
REFUSALS = tuple(each for each in vars(exceptions).values() if isinstance(each, type))
"""What latex2mathml raises; these errors share no base of their own."""


class FormulaError(ValueError):
    """A formula that cannot be typeset."""


def typeset(html: str) -> str:
    """A page with MathML in place of its formulas. Raises FormulaError for the first that is wrong."""

    def replace(match: re.Match[str]) -> str:
        formula = unescape(match[2]).strip()
        if match[1] == "span":
            return mathml(formula, display="inline")
        return f'<div class="formula">{mathml(formula, display="block")}</div>'

    return ARITHMATEX.sub(replace, html)


def mathml(formula: str, display: str) -> str:
    r"""A formula as an element `math`.

    Args:
        formula: LaTeX without delimiters.
        display: inline or block.

    Raises FormulaError where a command is unknown, or something is missing: \frac{1}, an open brace.
    """
    formula = formula.replace("{aligned}", "{split}")  # the same to a reader; it knows only the latter
    try:
        found = convert(formula, display=display)
        root = ElementTree.fromstring(found)
    except (*REFUSALS, ElementTree.ParseError) as error:
        raise FormulaError(f"{formula}: not LaTeX that latex2mathml reads: {error or type(error).__name__}") from error
    for each in root.iter():
        name = each.tag.removeprefix(MATHML)
        if (name != "mtext" and "\\" in (each.text or "")) or (name == "mi" and each.text in ("{", "}")):
            raise FormulaError(f"{formula}: latex2mathml does not know {each.text}")
        if len(each) != CHILDREN.get(name, len(each)):
            raise FormulaError(
                f"{formula}: a part of {name} is missing; expected {CHILDREN[name]}, received {len(each)}"
            )
    return found
