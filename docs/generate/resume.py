"""The table of docs/training.md on what a resumed run may change."""

from moeport.training.resumable import RULES


def rules() -> str:
    """Each key or section with what a change does."""
    rows = (f"| `{name}` | {rule.effect.value} | {rule.why} |" for name, rule in RULES.items())
    return "\n".join(["| Key or section | A change is | Why |\n|---|---|---|", *rows])
