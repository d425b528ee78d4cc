"""A decoding step of stream attention: every backend computes the definition over what the rings hold, and nothing else."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import pytest
import torch
from pairs import in_turn
from torch import Tensor

from smt_kernels import WindowSpec, last_choice, stream_attention, stream_attention_decode
from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget, poisoned_memory

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]
BACKENDS = ["reference", *FAST_BACKENDS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Sizes of one problem, written M50-N15-H4x2-D64: rings of tokens and slots, query x key/value heads, head size; counts."""

    n_tokens: tuple[int, ...]
    n_slots: tuple[int, ...]
    tokens: int = 50
    slots: int = 15
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16

    def __str__(self) -> str:
        counts = "-".join(f"{m}+{n}" for m, n in zip(self.n_tokens, self.n_slots, strict=True))
        return f"M{self.tokens}-N{self.slots}-H{self.heads}x{self.kv_heads}-D{self.head_dim}-{counts}"


CASES = [
    Case((50,), (15,), head_dim=64, heads=4),
    Case((50, 50), (15, 15), kv_heads=1, head_dim=40),
    Case((1, 50, 20), (0, 15, 1), heads=4),
    Case((0, 3), (0, 2)),
    Case((0, 0), (0, 0)),
    Case((0,), (4,), head_dim=128),
    Case((5, 2), (0, 0), slots=0, heads=3, kv_heads=1),
    Case((200,), (33,), tokens=200, slots=70, head_dim=64),
    Case((50,), (15,), heads=1, kv_heads=1, head_dim=256),
    Case((1,), (1,), tokens=1, slots=1, heads=18, kv_heads=1),
]


def make_inputs(case: Case, dtype: torch.dtype, device: str, nothing: float = float("nan")) -> dict[str, Tensor]:
    """Inputs whose rings hold ``nothing`` where no entry exists."""

    def ring(size: int, counts: tuple[int, ...]) -> Tensor:
        values = torch.randn(len(counts), size, case.kv_heads, case.head_dim, device=device).to(dtype)
        for row, count in enumerate(counts):
            values[row, count:] = nothing
        return values

    inputs = {"q": torch.randn(len(case.n_tokens), case.heads, case.head_dim, device=device).to(dtype)}
    inputs |= {name: ring(case.tokens, case.n_tokens) for name in "kv"}
    inputs |= {name: ring(case.slots, case.n_slots) for name in ("memory_k", "memory_v")}
    counts = {"n_tokens": case.n_tokens, "n_slots": case.n_slots}
    return inputs | {name: torch.tensor(count, dtype=torch.int32, device=device) for name, count in counts.items()}


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES, DTYPES, native=(0, 1)))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_output_errs_at_most_twice_as_much_as_plain_pytorch(backend, case, dtype, device):
    inputs = make_inputs(case, dtype, device)
    with poisoned_memory():
        out = stream_attention_decode(**inputs, backend=backend)

    def results(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": stream_attention_decode(**inputs, backend="reference")}

    assert_within_budget({"out": out}, lambda: results(in_double(inputs)), results(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_equals_the_last_step_of_a_sequence(backend, device):
    q = torch.randn(1, 300, 4, 16, device=device)
    k, v = torch.randn(2, 1, 300, 2, 16, device=device)
    memory_k, memory_v = torch.randn(2, 1, 18, 2, 16, device=device)
    window = WindowSpec()

    def newest(dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = [x.to(dtype) for x in (q, k, v, memory_k, memory_v)]
        return {"out": stream_attention(*inputs, window=window, backend="reference")[:, -1]}

    full = {"n_tokens": torch.tensor([50], dtype=torch.int32), "n_slots": torch.tensor([15], dtype=torch.int32)}
    # Rings that have wrapped: entry i of the sequence lies at i modulo the size of the ring.
    rings = [x[:, -50:].roll(300 % 50, dims=1) for x in (k, v)] + [
        x[:, -15:].roll(18 % 15, dims=1) for x in (memory_k, memory_v)
    ]
    counts = {name: count.to(device) for name, count in full.items()}
    out = stream_attention_decode(q[:, -1], *rings, **counts, backend=backend)
    assert_within_budget({"out": out}, lambda: newest(torch.float64), newest(torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_is_a_factor_of_the_scores(backend, device):
    inputs = make_inputs(CASES[2], torch.float32, device)
    scaled = stream_attention_decode(**inputs, scale=0.5, backend=backend)
    expected = stream_attention_decode(**inputs | {"q": 2.0 * inputs["q"]}, backend=backend)  # heads of 16: 0.5 is 2 / 16**0.5
    torch.testing.assert_close(scaled, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_with_nothing_to_see_gets_zeros(backend, device):
    out = stream_attention_decode(**make_inputs(Case((0, 3, 0), (0, 0, 0)), torch.float32, device), backend=backend)
    assert not out[[0, 2]].any() and out[1].any()


@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim == 16], ids=str)
def test_blocked_gradients_equal_the_reference_and_are_zero_where_nothing_exists(case):
    inputs = in_double(make_inputs(case, torch.float64, "cpu"))
    tensors = {name: x.requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    gradients = {}
    for backend in ("reference", "blocked"):
        out = stream_attention_decode(**inputs, backend=backend)
        grads = torch.autograd.grad(out.sin().sum(), list(tensors.values()), materialize_grads=True)
        gradients[backend] = dict(zip(tensors, grads, strict=True))
    assert_equal_in_double(gradients["blocked"], gradients["reference"], terms=300)
    for row, count in enumerate(case.n_tokens):
        assert not gradients["blocked"]["k"][row, count:].any()


def test_a_required_gradient_runs_blocked_and_refuses_triton(device):
    inputs = make_inputs(CASES[0], torch.float32, device)
    inputs["k"].requires_grad_()
    with pytest.raises(ValueError, match=r"a gradient is required, and its kernel has no backward|triton is not installed"):
        stream_attention_decode(**inputs, backend="triton")
    stream_attention_decode(**inputs)
    assert last_choice("stream_attention_decode").backend == "blocked"


@pytest.mark.triton
def test_no_gradient_is_required_where_none_is_recorded(device):
    inputs = make_inputs(CASES[0], torch.float32, device)
    inputs["k"].requires_grad_()
    with torch.no_grad():
        assert not stream_attention_decode(**inputs, backend="triton").requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_rings_may_have_any_strides_and_two_runs_give_the_same_bits(backend, device):
    inputs = make_inputs(CASES[2], torch.bfloat16, device, nothing=0.0)
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x for name, x in inputs.items()}
    differing = inputs | {name: strided[name] for name in ("v", "memory_k")}  # each of a pair as it is
    first, *others = (stream_attention_decode(**x, backend=backend) for x in (inputs, strided, differing))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_that_nobody_has_checked_and_are_too_large_count_as_all(backend, device, monkeypatch):
    for module in ("checks", "stream_attention_decode.blocked"):  # as on a GPU
        monkeypatch.setattr(importlib.import_module(f"smt_kernels.{module}"), "readable", lambda tensor: False)
    inputs = make_inputs(CASES[2], torch.float32, device, nothing=0.0)
    rings = {"n_tokens": inputs["k"].shape[1], "n_slots": inputs["memory_k"].shape[1]}
    of_rows = torch.arange(len(inputs["q"]), dtype=torch.int32, device=device)
    too_large = {name: of_rows + ring for name, ring in rings.items()}
    all_of_them = {name: torch.full_like(of_rows, ring) for name, ring in rings.items()}
    found, expected = (stream_attention_decode(**inputs | counts, backend=backend) for counts in (too_large, all_of_them))
    assert torch.equal(found, expected)


@pytest.mark.triton
def test_a_transform_runs_blocked_and_refuses_triton(device):
    inputs = make_inputs(CASES[2], torch.float32, device, nothing=0.0)

    def out(q: Tensor, backend: str | None) -> Tensor:
        return stream_attention_decode(**inputs | {"q": q}, backend=backend)

    torch.vmap(lambda q: out(q, None))(inputs["q"].requires_grad_()[None]).sum().backward()
    assert last_choice("stream_attention_decode").backend == "blocked" and inputs["q"].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="a gradient is required, and its kernel has no backward"):
        torch.vmap(lambda q: out(q, "triton"))(inputs["q"][None])


@pytest.mark.triton
@pytest.mark.interpreter
def test_the_kernel_reads_what_exists_once_and_nothing_else():
    from smt_kernels.stream_attention_decode import kernels
    from smt_kernels.testing.traffic import count_traffic

    case = Case((50, 7), (15, 1), heads=4, kv_heads=2, head_dim=40)
    inputs = make_inputs(case, torch.bfloat16, "cpu")
    with count_traffic() as traffic:
        out = kernels.forward(**inputs, scale=0.1)
    entries = sum(case.n_tokens) + sum(case.n_slots)
    exists = 2 * entries * case.kv_heads * case.head_dim * 2
    assert traffic.bytes == exists + inputs["q"].nbytes + out.nbytes + 2 * 2 * case.kv_heads * 4
    assert not traffic.raced and not traffic.atomics


BAD_ARGUMENTS = {
    "q has four dimensions": ({"q": torch.zeros(2, 1, 4, 8)}, ValueError, "q must have shape (B, H, D), got (2, 1, 4, 8)"),
    "k has another batch": ({"k": torch.zeros(3, 5, 2, 8)}, ValueError, "k must have shape (B=2, M, H_kv, D=8)"),
    "v has another length": ({"v": torch.zeros(2, 4, 2, 8)}, ValueError, "v must have shape (B=2, M=5, H_kv=2, D=8)"),
    "v has another dtype": ({"v": torch.zeros(2, 5, 2, 8).half()}, TypeError, "v must have the dtype of q, torch.float32"),
    "memory_v has another length": (
        {"memory_v": torch.zeros(2, 1, 2, 8)}, ValueError, "memory_v must have shape (B=2, N=3, H_kv=2, D=8)",
    ),
    "heads do not divide": ({"q": torch.zeros(2, 3, 8)}, ValueError, "q has 3 heads, which is not a multiple of the 2"),
    "counts are of another dtype": ({"n_tokens": torch.tensor([0, 2])}, TypeError, "n_tokens must be int32, got torch.int64"),
    "counts are too few": (
        {"n_slots": torch.zeros(1, dtype=torch.int32)}, ValueError, "n_slots must have shape (B=2), got (1,)",
    ),
    "counts are too large": (
        {"n_tokens": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "n_tokens must lie in 0..5, got [0, 6]",
    ),
    "counts are negative": (
        {"n_slots": torch.tensor([-1, 3], dtype=torch.int32)}, ValueError, "n_slots must lie in 0..3, got [-1, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_named(bad):
    ring, memory, counts = torch.zeros(2, 5, 2, 8), torch.zeros(2, 3, 2, 8), torch.tensor([0, 2], dtype=torch.int32)
    good = {"q": torch.zeros(2, 4, 8), "k": ring, "v": ring, "memory_k": memory, "memory_v": memory}
    good |= {"n_tokens": counts, "n_slots": counts}
    changes, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error, match=re.escape(message)):
        stream_attention_decode(**good | changes)
    stream_attention_decode(**good)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_counts_may_have_any_strides(backend, device):
    inputs = make_inputs(Case((4, 4, 4), (2, 2, 2)), torch.float32, device)
    expected = stream_attention_decode(**inputs, backend=backend)
    counts = torch.tensor([[4, 99, 2, 99]] * 3, dtype=torch.int32, device=device)
    for of in (counts, counts[:1].expand(3, 4)):
        strided = inputs | {"n_tokens": of[:, 0], "n_slots": of[:, 2]}
        assert torch.equal(stream_attention_decode(**strided, backend=backend), expected)
