"""What the documentation lists of the environment of Ascend."""

from moeport.ascend.table import DETERMINISM, PAIRS, VARIABLES
from moeport.launch.npu import SETTINGS


def variables() -> str:
    """A table of the variables that matter."""
    rows = (
        f"| `{name}` | {each.use} | {each.reader} | {'' if each.default == 'not set' else f'`{each.default}`'} |"
        for name, each in VARIABLES.items()
    )
    return "\n".join(["| Variable | What it decides | Read by | Default |\n|---|---|---|---|", *rows])


def determinism() -> str:
    """What `backend.deterministic` sets."""
    return ", ".join(f"`{name}={value}`" for name, value in DETERMINISM.items())


def launch() -> str:
    """A table of what `moeport launch` sets."""
    both = ("torchrun", "msrun")
    rows = (
        f"| `{name}` | {each.why} | {' and '.join(each.launchers) if each.launchers != both else 'both'} |"
        for name, each in SETTINGS.items()
    )
    return "\n".join(["| Variable | Value, and why | Launcher |\n|---|---|---|", *rows])


def versions() -> str:
    """A table of releases that are known to go with a release of CANN."""
    rows = (f"| {pair.package} {pair.release} | {', '.join(pair.cann)} | {pair.source} |" for pair in PAIRS)
    return "\n".join(["| Package | CANN | Who says so |\n|---|---|---|", *rows])
