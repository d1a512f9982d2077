"""Every malformed config gives its exact message, however long."""

# ruff: noqa: E501

from dataclasses import replace
from pathlib import Path

import pytest

from moeport.config import config_from_dict, load_config
from moeport.errors import ConfigError
from moeport.facts import BACKENDS
from moeport.routers import BY_NAME

WITH_TOP_K = [name for name, router in BY_NAME.items() if "top_k" in router.config_class.model_fields]


def case(name: str, text: str, message: str, *overrides: str):
    message = message.replace("<routers>", ", ".join(BY_NAME))
    message = message.replace("<routers with top_k>", f"{', '.join(WITH_TOP_K[:-1])} and {WITH_TOP_K[-1]}")
    return pytest.param(text, message, overrides, id=name)


CASES = [
    # YAML
    case(
        "flow list not closed",
        "model: {d_model: [1, 2\n",
        "c.yaml:2:1: not valid YAML: while parsing a flow sequence at 1:18, expected ',' or ']', but got '<stream end>'",
    ),
    case(
        "no colon",
        "model:\n  d_model 256\n  num_layers: 2\n",
        "c.yaml:3:13: not valid YAML: mapping values are not allowed here",
    ),
    case(
        "bad indentation",
        "model:\n  d_model: 256\n   num_layers: 2\n",
        "c.yaml:3:14: not valid YAML: mapping values are not allowed here",
    ),
    case("tab", "model:\n\td_model: 256\n", "c.yaml:2:1: not valid YAML: a tab; expected spaces"),
    case(
        "unclosed quote",
        'run:\n  dir: "runs\n',
        "c.yaml:3:1: not valid YAML: while scanning a quoted scalar at 2:8, found unexpected end of stream",
    ),
    case("undefined alias", "training:\n  seed: *seed\n", "c.yaml:2:9: not valid YAML: found undefined alias 'seed'"),
    case(
        "two documents",
        "training:\n  seed: 1\n---\ntraining:\n  seed: 2\n",
        "c.yaml:3:1: not valid YAML: expected a single document in the stream at 1:1, but found another document",
    ),
    case("control character", "run:\n  dir: a\0b\n", "c.yaml:2:9: not valid YAML: the character U+0000 is not allowed"),
    case(
        "tag",
        "run:\n  dir: !!python/object:os.system x\n",
        "c.yaml:2:8 run.dir: the tag tag:yaml.org,2002:python/object:os.system is not allowed",
    ),
    case(
        "duplicate key",
        "training:\n  steps: 10\n  seed: 1\n  steps: 20\n",
        "c.yaml:4:3 training.steps: given twice, first at c.yaml:2:3; expected each key once",
    ),
    case(
        "duplicate section",
        "training:\n  steps: 10\ntraining:\n  seed: 3\n",
        "c.yaml:3:1 training: given twice, first at c.yaml:1:1; expected each key once",
    ),
    case(
        "merge of a scalar",
        "training:\n  <<: 3\n",
        "c.yaml:2:7 training: << merges something else; expected a mapping or a list of mappings",
    ),
    case(
        "key that is a list",
        "training:\n  ? [a]\n  : 3\n",
        "c.yaml:2:5 training: has a key that is no string",
    ),
    case("value that contains itself", "data: &d\n  source: *d\n", "c.yaml:1:7 data.source: contains itself"),
    case(
        "nested too deeply",
        "data:\n  cache_dir: " + "[" * 40 + "]" * 40 + "\n",
        "c.yaml:2:45 data.cache_dir[0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0][0]: nested too deeply",
    ),
    case("nested far too deeply", "data: " + "[" * 6000 + "\n", "c.yaml: not valid YAML: nested too deeply"),
    case("lone surrogate", 'run:\n  dir: "\\ud800"\n', "c.yaml:2:8 run.dir: is not valid Unicode"),
    case(
        "list at the top", "- model\n", "c.yaml:1:1: the top level is not a mapping; expected sections, as in `model:`"
    ),
    case(
        "string at the top",
        "model\n",
        "c.yaml:1:1: the top level is not a mapping (got model); expected sections, as in `model:`",
    ),
    # sections
    case("section is a list", "training: [1, 2]\n", "c.yaml:1:11 training: is a list (got [1, 2]); expected a mapping"),
    case("section is empty", "model:\ntraining:\n  seed: 1\n", "c.yaml:1:7 model: is null; expected a mapping"),
    case(
        "section is a string",
        "backend: numpy\n",
        "c.yaml:1:10 backend: is a string (got numpy); expected a mapping; did you mean backend.name: numpy?",
    ),
    # types
    case(
        "quoted integer",
        'model:\n  d_model: "256"\n',
        'c.yaml:2:12 model.d_model: is a string (got "256"); expected an integer of at least 1; did you mean 256?',
    ),
    case(
        "word for integer",
        "model:\n  d_model: wide\n",
        "c.yaml:2:12 model.d_model: is a string (got wide); expected an integer of at least 1",
    ),
    case(
        "float for integer",
        "training:\n  steps: 1e3\n",
        "c.yaml:2:10 training.steps: is a float (got 1e3); expected an integer of at least 1; did you mean 1000?",
    ),
    case(
        "fraction for integer",
        "training:\n  steps: 2.5\n",
        "c.yaml:2:10 training.steps: is a float (got 2.5); expected an integer of at least 1",
    ),
    case(
        "leading zero",
        "training:\n  seed: 010\n",
        "c.yaml:2:9 training.seed: is a string (got 010); expected an integer of at least 0",
    ),
    case(
        "boolean for integer",
        "model:\n  num_layers: yes\n",
        "c.yaml:2:15 model.num_layers: is a boolean (got yes); expected an integer of at least 1 and at most 10000",
    ),
    case(
        "list for integer",
        "model:\n  num_layers: [4]\n",
        "c.yaml:2:15 model.num_layers: is a list (got [4]); expected an integer of at least 1 and at most 10000",
    ),
    case(
        "mapping for integer",
        "model:\n  num_layers:\n    count: 4\n",
        "c.yaml:3:5 model.num_layers: is a mapping; expected an integer of at least 1 and at most 10000",
    ),
    case(
        "null for integer",
        "model:\n  d_model:\n",
        "c.yaml:2:11 model.d_model: is null; expected an integer of at least 1",
    ),
    case(
        "quoted float",
        'optimizer:\n  learning_rate: "3e-4"\n',
        'c.yaml:2:18 optimizer.learning_rate: is a string (got "3e-4"); expected a number above 0; did you mean 3e-4?',
    ),
    case(
        "integer for boolean",
        "model:\n  tie_embeddings: 1\n",
        "c.yaml:2:19 model.tie_embeddings: is an integer (got 1); expected true or false",
    ),
    case(
        "quoted boolean",
        "model:\n  tie_embeddings: 'no'\n",
        "c.yaml:2:19 model.tie_embeddings: is a string (got 'no'); expected true or false; did you mean no?",
    ),
    case(
        "boolean for string",
        "data:\n  source: {name: huggingface, dataset: no}\n",
        'c.yaml:2:40 data.source.dataset: is a boolean (got no); expected a string; did you mean "no"?',
    ),
    case(
        "integer for path",
        "run:\n  dir: 7\n",
        'c.yaml:2:8 run.dir: is an integer (got 7); expected a path; did you mean "7"?',
    ),
    case(
        "integer in a list of strings",
        "data:\n  source:\n    name: files\n    paths:\n      - a.txt\n      - 3\n",
        'c.yaml:6:9 data.source.paths[1]: is an integer (got 3); expected a string; did you mean "3"?',
    ),
    case(
        "string for a list",
        "data:\n  source: {name: files, paths: a.txt}\n",
        "c.yaml:2:32 data.source.paths: is a string (got a.txt); expected a list of strings, at least 1",
    ),
    case(
        "empty list",
        "data:\n  source: {name: files, paths: []}\n",
        "c.yaml:2:32 data.source.paths: is too short (got []); expected a list of strings, at least 1",
    ),
    # ranges
    case(
        "zero",
        "training:\n  steps: 0\n",
        "c.yaml:2:10 training.steps: is out of range (got 0); expected an integer of at least 1",
    ),
    case(
        "negative",
        "optimizer:\n  weight_decay: -0.1\n",
        "c.yaml:2:17 optimizer.weight_decay: is out of range (got -0.1); expected a number of at least 0",
    ),
    case(
        "above one",
        "optimizer:\n  schedule: {name: wsd, decay_fraction: 1.5}\n",
        "c.yaml:2:41 optimizer.schedule.decay_fraction: is out of range (got 1.5); expected a number of at least 0 and at most 1",
    ),
    case(
        "at an open bound",
        "optimizer:\n  beta2: 1.0\n",
        "c.yaml:2:10 optimizer.beta2: is out of range (got 1.0); expected a number of at least 0 and below 1",
    ),
    case(
        "small vocabulary",
        "data:\n  tokenizer: {name: bpe, vocab_size: 100}\n",
        "c.yaml:2:38 data.tokenizer.vocab_size: is out of range (got 100); expected an integer of at least 257",
    ),
    case(
        "infinity",
        "optimizer:\n  learning_rate: .inf\n",
        "c.yaml:2:18 optimizer.learning_rate: is not a finite number of 64 bits (got .inf); expected a number above 0",
    ),
    case(
        "not a number",
        "model:\n  norm_eps: .nan\n",
        "c.yaml:2:13 model.norm_eps: is not a finite number of 64 bits (got .nan); expected a number above 0",
    ),
    case(
        "integer over 64 bits",
        "training:\n  seed: 9223372036854775808\n",
        "c.yaml:2:9 training.seed: is not a finite number of 64 bits (got 9223372036854775808); expected an integer of at least 0",
    ),
    case(
        "integer of thousands of digits",
        "training:\n  seed: " + "9" * 5000 + "\n",
        "c.yaml:2:9 training.seed: is not a finite number of 64 bits (got 999999999999999999999999999999999999999999999999999999999...); expected an integer of at least 0",
    ),
    case(
        "float over 64 bits",
        "optimizer:\n  learning_rate: 1e999\n",
        "c.yaml:2:18 optimizer.learning_rate: is not a finite number of 64 bits (got 1e999); expected a number above 0",
    ),
    # choices
    case(
        "unknown choice",
        "backend:\n  dtype: float16\n",
        "c.yaml:2:10 backend.dtype: is not a choice (got float16); expected one of auto, float32, bfloat16, float64; did you mean bfloat16?",
    ),
    case(
        "unknown choice, alias",
        "backend:\n  device: gpu\n",
        "c.yaml:2:11 backend.device: is not a choice (got gpu); expected one of auto, cpu, cuda, npu; did you mean cuda?",
    ),
    case(
        "an optimiser that there is not",
        "optimizer:\n  name: lion\n",
        "c.yaml:2:9 optimizer.name: is not a choice (got lion); expected one of adamw, muon, adafactor",
    ),
    case(
        "boolean for a choice",
        "backend:\n  device: off\n",
        "c.yaml:2:11 backend.device: is a boolean (got off); expected one of auto, cpu, cuda, npu",
    ),
    case(
        "unknown router",
        "model:\n  moe:\n    router: {name: top_k, top_k: 2}\n",
        "c.yaml:3:20 model.moe.router.name: is not a choice (got top_k); expected one of <routers>; did you mean topk?",
    ),
    case(
        "missing name",
        "model:\n  moe:\n    router:\n      top_k: 2\n",
        "c.yaml:3:5 model.moe.router.name: is missing; expected one of <routers>",
    ),
    case(
        "null name",
        "data:\n  source:\n    name:\n",
        "c.yaml:3:10 data.source.name: is null; expected one of stdlib, files, huggingface, digits",
    ),
    case(
        "name without its section",
        "data:\n  tokenizer: bpe\n",
        "c.yaml:2:14 data.tokenizer: is a string (got bpe); expected a mapping with a name: byte, bpe, scaffold_bpe, lbpe, file; did you mean data.tokenizer.name: bpe?",
    ),
    case(
        "option of another router",
        "model:\n  moe:\n    router:\n      name: topk\n      bias_update_rate: 2\n",
        "c.yaml:5:7 model.moe.router.bias_update_rate: is an option of sigmoid_bias, not of topk",
    ),
    case(
        "option of two others",
        "model:\n  moe:\n    router: {name: switch, top_k: 2}\n",
        "c.yaml:3:28 model.moe.router.top_k: is an option of <routers with top_k>, not of switch",
    ),
    case(
        "missing option",
        "data:\n  source:\n    name: files\n",
        "c.yaml:2:3 data.source.paths: is missing; expected a list of strings, at least 1",
    ),
    # unknown keys
    case(
        "typing error", "model:\n  d_modle: 256\n", "c.yaml:2:3 model.d_modle: unknown key; did you mean model.d_model?"
    ),
    case("typing error in a section", "modle:\n  d_model: 256\n", "c.yaml:1:1 modle: unknown key; did you mean model?"),
    case(
        "key of another section",
        "training:\n  learning_rate: 3e-4\n",
        "c.yaml:2:3 training.learning_rate: unknown key; did you mean optimizer.learning_rate?",
    ),
    case(
        "alias", "training:\n  lr: 3e-4\n", "c.yaml:2:3 training.lr: unknown key; did you mean optimizer.learning_rate?"
    ),
    case(
        "hugging face names",
        "model:\n"
        "  hidden_size: 512\n"
        "  num_hidden_layers: 4\n"
        "  num_experts_per_tok: 2\n"
        "  max_position_embeddings: 512\n",
        "c.yaml:2:3 model.hidden_size: unknown key; did you mean model.d_model?\n"
        "c.yaml:3:3 model.num_hidden_layers: unknown key; did you mean model.num_layers?\n"
        "c.yaml:4:3 model.num_experts_per_tok: unknown key; did you mean model.moe.router.top_k?\n"
        "c.yaml:5:3 model.max_position_embeddings: unknown key; did you mean data.sequence_length?",
    ),
    case(
        "megatron names",
        "moe_router_topk: 2\nexpert_model_parallel_size: 2\n",
        "c.yaml:1:1 moe_router_topk: unknown key; did you mean model.moe.router.top_k?\n"
        "c.yaml:2:1 expert_model_parallel_size: unknown key; did you mean parallelism.expert?",
    ),
    case("key at the wrong level", "d_model: 512\n", "c.yaml:1:1 d_model: unknown key; did you mean model.d_model?"),
    case(
        "misspelled choice where null is one too",
        "model:\n  moe: {shared_mixing: sofmax}\n",
        "c.yaml:2:24 model.moe.shared_mixing: is not a choice (got sofmax); expected one of add, softmax, sigmoid or null; "
        "did you mean softmax?",
    ),
    case(
        "no alternative of a value",
        "comm: {chunks: 0}\n",
        "c.yaml:1:16 comm.chunks: is out of range (got 0); expected an integer of at least 1 or auto",
    ),
    case(
        "misspelled alternative of a value",
        "comm: {chunks: aut}\n",
        "c.yaml:1:16 comm.chunks: is not a choice (got aut); expected an integer of at least 1 or auto; "
        "did you mean auto?",
    ),
    case(
        "misspelled choice of kernels",
        "backend: {kernels: defalt}\n",
        "c.yaml:1:20 backend.kernels: is not a choice (got defalt); expected one of auto, default or a mapping; did you "
        "mean default?",
    ),
    case(
        "misspelled kernel",
        "backend: {kernels: {swigglu: default}}\n",
        "c.yaml:1:20 backend.kernels: swigglu is not a kernel that can be chosen (got {swigglu: default}); expected one of "
        "routed_mlp, grouped_mlp, rms_norm, rope, attention, swiglu, permute, unpermute, adamw; did you mean swiglu?",
    ),
    case(
        "misspelled operator",
        "backend: {kernels: {swiglu: npu_swigl}}\n",
        "c.yaml:1:20 backend.kernels: backend torch has no swiglu named npu_swigl (got {swiglu: npu_swigl}); expected "
        "one of auto, default, npu_swiglu; did you mean npu_swiglu?",
    ),
    case(
        "operator of another device",
        "backend: {device: cpu, kernels: {swiglu: npu_swiglu}}\n",
        "c.yaml:1:33 backend.kernels: backend torch on the CPU has no swiglu named npu_swiglu (got {swiglu: npu_swiglu}); "
        "expected one of auto, default",
    ),
    case(
        "operator of another backend",
        "backend: {name: mindspore, device: npu, kernels: {swiglu: npu_swiglu}}\n",
        "c.yaml:1:50 backend.kernels: backend mindspore on Ascend NPUs has no swiglu named npu_swiglu (got {swiglu: "
        "npu_swiglu}); expected one of auto, default, mindspore.ops.swiglu",
    ),
    case(
        "a layer's kernel that no layer calls",
        "backend: {kernels: {routed_mlp: grouped_mm}}\nparallelism: {expert: 2}\n",
        "c.yaml:1:20 backend.kernels: names a form of routed_mlp, but with parallelism.expert = 2 tokens visit other ranks "
        "between its parts (got {routed_mlp: grouped_mm}); expected auto or default for routed_mlp; the experts are "
        "grouped_mlp there",
    ),
    case(
        "kernel without a choice",
        "backend: {kernels: {swiglu: null, rope: default}}\n",
        "c.yaml:1:29 backend.kernels.swiglu: is null; expected a string",
    ),
    case(
        "unlike any key",
        "training:\n  frobnicate: 1\n",
        "c.yaml:2:3 training.frobnicate: unknown key; expected one of steps, batch_size, gradient_accumulation, seed, start_from, evaluation_interval, evaluation_batch_size, activation_checkpointing, skip_steps",
    ),
    case(
        "number as key",
        "training:\n  8: 1\n",
        "c.yaml:2:3 training.8: unknown key; expected one of steps, batch_size, gradient_accumulation, seed, start_from, evaluation_interval, evaluation_batch_size, activation_checkpointing, skip_steps",
    ),
    case(
        "dotted key",
        "model.d_model: 512\n",
        "c.yaml:1:1 model.d_model: unknown key; expected nested sections instead of dots",
    ),
    # rules over several keys
    case(
        "heads do not divide the width",
        "model:\n  d_model: 100\n",
        "c.yaml:2:12 model.attention.num_heads: does not divide model.d_model = 100 (got 8, the default); expected a divisor of 100, or model.attention.head_dim given",
    ),
    case(
        "odd heads",
        "model:\n  d_model: 200\n",
        "c.yaml:2:12 model.d_model: makes heads of odd width with model.attention.num_heads = 8 (got 200); expected an even multiple of 8",
    ),
    case(
        "odd head_dim",
        "model:\n  attention: {head_dim: 33}\n",
        "c.yaml:2:25 model.attention.head_dim: is odd (got 33); expected an even number, since rotary embedding rotates pairs",
    ),
    case(
        "kv heads",
        "model:\n  attention: {num_heads: 8, num_kv_heads: 3}\n",
        "c.yaml:2:43 model.attention.num_kv_heads: does not divide model.attention.num_heads = 8 (got 3); expected a divisor of 8",
    ),
    case(
        "accumulation",
        "training:\n  batch_size: 16\n  gradient_accumulation: 3\n",
        "c.yaml:3:26 training.gradient_accumulation: does not divide training.batch_size = 16 (got 3); expected a divisor of 16",
    ),
    case(
        "mindspore on a GPU",
        "backend: {name: mindspore, device: cuda}\n",
        "c.yaml:1:36 backend.device: backend mindspore does not run on NVIDIA GPUs (got cuda); "
        "expected auto, cpu or npu; or backend.name torch",
    ),
    case(
        "mindspore in bfloat16 on the CPU",
        "backend: {name: mindspore, device: cpu, dtype: bfloat16}\n",
        "c.yaml:1:48 backend.dtype: backend mindspore has no bfloat16 on the CPU (got bfloat16); "
        "expected auto, float32 or float64",
    ),
    case(
        "recomputation on mindspore",
        "training: {activation_checkpointing: true}\nbackend: {name: mindspore}\n",
        "c.yaml:1:38 training.activation_checkpointing: backend mindspore cannot recompute activations (got true); "
        "expected false",
    ),
    case(
        "first_dense",
        "model:\n  num_layers: 2\n  moe:\n    first_dense: 2\n",
        "c.yaml:4:18 model.moe.first_dense: leaves no block with experts (got 2); expected less than model.num_layers (2)",
    ),
    case(
        "every",
        "model:\n  moe:\n    every: 5\n",
        "c.yaml:3:12 model.moe.every: leaves no block with experts (got 5); expected at most model.num_layers (4) - model.moe.first_dense (0)",
    ),
    case(
        "waves of llama3 the wrong way round",
        "model:\n  attention:\n    rope_scaling: {type: llama3, factor: 8.0, high_freq_factor: 0.5}\n",
        "c.yaml:3:65 model.attention.rope_scaling.high_freq_factor: is not above model.attention.rope_scaling.low_freq_factor = 1.0 (got 0.5); expected a number above 1.0",
    ),
    case(
        "the ramp of yarn the wrong way round",
        "model:\n  attention:\n    rope_scaling: {type: yarn, factor: 8.0, beta_fast: 0.5}\n",
        "c.yaml:3:56 model.attention.rope_scaling.beta_fast: is below model.attention.rope_scaling.beta_slow = 1.0 (got 0.5); expected at least 1.0",
    ),
    case(
        "a scale without scaled positions",
        "model:\n  attention:\n    rope_scaling: {factor: 8.0}\n",
        "c.yaml:3:28 model.attention.rope_scaling.factor: has no effect while model.attention.rope_scaling.type is none (got 8.0); expected model.attention.rope_scaling.type linear or llama3 or yarn, or this key left out",
    ),
    case(
        "rotary bases for other heads",
        "model:\n  attention: {num_heads: 4, num_kv_heads: 2, rope_bases: [1e4, 2e4, 3e4]}\n",
        "c.yaml:2:58 model.attention.rope_bases.values: has 3 bases for 2 key-value heads (got [1e4, 2e4, 3e4]); expected 2, one per key-value head; the query heads that read it share its base",
    ),
    case(
        "a rotary base that is none",
        "model:\n  attention: {num_heads: 2, rope_bases: [1e4, 1]}\n",
        "c.yaml:2:47 model.attention.rope_bases.values[1]: is out of range (got 1); expected a number above 1",
    ),
    case(
        "one number for rotary bases",
        "model:\n  attention: {rope_bases: 5e5}\n",
        "c.yaml:2:27 model.attention.rope_bases: is a float (got 5e5); expected a mapping, a list of numbers above 1 or null",
    ),
    case(
        "one rotary base and several",
        "model:\n  attention: {rope_base: 500.0, rope_bases: {kind: uniform}}\n",
        "c.yaml:2:26 model.attention.rope_base: has no effect while model.attention.rope_bases.kind is uniform (got 500.0); expected model.attention.rope_bases.kind none, or this key left out",
    ),
    case(
        "rotary bases the wrong way round",
        "model:\n  attention:\n    rope_bases: {kind: uniform, high: 1e5}\n",
        "c.yaml:3:39 model.attention.rope_bases.high: is below model.attention.rope_bases.low = 1000000.0 (got 1e5); expected at least 1000000.0",
    ),
    case(
        "fewer candidates than rotary bases",
        "model:\n  attention:\n    rope_bases: {kind: peak_valley, step: 1e6}\n",
        "c.yaml:3:43 model.attention.rope_bases.step: makes 5 candidates for 8 key-value heads (got 1e6); expected a smaller one, or model.attention.rope_bases.low and model.attention.rope_bases.high further apart",
    ),
    case(
        "a search for rotary bases that would not end",
        "model:\n  attention:\n    rope_bases: {kind: peak_valley, step: 1.0}\n",
        "c.yaml:3:43 model.attention.rope_bases.step: makes 4,000,001 candidates, to be compared at model.attention.rope_bases.positions = 4,096 (got 1.0); expected a larger one, or fewer positions: at most 16,777,216 candidates times positions",
    ),
    case(
        "a search for rotary bases without peaks",
        "model:\n  attention:\n    rope_bases: {kind: peak_valley, positions: 10}\n",
        "c.yaml:3:48 model.attention.rope_bases.positions: leaves no distance with model.attention.rope_bases.spacing = 5 others on either side (got 10); expected more than 10",
    ),
    case(
        "a search for rotary bases too far away",
        "model:\n  attention:\n    rope_bases: {kind: peak_valley, first_position: 9223372036854775807}\n",
        "c.yaml:3:53 model.attention.rope_bases.first_position: is out of range (got 9223372036854775807); expected an integer of at least 0 and at most 16777216",
    ),
    case(
        "rotary bases of latent heads",
        "model:\n  attention:\n    kind: mla\n    rope_bases: {kind: uniform}\n",
        "c.yaml:4:24 model.attention.rope_bases.kind: gives heads different bases, but in multi-head latent attention all heads share the rotated part of the key (got uniform); expected none, and model.attention.rope_base",
    ),
    case(
        "latent attention of grouped heads",
        "model:\n  attention: {kind: mla, num_heads: 4, num_kv_heads: 2}\n",
        "c.yaml:2:54 model.attention.num_kv_heads: groups heads, which multi-head latent attention does not (got 2); expected 4, or this key left out",
    ),
    case(
        "latent attention with biases of queries, keys and values",
        "model:\n  attention: {kind: mla, bias: qkv}\n",
        "c.yaml:2:32 model.attention.bias: is for grouped-query attention (got qkv); expected none or all with model.attention.kind = mla",
    ),
    case(
        "a latent vector that attention does not have",
        "model:\n  attention: {kv_lora_rank: 64}\n",
        "c.yaml:2:29 model.attention.kv_lora_rank: has no effect while model.attention.kind is grouped (got 64); expected model.attention.kind mla, or this key left out",
    ),
    case(
        "a width of heads that latent attention does not have",
        "model:\n  attention: {kind: mla, head_dim: 64}\n",
        "c.yaml:2:36 model.attention.head_dim: has no effect while model.attention.kind is mla (got 64); expected model.attention.kind grouped, or this key left out",
    ),
    case(
        "an odd rotated part",
        "model:\n  attention: {kind: mla, qk_rope_head_dim: 5}\n",
        "c.yaml:2:44 model.attention.qk_rope_head_dim: is odd (got 5); expected an even number, since rotary embedding rotates pairs",
    ),
    case(
        "half of DeepSeek's YaRN",
        "model:\n  attention:\n    kind: mla\n    rope_scaling: {type: yarn, factor: 8.0, mscale: 1.0}\n",
        "c.yaml:4:53 model.attention.rope_scaling.mscale: is given without model.attention.rope_scaling.mscale_all_dim (got 1.0); expected both of them or none",
    ),
    case(
        "DeepSeek's YaRN without latent attention",
        "model:\n  attention:\n    rope_scaling: {type: yarn, factor: 8.0, mscale: 1.0, mscale_all_dim: 1.0}\n",
        "c.yaml:3:53 model.attention.rope_scaling.mscale: has no effect while model.attention.kind is grouped (got 1.0); expected model.attention.kind mla, or this key left out\nc.yaml:3:74 model.attention.rope_scaling.mscale_all_dim: has no effect while model.attention.kind is grouped (got 1.0); expected model.attention.kind mla, or this key left out",
    ),
    case(
        "a dense layer that is not there",
        "model:\n  moe:\n    dense_layers: [4]\n",
        "c.yaml:3:19 model.moe.dense_layers: names a block that the model does not have (got [4]); expected numbers below model.num_layers (4)",
    ),
    case(
        "only dense layers",
        "model:\n  moe:\n    every: 2\n    dense_layers: [1, 3]\n",
        "c.yaml:4:19 model.moe.dense_layers: leaves no block with experts (got [1, 3]); expected fewer blocks",
    ),
    case(
        "a width of shared experts that are not there",
        "model:\n  moe:\n    shared_hidden: 8\n",
        "c.yaml:3:20 model.moe.shared_hidden: is the width of shared experts, but model.moe.num_shared_experts is 0 (got 8); expected model.moe.num_shared_experts of 1 or more, or this key left out",
    ),
    case(
        "more experts per token than experts",
        "model:\n  moe:\n    num_experts: 4\n    router: {name: topk, top_k: 8}\n",
        "c.yaml:4:33 model.moe.router.top_k: more experts per token than there are (got 8); expected at most model.moe.num_experts (4)",
    ),
    case(
        "default more than experts",
        "model:\n  moe:\n    num_experts: 1\n",
        "c.yaml:3:18 model.moe.router.top_k: more experts per token than there are (got 2, the default); expected at most model.moe.num_experts (1)",
    ),
    case(
        "groups",
        "model:\n  moe:\n    router: {name: sigmoid_bias, num_groups: 3}\n",
        "c.yaml:3:46 model.moe.router.num_groups: does not divide the experts (got 3); expected a divisor of model.moe.num_experts (8)",
    ),
    case(
        "top_groups",
        "model:\n  moe:\n    router: {name: sigmoid_bias, num_groups: 2, top_groups: 4}\n",
        "c.yaml:3:61 model.moe.router.top_groups: more groups than there are (got 4); expected at most num_groups (2)",
    ),
    case(
        "top_k over its groups",
        "model:\n  moe:\n    router: {name: sigmoid_bias, num_groups: 8}\n",
        "c.yaml:3:5 model.moe.router.top_k: more experts per token than its groups hold (got 2, the default); expected at most 1",
    ),
    case(
        "gshard with one expert",
        "model:\n  moe: {num_experts: 1, router: {name: gshard}}\n",
        "c.yaml:2:40 model.moe.router.name: gshard sends each token to 2 experts (got gshard); expected model.moe.num_experts of at least 2",
    ),
    case(
        "threshold",
        "model:\n  moe:\n    router: {name: top_p, threshold: 1.5}\n",
        "c.yaml:3:38 model.moe.router.threshold: is out of range (got 1.5); expected a number above 0.0 and at most 1.0",
    ),
    case(
        "null experts",
        "model:\n  moe:\n    router: {name: adamoe, null_experts: 0}\n",
        "c.yaml:3:42 model.moe.router.null_experts: is out of range (got 0); expected an integer of at least 1",
    ),
    case(
        "routing_dim and temperature",
        "model:\n  moe:\n    router: {name: xmoe, routing_dim: 0, initial_temperature: 0}\n",
        "c.yaml:3:39 model.moe.router.routing_dim: is out of range (got 0); expected an integer of at least 1\n"
        "c.yaml:3:63 model.moe.router.initial_temperature: is out of range (got 0); expected a number above 0",
    ),
    case(
        "choices of adamoe",
        "model:\n  moe: {num_experts: 2, router: {name: adamoe}}\n",
        "c.yaml:2:22 model.moe.router.top_k: more experts per token than there are (got 3, the default); expected at most model.moe.num_experts (2)",
    ),
    case(
        "router that looks ahead",
        "model:\n  moe:\n    router: {name: soft}\n",
        "c.yaml:3:20 model.moe.router.name: soft lets a token's routing depend on later tokens, which a language model must predict (got soft); expected a causal router, or model.moe.allow_future_tokens true to study it anyway",
    ),
    case(
        "capacity where experts choose",
        "model:\n  moe:\n    allow_future_tokens: true\n    router: {name: expert_choice}\n    capacity: {policy: factor}\n",
        "c.yaml:5:24 model.moe.capacity.policy: limits the tokens per expert, but with expert_choice every expert takes a fixed number (got factor); expected dropless",
    ),
    case(
        "load balance where the load is even",
        "model:\n  moe:\n    router: {name: base}\n    load_balance: {coefficient: 0.01}\n",
        "c.yaml:4:33 model.moe.load_balance.coefficient: weights a loss without gradient, since base loads the experts evenly by construction (got 0.01); expected 0 or null",
    ),
    case(
        "experts that choose more tokens than there are",
        "model:\n  moe:\n    allow_future_tokens: true\n    router: {name: expert_choice, mean_experts: 9}\n",
        "c.yaml:4:49 model.moe.router.mean_experts: more experts per token than there are (got 9); expected at most model.moe.num_experts (8)",
    ),
    case(
        "capacity factor without policy",
        "model:\n  moe:\n    capacity:\n      factor: 1.25\n",
        "c.yaml:4:15 model.moe.capacity.factor: has no effect while model.moe.capacity.policy is dropless (got 1.25); expected model.moe.capacity.policy factor or locmoe or locmoe_plus, or this key left out",
    ),
    case(
        "drop without capacity",
        "model:\n  moe:\n    capacity: {policy: dropless, drop: probability}\n",
        "c.yaml:3:40 model.moe.capacity.drop: has no effect while model.moe.capacity.policy is dropless (got probability); expected model.moe.capacity.policy factor or locmoe or locmoe_plus, or this key left out",
    ),
    case(
        "capacity that gives up most tokens",
        "model:\n  moe:\n    capacity: {policy: locmoe_plus, rule: controller, delta: quantile, quantile: 0.9}\n",
        "c.yaml:3:82 model.moe.capacity.quantile: is the share of an expert's own tokens that the capacity gives up: with a high one, rule controller asks for few rows because tokens are dropped, whether or not they gather around the gate rows (got 0.9); expected at most 0.25, such as 0.1; or, to drop that many tokens, policy factor with a small factor",
    ),
    case(
        "capacity that gives up half of the tokens",
        "model:\n  moe:\n    capacity: {policy: locmoe_plus, delta: mean}\n",
        "c.yaml:3:44 model.moe.capacity.delta: gives up about half of an expert's own tokens: with it, rule rivals asks for few rows because tokens are dropped, whether or not they gather around the gate rows (got mean); expected minimum, or quantile with a low model.moe.capacity.quantile",
    ),
    case(
        "quantile of the largest cosine",
        "model:\n  moe:\n    capacity: {policy: locmoe_plus, rule: delta_max, quantile: 0.99}\n",
        "c.yaml:3:64 model.moe.capacity.quantile: has no effect while model.moe.capacity.delta is null (got 0.99); expected model.moe.capacity.delta quantile, or this key left out",
    ),
    case(
        "former name of a probability",
        "model:\n  moe:\n    capacity: {policy: locmoe, probability: exact}\n",
        "c.yaml:3:45 model.moe.capacity.probability: is not a choice (got exact); expected one of paper, independent; did you mean independent?",
    ),
    case(
        "estimated capacity without gate rows",
        "model:\n  moe:\n    router: {name: hash}\n    capacity: {policy: locmoe}\n",
        "c.yaml:4:24 model.moe.capacity.policy: needs the cosines between tokens and gate rows, but hash does not have one gate row per expert (got locmoe); expected another policy, or a router with gate rows: switch, topk, gshard, sigmoid_bias, top_p, adamoe, xmoe, sinkhorn_token_choice, cartesian, locmoe, locmoe_plus, maskmoe",
    ),
    case(
        "rule of LocMoE+ with LocMoE",
        "model:\n  moe:\n    capacity: {policy: locmoe, rule: delta_max}\n",
        "c.yaml:3:38 model.moe.capacity.rule: has no effect while model.moe.capacity.policy is locmoe (got delta_max); expected model.moe.capacity.policy locmoe_plus, or this key left out",
    ),
    case(
        "quantile of the mean",
        "model:\n  moe:\n    capacity: {policy: locmoe, quantile: 0.5}\n",
        "c.yaml:3:42 model.moe.capacity.quantile: has no effect while model.moe.capacity.delta is null (got 0.5); expected model.moe.capacity.delta quantile, or this key left out",
    ),
    case(
        "decay_fraction of cosine",
        "optimizer:\n  schedule:\n    decay_fraction: 0.1\n",
        "c.yaml:3:21 optimizer.schedule.decay_fraction: has no effect while optimizer.schedule.name is cosine (got 0.1); expected optimizer.schedule.name wsd, or this key left out",
    ),
    case(
        "momentum of adamw",
        "optimizer:\n  muon: {momentum: 0.9}\n",
        "c.yaml:2:20 optimizer.muon.momentum: has no effect while optimizer.name is adamw (got 0.9); expected optimizer.name muon, or this key left out",
    ),
    case(
        "a length for a schedule that has none",
        "training:\n  steps: 9\noptimizer:\n  schedule: {name: inverse_sqrt, steps: 5}\n",
        "c.yaml:4:41 optimizer.schedule.steps: has no effect while optimizer.schedule.name is inverse_sqrt (got 5); expected optimizer.schedule.name cosine or wsd, or this key left out",
    ),
    case(
        "final_fraction of constant",
        "optimizer:\n  schedule: {name: constant, final_fraction: 0.1}\n",
        "c.yaml:2:46 optimizer.schedule.final_fraction: has no effect while optimizer.schedule.name is constant (got 0.1); expected optimizer.schedule.name cosine or wsd, or this key left out",
    ),
    case(
        "normalize_gates after",
        "model:\n  moe:\n    router: {name: topk, softmax: after, normalize_gates: false}\n",
        "c.yaml:3:59 model.moe.router.normalize_gates: has no effect while model.moe.router.softmax is after (got false); expected model.moe.router.softmax before, or this key left out",
    ),
    case(
        "vocabulary below bpe",
        "model:\n  vocab_size: 1000\n",
        "c.yaml:2:15 model.vocab_size: smaller than the vocabulary of the tokenizer (got 1000); expected at least data.tokenizer.vocab_size (4096), or null",
        "data.tokenizer.name=bpe",
    ),
    case(
        "vocabulary below byte",
        "model:\n  vocab_size: 256\ndata:\n  tokenizer: {name: byte}\n",
        "c.yaml:2:15 model.vocab_size: smaller than the vocabulary of the tokenizer (got 256); expected at least 257 for data.tokenizer.name byte, or null",
    ),
    case(
        "no ids for denoisers",
        "data:\n  sequence_length: 64\n  objective: {name: ul2}\n  tokenizer: {name: byte}\n",
        "c.yaml:2:3 model.vocab_size: gives modes and sentinels of data.objective no ids of their own (got null, the default); expected at least 268: 257 of the tokenizer, and 11 for modes and sentinels of a model that is trained with data.objective.name ul2",
    ),
    case(
        "too few ids for denoisers",
        "model:\n  vocab_size: 264\ndata:\n  objective: {name: ul2, mode_tokens: false}\n  sequence_length: 64\n  tokenizer: {name: byte}\n",
        "c.yaml:2:15 model.vocab_size: has no room for the modes and sentinels of data.objective (got 264); expected at least 265: 257 of the tokenizer, and 8 for modes and sentinels",
    ),
    case(
        "ranks",
        "parallelism:\n  expert: 3\n",
        "c.yaml:2:11 parallelism.expert: does not divide model.moe.num_experts = 8 (got 3); expected a divisor of 8",
    ),
    case(
        "algorithm of one rank",
        "comm: {algorithm: node_dedup}\n",
        "c.yaml:1:19 comm.algorithm: chooses how tokens reach experts on other ranks, but with parallelism.expert = 1 "
        "there are none (got node_dedup); expected flat, or parallelism.expert of 2 or more",
    ),
    case(
        "chunks of one rank",
        "comm: {chunks: auto}\n",
        "c.yaml:1:16 comm.chunks: splits what is sent to experts on other ranks, but with parallelism.expert = 1 there are "
        "none (got auto); expected 1, or parallelism.expert of 2 or more",
    ),
    case(
        "numpy",
        "backend: {name: numpy, device: cuda, dtype: bfloat16, compile: true}\n",
        "c.yaml:1:32 backend.device: backend numpy runs on the CPU only (got cuda); "
        "expected auto or cpu; or backend.name torch\n"
        "c.yaml:1:45 backend.dtype: backend numpy has no bfloat16 (got bfloat16); expected auto, float32 or float64\n"
        "c.yaml:1:64 backend.compile: backend numpy cannot compile (got true); expected false or null",
    ),
    # overrides
    case("override without =", "", '--set model.d_model: has no "="; expected section.key=value', "model.d_model"),
    case(
        "override with an empty key",
        "",
        "--set model..d_model=3: has an empty key; expected section.key=value\n"
        "--set =4: has an empty key; expected section.key=value",
        "model..d_model=3",
        "=4",
    ),
    case(
        "override of an unknown key",
        "",
        "--set model.d_modle=256 model.d_modle: unknown key; did you mean model.d_model?",
        "model.d_modle=256",
    ),
    case(
        "override in an unknown section",
        "",
        "--set trainer.lr=3 trainer: unknown key; did you mean training?",
        "trainer.lr=3",
    ),
    case(
        "override of a wrong type",
        "",
        "--set training.steps=many training.steps: is a string (got many); expected an integer of at least 1",
        "training.steps=many",
    ),
    case(
        "override with bad YAML",
        "",
        "--set data.source.paths=[a data.source.paths: not valid YAML: while parsing a flow sequence at 1:1, expected ',' or ']', but got '<stream end>'",
        "data.source.paths=[a",
    ),
    case(
        "override with a fault inside",
        "",
        "--set model={d_model: x, num_layers: 0} model.d_model: is a string (got x); expected an integer of at least 1\n"
        "--set model={d_model: x, num_layers: 0} model.num_layers: is out of range (got 0); expected an integer of at least 1 and at most 10000",
        "model={d_model: x, num_layers: 0}",
    ),
    case(
        "override below a value",
        "",
        "--set training.steps.count=3 training.steps: is a mapping; expected an integer of at least 1",
        "training.steps.count=3",
    ),
    case(
        "override of a section by a word",
        "",
        "--set model.moe.router=switch model.moe.router: is a string (got switch); expected a mapping with a name: <routers>; did you mean model.moe.router.name: switch?",
        "model.moe.router=switch",
    ),
    case(
        "override of a section by null",
        "",
        "--set model.moe=null model.moe: is null; expected a mapping",
        "model.moe=null",
    ),
    case(
        "override breaks a rule of the file",
        "training:\n  gradient_accumulation: 4\n",
        "c.yaml:2:26 training.gradient_accumulation: does not divide training.batch_size = 10 (got 4); expected a divisor of 10",
        "training.batch_size=10",
    ),
    case(
        "override breaks a rule of a default",
        "model:\n  num_layers: 4\n",
        "--set model.moe.num_experts=1 model.moe.router.top_k: more experts per token than there are (got 2, the default); expected at most model.moe.num_experts (1)",
        "model.moe.num_experts=1",
    ),
    case(
        "override without effect",
        "optimizer:\n  schedule: {name: cosine}\n",
        "--set optimizer.schedule.decay_fraction=0.1 optimizer.schedule.decay_fraction: has no effect while optimizer.schedule.name is cosine (got 0.1); expected optimizer.schedule.name wsd, or this key left out",
        "optimizer.schedule.decay_fraction=0.1",
    ),
    case(
        "override of an option of another router",
        "model:\n  moe:\n    router: {name: switch}\n",
        "--set model.moe.router.top_k=2 model.moe.router.top_k: is an option of <routers with top_k>, not of switch",
        "model.moe.router.top_k=2",
    ),
]


@pytest.mark.parametrize(("text", "message", "overrides"), CASES)
def test_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str, overrides: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config("c.yaml", overrides)
    assert str(error.value) == message


def test_a_backend_that_trains_on_whole_copies_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BACKENDS, "mindspore", replace(BACKENDS["mindspore"], shards=()))
    with pytest.raises(ConfigError, match="backend mindspore cannot shard"):
        config_from_dict({"backend": {"name": "mindspore"}, "parallelism": {"shard": True}})
