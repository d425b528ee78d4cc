"""Problems for the tests of stream attention: shapes, what they are by hand, and what a result may err."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from smt_kernels import WindowSpec, stream_attention
from smt_kernels.testing.budget import assert_within_budget, poisoned_memory

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]
BACKENDS = ["reference", "blocked"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Sizes of one problem, written T100-h0-K6-n15m50S16-H4x2: queries, history, slots, window, query x key/value heads."""

    n_queries: int
    window: WindowSpec = field(default_factory=WindowSpec)
    n_slots: int | None = 0  # None: no memory
    history: int = 0
    first_step: int = 0
    first_slot: int = 0
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    n_batch: int = 2

    def __str__(self) -> str:
        spec = self.window
        window = f"n{spec.n_memory}m{spec.n_tokens}S{spec.stride}"
        start = f"-t{self.first_step}-w{self.first_slot}" if self.first_step or self.first_slot else ""
        return f"T{self.n_queries}-h{self.history}-K{self.n_slots}-{window}-H{self.heads}x{self.kv_heads}{start}"


def spec(n_memory: int, n_tokens: int, stride: int | None) -> WindowSpec:
    return WindowSpec(n_memory, n_tokens, stride)


CASES = [
    Case(1),
    Case(1, n_slots=None),
    Case(1, n_slots=15, history=49, first_step=255, heads=4, head_dim=64),
    Case(1, n_slots=20, history=60, first_step=-3, first_slot=-4),
    Case(16, n_slots=0),
    Case(17, n_slots=1),
    Case(31, n_slots=1, kv_heads=1),
    Case(49, n_slots=3),
    Case(100, n_slots=6, heads=4, kv_heads=2),
    Case(100, n_slots=None, heads=3, kv_heads=1),
    Case(257, n_slots=16, head_dim=64, n_batch=1),
    Case(300, n_slots=5),
    Case(300, n_slots=5, first_slot=9),
    Case(130, n_slots=18, history=60, first_step=96, first_slot=2),
    Case(130, n_slots=30, history=7, first_step=33, first_slot=-5),
    Case(90, n_slots=12, history=3, first_step=-50, first_slot=-9),
    Case(40, n_slots=12, first_step=-60, first_slot=-20),
    Case(70, spec(15, 50, 1), n_slots=69),
    Case(70, spec(1, 3, 1), n_slots=80, history=2, first_step=4, first_slot=-3, kv_heads=1),
    Case(90, spec(15, 20, 4), n_slots=22),
    Case(90, spec(1, 4, 4), n_slots=10, first_step=7, history=2),
    Case(90, spec(3, 13, 7), n_slots=12, heads=4, kv_heads=2),
    Case(64, spec(0, 50, 16), n_slots=3),
    Case(64, spec(2, 1, 1), n_slots=63),
    Case(70, spec(2**40, 2**40, 16), n_slots=5, history=3, first_step=30, first_slot=1),
    Case(200, spec(3, 80, 40), n_slots=4, history=11, first_step=25),
    Case(77, spec(15, 50, None), n_slots=5),
    Case(77, spec(0, 50, None), n_slots=40, history=20, first_step=-7, first_slot=3, kv_heads=1),
    Case(77, spec(0, 8, None), n_slots=None),
    Case(5, spec(4, 100, None), n_slots=0, history=70),
]

# Few and small, since an interpreted kernel is slow: every kind of memory, geometry and head size.
TRITON_CASES = [
    Case(1, n_slots=None),
    Case(1, n_slots=15, history=49, first_step=255, heads=4, head_dim=64),
    Case(1, n_slots=20, history=60, first_step=-3, first_slot=-4, n_batch=1),
    Case(17, n_slots=1, kv_heads=1, head_dim=40),
    Case(66, n_slots=0, history=66, n_batch=1),
    Case(70, n_slots=4, heads=3, kv_heads=1, n_batch=1),
    Case(90, n_slots=12, history=3, first_step=-50, first_slot=-9, n_batch=1),
    Case(70, n_slots=30, history=7, first_step=33, first_slot=-5, head_dim=64, n_batch=1),
    Case(40, n_slots=12, first_step=-60, first_slot=-20, n_batch=1),
    Case(70, spec(15, 50, 1), n_slots=69, n_batch=1),
    Case(70, spec(1, 3, 1), n_slots=80, history=2, first_step=4, first_slot=-3, kv_heads=1, n_batch=1),
    Case(64, spec(0, 50, 16), n_slots=3, n_batch=1),
    Case(70, spec(3, 80, 40), n_slots=4, history=11, first_step=25, n_batch=1),
    Case(40, spec(15, 50, None), n_slots=5, head_dim=128, n_batch=1),
    Case(77, spec(0, 50, None), n_slots=40, history=20, first_step=-7, first_slot=3, kv_heads=1, n_batch=1),
    Case(17, n_slots=1, heads=1, kv_heads=1, head_dim=256, n_batch=1),
    Case(40, n_slots=4, first_step=16 * 2**40, first_slot=2**40 - 2, n_batch=1),
    Case(40, spec(2**40, 2**40, 3), n_slots=9, n_batch=1),
]


@dataclass
class Problem:
    """Inputs of one call and the gradient of its output."""

    inputs: dict[str, Tensor]  # q, k, v and, with memory, memory_k and memory_v
    grad: Tensor
    settings: dict[str, object]

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients of the public function, in ``dtype`` (None: that of the inputs)."""
        inputs = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in self.inputs.items()}
        out = stream_attention(**inputs, backend=backend, **self.settings)
        grads = torch.autograd.grad(out, list(inputs.values()), self.grad.to(out.dtype), materialize_grads=True)
        return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}

    def terms(self) -> int:
        """The longest sum in a result: over keys, over queries that share a key, or over a head."""
        return self.grad.shape[1] * self.grad.shape[2] + self.inputs["k"].shape[1] + self.grad.shape[3]


def make_problem(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    def random(length: int, heads: int) -> Tensor:
        return torch.randn(case.n_batch, length, heads, case.head_dim, device=device).to(dtype)

    n_keys = case.n_queries + case.history
    inputs = {"q": random(case.n_queries, case.heads)} | {name: random(n_keys, case.kv_heads) for name in "kv"}
    if case.n_slots is not None:
        inputs |= {name: random(case.n_slots, case.kv_heads) for name in ("memory_k", "memory_v")}
    grad = random(case.n_queries, case.heads)
    return Problem(inputs, grad, {"window": case.window, "first_step": case.first_step, "first_slot": case.first_slot})


def by_hand(case: Case, problem: Problem) -> Tensor:
    """The definition with Python numbers, one query at a time: no tensor operation and no WindowSpec."""
    q, k, v = (problem.inputs[name].tolist() for name in "qkv")
    memory_k, memory_v = (problem.inputs[name].tolist() if case.n_slots else None for name in ("memory_k", "memory_v"))
    n, m, stride = case.window.n_memory, case.window.n_tokens, case.window.stride
    out = torch.zeros(problem.grad.shape, dtype=torch.float64)
    for b, i, h in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:3])).tolist():
        kv_head = h // (case.heads // case.kv_heads)
        step = case.first_step + case.history + i
        keys, values = [], []
        for slot in range(case.first_slot, case.first_slot + (case.n_slots or 0)):
            written = 0 if step <= 0 else (step - 1) // (stride or 1)
            if stride is None or written - n <= slot < written:
                keys.append(memory_k[b][slot - case.first_slot][kv_head])
                values.append(memory_v[b][slot - case.first_slot][kv_head])
        for token in range(case.first_step, case.first_step + case.history + case.n_queries):
            if step - m < token <= step:
                keys.append(k[b][token - case.first_step][kv_head])
                values.append(v[b][token - case.first_step][kv_head])
        scores = [math.exp(sum(x * y for x, y in zip(q[b][i][h], key, strict=True)) / math.sqrt(case.head_dim)) for key in keys]
        for score, value in zip(scores, values, strict=True):
            out[b, i, h] += score / sum(scores) * torch.tensor(value, dtype=torch.float64)
    return out


def assert_problem_within_budget(problem: Problem, backend: str) -> None:
    with poisoned_memory():
        actual = problem.results(backend)
    assert_within_budget(actual, lambda: problem.results("reference", torch.float64), problem.results("reference"))
