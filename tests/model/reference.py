"""The mixture-of-experts layer as a loop over tokens in plain numpy float64."""

import math

import numpy as np

from moeport.conformance import formulas


def served(expert_TK, gate_TK, num_experts, capacity, drop, affinity_TK=None, noise_TK=None):
    """Which assignments are served, (T, K): a loop over them in the order in which experts fill up."""
    tokens, choices = expert_TK.shape
    queue = [(token, choice) for choice in range(choices) for token in range(tokens)]
    if drop == "probability":
        queue.sort(key=lambda place: -gate_TK[place])
    elif drop == "affinity":
        queue.sort(key=lambda place: -affinity_TK[place])
    elif drop == "random" and noise_TK is not None:
        queue.sort(key=lambda place: noise_TK[place])
    load, kept = [0] * num_experts, np.zeros((tokens, choices), bool)
    for place in queue:
        expert = expert_TK[place]
        if expert < num_experts and load[expert] < capacity:
            load[expert] += 1
            kept[place] = True
    return kept


def moe_layer(config, params, x_TD, routing, noise_TK=None):
    """Output of the layer (T, D) and which assignments were served, given the router's decisions."""
    expert_TK = routing.expert_N.reshape(routing.num_tokens, -1)
    gate_TK = routing.weight_N.reshape(routing.num_tokens, -1)
    capacity = math.inf
    if config.capacity.policy == "factor":
        capacity = math.ceil(config.capacity.factor * expert_TK.size / config.num_experts)
    affinity_TK = None if routing.affinity_N is None else routing.affinity_N.reshape(expert_TK.shape)
    kept = served(expert_TK, gate_TK, config.num_experts, capacity, config.capacity.drop, affinity_TK, noise_TK)
    out = np.zeros_like(x_TD)
    for (token, choice), keep in np.ndenumerate(kept):
        if keep:
            expert = expert_TK[token, choice]
            w_in, w_out = params["experts.w_in"][expert], params["experts.w_out"][expert]
            out[token] += gate_TK[token, choice] * formulas.mlp(x_TD[token], w_in, w_out, config.activation)
    out *= config.routed_scaling_factor
    if config.num_shared_experts:
        shared = formulas.mlp(x_TD, params["shared.w_in"], params["shared.w_out"], config.activation)
        out = mixed(params, x_TD, out, shared) if "mixing.weight" in params else out + shared
    if config.residual_hidden:
        out += formulas.mlp(x_TD, params["dense.w_in"], params["dense.w_out"], config.activation)
    return out, kept


def mixed(params, x_TD, routed_TD, shared_TD):
    """Each token's routed and shared outputs, by its two-way softmax; with one row, the shared by its sigmoid."""
    if len(params["mixing.weight"]) == 1:
        gates = 1 / (1 + np.exp(-(x_TD @ params["mixing.weight"][0])))
        return np.array([y + gate * z for gate, y, z in zip(gates, routed_TD, shared_TD, strict=True)])
    shares = [formulas.softmax(params["mixing.weight"] @ x) for x in x_TD]
    return np.array([p * y + q * z for (p, q), y, z in zip(shares, routed_TD, shared_TD, strict=True)])
