"""What a Hymba costs, counted from its configuration: parameters, multiply-adds per token and bytes of the cache.

Conventions are those of ``smt.model.cost``.
"""

from __future__ import annotations

from smt.hymba.config import HymbaConfig


def n_parameters(config: HymbaConfig) -> int:
    """Parameters, the embedding, which is the head, counted once."""
    d, inner, state = config.d_model, config.ssm_d_inner, config.ssm_d_state
    ssm = inner * (config.ssm_d_conv + 1) + inner + inner * state + inner  # convolution, bias of the time step, A and D
    others = 0
    for plan in config.layers():
        others += 2 * d + plan.mamba * (ssm + (2 * inner if plan.attention else 0))
    return (config.vocab_size + config.n_meta_tokens) * d + _matrices(config) + others + d


def products_per_token(config: HymbaConfig, context: int) -> int:
    """Multiply-adds of one token that sees ``context`` tokens, itself among them, besides the meta tokens."""
    total = _matrices(config) + config.vocab_size * config.d_model
    for plan in config.layers():
        if plan.attention:
            keys = config.n_meta_tokens + (context if plan.attention == "global" else min(context, config.sliding_window))
            total += keys * (config.d_model + (config.ssm_d_inner if plan.mamba else config.d_model))
        if plan.mamba:
            total += config.ssm_d_inner * (config.ssm_d_conv + 3 * config.ssm_d_state)
    return total


def cache_bytes(config: HymbaConfig, n_tokens: int, batch_size: int = 1, bytes_per_element: int = 4) -> int:
    """Bytes of ``Hymba.new_cache(batch_size, n_tokens)``: keys and values of the layers that make them, and states of SSMs.

    Args:
        n_tokens: for which global layers have room; local ones keep their window, whatever it is.
        batch_size: rows, which share the keys and values of the meta tokens.
        bytes_per_element: of keys, values and convolutions; states of SSMs have 4 at least.
    """
    total = 0
    for index, plan in enumerate(config.layers()):
        if plan.kv_source == index:
            room = n_tokens if plan.attention == "global" else config.sliding_window
            _, n_keys, n_values = config.head_counts(index)
            of_token = (n_keys + n_values) * config.head_dim * bytes_per_element
            total += (config.n_meta_tokens + batch_size * room) * of_token
        if plan.mamba:
            state = config.ssm_d_state * max(4, bytes_per_element) + (config.ssm_d_conv - 1) * bytes_per_element
            total += batch_size * config.ssm_d_inner * state
    return total


def _matrices(config: HymbaConfig) -> int:
    """The matrices of all layers, each of which is one product per token."""
    d, inner, rank = config.d_model, config.ssm_d_inner, config.dt_rank
    total = 0
    for index, plan in enumerate(config.layers()):
        total += 3 * d * config.mlp_width + d * (inner if plan.mamba else d)
        if plan.attention:
            total += d * sum(config.head_counts(index)) * config.head_dim
        if plan.mamba:
            total += d * 2 * inner + inner * (rank + 2 * config.ssm_d_state) + rank * inner
    return total
