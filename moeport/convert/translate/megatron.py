"""Options of Megatron-LM, from a shell script or a YAML file, by the names and defaults of its arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moeport.config.model import MOST_LAYERS
from moeport.convert.translate.draft import Draft, Rule, Typed, ignored, only, to
from moeport.convert.translate.files import read_options, read_yaml
from moeport.convert.translate.reasons import DIVIDED, HOW, LATENT, NEAREST_RESET
from moeport.convert.translate.values import choice, integer, name, number, switch

DATA = "data.source and data.tokenizer say what is trained on; Megatron's binary files are not read"
FILES = "run.dir holds all files of a run"
TYPED: Typed = {
    integer: (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "global_batch_size", "micro_batch_size"),
        *("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size"),
        *(
            "train_iters",
            "train_samples",
            "lr_decay_iters",
            "lr_warmup_iters",
            "lr_warmup_samples",
            "lr_wsd_decay_iters",
        ),
    ),
    number: ("lr", "min_lr", "lr_warmup_fraction", "rope_scaling_factor", "moe_expert_capacity_factor"),
    name: ("lr_decay_style", "lr_wsd_decay_style", "moe_router_score_function", "moe_token_drop_policy"),
}
PATTERN = re.compile(r"\(?\[([01](?:,[01])*)\]\)?(?:\*(\d+))?")


def read_file(path: Path) -> dict[str, Any]:
    """The options of a file, with underscores; sections of a YAML file, such as MODEL_ARGS, are left out."""
    if path.suffix not in (".yaml", ".yml"):
        return read_options(path)
    found = read_yaml(path)
    return {key.rpartition(".")[2].removeprefix("--").replace("-", "_"): value for key, value in found.items()}


def combine(draft: Draft) -> None:
    """What several options say together."""
    _sizes(draft)
    if draft.get("num_experts"):
        _experts(draft)
    else:
        hidden = draft.get("ffn_hidden_size", 4 * draft.get("hidden_size", 0))
        for key, value in (("num_experts", 1), ("expert_hidden", hidden)):
            draft.put(f"model.moe.{key}", value)
        draft.put("model.moe.router", {"name": "topk", "top_k": 1})
        draft.put("model.moe.load_balance", {"coefficient": 0.0})
        draft.tell(
            "ffn_hidden_size", "understood", "model.moe.expert_hidden: a dense block is a mixture of one expert", hidden
        )
    _steps(draft)
    _rate(draft)
    _batch(draft)


def _sizes(draft: Draft) -> None:
    grouped = draft.get("group_query_attention", False)
    if grouped:
        draft.understood("model.attention.num_kv_heads", draft.get("num_query_groups", 1), "num_query_groups")
        draft.tell("group_query_attention", "understood", "model.attention.num_kv_heads")
    bias = "qkv" if draft.get("add_qkv_bias", False) else "none"
    draft.understood("model.attention.bias", bias, "add_qkv_bias")
    if draft.get("use_rope_scaling", False):
        factor = draft.get("rope_scaling_factor", 8.0)
        scaling = {"type": "llama3", "factor": factor, "original_positions": 8192}
        draft.understood("model.attention.rope_scaling", scaling, "use_rope_scaling", "rope_scaling_factor")


def _experts(draft: Draft) -> None:
    ffn = draft.get("ffn_hidden_size", 4 * draft.get("hidden_size", 0))
    hidden = draft.get("moe_ffn_hidden_size", ffn)
    draft.understood("model.moe.num_experts", draft.get("num_experts"), "num_experts")
    draft.understood("model.moe.expert_hidden", hidden, "moe_ffn_hidden_size")
    draft.understood("model.dense_hidden", ffn, "ffn_hidden_size")
    shared = draft.get("moe_shared_expert_intermediate_size")
    if shared:
        many = shared // hidden if hidden and shared % hidden == 0 else 1
        draft.understood("model.moe.num_shared_experts", many, "moe_shared_expert_intermediate_size")
        if many * hidden != shared:
            draft.put("model.moe.shared_hidden", shared)
        mixing = "sigmoid" if draft.get("moe_shared_expert_gate", False) else "add"
        draft.understood("model.moe.shared_mixing", mixing, "moe_shared_expert_gate")
    _router(draft)
    _balance(draft)
    _capacity(draft)
    frequency = draft.get("moe_layer_freq", 1)
    try:
        dense = dense_layers(frequency, int(draft.get("num_layers", 0)))
        draft.understood("model.moe.dense_layers", dense, "moe_layer_freq")
    except ValueError as error:
        draft.tell("moe_layer_freq", "not expressible", str(error))


def dense_layers(frequency: Any, layers: int) -> list[int]:
    """The blocks without experts. Raises ValueError for a pattern that cannot be read.

    Args:
        frequency: a number n, for experts in blocks 0, n, 2n, ...; a list of 0 and 1; or a sum of such lists, each with
            a factor, as text.
        layers: number of blocks.
    """
    if layers > MOST_LAYERS:
        raise ValueError(f"a model of {layers} blocks; moeport has at most {MOST_LAYERS}")
    if isinstance(frequency, int) and frequency > 0:
        return [layer for layer in range(layers) if layer % frequency]
    pattern = list(frequency) if isinstance(frequency, list) else []
    if isinstance(frequency, str):
        text = frequency.replace(" ", "").strip("'\"").removeprefix("(").removesuffix(")")
        for part in text.split("+"):
            found = PATTERN.fullmatch(part.replace("(", "").replace(")", ""))
            if not found:
                raise ValueError(f"cannot be read as a pattern; expected one such as ([0]*1+[1]*{max(layers - 1, 1)})")
            pattern += [int(bit) for bit in found[1].split(",")] * min(MOST_LAYERS, int(found[2] or 1))
    elif not isinstance(frequency, list):
        raise ValueError(f"neither a number of at least 1 nor a pattern: {frequency}")
    if len(pattern) != layers:
        raise ValueError(f"a pattern of {len(pattern)} blocks for a model of {layers}")
    return [layer for layer, bit in enumerate(pattern) if not bit]


def _router(draft: Draft) -> None:
    score = draft.get("moe_router_score_function", "softmax")
    top_k = draft.get("moe_router_topk", 2)
    router: dict[str, Any] = {"name": "topk", "top_k": top_k}
    if score == "sigmoid":
        biased = draft.get("moe_router_enable_expert_bias", False)
        rate = draft.get("moe_router_bias_update_rate", 1e-3) if biased else 0.0
        router |= {"name": "sigmoid_bias", "normalize_gates": top_k > 1, "bias_update_rate": rate}
        groups, top = draft.get("moe_router_num_groups"), draft.get("moe_router_group_topk")
        if groups:
            router |= {"num_groups": groups, "top_groups": top or groups}
        for key in ("moe_router_pre_softmax", "moe_router_num_groups", "moe_router_group_topk"):
            if key in draft.values:
                draft.tell(key, "understood", "model.moe.router")
    elif draft.get("moe_router_pre_softmax", False):
        router |= {"normalize_gates": False}
    else:
        router |= {"softmax": "after"}
    keys = ["moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"]
    if score == "sigmoid" or not draft.get("moe_router_enable_expert_bias", False):
        keys += ["moe_router_enable_expert_bias", "moe_router_bias_update_rate"]
    draft.understood("model.moe.router", router, *keys)
    for key in ("moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk"):
        if draft.get(key):
            draft.tell(key, "not expressible", "moeport has it with sigmoid scores only")
    if "moe_router_bias_update_rate" in draft.values:
        draft.tell("moe_router_bias_update_rate", "ignored", "only together with the bias above")


def _balance(draft: Draft) -> None:
    kinds = draft.get("moe_router_load_balancing_type", "aux_loss")
    scopes = {"aux_loss": "batch", "seq_aux_loss": "sequence", "global_aux_loss": "global"}
    key, weight = "model.moe.load_balance", draft.get("moe_aux_loss_coeff", 0.0)
    if kinds == "none":
        draft.understood(key, {"coefficient": 0.0}, "moe_router_load_balancing_type", "moe_aux_loss_coeff")
    elif isinstance(kinds, str) and kinds in scopes and not isinstance(weight, list):
        section = {"coefficient": weight, "scope": scopes[kinds]}
        draft.understood(key, section, "moe_router_load_balancing_type", "moe_aux_loss_coeff")
    else:
        why = f"moeport has one of {', '.join(scopes)} and none"
        draft.tell("moe_router_load_balancing_type", "not expressible", why, kinds)
        draft.tell("moe_aux_loss_coeff", "not expressible", why)


def _capacity(draft: Draft) -> None:
    factor = draft.get("moe_expert_capacity_factor")
    if not factor:
        for key in ("moe_expert_capacity_factor", "moe_token_drop_policy"):
            if key in draft.values:
                draft.tell(key, "ignored", "no token is dropped without a capacity factor")
        return
    policy = draft.get("moe_token_drop_policy", "probs")
    drop = {"probs": "probability", "position": "position"}.get(policy)
    if drop is None:
        draft.tell("moe_token_drop_policy", "not expressible", "moeport has probs and position")
        return
    section = {"policy": "factor", "factor": factor, "drop": drop}
    draft.understood("model.moe.capacity", section, "moe_expert_capacity_factor", "moe_token_drop_policy")


def _steps(draft: Draft) -> None:
    batch, samples = draft.get("global_batch_size"), draft.get("train_samples")
    if samples and batch and not draft.get("train_iters"):
        draft.understood("training.steps", samples // batch, "train_samples")


def _rate(draft: Draft) -> None:
    steps = draft.sections.get("training", {}).get("steps", draft.get("train_iters"))
    rate, least = draft.get("lr"), draft.get("min_lr", 0.0)
    style = draft.get("lr_decay_style", "linear")
    section: dict[str, Any] = {"name": {"linear": "wsd", "WSD": "wsd"}.get(style, style)}
    if style in ("linear", "cosine", "WSD"):
        section["final_fraction"] = least / rate if rate else 0.0
    elif style != "constant":
        draft.tell("lr_decay_style", "not expressible", "moeport has constant, linear, cosine and WSD", style)
        section["name"] = "cosine"
    decay = draft.get("lr_decay_iters", steps)
    if decay != steps:
        draft.tell("lr_decay_iters", "not expressible", f"here the rate decays until the last step ({steps})")
    batch = draft.get("global_batch_size")
    warm = draft.get("lr_warmup_iters", 0)
    if draft.get("lr_warmup_fraction") and steps:
        warm = round(draft.get("lr_warmup_fraction") * steps)
    if draft.get("lr_warmup_samples") and batch:
        warm = draft.get("lr_warmup_samples") // batch
    section["warmup_steps"] = warm
    if section["name"] == "wsd" and steps:
        section["decay_fraction"] = _decayed(draft, style, steps, warm)
    keys = ("lr_decay_style", "min_lr", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_samples")
    draft.understood("optimizer.schedule", section, *keys)


def _decayed(draft: Draft, style: str, steps: int, warm: int) -> float:
    """The share of the steps in which the rate falls: of wsd, which is Megatron's linear decay if it is all of them."""
    if style == "linear":
        return max(steps - warm, 0) / steps
    if draft.get("lr_wsd_decay_style", "exponential") != "linear":
        why = "moeport's wsd decays linearly"
        draft.tell("lr_wsd_decay_style", "not expressible", why, draft.get("lr_wsd_decay_style", "exponential"))
    draft.understood("optimizer.schedule.decay_fraction", 0.0, "lr_wsd_decay_style", "lr_wsd_decay_iters")
    return float(min(draft.get("lr_wsd_decay_iters", 0) / steps, 1.0))


def _batch(draft: Draft) -> None:
    whole, micro = draft.get("global_batch_size"), draft.get("micro_batch_size")
    if whole is None and micro is not None and draft.ranks:
        draft.understood("training.batch_size", micro * draft.ranks, "micro_batch_size")
    elif whole is None and micro is not None:
        why = "global_batch_size is missing: it is the micro-batch times the data-parallel ranks; give --ranks"
        draft.tell("micro_batch_size", "not expressible", why)


def _only_off(why: str) -> Rule:
    return only(False, None, 0, why=f"moeport does not have {why}")


RULES: dict[str, Rule] = {
    "num_layers": to("model.num_layers", integer),
    "hidden_size": to("model.d_model", integer),
    "num_attention_heads": to("model.attention.num_heads", integer),
    "kv_channels": to("model.attention.head_dim", integer),
    "qk_layernorm": to("model.attention.qk_norm", switch),
    "rotary_base": to("model.attention.rope_base", number, default=10000),
    "rotary_percent": only(1, 1.0, why="moeport rotates the whole head"),
    "position_embedding_type": only("rope", why="moeport has rotary positions only", default="learned_absolute"),
    "normalization": only("RMSNorm", why="moeport has RMSNorm only", default="LayerNorm"),
    "norm_epsilon": to("model.norm_eps", number, default=1e-5),
    "init_method_std": to("model.init_std", number, default=0.02),
    "embedding_init_method_std": to("model.embedding_std", number),
    "swiglu": to("model.moe.activation", lambda on: "swiglu" if switch(on) else "gelu", default=False),
    "squared_relu": _only_off("squared ReLU"),
    "disable_bias_linear": only(True, why="moeport has no biases outside attention", default=False),
    "untie_embeddings_and_output_weights": to("model.tie_embeddings", lambda on: not switch(on), default=False),
    "vocab_size": to("model.vocab_size", integer),
    "hidden_dropout": only(0, 0.0, why="moeport has no dropout", default=0.1),
    "attention_dropout": only(0, 0.0, why="moeport has no dropout", default=0.1),
    "moe_z_loss_coeff": to("model.moe.router_z_loss", number),
    "moe_router_topk_scaling_factor": to("model.moe.routed_scaling_factor", number),
    "moe_input_jitter_eps": _only_off("noise on the router's input"),
    "moe_router_force_load_balancing": _only_off("random scores; the nearest is router forced_balance"),
    "moe_router_force_biased": _only_off("random scores with a bias; the nearest is router forced_bias"),
    "multi_latent_attention": only(False, None, 0, why=LATENT),
    **{
        key: ignored("belongs to multi-head latent attention")
        for key in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    },
    "mtp_num_layers": _only_off("prediction of several tokens"),
    "window_size": only(None, why="moeport attends to all earlier positions"),
    **{key: only(False, None, 0, why=NEAREST_RESET) for key in ("reset_position_ids", "reset_attention_mask")},
    "eod_mask_loss": _only_off("a loss without the ends of documents"),
    "seq_length": to("data.sequence_length", integer),
    "train_iters": to("training.steps", integer),
    "global_batch_size": to("training.batch_size", integer),
    "micro_batch_size": ignored("how a batch is divided; see training.gradient_accumulation"),
    "rampup_batch_size": only(None, why="the batch has one size here"),
    "seed": to("training.seed", integer, default=1234),
    "optimizer": only(
        "adam", why="moeport has AdamW, Muon and Adafactor; translate its options by hand", default="adam"
    ),
    "lr": to("optimizer.learning_rate", number),
    "weight_decay": to("optimizer.weight_decay", number, default=0.01),
    "start_weight_decay": only(None, why="the weight decay has one value here"),
    "end_weight_decay": only(None, why="the weight decay has one value here"),
    "adam_beta1": to("optimizer.beta1", number, default=0.9),
    "adam_beta2": to("optimizer.beta2", number, default=0.999),
    "adam_eps": to("optimizer.eps", number, default=1e-8),
    "clip_grad": to("optimizer.clip_norm", lambda value: number(value) or None, default=1.0),
    "bf16": to("backend.dtype", lambda on: "bfloat16" if switch(on) else "float32", default=False),
    "fp16": _only_off("float16"),
    "expert_model_parallel_size": to("parallelism.expert", integer),
    "recompute_activations": to("training.activation_checkpointing", switch),
    "recompute_granularity": to("training.activation_checkpointing", choice(full=True, selective=True)),
    "save_interval": to("checkpoint.interval", integer),
    "eval_interval": to("training.evaluation_interval", integer),
    "log_interval": to("metrics.log_interval", integer),
    "max_position_embeddings": ignored("rotary positions have no table"),
    "make_vocab_size_divisible_by": ignored("rows of the embedding that no token uses"),
    "use_rotary_position_embeddings": ignored("an older name of position_embedding_type: rope"),
    "no_position_embedding": ignored("there is no table of positions"),
    "moe_router_dtype": ignored("the router computes in float32 here, or as model.moe.router_dtype says"),
    "moe_grouped_gemm": ignored(HOW),
    "moe_permute_fusion": ignored(HOW),
    "moe_token_dispatcher_type": ignored(HOW),
    "moe_pad_expert_input_to_capacity": ignored(HOW),
    "moe_shared_expert_overlap": ignored(HOW),
    "transformer_impl": ignored(HOW),
    "attention_backend": ignored(HOW),
    "manual_gc": ignored(HOW),
    "recompute_method": ignored(HOW),
    "recompute_num_layers": ignored(HOW),
    "recompute_modules": ignored(HOW),
    "eval_iters": ignored("evaluation is on the whole validation set here"),
    "data_path": ignored(DATA),
    "split": ignored(DATA),
    "tokenizer_type": ignored(DATA),
    "tokenizer_model": ignored(DATA),
    "vocab_file": ignored(DATA),
    "merge_file": ignored(DATA),
    "mock_data": ignored(DATA),
    "num_workers": ignored(DATA),
    "save": ignored(FILES),
    "load": ignored(FILES),
    "tensorboard_dir": ignored(FILES),
    "exit_duration_in_mins": ignored(HOW),
    "sequence_parallel": ignored(DIVIDED),
    "tensor_model_parallel_size": ignored(DIVIDED),
    "pipeline_model_parallel_size": ignored(DIVIDED),
    "num_layers_per_virtual_pipeline_stage": ignored(DIVIDED),
    "context_parallel_size": ignored(DIVIDED),
    "expert_tensor_parallel_size": ignored(DIVIDED),
    "use_distributed_optimizer": ignored(DIVIDED),
}
PREFIXES = {
    "overlap_": HOW,
    "no_": HOW,
    "use_flash": HOW,
    "use_mcore": HOW,
    "log_": "what is logged",
    "wandb_": "what is logged",
    "dist": HOW,
    "ckpt_": FILES,
    "dataloader": DATA,
    "tp_comm": HOW,
    "cross_entropy": HOW,
    "moe_deepep": HOW,
    "nproc": DIVIDED,
    "nnodes": DIVIDED,
    "node_rank": DIVIDED,
    "master_": DIVIDED,
    "empty_unused": HOW,
}
