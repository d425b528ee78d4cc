"""The SSM write against mamba-ssm and causal-conv1d: their kernels where they run, elsewhere formulas in their place."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from stride_write_problem import Case, make_problem

from smt_kernels import stride_write
from smt_kernels.stride_write.reference import Weights
from smt_kernels.testing.libraries import mamba_write

LOWERED = ("x", "z", "x_proj_weight", "dt_proj_weight")


def make_inputs(dtype, device):
    """Two chunks of the scan from states of zeros; x, z and projections in ``dtype``, all else in float32 at least."""
    inputs = make_problem(Case(2, 40, 64, 16, 4, 4), torch.float64, device).inputs
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: value.to(dtype if name in LOWERED else wide) for name, value in inputs.items()}
    return {name: torch.zeros_like(value) if name.endswith("state") else value for name, value in inputs.items()}


def results(function, inputs, dtype=None):
    """y and the gradients of all that has one."""
    leaves = {name: value.to(dtype or value.dtype, copy=True) for name, value in inputs.items()}
    wanted = [value.requires_grad_() for name, value in leaves.items() if not name.endswith("state")]
    y = function(**leaves)
    ramp = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, wanted, ramp)]


def ours(backend):
    return lambda **inputs: stride_write(**inputs, backend=backend)[0]


def theirs(x, z, conv_state, ssm_state, **weights):
    return mamba_write(x, z, Weights(**weights))


@pytest.fixture
def formulas(monkeypatch):
    """What both libraries say that their functions compute, in the places from which they are imported."""

    def causal_conv1d_fn(x, weight, bias, activation):
        assert activation == "silu"
        return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight)))

    def selective_scan_fn(u, delta, a, b, c, d, z, delta_bias, delta_softplus):
        assert delta_softplus
        delta, state, ys = F.softplus(delta + delta_bias[:, None]), u.new_zeros(*u.shape[:2], a.shape[1]), []
        for step in range(u.shape[2]):
            dt = delta[:, :, step, None]
            state = torch.exp(dt * a) * state + dt * u[:, :, step, None] * b[:, None, :, step]
            ys.append((state * c[:, None, :, step]).sum(-1))
        return (torch.stack(ys, dim=2) + d[:, None] * u) * F.silu(z)

    scans = "mamba_ssm.ops.selective_scan_interface"
    modules = {"causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn}, scans: {"selective_scan_fn": selective_scan_fn}}
    for name, functions in {"mamba_ssm": {}, "mamba_ssm.ops": {}, **modules}.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def test_what_is_compared_with_is_the_same_formula(formulas):
    inputs = make_inputs(torch.float64, "cpu")
    for one, other in zip(results(ours("blocked"), inputs), results(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.triton
@pytest.mark.cuda
@pytest.mark.mamba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_mamba_ssm_and_causal_conv1d_compute_the_same(dtype, device):
    """What ours err is at most twice what theirs do, and a rounding."""
    inputs = make_inputs(dtype, device)
    exact = results(ours("reference"), inputs, torch.float64)
    for one, other, true in zip(results(ours("triton"), inputs), results(theirs, inputs), exact, strict=True):
        error, of_theirs = ((result.double() - true).norm() for result in (one, other))
        assert error <= 2 * of_theirs + torch.finfo(dtype).eps * true.norm()
