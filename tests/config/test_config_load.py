"""Reading, precedence, overrides, and several faults at once."""

from pathlib import Path

import pytest

from moeport.config import Config, config_from_dict, load_config
from moeport.config.yaml_text import plain_scalar
from moeport.errors import ConfigError
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.switch import SwitchConfig
from moeport.routers.topk import TopKConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert load_config(path) != Config()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Load a text, with overrides, as the file c.yaml."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str, *overrides: str) -> Config:
        Path("c.yaml").write_text(text)
        return load_config("c.yaml", overrides)

    return load_text


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}", "\ufeff"])
def test_empty_file_is_the_default(load, text):
    assert load(text) == Config()


def test_no_file_is_the_default():
    assert load_config(None) == Config()


def test_override_wins_over_file_over_default(load):
    config = load("training: {steps: 20, batch_size: 32}\n", "training.steps=30")
    assert (config.training.steps, config.training.batch_size, config.training.seed) == (30, 32, 0)


def test_later_override_wins(load):
    assert load("", "training.steps=3", "training.steps=4").training.steps == 4


def test_override_values_are_yaml(load):
    config = load(
        "data: {source: {name: files, paths: [a.txt]}}\n",
        "data.source.paths=[b.txt, 'c d.txt']",
        "optimizer.clip_norm=null",
        "optimizer.learning_rate=3e-4",
        "run.dir=runs/a=b",
    )
    assert config.data.source.paths == ("b.txt", "c d.txt")
    assert config.optimizer.clip_norm is None
    assert config.optimizer.learning_rate == 3e-4
    assert config.run.dir == Path("runs/a=b")


def test_mapping_override_merges(load):
    config = load(
        "optimizer: {learning_rate: 1e-2, schedule: {warmup_steps: 7}}\n",
        "optimizer={beta1: 0.8, schedule: {final_fraction: 0.1}}",
    )
    assert (config.optimizer.learning_rate, config.optimizer.beta1) == (1e-2, 0.8)
    assert (config.optimizer.schedule.warmup_steps, config.optimizer.schedule.final_fraction) == (7, 0.1)


class TestChoice:
    FILE = "model: {moe: {router: {name: sigmoid_bias, top_k: 4, bias_update_rate: 0.5}}}\n"

    def test_new_name_drops_what_the_new_choice_lacks(self, load):
        assert load(self.FILE, "model.moe.router.name=topk").model.moe.router == TopKConfig(top_k=4)
        assert load(self.FILE, "model.moe.router={name: switch}").model.moe.router == SwitchConfig()

    def test_same_name_keeps_the_options(self, load):
        router = load(self.FILE, "model.moe.router.name=sigmoid_bias").model.moe.router
        assert router == SigmoidBiasConfig(top_k=4, bias_update_rate=0.5)

    def test_options_of_the_override_are_not_dropped(self, load):
        with pytest.raises(ConfigError, match="bias_update_rate: is an option of sigmoid_bias, not of topk"):
            load(self.FILE, "model.moe.router.bias_update_rate=2", "model.moe.router.name=topk")

    def test_override_needs_no_name(self, load):
        assert load("", "model.moe.router.top_k=3").model.moe.router == TopKConfig(top_k=3)
        assert load(self.FILE, "model.moe.router.top_k=3").model.moe.router.top_k == 3

    def test_override_drops_options_without_effect(self, load):
        file = "model: {moe: {capacity: {policy: factor, factor: 2.0}}}\n"
        capacity = load(file, "model.moe.capacity.policy=dropless").model.moe.capacity
        assert (capacity.policy, capacity.factor) == ("dropless", 1.25)
        file = "optimizer: {schedule: {name: wsd, decay_fraction: 0.3, final_fraction: 0.1}}\n"
        schedule = load(file, "optimizer.schedule.name=cosine").optimizer.schedule
        assert (schedule.decay_fraction, schedule.final_fraction) == (0.2, 0.1)


def test_anchors_and_merge_keys(load):
    config = load("model: {num_layers: &layers 2, moe: {num_experts: *layers}}\n")
    assert config.model.moe.num_experts == 2
    config = load(
        """
data:
  tokenizer:
    <<: [{name: byte}, {name: bpe}]
"""
    )
    assert config.data.tokenizer.name == "byte"


def test_merge_key_yields_to_the_keys_beside_it(load):
    training = load("training: {<<: {steps: 5, seed: 6}, seed: 7}\n").training
    assert (training.steps, training.seed) == (5, 7)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("3E5", 3e5),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("-7", -7),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1e", "1e"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("Yes", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("inf", "inf"),
    ],
)
def test_plain_scalars(text, value):
    assert plain_scalar(text) == value
    assert type(plain_scalar(text)) is type(value)


def test_faults_come_together_in_reading_order(load):
    with pytest.raises(ConfigError) as error:
        load(
            """\
training:
  gradient_accumulation: 5
  stepz: 10
  seed: -1
model:
  d_model: "256"
  moe:
    num_experts: 4
    router: {name: topk, top_k: 8, bias_update_rate: 2}
backend:
  name: numpy
  dtype: bfloat16
model:
""",
            "optimizer.lr=1",
            "metrics.report=7",
            "nothing",
        )
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [
        "c.yaml:2:26 training.gradient_accumulation",
        "c.yaml:3:3 training.stepz",
        "c.yaml:4:9 training.seed",
        "c.yaml:12:10 backend.dtype",
        "c.yaml:13:1 model",
        "--set optimizer.lr=1 optimizer.lr",
        "--set metrics.report=7 metrics.report",
        "--set nothing",
    ]


def test_type_errors_and_rules_come_together(load):
    with pytest.raises(ConfigError) as error:
        load(
            """\
model:
  d_model: wide
  attention: {num_heads: 6, num_kv_heads: 4}
  moe:
    num_experts: 4
    router: {name: topk, top_k: 8, bias_update_rate: 2}
"""
        )
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [
        "c.yaml:2:12 model.d_model",
        "c.yaml:3:43 model.attention.num_kv_heads",
        "c.yaml:6:33 model.moe.router.top_k",
        "c.yaml:6:36 model.moe.router.bias_update_rate",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "model: {d_model: x, attention: {num_heads: 6}}",
        "model: {d_modle: 384, attention: {num_heads: 6}}",
        "model: {vocab_size: 10}\ndata: {tokenizer: {name: word}}",
        "model: {vocab_size: 10}\ndata: {tokenizer: {name: file}}",
        "model: {vocab_size: 10}\ndata: {tokenizer: 3}",
        "training: {batch_size: 4, batch_size: 6, gradient_accumulation: 4}",
    ],
)
def test_rules_ignore_faulty_keys(load, text):
    with pytest.raises(ConfigError) as error:
        load(text)
    assert len(str(error.value).splitlines()) == 1


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^c\.yaml: no such file; expected a YAML file$"):
        load_config("c.yaml")


def test_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"^c\.yaml: is a folder; expected a YAML file$"):
        load_config(Path("c.yaml"))


def test_not_utf8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_bytes("run:\n  dir: é\n".encode() + b"# \xe9\n")
    with pytest.raises(ConfigError, match=r"^c\.yaml:3:3: byte 0xe9 is not UTF-8; expected text in UTF-8$"):
        load_config("c.yaml")


class TestFromDict:
    def test_values(self):
        config = config_from_dict({"training": {"steps": 3}, "run": {"dir": Path("a")}})
        assert (config.training.steps, config.run.dir) == (3, Path("a"))

    def test_dumps_load_back(self):
        config = load_config(None, ["model.moe.router.name=gshard", "data.source={name: files, paths: [a]}"])
        assert config_from_dict(config.model_dump()) == config
        assert config_from_dict(config.model_dump(mode="json")) == config

    def test_message_has_no_place(self):
        with pytest.raises(ConfigError) as error:
            config_from_dict({"training": {"steps": "3", "batch_size": 3, "gradient_accumulation": 2}})
        assert str(error.value) == (
            "training.steps: is a string (got 3); expected an integer of at least 1; did you mean 3?\n"
            "training.gradient_accumulation: does not divide training.batch_size = 3 (got 2); expected a divisor of 3"
        )


def test_rotary_bases_may_be_a_list_or_null(tmp_path):
    """In files, dictionaries and overrides; a choice of another kind drops what the list was."""
    heads, whole = "model.attention.num_heads=2", {"kind": "list", "values": [2.0, 3.0]}
    (tmp_path / "c.yaml").write_text("model: {attention: {num_heads: 2, rope_bases: [2, 3]}}\n")
    configs = [
        load_config(tmp_path / "c.yaml"),
        load_config(None, [heads, "model.attention.rope_bases=[2, 3]"]),
        config_from_dict({"model": {"attention": {"num_heads": 2, "rope_bases": [2, 3]}}}),
        config_from_dict({"model": {"attention": {"num_heads": 2, "rope_bases": whole}}}),
    ]
    assert all(config == configs[0] for config in configs)
    assert configs[0].model.attention.rope_bases.values == (2, 3)
    default = load_config(None, [heads])
    assert load_config(tmp_path / "c.yaml", ["model.attention.rope_bases=null"]) == default
    assert load_config(tmp_path / "c.yaml", ["model.attention.rope_bases.kind=none"]) == default
    assert load_config(tmp_path / "c.yaml", ["model.attention.rope_bases.kind=uniform"]).model != configs[0].model
