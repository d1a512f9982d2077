"""Configs of other frameworks: what becomes of each key, what is refused, and whether the result trains."""

import json
import textwrap

import pytest
import yaml
from typer.testing import CliRunner

from moeport.cli.main import app
from moeport.config import config_from_dict, load_config
from moeport.config.keys import walk
from moeport.config.model import CapacityConfig, LoadBalanceConfig
from moeport.convert.family import FAMILIES
from moeport.convert.translate import megatron, mindformers, torchtitan
from moeport.convert.translate.files import read_options
from moeport.convert.translate.megatron import dense_layers
from moeport.convert.translate.translate import FRAMEWORKS, translate
from moeport.errors import UserError
from moeport.routers.forced import ForcedBalanceConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.topk import TopKConfig

MEGATRON = r"""
#!/bin/bash
# A model with a dense block at the start; don't run it as it is.
LAYERS=11
FIRST_DENSE=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes ${NNODES:-1}
)
MODEL_ARGS=(
    --use-mcore-models
    --num-layers $((LAYERS + FIRST_DENSE))
    --hidden-size 1024   # the width
    --ffn-hidden-size 4096
    --num-attention-heads 16
    --group-query-attention
    --num-query-groups 4
    --kv-channels 64
    --qk-layernorm
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --position-embedding-type rope
    --rotary-base 1000000
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --vocab-size 32000
    --seq-length 4096
    --max-position-embeddings 4096
    --attention-dropout 0.0
    --hidden-dropout 0.0
)
MOE_ARGS=(
    --num-experts 64
    --moe-ffn-hidden-size 512
    --moe-router-topk 8
    --moe-layer-freq "'([0]*${FIRST_DENSE}+[1]*${LAYERS})'"
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-z-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
    --moe-shared-expert-intermediate-size 1024
)
TRAINING_ARGS="
    --micro-batch-size 1
    --global-batch-size 256
    --train-iters 5000
    --lr 3.0e-4 --min-lr 3.0e-5
    --lr-decay-style cosine
    --lr-warmup-fraction 0.04
    --weight-decay 0.1
    --adam-beta2 0.95
    --bf16
"
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py ${MODEL_ARGS[@]} \
    --expert-model-parallel-size 8 --data-path $DATA_PATH
"""

TORCHTITAN = """
[job]
dump_folder = "./outputs"

[model]
name = "qwen3"
flavor = "debugmodel_moe"
hf_assets_path = "./tests/assets/tokenizer"

[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 2

[training]
local_batch_size = 4
seq_len = 4096
max_norm = 1.0
steps = 10
dataset = "c4_test"

[parallelism]
data_parallel_shard_degree = -1
expert_parallel_degree = 2

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[compile]
enable = false
"""

MINDFORMERS = """
seed: 7
output_dir: './output'
run_mode: 'train'
runner_config: {epochs: 2, batch_size: 2, sink_mode: True}
optimizer: {type: AdamW, betas: [0.9, 0.95], eps: 1.e-8, weight_decay: 0.01}
lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 1.e-4, lr_end: 1.e-5, warmup_ratio: 0.1, total_steps: 1000}
moe_config:
  expert_num: 8
  capacity_factor: 1.5
  aux_loss_factor: 0.05
  num_experts_chosen: 2
  routing_policy: "TopkRouterV2"
  enable_sdrop: True
  router_dense_type: "float32"
train_dataset: &train_dataset
  data_loader: {type: MindDataset, dataset_dir: "/data/wiki4096.mindrecord", shuffle: True}
  input_columns: ["input_ids"]
train_dataset_task: {type: CausalLanguageModelDataset, dataset_config: *train_dataset}
parallel: {parallel_mode: 1, full_batch: True}
parallel_config: {data_parallel: 8, model_parallel: 1, expert_parallel: 4, pipeline_stage: 2, micro_batch_num: 4}
recompute_config: {recompute: True}
context: {mode: 0, device_target: "Ascend"}
model:
  model_config:
    type: LlamaConfig
    seq_length: 4096
    hidden_size: 512
    intermediate_size: 1024
    theta: 1000000
    num_layers: 4
    num_heads: 8
    n_kv_heads: 2
    vocab_size: 32000
    rms_norm_eps: 1.0e-5
    compute_dtype: "bfloat16"
    use_flash_attention: True
  arch: {type: LlamaForCausalLM}
runner_wrapper: {type: MFTrainOneStepCell, use_clip_grad: True}
callbacks: [{type: MFLossMonitor}]
"""


def written(folder, name, text):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def states(found):
    return {entry.key: entry.state for entry in found.entries}


def test_megatron(tmp_path):
    found = translate("megatron", written(tmp_path, "pretrain.sh", MEGATRON))
    model = config_from_dict(found.sections).model
    assert (model.num_layers, model.d_model, model.dense_hidden, model.vocab_size) == (12, 1024, 4096, 32000)
    attention = model.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.qk_norm) == (16, 4, 64, True)
    assert (attention.rope_base, attention.bias, model.norm_eps, model.tie_embeddings) == (1e6, "none", 1e-6, False)
    moe = model.moe
    assert (moe.num_experts, moe.expert_hidden, moe.shared_width, moe.dense_layers) == (64, 512, 1024, (0,))
    assert moe.router == TopKConfig(top_k=8, softmax="after")
    assert (moe.load_balance.coefficient, moe.load_balance.scope, moe.router_z_loss) == (0.01, "sequence", 1e-3)
    sections = found.sections
    assert sections["training"] == {"batch_size": 256, "steps": 5000, "seed": 1234}
    assert sections["optimizer"] == {
        "schedule": {"name": "cosine", "final_fraction": pytest.approx(0.1), "warmup_steps": 200},
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "clip_norm": 1.0,
    }
    assert sections["parallelism"] == {"expert": 8}
    assert (model.init_std, model.embedding_std) == (0.02, None)
    assert states(found)["moe_grouped_gemm"] == "ignored"
    assert found.of("unknown") == found.of("not expressible") == []


def test_what_megatron_does_by_default_is_refused_if_moeport_does_not(tmp_path):
    """Without a word about them, Megatron takes LayerNorm, biases, learned positions and dropout."""
    path = written(
        tmp_path, "small.sh", "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 128 --lr 1"
    )
    with pytest.raises(UserError) as error:
        translate("megatron", path)
    text = str(error.value)
    for key in ("normalization = LayerNorm", "position_embedding_type = learned_absolute", "hidden_dropout = 0.1"):
        assert key in text
    assert "disable_bias_linear = false (not given, the default): moeport has no biases outside attention" in text
    found = translate("megatron", path, allow_missing=True)
    assert found.sections["model"]["tie_embeddings"]
    assert not [entry for entry in found.entries if entry.key == "hidden_dropout" and entry.given]


@pytest.mark.parametrize(
    ("options", "moe"),
    [
        ("--moe-router-topk 4 --moe-router-pre-softmax", {"router": TopKConfig(top_k=4, normalize_gates=False)}),
        (
            "--moe-router-topk 6 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
            "--moe-router-bias-update-rate 2e-3 --moe-router-num-groups 8 --moe-router-group-topk 4 "
            "--moe-router-topk-scaling-factor 2.5 --moe-router-load-balancing-type none",
            {
                "router": SigmoidBiasConfig(top_k=6, bias_update_rate=2e-3, num_groups=8, top_groups=4),
                "routed_scaling_factor": 2.5,
                "load_balance": LoadBalanceConfig(coefficient=0.0),
            },
        ),
        (
            "--moe-expert-capacity-factor 1.5 --moe-token-drop-policy position",
            {"capacity": CapacityConfig(policy="factor", factor=1.5), "router": TopKConfig(top_k=2, softmax="after")},
        ),
        (
            "--moe-shared-expert-intermediate-size 100 --moe-shared-expert-gate",
            {"num_shared_experts": 1, "shared_hidden": 100, "shared_mixing": "sigmoid"},
        ),
        ("--moe-layer-freq 2", {"dense_layers": (1, 3)}),
    ],
)
def test_experts_of_megatron(tmp_path, options, moe):
    base = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-experts 32 --moe-ffn-hidden-size 48 "
    found = translate("megatron", written(tmp_path, "x.sh", base + options), allow_missing=True)
    translated = config_from_dict(found.sections).model.moe
    assert {key: getattr(translated, key) for key in moe} == moe
    given = {each.lstrip("-").replace("-", "_") for each in options.split() if each.startswith("--")}
    assert {states(found)[key] for key in given} <= {"understood", "ignored"}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("--moe-router-load-balancing-type sinkhorn", "moe_router_load_balancing_type"),
        ("--moe-router-enable-expert-bias", "moe_router_enable_expert_bias"),
        ("--moe-layer-freq [1]*3", "moe_layer_freq"),
        ("--multi-latent-attention", "multi_latent_attention"),
        ("--lr-decay-style inverse-square-root", "lr_decay_style"),
        ("--train-iters 10 --lr 1e-3 --lr-decay-iters 5 --lr-decay-style cosine", "lr_decay_iters"),
        ("--micro-batch-size 2", "micro_batch_size"),
        ("--fp16", "fp16"),
        ("--squared-relu", "squared_relu"),
        ("--seq-length $LENGTH", "seq_length"),
        ("--train-iters $ITERS --lr-warmup-fraction 0.1", "train_iters"),
        ("--lr $LR --min-lr 1e-5", "lr"),
        ("--moe-ffn-hidden-size $F --moe-shared-expert-intermediate-size 8", "moe_ffn_hidden_size"),
        ("--lr-warmup-samples inf --global-batch-size 8", "lr_warmup_samples"),
        ("--moe-layer-freq 0", "moe_layer_freq"),
        ("--moe-layer-freq [1]*99999999999", "moe_layer_freq"),
        ("--moe-token-drop-policy random --moe-expert-capacity-factor 1", "moe_token_drop_policy"),
        ("--swiglu $SWIGLU", "swiglu"),
    ],
)
def test_what_of_megatron_cannot_be_expressed_is_named(tmp_path, options, key):
    base = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-experts 32 "
    found = translate("megatron", written(tmp_path, "x.sh", base + options), allow_missing=True)
    assert states(found)[key] == "not expressible"


def test_options_of_megatron_in_yaml(tmp_path):
    lines = ["MODEL_ARGS:"] + [f"  --{key}: {value}" for key, value in (("num-layers", 2), ("hidden-size", 64))]
    lines += ["  --num-attention-heads: 2", "  --some-switch: true"]
    found = translate("megatron", written(tmp_path, "model.yaml", "\n".join(lines)), allow_missing=True)
    assert found.sections["model"]["num_layers"] == 2
    assert states(found)["some_switch"] == "unknown"


@pytest.mark.parametrize(
    ("frequency", "dense"),
    [(1, []), (2, [1, 3]), ("([0]*1+[1]*3)", [0]), ("[0,1]*2", [0, 2]), ([1, 1, 0, 1], [2])],
)
def test_patterns_of_layers(frequency, dense):
    assert dense_layers(frequency, 4) == dense


def test_a_pattern_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="a pattern of 3 blocks for a model of 4"):
        dense_layers("[1]*3", 4)


def test_shell_scripts_are_read_as_a_shell_would(tmp_path):
    text = (
        "A=3\nB=$((A * 2 + 1))\nX=\"--three $A\n--flag\"\npython run.py --one=$B --two 'a b' $X --four $UNSET  # --no 1"
    )
    found = read_options(written(tmp_path, "x.sh", text))
    assert found == {"three": 3, "flag": True, "one": 7, "two": "a b", "four": "$UNSET"}


def test_variables_that_have_a_default_or_are_not_set(tmp_path):
    text = 'A=${A:-"2"}\nB=\n--one ${A} --two ${B:-3} --three ${C:-"x"} --four ${C} --five=$((${A:-4} * 5))'
    found = read_options(written(tmp_path, "x.sh", text))
    assert found == {"one": 2, "two": 3, "three": "x", "four": "${C}", "five": 10}


@pytest.mark.parametrize(
    ("style", "schedule"),
    [
        ("", {"name": "wsd", "decay_fraction": 0.9, "final_fraction": 0.1}),
        ("--lr-decay-style linear", {"name": "wsd", "decay_fraction": 0.9, "final_fraction": 0.1}),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 20 --lr-wsd-decay-style linear",
            {"name": "wsd", "decay_fraction": 0.2, "final_fraction": 0.1},
        ),
        ("--lr-decay-style constant", {"name": "constant"}),
    ],
)
def test_schedules_of_megatron(tmp_path, style, schedule):
    base = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --lr 1e-3 --min-lr 1e-4 --train-iters 100 "
    path = written(tmp_path, "x.sh", base + f"--lr-warmup-iters 10 {style}")
    found = translate("megatron", path, allow_missing=True)
    assert found.sections["optimizer"]["schedule"] == pytest.approx({**schedule, "warmup_steps": 10})
    assert not {"lr_decay_style", "lr_wsd_decay_style"} & {entry.key for entry in found.of("not expressible")}


def test_a_decay_of_megatron_that_is_not_linear_is_refused(tmp_path):
    path = written(tmp_path, "x.sh", "--hidden-size 64 --lr 1e-3 --train-iters 100 --lr-decay-style WSD")
    with pytest.raises(UserError, match=r"lr_wsd_decay_style = exponential \(not given, the default\): moeport"):
        translate("megatron", path)


def test_torchtitan(tmp_path):
    path = written(tmp_path, "job.toml", TORCHTITAN)
    with pytest.raises(UserError, match=r"training.local_batch_size = 4: .* give --ranks\n.*load_balance_coeff"):
        translate("torchtitan", path)
    found = translate("torchtitan", path, ranks=4, allow_missing=True)
    config = config_from_dict(found.sections)
    model, moe = config.model, config.model.moe
    assert (model.num_layers, model.d_model, model.num_heads, model.num_kv_heads, model.head_dim) == (
        8,
        256,
        16,
        8,
        128,
    )
    assert (moe.num_experts, moe.expert_hidden, moe.load_balance.coefficient) == (64, 768, 0.0)
    assert moe.router == TopKConfig(top_k=8)
    assert (config.training.batch_size, config.training.steps, config.data.sequence_length) == (16, 10, 4096)
    schedule = config.optimizer.schedule
    assert (schedule.name, schedule.warmup_steps, schedule.decay_fraction) == ("wsd", 2, pytest.approx(0.8))
    assert (config.backend.dtype, config.parallelism.expert) == ("bfloat16", 2)
    assert states(found)["training.dataset"] == "ignored"


def test_torchtitan_forces_a_balanced_load_in_benchmarks(tmp_path):
    text = TORCHTITAN + "\n[debug]\nmoe_force_load_balance = true\n"
    found = translate("torchtitan", written(tmp_path, "job.toml", text), ranks=4)
    assert config_from_dict(found.sections).model.moe.router == ForcedBalanceConfig(top_k=8)
    told = states(found)
    assert told["debug.moe_force_load_balance"] == "understood"
    assert told["model.load_balance_coeff"] == "ignored"
    dense = text.replace("debugmodel_moe", "8B").replace("expert_parallel_degree = 2", "")
    found = translate("torchtitan", written(tmp_path, "dense.toml", dense), ranks=4)
    assert states(found)["debug.moe_force_load_balance"] == "ignored"
    assert config_from_dict(found.sections).model.moe.router.name == "topk"


def test_a_model_of_torchtitan_that_moeport_lacks_is_refused(tmp_path):
    path = written(
        tmp_path, "job.toml", TORCHTITAN.replace('"qwen3"', '"deepseek_v3"').replace("debugmodel_moe", "16B")
    )
    with pytest.raises(
        UserError, match="deepseek_v3 16B is refused: multi-head latent attention is not translated; set"
    ):
        translate("torchtitan", path, ranks=1)


def test_mindformers(tmp_path):
    found = translate("mindformers", written(tmp_path, "pretrain.yaml", MINDFORMERS))
    config = config_from_dict(found.sections)
    model, moe = config.model, config.model.moe
    assert (model.num_layers, model.d_model, model.num_heads, model.num_kv_heads) == (4, 512, 8, 2)
    assert (model.init_std, model.embedding_std) == (0.02, None)
    assert (moe.num_experts, moe.expert_hidden, moe.router) == (8, 1024, TopKConfig(top_k=2))
    assert (moe.capacity.policy, moe.capacity.factor, moe.load_balance.coefficient) == ("factor", 1.5, 0.05)
    assert (config.training.batch_size, config.training.steps, config.training.seed) == (2 * 8 * 4, 1000, 7)
    assert (config.optimizer.beta2, config.optimizer.schedule.warmup_steps) == (0.95, 100)
    assert (config.backend.dtype, config.parallelism.expert) == ("bfloat16", 4)
    assert found.of("unknown") == []


def test_what_mindformers_leaves_to_the_dataset_is_said(tmp_path):
    text = MINDFORMERS.replace("total_steps: 1000", "total_steps: -1").replace(
        "num_heads: 8", "num_heads: 8\n    kv_lora_rank: 512"
    )
    with pytest.raises(UserError, match=r"set training\.steps") as error:
        translate("mindformers", written(tmp_path, "pretrain.yaml", text))
    assert "kv_lora_rank = 512: multi-head latent attention is not translated; set" in str(error.value)


HF = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def test_hf(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF | {"some_new_key": 3}))
    found = translate("hf", tmp_path)
    model = config_from_dict(found.sections).model
    assert (model.num_layers, model.moe.num_experts, model.moe.router) == (2, 8, TopKConfig(top_k=2))
    known = states(found)
    assert known["some_new_key"] == "unknown"
    assert known["torch_dtype"] == "ignored"
    assert known["num_experts_per_tok"] == "understood"


def test_what_no_model_of_ours_has_is_refused_key_by_key(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF | {"attention_dropout": 0.1, "hidden_act": "gelu"}))
    with pytest.raises(UserError, match=r"2 keys cannot be expressed(.|\n)*attention_dropout(.|\n)*hidden_act"):
        translate("hf", tmp_path / "config.json")
    found = translate("hf", tmp_path / "config.json", allow_missing=True)
    assert {entry.key for entry in found.of("not expressible")} == {"attention_dropout", "hidden_act"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_defaults_of_every_family_are_translated(tmp_path, family):
    needed = {"num_experts_per_tok": 6} if family.model_type == "deepseek_v2" else {}  # its class has no default
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.model_type} | needed))
    assert translate("hf", tmp_path).sections["model"]["num_layers"] == family.defaults["num_hidden_layers"]


@pytest.mark.parametrize(
    "module", [megatron, mindformers, torchtitan], ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_every_rule_leads_to_a_key_that_exists(module):
    """A rule without a key says why."""
    known = {key.path for key in walk()}
    for key, rule in module.RULES.items():
        assert rule.path in known or (rule.why and not rule.path), key


def test_the_command_writes_a_config_that_loads_and_lists_every_key(tmp_path):
    path, out = written(tmp_path, "pretrain.yaml", MINDFORMERS + "some_new_key: 3\n"), tmp_path / "config.yaml"
    result = CliRunner().invoke(app, ["config", "from", "mindformers", str(path), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "# unknown: some_new_key = 3" in out.read_text()
    assert load_config(out).model.moe.num_experts == 8
    keys = [*FRAMEWORKS["mindformers"].read(path)]
    assert len(keys) > 50
    for key in keys:
        assert f"  {key} = " in result.stderr
    again = CliRunner().invoke(app, ["config", "from", "mindformers", str(path)])
    assert yaml.safe_load(again.stdout) == yaml.safe_load(out.read_text())


def test_keys_and_values_stay_in_their_comments(tmp_path):
    values = yaml.safe_load(MINDFORMERS) | {"a\nrun: {dir: elsewhere}": "b\u2028seed: 8", "c\x1b[2J": 1}
    found = translate("mindformers", written(tmp_path, "x.yaml", yaml.safe_dump(values)))
    assert yaml.safe_load(found.as_yaml("x\ny: 1")) == found.sections
    assert "  a run: {dir: elsewhere} = b seed: 8: not a key that moeport knows of" in "\n".join(found.as_lines())
    assert not any("\x1b" in line for line in found.as_lines())


def test_no_warm_up_needs_no_number_of_steps(tmp_path):
    text = MINDFORMERS.replace("total_steps: 1000", "total_steps: -1").replace("warmup_ratio: 0.1", "warmup_ratio: 0")
    found = translate("mindformers", written(tmp_path, "x.yaml", text), allow_missing=True)
    assert [entry.key for entry in found.of("not expressible")] == ["lr_schedule.total_steps"]
    assert found.sections["optimizer"]["schedule"]["warmup_steps"] == 0


BOMB = "a: &a [1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(6 * ['*' + last])}]\n" for last, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize("key", ["lr_schedule.learning_rate", "lr_schedule.total_steps", "optimizer.betas"])
def test_what_is_no_number_in_mindformers_is_named(tmp_path, key):
    section, _, last = key.partition(".")
    values = yaml.safe_load(MINDFORMERS)
    values[section][last] = "many"
    found = translate("mindformers", written(tmp_path, "x.yaml", yaml.safe_dump(values)), allow_missing=True)
    assert states(found)[key] == "not expressible"


@pytest.mark.parametrize(
    ("framework", "name", "text", "message"),
    [
        ("megatron", "x.sh", "A=aa\n" + "A=$A$A\n" * 40, "the value of A is longer than 1,048,576 characters"),
        ("torchtitan", "x.toml", "a = " + "[" * 5000, "nested too deeply"),
        ("mindformers", "x.yaml", "a: &a {b: *a}", "nested too deeply"),
        ("mindformers", "x.yaml", "a: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("mindformers", "x.yaml", "some: 1\nother: 2", "knows none of its 2 keys; expected a YAML file of MindFormers"),
        ("mindformers", "x.yaml", BOMB, "more than 20,000 keys and values"),
        (
            "mindformers",
            "x.yaml",
            "model: {model_config: {num_layers: x}}",
            "x.yaml: it does not translate to a valid(.|\n)*model.num_layers",
        ),
        ("megatron", "x.sh", "echo hello", "no keys found; expected a shell script"),
        ("megatron", "x.sh", "--a 'b", "no shell script: No closing quotation"),
        ("torchtitan", "x.toml", "[a", "is not valid TOML"),
        ("mindformers", "x.yaml", "a: [", "is not valid YAML"),
        ("mindformers", "x.yaml", "- a", "is not a mapping"),
        ("hf", "x.json", '{"model_type": "gpt2"}', "model_type gpt2: cannot be converted"),
        ("hf", "x.json", '{"model_type": "mixtral", "num_hidden_layers": 100000000000}', "expected at most 10000"),
        (
            "hf",
            "x.json",
            '{"model_type": "mixtral", "num_local_experts": NaN}',
            "num_local_experts is NaN; expected int",
        ),
        ("nemo", "x.yaml", "a: 1", "nemo: not a framework that can be translated; expected one of megatron"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, framework, name, text, message):
    with pytest.raises(UserError, match=message):
        translate(framework, written(tmp_path, name, text))
