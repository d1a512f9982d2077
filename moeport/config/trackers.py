"""The experiment trackers: what each is, and what the config says about one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from moeport.core.section import Section


@dataclass(frozen=True)
class TrackerFacts:
    """One tracker."""

    title: str
    """What it calls itself."""
    package: str
    """Module of its client."""
    module: str
    """Module of its `Tracker`."""
    cls: str
    """Name of that class."""
    extra: str
    """Extra of moeport that installs its client."""

    @property
    def install(self) -> str:
        """Command that installs its client."""
        return f"pip install 'moeport[{self.extra}]'"


TRACKERS: Mapping[str, TrackerFacts] = {
    name: TrackerFacts(title, name, f"moeport.training.trackers.{name}", cls, name)
    for name, title, cls in (
        ("tensorboard", "TensorBoard", "TensorBoard"),
        ("wandb", "Weights & Biases", "WandB"),
        ("mlflow", "MLflow", "MLflow"),
        ("swanlab", "SwanLab", "SwanLab"),
    )
}
"""Facts by name. `metrics.tensorboard` turns the first on and off; `metrics.trackers` names the others."""

if TYPE_CHECKING:
    TrackerName = str
else:
    TrackerName = Literal[tuple(name for name in TRACKERS if name != "tensorboard")]


class TrackerConfig(Section):
    """An experiment tracker, fed through its own client."""

    name: TrackerName
    """The tracker; its client is the extra of the same name. TensorBoard has a key of its own."""
    mode: Literal["offline", "online"] = "offline"
    """offline: into trackers/ of the run folder, without a network. online: to the service that the client is set up
    for."""
    project: Annotated[str, Field(min_length=1)] = "moeport"
    """Project of the run, in MLflow its experiment."""
    label: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run there. Default: that of the run folder."""
