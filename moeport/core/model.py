"""The decoder language model as pure functions of operations, parameters and a batch.

Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moeport.config.model import ModelConfig
from moeport.core.attention import attention_forward, attention_specs, rope_tables
from moeport.core.moe import MoELayer, MoEMetrics, mlp_specs
from moeport.core.ops import Array, Ops
from moeport.core.parameters import ParameterSpec, generator, under, with_prefix
from moeport.core.routing import RouterContext


@dataclass(frozen=True)
class Batch:
    """Token sequences, on the host or as arrays of a backend."""

    token_BS: Array
    """Input ids."""
    target_BS: Array
    """Next ids."""
    noise: dict[str, Array] = field(default_factory=dict)
    """Uniform numbers (B, S) by `layer.name`, for routers that draw; empty outside training."""


class LossTerms(NamedTuple):
    """The training loss and its parts; scalars but for the last two."""

    loss: Array
    """What is differentiated: cross entropy plus weighted auxiliary losses."""
    cross_entropy: Array
    """Mean negative log-likelihood in nats a token."""
    load_balance: Array
    """Load-balancing loss, mean over the layers, not weighted; 1 is balanced."""
    router_z: Array
    """Router z-loss, mean over the layers, not weighted."""
    output_z: Array
    """Output z-loss, not weighted."""
    chosen_LE: Array
    """Assignments the router chose each expert for, a row for each MoE layer, sub-layers one by one."""
    served_LE: Array
    """Assignments each expert computed."""


class Block:
    """One transformer block's shapes and forward pass; holds no arrays."""

    def __init__(self, config: ModelConfig, layer: int, vocab_size: int):
        self.config = config
        self.layer = layer
        self.out_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.moe: dict[str, MoELayer] = {}
        """Mixture-of-experts layers by what is appended to their parameters' names; none in a dense block."""
        if config.is_moe_layer(layer):
            for number in range(config.moe.router.sub_layers):
                suffix = "" if number == 0 else str(number + 1)
                self.moe[suffix] = MoELayer(config.moe, config.d_model, config.init_std, self.out_std, vocab_size)

    def parameter_specs(self) -> list[ParameterSpec]:
        """Names, shapes and initial values."""
        config = self.config
        norm = ParameterSpec("weight", (config.d_model,), "ones")
        specs = [
            *with_prefix("attention_norm", [norm]),
            *with_prefix("attention", attention_specs(config, self.out_std)),
        ]
        for suffix, moe in self.moe.items():
            specs += with_prefix(f"mlp_norm{suffix}", [norm]) + with_prefix(f"moe{suffix}", moe.parameter_specs())
        if not self.moe:
            dense = mlp_specs(config.d_model, config.dense_width, config.moe.activation, config.init_std, self.out_std)
            specs += with_prefix("mlp_norm", [norm]) + with_prefix("mlp", dense)
        return specs

    def forward(
        self,
        ops: Ops,
        params: Mapping[str, Array],
        x_BSD: Array,
        rope: tuple[Array, Array],
        context: RouterContext,
    ) -> tuple[Array, tuple[MoEMetrics, ...]]:
        """x + attention(norm(x)), then x + feed_forward(norm(x)), once for each mixture-of-experts layer of the block.

        Returns: (x_BSD, metrics of those layers; none for a dense block).
        """
        config = self.config
        normed = ops.rms_norm(x_BSD, params["attention_norm.weight"], config.norm_eps)
        x_BSD = x_BSD + attention_forward(ops, config, under("attention", params), normed, rope)
        if not self.moe:
            normed = ops.rms_norm(x_BSD, params["mlp_norm.weight"], config.norm_eps)
            return x_BSD + ops.mlp(normed, params["mlp.w_in"], params["mlp.w_out"], config.moe.activation), ()
        metrics = []
        for suffix, moe in self.moe.items():
            normed = ops.rms_norm(x_BSD, params[f"mlp_norm{suffix}.weight"], config.norm_eps)
            normed_TD = ops.reshape(normed, (-1, config.d_model))
            y_TD, layer_metrics = moe.forward(ops, under(f"moe{suffix}", params), normed_TD, context)
            x_BSD = x_BSD + ops.reshape(y_TD, x_BSD.shape)
            metrics.append(layer_metrics)
        return x_BSD, tuple(metrics)


RunBlock = Callable[[Block, Array, tuple[Array, Array], RouterContext], tuple[Array, tuple[MoEMetrics, ...]]]
"""How a backend runs one block: from its module, recomputed, compiled."""


class DecoderLM:
    """Shapes and forward pass of the whole model; holds no arrays.

    Args:
        config: the `model` section.
        vocab_size: rows of the embedding V.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        self.config = config
        self.vocab_size = config.vocab_size or vocab_size
        self.blocks = [Block(config, layer, self.vocab_size) for layer in range(config.num_layers)]

    def parameter_specs(self) -> list[ParameterSpec]:
        """All parameters; their names are the checkpoint's names."""
        config = self.config
        embedding = ParameterSpec("embedding.weight", (self.vocab_size, config.d_model), std=config.init_std)
        specs = [embedding]
        for block in self.blocks:
            specs += with_prefix(f"layers.{block.layer}", block.parameter_specs())
        specs.append(ParameterSpec("final_norm.weight", (config.d_model,), "ones"))
        if not config.tie_embeddings:
            specs.append(ParameterSpec("lm_head.weight", (self.vocab_size, config.d_model), std=config.init_std))
        return specs

    def noise(self, batch_size: int, sequence_length: int, seed: int, step: int) -> dict[str, np.ndarray]:
        """Routing noise of one whole step's batch, (B, S) float32 each; slice it as the batch is sliced."""
        return {
            f"{block.layer}.{name}": generator(seed, "noise", step, block.layer, name).random(
                (batch_size, sequence_length), np.float32
            )
            for block in self.blocks
            if block.moe
            for name in block.moe[""].router.noise
        }

    def rope(self, ops: Ops, sequence_length: int, dtype: str) -> tuple[Array, Array]:
        """Rotary tables (S, A) on the device, float32 at least."""
        cos, sin = rope_tables(sequence_length, self.config.head_dim, self.config.attention.rope_base)
        kind = "float32" if dtype == "bfloat16" else dtype
        return ops.cast(ops.from_numpy(cos), kind), ops.cast(ops.from_numpy(sin), kind)

    def hidden(
        self,
        ops: Ops,
        params: Mapping[str, Array],
        batch: Batch,
        rope: tuple[Array, Array],
        dtype: str,
        training: bool,
        run_block: RunBlock | None = None,
    ) -> tuple[Array, list[MoEMetrics]]:
        """Normalised hidden states of the last block.

        Args:
            ops: the backend's operations.
            params: all parameters by name; with `run_block`, those outside the blocks suffice.
            batch: arrays of the backend; targets are not read.
            rope: from `rope`, for the batch's sequence length.
            dtype: compute type, one of FLOAT_DTYPES.
            training: whether routers may draw noise.
            run_block: how to run a block; default: on `params`.

        Returns: (x_BSD in the compute type, metrics of each MoE layer).
        """
        if run_block is None:

            def run_block(
                block: Block, x_BSD: Array, rope: tuple[Array, Array], context: RouterContext
            ) -> tuple[Array, tuple[MoEMetrics, ...]]:
                return block.forward(ops, under(f"layers.{block.layer}", params), x_BSD, rope, context)

        token_ids_T = ops.reshape(batch.token_BS, (-1,))
        x_BSD = ops.cast(ops.take_rows(params["embedding.weight"], batch.token_BS), dtype)
        metrics: list[MoEMetrics] = []
        for block in self.blocks:
            prefix = f"{block.layer}."
            noise = {
                name[len(prefix) :]: ops.reshape(noise_BS, (-1,))
                for name, noise_BS in batch.noise.items()
                if name.startswith(prefix)
            }
            context = RouterContext(block.layer, training, token_ids_T, noise, num_sequences=batch.token_BS.shape[0])
            x_BSD, block_metrics = run_block(block, x_BSD, rope, context)
            metrics += block_metrics
        return ops.rms_norm(x_BSD, params["final_norm.weight"], self.config.norm_eps), metrics

    def head(self, params: Mapping[str, Array]) -> Array:
        """The output projection (V, D)."""
        return params["embedding.weight" if self.config.tie_embeddings else "lm_head.weight"]

    def logits(
        self, ops: Ops, params: Mapping[str, Array], batch: Batch, rope: tuple[Array, Array], dtype: str
    ) -> Array:
        """Next-token scores (B, S, V) in the compute type, outside training. Arguments as in `hidden`."""
        return ops.linear(self.hidden(ops, params, batch, rope, dtype, training=False)[0], self.head(params))

    def loss(
        self,
        ops: Ops,
        params: Mapping[str, Array],
        batch: Batch,
        rope: tuple[Array, Array],
        dtype: str,
        training: bool,
        run_block: RunBlock | None = None,
    ) -> LossTerms:
        """Mean cross entropy plus weighted auxiliary losses. Arguments as in `hidden`."""
        x_BSD, layers = self.hidden(ops, params, batch, rope, dtype, training, run_block)
        loss, cross_entropy, output_z = ops.linear_cross_entropy(
            ops.reshape(x_BSD, (-1, self.config.d_model)),
            self.head(params),
            ops.reshape(batch.target_BS, (-1,)),
            self.config.output_z_loss,
        )
        load_balance = router_z = ops.zeros((), ops.dtype(loss))
        share = ops.constant_like(1.0 / len(layers), loss)
        moe_layers = [moe for block in self.blocks for moe in block.moe.values()]
        for layer, metrics in zip(moe_layers, layers, strict=True):
            loss = loss + layer.auxiliary_loss(ops, metrics)
            load_balance = load_balance + metrics.load_balance * share
            router_z = router_z + metrics.router_z * share
        return LossTerms(
            loss=loss,
            cross_entropy=cross_entropy,
            load_balance=load_balance,
            router_z=router_z,
            output_z=output_z,
            chosen_LE=ops.concat([ops.reshape(m.chosen_E, (1, -1)) for m in layers], axis=0),
            served_LE=ops.concat([ops.reshape(m.served_E, (1, -1)) for m in layers], axis=0),
        )

    def router_state_names(self) -> list[str]:
        """Untrained parameters that routers update after each step."""
        return [spec.name for spec in self.parameter_specs() if not (spec.trainable or spec.is_table)]

    def updated_state(self, state: Mapping[str, np.ndarray], chosen_LE: np.ndarray) -> dict[str, np.ndarray]:
        """New values of the untrained parameters after an optimiser step.

        Args:
            state: their present values by full name.
            chosen_LE: assignments of the whole step, a row for each MoE layer.
        """
        updates: dict[str, np.ndarray] = {}
        layers = [(block.layer, suffix, moe) for block in self.blocks for suffix, moe in block.moe.items()]
        for (layer, suffix, moe), chosen_E in zip(layers, chosen_LE, strict=True):
            prefix = f"layers.{layer}.moe{suffix}.router"
            if router_state := under(prefix, state):
                new = moe.router.update_state(router_state, chosen_E)
                updates |= {f"{prefix}.{name}": value for name, value in new.items()}
        return updates
