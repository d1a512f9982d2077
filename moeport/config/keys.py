"""The keys of the schema: where they are, what values they take, and which one a misspelled key meant."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from moeport.config.schema import Config
from moeport.config.short_forms import EXPECTED
from moeport.core.section import Section

ALIASES = {
    "run.dir": "output_dir save_dir run_dir",
    "model.num_layers": "num_hidden_layers n_layers n_layer depth",
    "model.d_model": "hidden_size n_embd embed_dim hidden_dim dim",
    "model.dense_hidden": "intermediate_size ffn_hidden_size d_ff",
    "model.tie_embeddings": "tie_word_embeddings weight_tying",
    "model.norm_eps": "rms_norm_eps layernorm_epsilon layer_norm_eps",
    "model.init_std": "initializer_range init_method_std",
    "model.embedding_std": "embedding_init_method_std",
    "model.attention.num_heads": "num_attention_heads n_heads n_head",
    "model.attention.num_kv_heads": "num_key_value_heads num_query_groups n_kv_heads",
    "model.attention.rope_base": "rope_theta rotary_base",
    "model.moe.num_experts": "expert_num n_routed_experts num_local_experts num_moe_experts moe_num_experts",
    "model.moe.num_shared_experts": "n_shared_experts shared_expert_num",
    "model.moe.expert_hidden": "moe_intermediate_size moe_ffn_hidden_size expert_dim",
    "model.moe.every": "moe_layer_freq moe_layer_interval decoder_sparse_step",
    "model.moe.first_dense": "first_k_dense_replace",
    "model.moe.dense_layers": "mlp_only_layers",
    "model.moe.shared_hidden": "shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    "model.attention.bias": "attention_bias qkv_bias add_qkv_bias",
    "model.moe.router": "router_type moe_router_type gate",
    "model.moe.router_dtype": "moe_router_dtype",
    "model.moe.router.top_k": "num_experts_per_tok moe_router_topk num_experts_chosen topk moe_top_k k",
    "model.moe.router.num_groups": "n_group moe_router_num_groups",
    "model.moe.router.top_groups": "topk_group moe_router_group_topk",
    "model.moe.router.normalize_gates": "norm_topk_prob",
    "model.moe.capacity.factor": "capacity_factor moe_expert_capacity_factor",
    "model.moe.load_balance.coefficient": (
        "aux_loss_coef aux_loss_coeff router_aux_loss_coef moe_aux_loss_coeff moe_loss_weight aux_loss_alpha"
    ),
    "model.moe.router_z_loss": "router_z_loss_coef moe_z_loss_coeff moe_zloss_weight z_loss",
    "data.sequence_length": "max_position_embeddings seq_len seq_length max_seq_len context_length block_size",
    "training.steps": "max_steps train_iters num_steps iterations",
    "training.batch_size": "global_batch_size train_batch_size",
    "training.gradient_accumulation": "gradient_accumulation_steps grad_accum accumulation_steps",
    "training.evaluation_interval": "eval_interval eval_steps",
    "training.activation_checkpointing": "gradient_checkpointing recompute",
    "optimizer.learning_rate": "lr max_lr",
    "optimizer.clip_norm": "grad_clip clip_grad gradient_clipping max_grad_norm max_norm",
    "optimizer.schedule": "lr_scheduler scheduler",
    "optimizer.schedule.name": "lr_scheduler_type lr_decay_style",
    "optimizer.schedule.warmup_steps": "warmup lr_warmup_steps num_warmup_steps warmup_iters",
    "optimizer.schedule.final_fraction": "min_lr min_lr_ratio",
    "parallelism.data": "data_parallel_degree data_parallel_size dp dp_size",
    "parallelism.expert": "expert_parallel_degree expert_model_parallel_size expert_parallel_size ep ep_size",
    "checkpoint.interval": "save_interval save_steps",
    "metrics.log_interval": "logging_steps log_every",
    "backend.dtype": "precision torch_dtype",
}
"""The names that other training frameworks use for a key."""

CONVERSIONS = {
    "router_aux_loss_coef": "transformers': multiply its value by top_k / number of layers with experts",
    "moe_aux_loss_coeff": "Megatron's: its value carries over",
    "aux_loss_alpha": "DeepSeek's: its value carries over, with scope sequence",
}
"""How the value of another framework's key becomes that of ours."""

VALUE_ALIASES = {
    "gpu": "cuda",
    "ascend": "npu",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp64": "float64",
    "exact": "independent",
}
"""Common spellings and former names of values, and their names here."""


@dataclass(frozen=True)
class Key:
    """One key of the config."""

    path: str
    """Dotted path."""
    section: type[Section]
    """The section that declares it."""
    variant: str = ""
    """The `name` of the router, source or tokenizer that this key is an option of; empty for other keys."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def field(self) -> FieldInfo:
        """The declaration of the key."""
        return self.section.model_fields[self.name]

    @property
    def expected(self) -> str:
        """Describes the values that the key takes."""
        return describe(self.section, self.name)


def variants(field: FieldInfo) -> dict[str, type[Section]]:
    """The sections that `name` chooses from, by name; empty for a field that is not such a choice."""
    if field.discriminator is None:
        return {}
    return {choice.model_fields["name"].default: choice for choice in get_args(field.annotation)}


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section that the field holds; None for a single value or a choice of sections."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def item_section(field: FieldInfo) -> type[Section] | None:
    """The section that each item of a list holds; None for any other field."""
    item = next(iter(get_args(field.annotation)), None) if get_origin(field.annotation) is tuple else None
    return item if isinstance(item, type) and issubclass(item, Section) else None


def names(field: FieldInfo) -> list[str]:
    """The possible values of `name` in the section that the field holds; empty if it has none."""
    below = subsection(field)
    if below and "name" in below.model_fields:
        return list(get_args(below.model_fields["name"].annotation))
    return list(variants(field))


def walk(section: type[Section] = Config, prefix: str = "", variant: str = "") -> Iterator[Key]:
    """All keys below `section`, including sections, in order of declaration."""
    for name, field in section.model_fields.items():
        path = prefix + name
        yield Key(path, section, variant)
        below = subsection(field)
        if below:
            yield from walk(below, path + ".")
        for tag, choice in variants(field).items():
            yield from walk(choice, path + ".", tag)


@cache
def keys() -> tuple[Key, ...]:
    """All keys of the config."""
    return tuple(walk())


@cache
def choices() -> dict[str, dict[str, type[Section]]]:
    """The sections that a `name` chooses from, by name, for each path with such a choice."""
    return {key.path: variants(key.field) for key in keys() if key.field.discriminator}


@cache
def _properties(section: type[Section]) -> dict[str, Any]:
    properties: dict[str, Any] = section.model_json_schema()["properties"]
    return properties


def describe(section: type[Section], name: str) -> str:
    """Describes the values that a field takes."""
    field = section.model_fields[name]
    if variants(field):
        return f"a mapping with a name: {', '.join(variants(field))}"
    return EXPECTED.get(name, "a mapping") if subsection(field) else _describe(_properties(section)[name])


def describe_item(section: type[Section], name: str) -> str:
    """Describes the values that an item of a list takes."""
    return _describe(_properties(section)[name]["items"])


def _describe(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_describe(choice) for choice in schema["anyOf"])
    if "$ref" in schema:
        return "a mapping"
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    match schema["type"]:
        case "null":
            return "null"
        case "boolean":
            return "true or false"
        case "integer":
            return f"an integer{_bounds(schema)}".replace(" above 0", " of at least 1")
        case "number":
            return f"a number{_bounds(schema)}"
        case "array":
            least = f", at least {schema['minItems']}" if "minItems" in schema else ""
            return f"a list of {_several(_describe(schema['items']))}{least}"
        case "object":
            return "a mapping"
    return "a path" if schema.get("format") == "path" else "a string"


def _several(value: str) -> str:
    """`a number above 1` as `numbers above 1`."""
    _, noun, *bounds = value.split(" ", 2)
    return " ".join([f"{noun}s", *bounds])


def _bounds(schema: dict[str, Any]) -> str:
    phrases = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{phrase} {schema[keyword]}" for keyword, phrase in phrases.items() if keyword in schema]
    return " " + " and ".join(bounds) if bounds else ""


def suggest(path: str, section: type[Section]) -> str | None:
    """The path of the key that was probably meant.

    Args:
        path: the unknown key.
        section: the section that contains it, whose keys are preferred.
    """
    parent, _, name = path.rpartition(".")
    for target, aliases in ALIASES.items():
        if name.lower() in aliases.split():
            return target
    best, best_score = None, 0.75
    for key in keys():
        same_section = key.section is section and key.path.rpartition(".")[0] == parent
        if key.name == "name" and not same_section:
            continue
        score = SequenceMatcher(None, name, key.name).ratio() + 0.15 * same_section
        if score > best_score:
            best, best_score = key.path, score
    return best
