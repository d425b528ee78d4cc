"""The SSM write in Triton: one launch for a single write; for several, kernels around the matrix library's small products.

    u = silu(conv(x));  (low, b, c) = W_x u;  dt = softplus(W_dt low + bias)
    h_k = exp(dt_k a) h_{k-1} + dt_k b_k u_k;   y_k = (c_k . h_k + d u_k) silu(z_k)

A single write, where launches cost more than arithmetic, is parallel in rows only. Several writes are cut at the products, and
everything between is parallel in rows and blocks of E:

    forward    convolution | W_x, W_dt | scan
    backward   scan backward | W_dt, W_x | convolution backward

The forward pass keeps u and both products for the backward pass. Sums over rows and over blocks of E are left as one partial
sum per program, added up by the library: no atomics. Where the gate is off, u is 0, hence b and c; dt is set to 0; the states
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.checks import unit_stride
from smt_kernels.stride_write.convolution import convolution, convolution_backward
from smt_kernels.stride_write.kept import Kept, kept_size
from smt_kernels.stride_write.scan import scan, scan_backward
from smt_kernels.stride_write.single_write import single_write


def forward(
    x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, parameters: tuple[Tensor, ...], gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z (B, K, E), conv_state (B, E, C - 1), ssm_state (B, E, N), gate (B, K) -> y (B, K, E), both states after K, and
    ``kept_size`` elements for ``backward``.
    """
    weights = tuple(weight.contiguous() for weight in parameters)
    conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d = weights
    n_projected = len(x_proj_weight)
    buffer = x.new_empty(kept_size(x, conv_state, n_projected), dtype=torch.float32)
    kept = Kept.views(buffer, x, n_projected)
    if x.shape[1] == 1:
        return *single_write(x, z, conv_state, ssm_state, *weights, gate, kept), buffer
    new_conv_state = convolution(x, conv_state, conv_weight, conv_bias, gate, kept.u)
    low = kept.projected[..., : dt_proj_weight.shape[1]]
    _multiply(kept.u, x_proj_weight.T, kept.projected)
    _multiply(low, dt_proj_weight.T, kept.dt_product)
    y, new_ssm_state = scan(z, ssm_state, kept, dt_proj_bias, a, d, gate)
    return y, new_conv_state, new_ssm_state, buffer


def backward(
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    parameters: tuple[Tensor, ...],
    gate: Tensor | None,
    buffer: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, z, conv_state, ssm_state and of each of the seven weights, each in the dtype of its input."""
    conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d = (weight.contiguous() for weight in parameters)
    kept = Kept.views(buffer, x, len(x_proj_weight))
    (grad_y,) = unit_stride(grad_y)
    d_z, d_ssm, d_u, d_dt, d_bc, d_dt_bias, d_a, d_d = scan_backward(
        grad_y, grad_ssm, z, ssm_state, kept, dt_proj_bias, a, d, gate
    )
    d_projected = torch.cat([d_dt @ dt_proj_weight.to(x.dtype), d_bc.to(x.dtype)], dim=-1)
    d_u_projected = d_projected @ x_proj_weight.to(x.dtype)
    d_x, d_conv, d_conv_weight, d_conv_bias = convolution_backward(
        d_u, d_u_projected, grad_conv, x, conv_state, conv_weight, conv_bias, gate
    )
    low = kept.projected[..., : dt_proj_weight.shape[1]]
    d_x_proj, d_dt_proj = (grad.flatten(0, 1).T @ t.flatten(0, 1) for grad, t in ((d_projected, kept.u), (d_dt, low)))
    d_weights = d_conv_weight, d_conv_bias, d_x_proj, d_dt_proj, d_dt_bias, d_a, d_d
    return d_x, d_z, d_conv, d_ssm, *(grad.to(weight.dtype) for grad, weight in zip(d_weights, parameters, strict=True))


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x y for x (B, K, I), y (I, J) and out (B, K, J), in the dtype of x."""
    torch.mm(x.flatten(0, 1), y.to(x.dtype), out=out.flatten(0, 1))
