"""What a Hymba keeps while it decodes, in bytes, counted from its configuration."""

from __future__ import annotations

from smt.hymba.config import HymbaConfig


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
