"""Problems for the tests of attention pooling: windows and sequences, what they pool to by hand, and what a result may err."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from smt_kernels import WindowSpec, attention_pool, attention_pool_sequence
from smt_kernels.testing.budget import assert_within_budget, poisoned_memory

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]
BACKENDS = ["reference", *FAST_BACKENDS]
DOUBLE_BACKENDS = ["reference", "blocked"]  # those that take float64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = WindowSpec(3, 7, 4)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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

    def results(self, backend: str, dtype: torch.dtype | None = None, *, used: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
        """Results and gradients of the public function, with everything in ``dtype`` (None: as it is).

        ``used`` tells which of pooled and weights have a gradient.
        """
        inputs = {n: None if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for n, v in self.inputs.items()}
        outputs = self.function(**inputs, **self.other_arguments(dtype), backend=backend)
        given = {name: value for name, value in inputs.items() if value is not None}
        grads = [grad.to(out.dtype) for grad, out in zip(self.grads, outputs, strict=True)]
        used_outputs, used_grads = zip(*((outputs[i], grads[i]) for i in used), strict=True)
        found = torch.autograd.grad(used_outputs, list(given.values()), used_grads, materialize_grads=True)
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
    Sequence(WindowSpec(), 1, 50 + 7 * 16, 22, 64, 48, {"first_write": 24, "n_writes": 8, "write_group": 8, "first_step": 351}),
    Sequence(WindowSpec(), 1, 400, None, 64, 48, {"n_writes": 19}),
    Sequence(WindowSpec(), 1, 300, 20, 64, 48, {"n_writes": 18, "write_group": 4}),
]
WIDE_SEQUENCES[0].settings["first_slot"] = 2


def pool_by_hand(
    entries: list[list[float]], w_q: list[list[float]], w_k: list[list[float]], factors: list[float], normalise: bool
) -> tuple[list[float], list[float]]:
    """Pooling as ``docs/model.md`` defines it, over the entries that exist, one number at a time, keys and all."""
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
    """Per write, its window (B, W, d) cut out of the sequence (``docs/model.md``), and which entries exist; the rest is 0."""
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


def assert_problem_within_budget(problem: Problem, backend: str, *, used: tuple[int, ...] = (0, 1)) -> None:
    with poisoned_memory():
        actual = problem.results(backend, used=used)
    exact = functools.partial(problem.results, "reference", torch.float64, used=used)
    assert_within_budget(actual, exact, problem.results("reference", used=used))


def outputs_of(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: results[name] for name in ("pooled", "weights")}
