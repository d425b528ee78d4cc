"""Stream attention: every backend computes the definition, forward and backward, whatever the shape, in work linear in T."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import in_turn
from stream_attention_problem import (
    BACKENDS,
    CASES,
    DTYPES,
    FAST_BACKENDS,
    TRITON,
    TRITON_CASES,
    Case,
    assert_problem_within_budget,
    by_hand,
    make_problem,
    spec,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from smt_kernels import WindowSpec, dense_attention, launch, stream_attention
from smt_kernels.stream_attention import blocked, strips
from smt_kernels.testing.budget import assert_equal_in_double, poisoned_memory


@pytest.mark.parametrize("case", [replace(case, head_dim=3, n_batch=1) for case in CASES if case.n_queries <= 130], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_computes_the_definition(backend, case):
    problem = make_problem(case)
    out = stream_attention(**problem.inputs, **problem.settings, backend=backend)
    assert_equal_in_double({"out": out}, {"out": by_hand(case, problem)}, terms=problem.terms())


# The step of decoding in the middle of a stream, in every dtype.
@pytest.mark.parametrize(("case", "dtype"), in_turn([CASES[2], *CASES[:2], *CASES[3:]], DTYPES))
def test_blocked_errs_at_most_twice_as_much_as_plain_pytorch(case, dtype, device):
    assert_problem_within_budget(make_problem(case, dtype, device), "blocked")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    # Natively first: with slots and history, without memory, with grouped heads, with static memory.
    in_turn([TRITON_CASES[7], *TRITON_CASES[:7], *TRITON_CASES[8:]], DTYPES, native=(0, 1, 6, 13)),
)
def test_kernels_err_at_most_twice_as_much_as_plain_pytorch(case, dtype, device):
    assert_problem_within_budget(make_problem(case, dtype, device), "triton")


@pytest.mark.triton
@pytest.mark.interpreter
@pytest.mark.parametrize(("family", "dtype"), in_turn(launch.FAMILIES[:-1], [torch.float32, torch.bfloat16]))
def test_the_launch_settings_of_every_architecture_compute_the_same(family, dtype, monkeypatch):
    monkeypatch.setattr(launch, "architecture_family", lambda device: family)
    # Products of fp32 are in small chunks, which take the interpreter long: fewer of them.
    head_dim = 32 if dtype == torch.float32 else 64
    case = Case(70, n_slots=6, history=9, first_step=40, kv_heads=1, head_dim=head_dim, n_batch=1)
    assert_problem_within_budget(make_problem(case, dtype), "triton")


# One block at a time, and some blocks; with the fused operation, and as on devices that have none.
@pytest.mark.parametrize(("case", "cut"), in_turn(CASES, [(1, True), (20_000, False), (20_000, True), (1, False)]))
def test_gradients_equal_the_reference_in_double_precision_however_it_is_cut(case, cut, monkeypatch, device):
    problem = make_problem(case, device=device)
    chunk_scores, fused = cut
    monkeypatch.setattr(blocked, "CHUNK_SCORES", chunk_scores)
    if not fused:
        monkeypatch.setattr(dense_attention, "FUSED_ON", ())
    with poisoned_memory():
        actual = problem.results("blocked")
    assert_equal_in_double(actual, problem.results("reference"), terms=problem.terms())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), stride=st.none() | st.integers(1, 40), kv_heads=st.integers(1, 2), group=st.integers(1, 3))
def test_any_geometry_equals_the_reference(data, stride, kv_heads, group):
    problem = make_problem(draw_case(data, stride, kv_heads, group))
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=problem.terms())


@pytest.mark.triton
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    data=st.data(),
    stride=st.sampled_from([None, 1, 16]),  # a kernel of its own for each, as for the others here
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([3, 8]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_geometry_is_within_budget(data, stride, kv_heads, group, head_dim, dtype, device):
    case = replace(draw_case(data, stride, kv_heads, group), n_batch=1, head_dim=head_dim)
    torch.manual_seed(case.n_queries)
    assert_problem_within_budget(make_problem(case, dtype, device), "triton")


def draw_case(data: st.DataObject, stride: int | None, kv_heads: int, group: int) -> Case:

    def number(low, high):
        return data.draw(st.integers(low, high))

    return Case(
        n_queries=number(1, 120),
        window=spec(number(0, 16), number(stride or 1, 60), stride),
        n_slots=number(0, 60),
        history=number(0, 60),
        first_step=number(-150, 150),
        first_slot=number(-30, 30),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=number(1, 8),
    )


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "fused projection":
        return torch.cat([x.new_full(x.shape, float("nan")), x], dim=2)[:, :, x.shape[2] :]
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "steps first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    assert layout == "strided head"
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", ["fused projection", "heads first", "steps first", "strided head"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_inputs_may_have_any_strides(backend, layout, device):
    problem = make_problem(Case(40, n_slots=6, heads=4), torch.float32, device)
    inputs = {name: in_layout(x, layout) for name, x in problem.inputs.items()}
    strided = replace(problem, inputs=inputs, grad=in_layout(problem.grad, layout))
    assert not strided.inputs["k"].is_contiguous()
    actual, expected = strided.results(backend), problem.results(backend)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert actual["out"].is_contiguous()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_every_input_may_have_strides_of_its_own(backend, device):
    problem = make_problem(Case(70, n_slots=6), torch.float32, device)
    layouts = {"k": "heads first", "v": "fused projection", "memory_k": "fused projection", "memory_v": "steps first"}
    inputs = {name: in_layout(x, layouts[name]) if name in layouts else x for name, x in problem.inputs.items()}
    strided = replace(problem, inputs=inputs, grad=in_layout(problem.grad, "heads first"))
    assert len({x.stride()[:3] for x in (inputs["q"], inputs["k"], inputs["v"])}) == 3
    actual, expected = strided.results(backend), problem.results(backend)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sizes", [[1] * 100, [37, 1, 32, 30], [16, 84]], ids=["token by token", "ragged", "two"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_with_carried_history_equal_one_call(backend, sizes):
    problem = make_problem(Case(100, n_slots=6))
    q, k, v, memory_k, memory_v = problem.inputs.values()
    whole = stream_attention(**problem.inputs, **problem.settings, backend=backend)
    window, outputs, start = problem.settings["window"], [], 0
    for size in sizes:
        stop = start + size
        step, slot = max(0, start - 49), max(0, (start - 1) // 16 - 15)
        tokens, slots = slice(step, stop), slice(slot, max(0, (stop - 2) // 16))
        piece = q[:, start:stop], k[:, tokens], v[:, tokens], memory_k[:, slots], memory_v[:, slots]
        outputs.append(stream_attention(*piece, window=window, first_step=step, first_slot=slot, backend=backend))
        start = stop
    assert_equal_in_double({"out": torch.cat(outputs, dim=1)}, {"out": whole}, terms=problem.terms())


@pytest.mark.parametrize("anything", [1e3, float("nan")], ids=["1000", "nan"])
@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_what_no_query_sees_changes_nothing_and_gets_no_gradient(backend, anything, device):
    problem = make_problem(Case(40, n_slots=30, history=100, first_step=200, first_slot=-6), torch.float32, device)
    before = problem.results(backend)
    # Queries are the steps 300..339: they see the tokens from 251 (row 51) on and the slots 3..20 (rows 9..26).
    for name, unseen in {"k": [*range(51)], "memory_k": [*range(9), *range(27, 30)]}.items():
        for key in (name, name.replace("k", "v") if name == "k" else "memory_v"):
            problem.inputs[key][:, unseen] = anything
            assert not before[f"d{key}"][:, unseen].any()
    after = problem.results(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_a_window_without_slots_reads_none_of_those_it_is_given(backend, device):
    problem = make_problem(Case(40, spec(0, 20, 16), n_slots=3, n_batch=1), torch.float32, device)
    for name in ("memory_k", "memory_v"):
        problem.inputs[name].fill_(float("nan"))
    results = problem.results(backend)
    assert not results["dmemory_k"].any() and not results["dmemory_v"].any()
    without = replace(problem, inputs={name: problem.inputs[name] for name in "qkv"}).results(backend)
    assert all(torch.equal(value, results[name]) for name, value in without.items())


@pytest.mark.triton(launches=False)
@pytest.mark.parametrize("window", [spec(2**40, 2**40, 16), spec(2**40, 2**40, None)], ids=str)
@pytest.mark.parametrize("first_step", [-(2**40), 2**40])
@pytest.mark.parametrize("first_slot", [-(2**40), 2**40])
def test_kernels_are_told_numbers_of_32_bits_however_long_the_stream(window, first_step, first_slot):
    from smt_kernels.stream_attention.geometry import arguments

    q, memory = torch.empty(1, 40, 1, 8), torch.empty(1, 3, 1, 8)
    told = arguments(q, q, memory, window, first_step, first_slot)
    assert {name: value for name, value in told.items() if name != "STRIDE" and not abs(value) < 2**31} == {}


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale_may_be_any_number(scale):
    problem = make_problem(Case(70, n_slots=4))
    problem.settings["scale"] = scale
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=problem.terms())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_is_a_factor_of_the_scores(backend):
    problem = make_problem(Case(70, n_slots=4))
    q, *others = problem.inputs.values()
    scaled = stream_attention(q, *others, scale=0.3, **problem.settings, backend=backend)
    expected = stream_attention(0.3 * 16**0.5 * q, *others, **problem.settings, backend=backend)
    assert_equal_in_double({"out": scaled}, {"out": expected}, terms=problem.terms())


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    problem = make_problem(Case(70, n_slots=4), torch.float32)
    problem.settings["scale"] = 1e4
    assert all(value.isfinite().all() for value in problem.results(backend).values())


@pytest.mark.parametrize(
    "case",
    [
        Case(7, spec(2, 3, 2), n_slots=3, heads=2, kv_heads=1, head_dim=2, n_batch=1),
        Case(9, spec(1, 2, 2), n_slots=4, history=1, first_step=-2, first_slot=-1, heads=1, kv_heads=1, head_dim=2, n_batch=1),
        Case(3, spec(0, 3, None), n_slots=2, head_dim=2, n_batch=1),
        Case(4, spec(0, 3, None), n_slots=None, head_dim=2, n_batch=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_finite_differences(backend, case, monkeypatch):
    monkeypatch.setattr(strips, "BLOCK_QUERIES", 2)
    problem = make_problem(case)
    inputs = tuple(x.requires_grad_() for x in problem.inputs.values())
    assert torch.autograd.gradcheck(lambda *x: stream_attention(*x, backend=backend, **problem.settings), inputs)


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_two_runs_give_the_same_bits(backend, device):
    problem = make_problem(Case(70, n_slots=18, heads=4, kv_heads=2, n_batch=1), torch.bfloat16, device)
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_log_sum_exp_is_that_of_the_visible_scores():
    problem = make_problem(Case(70, spec(0, 50, None), n_slots=2, heads=1, kv_heads=1))
    q, k, _, memory_k, _ = (x[:, :, 0] for x in problem.inputs.values())
    _, lse = blocked.forward(*problem.inputs.values(), problem.settings["window"], 0.3, 0, 0)
    scores = 0.3 * q @ torch.cat([memory_k, k], dim=1).mT
    steps = torch.arange(70)
    hidden = (steps[None] > steps[:, None]) | (steps[None] <= steps[:, None] - 50)
    expected = scores.masked_fill(torch.cat([torch.zeros(70, 2, dtype=torch.bool), hidden], dim=1), float("-inf")).logsumexp(-1)
    assert_equal_in_double({"lse": lse[:, 0]}, {"lse": expected}, terms=problem.terms())


def counted(function: Callable[..., object], *arguments: object) -> tuple[object, int]:
    """What the function returns, and its floating-point operations, those of the fused attention of a CPU included."""

    def forward(queries: torch.Size, keys: torch.Size, *others: object, **options: object) -> int:
        return 2 * 2 * queries.numel() * keys[2]  # Q K^T and P V

    def backward(grad: torch.Size, queries: torch.Size, keys: torch.Size, *others: object, **options: object) -> int:
        return 5 * 2 * queries.numel() * keys[2]  # Q K^T, dO V^T, dS K, dS^T Q and P^T dO

    # Only torch from 2.15 on has counts of its own for these.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with FlopCounterMode(display=False, custom_mapping={fused: forward, fused_backward: backward}) as counter:
        result = function(*arguments)
    return result, counter.get_total_flops()


@pytest.mark.parametrize("window", [spec(15, 50, 16), spec(15, 50, None)], ids=["stride", "static"])
def test_work_grows_linearly_with_the_length(window):
    def flops(n_blocks: int) -> tuple[int, int]:
        inputs = list(make_problem(Case(32 * n_blocks + 1, window, n_slots=20, n_batch=1)).inputs.values())
        settings = window, 0.25, 0, 0
        (out, lse), forward = counted(blocked.forward, *inputs, *settings)
        return forward, counted(blocked.backward, out, out, lse, *inputs, *settings)[1]

    short, medium, long = flops(8), flops(16), flops(32)  # the first of which sees as many slots as a window holds
    for a, b, c in zip(short, medium, long, strict=True):
        assert b > a and c - b == 2 * (b - a)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "products"])
def test_the_count_of_work_tells_quadratic_from_linear(fused, monkeypatch):
    monkeypatch.setattr(dense_attention, "FUSED_ON", ("cpu",) if fused else ())
    for length in (8, 16, 32):
        q, k, v = torch.randn(3, 2, 3, length, 4).unbind()
        bias = torch.zeros(1, 1, length, length)
        (out, lse), forward = counted(dense_attention.attend, q, k, v, bias, 0.5)
        _, backward = counted(dense_attention.attend_backward, out, q, k, v, out, lse, bias, 0.5)
        one_product = 2 * 2 * 3 * length**2 * 4
        assert (forward, backward) == (2 * one_product, 5 * one_product)


def test_a_window_that_is_longer_than_the_sequence_costs_no_more_than_the_sequence():
    q = torch.randn(1, 40, 1, 16)
    short, long = ([*strips.runs(q, q, q[:, :0], WindowSpec(0, size, None), 0, 0)] for size in (40, 10**9))
    assert [run.tokens.length for run in long] == [run.tokens.length for run in short]
    outs = [stream_attention(q, q, q, window=WindowSpec(0, size, None), backend="blocked") for size in (40, 10**9)]
    assert torch.equal(*outs)


def test_a_window_of_more_slots_than_are_written_costs_no_more_than_these():
    q, memory = torch.randn(1, 100, 1, 16), torch.randn(2, 1, 6, 1, 16)
    fits, longer = WindowSpec(6, 50, 16), WindowSpec(10**9, 50, 16)
    lengths = [[run.slots.length for run in strips.runs(q, q, memory[0], window, 0, 0)] for window in (fits, longer)]
    assert lengths[0] == lengths[1] and max(lengths[0]) <= 2 * 6
    outs = [stream_attention(q, q, q, *memory, window=window, backend="blocked") for window in (fits, longer)]
    assert torch.equal(*outs)
