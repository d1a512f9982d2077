"""What a run costs per token in units that hold for experts of any width: parameters and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

from moeport.config.model import ModelConfig


@dataclass(frozen=True)
class Cost:
    """The cost of tokens and of rows, in FLOPs of the forward and backward pass.

    The convention is that of `ModelConfig.block_flops_per_token`, with the rows that were computed instead of the K
    choices of each token: 6 per number of an expert's matrices and row. Padding is not counted, nor what a router does
    besides its matrix product, such as the iterations of Sinkhorn.
    """

    row: int
    """Of one row of a routed expert."""
    always: int
    """Per token, of experts that process every token: shared experts and dense blocks beside the routed ones."""
    rest: float
    """Per token, of everything else: attention, dense layers, routers, head."""
    passes: int
    """Passes of a batch through the model in training; rows are those of all passes."""
    parameters_apart: int
    """Parameters that a token uses besides routed experts."""
    parameters_of_row: int
    """Parameters of one routed expert."""

    @classmethod
    def of(cls, model: ModelConfig, flops_per_token: float, parameters_active: int) -> Cost:
        """That of a model.

        Args:
            model: its config.
            flops_per_token: forward and backward, if each token has all of its choices.
            parameters_active: those that such a token uses.
        """
        router, layers = model.moe.router, model.expert_layers
        chosen = layers * router.experts_per_token
        row = 6 * model.expert_parameters
        always = router.passes * layers * 6 * model.always_active_parameters
        rest = flops_per_token - router.passes * chosen * row - always
        apart = parameters_active - chosen * model.expert_parameters
        return cls(row, always, rest, router.passes, apart, model.expert_parameters)

    def experts(self, rows_per_token: float) -> float:
        """FLOPs per token of routed and shared experts."""
        return self.always + rows_per_token * self.row

    def per_token(self, rows_per_token: float) -> float:
        """FLOPs per token of the whole model."""
        return self.rest + self.experts(rows_per_token)

    def total(self, tokens: float, rows: float) -> float:
        """FLOPs of a number of tokens for which the experts have computed a number of rows."""
        return tokens * (self.rest + self.always) + rows * self.row

    def active_parameters(self, rows_per_token: float) -> float:
        """Parameters that a token uses on average, if experts compute this many rows per token."""
        return self.parameters_apart + rows_per_token / self.passes * self.parameters_of_row
