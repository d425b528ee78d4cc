"""The definition of the stride-gated SSM write, in plain PyTorch: any floating dtype, differentiable, no cleverness."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smt_kernels.operators import unaffected_by_autocast


class Weights(NamedTuple):
    """The weights of a write."""

    conv_weight: Tensor  # (E, C)
    conv_bias: Tensor  # (E,)
    x_proj_weight: Tensor  # (R + 2 N, E)
    dt_proj_weight: Tensor  # (E, R)
    dt_proj_bias: Tensor  # (E,)
    a: Tensor  # (E, N)
    d: Tensor  # (E,)


@unaffected_by_autocast
def stride_write(
    x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: Weights, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, z (B, K, E), conv_state (B, E, C - 1), ssm_state (B, E, N), gate (B, K) -> y (B, K, E) and both states."""
    conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, a, d = weights
    rank, n_state = dt_proj_weight.shape[1], a.shape[1]
    if gate is not None:  # what stands where the gate is off, nan included, must not reach the gradients either
        x, z = (half.masked_fill(~gate[..., None], 0.0) for half in (x, z))
    outputs = []
    for step in range(x.shape[1]):
        inputs = torch.cat([conv_state, x[:, step, :, None].to(conv_state.dtype)], dim=-1)  # (B, E, C), oldest first
        u = F.silu((inputs * conv_weight).sum(dim=-1) + conv_bias).to(x.dtype)
        low, b, c = (u @ x_proj_weight.to(x.dtype).T).split([rank, n_state, n_state], dim=-1)
        dt = F.softplus(low @ dt_proj_weight.to(x.dtype).T + dt_proj_bias)[..., None]  # (B, E, 1)
        state = torch.exp(dt * a) * ssm_state + dt * b[:, None, :] * u[..., None]  # (B, E, N)
        y = ((state * c[:, None, :]).sum(dim=-1) + d * u) * F.silu(z[:, step])
        on = torch.ones_like(y[:, 0], dtype=torch.bool) if gate is None else gate[:, step]
        outputs.append(torch.where(on[:, None], y, torch.zeros_like(y)).to(x.dtype))
        conv_state = torch.where(on[:, None, None], inputs[..., 1:], conv_state)
        ssm_state = torch.where(on[:, None, None], state.to(ssm_state.dtype), ssm_state)
    return torch.stack(outputs, dim=1), conv_state, ssm_state
