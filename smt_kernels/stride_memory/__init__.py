"""All writes of a pass: pooling and the whole stack of Mamba blocks, group of writes after group, as one operation.

    pooled = attention_pool(window);   x = pooled;   x += W_out write(W_in RMSNorm(x)) for each layer;   slot = RMSNorm(x)

A group of writes pools the slots of the groups before it, so groups come one after the other; but their activations lie in
buffers of the whole pass, from which every weight gradient is one product, and there is one backward pass for all.

The folder, in the order to read it:

    reference.py   the definition; the tuples that all files hand on; which writes are a group, and what they see
    kept.py        what a forward pass keeps for its backward pass
    places.py      where a group lies in that
    blocked.py     the same out of the blocked forms of the two operations that it is made of, for any device
    norm.py        residual and RMSNorm in one kernel, forward and backward
    kernels.py     the Triton backend, forward: six launches per group and layer
    gradients.py   the Triton backend, backward: six launches per group and layer, and weights once per pass

Before it: ``smt_kernels.attention_pool`` and ``smt_kernels.stride_write``, whose kernels it launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.attention_pool import check_timeline
from smt_kernels.attention_pool.reference import Timeline
from smt_kernels.operators import register
from smt_kernels.precision import accumulation_dtype
from smt_kernels.stride_memory import reference
from smt_kernels.stride_memory.kept import layout
from smt_kernels.stride_memory.reference import Inputs, MemoryWeights, Pass
from smt_kernels.window import WindowSpec


class Memory(NamedTuple):
    """What a run of writes leaves."""

    slots: Tensor  # (B, K, d)
    conv_state: Tensor  # (L, B, E, C - 1)
    ssm_state: Tensor  # (L, B, E, N)
    pooling: Tensor  # (B, K, W)


def stride_memory(
    tokens: Tensor,
    slots: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: MemoryWeights,
    *,
    window: WindowSpec,
    first_write: int,
    n_writes: int,
    write_group: int = 1,
    first_step: int = 0,
    normalise: bool = True,
    gate: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    backend: str | None = None,
) -> Memory:
    """Make ``n_writes`` consecutive writes, group by group; differentiable in tokens, slots, states and all weights.

    Which tokens and slots a write pools, ``attention_pool_sequence`` says; what a layer makes of a write, ``stride_write``.
    Matrices are multiplied in the dtype of tokens; between layers x is in float32 (float64 for float64).

    Args:
        tokens: (B, T, d), of which tokens[:, 0] is step ``first_step``. Holds at least the write steps of all writes.
        slots: (B, n, d) in the dtype of tokens, the slots just before the first write, n >= 0; None: pool tokens only, which
            makes all writes one group.
        conv_state, ssm_state: (L, B, E, C - 1) and (L, B, E, N), of each layer before the first write.
        weights: those of all layers stacked, see ``MemoryWeights``. w_q, w_k, in_proj and out_proj have the dtype of tokens;
            states and all other weights have it or, for float16 and bfloat16, float32.
        window: sizes and stride of the window.
        first_write, n_writes: the writes, ``first_write >= 0``, ``n_writes >= 1``.
        write_group: writes per group, at least 1; the slots of the group itself are not pooled.
        first_step: what the first token is called; negative where it precedes the sequence.
        normalise: divide every pooled entry by its root mean square first.
        gate: (B, K) bool, which writes happen; None: all. Where one does not, states are kept bit for bit, and its slot means
            nothing.
        dropout_mask: (B, K, W) in the dtype of tokens, factors of the pooling weights, not differentiated; None: 1.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        the new slots (B, K, d) in the dtype of ``norm_f``, both states after the last write, and the pooling weights before
        dropout (B, K, W) in the dtype of tokens, W being ``window.size``, without slots ``window.n_tokens``.

    Raises:
        TypeError: a dtype or the type of a setting that does not fit.
        ValueError: a shape, device or setting that does not fit, or tokens that do not reach from the first to the last write.

    Source: the writes of ``docs/model.md``; Mamba (Gu and Dao, 2023).
    """
    weights = MemoryWeights(*weights)
    _check(tokens, slots, conv_state, ssm_state, weights, n_writes, gate)
    first_slot = first_write - (0 if slots is None else slots.shape[1])
    timeline = Timeline(first_write, n_writes, write_group, first_step, first_slot)
    _check_settings(tokens, slots, window, timeline, dropout_mask)
    backend = backends.choose("stride_memory", tokens, backend)
    dropout = None if dropout_mask is None else dropout_mask.detach()
    inputs = Inputs(conv_state, ssm_state, gate, dropout)
    run = Pass(*checks.unit_stride(tokens), slots, weights, inputs, window, timeline, normalise)
    if backend == "reference":
        return Memory(*reference.stride_memory(*run))
    new_slots, new_conv, new_ssm, pooling, _ = _run(run, backend=backend)
    return Memory(new_slots, new_conv, new_ssm, pooling.transpose(0, 1).to(tokens.dtype))


def _check(
    tokens: Tensor,
    slots: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: MemoryWeights,
    n_writes: int,
    gate: Tensor | None,
) -> None:
    checks.shape("tokens", tokens, {"B": None, "T": None, "d": None})
    checks.floating("tokens", tokens)
    batch, _, width = tokens.shape
    if slots is not None:
        checks.shape("slots", slots, {"B": batch, "n": None, "d": width}, may_be_empty=("n",))
        checks.like("slots", slots, "tokens", tokens)
    checks.shape("a", weights.a, {"L": None, "E": None, "N": None})
    checks.shape("conv_weight", weights.conv_weight, {"L": weights.a.shape[0], "E": weights.a.shape[1], "C": None})
    checks.shape("dt_proj", weights.dt_proj, {"L": weights.a.shape[0], "E": weights.a.shape[1], "R": None})
    checks.shape("w_q", weights.w_q, {"d_k": None, "d": width})
    layers, inner, n_state = weights.a.shape
    taps, rank = weights.conv_weight.shape[2], weights.dt_proj.shape[2]
    of_layers = {
        "norm": {"d": width},
        "in_proj": {"2 E": 2 * inner, "d": width},
        "conv_bias": {"E": inner},
        "x_proj": {"R + 2 N": rank + 2 * n_state, "E": inner},
        "dt_bias": {"E": inner},
        "d": {"E": inner},
        "out_proj": {"d": width, "E": inner},
    }
    for name, expected in of_layers.items():
        checks.shape(name, getattr(weights, name), {"L": layers, **expected})
    checks.shape("w_k", weights.w_k, {"d_k": len(weights.w_q), "d": width})
    checks.shape("norm_f", weights.norm_f, {"d": width})
    expected = {"L": layers, "B": batch, "E": inner, "C - 1": taps - 1}
    checks.shape("conv_state", conv_state, expected, may_be_empty=("C - 1",))
    checks.shape("ssm_state", ssm_state, {"L": layers, "B": batch, "E": inner, "N": n_state})
    allowed = tokens.dtype, torch.promote_types(tokens.dtype, torch.float32)
    for name, tensor in {**weights._asdict(), "conv_state": conv_state, "ssm_state": ssm_state}.items():
        checks.like(name, tensor, "tokens", tokens, dtype=name in ("w_q", "w_k", "in_proj", "out_proj"))
        if tensor.dtype not in allowed:
            wanted = " or ".join(map(str, dict.fromkeys(allowed)))
            raise TypeError(f"{name} must be {wanted} for tokens of {tokens.dtype}, got {tensor.dtype}")
    if gate is not None:
        checks.shape("gate", gate, {"B": batch, "K": n_writes})
        checks.like("gate", gate, "tokens", tokens, dtype=False)
        if gate.dtype != torch.bool:
            raise TypeError(f"gate must be bool, got {gate.dtype}")


def _check_settings(
    tokens: Tensor, slots: Tensor | None, window: WindowSpec, timeline: Timeline, dropout_mask: Tensor | None
) -> None:
    check_timeline(window, timeline, tokens.shape[1])
    size = window.n_tokens if slots is None else window.size
    if dropout_mask is not None:
        checks.shape("dropout_mask", dropout_mask, {"B": len(tokens), "K": timeline.n_writes, "W": size})
        checks.like("dropout_mask", dropout_mask, "tokens", tokens)


def _empty(run: Pass, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """slots (B, K, d), both states after K, pooling weights (K, B, W), and what is kept, a buffer in float32 or float64."""
    batch, _, width = run.tokens.shape
    wide, n_writes = accumulation_dtype(run.tokens.dtype), run.timeline.n_writes
    states = (state.new_empty(state.shape) for state in run.inputs[:2])
    pooling = run.tokens.new_empty((n_writes, batch, run.pooled_size), dtype=wide)
    kept = layout(backend, run)
    buffer = run.tokens.new_empty(kept.size, dtype=kept.dtype)
    return run.weights.norm_f.new_empty(batch, n_writes, width), *states, pooling, buffer


_run = register(_empty, outputs=4, kept=2, gradients=4 + len(MemoryWeights._fields))
