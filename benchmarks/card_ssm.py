"""The SSM write beside what others have for it: causal-conv1d and mamba-ssm, each where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from card_clock import time_kernels
from card_rows import Case
from torch import Tensor

from smt import SMTConfig
from smt_kernels import stride_write
from smt_kernels.stride_write.reference import Weights
from smt_kernels.testing.libraries import mamba_scan, mamba_write

SECTION = "SSM write, forward + backward"
# Steps that the check reads: the definition walks over them one by one.
CHECKED = 40


class Problem(NamedTuple):
    """What a write takes: x and z in memory with time last, as mamba-ssm keeps them, or as ours does."""

    x: Tensor  # (B, K, E)
    z: Tensor
    weights: Weights


def ssm_cases(config: SMTConfig, tokens: int, length: int, stride: int, device: torch.device) -> Iterator[Case]:
    """All writes of a step in one call, as where tokens alone are pooled, and one write a token, as in a Mamba.

    Args:
        config: sizes of the SSM.
        tokens: of a step, in rows of ``length``.
    """
    rows = max(1, tokens // length)
    for n_writes in ((length - 1) // stride, length):
        shape = f"{rows} x {n_writes:,}, E {config.ssm_d_inner:,}, N {config.ssm_d_state}, bf16"
        for name, write, time_last in (
            ("causal-conv1d and mamba-ssm", mamba_write, True),
            ("stride_write", our_write, False),
            ("mamba-ssm, its scan alone", None, True),
        ):

            def measure(write: Callable[..., Tensor] | None = write, n: int = n_writes, last: bool = time_last) -> float:
                if write is None:
                    return _time_scan(make_problem(config, rows, n, device, time_last=last))
                check(write, make_problem(config, 1, min(n, CHECKED), device, time_last=last))
                return _time(write, make_problem(config, rows, n, device, time_last=last))

            yield Case(SECTION, name, shape, measure, rows * n_writes)


def our_write(x: Tensor, z: Tensor, weights: Weights) -> Tensor:
    """``stride_write`` from states of zeros."""
    batch, inner = len(x), x.shape[2]
    conv = x.new_zeros(batch, inner, weights.conv_weight.shape[1] - 1)
    ssm = x.new_zeros(batch, inner, weights.a.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return stride_write(x, z, conv, ssm, **weights._asdict())[0]


def make_problem(config: SMTConfig, rows: int, n_writes: int, device: torch.device, *, time_last: bool) -> Problem:
    """Inputs and weights of usual sizes, as under autocast: x, z and projections in bf16."""
    inner, states, rank = config.ssm_d_inner, config.ssm_d_state, config.dt_rank
    generator = torch.Generator(device).manual_seed(n_writes)

    def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (2 * torch.rand(shape, generator=generator, device=device) - 1).to(dtype)

    x, z = (uniform(rows, n_writes, inner, dtype=torch.bfloat16) for _ in range(2))
    if time_last:
        x, z = (half.mT.contiguous().mT for half in (x, z))
    weights = Weights(
        conv_weight=uniform(inner, config.ssm_d_conv),
        conv_bias=uniform(inner),
        x_proj_weight=(uniform(rank + 2 * states, inner) / inner**0.5).bfloat16(),
        dt_proj_weight=(uniform(inner, rank) / rank**0.5).bfloat16(),
        dt_proj_bias=uniform(inner) - 3.0,
        a=-torch.exp(2 * uniform(inner, states)),
        d=uniform(inner),
    )
    return Problem(x, z, weights)


def check(write: Callable[..., Tensor], problem: Problem) -> None:
    """Raise ArithmeticError where ``write`` errs more than twice as much as plain PyTorch in the same precision."""

    def error(result: Tensor) -> float:
        return (result.double() - exact).norm().item()

    with torch.no_grad():
        exact = _reference(Problem(problem.x.double(), problem.z.double(), Weights(*(w.double() for w in problem.weights))))
        found, plain = error(write(*problem)), error(_reference(problem))
    if not found <= 2 * plain:
        raise ArithmeticError(f"its results are off by {found:.2e}, those of plain PyTorch by {plain:.2e}")


def _reference(problem: Problem) -> Tensor:
    x, z, weights = problem
    conv = x.new_zeros(len(x), x.shape[2], weights.conv_weight.shape[1] - 1, dtype=weights.conv_weight.dtype)
    ssm = x.new_zeros(len(x), *weights.a.shape, dtype=weights.a.dtype)
    return stride_write(x, z, conv, ssm, **weights._asdict(), backend="reference")[0]


def _time(write: Callable[..., Tensor], problem: Problem) -> float:
    leaves = [leaf.requires_grad_() for leaf in (problem.x, problem.z, *problem.weights)]
    grad = torch.randn_like(problem.x)
    return time_kernels(lambda: torch.autograd.grad(write(*problem), leaves, grad), problem.x.device)


def _time_scan(problem: Problem) -> float:
    """What lies behind the convolution and W_x, of which mamba-ssm's kernel is the most."""
    x, z, weights = problem
    projected = torch.randn(*x.shape[:2], len(weights.x_proj_weight), device=x.device, dtype=x.dtype) / 4
    leaves = [leaf.requires_grad_() for leaf in (x, z, projected, *weights[3:])]
    grad = torch.randn_like(x)
    return time_kernels(lambda: torch.autograd.grad(mamba_scan(x, z, projected, weights), leaves, grad), x.device)
