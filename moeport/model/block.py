"""One transformer block. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from moeport.config.model import ModelConfig
from moeport.core.array import Array
from moeport.core.dispatch import RunExperts, RunPart
from moeport.core.parameters import ParameterSpec, subtree, with_prefix
from moeport.core.routing import RouterContext
from moeport.model.attention import attention_forward, attention_specs
from moeport.model.forward_pass import BlockOutput, Pass
from moeport.model.moe import MoELayer, mlp_specs


class Block:
    """One transformer block's shapes and forward pass; holds no arrays.

    Args:
        config: the `model` section.
        layer: index of the block.
        vocab_size: V, for routers that look at token ids; None if there are none.
        causal: whether a position sees only itself and earlier ones.
    """

    def __init__(self, config: ModelConfig, layer: int, vocab_size: int | None, causal: bool = True):
        self.config = config
        self.layer = layer
        self.vocab_size = vocab_size
        self.causal = causal
        self.out_std = config.init_std / (2 * config.num_layers) ** 0.5
        self.moe: dict[str, MoELayer] = {}
        """Mixture-of-experts layers by the suffix of their parameters' names; empty in a dense block."""
        if config.is_moe_layer(layer):
            for number in range(config.moe.router.sub_layers):
                suffix = "" if number == 0 else str(number + 1)
                self.moe[suffix] = MoELayer(config.moe, config.d_model, config.init_std, self.out_std, vocab_size)
                self.moe[suffix].adds_dense &= not config.moe.dense_follows

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
            if config.moe.dense_follows:
                specs += with_prefix(f"dense_norm{suffix}", [norm])
        if not self.moe:
            dense = mlp_specs(config.d_model, config.dense_width, config.moe.activation, config.init_std, self.out_std)
            specs += with_prefix("mlp_norm", [norm]) + with_prefix("mlp", dense)
        return specs

    def forward(
        self,
        run: Pass,
        params: Mapping[str, Array],
        x_BSD: Array,
        context: RouterContext,
        run_experts: Callable[[str], RunExperts] | None = None,
        run_part: Callable[[str], RunPart] | None = None,
    ) -> BlockOutput:
        """x + attention(norm(x)), then x + feed_forward(norm(x)), once per mixture-of-experts layer of the block.

        Where the config says so, each of these layers is followed by x + dense(norm(x)), as in OpenMoE's released code.

        `run_experts` maps a key of `moe` to a function that supplies the weights of the local experts, and `run_part`
        to one that supplies the parameters of the layer's other parts; by default they are taken from `params`.

        Returns: (x_BSD, metrics of those layers; none for a dense block).
        """
        config, ops = self.config, run.ops
        normed = ops.rms_norm(x_BSD, params["attention_norm.weight"], config.norm_eps)
        x_BSD = x_BSD + attention_forward(run, config, subtree("attention", params), normed, self.causal)
        if not self.moe:
            normed = ops.rms_norm(x_BSD, params["mlp_norm.weight"], config.norm_eps)
            return x_BSD + ops.mlp(normed, params["mlp.w_in"], params["mlp.w_out"], config.moe.activation), ()
        metrics = []
        for suffix, moe in self.moe.items():
            normed = ops.rms_norm(x_BSD, params[f"mlp_norm{suffix}.weight"], config.norm_eps)
            normed_TD = ops.reshape(normed, (-1, config.d_model))
            layer_context = replace(context, noise=subtree(suffix, context.noise)) if suffix else context
            experts = run_experts(suffix) if run_experts is not None else None
            part = run_part(suffix) if run_part is not None else None
            own = subtree(f"moe{suffix}", params)
            y_TD, layer_metrics = moe.forward(ops, own, normed_TD, layer_context, experts, part)
            x_BSD = x_BSD + ops.reshape(y_TD, x_BSD.shape)
            if config.moe.dense_follows:
                normed = ops.rms_norm(x_BSD, params[f"dense_norm{suffix}.weight"], config.norm_eps)
                x_BSD = x_BSD + moe.mlp(ops, subtree(f"moe{suffix}.dense", params), normed)
            metrics.append(layer_metrics)
        return x_BSD, tuple(metrics)
