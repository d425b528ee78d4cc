"""The SSM write by the kernels of others, where they are installed: to compare with, and to measure beside.

mamba-ssm and causal-conv1d (the ``cuda`` extra) run on GPUs alone. They keep time last, and know no gate.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from smt_kernels.stride_write.reference import Weights


def mamba_scan(u: Tensor, z: Tensor, projected: Tensor, weights: Weights) -> Tensor:
    """What lies behind the convolution and the product with W_x, by ``mamba_ssm``'s selective scan from a state of zeros.

    Args:
        u, z: (B, K, E).
        projected: (B, K, R + 2 N), W_x u.

    Returns:
        y (B, K, E).

    Raises:
        ImportError: mamba-ssm is not installed, or without its kernels.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    n_state, rank = weights.a.shape[1], weights.dt_proj_weight.shape[1]
    low, b, c = (part.mT for part in projected.split([rank, n_state, n_state], dim=-1))
    dt = weights.dt_proj_weight.to(low.dtype) @ low  # (B, E, K)
    return selective_scan_fn(
        u.mT, dt, weights.a, b, c, weights.d, z=z.mT, delta_bias=weights.dt_proj_bias, delta_softplus=True
    ).mT


def mamba_write(x: Tensor, z: Tensor, weights: Weights) -> Tensor:
    """``stride_write`` from states of zeros, every gate on: y (B, K, E) of x and z (B, K, E).

    Raises:
        ImportError: mamba-ssm or causal-conv1d is not installed, or without its kernels.
    """
    from causal_conv1d import causal_conv1d_fn

    u = causal_conv1d_fn(x.mT, weights.conv_weight, weights.conv_bias, activation="silu").mT
    return mamba_scan(u, z, F.linear(u, weights.x_proj_weight.to(u.dtype)), weights)
