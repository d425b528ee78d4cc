"""Problems for the tests of window attention: shapes, and what a result may err."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from smt_kernels import window_attention
from smt_kernels.testing.budget import assert_within_budget, poisoned_memory

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]
BACKENDS = ["reference", *FAST_BACKENDS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Sizes of one problem, written W65-T16-H4x2-D64: window, tail, query x key/value heads, head size."""

    window: int = 65
    tail: int | None = None
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    n_memory: int = 15
    n_windows: int = 2

    def __str__(self) -> str:
        return f"W{self.window}-T{self.tail or self.window}-H{self.heads}x{self.kv_heads}-D{self.head_dim}"

    @property
    def memory(self) -> int:
        return min(self.n_memory, self.window)


CASES = [
    Case(1),
    Case(2, heads=2, kv_heads=1, head_dim=16),
    Case(16, head_dim=40),
    Case(50, tail=16, heads=4),
    Case(50, tail=1, head_dim=128),
    Case(64),
    Case(65),
    Case(65, tail=16, heads=4),
    Case(65, tail=1, kv_heads=1),
    Case(65, kv_heads=1, head_dim=40),
    Case(65, head_dim=128, n_windows=1),
    Case(66, tail=65, head_dim=16),
    Case(66, tail=16, n_memory=0),
    Case(127, kv_heads=1, head_dim=40, n_windows=1),
    Case(128, heads=1, kv_heads=1, head_dim=128, n_windows=1),
    Case(128, tail=1, n_memory=128),
    Case(65, heads=1, kv_heads=1, head_dim=256, n_windows=1),
]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Problem:
    """Inputs of one call; ``dtype`` is what q, k, v and the gradient are rounded to."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    n_memory: int
    valid_memory: Tensor | None
    valid_tokens: Tensor | None
    tail: int | None

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients of the public function, in ``dtype`` (None: that of the inputs)."""
        q, k, v = (x.to(dtype or x.dtype).requires_grad_() for x in (self.q.detach(), self.k.detach(), self.v.detach()))
        out = window_attention(q, k, v, backend=backend, **self.options())
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.grad.to(out.dtype))
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

    def options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("n_memory", "valid_memory", "valid_tokens", "tail")}


def make_problem(case: Case, dtype: torch.dtype, device: str, *, ragged: bool = True) -> Problem:
    shape = case.n_windows, case.window
    q, k, v, grad = (
        torch.randn(*shape, heads, case.head_dim, device=device).to(dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    valid_memory = valid_tokens = None
    if ragged:
        upper = case.memory, case.window - case.memory
        valid_memory, valid_tokens = (torch.randint(0, most + 1, shape[:1], dtype=torch.int32, device=device) for most in upper)
        valid_memory[0] = 0
    return Problem(q, k, v, grad[:, -(case.tail or case.window) :], case.memory, valid_memory, valid_tokens, case.tail)


def assert_problem_within_budget(problem: Problem, backend: str) -> None:
    with poisoned_memory():
        actual = problem.results(backend)
    assert_within_budget(actual, lambda: problem.results("reference", torch.float64), problem.results("reference"))
