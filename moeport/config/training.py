"""The sections that control training: training, optimizer, parallelism, comm, checkpoint, metrics, backend, run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moeport.comm.exchange import EXCHANGES
from moeport.config import step_ranges
from moeport.config.path_types import UserPath
from moeport.config.trackers import TrackerConfig
from moeport.core.section import Section
from moeport.facts import BACKENDS, DEVICES

if TYPE_CHECKING:
    BackendName = str
    DeviceName = str
else:
    BackendName = Literal[tuple(BACKENDS)]
    DeviceName = Literal[("auto", *DEVICES)]

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

if TYPE_CHECKING:
    Algorithm = str
else:
    Algorithm = Literal[(*EXCHANGES, "auto")]
ALGORITHMS = ". ".join(f"{name}: {exchange.summary}" for name, exchange in EXCHANGES.items())


class RunConfig(Section):
    """The run folder."""

    dir: UserPath = Path("runs/default")
    """Folder of this run: config.yaml, metrics.jsonl, checkpoints/ and report.html."""


class TrainingConfig(Section):
    """Length, batch and evaluation."""

    steps: PositiveInt = 1000
    """Optimiser steps."""
    batch_size: PositiveInt = 16
    """Sequences per step, over all ranks and micro-batches."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches per step; must divide batch_size."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, data order and routing noise."""
    start_from: UserPath | None = None
    """Run folder, or a checkpoint in one, from which a new run takes its initial weights, as `moeport convert` makes
    them. Default: random initial weights."""
    evaluation_interval: NonNegativeInt = 0
    """Steps between evaluations on the whole validation set; 0: only after the last step."""
    evaluation_batch_size: PositiveInt | None = None
    """Sequences per validation batch. Default: the size of a micro-batch."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    skip_steps: tuple[str, ...] = ()
    """Steps that are skipped without training on their batch, such as [120-125, "130"]: a way past a batch at which
    a run diverges."""

    @property
    def skipped(self) -> tuple[tuple[int, int], ...]:
        """First and last step of each stretch that is skipped, ascending."""
        return step_ranges.merged(self.skip_steps)

    def skips(self, step: int) -> bool:
        """Whether a step, counted from 1, is skipped."""
        return any(first <= step <= last for first, last in self.skipped)

    def updates(self, steps: int) -> int:
        """How many of the first `steps` steps update the parameters."""
        return steps - step_ranges.count(step_ranges.up_to(self.skipped, steps))


class ScheduleConfig(Section):
    """Learning rate over steps, as a fraction of optimizer.learning_rate."""

    name: Literal["cosine", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Cosine decay; warm-up, stable, linear decay; decay by 1 / sqrt(step) after the warm-up; or constant after it."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up from 0; the first step uses 1 / warmup_steps of the rate. A shorter run never gets past it."""
    steps: PositiveInt | None = None
    """cosine, wsd: the steps that the schedule is planned for; after them the rate stays where it ends. Set it in a run
    that may become longer: with another training.steps the rates stay the same. Default: training.steps."""
    decay_fraction: Fraction = 0.2
    """wsd: fraction of the steps, at the end, over which the rate decays."""
    final_fraction: Fraction = 0.0
    """cosine, wsd: the rate after the last step, as a fraction of learning_rate."""


class MuonConfig(Section):
    """Options of optimiser `muon`."""

    momentum: Beta = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look ahead along the momentum (Nesterov)."""
    adjust_rate: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of a matrix's learning rate: 0.2 sqrt(max(rows, columns)), which makes updates as large as AdamW's, so
    that its learning rates can be kept (Moonlight, arXiv 2502.16982), or sqrt(max(1, rows / columns)) (Jordan et
    al.)."""
    adamw_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the parameters that AdamW updates. Default: learning_rate."""


class AdafactorConfig(Section):
    """Options of optimiser `adafactor`."""

    beta2_decay: Annotated[float, Field(ge=0)] = 0.8
    """The second moment moves towards the squared gradient by step^-beta2_decay."""
    clip_threshold: Annotated[float, Field(ge=1)] = 1.0
    """Largest root mean square of a matrix's normalised update."""
    eps: Annotated[float, Field(ge=1e-15)] = 1e-15
    """Least root of a second moment, the same for all types: its square is the 1e-30 of Shazeer and Stern. The default
    of torch.optim.Adafactor is the epsilon of the parameters' type, next to which small gradients are lost."""
    least_scale: PositiveFloat = 1e-3
    """Least value of a matrix's root mean square, by which its learning rate is multiplied."""


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (Loshchilov and Hutter), Muon for matrices and AdamW for the rest, or Adafactor
    (Shazeer and Stern).
    """

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    """`adamw`. `muon`: matrices of attention, experts and dense blocks follow Muon (Jordan et al. 2024); embeddings,
    output head, routers, norms and biases follow AdamW. `adafactor`: torch.optim.Adafactor (arXiv 1804.04235), which
    keeps second moments per row and per column of each matrix."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and vectors are not decayed."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    muon: MuonConfig = MuonConfig()
    """Options of `muon`; the other keys hold for both rules, beta1, beta2 and eps for AdamW's part."""
    adafactor: AdafactorConfig = AdafactorConfig()
    """Options of `adafactor`. Its learning_rate is relative to the root mean square of a matrix, and at most 1 over the
    square root of the step counts."""


class ParallelismConfig(Section):
    """How the ranks started by the launcher divide model and data. Each rank trains on its own part of a batch."""

    expert: PositiveInt = 1
    """Number of consecutive ranks that share one copy of the experts."""
    data: PositiveInt | None = None
    """Number of copies of the experts. Default: number of ranks / parallelism.expert."""
    shard: bool | None = None
    """Divide what ranks with the same parameters would otherwise each hold: on PyTorch parameters, gradients and the
    optimiser's state (FSDP2), on MindSpore the optimiser's state. Default: true."""


class CommConfig(Section):
    """Communication between ranks."""

    algorithm: Algorithm = Field(
        "flat",
        description="How tokens reach experts on other ranks. "
        f"{ALGORITHMS}. auto: the fastest of them, as measured at the start.",
    )
    chunks: PositiveInt | Literal["auto"] = 1
    """Number of parts that a rank's tokens are split into, so that some are in flight while experts compute on another.
    auto: the fastest of 1, 2 and 4, as measured at the start."""
    ranks_per_node: PositiveInt | None = None
    """Consecutive ranks that make up a node. null: from the launcher or the host names."""
    timeout: PositiveFloat = 600.0
    """Seconds that a collective may take before the job is stopped."""


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    interval: NonNegativeInt = 0
    """Steps between checkpoints; 0: none at fixed steps. The last step is always saved."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    asynchronous: bool | Literal["auto"] = "auto"
    """Copy the parts of the model that a rank holds, and write the copy in the background. auto: if the copies fit into
    the free memory of every host; otherwise the parts are written one by one, and training waits."""


class MetricsConfig(Section):
    """What is logged and reported."""

    log_interval: PositiveInt = 10
    """Steps between printed lines when the output is not a terminal; metrics.jsonl has every step. On CUDA and with
    several ranks, also the maximum number of steps before the host waits for results."""
    full_loads_interval: PositiveInt | None = None
    """Steps between the loads of all experts in metrics.jsonl. Default: every step, and progressively fewer steps once
    there are more than a million numbers; means, extremes and dead experts are written for every step."""
    routing_interval: NonNegativeInt = 10
    """Text: interval of the steps at which assignments are counted by vocabulary id and expert, for the most frequent
    ids, in routing.json and the report; 0: never."""
    loss_by_frequency: bool = False
    """Text: also compute the validation loss on rare and on frequent ids after the last step, in a second pass."""
    tensorboard: bool = True
    """Also write TensorBoard events to the run folder, if tensorboard is installed."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Also feed experiment trackers: a list of mappings with a name (wandb, mlflow or swanlab), a mode (offline, the
    default, or online), a project (default: moeport) and a label (default: that of the run folder), such as [{name:
    wandb}]."""
    report: bool = True
    """Write report.html at the end."""
    sample_prompt: str | None = None
    """Text that the sample at the end of a run continues. Default: the beginning of a held-out document."""
    sample_tokens: NonNegativeInt | None = None
    """Number of tokens of that sample; 0: none, which saves time with a large model. Default: 120."""
    peak_tflops: PositiveFloat | None = None
    """Peak of the device in TFLOP/s, for MFU. Default: the speed of a matrix product, measured at the start."""
    profile: bool = False
    """Profile some steps on every rank with the framework's profiler: a trace per rank and profile.json in the run
    folder's profile/, and tables by kind of work in the report and at the end of the run. The option --profile."""
    profile_start: PositiveInt | None = None
    """First step that is timed; the step before it measures memory. Default: the sixth after the start, or an earlier
    one in a short run."""
    profile_steps: PositiveInt = 3
    """Number of steps that are timed."""
    profile_step: PositiveInt | None = None
    """Short for profile with this profile_start and a profile_steps of 1; null: those keys apply."""


class BackendConfig(Section):
    """Framework, device and arithmetic."""

    name: BackendName = "torch"
    """Framework. numpy is the forward-only reference: it evaluates and does not train."""
    device: DeviceName = "auto"
    """Device; auto: the accelerator if there is one, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "float32"
    """Compute type; parameters and optimiser stay float32 (float64 for float64). auto: bfloat16 if a matrix product is
    measurably faster in it, otherwise float32. On a CPU, the steps of a small model must be faster too."""
    compile: bool | None = None
    """Compile the model: with torch.compile (off by default), or as a MindSpore graph (on by default; without it a step
    takes about 20 times as long)."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the forward and backward pass of a micro-batch once, as a CUDA graph, and replay it: for small models,
    where launches take most of the time. auto: if a trial in the first steps gives the same results in less time, on
    one rank. true: a run that cannot use it is refused. Not run on hardware."""
    kernels: Literal["auto", "default"] | dict[str, str] = "auto"
    """Fused operators of the device. auto: those that give the values and gradients of the default composition when
    they are tried at the start; if there are several for a kernel, the first, or the fastest in a trial by time, which
    with deterministic chooses only among forms that give the same bits. default: none. Or by kernel, such as
    {attention: default, swiglu: npu_swiglu}; a named operator must pass its trial, and kernels not listed are auto."""
    deterministic: bool = True
    """Refuse operations that can give different bits from run to run."""

    def on_any_device(self) -> "BackendConfig":
        """For a run that is read where it was not trained: the device that is here, with the kernels that suit it."""
        return self.model_copy(update={"device": "auto", "kernels": "auto", "cuda_graphs": "auto"})
