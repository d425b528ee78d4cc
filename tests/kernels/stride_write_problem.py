"""Problems for the tests of the SSM write: sizes, inputs, gates, and what a result may err."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from smt_kernels import stride_write
from smt_kernels.testing.budget import assert_within_budget, poisoned_memory

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]
BACKENDS = ["reference", *FAST_BACKENDS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GATES = ["none", "random", "all on", "all off"]
WEIGHTS = ("conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "a", "d")
INPUTS = ("x", "z", "conv_state", "ssm_state", *WEIGHTS)


@dataclass(frozen=True)
class Case:
    """Sizes of one problem, written B2-K8-E12-N4-C4-R3: rows, writes, width, state size, taps, rank of dt."""

    batch: int = 2
    writes: int = 8
    width: int = 12
    state: int = 4
    taps: int = 4
    rank: int = 3

    def __str__(self) -> str:
        return f"B{self.batch}-K{self.writes}-E{self.width}-N{self.state}-C{self.taps}-R{self.rank}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "x": (self.batch, self.writes, self.width),
            "z": (self.batch, self.writes, self.width),
            "conv_state": (self.batch, self.width, self.taps - 1),
            "ssm_state": (self.batch, self.width, self.state),
            "conv_weight": (self.width, self.taps),
            "conv_bias": (self.width,),
            "x_proj_weight": (self.rank + 2 * self.state, self.width),
            "dt_proj_weight": (self.width, self.rank),
            "dt_proj_bias": (self.width,),
            "a": (self.width, self.state),
            "d": (self.width,),
        }


SMALL_CASES = [Case(), Case(1, 1), Case(3, 1, taps=1), Case(1, 2, 5, 1, 2, 1), Case(3, 3, 33, 3, 5)]
# Wide enough that the largest error of a result says something about its precision.
WIDE_CASES = [
    Case(2, 8, 64, 16, 4, 4),
    Case(1, 1, 256, 16, 4, 16),
    Case(2, 1, 256, 8, 1, 8),
    Case(2, 2, 96, 12, 2, 6),
    Case(1, 17, 64, 16, 4, 4),
    Case(1, 26, 32, 16, 3, 4),
    Case(2, 40, 64, 16, 4, 4),  # two chunks of the scan
]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Problem:
    """Inputs of one call and the gradients of its three results."""

    inputs: dict[str, Tensor]
    grads: tuple[Tensor, Tensor, Tensor]
    gate: Tensor | None

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Results and gradients of the public function, with everything in ``dtype`` (None: as it is)."""
        inputs = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in self.inputs.items()}
        outputs = stride_write(**inputs, gate=self.gate, backend=backend)
        grads = [grad.to(out.dtype) for grad, out in zip(self.grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, list(inputs.values()), grads)
        named = dict(zip(("y", "new_conv_state", "new_ssm_state"), outputs, strict=True))
        return {name: out.detach() for name, out in named.items()} | {f"d_{n}": g for n, g in zip(inputs, found, strict=True)}


def make_gate(kind: str, case: Case, device: str) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "random":
        gate = torch.rand(case.batch, case.writes, device=device) < 0.5
        gate[0, 0] = ~gate[0, -1]  # at least one each way, where K > 1
        return gate
    return torch.full((case.batch, case.writes), kind == "all on", device=device)


def make_problem(case: Case, dtype: torch.dtype, device: str, gate: str = "none", wide: tuple[str, ...] = ()) -> Problem:
    """Inputs in (-1, 1) but for a < 0, a dt of about 0.1 and weights that keep the scale; those in ``wide`` in float32.

    Bounded, so that the largest error of a result is not that of one outlier.
    """
    inputs = {name: 2 * torch.rand(shape, device=device) - 1 for name, shape in case.shapes().items()}
    inputs["x_proj_weight"] /= case.width**0.5
    inputs["dt_proj_weight"] /= case.rank**0.5
    inputs["dt_proj_bias"] -= 2
    inputs["a"] = -torch.exp(2 * inputs["a"])
    inputs = {name: value.to(torch.float32 if name in wide else dtype) for name, value in inputs.items()}
    grads = tuple(2 * torch.rand_like(inputs[name]) - 1 for name in ("x", "conv_state", "ssm_state"))
    return Problem(inputs, grads, make_gate(gate, case, device))


def assert_problem_within_budget(problem: Problem, backend: str) -> None:
    """Results and gradients of ``backend`` from poisoned memory against the error budget."""
    with poisoned_memory():
        actual = problem.results(backend)
    assert_within_budget(actual, lambda: problem.results("reference", torch.float64), problem.results("reference"))
