"""What the documentation lists about every all-to-all of experts."""

from moeport.comm.exchange import EXCHANGES


def overview() -> str:
    """A table of all exchanges."""
    rows = (f"| `{name}` | `{each.__name__}` | {each.summary} |" for name, each in EXCHANGES.items())
    return "\n".join(["| `comm.algorithm` | Class | How tokens reach experts on other ranks |\n|---|---|---|", *rows])
