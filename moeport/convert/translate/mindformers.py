"""Configs of MindFormers: YAML with the sections model.model_config, moe_config, parallel_config and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeport.convert.translate.draft import Draft, Rule, Typed, ignored, only, to
from moeport.convert.translate.files import read_yaml
from moeport.convert.translate.reasons import DIVIDED, HOW, LATENT, NEAREST_RESET
from moeport.convert.translate.values import choice, integer, name, number, switch

MODEL, MOE, RUN = "model.model_config.", "moe_config.", "runner_config."
DATA = "data.source and data.tokenizer say what is trained on; MindRecord and Megatron files are not read"
SIZES = {
    "model.num_layers": ("num_layers", "num_hidden_layers"),
    "model.d_model": ("hidden_size",),
    "model.vocab_size": ("vocab_size",),
    "model.norm_eps": ("rms_norm_eps", "layernorm_epsilon"),
    "model.init_std": ("initializer_range", "init_method_std"),
    "model.attention.num_heads": ("num_heads", "num_attention_heads"),
    "model.attention.num_kv_heads": ("n_kv_heads", "num_key_value_heads", "num_query_groups"),
    "model.attention.head_dim": ("head_dim", "kv_channels"),
    "model.attention.rope_base": ("theta", "rope_theta", "rotary_base"),
}
"""Keys of model_config by the key of moeport's, in the names of its older and of its newer models."""
TYPED: Typed = {
    integer: (
        *(MOE + "expert_num", MODEL + "num_experts", MODEL + "n_routed_experts", MODEL + "vocab_size"),
        *(RUN + "batch_size", RUN + "gradient_accumulation_steps", "micro_batch_interleave_num"),
        *(f"parallel_config.{key}" for key in ("data_parallel", "pipeline_stage", "micro_batch_num")),
        *("lr_schedule.total_steps", "lr_schedule.warmup_steps"),
    ),
    number: (MOE + "capacity_factor", *(f"lr_schedule.{key}" for key in ("learning_rate", "lr_end", "warmup_ratio"))),
    name: ("lr_schedule.type", MODEL + "moe_router_load_balancing_type"),
}
TYPES = {"float32": "float32", "bfloat16": "bfloat16"}


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a file, dotted."""
    return read_yaml(path)


def combine(draft: Draft) -> None:
    """What several keys say together."""
    draft.put("model.init_std", 0.02)  # of all weights, also where the file has neither of its keys
    for path, names in SIZES.items():
        for own in names:
            if draft.get(MODEL + own) is not None:
                draft.understood(path, draft.get(MODEL + own), MODEL + own)
    if any("qwen3" in str(draft.get(MODEL + key, "")).lower() for key in ("model_type", "architectures")):
        draft.understood("model.attention.qk_norm", True, MODEL + "model_type", MODEL + "architectures")
    betas = draft.get("optimizer.betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) == 2):
        draft.tell("optimizer.betas", "not expressible", "expected two numbers")
    elif betas is not None:
        draft.put("optimizer.beta1", betas[0])
        draft.understood("optimizer.beta2", betas[1], "optimizer.betas")
    _experts(draft)
    _length(draft)
    _batch(draft)
    _rate(draft)


def _first(draft: Draft, *keys: str) -> tuple[str, Any]:
    """The first of several names that the file has, and its value; the last name and None if it has none."""
    return next(((key, draft.get(key)) for key in keys if draft.get(key) is not None), (keys[-1], None))


def _experts(draft: Draft) -> None:
    many_key, many = _first(draft, MOE + "expert_num", MODEL + "num_experts", MODEL + "n_routed_experts")
    dense = draft.get(MODEL + "intermediate_size", draft.get(MODEL + "ffn_hidden_size"))
    hidden_key, hidden = _first(draft, MODEL + "moe_intermediate_size", MOE + "moe_intermediate_size")
    k_key, top_k = _first(draft, MOE + "num_experts_chosen", MODEL + "num_experts_per_tok", MODEL + "moe_router_topk")
    size = hidden if hidden is not None else dense
    draft.understood("model.moe.num_experts", many or 1, many_key)
    if size is not None:
        draft.understood("model.moe.expert_hidden", size, hidden_key)
    if dense is not None:
        draft.understood("model.dense_hidden", dense, MODEL + "intermediate_size", MODEL + "ffn_hidden_size")
    _router(draft, k_key, top_k or 1, many or 1)
    shared_key, shared = _first(draft, MOE + "shared_expert_num", MODEL + "n_shared_experts")
    if shared is not None:
        draft.understood("model.moe.num_shared_experts", shared, shared_key)
    first_key, first = _first(draft, MOE + "first_k_dense_replace", MODEL + "first_k_dense_replace")
    if first is not None:
        draft.understood("model.moe.first_dense", first, first_key)
    factor = draft.get(MOE + "capacity_factor")
    if factor is not None and (many or 1) > 1 and factor > 0:
        section = {"policy": "factor", "factor": factor, "drop": "position"}
        draft.understood("model.moe.capacity", section, MOE + "capacity_factor", MOE + "enable_sdrop")
    elif factor is not None:
        draft.tell(MOE + "capacity_factor", "ignored", "no token is dropped with one expert or a factor below 0")


def _router(draft: Draft, k_key: str, top_k: int, experts: int) -> None:
    sigmoid_key, scores = _first(
        draft, MODEL + "moe_router_score_function", MODEL + "scoring_func", MOE + "use_gating_sigmoid"
    )
    norm_key, norm = _first(draft, MOE + "norm_topk_prob", MODEL + "norm_topk_prob")
    router: dict[str, Any] = {"name": "topk", "top_k": top_k, "normalize_gates": True if norm is None else norm}
    if draft.get(MODEL + "moe_router_pre_softmax") is False and scores not in ("sigmoid", True):
        router |= {"softmax": "after"}
    if scores in ("sigmoid", True):
        rate_key, rate = _first(
            draft, MOE + "topk_update_rate", MOE + "expert_bias_update_rate", MODEL + "moe_router_bias_update_rate"
        )
        router |= {"name": "sigmoid_bias", "bias_update_rate": 0.0 if rate is None else rate}
        groups_key, groups = _first(draft, MOE + "n_group", MODEL + "n_group")
        top_key, top = _first(draft, MOE + "topk_group", MODEL + "topk_group")
        if groups:
            router |= {"num_groups": groups, "top_groups": top or groups}
        for key in (rate_key, groups_key, top_key):
            if key in draft.values:
                draft.tell(key, "understood", "model.moe.router")
    draft.understood("model.moe.router", router, k_key, sigmoid_key, norm_key, MODEL + "moe_router_pre_softmax")
    weight_key, weight = _first(
        draft, MOE + "aux_loss_factor", MODEL + "moe_aux_loss_coeff", MODEL + "router_aux_loss_coef"
    )
    kind = draft.get(MODEL + "moe_router_load_balancing_type", "aux_loss")
    scopes = {"aux_loss": "batch", "seq_aux_loss": "sequence", "gbs_aux_loss": "global", "global_aux_loss": "global"}
    if weight is not None and kind in scopes:
        section = {"coefficient": weight if experts > 1 else 0.0, "scope": scopes[kind]}
        keys = (weight_key, MODEL + "moe_router_load_balancing_type", MODEL + "router_aux_loss_coef")
        draft.understood("model.moe.load_balance", section, *keys)
    scale_key, scale = _first(draft, MODEL + "routed_scaling_factor", MOE + "routed_scaling_factor")
    if scale is not None:
        draft.understood("model.moe.routed_scaling_factor", scale, scale_key)


def _length(draft: Draft) -> None:
    key, length = _first(
        draft, MODEL + "seq_length", "train_dataset.data_loader.config.seq_length", MODEL + "max_position_embeddings"
    )
    if length is not None:
        draft.understood("data.sequence_length", length, key)


def _batch(draft: Draft) -> None:
    size = draft.get(RUN + "batch_size")
    if size is None:
        return
    copies = draft.get("parallel_config.data_parallel", 1)
    parts = draft.get(RUN + "gradient_accumulation_steps", 1)
    if draft.get("parallel_config.pipeline_stage", 1) > 1:
        parts *= draft.get("parallel_config.micro_batch_num", 1)
    interleaved = draft.get("micro_batch_interleave_num", 1)
    keys = [RUN + "batch_size", RUN + "gradient_accumulation_steps", "micro_batch_interleave_num"]
    keys += ["parallel_config.data_parallel", "parallel_config.micro_batch_num"]
    draft.understood("training.batch_size", size * copies * parts * interleaved, *keys)


def _rate(draft: Draft) -> None:
    kind = draft.get("lr_schedule.type")
    names = {"CosineWithWarmUpLR": "cosine", "ConstantWarmUpLR": "constant", "WarmUpStableDecayLR": "wsd"}
    rate, least = draft.get("lr_schedule.learning_rate"), draft.get("lr_schedule.lr_end", 0.0)
    steps = draft.get("lr_schedule.total_steps", -1)
    if kind is None or rate is None:
        return
    section: dict[str, Any] = {"name": names.get(kind, "cosine")}
    if kind not in names:
        draft.tell("lr_schedule.type", "not expressible", f"moeport has {', '.join(names)}")
    if section["name"] != "constant":
        section["final_fraction"] = least / rate if rate else 0.0
    ratio = draft.get("lr_schedule.warmup_ratio")
    if ratio is not None and (steps > 0 or ratio == 0):
        section["warmup_steps"] = round(ratio * steps)
    elif ratio is not None:
        why = "a share of the steps of the dataset, whose number the file does not say; set warmup_steps"
        draft.tell("lr_schedule.warmup_ratio", "not expressible", why)
    else:
        section["warmup_steps"] = draft.get("lr_schedule.warmup_steps", 0)
    if steps > 0:
        draft.understood("training.steps", steps, "lr_schedule.total_steps")
    else:
        why = "as many steps as the dataset has in its epochs; set training.steps"
        draft.tell("lr_schedule.total_steps", "not expressible", why)
    keys = ("type", "lr_end", "warmup_ratio", "warmup_steps")
    draft.understood("optimizer.schedule", section, *(f"lr_schedule.{key}" for key in keys))


RULES: dict[str, Rule] = {
    "seed": to("training.seed", integer),
    "pretrained_model_dir": only(
        None, "", why="the model is that of a Hugging Face folder; translate its config.json with hf too"
    ),
    **{
        f"train_dataset.data_loader.config.{key}": only(False, why=NEAREST_RESET)
        for key in ("reset_position_ids", "reset_attention_mask")
    },
    "train_dataset.data_loader.config.eod_mask_loss": only(False, why="moeport's loss has the ends of documents too"),
    "run_mode": only("train", why="a config of training is expected"),
    "optimizer.type": only(
        *("AdamW", "FusedAdamWeightDecay", "FP32StateAdamWeightDecay", "PmaAdamW"),
        why="moeport has AdamW, Muon and Adafactor; translate its options by hand",
    ),
    "optimizer.beta1": to("optimizer.beta1", number),
    "optimizer.beta2": to("optimizer.beta2", number),
    "optimizer.eps": to("optimizer.eps", number),
    "optimizer.weight_decay": to("optimizer.weight_decay", number, default=0.0),
    "optimizer.learning_rate": ignored("lr_schedule.learning_rate is the one that is used"),
    "lr_schedule.learning_rate": to("optimizer.learning_rate", number),
    "runner_wrapper.use_clip_grad": to("optimizer.clip_norm", lambda on: 1.0 if on else None, default=False),
    "runner_wrapper.max_grad_norm": to("optimizer.clip_norm", number),
    "recompute_config.recompute": to("training.activation_checkpointing", bool),
    "parallel_config.expert_parallel": to("parallelism.expert", integer),
    "parallel_config.data_parallel": ignored(DIVIDED),
    MODEL + "tie_word_embeddings": to("model.tie_embeddings", switch),
    MODEL + "qk_layernorm": to("model.attention.qk_norm", switch),
    MODEL + "use_qk_norm": to("model.attention.qk_norm", switch),
    MODEL + "qkv_has_bias": to("model.attention.bias", lambda on: "qkv" if on else "none"),
    MODEL + "add_qkv_bias": to("model.attention.bias", lambda on: "qkv" if on else "none"),
    MODEL + "attention_bias": to("model.attention.bias", lambda on: "all" if on else "none"),
    MODEL + "add_bias_linear": only(False, why="moeport has no biases outside attention"),
    MODEL + "hidden_act": to("model.moe.activation", choice(silu="swiglu", swiglu="swiglu", gelu="gelu")),
    MODEL + "gated_linear_unit": only(True, why="moeport's silu is gated"),
    MODEL + "compute_dtype": to("backend.dtype", choice(**TYPES)),
    MODEL + "position_embedding_type": only("rope", why="moeport has rotary positions only"),
    MODEL + "extend_method": only("None", why="see model.attention.rope_scaling, and translate it by hand"),
    MODEL + "hidden_dropout": only(0, 0.0, why="moeport has no dropout"),
    MODEL + "attention_dropout": only(0, 0.0, why="moeport has no dropout"),
    MODEL + "moe_router_pre_softmax": ignored("the softmax is over all experts here too"),
    MODEL + "moe_token_drop_policy": ignored("no token is dropped without a capacity factor"),
    MODEL + "multi_latent_attention": only(False, why=LATENT),
    MODEL + "kv_lora_rank": only(None, 0, why=LATENT),
    MODEL + "q_lora_rank": only(None, 0, why=LATENT),
    MODEL + "mtp_depth": only(0, None, why="moeport does not predict several tokens"),
    MODEL + "multiple_of": ignored("used only where intermediate_size is missing"),
    MOE + "routing_policy": only("TopkRouterV2", "TopkRouterV1", why="moeport's topk is meant"),
    MOE + "z_loss_factor": to("model.moe.router_z_loss", number),
    MOE + "enable_sdrop": ignored("tokens are dropped in their order here"),
    RUN + "epochs": ignored("training.steps says how long"),
}
PREFIXES = {
    **dict.fromkeys((RUN, "context.", "parallel.", "profile", "init_start_profile", "auto_tune", "autotune"), HOW),
    **dict.fromkeys(("parallel_config.", "use_parallel", "micro_batch", "swap_config."), DIVIDED),
    **dict.fromkeys(("train_dataset", "eval_dataset", "processor.", "do_eval", "eval_"), DATA),
    **dict.fromkeys(
        ("load_", "output_dir", "resume_", "auto_trans", "only_save", "src_strategy", "callbacks"), "run.dir"
    ),
    **dict.fromkeys(("trainer.", "runner_wrapper.", "recompute_config.", "use_legacy", "print_separate"), HOW),
    **dict.fromkeys(("metric", "remote_save", "filepath_prefix", "lr_scale", "layer_", "model.arch."), HOW),
    **dict.fromkeys(
        (
            *(
                MODEL + name
                for name in ("type", "model_type", "architectures", "batch_size", "use_", "offset", "params_")
            ),
            *(
                MODEL + name
                for name in ("layernorm_comp", "softmax_comp", "rotary_dtype", "router_dense", "param_init")
            ),
            *(
                MODEL + name
                for name in (
                    "bos_",
                    "eos_",
                    "pad_",
                    "ignore_",
                    "pretrain_",
                    "checkpoint_name",
                    "input_sliced",
                    "qkv_concat",
                )
            ),
            *(MODEL + name for name in ("repetition", "max_decode", "top_", "do_sample", "compute_in", "moe_grouped")),
            *(
                MODEL + name
                for name in ("max_position", "parallel_optimizer", "fine_grain", "block_size", "num_blocks")
            ),
            *(
                MOE + name
                for name in ("router_dense", "use_", "comp_comm", "expert_group", "group_wise", "balance_via")
            ),
        ),
        "how it is computed or how text is generated, not what is trained",
    ),
}
