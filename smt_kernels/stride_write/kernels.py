"""The SSM write in Triton: one launch for a single write; for several, convolution and scan.

    u = silu(conv(x));  (low, b, c) = W_x u;  dt = softplus(W_dt low + bias)
    h_k = exp(dt_k a) h_{k-1} + dt_k b_k u_k;   y_k = (c_k . h_k + d u_k) silu(z_k)

Several writes are cut at W_x, and everything is parallel in rows, in blocks of E and in time:

    forward    convolution with its share of W_x | sums of the shares | scan with W_dt
    backward   scan backward with its share of W_dt | sums of the shares | convolution backward with W_x

The forward pass keeps u and both products for the backward pass. Sums over rows and over blocks of E are left as one partial
sum per program: no atomics. Where the gate is off, u is 0, hence b and c; dt is set to 0; the states pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels.launch import ceil_div
from smt_kernels.stride_write.blocks import by_channel, partial_sums
from smt_kernels.stride_write.conv_states import conv_states, conv_states_backward
from smt_kernels.stride_write.convolution import conv_blocks, convolution
from smt_kernels.stride_write.convolution_backward import convolution_backward, tap_sums
from smt_kernels.stride_write.fold import fold
from smt_kernels.stride_write.kept import CHUNK, layout
from smt_kernels.stride_write.order import Order, order_of
from smt_kernels.stride_write.reference import Weights
from smt_kernels.stride_write.scan import scan, scan_block
from smt_kernels.stride_write.scan_backward import ScanGradients, scan_backward
from smt_kernels.stride_write.single_write import single_write


def forward(
    x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, parameters: Weights, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z (B, K, E), conv_state (B, E, C - 1), ssm_state (B, E, N), gate (B, K) -> y (B, K, E), both states after K, and
    the buffer that ``backward`` takes.
    """
    weights = _packed(parameters, one=x.shape[1] == 1)
    sizes = len(weights.x_proj_weight), weights.a.shape[1]
    buffer, kept = layout("triton", x, conv_state, *sizes).new(x)
    if x.shape[1] == 1:
        return *single_write(x, z, conv_state, ssm_state, weights, gate, kept), buffer
    y, new_conv_state, new_ssm_state = (model.new_empty(model.shape) for model in (x, conv_state, ssm_state))
    order, inputs = order_of(gate), x.transpose(0, 1)
    write_rows(inputs, conv_state, order, weights, kept.u, kept.projected, range(len(inputs)))
    conv_states(inputs[None], conv_state[None], order, new_conv_state[None])
    scan(z.transpose(0, 1), gate, kept, weights, ssm_state, y.transpose(0, 1), new_ssm_state)
    return y, new_conv_state, new_ssm_state, buffer


def write_rows(
    x: Tensor, conv_state: Tensor, order: Order | None, weights: Weights, u: Tensor, projected: Tensor, writes: range
) -> None:
    """From x (K, B, E), fill u (K, B, E) of ``writes`` and W_x u of them, projected (len(writes), B, R + 2 N).

    Of many rows the library's product moves far less than partial sums would.
    """
    if len(writes) <= CHUNK:
        partials = partial_sums(x, conv_blocks(x), *projected.shape)
        convolution(x, conv_state, order, weights, u, partials, writes)
    else:
        convolution(x, conv_state, order, weights, u, None, writes)
        partials = (u[writes.start : writes.stop].flatten(0, 1) @ weights.x_proj_weight.to(x.dtype).T)[None]
    fold(partials, projected)


def backward(
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    buffer: Tensor,
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    parameters: Weights,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, z, conv_state, ssm_state and of each of the seven weights, each in the dtype of its input."""
    weights = _packed(parameters)
    (batch, n_writes, width), (wide, n_state) = x.shape, (len(weights.x_proj_weight), weights.a.shape[1])
    kept = layout("triton", x, conv_state, wide, n_state).of(buffer)
    starts = kept.starts.mT if len(kept.starts) else ssm_state[None]
    blocks = ceil_div(width, scan_block("scan_backward", len(starts) * batch, width, n_state, x.device))
    d_x, d_z = (model.new_empty(model.shape) for model in (x, z))
    grads = ScanGradients(
        z=d_z.transpose(0, 1),
        u=torch.empty_like(kept.u),
        dt_product=torch.empty_like(kept.u),
        projected=partial_sums(x, blocks, n_writes, batch, wide),
        ssm_state=ssm_state.new_empty(ssm_state.shape),
        bias=partial_sums(x, len(starts), batch, width),
        a=partial_sums(x, len(starts), batch, n_state, width).mT,
        d=partial_sums(x, len(starts), batch, width),
    )
    order = order_of(gate)
    scan_backward(grad_y.transpose(0, 1), grad_ssm, z.transpose(0, 1), gate, kept, weights, starts, grads, adds=False)
    d_projected = kept.u.new_empty(n_writes, batch, wide)
    d_taps = partial_sums(x, tap_sums(n_writes, batch), width, weights.conv_weight.shape[1] + 1)
    convolution_backward(
        x.transpose(0, 1), conv_state, order, weights, grads.projected, grad_conv, grads.u, d_projected, d_x.transpose(0, 1),
        d_taps, range(n_writes), adds=False,
    )  # fmt: skip
    d_conv = conv_state.new_empty(conv_state.shape)
    conv_states_backward(
        grads.u[None], None if grad_conv is None else grad_conv[None], order, weights.conv_weight[None], d_conv[None]
    )
    d_taps = d_taps.sum(0)
    low = kept.projected[..., : wide - 2 * n_state].to(x.dtype)
    d_x_proj, d_dt_proj = (
        grad.flatten(0, 1).T @ rows.flatten(0, 1) for grad, rows in ((d_projected, kept.u), (grads.dt_product, low))
    )
    d_weights = d_taps[:, :-1], d_taps[:, -1], d_x_proj, d_dt_proj, *(sums.sum((0, 1)) for sums in grads[-3:])
    d_weights = (grad.to(weight.dtype).contiguous() for grad, weight in zip(d_weights, parameters, strict=True))
    return d_x, d_z, d_conv, grads.ssm_state, *d_weights


def _packed(parameters: Weights, *, one: bool = False) -> Weights:
    """As kernels take them: contiguous, but for a where it is not one write."""
    weights = Weights(*(weight.contiguous() for weight in parameters))
    return weights if one else weights._replace(a=by_channel(weights.a))
