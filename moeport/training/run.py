"""One training run, from a config to a report: what `moeport train` does."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
from rich.console import Console

from moeport.backends import get_backend
from moeport.backends.base import Backend
from moeport.comm.check import check_collectives
from moeport.comm.mesh import Mesh
from moeport.config.schema import Config
from moeport.core.parameters import initial_parameters
from moeport.errors import CheckpointError, InterruptedRunError, NonFiniteError, UserError
from moeport.launch.launcher import launched
from moeport.model.auto_exchange import fastest
from moeport.training.batches import Batches
from moeport.training.checkpoint import (
    Checkpoint,
    CheckpointMeta,
    best_checkpoint,
    check_parameters,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_meta,
    save_checkpoint,
)
from moeport.training.evaluate import Evaluation
from moeport.training.metrics import EvaluationMetrics, MetricsLog, StepMetrics, read_metrics
from moeport.training.placed import PlacedModel, place_model
from moeport.training.progress import Progress
from moeport.training.ranks import check_ranks
from moeport.training.report import write_report
from moeport.training.run_dir import (
    CHECKPOINT_DIR,
    METRICS_FILE,
    PROFILE_DIR,
    SUMMARY_FILE,
    check_resumable,
    refuse_used,
    write_config,
)
from moeport.training.signals import StopRequest
from moeport.training.summary import DryRun, RunSummary
from moeport.training.task import Task, build_task_in_turn
from moeport.training.trainer import Trainer
from moeport.version import VERSION


def train(
    config: Config, *, resume: bool = False, dry_run: bool = False, console: Console | None = None
) -> RunSummary | DryRun | None:
    """Train the model that `config` describes, in `config.run.dir`; in each process of a job that a launcher started.

    Args:
        config: the whole config.
        resume: continue from the last checkpoint of the folder; start if there is none; return the summary of a run
            that is finished.
        dry_run: prepare the data, build the model, measure two steps and write nothing to the run folder.
        console: where progress goes; default standard output. Only the first rank prints.

    Returns: what came out; None on other ranks than the first.

    Raises:
        UserError: for what the user can mend.
        NonFiniteError: a loss or gradient is not finite; the last checkpoint is untouched.
        InterruptedRunError: Ctrl-C or SIGTERM; the last whole step was saved.
    """
    launch = launched()
    if launch and launch.rank != 0:
        console = Console(quiet=True, force_terminal=False)
    console = console or Console()
    check_ranks(config, launch.size if launch else 1)
    if launch and config.comm.ranks_per_node:
        launch = launch.on_nodes_of(config.comm.ranks_per_node)
    checkpoints = config.run.dir / CHECKPOINT_DIR
    checkpoint = None
    if resume and not dry_run and list_checkpoints(checkpoints):
        checkpoint = load_checkpoint(find_checkpoint(checkpoints, "latest"))
        if summary := _finished(config, checkpoint):
            console.print(f"{config.run.dir} is finished: all {summary.steps} steps are done", highlight=False)
            return summary
        if config.backend.dtype == "auto":
            config = _with_dtype(config, checkpoint.meta.config["backend"]["dtype"])
    elif not (resume or dry_run):
        refuse_used(config.run.dir)
    backend = get_backend(config.backend)
    if not backend.trains:
        raise UserError(f"backend.name: {backend.name} cannot train; set backend.name to torch or mindspore")
    stopped: InterruptedRunError | NonFiniteError
    with backend.communicator(launch, config.comm.timeout) as world:
        mesh = Mesh(world, config.parallelism.expert)
        if world.size > 1:
            _check_job(backend, mesh, checkpoint)
        run = _Run(config, checkpoint, console, backend, mesh)
        try:
            return run.measure() if dry_run else run.train()
        except (InterruptedRunError, NonFiniteError) as error:  # every rank alike: they leave in order
            stopped = error
    raise stopped


def _check_job(backend: Backend, mesh: Mesh, checkpoint: Checkpoint | None) -> None:
    """Refuse ranks that start from different steps, and libraries that deliver wrong values."""
    world = mesh.world
    own = np.array([checkpoint.meta.step if checkpoint else 0])
    steps = world.ops.to_numpy(world.all_gather(world.ops.from_numpy(own)))[:, 0]
    if (steps != steps[0]).any():
        raise UserError(
            f"--resume: the last checkpoints that the ranks found are of steps {', '.join(map(str, steps))}; expected "
            "one: put run.dir on storage that all nodes share"
        )
    dtypes = dict.fromkeys([backend.dtype, backend.parameter_dtype, "float32", "index"])
    check_collectives(world, list(dtypes), backend.value_and_grad)
    if 1 < mesh.experts.size < world.size:
        check_collectives(mesh.experts, list(dtypes), backend.value_and_grad, ("all_to_all", "all_to_all gradient"))


def _finished(config: Config, checkpoint: Checkpoint) -> RunSummary | None:
    """The summary of a run that has done all its steps."""
    path = config.run.dir / SUMMARY_FILE
    if checkpoint.meta.step < config.training.steps or not path.is_file():
        return None
    check_resumable(config, checkpoint)
    return RunSummary(**json.loads(path.read_text()))


class _Run:
    """The parts of one run: backend, data, model, trainer."""

    def __init__(self, config: Config, checkpoint: Checkpoint | None, console: Console, backend: Backend, mesh: Mesh):
        self.console, self.backend, self.mesh = console, backend, mesh
        self.is_first = mesh.world.rank == 0
        """Whether this rank writes files."""
        self.checkpoint = checkpoint
        self.config = config = _with_dtype(config, self.backend.dtype)
        self.dir = config.run.dir
        self.checkpoints = self.dir / CHECKPOINT_DIR
        self.task: Task = build_task_in_turn(config, mesh.world, report=self.say)
        self.shapes = self.task.model()
        self.counts = self.shapes.parameter_counts()
        self.batches = Batches(config.training, self.shapes, self.task.train, mesh.world)
        placed = self._placed(self._all_to_all())
        self.model = placed.arrays
        self.start_step = checkpoint.meta.step if checkpoint else 0
        flops = config.metrics.peak_tflops
        self.trainer = Trainer(
            config,
            placed,
            self.batches,
            self.start_step,
            flops * 1e12 if flops else self.backend.matmul_flops_per_second(),
        )
        self.saved_step = self.start_step
        best = best_checkpoint(self.checkpoints) if checkpoint else None
        self.best_loss = read_meta(best).val_loss if best else None

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def measure(self) -> DryRun | None:
        """Two steps, measured, that leave no trace."""
        self.trainer.step()
        seconds = self.trainer.step().step_time
        training = self.config.training
        if not self.is_first:
            return None
        return DryRun(
            parameters_total=self.counts.total,
            parameters_active=self.counts.active,
            training_flops_per_token=self.trainer.flops_per_token,
            tokens_per_step=self.trainer.tokens_per_step,
            steps=training.steps,
            epochs=training.steps * training.batch_size / self.task.train.num_sequences,
            seconds_per_step=seconds,
            device=self.backend.device,
            dtype=self.backend.dtype,
        )

    def train(self) -> RunSummary | None:
        """All remaining steps, and the summary on the first rank."""
        if self.is_first:
            self.dir.mkdir(parents=True, exist_ok=True)
            write_config(self.dir, self.config)
            self.task.save(self.dir)
        self._announce()
        steps, interval = self.config.training.steps, self.config.checkpoint.interval
        evaluate_every = self.config.training.evaluation_interval
        evaluation: Evaluation | None = None
        started = time.perf_counter()
        with (
            self._log() as log,
            Progress(steps, self.start_step, self.config.metrics.log_interval, self.console) as progress,
            StopRequest() as stop,
        ):
            for step in range(self.start_step + 1, steps + 1):
                metrics = self._profiled_step() if step == self.config.metrics.profile_step else self.trainer.step()
                if log:
                    log.step(metrics)
                progress.step(metrics)
                evaluation = None
                if step == steps or (evaluate_every and step % evaluate_every == 0):
                    evaluation = self._evaluate(log, progress, step)
                if step == steps or (interval and step % interval == 0) or self._is_best(evaluation):
                    self._save(evaluation)
                if step < steps and self._anywhere(bool(stop)):
                    self._interrupt(evaluation)
            if evaluation is None:
                evaluation = self._evaluate(log, progress, steps)
        return self._summarize(evaluation, time.perf_counter() - started)

    def _log(self) -> MetricsLog | nullcontext[None]:
        if not self.is_first:
            return nullcontext()
        return MetricsLog(self.dir, self.config.metrics.tensorboard, self.start_step if self.checkpoint else None)

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.mesh.world.sum_of_numbers(np.array([float(here)]))[0])

    def _profiled_step(self) -> StepMetrics:
        if not self.is_first:
            return self.trainer.step()
        with self.backend.profile(self.dir / PROFILE_DIR):
            return self.trainer.step()

    def _placed(self, all_to_all: tuple[str, int]) -> PlacedModel:
        """The model at its initial parameters, or at the checkpoint's."""
        specs = self.shapes.parameter_specs()
        if self.checkpoint is None:
            params = initial_parameters(specs, self.config.training.seed, self.task.token_counts)
            return place_model(self.config, self.backend, self.shapes, params, self.mesh, all_to_all)
        for change in check_resumable(self.config, self.checkpoint):
            self.say(f"changed since the checkpoint: {change}")
        check_parameters(self.checkpoint, specs)
        meta = self.checkpoint.meta
        if (meta.tokenizer, meta.data) != (self.task.tokenizer_fingerprint, self.task.train.fingerprint):
            raise CheckpointError(
                f"{self.checkpoint.path}: was trained on other {self.task.kind} than the config's source gives now, so "
                f"the run cannot go on exactly; restore {self.task.remedy}, or start another run with "
                "--set run.dir=FOLDER"
            )
        placed = place_model(self.config, self.backend, self.shapes, self.checkpoint.model, self.mesh, all_to_all)
        placed.arrays.load_optimizer_state(self.checkpoint.optimizer, meta.step)
        return placed

    def _all_to_all(self) -> tuple[str, int]:
        """Algorithm and chunks of the config, or the fastest ones."""
        config, comm, moe = self.config, self.config.comm, self.config.model.moe
        if comm.algorithm != "auto" and comm.chunks != "auto":
            return comm.algorithm, comm.chunks
        tokens = config.training.batch_size // self.batches.num_parts * self.task.train.sequence_length
        top_k = min(-(-moe.router.assignments(tokens, moe.num_experts, 1) // tokens), moe.num_experts)
        choice = fastest(self.mesh, config, tokens, top_k, self.backend.dtype, self.backend.value_and_grad)
        self.say(f"all-to-all  {choice}")
        return choice.algorithm, choice.chunks

    def _announce(self) -> None:
        counts, training = self.counts, self.config.training
        self.say(f"device      {self.backend.device}, {self.backend.dtype}")
        if self.mesh.world.size > 1:
            self.say(f"ranks       {self._ranks()}")
        self.say(self.task.words())
        self.say(f"model       {counts.total:,} parameters, {counts.active:,} active a token")
        self.say(f"training    {training.steps:,} steps of {self.trainer.tokens_per_step:,} tokens in {self.dir}")
        if self.checkpoint:
            self.say(f"resuming    after step {self.start_step:,} from {self.checkpoint.path}")

    def _ranks(self) -> str:
        world, experts, copies = self.mesh.world, self.mesh.experts, self.mesh.copies
        nodes = len(set(world.nodes))
        words = f"{world.size} on {nodes} node{'s'[: nodes > 1]}"
        if experts.size == 1:
            return f"{words}, each with all experts"
        several = f"{copies.size} copies of the experts" if copies.size > 1 else "the experts"
        comm = self.config.comm
        chunks = "" if comm.chunks == 1 else f" in chunks: {comm.chunks}"
        return f"{words}: {several} over {experts.size} ranks each, all-to-all {comm.algorithm}{chunks}"

    def _is_best(self, evaluation: Evaluation | None) -> bool:
        if evaluation is None or not self.config.checkpoint.keep_best:
            return False
        return self.best_loss is None or evaluation.loss < self.best_loss

    def _evaluate(self, log: MetricsLog | None, progress: Progress, step: int) -> Evaluation:
        training = self.config.training
        size = training.evaluation_batch_size or training.batch_size // self.batches.num_parts
        result = self.task.evaluate(self.mesh.world, self.model, size)
        metrics = EvaluationMetrics(step, result.loss, result.bits_per_byte, result.accuracy)
        if log:
            log.evaluation(metrics)
        progress.evaluation(metrics)
        return result

    def _save(self, evaluation: Evaluation | None) -> None:
        step = self.trainer.step_number
        meta = CheckpointMeta(
            step=step,
            tokens=step * self.trainer.tokens_per_step,
            val_loss=evaluation.loss if evaluation else None,
            tokenizer=self.task.tokenizer_fingerprint,
            data=self.task.train.fingerprint,
            config=self.config.model_dump(mode="json"),
            version=VERSION,
        )
        parameters, state = self.model.parameters(), self.model.optimizer_state()
        self.saved_step = step
        if evaluation and (self.best_loss is None or evaluation.loss < self.best_loss):
            self.best_loss = evaluation.loss
        if not self.is_first:
            return
        save_checkpoint(self.checkpoints, meta, parameters, state)
        prune_checkpoints(self.checkpoints, self.config.checkpoint.keep_last, self.config.checkpoint.keep_best)

    def _interrupt(self, evaluation: Evaluation | None) -> None:
        step = self.trainer.step_number
        if self.saved_step != step:
            self._save(evaluation)
        raise InterruptedRunError(
            f"stopped after step {step} of {self.config.training.steps}; everything is saved in {self.dir}. "
            "Continue with the same command and --resume"
        )

    def _summarize(self, evaluation: Evaluation, seconds: float) -> RunSummary | None:
        """Sample, write summary and report."""
        of_the_task = self.task.summary(self.model)
        if not self.is_first:
            return None
        steps, _ = read_metrics(self.dir / METRICS_FILE)
        compilations, compile_seconds = self.backend.compilations()
        summary = RunSummary(
            run_dir=str(self.dir),
            steps=self.config.training.steps,
            val_loss=evaluation.loss,
            val_bits_per_byte=evaluation.bits_per_byte,
            val_accuracy=evaluation.accuracy,
            tokens_per_second=statistics.median(record.tokens_per_second for record in steps),
            wall_time=seconds + sum(record.step_time for record in steps if record.step <= self.start_step),
            peak_memory=_peak_memory(),
            parameters_total=self.counts.total,
            parameters_active=self.counts.active,
            training_flops_per_token=self.trainer.flops_per_token,
            device=self.backend.device,
            dtype=self.backend.dtype,
            versions={"python": platform.python_version(), "moeport": VERSION, **self.backend.versions()},
            checkpoint=str(find_checkpoint(self.checkpoints, "latest")),
            **of_the_task,
            compilations=compilations,
            compile_seconds=compile_seconds,
            capacity_per_layer=steps[-1].capacity_per_layer,
            drop_rate=steps[-1].drop_rate,
        )
        (self.dir / SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=2))
        if self.config.metrics.report:
            write_report(self.dir)
        return summary


def _peak_memory() -> float:
    """Largest resident set, GiB; the system counts it in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _with_dtype(config: Config, dtype: str) -> Config:
    return config.model_copy(update={"backend": config.backend.model_copy(update={"dtype": dtype})})
