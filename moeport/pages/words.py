"""Words that depend on a number."""


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what it counts: `1 document`, `1,234 documents`.

    Args:
        number: how many there are.
        one: the word for one of them.
        many: the word for several; empty: `one` with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
