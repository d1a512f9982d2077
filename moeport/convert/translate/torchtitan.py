"""Job configs of torchtitan (TOML) and the sizes of its models by flavor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeport.convert.translate.draft import Draft, Rule, Typed, ignored, only, to
from moeport.convert.translate.files import read_toml
from moeport.convert.translate.reasons import DIVIDED, HOW, LATENT
from moeport.convert.translate.values import choice, integer, number, switch

DATA = "data.source and data.tokenizer say what is trained on"
FORCED = "debug.moe_force_load_balance"


def _qwen3(sizes: tuple[int, ...], experts: tuple[int, int, int] | None = None, base: float = 1e6) -> dict[str, Any]:
    """A flavor of Qwen3.

    Args:
        sizes: layers, width, query heads, key and value heads, hidden width of dense blocks, vocabulary.
        experts: their number, how many a token uses, and the hidden width of one; None: a dense model.
        base: of the rotary angles.
    """
    layers, width, heads, kv_heads, hidden, vocabulary = sizes
    moe: dict[str, Any] = {"num_experts": 1, "expert_hidden": hidden, "router": {"name": "topk", "top_k": 1}}
    if experts:
        router = {"name": "topk", "top_k": experts[1], "normalize_gates": True}
        moe = {"num_experts": experts[0], "expert_hidden": experts[2], "router": router}
    attention = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 128, "qk_norm": True, "rope_base": base}
    return {
        "num_layers": layers,
        "d_model": width,
        "vocab_size": vocabulary,
        "norm_eps": 1e-6,
        "attention": attention,
        "moe": moe | {"load_balance": {"coefficient": 0.0}},
    }


FLAVORS = {
    "qwen3": {
        "8B": _qwen3((36, 4096, 32, 8, 12288, 151936)),
        "14B": _qwen3((40, 5120, 40, 8, 17408, 151936)),
        "32B": _qwen3((64, 5120, 64, 8, 25600, 151936)),
        "debugmodel_moe": _qwen3((8, 256, 16, 8, 3072, 2048), (64, 8, 768)),
        "30B-A3B": _qwen3((48, 2048, 32, 4, 6144, 151936), (128, 8, 768)),
        "235B-A22B": _qwen3((94, 4096, 64, 4, 12288, 151936), (128, 8, 1536), 5e6),
    }
}
"""Sizes by model and flavor, as in torchtitan's registry. Untied; other Qwen3 flavors tie their embeddings."""
TYPED: Typed = {
    integer: (
        *("training.steps", "training.batch_size", "training.local_batch_size", "training.global_batch_size"),
        "lr_scheduler.warmup_steps",
    ),
    number: ("lr_scheduler.min_lr_factor", "lr_scheduler.decay_ratio"),
    switch: (FORCED,),
}
REFUSED = {
    "deepseek_v3": f"is refused: {LATENT}",
    "llama4": "leaves positions out of some layers and attends in chunks, which moeport does not",
}


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a job config."""
    return read_toml(path)


def combine(draft: Draft) -> None:
    """What several keys say together."""
    _model(draft)
    steps, rate = draft.get("training.steps", 10000), draft.get("lr_scheduler.min_lr_factor", 0.0)
    warm, kind = draft.get("lr_scheduler.warmup_steps", 200), draft.get("lr_scheduler.decay_type", "linear")
    share = draft.get("lr_scheduler.decay_ratio")
    section: dict[str, Any] = {"warmup_steps": warm, "final_fraction": rate}
    decayed = (steps - warm) / steps if steps else 0.0
    if kind == "linear":
        section |= {"name": "wsd", "decay_fraction": decayed if share is None else min(share, decayed)}
    elif kind == "cosine" and (share is None or share >= decayed):
        section |= {"name": "cosine"}
    else:
        why = "moeport's cosine decays from the warm-up on, and its wsd linearly"
        draft.tell("lr_scheduler.decay_type", "not expressible", why, kind)
    keys = ("min_lr_factor", "warmup_steps", "decay_type", "decay_ratio")
    draft.understood("optimizer.schedule", section, *(f"lr_scheduler.{key}" for key in keys))
    _batch(draft)


def _model(draft: Draft) -> None:
    name, flavor = draft.get("model.name"), str(draft.get("model.flavor"))
    sizes = FLAVORS.get(str(name), {}).get(flavor)
    if sizes is None:
        known = ", ".join(f"{model} {each}" for model, flavors in FLAVORS.items() for each in flavors)
        why = REFUSED.get(str(name), f"its sizes are not known here; expected one of {known}")
        draft.tell("model.name", "not expressible", f"{name} {flavor} {why}", name)
        draft.tell("model.flavor", "not expressible", f"as model.name: {name}", flavor)
        return
    for key, value in sizes.items():
        draft.put(f"model.{key}", value)
    draft.tell("model.name", "understood", "model, by flavor")
    draft.tell("model.flavor", "understood", "the sizes in model")
    _forced(draft, sizes["moe"])
    if sizes["moe"]["num_experts"] > 1:
        why = (
            "torchtitan balances its softmax routers by a bias that is updated after each step; moeport has that with "
            "sigmoid scores only (router sigmoid_bias); for topk there is the loss of model.moe.load_balance"
        )
        draft.tell("model.load_balance_coeff", "not expressible", why, 1e-3)


def _forced(draft: Draft, moe: Mapping[str, Any]) -> None:
    """Experts in turn, whatever their scores; both frameworks divide the gates by their sum."""
    if not draft.get(FORCED, False):
        return
    if moe["num_experts"] == 1:
        draft.tell(FORCED, "ignored", "a dense model has no choice of experts")
        return
    router = {"name": "forced_balance", "top_k": moe["router"]["top_k"]}
    draft.understood("model.moe.router", router, FORCED)
    draft.tell("model.load_balance_coeff", "ignored", f"{FORCED} chooses the experts, whatever the bias", 1e-3)


def _batch(draft: Draft) -> None:
    whole = draft.get("training.global_batch_size", -1)
    local = draft.get("training.local_batch_size", draft.get("training.batch_size", 8))
    if whole > 0:
        draft.understood("training.batch_size", whole, "training.global_batch_size")
        draft.tell("training.local_batch_size", "ignored", "how a batch is divided", local)
    elif draft.ranks:
        keys = ("training.local_batch_size", "training.batch_size", "training.global_batch_size")
        draft.understood("training.batch_size", local * draft.ranks, *keys)
    else:
        why = "the batch is this times the data-parallel ranks, which the file does not say; give --ranks"
        draft.tell("training.local_batch_size", "not expressible", why, local)


RULES: dict[str, Rule] = {
    "training.seq_len": to("data.sequence_length", integer, default=2048),
    "training.steps": to("training.steps", integer, default=10000),
    "training.max_norm": to("optimizer.clip_norm", number, default=1.0),
    "training.seed": to("training.seed", integer),
    "debug.seed": to("training.seed", integer),
    "training.deterministic": to("backend.deterministic", switch),
    "debug.deterministic": to("backend.deterministic", switch),
    "training.mixed_precision_param": to(
        "backend.dtype", choice(bfloat16="bfloat16", float32="float32"), default="bfloat16"
    ),
    "training.dtype": only("float32", why="parameters are float32 here"),
    "training.global_batch_size": ignored("-1: the local batch times the ranks"),
    "training.mixed_precision_reduce": only("float32", why="gradients are added up in float32 here"),
    "training.compile": to("backend.compile", switch),
    "compile.enable": to("backend.compile", switch),
    "optimizer.name": only(
        "AdamW", why="moeport has AdamW, Muon and Adafactor; translate its options by hand", default="AdamW"
    ),
    "optimizer.lr": to("optimizer.learning_rate", number, default=8e-4),
    "optimizer.beta1": to("optimizer.beta1", number, default=0.9),
    "optimizer.beta2": to("optimizer.beta2", number, default=0.95),
    "optimizer.eps": to("optimizer.eps", number, default=1e-8),
    "optimizer.weight_decay": to("optimizer.weight_decay", number, default=0.1),
    "optimizer.implementation": ignored(HOW),
    "optimizer.early_step_in_backward": ignored(HOW),
    "parallelism.expert_parallel_degree": to("parallelism.expert", integer),
    "activation_checkpoint.mode": to(
        "training.activation_checkpointing", choice(none=False, selective=True, full=True)
    ),
    "checkpoint.interval": to("checkpoint.interval", integer),
    "metrics.log_freq": to("metrics.log_interval", integer),
    "metrics.enable_tensorboard": to("metrics.tensorboard", switch),
    "model.converters": only([], why="moeport does not have quantised products"),
    FORCED: only(False, why="set model.moe.router.name: forced_balance in the model, which is not translated"),
}
PREFIXES = {
    "job.": "names, descriptions and folders",
    "profiling.": "what is measured; see metrics.profile",
    "metrics.": "what is logged",
    "checkpoint.": "run.dir holds the checkpoints; see checkpoint",
    "activation_checkpoint.": HOW,
    "compile.": HOW,
    "comm.": HOW,
    "debug.": HOW,
    "fault_tolerance.": HOW,
    "experimental.": HOW,
    "validation.": "evaluation is on the whole validation set here; see training.evaluation_interval",
    "parallelism.": DIVIDED,
    "training.dataset": DATA,
    "training.data.": DATA,
    "dataloader.": DATA,
    "training.gc": HOW,
    "training.enable_cpu_offload": HOW,
    "model.tokenizer_path": DATA,
    "model.hf_assets_path": DATA,
    "float8.": "used by converters only",
    "mx.": "used by converters only",
    "quantize.": "used by converters only",
    "memory_estimation.": HOW,
}
