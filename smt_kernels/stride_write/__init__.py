"""The stride-gated write of a Mamba block, between its two projections: convolution, selective state update, output gate.

u = silu(conv(x));  (low, b, c) = W_x u;  dt = softplus(W_dt low + bias)
h_k = exp(dt_k a) h_{k-1} + dt_k b_k u_k;   y_k = (c_k . h_k + d u_k) silu(z_k)

The folder, in the order to read it:

    reference.py              the definition, and the tuple of weights that all files hand on
    kept.py                   what a forward pass keeps for its backward pass
    blocked.py                the same for all K at once but for the recurrence, for any device
    blocks.py                 the parts of the formula that kernels share, and their launch with its settings
    order.py                  which writes of each row happen, as kernels look it up
    kernels.py                the Triton backend: one launch for a single write; several as convolution and scan
    single_write.py           the first of these
    convolution.py            what comes before W_x and that product
    convolution_backward.py   and backward
    fold.py                   the sum of what blocks of channels add to W_x u, and to its gradient
    conv_states.py            what is left of the convolution's inputs for the next writes, and backward
    scan.py                   what comes behind W_x, parallel in time
    scan_backward.py          and backward
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.operators import register
from smt_kernels.stride_write.kept import layout
from smt_kernels.stride_write.reference import Weights
from smt_kernels.stride_write.reference import stride_write as reference


def stride_write(
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    a: Tensor,
    d: Tensor,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run K writes per row through the middle of a Mamba block, from given states; differentiable in all of them.

    Where the gate is off, y is 0, both states are kept bit for bit, and x and z (even nan) have no influence on any result or
    gradient. The states that come back are new tensors.

    Args:
        x, z: (B, K, E), the two halves of the input projection, K >= 1.
        conv_state: (B, E, C - 1), the last conv inputs, oldest first.
        ssm_state: (B, E, N).
        conv_weight, conv_bias: depthwise causal convolution, (E, C) and (E,).
        x_proj_weight: (R + 2 N, E), for the low-rank dt, b and c.
        dt_proj_weight, dt_proj_bias: (E, R) and (E,), from the low-rank dt to dt.
        a: (E, N), negative: -exp(A_log).
        d: (E,), the skip.
        gate: (B, K) bool, which writes happen; None: all.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

        z has the dtype of x. States and weights have the dtype of x or, for float16 and bfloat16, float32.

    Returns:
        y (B, K, E) in the dtype of x, and both states after the K writes, in the shapes and dtypes they came in.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.

    Source: Mamba (Gu and Dao, 2023), algorithm 2 and section 3.4.
    """
    weights = Weights(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d)
    _check(x, z, conv_state, ssm_state, weights, gate)
    backend = backends.choose("stride_write", x, backend)
    if backend == "reference":
        return reference(x, z, conv_state, ssm_state, weights, gate)
    y, conv_state, ssm_state, _ = _run(*checks.unit_stride(x, z), conv_state, ssm_state, weights, gate, backend=backend)
    return y, conv_state, ssm_state


def _check(x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: Weights, gate: Tensor | None) -> None:
    conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d = weights
    checks.shape("x", x, {"B": None, "K": None, "E": None})
    checks.floating("x", x)
    batch, n_writes, width = x.shape
    checks.shape("z", z, {"B": batch, "K": n_writes, "E": width})
    checks.like("z", z, "x", x)
    checks.shape("conv_weight", conv_weight, {"E": width, "C": None})
    checks.shape("conv_bias", conv_bias, {"E": width})
    checks.shape("a", a, {"E": width, "N": None})
    checks.shape("d", d, {"E": width})
    checks.shape("dt_proj_weight", dt_proj_weight, {"E": width, "R": None})
    checks.shape("dt_proj_bias", dt_proj_bias, {"E": width})
    n_state, rank = a.shape[1], dt_proj_weight.shape[1]
    checks.shape("x_proj_weight", x_proj_weight, {"R + 2 N": rank + 2 * n_state, "E": width})
    checks.shape("conv_state", conv_state, {"B": batch, "E": width, "C - 1": conv_weight.shape[1] - 1}, may_be_empty=("C - 1",))
    checks.shape("ssm_state", ssm_state, {"B": batch, "E": width, "N": n_state})
    allowed = (x.dtype, torch.promote_types(x.dtype, torch.float32))
    for name, tensor in zip(("conv_state", "ssm_state", *Weights._fields), (conv_state, ssm_state, *weights), strict=True):
        checks.like(name, tensor, "x", x, dtype=False)
        if tensor.dtype not in allowed:
            raise TypeError(
                f"{name} must be {' or '.join(map(str, dict.fromkeys(allowed)))} for x of {x.dtype}, got {tensor.dtype}"
            )
    if gate is not None:
        checks.shape("gate", gate, {"B": batch, "K": n_writes})
        if gate.dtype != torch.bool:
            raise TypeError(f"gate must be bool, got {gate.dtype}")
        checks.like("gate", gate, "x", x, dtype=False)


def _empty(
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: Weights,
    gate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, K, E), both states after K, and what is kept, a buffer in float32 or float64."""
    kept = layout(backend, x, conv_state, len(weights.x_proj_weight), ssm_state.shape[2])
    results = (tensor.new_empty(tensor.shape) for tensor in (x, conv_state, ssm_state))
    return *results, x.new_empty(kept.size, dtype=kept.dtype)


_run = register(_empty, outputs=3, kept=1, gradients=4 + len(Weights._fields))
