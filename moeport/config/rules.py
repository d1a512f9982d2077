"""Rules that involve several keys, as a table."""

import re
from collections.abc import Callable, Sequence, Set
from functools import reduce
from typing import Any

from moeport.config import step_ranges
from moeport.config.backend_rules import BACKEND_RULES
from moeport.config.capacity_rules import CAPACITY_RULES
from moeport.config.data import (
    DIGITS_SIDE,
    SEQUENCES_PER_CYCLE,
    TEXT_SOURCES,
    DataConfig,
    Domain,
    FilesSource,
    HuggingFaceSource,
    MixedSource,
    StdlibSource,
    known_vocab_size,
    shares,
)
from moeport.config.objective import SHORTEST_SEQUENCE, Denoiser
from moeport.config.problem import Problem
from moeport.config.rope_bases_rules import BASES_EFFECTS, BASES_RULES
from moeport.config.rule import Effect, Rule
from moeport.config.schema import Config
from moeport.config.trackers import TrackerConfig
from moeport.config.tree import shown
from moeport.core.section import Section
from moeport.errors import DataError
from moeport.routers import BY_NAME
from moeport.routers.base import RouterConfig
from moeport.tokenizers.patterns import PATTERNS

_HEADS = "model.attention.num_heads"
_KIND = "model.attention.kind"
_SCALING = "model.attention.rope_scaling"


def _router(name: str) -> type[RouterConfig]:
    """The class that holds what is true of a router whatever its options."""
    return BY_NAME[name].config_class


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except (LookupError, ValueError):
        return False
    return True


def _is_pattern(pattern: str) -> bool:
    """Whether it has a name or can cut text. Letters and digits alone are taken for a misspelled name."""
    if pattern in PATTERNS:
        return True
    from moeport.tokenizers.splitting import check_pattern  # imports the tokenizers library, which others do not need

    try:
        check_pattern(pattern)
    except DataError:
        return False
    return True


def _is_usable(source: Section) -> bool:
    """Whether a source of a mixture obeys the rules for data.source."""
    if isinstance(source, FilesSource):
        return _is_encoding(source.encoding) and all(map(_is_suffix, source.text_suffixes))
    return not isinstance(source, HuggingFaceSource) or _is_hub_revision(source.revision, source.dataset)


def _are_usable(sources: Sequence[MixedSource]) -> bool:
    return all(_is_usable(each.source) for each in sources)


def _are_distinct(
    sources: Sequence[MixedSource] | Sequence[Domain] | Sequence[Denoiser] | Sequence[TrackerConfig],
) -> bool:
    return len({each.name for each in sources}) == len(sources)


def _are_shares(sources: Sequence[MixedSource]) -> bool:
    """Whether each source of a mixture gives at least one sequence of a cycle."""
    return all(SEQUENCES_PER_CYCLE * share >= 1 for share in shares(sources))


def _is_suffix(text: str) -> bool:
    return text == "*" or re.fullmatch(r"\.[^./]+", text) is not None


def _is_hub_revision(revision: str | None, dataset: str) -> bool:
    return revision is None or not dataset.startswith((".", "/"))


_UNUSABLE = (
    "has a source with an encoding that Python does not know, a suffix without its dot, or a revision of a folder"
)


def _needed(data: DataConfig) -> str:
    """How many ids a model needs for a mixture of denoisers, as far as the config says it."""
    special, known = data.objective.special_tokens(data.sequence_length), known_vocab_size(data)
    if known is None:
        return f"at least the tokenizer's vocabulary and {special} more"
    return f"at least {known + special}: {known} of the tokenizer, and {special} for modes and sentinels"


RULES = (
    Rule(
        (_HEADS, "model.d_model", "model.attention.head_dim", _KIND),
        lambda heads, d_model, head_dim, kind: kind == "mla" or head_dim is not None or d_model % heads == 0,
        "does not divide model.d_model = {1}",
        "a divisor of {1}, or model.attention.head_dim given",
    ),
    Rule(
        ("model.d_model", _HEADS, "model.attention.head_dim", _KIND),
        lambda d_model, heads, head_dim, kind: (
            kind == "mla" or head_dim is not None or d_model % heads or d_model // heads % 2 == 0
        ),
        "makes heads of odd width with " + _HEADS + " = {1}",
        "an even multiple of {1}",
    ),
    Rule(
        ("model.attention.head_dim",),
        lambda head_dim: head_dim is None or head_dim % 2 == 0,
        "is odd",
        "an even number, since rotary embedding rotates pairs",
    ),
    Rule(
        ("model.attention.rope_scaling.high_freq_factor", "model.attention.rope_scaling.low_freq_factor"),
        lambda high, low: high > low,
        "is not above model.attention.rope_scaling.low_freq_factor = {1}",
        "a number above {1}",
    ),
    Rule(
        ("model.attention.rope_scaling.beta_fast", "model.attention.rope_scaling.beta_slow"),
        lambda fast, slow: fast >= slow,
        "is below model.attention.rope_scaling.beta_slow = {1}",
        "at least {1}",
    ),
    *BASES_RULES,
    Rule(
        ("model.attention.num_kv_heads", _HEADS),
        lambda kv_heads, heads: kv_heads is None or heads % kv_heads == 0,
        "does not divide " + _HEADS + " = {1}",
        "a divisor of {1}",
    ),
    Rule(
        ("model.attention.num_kv_heads", _HEADS, _KIND),
        lambda kv_heads, heads, kind: kind != "mla" or kv_heads in (None, heads) or heads % kv_heads,
        "groups heads, which multi-head latent attention does not",
        "{1}, or this key left out",
    ),
    Rule(
        ("model.attention.bias", _KIND),
        lambda bias, kind: kind != "mla" or bias != "qkv",
        "is for grouped-query attention",
        "none or all with " + _KIND + " = mla",
    ),
    Rule(
        ("model.attention.qk_rope_head_dim",),
        lambda width: width % 2 == 0,
        "is odd",
        "an even number, since rotary embedding rotates pairs",
    ),
    Rule(
        (f"{_SCALING}.mscale", f"{_SCALING}.mscale_all_dim"),
        lambda one, other: (one is None) == (other is None),
        lambda one, _: f"is {'missing beside' if one is None else 'given without'} {_SCALING}.mscale_all_dim",
        "both of them or none",
    ),
    Rule(
        ("model.moe.first_dense", "model.num_layers"),
        lambda first_dense, layers: first_dense < layers,
        "leaves no block with experts",
        "less than model.num_layers ({1})",
    ),
    Rule(
        ("model.moe.every", "model.moe.first_dense", "model.num_layers"),
        lambda every, first_dense, layers: first_dense >= layers or first_dense + every <= layers,
        "leaves no block with experts",
        "at most model.num_layers ({2}) - model.moe.first_dense ({1})",
    ),
    Rule(
        ("model.moe.dense_layers", "model.num_layers"),
        lambda dense, layers: all(layer < layers for layer in dense),
        "names a block that the model does not have",
        "numbers below model.num_layers ({1})",
    ),
    Rule(
        ("model.moe.dense_layers", "model.moe.every", "model.moe.first_dense", "model.num_layers"),
        lambda dense, every, first, layers: not dense or not {*range(first + every - 1, layers, every)} <= {*dense},
        "leaves no block with experts",
        "fewer blocks",
    ),
    Rule(
        ("model.moe.shared_hidden", "model.moe.num_shared_experts"),
        lambda hidden, experts: hidden is None or experts > 0,
        "is the width of shared experts, but model.moe.num_shared_experts is {1}",
        "model.moe.num_shared_experts of 1 or more, or this key left out",
    ),
    Rule(
        ("model.moe.residual_form", "model.moe.residual_hidden"),
        lambda form, hidden: form == "parallel" or hidden > 0,
        "places a dense block, but model.moe.residual_hidden is {1}",
        "model.moe.residual_hidden of 1 or more, or this key left out",
    ),
    Rule(
        ("model.vocab_size", "data.tokenizer.vocab_size"),
        lambda rows, tokens: rows is None or rows >= tokens,
        "smaller than the vocabulary of the tokenizer",
        "at least data.tokenizer.vocab_size ({1}), or null",
    ),
    Rule(
        ("model.vocab_size", "data.tokenizer.name"),
        lambda rows, tokenizer: rows is None or tokenizer != "byte" or rows >= 257,
        "smaller than the vocabulary of the tokenizer",
        "at least 257 for data.tokenizer.name byte, or null",
    ),
    Rule(
        ("model.vocab_size", "data"),
        lambda rows, data: rows is not None or not data.objective.is_mixture,
        "gives modes and sentinels of data.objective no ids of their own",
        lambda rows, data: f"{_needed(data)} of a model that is trained with data.objective.name ul2",
    ),
    Rule(
        ("model.vocab_size", "data"),
        lambda rows, data: (
            rows is None
            or not data.objective.is_mixture
            or rows >= (known_vocab_size(data) or 0) + data.objective.special_tokens(data.sequence_length)
        ),
        "has no room for the modes and sentinels of data.objective",
        lambda rows, data: _needed(data),
    ),
    Rule(
        ("data.sequence_length", "data.objective.name"),
        lambda length, objective: objective != "ul2" or length >= SHORTEST_SEQUENCE,
        "is too short for the spans of data.objective.name ul2",
        f"at least {SHORTEST_SEQUENCE}",
    ),
    Rule(
        ("data.objective.denoisers",),
        _are_distinct,
        "has two denoisers of one name",
        "a name of its own for each",
    ),
    Rule(
        ("data.objective.name", "data.source.name"),
        lambda objective, source: objective == "causal" or source in TEXT_SOURCES,
        "rearranges text, which data.source.name {1} does not have",
        "causal, or a source of text",
    ),
    Rule(
        ("data.document_mask", "data.objective.name"),
        lambda masked, objective: not masked or objective == "causal",
        "hides documents, but the targets of data.objective.name {1} follow all documents of their sequence",
        "false, or data.objective.name causal",
    ),
    Rule(
        ("training.gradient_accumulation", "training.batch_size"),
        lambda micro_batches, batch_size: batch_size % micro_batches == 0,
        "does not divide training.batch_size = {1}",
        "a divisor of {1}",
    ),
    Rule(
        ("training.skip_steps",),
        lambda ranges: all(map(step_ranges.is_range, ranges)),
        lambda ranges: f"{next(text for text in ranges if not step_ranges.is_range(text))!r} is not a range of steps",
        'steps counted from 1, and ranges of them with the lower one first, such as [120-125, "130"]',
    ),
    Rule(
        ("training.skip_steps", "training.steps"),
        lambda ranges, steps: step_ranges.count(step_ranges.up_to(step_ranges.merged(ranges), steps)) < steps,
        "leaves no step to train on with training.steps = {1}",
        "fewer steps",
    ),
    Rule(
        ("optimizer.schedule.steps", "training.steps", "optimizer.schedule.name", "optimizer.schedule.final_fraction"),
        lambda planned, steps, name, final: (
            planned is None or planned >= steps or name not in ("cosine", "wsd") or final > 0
        ),
        "the learning rate is 0 in all steps of training.steps = {1} after these",
        "at least {1}, or optimizer.schedule.final_fraction above 0",
    ),
    Rule(
        ("parallelism.expert", "model.moe.num_experts"),
        lambda ranks, experts: experts % ranks == 0,
        "does not divide model.moe.num_experts = {1}",
        "a divisor of {1}",
    ),
    Rule(
        ("comm.algorithm", "parallelism.expert"),
        lambda algorithm, ranks: algorithm == "flat" or ranks > 1,
        "chooses how tokens reach experts on other ranks, but with parallelism.expert = {1} there are none",
        "flat, or parallelism.expert of 2 or more",
    ),
    Rule(
        ("comm.chunks", "parallelism.expert"),
        lambda chunks, ranks: chunks == 1 or ranks > 1,
        "splits what is sent to experts on other ranks, but with parallelism.expert = {1} there are none",
        "1, or parallelism.expert of 2 or more",
    ),
    Rule(
        ("model.moe.router.name", "model.moe.allow_future_tokens", "data.source.name"),
        lambda name, allowed, source: allowed or source not in TEXT_SOURCES or not _router(name).looks_ahead,
        "{0} lets a token's routing depend on later tokens, which a language model must predict",
        "a causal router, or model.moe.allow_future_tokens true to study it anyway",
    ),
    Rule(
        ("model.moe.capacity.policy", "model.moe.router.name"),
        lambda policy, name: policy == "dropless" or not _router(name).fixed_load,
        "limits the tokens per expert, but with {1} every expert takes a fixed number",
        "dropless",
    ),
    Rule(
        ("model.moe.load_balance.coefficient", "model.moe.router.name"),
        lambda coefficient, name: not coefficient or not _router(name).even_load,
        "weights a loss without gradient, since {1} loads the experts evenly by construction",
        "0 or null",
    ),
    Rule(
        ("model.moe.router.normalize_single_gate", "model.moe.router.top_k"),
        lambda divides, top_k: not divides or top_k == 1,
        "has no effect while model.moe.router.top_k is {1}",
        "false, or model.moe.router.top_k 1",
    ),
    Rule(
        ("model.d_model", "model.moe.num_experts", "model.moe.router.name"),
        lambda width, experts, name: width % experts == 0 or not _router(name).splits_width,
        "not divisible by model.moe.num_experts = {1}, while {2} gives each expert an equal share of the features",
        "a multiple of {1}",
    ),
    Rule(
        ("model.moe.capacity.drop", "model.moe.router.name"),
        lambda drop, name: drop != "affinity" or _router(name).has_affinity,
        "{1} returns no affinities to choose by",
        "probability, which chooses by the gate, or a router with affinities: "
        + " or ".join(name for name, router in BY_NAME.items() if router.config_class.has_affinity),
    ),
    Rule(
        ("model.moe.capacity.policy", "model.moe.router.name"),
        lambda policy, name: policy not in ("locmoe", "locmoe_plus") or _router(name).has_gate_rows,
        "needs the cosines between tokens and gate rows, but {1} does not have one gate row per expert",
        "another policy, or a router with gate rows: "
        + ", ".join(name for name, router in BY_NAME.items() if router.config_class.has_gate_rows),
    ),
    Rule(
        ("model.moe.capacity.policy", "model.moe.router.name"),
        lambda policy, name: policy != "round" or _router(name).gates_follow_probs,
        "gives tokens to experts that they did not choose, but {1} has no gate for these",
        "another policy, or a router whose gates are in proportion to its scores: "
        + ", ".join(name for name, router in BY_NAME.items() if router.config_class.gates_follow_probs),
    ),
    Rule(
        ("model.moe.router.name", "data.source.name"),
        lambda name, source: source in TEXT_SOURCES or not _router(name).needs_token_ids,
        "{0} looks at token ids, which the patches of data.source.name {1} do not have",
        "another router",
    ),
    Rule(
        ("data.tokenizer.name", "data.source.name"),
        lambda tokenizer, source: source in TEXT_SOURCES or tokenizer == "bpe",
        "has no effect while data.source.name is {1}",
        "this section left out",
    ),
    Rule(
        ("data.tokenizer.pattern",),
        _is_pattern,
        "is neither the name of a pattern nor a regular expression",
        f"{', '.join(PATTERNS)} or a regular expression",
    ),
    Rule(
        ("data.source.encoding",),
        _is_encoding,
        "is not a text encoding that Python knows",
        "utf-8, utf-16, latin-1, cp1252, gb18030, shift_jis or another of Python's",
    ),
    Rule(
        ("data.source.text_suffixes",),
        lambda suffixes: all(map(_is_suffix, suffixes)),
        "has an item that is not a suffix",
        "suffixes with their dot, such as .tex, or *",
    ),
    Rule(
        ("data.source.revision", "data.source.dataset"),
        _is_hub_revision,
        "names a version on the hub, but data.source.dataset is the local folder {1}",
        "this key left out",
    ),
    Rule(
        ("data.sources", "data.source"),
        lambda sources, source: not sources or source == StdlibSource(),
        "mixes several sources, and data.source is given too",
        "one of them",
    ),
    Rule(
        ("data.sources",),
        _are_distinct,
        "has two sources of one name",
        "a name of its own for each",
    ),
    Rule(
        ("data.sources",),
        _are_shares,
        f"has a weight of less than 1/{SEQUENCES_PER_CYCLE:,} of the sum",
        "larger weights, or this source left out",
    ),
    Rule(
        ("data.sources",),
        _are_usable,
        _UNUSABLE,
        "a source that data.source would take",
    ),
    Rule(
        ("data.domains", "data.source", "data.sources"),
        lambda domains, source, sources: not domains or (source == StdlibSource() and not sources),
        "gives each domain its source, and data.source or data.sources is given too",
        "one of them",
    ),
    Rule(
        ("model.moe.router.group_by", "data.domains"),
        lambda group_by, domains: group_by != "domain" or bool(domains),
        "groups sequences by their domain, and data.domains names none",
        "first_token, or data.domains given",
    ),
    Rule(
        ("model.moe.router.groups", "model.moe.router.group_by", "data.domains"),
        lambda groups, group_by, domains: (
            group_by != "domain" or not domains or min(2, len(domains)) <= groups <= len(domains)
        ),
        lambda groups, group_by, domains: (
            f"puts all {len(domains)} domains of data.domains in one group"
            if groups == 1
            else f"leaves groups without any of the {len(domains)} domains in data.domains"
        ),
        lambda groups, group_by, domains: f"{len(domains)}, or fewer groups that several domains share",
    ),
    Rule(
        ("model.moe.router.nodes", "training.batch_size", "training.gradient_accumulation", "data.domains"),
        lambda nodes, batch, parts, domains: not (domains and nodes) or batch % parts or batch // parts % nodes == 0,
        "do not divide the sequences of a micro-batch, {1} / {2}, each of which belongs to one node and its domain",
        "a divisor of training.batch_size / training.gradient_accumulation, or a batch size that is a multiple",
    ),
    Rule(("data.domains",), _are_distinct, "has two domains of one name", "a name of its own for each"),
    Rule(("metrics.trackers",), _are_distinct, "has a tracker twice", "each at most once"),
    Rule(
        ("data.domains",),
        lambda domains: all(each.has_one_origin for each in domains),
        "has a domain without a source, or with both source and sources",
        "one of the two for each domain",
    ),
    Rule(
        ("data.domains",),
        lambda domains: all(_are_distinct(each.sources) and _are_shares(each.sources) for each in domains),
        f"mixes two sources of one name, or one with a weight of less than 1/{SEQUENCES_PER_CYCLE:,} of the sum",
        "a name of its own for each source of a domain, and larger weights",
    ),
    Rule(
        ("data.domains",),
        lambda domains: all(_are_usable(each.streams) for each in domains),
        _UNUSABLE,
        "sources that data.source would take",
    ),
    Rule(
        ("data.source.patch_size",),
        lambda size: DIGITS_SIDE % size == 0,
        f"does not divide the {DIGITS_SIDE} pixels of an image's side",
        "1, 2, 4 or 8",
    ),
    *CAPACITY_RULES,
    *BACKEND_RULES,
)

EFFECTS = (
    *BASES_EFFECTS,
    Effect(f"{_SCALING}.factor", f"{_SCALING}.type", ("linear", "llama3", "yarn")),
    Effect(f"{_SCALING}.original_positions", f"{_SCALING}.type", ("llama3", "yarn")),
    Effect(f"{_SCALING}.low_freq_factor", f"{_SCALING}.type", ("llama3",)),
    Effect(f"{_SCALING}.high_freq_factor", f"{_SCALING}.type", ("llama3",)),
    Effect(f"{_SCALING}.beta_fast", f"{_SCALING}.type", ("yarn",)),
    Effect(f"{_SCALING}.beta_slow", f"{_SCALING}.type", ("yarn",)),
    Effect(f"{_SCALING}.attention_factor", f"{_SCALING}.type", ("yarn",)),
    *(
        Effect(f"{_SCALING}.{option}", selector, (value,))
        for option in ("mscale", "mscale_all_dim")
        for selector, value in ((f"{_SCALING}.type", "yarn"), (_KIND, "mla"))
    ),
    *(Effect(f"model.attention.{option}", _KIND, ("grouped",)) for option in ("head_dim", "qk_norm")),
    *(
        Effect(f"model.attention.{option}", _KIND, ("mla",))
        for option in (
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "latent_norm_eps",
        )
    ),
    Effect("model.moe.router.normalize_gates", "model.moe.router.softmax", ("before",)),
    Effect("model.moe.capacity.factor", "model.moe.capacity.policy", ("factor", "locmoe", "locmoe_plus")),
    Effect("model.moe.capacity.multiple_of", "model.moe.capacity.policy", ("factor", "locmoe", "locmoe_plus")),
    Effect("model.moe.capacity.tile", "model.moe.capacity.policy", ("round",)),
    Effect("model.moe.capacity.drop", "model.moe.capacity.policy", ("factor", "locmoe", "locmoe_plus")),
    *(
        Effect(f"model.moe.capacity.{option}", "model.moe.capacity.policy", ("locmoe", "locmoe_plus"))
        for option in ("floor", "delta", "quantile", "ema_decay", "update_interval", "freeze_after")
    ),
    *(
        Effect(f"model.moe.capacity.{option}", "model.moe.capacity.policy", ("locmoe",))
        for option in ("bound", "probability", "target", "failure")
    ),
    Effect("model.moe.capacity.rule", "model.moe.capacity.policy", ("locmoe_plus",)),
    Effect("model.moe.capacity.failure", "model.moe.capacity.target", ("success",)),
    Effect("model.moe.capacity.quantile", "model.moe.capacity.delta", ("quantile", None)),
    *(
        Effect(option, "data.source.name", TEXT_SOURCES)
        for option in (
            "data.sequence_length",
            "data.document_mask",
            "data.tokenizer.vocab_size",
            "model.vocab_size",
            "model.tie_embeddings",
            "model.moe.allow_future_tokens",
            "metrics.sample_prompt",
            "metrics.sample_tokens",
        )
    ),
    *(
        Effect(f"data.objective.{option}", "data.objective.name", ("ul2",))
        for option in ("denoisers", "mode_tokens", "steps")
    ),
    *(Effect(f"optimizer.{option}", "optimizer.name", ("adamw", "muon")) for option in ("beta1", "beta2", "eps")),
    *(
        Effect(f"optimizer.adafactor.{option}", "optimizer.name", ("adafactor",))
        for option in ("beta2_decay", "clip_threshold", "eps", "least_scale")
    ),
    *(
        Effect(f"optimizer.muon.{option}", "optimizer.name", ("muon",))
        for option in ("momentum", "nesterov", "adjust_rate", "adamw_learning_rate")
    ),
    Effect("optimizer.schedule.decay_fraction", "optimizer.schedule.name", ("wsd",)),
    Effect("optimizer.schedule.steps", "optimizer.schedule.name", ("cosine", "wsd")),
    Effect("optimizer.schedule.final_fraction", "optimizer.schedule.name", ("cosine", "wsd")),
)


def value_at(config: Config, path: str) -> Any:
    """The value at a dotted path; AttributeError if the chosen router, tokenizer or source lacks the option."""
    return reduce(getattr, path.split("."), config)


def check_rules(config: Config, faulty: Set[str] = frozenset(), recorded: bool = False) -> list[Problem]:
    """Find violations of the rules.

    Args:
        config: the config; its values at `faulty` are ignored.
        faulty: dotted paths of keys or sections; rules that read them are skipped.
        recorded: whether it is the config of a run that was recorded, maybe before a rule was made.
    """
    found = []
    for rule in RULES:
        if not (recorded and rule.recorded) and _usable(rule.reads, faulty) and _has(config, *rule.reads):
            values = [value_at(config, path) for path in rule.reads]
            if not rule.holds(*values):
                found.append(_problem(config, rule.reads, _text(rule.wrong, values), _text(rule.expected, values)))
    if _usable(("model.moe.router", "model.moe.num_experts"), faulty):
        moe = config.model.moe
        for option, wrong, expected in moe.router.problems(moe.num_experts):
            found.append(_problem(config, (f"model.moe.router.{option}", "model.moe.num_experts"), wrong, expected))
    for effect in EFFECTS:
        reads = (effect.option, effect.selector)
        if _usable(reads, faulty) and _has(config, *reads) and _is_idle(config, effect):
            wrong = f"has no effect while {effect.selector} is {shown(value_at(config, effect.selector))}"
            expected = f"{effect.selector} {' or '.join(map(shown, effect.values))}, or this key left out"
            found.append(_problem(config, reads, wrong, expected))
    return found


def _text(text: str | Callable[..., str], values: list[Any]) -> str:
    if callable(text):
        return text(*values)
    return text.format(*("null" if value is None else value for value in values))


def _problem(config: Config, reads: tuple[str, ...], wrong: str, expected: str) -> Problem:
    got = shown(value_at(config, reads[0]))
    if not _is_given(config, reads[0]):
        got += ", the default"
    return Problem(reads[0], wrong, got, expected, related=reads[1:])


def _is_idle(config: Config, effect: Effect) -> bool:
    """Whether the option was set without effect; its default with an explicit selector, as in a full dump, is fine."""
    if value_at(config, effect.selector) in effect.values or not _is_given(config, effect.option):
        return False
    section, _, name = effect.option.rpartition(".")
    default = type(value_at(config, section)).model_fields[name].default
    return value_at(config, effect.option) != default or not _is_given(config, effect.selector)


def _is_given(config: Config, path: str) -> bool:
    section, _, name = path.rpartition(".")
    return name in value_at(config, section).model_fields_set


def _has(config: Config, *paths: str) -> bool:
    try:
        for path in paths:
            value_at(config, path)
    except AttributeError:
        return False
    return True


def _usable(reads: tuple[str, ...], faulty: Set[str]) -> bool:
    return not any(
        path == fault or path.startswith(f"{fault}.") or fault.startswith((f"{path}.", f"{path}["))
        for path in reads
        for fault in faulty
    )
