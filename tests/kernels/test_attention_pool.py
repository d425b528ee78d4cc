"""Attention pooling of windows and of sequences: every backend computes the definition, forward and backward."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from smt_kernels import WindowSpec, attention_pool, attention_pool_sequence, last_choice
from smt_kernels.attention_pool import blocked
from smt_kernels.testing.budget import assert_equal_in_double, assert_within_budget, poisoned_memory

BACKENDS = ["reference", "blocked"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = WindowSpec(3, 7, 4)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def setting_id(settings: dict[str, object]) -> str:
    return "-".join(f"{name}={value}" for name, value in settings.items()) or "plain"


def symmetric(*shape: int, device: str = "cpu") -> Tensor:
    """Numbers in (-1, 1): bounded, so that the largest error of a result is not that of one outlier."""
    return 2 * torch.rand(shape, device=device) - 1


@dataclass
class Problem:
    """Tensors to differentiate by name, the other arguments of the function, and the gradients of pooled and weights."""

    function: object
    inputs: dict[str, Tensor | None]
    settings: dict[str, object]
    grads: tuple[Tensor, Tensor]

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Results and gradients of the public function, with everything in ``dtype`` (None: as it is)."""
        inputs = {n: None if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for n, v in self.inputs.items()}
        outputs = self.function(**inputs, **self.other_arguments(dtype), backend=backend)
        given = {name: value for name, value in inputs.items() if value is not None}
        grads = [grad.to(out.dtype) for grad, out in zip(self.grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, list(given.values()), grads, materialize_grads=True)
        named = {"pooled": outputs[0].detach(), "weights": outputs[1].detach()}
        return named | {f"d_{name}": grad for name, grad in zip(given, found, strict=True)}

    def other_arguments(self, dtype: torch.dtype | None) -> dict[str, object]:
        mask = self.settings.get("dropout_mask")
        return self.settings if mask is None or dtype is None else self.settings | {"dropout_mask": mask.to(dtype)}


def dropout_mask(*shape: int, device: str = "cpu") -> Tensor:
    return torch.bernoulli(torch.full(shape, 0.75, device=device)) / 0.75


def projections(width: int, d_k: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    return {name: (symmetric(d_k, width, device=device) * 3 * width**-0.5).to(dtype) for name in ("w_q", "w_k")}


def make_windows(
    dtype: torch.dtype, device: str, *, n=6, size=65, n_memory=15, width=64, d_k=48, ragged=True, dropout=False, normalise=True
) -> Problem:
    inputs = {"windows": symmetric(n, size, width, device=device).to(dtype), **projections(width, d_k, dtype, device)}
    settings = {"n_memory": n_memory, "normalise": normalise}
    if ragged:
        settings["valid_memory"] = torch.randint(0, n_memory + 1, (n,), dtype=torch.int32, device=device)
        settings["valid_tokens"] = torch.randint(1, size - n_memory + 1, (n,), dtype=torch.int32, device=device)
    if dropout:
        settings["dropout_mask"] = dropout_mask(n, size, device=device).to(dtype)
    grads = symmetric(n, width, device=device).to(dtype), symmetric(n, size, device=device).to(dtype)
    return Problem(attention_pool, inputs, settings, grads)


@dataclass(frozen=True)
class Sequence:
    """Sizes of one sequence problem: ``settings`` are those of the public function beyond the tensors."""

    window: WindowSpec = SMALL
    batch: int = 2
    tokens: int = 90
    slots: int | None = 25
    width: int = 6
    d_k: int = 5
    settings: dict[str, int] = field(default_factory=dict)
    dropout: bool = False
    normalise: bool = True

    def __str__(self) -> str:
        kind = "tokens only" if self.slots is None else "with slots"
        return "-".join([kind, *(f"{name}={value}" for name, value in self.settings.items())])


def make_sequence(case: Sequence, dtype: torch.dtype, device: str) -> Problem:
    slots = None if case.slots is None else symmetric(case.batch, case.slots, case.width, device=device).to(dtype)
    tokens = symmetric(case.batch, case.tokens, case.width, device=device).to(dtype)
    inputs = {"tokens": tokens, "slots": slots, **projections(case.width, case.d_k, dtype, device)}
    settings = {"window": case.window, "first_write": 0, "n_writes": 5, "normalise": case.normalise, **case.settings}
    shape = case.batch, settings["n_writes"], case.window.n_tokens if slots is None else case.window.size
    if case.dropout:
        settings["dropout_mask"] = dropout_mask(*shape, device=device).to(dtype)
    grads = symmetric(*shape[:2], case.width, device=device).to(dtype), symmetric(*shape, device=device).to(dtype)
    return Problem(attention_pool_sequence, inputs, settings, grads)


TIMELINES = [
    {},
    {"n_writes": 20, "write_group": 4},
    {"write_group": 16},
    {"n_writes": 1},
    {"first_write": 1, "n_writes": 1, "write_group": 4},
    {"first_write": 3, "n_writes": 8, "write_group": 4, "first_step": 9},
    {"first_write": 2, "n_writes": 17, "write_group": 16, "first_step": -5, "first_slot": -4},
    {"first_write": 5, "n_writes": 9, "first_step": 24, "first_slot": 6},
    {"first_write": 40, "n_writes": 8, "write_group": 8, "first_step": 120, "first_slot": 20},
    {"first_write": 40, "n_writes": 3, "write_group": 8, "first_step": 120, "first_slot": 100},
    {"n_writes": 5, "first_slot": -25},
]
SEQUENCES = [Sequence(settings=timeline, slots=slots) for timeline in TIMELINES for slots in (25, None)]
SEQUENCES += [
    Sequence(settings={"n_writes": 3, "write_group": 4}, slots=0),
    Sequence(WindowSpec(0, 5, 5), settings={"n_writes": 9}),
]
WIDE_SEQUENCES = [
    Sequence(WindowSpec(), 2, 50 + 7 * 16, 22, 64, 48, {"first_write": 24, "n_writes": 8, "write_group": 8, "first_step": 351}),
    Sequence(WindowSpec(), 1, 400, None, 64, 48, {"n_writes": 19}),
    Sequence(WindowSpec(), 2, 300, 20, 64, 48, {"n_writes": 18, "write_group": 4}),
]
WIDE_SEQUENCES[0].settings["first_slot"] = 2


def pool_by_hand(
    entries: list[list[float]], w_q: list[list[float]], w_k: list[list[float]], factors: list[float], normalise: bool
) -> tuple[list[float], list[float]]:
    """pool(window) of DESIGN 2.1 over the entries that exist, one number at a time, keys and all."""
    if normalise:
        entries = [[x / math.sqrt(sum(y * y for y in entry) / len(entry) + 1e-5) for x in entry] for entry in entries]
    mean = [sum(column) / len(entries) for column in zip(*entries, strict=True)]
    query = [sum(w * x for w, x in zip(row, mean, strict=True)) for row in w_q]
    keys = [[sum(w * x for w, x in zip(row, entry, strict=True)) for row in w_k] for entry in entries]
    exponentials = [math.exp(sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(w_q))) for key in keys]
    weights = [value / sum(exponentials) for value in exponentials]
    used = [w * f for w, f in zip(weights, factors, strict=True)]
    return [sum(w * entry[i] for w, entry in zip(used, entries, strict=True)) for i in range(len(mean))], weights


def windows_by_hand(problem: Problem) -> dict[str, Tensor]:
    windows, w_q, w_k = (value.tolist() for value in problem.inputs.values())
    settings, pooled, weights = problem.settings, [], []
    for row, window in enumerate(windows):
        n_memory, size = settings["n_memory"], len(window)
        held = [
            int(settings[name][row]) if name in settings else most
            for name, most in (("valid_memory", n_memory), ("valid_tokens", size - n_memory))
        ]
        there = [i for i in range(size) if n_memory - held[0] <= i < n_memory or i >= size - held[1]]
        factors = settings["dropout_mask"][row].tolist() if "dropout_mask" in settings else [1.0] * size
        result = pool_by_hand([window[i] for i in there], w_q, w_k, [factors[i] for i in there], settings["normalise"])
        pooled.append(result[0])
        weights.append([result[1][there.index(i)] if i in there else 0.0 for i in range(size)])
    return {"pooled": torch.tensor(pooled, dtype=torch.float64), "weights": torch.tensor(weights, dtype=torch.float64)}


def sequence_as_windows(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """Per write, its window (B, W, d) cut out of the sequence as DESIGN 2.1 says, and which entries exist; others are zeros."""
    tokens, slots, *_ = problem.inputs.values()
    settings, window = {"write_group": 1, "first_step": 0, "first_slot": 0} | problem.settings, problem.settings["window"]
    cut = []
    for write in range(settings["first_write"], settings["first_write"] + settings["n_writes"]):
        step, group_start = window.stride * (write + 1), write // settings["write_group"] * settings["write_group"]
        wanted = [(tokens, s - settings["first_step"]) for s in range(step - window.n_tokens + 1, step + 1)]
        if slots is not None:
            wanted = [(slots, s - settings["first_slot"]) for s in range(group_start - window.n_memory, group_start)] + wanted
        there = torch.tensor([0 <= index < source.shape[1] for source, index in wanted])
        zero = torch.zeros_like(tokens[:, 0])
        entries = [source[:, i] if here else zero for (source, i), here in zip(wanted, there.tolist(), strict=True)]
        cut.append((torch.stack(entries, dim=1), there))
    return cut


def sequence_by_hand(problem: Problem) -> dict[str, Tensor]:
    w_q, w_k = (problem.inputs[name].tolist() for name in ("w_q", "w_k"))
    mask, results = problem.settings.get("dropout_mask"), []
    for write, (windows, there) in enumerate(sequence_as_windows(problem)):
        rows = []
        for row, window in enumerate(windows):
            factors = torch.ones(len(there)) if mask is None else mask[row, write]
            entries = window[there].tolist()
            pooled, found = pool_by_hand(entries, w_q, w_k, factors[there].tolist(), problem.settings["normalise"])
            weights = torch.zeros(len(there), dtype=torch.float64)
            weights[there] = torch.tensor(found, dtype=torch.float64)
            rows.append((torch.tensor(pooled, dtype=torch.float64), weights))
        results.append([torch.stack(part) for part in zip(*rows, strict=True)])
    pooled, weights = (torch.stack(part, dim=1) for part in zip(*results, strict=True))
    return {"pooled": pooled, "weights": weights}


def assert_problem_within_budget(problem: Problem) -> None:
    with poisoned_memory():
        actual = problem.results("blocked")
    assert_within_budget(actual, problem.results("reference", torch.float64), problem.results("reference"))


def outputs_of(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: results[name] for name in ("pooled", "weights")}


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_follow_the_formula_computed_one_number_at_a_time(backend, ragged, normalise, dropout):
    sizes = {"n": 3, "size": 9, "n_memory": 4, "width": 5, "d_k": 3}
    problem = make_windows(torch.float64, "cpu", ragged=ragged, normalise=normalise, dropout=dropout, **sizes)
    assert_equal_in_double(outputs_of(problem.results(backend)), windows_by_hand(problem), terms=9 * 5)


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_follow_the_formula_computed_one_number_at_a_time(backend, case):
    problem = make_sequence(case, torch.float64, "cpu")
    assert_equal_in_double(outputs_of(problem.results(backend)), sequence_by_hand(problem), terms=10 * 6)


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("slots", [25, None], ids=["with slots", "tokens only"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_follow_the_formula_with_every_switch(backend, slots, normalise, dropout):
    case = Sequence(slots=slots, settings={"n_writes": 6, "write_group": 4}, normalise=normalise, dropout=dropout)
    problem = make_sequence(case, torch.float64, "cpu")
    assert_equal_in_double(outputs_of(problem.results(backend)), sequence_by_hand(problem), terms=10 * 6)


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_gradients_of_sequences_equal_those_of_the_reference_in_double_precision(case, device):
    problem = make_sequence(replace(case, dropout=True), torch.float64, device)
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=20 * 6)


@pytest.mark.parametrize("writes", [1, 3, 16])
def test_any_number_of_writes_may_share_a_product(writes, monkeypatch, device):
    monkeypatch.setattr(blocked, "WRITES_PER_PRODUCT", writes)
    problem = make_sequence(Sequence(settings={"n_writes": 9, "write_group": 4}), torch.float64, device)
    assert_equal_in_double(problem.results("blocked"), problem.results("reference"), terms=20 * 6)


@pytest.mark.parametrize("case", SEQUENCES[:12], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_equals_its_windows_cut_out(backend, case):
    problem = make_sequence(case, torch.float64, "cpu")
    pooled, weights = attention_pool_sequence(**problem.inputs, **problem.settings, backend=backend)
    n_memory, compared = 0 if case.slots is None else case.window.n_memory, 0
    w_q, w_k = problem.inputs["w_q"], problem.inputs["w_k"]
    for write, (windows, there) in enumerate(sequence_as_windows(problem)):
        if not bool((there[:n_memory].diff() >= 0).all()) or not bool((there[n_memory:].diff() >= 0).all()):
            continue  # entries missing at the right of a half: only sequences can say that
        compared += 1
        valid = [part.sum().to(torch.int32).expand(case.batch).contiguous() for part in (there[:n_memory], there[n_memory:])]
        counts = dict(zip(("valid_memory", "valid_tokens"), valid, strict=True))
        one = attention_pool(windows, w_q, w_k, n_memory=n_memory, **counts, backend=backend)
        actual = {"pooled": pooled[:, write], "weights": weights[:, write]}
        assert_equal_in_double(actual, dict(zip(actual, one, strict=True)), terms=10 * 6)
    assert compared


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "settings",
    [{}, {"ragged": False}, {"normalise": False}, {"dropout": True}, {"n_memory": 0, "size": 50}, {"n_memory": 64, "size": 65}],
    ids=setting_id,
)
def test_windows_err_at_most_twice_as_much_as_plain_pytorch(settings, dtype, device):
    assert_problem_within_budget(make_windows(dtype, device, **settings))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("case", WIDE_SEQUENCES, ids=str)
def test_sequences_err_at_most_twice_as_much_as_plain_pytorch(case, dropout, normalise, dtype, device):
    assert_problem_within_budget(make_sequence(replace(case, dropout=dropout, normalise=normalise), dtype, device))


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_finite_differences(backend, normalise, dropout):
    sizes = {"n": 2, "size": 5, "n_memory": 2, "width": 3, "d_k": 2}
    windows = make_windows(torch.float64, "cpu", normalise=normalise, dropout=dropout, **sizes)
    case = Sequence(WindowSpec(2, 3, 2), 1, 9, 3, 3, 2, {"n_writes": 4, "write_group": 2}, dropout, normalise)
    for problem in (windows, make_sequence(case, torch.float64, "cpu")):
        names = list(problem.inputs)

        def call(*values: Tensor, problem=problem, names=names) -> tuple[Tensor, ...]:
            return problem.function(**dict(zip(names, values, strict=True)), **problem.settings, backend=backend)

        assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in problem.inputs.values()))


@pytest.mark.parametrize("used", [0, 1], ids=["pooled", "weights"])
@pytest.mark.parametrize("make", [make_windows, lambda *a: make_sequence(Sequence(), *a)], ids=["windows", "sequence"])
def test_gradients_are_right_when_only_one_result_is_used(make, used, device):
    problem = make(torch.float64, device)
    found = []
    for backend in BACKENDS:
        inputs = {name: value.detach().requires_grad_() for name, value in problem.inputs.items()}
        out = problem.function(**inputs, **problem.settings, backend=backend)[used]
        grads = torch.autograd.grad(out, list(inputs.values()), problem.grads[used])
        found.append(dict(zip(inputs, grads, strict=True)))
    assert_equal_in_double(found[1], found[0], terms=65 + 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_do_not_exist_change_nothing_whatever_they_hold(backend, device):
    problem = make_windows(torch.float32, device)
    problem.settings["valid_memory"][:], problem.settings["valid_tokens"][:] = 4, 30
    before = problem.results(backend)
    absent = torch.ones(65, dtype=torch.bool, device=device)
    absent[15 - 4 : 15] = absent[65 - 30 :] = False
    problem.inputs["windows"][:, absent] = float("nan")
    after = problem.results(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not after["weights"][:, absent].any() and not after["d_windows"][:, absent].any()
    torch.testing.assert_close(after["weights"].sum(dim=1), torch.ones(6, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_and_slots_that_no_write_pools_change_nothing(backend, device):
    case = Sequence(settings={"first_write": 8, "n_writes": 4, "write_group": 4, "first_slot": 2}, tokens=90)
    problem = make_sequence(case, torch.float32, device)
    before = problem.results(backend)
    pooled = {"tokens": range(4 * 9 - 6, 4 * 12 + 1), "slots": range(8 - 3 - 2, 8 - 2)}
    for name, used in pooled.items():
        absent = torch.ones(problem.inputs[name].shape[1], dtype=torch.bool)
        absent[list(used)] = False
        problem.inputs[name][:, absent] = float("nan")
        assert not before[f"d_{name}"][:, absent].any() and before[f"d_{name}"][:, ~absent].all()
    after = problem.results(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("make", [make_windows, lambda *a: make_sequence(WIDE_SEQUENCES[2], *a)], ids=["windows", "sequence"])
def test_inputs_may_have_any_strides(make, device):
    problem = make(torch.float32, device)
    for name, value in problem.inputs.items():
        problem.inputs[name] = torch.stack([value, torch.full_like(value, float("nan"))], dim=-1)[..., 0]
    assert not any(value.is_contiguous() for value in problem.inputs.values())
    assert_problem_within_budget(problem)
    for name, value in problem.inputs.items():
        problem.inputs[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
    assert_problem_within_budget(problem)


@pytest.mark.parametrize("make", [make_windows, lambda *a: make_sequence(WIDE_SEQUENCES[1], *a)], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, make, device):
    problem = make(torch.bfloat16, device)
    first, second = problem.results(backend), problem.results(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_results_do_not_depend_on_inference_mode_or_on_earlier_calls(device):
    problem = make_sequence(Sequence(settings={"first_write": 7, "n_writes": 3}), torch.float64, device)
    blocked._layout.cache_clear()
    with torch.inference_mode():
        pooled, weights = attention_pool_sequence(**problem.inputs, **problem.settings)
    later = problem.results("blocked")
    assert torch.equal(pooled, later["pooled"]) and torch.equal(weights, later["weights"])
    assert blocked._layout.cache_info().hits > 0


def test_layouts_repeat_from_group_to_group(device):
    blocked._layout.cache_clear()
    problem = make_sequence(Sequence(settings={"n_writes": 4, "write_group": 4}), torch.float32, device)
    for group in range(2, 10):
        timeline = {"first_write": 4 * group, "first_step": 16 * group - 30, "first_slot": 4 * group - 20}
        attention_pool_sequence(**problem.inputs, **problem.settings | timeline)
    assert blocked._layout.cache_info().misses == 1


@pytest.mark.parametrize("slots", [5, None], ids=["with slots", "tokens only"])
@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
def test_the_sequence_operators_pass_opcheck(dropout, slots, device):
    case = Sequence(tokens=20, slots=slots, settings={"n_writes": 3, "write_group": 2}, dropout=dropout)
    problem = make_sequence(case, torch.float32, device)
    inputs = [None if value is None else value.requires_grad_() for value in problem.inputs.values()]
    settings = problem.settings.get("dropout_mask"), [3, 7, 4], [0, 3, 2, 0, 0], True, "blocked"
    operators = torch.ops.smt_kernels
    torch.library.opcheck(operators.attention_pool_sequence.default, (*inputs, *settings))
    inputs = [None if value is None else value.detach() for value in inputs]
    _, *kept = operators.attention_pool_sequence(*inputs, *settings)
    for grads in (problem.grads, (problem.grads[0], None)):
        arguments = (*grads, *inputs, settings[0], *kept, *settings[1:])
        torch.library.opcheck(operators.attention_pool_sequence_backward.default, arguments)


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_the_window_operators_pass_opcheck(ragged, device):
    problem = make_windows(torch.float32, device, n=2, size=6, n_memory=2, width=4, d_k=3, dropout=ragged)
    exists = torch.tensor([[False, True, True, True, True, True]], device=device) if ragged else None
    inputs = [value.requires_grad_() for value in problem.inputs.values()]
    settings = exists, problem.settings.get("dropout_mask"), True, "blocked"
    operators = torch.ops.smt_kernels
    torch.library.opcheck(operators.attention_pool.default, (*inputs, *settings))
    inputs = [value.detach() for value in inputs]
    _, *kept = operators.attention_pool(*inputs, *settings)
    for grads in (problem.grads, (problem.grads[0], None)):
        arguments = (*grads, *inputs, *settings[:2], *kept, *settings[2:])
        torch.library.opcheck(operators.attention_pool_backward.default, arguments)


@pytest.mark.parametrize("make", [make_windows, lambda *a: make_sequence(Sequence(), *a)], ids=["windows", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_without_graph_breaks(backend, make, device):
    problem = make(torch.float32, device)
    if "n_writes" in problem.settings:
        problem.settings["n_writes"] = 3
        problem.grads = tuple(grad[:, :3] for grad in problem.grads)

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        pooled, weights = problem.function(**inputs, **problem.settings, backend=backend)
        return pooled.sin(), weights

    def results(function) -> list[Tensor]:
        inputs = {name: value.detach().clone().requires_grad_() for name, value in problem.inputs.items()}
        outputs = function(inputs)
        return [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), problem.grads)]

    torch._dynamo.reset()
    compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, results(call), strict=True):
        assert torch.equal(actual, expected)


def test_the_choice_of_backend_is_remembered():
    for problem in (make_windows(torch.float32, "cpu"), make_sequence(Sequence(), torch.float32, "cpu")):
        problem.results("reference")
        assert last_choice(problem.function.__name__).reason == "asked for by the backend argument"
        problem.function(**problem.inputs, **problem.settings)
        assert last_choice(problem.function.__name__).backend == "blocked"


NONE = torch.zeros(2, dtype=torch.int32)
BAD_WINDOWS = {
    "windows is no tensor": ({"windows": None}, TypeError, "windows must be a tensor, got NoneType"),
    "windows has two dimensions": ({"windows": torch.zeros(6, 4)}, ValueError, "windows must have shape (N, W, d), got (6, 4)"),
    "windows is empty": ({"windows": torch.zeros(2, 0, 4)}, ValueError, "windows must not be empty in W"),
    "windows is of integers": ({"windows": torch.zeros(2, 6, 4).int()}, TypeError, "windows must be a floating-point tensor"),
    "w_q has another width": ({"w_q": torch.zeros(3, 5)}, ValueError, "w_q must have shape (d_k, d=4), got (3, 5)"),
    "w_k has another d_k": ({"w_k": torch.zeros(2, 4)}, ValueError, "w_k must have shape (d_k=3, d=4), got (2, 4)"),
    "w_q has another dtype": ({"w_q": torch.zeros(3, 4).half()}, TypeError, "w_q must have the dtype of windows"),
    "w_k is on another device": ({"w_k": torch.zeros(3, 4, device="meta")}, ValueError, "w_k must be on the device of"),
    "n_memory is no int": ({"n_memory": 2.0}, TypeError, "n_memory must be an int, got 2.0"),
    "n_memory is too large": ({"n_memory": 7}, ValueError, "n_memory must lie in 0..W = 0..6, got 7"),
    "n_memory is negative": ({"n_memory": -1}, ValueError, "n_memory must lie in 0..W = 0..6, got -1"),
    "counts are of another dtype": ({"valid_memory": torch.tensor([0, 2])}, TypeError, "valid_memory must be int32"),
    "counts are of another length": ({"valid_tokens": torch.ones(3).int()}, ValueError, "valid_tokens must have shape (N=2)"),
    "counts are too large": ({"valid_memory": torch.tensor([0, 3]).int()}, ValueError, "must lie in 0..2, got [0, 3]"),
    "a window is empty": ({"valid_memory": NONE, "valid_tokens": torch.tensor([4, 0]).int()}, ValueError, "in windows [1]"),
    "a window has neither memory nor tokens": (
        {"n_memory": 0, "valid_memory": None, "valid_tokens": NONE}, ValueError, "at least 1 in every window, got 0 in",
    ),
    "dropout_mask has another shape": ({"dropout_mask": torch.ones(2, 5)}, ValueError, "must have shape (N=2, W=6)"),
    "dropout_mask is boolean": ({"dropout_mask": torch.ones(2, 6).bool()}, TypeError, "must have the dtype of windows"),
    "the backend has no kernel": ({"backend": "triton"}, ValueError, "attention_pool has no Triton kernel yet"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_WINDOWS)
def test_bad_arguments_for_windows_are_named(bad):
    changes, error, message = BAD_WINDOWS[bad]
    counts = torch.tensor([0, 2], dtype=torch.int32)
    good = {"windows": torch.ones(2, 6, 4), "w_q": torch.ones(3, 4), "w_k": torch.ones(3, 4), "n_memory": 2}
    good |= {"valid_memory": counts, "valid_tokens": counts + 1, "dropout_mask": torch.ones(2, 6)}
    with pytest.raises(error, match=re.escape(message)):
        attention_pool(**good | changes)
    attention_pool(**good)


BAD_SEQUENCES = {
    "tokens is no tensor": ({"tokens": [[1.0]]}, TypeError, "tokens must be a tensor, got list"),
    "tokens is empty": ({"tokens": torch.zeros(2, 0, 4)}, ValueError, "tokens must not be empty in T"),
    "tokens is of integers": ({"tokens": torch.zeros(2, 20, 4).long()}, TypeError, "tokens must be a floating-point tensor"),
    "slots have another width": ({"slots": torch.zeros(2, 3, 5)}, ValueError, "must have shape (B=2, K, d=4), got"),
    "slots have another dtype": ({"slots": torch.zeros(2, 3, 4).half()}, TypeError, "slots must have the dtype of tokens"),
    "w_q is a vector": ({"w_q": torch.zeros(4)}, ValueError, "w_q must have shape (d_k, d=4), got (4,)"),
    "w_k has another dtype": ({"w_k": torch.zeros(3, 4).double()}, TypeError, "w_k must have the dtype of tokens"),
    "window is a number": ({"window": 50}, TypeError, "window must be a WindowSpec, got int"),
    "window never writes": ({"window": WindowSpec(3, 7, None)}, ValueError, "window must have a stride"),
    "first_write is negative": ({"first_write": -1}, ValueError, "first_write must be at least 0, got -1"),
    "n_writes is zero": ({"n_writes": 0}, ValueError, "n_writes must be at least 1, got 0"),
    "n_writes is no int": ({"n_writes": True}, TypeError, "n_writes must be an int, got True"),
    "write_group is zero": ({"write_group": 0}, ValueError, "write_group must be at least 1, got 0"),
    "first_step is no int": ({"first_step": 0.5}, TypeError, "first_step must be an int, got 0.5"),
    "first_slot is no int": ({"first_slot": None}, TypeError, "first_slot must be an int, got None"),
    "tokens end before the last write": ({"n_writes": 5}, ValueError, "tokens must hold the steps 4..20 of"),
    "tokens start after the first write": ({"first_step": 5}, ValueError, "must hold the steps 4..16 of the first to"),
    "dropout_mask has another shape": ({"dropout_mask": torch.ones(2, 4, 7)}, ValueError, "(B=2, n_writes=4, W=10)"),
    "the backend has no kernel": ({"backend": "triton"}, ValueError, "attention_pool_sequence has no Triton kernel yet"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SEQUENCES)
def test_bad_arguments_for_sequences_are_named(bad):
    changes, error, message = BAD_SEQUENCES[bad]
    good = {"tokens": torch.ones(2, 20, 4), "slots": torch.ones(2, 3, 4), "w_q": torch.ones(3, 4), "w_k": torch.ones(3, 4)}
    good |= {"window": SMALL, "first_write": 0, "n_writes": 4}
    with pytest.raises(error, match=re.escape(message)):
        attention_pool_sequence(**good | changes)
    attention_pool_sequence(**good)
