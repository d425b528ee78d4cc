"""The SSM write compiles for the supported architectures without spills, in the shared memory that they have."""

from __future__ import annotations

import pytest
import torch
from stride_write_problem import WEIGHTS, Case
from torch import Tensor

from smt_kernels.stride_write.kept import kept_size
from smt_kernels.testing.aot import Call, KernelReport, compile_ahead

pytestmark = pytest.mark.triton

TARGETS = ("sm_80", "sm_90", "sm_100")
WIDTHS = (512, 1536)
# What launches kernels, with how many writes, and which, in order. Every other number of writes runs the kernels of 24.
LAUNCHES = {
    ("forward", 1): ("single_write",),
    ("forward", 24): ("convolution", "scan"),
    ("backward", 1): ("scan_backward", "convolution_backward"),
    ("backward", 24): ("scan_backward", "convolution_backward"),
}
CASES = [(*launch, kernel) for launch, kernels in LAUNCHES.items() for kernel in kernels]


def call(direction: str, writes: int, width: int, batch: int = 4, state: int = 16) -> Call:
    """x and weights in bf16, the SSM state and its rates in fp32."""
    inputs = arguments(batch, writes, width, state)
    if direction == "backward":
        x, conv_state, ssm_state = (inputs[name] for name in ("x", "conv_state", "ssm_state"))
        buffer = torch.empty(kept_size(x, conv_state, width // 32 + 2 * state), device="meta")
        inputs |= {"grad_y": x, "grad_conv": conv_state, "grad_ssm": ssm_state, "buffer": buffer}
    return Call(f"smt_kernels.stride_write.kernels:{direction}", inputs)


def arguments(batch: int, writes: int, width: int, state: int) -> dict[str, object]:
    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shapes = Case(batch, writes, width, state, rank=width // 32).shapes()
    tensors = {name: tensor(*shape) for name, shape in shapes.items()}
    tensors |= {name: tensor(*shapes[name], dtype=torch.float32) for name in ("ssm_state", "a")}
    parameters = tuple(tensors.pop(name) for name in WEIGHTS)
    return tensors | {"parameters": parameters, "gate": tensor(batch, writes, dtype=torch.bool)}


@pytest.fixture(scope="module")
def reports() -> dict[tuple, KernelReport]:
    compiled = compile_ahead([call(*launch, width) for width in WIDTHS for launch in LAUNCHES], TARGETS)
    cases = [(target, width, *case) for target in TARGETS for width in WIDTHS for case in CASES]
    return dict(zip(cases, compiled, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", WIDTHS, ids="E{}".format)
@pytest.mark.parametrize("case", CASES, ids="{0[0]}-K{0[1]}-{0[2]}".format)
class TestStateOf16:
    def test_it_spills_no_registers(self, reports, case, width, target):
        report = reports[(target, width, *case)]
        assert report.target == target and report.kernel == f"_{case[-1]}_kernel"
        assert report.spills == 0, report

    def test_shared_memory_fits_the_smallest_chip_of_the_family(self, reports, case, width, target):
        report = reports[(target, width, *case)]
        assert report.shared_bytes <= report.shared_limit, report
