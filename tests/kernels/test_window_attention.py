"""Window attention: every backend computes the definition, forward and backward, whatever the shape, or says why not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smt_kernels import launch, window_attention
from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget, poisoned_memory

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

    def magnitude(self, exact: dict[str, Tensor]) -> dict[str, float]:
        """One rounding of the result, and in fp32 of what dS = P (dP - delta) cancels: |dO| |v|, with k for dq and q for dk."""
        rows, values = (x.double().abs().amax(dim=(0, 1, 2)) for x in (self.grad, self.v))
        fp32 = torch.finfo(torch.float32).eps / torch.finfo(self.grad.dtype).eps
        cancelled = fp32 * 2 * float(rows @ values) * self.q.shape[-1] ** -0.5
        by = {"dq": float(self.k.abs().max()), "dk": float(self.q.abs().max())}
        return {name: float(exact[name].abs().max()) + cancelled * factor for name, factor in by.items()}


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
    exact = problem.results("reference", torch.float64)
    assert_within_budget(actual, exact, problem.results("reference"), magnitude=problem.magnitude(exact))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_output_and_gradients_err_at_most_twice_as_much_as_plain_pytorch(backend, case, dtype, device):
    assert_problem_within_budget(make_problem(case, dtype, device), backend)


@pytest.mark.triton
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case", [Case(65, kv_heads=1, head_dim=32, n_windows=1), Case(80, tail=66, heads=1, kv_heads=1, n_windows=1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("family", launch.FAMILIES[:-1])
def test_the_launch_settings_of_every_architecture_compute_the_same(family, dtype, case, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    assert_problem_within_budget(make_problem(case, dtype, "cpu"), "triton")


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_windows_without_counts_are_full(backend, device):
    assert_problem_within_budget(make_problem(Case(), torch.float32, device, ragged=False), backend)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    window=st.integers(1, 128),
    tail=st.none() | st.integers(1, 128),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    head_dim=st.integers(1, 80),
    n_memory=st.integers(0, 128),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_shape_is_within_budget(backend, window, tail, kv_heads, group, head_dim, n_memory, dtype):
    tail = tail and min(tail, window)
    case = Case(window, tail, kv_heads * group, kv_heads, head_dim, n_memory, n_windows=1)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(window)
    assert_problem_within_budget(make_problem(case, dtype, device), backend)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    n_windows, window, heads, head_dim = x.shape
    if layout == "fused projection":
        return torch.cat([x.new_full(x.shape, float("nan")), x], dim=2)[:, :, heads:]
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "windows second":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided head":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
    assert layout == "overlapping windows"
    stream = torch.randn(window + 16 * n_windows, heads, head_dim, device=x.device).to(x.dtype)
    return stream.unfold(0, window, 16).permute(0, 3, 1, 2)[:n_windows]


@pytest.mark.parametrize("layout", ["fused projection", "heads first", "windows second", "strided head", "overlapping windows"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inputs_may_have_any_strides(backend, layout, device):
    problem = make_problem(Case(head_dim=16), torch.float32, device)
    problem = replace(problem, **{name: in_layout(getattr(problem, name), layout) for name in ("q", "k", "v", "grad")})
    assert not problem.q.is_contiguous()
    assert_problem_within_budget(problem, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_equals_the_end_of_the_whole_window(backend, device):
    problem = make_problem(Case(), torch.float32, device)
    whole = window_attention(problem.q, problem.k, problem.v, backend=backend, **problem.options())
    for tail in (1, 16, 64, 65):
        options = problem.options() | {"tail": tail}
        from_all = window_attention(problem.q, problem.k, problem.v, backend=backend, **options)
        from_last = window_attention(problem.q[:, -tail:], problem.k, problem.v, backend=backend, **options)
        assert torch.equal(from_all, from_last)
        torch.testing.assert_close(from_all, whole[:, -tail:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_see_nothing_give_zeros_and_no_gradient(backend, device):
    problem = make_problem(Case(), torch.float32, device)
    problem = replace(problem, valid_memory=torch.zeros_like(problem.valid_memory), valid_tokens=problem.valid_tokens * 0)
    with poisoned_memory():
        for name, value in problem.results(backend).items():
            assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("anything", [1e3, float("nan")], ids=["1000", "nan"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_do_not_exist_change_nothing(backend, anything, device):
    problem = make_problem(Case(), torch.float32, device)
    problem.valid_memory[:], problem.valid_tokens[:] = 4, 30
    before = problem.results(backend)
    absent = torch.ones(65, dtype=torch.bool, device=device)
    absent[15 - 4 : 15] = absent[65 - 30 :] = False
    for x in (problem.k, problem.v):
        x[:, absent] = anything
    after = problem.results(backend)
    for name in before:
        assert torch.equal(before[name][:, ~absent], after[name][:, ~absent]), name
    assert not after["dk"][:, absent].any() and not after["dv"][:, absent].any()


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_scale_may_be_any_number(backend, scale, device):
    problem = make_problem(Case(20, head_dim=16, n_memory=5), torch.float64 if backend == "blocked" else torch.float32, device)
    inputs = problem.q, problem.k, problem.v
    exact = window_attention(*(x.double() for x in inputs), scale=scale, backend="reference", **problem.options())
    plain = window_attention(*inputs, scale=scale, backend="reference", **problem.options())
    actual = window_attention(*inputs, scale=scale, backend=backend, **problem.options())
    if backend == "blocked":
        assert_equal_in_double({"out": actual}, {"out": exact}, terms=20)
    else:
        assert_within_budget({"out": actual}, {"out": exact}, {"out": plain})


@pytest.mark.parametrize("case", [Case(1, head_dim=3), Case(65, heads=4), Case(66, tail=16, kv_heads=1)], ids=str)
def test_blocked_equals_the_reference_in_double_precision(case, device):
    problem = make_problem(case, torch.float64, device)
    terms = case.window + case.head_dim
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=terms)


@pytest.mark.parametrize("tail", [None, 2], ids=["whole", "tail"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradients_match_finite_differences(backend, tail):
    problem = make_problem(Case(4, tail, heads=2, kv_heads=1, head_dim=2, n_memory=2), torch.float64, "cpu")
    inputs = tuple(x.requires_grad_() for x in (problem.q, problem.k, problem.v))
    assert torch.autograd.gradcheck(lambda q, k, v: window_attention(q, k, v, backend=backend, **problem.options()), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    problem = make_problem(Case(heads=4), torch.bfloat16, device)
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def operator_arguments(backend: str, device: str) -> tuple:
    problem = make_problem(Case(6, tail=4, heads=2, kv_heads=1, head_dim=16, n_memory=2), torch.float32, device)
    q, k, v = (x.clone().requires_grad_() for x in (problem.q[:, -4:], problem.k, problem.v))
    return q, k, v, problem.valid_memory, problem.valid_tokens, 2, 0.25, backend


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_operators_pass_opcheck(backend, device):
    arguments = operator_arguments(backend, device)
    operators = torch.ops.smt_kernels
    torch.library.opcheck(operators.window_attention.default, arguments)
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    out, lse = operators.window_attention(q, k, v, *rest)
    torch.library.opcheck(operators.window_attention_backward.default, (torch.randn_like(q), q, k, v, out, lse, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_without_graph_breaks(backend, device):
    problem = make_problem(Case(20, tail=8, kv_heads=1, head_dim=16, n_memory=5), torch.float32, device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q * 1.0, k, v, backend=backend, **problem.options()).sin()

    def results(function) -> list[Tensor]:
        inputs = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, problem.grad)]

    torch._dynamo.reset()
    compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, results(call), strict=True):
        assert torch.equal(actual, expected)


def good_arguments() -> dict[str, object]:
    q, k, v = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8)
    counts = torch.tensor([0, 2], dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "n_memory": 2, "valid_memory": counts, "valid_tokens": counts, "tail": None}


BAD_ARGUMENTS = {
    "q is no tensor": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q has three dimensions": ({"q": torch.zeros(6, 4, 8)}, ValueError, "q must have shape (N, W, H, D), got (6, 4, 8)"),
    "q is of integers": ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.int32)}, TypeError, "q must be a floating-point tensor"),
    "q is empty": ({"q": torch.zeros(2, 6, 0, 8)}, ValueError, "q must not be empty in H"),
    "q is neither whole nor a tail": ({"q": torch.zeros(2, 3, 4, 8)}, ValueError, "q must hold W = 6 entries per window, got"),
    "q is not the tail asked for": (
        {"q": torch.zeros(2, 3, 4, 8), "tail": 2}, ValueError, "q must hold W = 6 or tail = 2 entries per window, got 3",
    ),
    "k has other windows": ({"k": torch.zeros(3, 6, 2, 8)}, ValueError, "(N=2, W, H_kv, D=8), got (3, 6, 2, 8)"),
    "k has another head size": ({"k": torch.zeros(2, 6, 2, 4)}, ValueError, "k must have shape (N=2, W, H_kv, D=8)"),
    "k has another dtype": ({"k": torch.zeros(2, 6, 2, 8).half()}, TypeError, "k must have the dtype of q, torch.float32"),
    "v has another length": ({"v": torch.zeros(2, 5, 2, 8)}, ValueError, "v must have shape (N=2, W=6, H_kv=2, D=8)"),
    "v is on another device": (
        {"v": torch.zeros(2, 6, 2, 8, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta",
    ),
    "heads do not divide": (
        {name: torch.zeros(2, 6, 3, 8) for name in "kv"}, ValueError, "q has 4 heads, which is not a multiple of the 3",
    ),
    "the window is too long": (
        {name: torch.zeros(2, 129, 2, 8) for name in "qkv"}, ValueError, "a window holds at most 128 entries, got W = 129",
    ),
    "tail is zero": ({"tail": 0}, ValueError, "tail must lie in 1..W = 1..6, got 0"),
    "tail is too long": ({"tail": 7}, ValueError, "tail must lie in 1..W = 1..6, got 7"),
    "n_memory is negative": ({"n_memory": -1}, ValueError, "n_memory must lie in 0..W = 0..6, got -1"),
    "n_memory is too large": ({"n_memory": 7}, ValueError, "n_memory must lie in 0..W = 0..6, got 7"),
    "counts are of another dtype": (
        {"valid_memory": torch.tensor([0, 2])}, TypeError, "valid_memory must be int32, got torch.int64",
    ),
    "counts are of another length": (
        {"valid_tokens": torch.zeros(3, dtype=torch.int32)}, ValueError, "valid_tokens must have shape (N=2), got (3,)",
    ),
    "counts are too large": (
        {"valid_memory": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "valid_memory must lie in 0..2, got [0, 3]",
    ),
    "counts are negative": (
        {"valid_tokens": torch.tensor([-1, 3], dtype=torch.int32)}, ValueError, "valid_tokens must lie in 0..4, got [-1, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(bad):
    changes, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error, match=re.escape(message)):
        window_attention(**good_arguments() | changes)
    window_attention(**good_arguments())
