"""The SSM write compiles for the supported architectures without spills, in the shared memory that they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smt_kernels.testing.aot import Call, KernelReport, compile_ahead

pytestmark = pytest.mark.triton

TARGETS = ("sm_80", "sm_90", "sm_100")
WIDTHS = (512, 1536)
KERNELS = ("single_write", "convolution", "convolution_backward", "scan", "scan_backward")


def calls(width: int, writes: int = 24, batch: int = 4, state: int = 16) -> list[Call]:
    """One call per kernel, in the order of ``KERNELS``: x and weights in bf16, the SSM state and its rates in fp32."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rank = width // 32
    x, conv_state = tensor(batch, writes, width), tensor(batch, width, 3)
    ssm_state = tensor(batch, width, state, dtype=torch.float32)
    gate = tensor(batch, writes, dtype=torch.bool)
    bias = tensor(width)
    conv = {"x": x, "conv_state": conv_state, "conv_weight": tensor(width, 4), "conv_bias": bias, "gate": gate}
    decay = {"dt_proj_bias": bias, "a": tensor(width, state, dtype=torch.float32), "d": bias}
    scan = {"z": x, "u": x, "dt_product": x, "ssm_state": ssm_state, "gate": gate, **decay}
    scan["projected"] = tensor(batch, writes, rank + 2 * state)
    single = conv | decay | {"x": x[:, :1], "z": x[:, :1], "ssm_state": ssm_state, "gate": gate[:, :1]}
    single |= {"x_proj_weight": tensor(rank + 2 * state, width), "dt_proj_weight": tensor(width, rank)}
    folder = "smt_kernels.stride_write"
    return [
        Call(f"{folder}.single_write:single_write", single),
        Call(f"{folder}.convolution:convolution", conv | {"new_conv_state": conv_state}),
        Call(f"{folder}.convolution:convolution_backward", conv | {"d_u": x, "d_u_projected": x, "grad_conv": conv_state}),
        Call(f"{folder}.scan:scan", scan),
        Call(f"{folder}.scan:scan_backward", scan | {"grad_y": x, "grad_ssm": ssm_state}),
    ]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int, str], KernelReport]:
    compiled = compile_ahead([call for width in WIDTHS for call in calls(width)], TARGETS)
    cases = [(target, width, kernel) for target in TARGETS for width in WIDTHS for kernel in KERNELS]
    return dict(zip(cases, compiled, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", WIDTHS, ids="E{}".format)
@pytest.mark.parametrize("kernel", KERNELS)
class TestStateOf16:
    def test_it_spills_no_registers(self, reports, kernel, width, target):
        report = reports[target, width, kernel]
        assert report.target == target and report.kernel == f"_{kernel}_kernel"
        assert report.spills == 0, report

    def test_shared_memory_fits_the_smallest_chip_of_the_family(self, reports, kernel, width, target):
        report = reports[target, width, kernel]
        assert report.shared_bytes <= report.shared_limit, report
