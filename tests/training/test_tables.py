"""Tables of vocabulary ids in a run: made from the training text, kept in the checkpoint, trained by nobody."""

import numpy as np
import pytest
from rich.console import Console

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.errors import CheckpointError
from moeport.model.decoder import DecoderLM
from moeport.routers import BY_NAME
from moeport.training.checkpoint import list_checkpoints
from moeport.training.run import train
from tests.backends.models import training_model
from tests.model.models import batch_of, model_config
from tests.training.test_run import contents, last, stop_after
from tests.training.tiny import tiny_config
from tests.training.whole import load_checkpoint

QUIET = Console(quiet=True)
TABLES = {"hash": "experts", "rre": "experts", "random": "experts", "maskmoe": "visible"}


def config_of(folder, router, backend="torch", **sections):
    if backend == "mindspore":
        pytest.importorskip("mindspore")
    moe = {"moe": {"router": {"name": router}}}
    values = {"name": backend, "dtype": "float32", "compile": False}
    return tiny_config(folder, model=moe, backend=values, **sections)


def tables(params):
    return {name: value for name, value in params.items() if name.rpartition(".")[2] in TABLES.values()}


def token_counts(folder):
    """Bytes of the training files, and the end-of-text id around and between them."""
    counts = np.bincount(np.frombuffer(b"".join(p.read_bytes() for p in folder.glob("[0-4].txt")), np.uint8))
    return np.concatenate([counts, np.zeros(256 - len(counts), np.int64), [6]])


def test_these_routers_have_tables():
    assert set(TABLES) == {name for name, router in BY_NAME.items() if router.config_class.needs_token_ids}


@pytest.mark.parametrize(("router", "backend"), [*((name, "torch") for name in TABLES), ("hash", "mindspore")])
def test_a_table_follows_the_training_text_and_stays(tmp_path, router, backend):
    config = config_of(tmp_path, router, backend, optimizer={"weight_decay": 0.5})
    train(config, console=QUIET)
    checkpoints = [load_checkpoint(path) for path in list_checkpoints(config.run.dir / "checkpoints")]
    specs = DecoderLM(config.model, 257).parameter_specs()
    counts = token_counts(tmp_path / "text")
    want = tables(initial_parameters(specs, config.training.seed, lambda: counts))
    assert [name.split(".")[1] for name in want] == ["0", "1"]
    for checkpoint in checkpoints:
        found = tables(checkpoint.model)
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert found[name].dtype == np.float32
            assert found[name].tobytes() == value.tobytes()
        assert not tables({name.partition(".")[2]: value for name, value in checkpoint.optimizer.items()})
    if router in ("hash", "maskmoe"):
        alike = tables(initial_parameters(specs, config.training.seed))
        assert all(alike[name].tobytes() != value.tobytes() for name, value in want.items())


@pytest.mark.parametrize(
    ("router", "backend"),
    [
        *((name, "torch") for name in TABLES),
        pytest.param("random", "mindspore", marks=pytest.mark.slow),  # both passes, three times
    ],
)
def test_resume_repeats_the_run_and_takes_the_table_from_the_checkpoint(tmp_path, router, backend):
    config = config_of(tmp_path, router, backend, training={"gradient_accumulation": 2})
    train(config, console=QUIET)
    whole = contents(last(config))
    stop_after(config, 2)
    train(config, resume=True, console=QUIET)
    assert contents(last(config)) == whole


def test_other_text_is_refused_rather_than_given_another_table(tmp_path):
    config = config_of(tmp_path, "hash")
    train(config, console=QUIET)
    stop_after(config, 2)
    before = contents(last(config))
    (tmp_path / "text" / "0.txt").write_text("quite another text " * 100)
    with pytest.raises(CheckpointError, match="was trained on other text"):
        train(config, resume=True, console=QUIET)
    assert contents(last(config)) == before
    other = config_of(tmp_path, "hash", run={"dir": str(tmp_path / "other")})
    train(other, console=QUIET)
    first, second = (tables(load_checkpoint(last(c)).model) for c in (config, other))
    assert all(first[name].tobytes() != second[name].tobytes() for name in first)


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_the_optimiser_and_the_gradient_norm_do_not_see_tables(backend):
    if backend == "mindspore":
        pytest.importorskip("mindspore")
    lm = DecoderLM(model_config("maskmoe"), 11)
    params = initial_parameters(lm.parameter_specs(), 0)
    made = get_backend(BackendConfig(name=backend, device="cpu", dtype="float32", compile=False))
    model = made.training_model(lm, params, TrainingOptions(OptimizerConfig(weight_decay=0.5)))
    model.accumulate(batch_of(lm), 1.0)
    gradients = model.gradients()
    assert not tables(gradients)
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values()))
    got = model.gradient_norm()
    assert float(made.ops.to_numpy(got)) == pytest.approx(norm, rel=1e-5)
    model.step(0.1, got)
    assert not tables({name.partition(".")[2]: value for name, value in model.optimizer_state().items()})
    for name, value in tables(params).items():
        assert model.parameters([name])[name].tobytes() == value.tobytes()


def test_no_table_is_fetched_after_a_step():
    """What the trainer reads and writes back after each step is the state that routers move, of which tables are no
    part.
    """
    lm = training_model(model_config("maskmoe")).model
    assert lm.router_state_names() == []
    names = [spec.name for spec in lm.parameter_specs() if not spec.trainable]
    assert names == ["layers.0.moe.router.visible", "layers.1.moe.router.visible"]
    assert lm.updated_state({}, np.zeros((2, 4)), np.zeros((2, 3, 4))) == {}
