"""The model section: shapes of the decoder, its mixture-of-experts blocks and its losses."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moeport.core.section import Section
from moeport.routers import RouterChoice
from moeport.routers.topk import TopKConfig

MOST_LAYERS = 10_000
"""Ours: ten times the deepest models, and few enough to count one by one."""

MOST_COMPARED = 2**24
"""Ours: candidates times positions in a search for rotary bases, whose waves take a second or two and 128 MiB."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trained parameters of a model."""

    total: int
    """All of them."""
    active: int
    """Those that one token uses: all except the experts it is not routed to."""


class RopeScalingConfig(Section):
    """Rotary positions for texts longer than those that a model was first trained on."""

    type: Literal["none", "linear", "llama3", "yarn"] = "none"
    """`linear`: all angles divided by `factor`. `llama3`: those of long waves only (Llama 3.1). `yarn`: by a ramp over
    the pairs (arXiv 2309.00071)."""
    factor: PositiveFloat = 1.0
    """Ratio of the length of the texts to the original one."""
    original_positions: PositiveInt = 8192
    """llama3, yarn: positions in the texts that the model was first trained on."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: waves that turn less often than this within the original length are divided by `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: waves that turn more often than this are kept; above low_freq_factor."""
    beta_fast: PositiveFloat = 32.0
    """yarn: turns within the original length at which the ramp begins; at least beta_slow."""
    beta_slow: PositiveFloat = 1.0
    """yarn: turns at which the ramp ends."""
    attention_factor: PositiveFloat | None = None
    """yarn: multiplies queries and keys after the rotation. Default: 0.1 ln(factor) + 1, or with mscale and
    mscale_all_dim (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale: PositiveFloat | None = None
    """yarn, in multi-head latent attention (DeepSeek-V2): goes with mscale_all_dim; see attention_factor."""
    mscale_all_dim: PositiveFloat | None = None
    """yarn, in multi-head latent attention: the scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2."""


def candidates(low: float, high: float, step: float) -> int:
    """How many bases low, low + step, ... are at most high."""
    return int((high - low) / step + 1e-9) + 1


class RopeBasesConfig(Section):
    """Bases of the rotary angles, one per key-value head; all query heads of a key-value head use its base (HARPE,
    arXiv 2412.07171). A list is short for `kind: list` with these values, and null for `kind: none`.
    """

    kind: Literal["none", "list", "uniform", "peak_valley"] = "none"
    """`none`: rope_base for all heads. `list`: `values`. `uniform`: from low to high in equal steps. `peak_valley`: a
    greedy search among low, low + step, ... for bases whose waves are high where those of others are low."""
    values: tuple[Annotated[float, Field(gt=1)], ...] = ()
    """list: the base of each key-value head, above 1."""
    low: Annotated[float, Field(gt=1)] = 1e6
    """uniform, peak_valley: the lowest base, above 1; always one of those that peak_valley chooses."""
    high: Annotated[float, Field(gt=1)] = 5e6
    """uniform, peak_valley: the highest base; at least low."""
    order: Literal["ascending", "descending"] = "ascending"
    """uniform, peak_valley: how the bases rise or fall over the heads."""
    step: Annotated[float, Field(ge=1)] = 30000.0
    """peak_valley: distance of the candidates."""
    first_position: Annotated[NonNegativeInt, Field(le=MOST_COMPARED)] = 0
    """peak_valley: the first distance between query and key at which waves are compared. Ours, as are all options
    below: the paper does not say."""
    positions: Annotated[int, Field(ge=3)] = 4096
    """peak_valley: number of distances that are compared."""
    spacing: Annotated[PositiveInt, Field(le=256)] = 5
    """peak_valley: peaks are higher, and valleys lower, than everything up to this far away."""
    pairing: Literal["order", "nearest"] = "order"
    """peak_valley: which peak and valley are compared: the first with the first and so on in `order`, as far as both
    go, or each with the `nearest`."""


class AttentionConfig(Section):
    """Attention with rotary position embedding; causal in language models."""

    kind: Literal["grouped", "mla"] = "grouped"
    """`grouped`: grouped-query attention. `mla`: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section
    2.1), in which keys and values are made from one narrow latent vector per token, which a cache would hold."""
    num_heads: PositiveInt = 8
    """Query heads H."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads; must divide num_heads. Default: num_heads (multi-head attention), as always in mla."""
    head_dim: PositiveInt | None = None
    """grouped: width of one head; even. Default: d_model / num_heads."""
    q_lora_rank: PositiveInt | None = None
    """mla: width of the latent vector of the queries. null: none; they are projected from the hidden state."""
    kv_lora_rank: PositiveInt = 512
    """mla: width of the latent vector of keys and values."""
    qk_nope_head_dim: PositiveInt = 128
    """mla: width of the unrotated part of the queries and keys of one head."""
    qk_rope_head_dim: PositiveInt = 64
    """mla: width of the rotated part; even. All heads share the rotated part of the key."""
    v_head_dim: PositiveInt = 128
    """mla: width of the values of one head."""
    latent_norm_eps: PositiveFloat = 1e-6
    """mla: epsilon of the RMSNorm of the latent vectors. DeepSeek's models have 1e-6 here, whatever norm_eps is."""
    qk_norm: bool | Literal["whole"] = False
    """grouped: RMS-normalise queries and keys before the rotation: each head separately (true, as in Qwen3), or all
    heads together (whole, as in OLMoE)."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which projections add a bias: none of them; those of queries, keys and values (as in Qwen2); or the output
    projection too. In mla, all means those to the latent vectors and the output projection (as in DeepSeek-V2)."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary angles."""
    rope_bases: RopeBasesConfig = RopeBasesConfig()
    """Bases of the rotary angles by head, in place of rope_base."""
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    """Rotary positions for longer texts."""


class CapacityConfig(Section):
    """The number of tokens that an expert may take, and which are dropped beyond it."""

    policy: Literal["dropless", "factor", "locmoe", "locmoe_plus", "round"] = "dropless"
    """`dropless`: every assignment is served. `factor`: at most ceil(factor * T * K / E) tokens per expert. `locmoe`:
    the lower bound that follows from the cosines between tokens and gate rows. `locmoe_plus`: an estimate that follows
    the distribution of the tokens. Both are at least `floor` and at most what `factor` gives. `round`: in training,
    every expert gets the multiple of `tile` rows that is nearest to its load; it drops the assignments with the lowest
    gates or takes tokens that did not choose it (SonicMoE's token rounding, arXiv 2512.14080). Otherwise dropless."""
    tile: Annotated[int, Field(ge=2)] = 128
    """Rows of a tile of a grouped product, for policy `round`."""
    factor: PositiveFloat = 1.25
    """Capacity factor (Switch Transformer, GShard) of policy `factor`, and the upper limit of the estimates."""
    multiple_of: PositiveInt = 1
    """What `factor` gives is rounded up to a multiple of this. V-MoE's released code has 4."""
    drop: Literal["position", "probability", "affinity", "random"] = "position"
    """Which tokens are dropped on overflow: the last of the batch, those with the lowest gate, those with the lowest
    affinity (for routers that return one: locmoe and locmoe_plus), or random ones, drawn anew in each training step."""
    floor: PositiveInt = 4
    """Lower limit of the estimates, in tokens per expert. Ours."""
    bound: Literal["incomplete_beta", "erfc", "exponential"] = "incomplete_beta"
    """Form of LocMoE's bound: with the exact probability of a cosine, with its limit in many dimensions, or the paper's
    lower bound on that."""
    probability: Literal["paper", "independent"] = "independent"
    """Probability that a token routed to an expert is discriminative: E p_delta as printed, which may exceed 1, or,
    with cosines taken to be independent, 1 - (1 - p_delta / 2)^E, and E p_delta / 2 where delta is above sqrt(1/2). The
    default is ours."""
    target: Literal["expectation", "success"] = "expectation"
    """What LocMoE's bound ensures per expert: one discriminative token in expectation, 1 / p, or one with probability
    1 - failure, ln(failure) / ln(1 - p). The second is ours."""
    failure: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """eta: probability that an expert gets no discriminative token, for target `success`."""
    rule: Literal["rivals", "controller", "delta_max"] = "rivals"
    """Rule of LocMoE+. `rivals`: an expert's own tokens with a cosine of at least delta, plus its s q rivals, other
    experts' tokens with such a cosine. `controller`: 2 s q, of the paper's theorem. `delta_max`: exp(d delta^2 / (2 -
    delta^2)) / E, of its remark 7. The default is ours."""
    delta: Literal["minimum", "quantile", "mean", "maximum"] | None = None
    """Which of the cosines between an expert's own tokens and its gate row is delta; the rules rivals and controller
    keep the tokens above it. Default: quantile for these, maximum for delta_max, otherwise mean. Ours: the papers name
    all except the quantile, in different places."""
    quantile: Annotated[float, Field(ge=0, le=1)] | None = None
    """The quantile for delta `quantile`, in steps of 0.001. At most 0.25 for the rules rivals and controller, where it
    is the share of own tokens that the capacity gives up. Default: 0.1 for these, otherwise 0.9."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the past in the running means over steps; 0: only the last step. Ours."""
    update_interval: PositiveInt = 1
    """Steps between updates of the capacity; the first update follows the first step. Ours."""
    freeze_after: PositiveInt | None = None
    """Number of steps after which estimate and capacity stay fixed; 1: after the first, as in LocMoE. null: never."""

    @property
    def has_limit(self) -> bool:
        """Whether there is a most that every expert may serve."""
        return self.policy in ("factor", "locmoe", "locmoe_plus")

    @property
    def is_estimated(self) -> bool:
        """Whether the capacity is estimated from the tokens."""
        return self.policy in ("locmoe", "locmoe_plus")

    @property
    def counts_rivals(self) -> bool:
        """Whether the capacity is a number of tokens that are at least as near as those that an expert is to keep."""
        return self.policy == "locmoe_plus" and self.rule != "delta_max"

    @property
    def estimator(self) -> str:
        """`delta`, or its default."""
        largest = self.policy == "locmoe_plus" and self.rule == "delta_max"
        return self.delta or ("quantile" if self.counts_rivals else "maximum" if largest else "mean")

    @property
    def delta_quantile(self) -> float:
        """`quantile`, or its default."""
        if self.quantile is not None:
            return self.quantile
        return 0.1 if self.counts_rivals else 0.9


class LoadBalanceConfig(Section):
    """Switch load-balancing loss E * sum_e f_e P_e (Switch Transformer, eq. 4)."""

    coefficient: NonNegativeFloat | None = None
    """Weight of each layer's loss in the training loss; 0 turns it off. Default: 0 for routers that balance by other
    means or have no scores, otherwise 0.01. Megatron's moe_aux_loss_coeff and DeepSeek's alpha carry over as they are;
    transformers' router_aux_loss_coef is multiplied by top_k / number of layers with experts (docs/routers.md)."""
    scope: Literal["batch", "sequence", "global"] = "batch"
    """What f and P are taken over: all tokens of a rank's micro-batch; each sequence, averaging the losses
    (DeepSeek-V3, eq. 17); or the micro-batches of all ranks (Demons in the Detail, arXiv 2501.11873)."""


class MoELayerConfig(Section):
    """One mixture-of-experts layer: the options it has both in a model and as `moeport.torch.MoE`."""

    num_experts: PositiveInt = 8
    """Routed experts E."""
    expert_hidden: PositiveInt = 512
    """Hidden width F of one expert."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Expert activation; SwiGLU is gated, GELU is not."""
    num_shared_experts: NonNegativeInt = 0
    """Experts of the same width that process every token, added with weight 1 (DeepSeekMoE)."""
    shared_hidden: PositiveInt | None = None
    """Hidden width of all shared experts together. Default: num_shared_experts * expert_hidden."""
    shared_mixing: Literal["add", "softmax", "sigmoid"] | None = None
    """How shared experts are combined with the routed ones: added with weight 1; both weighted by a learned two-way
    softmax (CartesianMoE); or added with a learned weight between 0 and 1 for each token (Qwen2-MoE). Default: softmax
    for cartesian, otherwise add."""
    residual_hidden: NonNegativeInt = 0
    """Hidden width of a dense block that processes every token alongside the experts (as in OpenMoE); 0: none."""
    routed_scaling_factor: PositiveFloat = 1.0
    """Multiplies the output of the routed experts (DeepSeek-V3 uses 2.5)."""
    router: Annotated[RouterChoice, Field(discriminator="name")] = TopKConfig()
    """The router, by name, with its own options; `moeport routers` lists them."""
    router_dtype: Literal["float32", "compute"] = "float32"
    """Type of the operands of the router's matrix product: float32, or `backend.dtype`, which is faster on accelerators
    and rounds the scores. Scores, softmax and gates are in float32 either way."""
    capacity: CapacityConfig = CapacityConfig()
    """Expert capacity and drop policy."""
    load_balance: LoadBalanceConfig = LoadBalanceConfig()
    """Load-balancing loss."""
    router_z_loss: NonNegativeFloat = 0.0
    """Weight of mean(logsumexp(router logits)^2) (ST-MoE, eq. 5)."""

    @property
    def mixes_shared_experts(self) -> bool:
        """Whether shared experts are mixed in by learned shares."""
        return self.mixing_rows > 0

    @property
    def mixing_rows(self) -> int:
        """Learned vectors that weigh the shared experts: 2 for a softmax, 1 for a sigmoid, none if they are added."""
        default = "softmax" if self.router.mixes_shared_experts else "add"
        return {"add": 0, "softmax": 2, "sigmoid": 1}[self.shared_mixing or default]

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together; 0 if there are none."""
        if not self.num_shared_experts:
            return 0
        return self.shared_hidden or self.num_shared_experts * self.expert_hidden


class MoEConfig(MoELayerConfig):
    """Mixture-of-experts feed-forward blocks."""

    every: PositiveInt = 1
    """One block in `every` has experts, the last of each group; the others are dense."""
    first_dense: NonNegativeInt = 0
    """Number of blocks at the start that are always dense."""
    dense_layers: tuple[NonNegativeInt, ...] = ()
    """Further blocks, counted from 0, that are dense (mlp_only_layers of Qwen)."""
    residual_form: Literal["parallel", "sequential"] = "parallel"
    """Where the dense block of `residual_hidden` is. `parallel`: beside the experts, x + experts(norm(x)) +
    dense(norm(x)), as OpenMoE's paper prints it. `sequential`: after them with a norm of its own, h = x +
    experts(norm(x)), then h + dense(norm'(h)), as in OpenMoE's released code."""
    allow_future_tokens: bool = False
    """Let a language model use a router that looks at later tokens, which do not exist yet during generation."""

    @property
    def dense_follows(self) -> bool:
        """Whether a dense block with a norm of its own follows each mixture layer."""
        return self.residual_hidden > 0 and self.residual_form == "sequential"


class ModelConfig(Section):
    """A transformer with mixture-of-experts blocks: a text decoder or an image classifier."""

    num_layers: Annotated[PositiveInt, Field(le=MOST_LAYERS)] = 4
    """Blocks L."""
    d_model: PositiveInt = 256
    """Model width D."""
    attention: AttentionConfig = AttentionConfig()
    """Attention."""
    dense_hidden: PositiveInt | None = None
    """Hidden width of dense blocks. Default: experts used per token * expert_hidden, the same active width."""
    moe: MoEConfig = MoEConfig()
    """Mixture-of-experts blocks."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding V. Default: the tokenizer's vocabulary."""
    tie_embeddings: bool = False
    """Also use the embedding as the output projection."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon inside the square root of RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; residual outputs get init_std / sqrt(2 L)."""
    embedding_std: PositiveFloat | None = None
    """Standard deviation of the initial token embedding; null: init_std. Default: 1 if neither it nor init_std is given
    and the embedding is not tied, since small embeddings let all tokens look alike to the routers within a few steps
    (docs/training.md)."""
    output_z_loss: NonNegativeFloat = 0.0
    """Weight of mean(logsumexp(output logits)^2) (PaLM, section 5)."""

    @model_validator(mode="after")
    def _embedding_default(self) -> Self:
        """Fill in the default of embedding_std. Every config that moeport has written gives init_std, so that those of
        versions without the key keep their embeddings.
        """
        if not (self.tie_embeddings or {"embedding_std", "init_std"} & self.model_fields_set):
            object.__setattr__(self, "embedding_std", 1.0)
        return self

    @property
    def num_heads(self) -> int:
        """Query heads H."""
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.attention.num_kv_heads or self.attention.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head's queries and keys."""
        attention = self.attention
        if attention.kind == "mla":
            return attention.qk_nope_head_dim + attention.qk_rope_head_dim
        return attention.head_dim or self.d_model // attention.num_heads

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.attention.qk_rope_head_dim if self.attention.kind == "mla" else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of one head's values."""
        return self.attention.v_head_dim if self.attention.kind == "mla" else self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) has experts."""
        moe = self.moe
        if layer < moe.first_dense or layer in moe.dense_layers:
            return False
        return (layer - moe.first_dense) % moe.every == moe.every - 1

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks that have experts."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe_layer(layer))

    @property
    def moe_layer_names(self) -> list[str]:
        """Labels of the mixture-of-experts layers, with one per sub-layer, in the order of the metrics."""
        if self.moe.router.sub_layers == 1:
            return [f"Layer {layer}" for layer in self.moe_layers]
        numbers = range(1, self.moe.router.sub_layers + 1)
        return [f"Layer {layer}, sub-layer {number}" for layer in self.moe_layers for number in numbers]

    @property
    def dense_width(self) -> int:
        """Hidden width of a dense block."""
        moe = self.moe
        active = moe.expert_hidden * moe.router.experts_per_token + moe.shared_width
        return self.dense_hidden or moe.router.sub_layers * active + moe.residual_hidden

    def parameter_counts(self, vocab_size: int) -> ParameterCounts:
        """Numbers of trained parameters of a language model; `vocab_size` is used if the config sets none."""
        vocab, blocks = self.vocab_size or vocab_size, self.block_counts
        ends = vocab * self.d_model * (1 if self.tie_embeddings else 2) + self.d_model
        return ParameterCounts(ends + blocks.total, ends + blocks.active)

    @property
    def block_counts(self) -> ParameterCounts:
        """Numbers of trained parameters of all blocks."""
        width, moe, matrices, expert = self.d_model, self.moe, self._matrices, self.expert_parameters
        attention = self._attention_matrices
        moe_layers, layers = len(self.moe_layers), self.num_layers
        router = moe.router.parameter_count(width, moe.num_experts)
        total = layers * (attention + self._vectors)
        total += (layers - moe_layers) * matrices * width * self.dense_width
        mixing = moe.mixing_rows * width if moe.num_shared_experts else 0
        sub_layer = router + mixing + moe.num_experts * expert + self.always_active_parameters
        total += self.expert_layers * sub_layer
        total += self._further_norms
        idle = self.expert_layers * (moe.num_experts - moe.router.experts_per_token) * expert
        return ParameterCounts(total, total - idle)

    @property
    def expert_layers(self) -> int:
        """Number of mixture layers, in which each sub-layer counts."""
        return len(self.moe_layers) * self.moe.router.sub_layers

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return self._matrices * self.d_model * self.moe.expert_hidden

    @property
    def always_active_parameters(self) -> int:
        """Parameters of a mixture layer's shared experts and of the dense block beside it: every token uses them."""
        return self._matrices * self.d_model * (self.moe.shared_width + self.moe.residual_hidden)

    @property
    def _matrices(self) -> int:
        """Matrices of an expert or a dense block."""
        return 3 if self.moe.activation == "swiglu" else 2

    @property
    def _further_norms(self) -> int:
        """Parameters of the norms that blocks with experts have besides those of every block."""
        layers = self.moe.router.sub_layers
        return len(self.moe_layers) * self.d_model * (layers - 1 + layers * self.moe.dense_follows)

    @property
    def _attention_matrices(self) -> int:
        """Parameters of the projections of a block's attention."""
        width, attention, heads = self.d_model, self.attention, self.num_heads
        if attention.kind == "grouped":
            return 2 * width * self.head_dim * (heads + self.num_kv_heads)
        rank, queries = attention.q_lora_rank, heads * self.head_dim
        q = width * queries if rank is None else rank * (width + queries)
        kv = width * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        kv += attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        return q + kv + heads * attention.v_head_dim * width

    @property
    def _vectors(self) -> int:
        """Parameters of a block that are in no matrix product: norms, of which one per feed-forward, and biases."""
        attention, heads = self.attention, self.num_heads + self.num_kv_heads
        if attention.kind == "mla":
            latents = (attention.q_lora_rank or 0) + attention.kv_lora_rank
            biases = latents + attention.qk_rope_head_dim + self.d_model if attention.bias == "all" else 0
            return 2 * self.d_model + latents + biases
        normed = {False: 0, True: 2, "whole": heads}[attention.qk_norm]
        biases = {
            "none": 0,
            "qkv": (heads + self.num_kv_heads) * self.head_dim,
            "all": (heads + self.num_kv_heads) * self.head_dim + self.d_model,
        }[attention.bias]
        return 2 * self.d_model + normed * self.head_dim + biases

    def training_flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """Floating-point operations of one token's forward and backward pass in a language model."""
        head = 6 * (self.vocab_size or vocab_size) * self.d_model
        return self.moe.router.passes * (self.block_flops_per_token(sequence_length) + head)

    def block_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of one token's forward and backward pass through all blocks.

        6 per active parameter in a matrix product (2 forward, 4 backward) and 6 L H (A + W) S for attention over
        S positions, where A is the width of queries and keys and W that of values, not halved for the causal mask: the
        convention of PaLM (arXiv 2204.02311, appendix B).
        """
        vectors = self.num_layers * self._vectors
        vectors += self._further_norms
        in_products = self.block_counts.active - vectors
        widths = self.num_heads * (self.head_dim + self.value_dim)
        return 6 * in_products + 6 * self.num_layers * widths * sequence_length
