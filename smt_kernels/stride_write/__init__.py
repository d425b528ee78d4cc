"""The stride-gated write of a Mamba block, between its two projections: convolution, selective state update, output gate.

u = silu(conv(x));  (low, b, c) = W_x u;  dt = softplus(W_dt low + bias)
h_k = exp(dt_k a) h_{k-1} + dt_k b_k u_k;   y_k = (c_k . h_k + d u_k) silu(z_k)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.direct import direct
from smt_kernels.stride_write import blocked
from smt_kernels.stride_write.kept import kept_size
from smt_kernels.stride_write.reference import stride_write as reference

# Elements that the forward pass of a backend keeps for its backward pass; known without triton.
_KEPT_SIZE = {"blocked": blocked.kept_size, "triton": kept_size}


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

    Source: DESIGN 2.1 and 4.4; Mamba (Gu and Dao, 2023), algorithm 2 and section 3.4.
    """
    weights = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d)
    _check(x, z, conv_state, ssm_state, weights, gate)
    backend = backends.choose("stride_write", x, backend)
    if backend == "reference":
        return reference(x, z, conv_state, ssm_state, *weights, gate)
    y, conv_state, ssm_state, _ = _call(*checks.unit_stride(x, z), conv_state, ssm_state, *weights, gate, backend)
    return y, conv_state, ssm_state


def _check(x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: Sequence[Tensor], gate: Tensor | None) -> None:
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
    named = {
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "x_proj_weight": x_proj_weight,
        "dt_proj_weight": dt_proj_weight,
        "dt_proj_bias": dt_proj_bias,
        "a": a,
        "d": d,
    }
    for name, tensor in named.items():
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


def _compute(
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    a: Tensor,
    d: Tensor,
    gate: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d)
    return backends.implementation("stride_write", backend).forward(x, z, conv_state, ssm_state, parameters, gate)


_forward = torch.library.custom_op("smt_kernels::stride_write", _compute, mutates_args=())


@_forward.register_fake
def _(x, z, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, *others):
    *_, backend = others
    size = _KEPT_SIZE[backend](x, conv_state, len(x_proj_weight))
    results = (tensor.new_empty(tensor.shape) for tensor in (x, conv_state, ssm_state))
    return *results, x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))


def _compute_gradients(
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    a: Tensor,
    d: Tensor,
    gate: Tensor | None,
    kept: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d)
    backward = backends.implementation("stride_write", backend).backward
    return backward(grad_y, grad_conv, grad_ssm, x, z, conv_state, ssm_state, parameters, gate, kept)


_backward = torch.library.custom_op("smt_kernels::stride_write_backward", _compute_gradients, mutates_args=())


@_backward.register_fake
def _(grad_y, grad_conv, grad_ssm, *others):
    *inputs, _gate, _kept, _backend = others
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, backend = inputs
    kept = output[3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(*tensors, kept)
    ctx.backend = backend


def _autograd(backward):
    def autograd(ctx, grad_y, grad_conv, grad_ssm, _grad_kept):
        x = ctx.saved_tensors[0]
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        return *backward(grad_y, grad_conv, grad_ssm, *ctx.saved_tensors, ctx.backend), None, None

    return autograd


_forward.register_autograd(_autograd(_backward), setup_context=_setup_context)
_call = direct(_forward, _compute, _setup_context, _autograd(_compute_gradients))
