"""Problems for the tests of the memory's writes: configurations that cover every way to call it, inputs, and what may err."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from smt_kernels import MemoryWeights, WindowSpec, stride_memory
from smt_kernels.testing.budget import poisoned_memory

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]
BACKENDS = ["reference", *FAST_BACKENDS]
WINDOW = WindowSpec(3, 7, 4)
RESULTS = ("slots", "conv_state", "ssm_state", "pooling")


@dataclass(frozen=True)
class Case:
    """Sizes and settings of one problem."""

    name: str
    batch: int = 2
    writes: int = 5
    group: int = 2
    layers: int = 2
    first_write: int = 0
    slots: int | None = 0  # before the first write; None: tokens are pooled alone
    first_step: int = 0
    gate: bool = False
    dropout: bool = False
    normalise: bool = True
    width: int = 12
    inner: int = 24
    state: int = 4
    taps: int = 4
    rank: int = 3
    key: int = 5
    window: WindowSpec = WINDOW

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("first writes", writes=4, dropout=True),
    Case("later writes, ragged", writes=6, first_write=5, slots=4, first_step=11, gate=True, batch=3),
    Case("zero slots before the first", slots=3, first_step=-7, group=1, writes=3, layers=1, taps=2),
    Case("tokens alone", slots=None, writes=9, dropout=True, gate=True, normalise=False),
    Case("tokens alone, several chunks of the scan", slots=None, writes=35, batch=1, layers=2, window=WindowSpec(0, 2, 1)),
    Case("a later group of several chunks", writes=38, first_write=34, slots=2, first_step=32, group=36, batch=1, gate=True,
         layers=1, window=WindowSpec(3, 3, 1)),
    Case("one group that is not full, six layers", writes=3, group=8, layers=6, inner=17, rank=2, state=3),
]  # fmt: skip


@dataclass
class Problem:
    """Inputs of one call, and the gradients of its results."""

    case: Case
    tensors: dict[str, Tensor]  # those with gradients
    gate: Tensor | None
    dropout: Tensor | None
    grads: dict[str, Tensor]

    def call(self, tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        """The results of the public function on ``tensors``."""
        case = self.case
        dropout = None if self.dropout is None else self.dropout.to(tensors["tokens"].dtype)
        memory = stride_memory(
            tensors["tokens"],
            tensors.get("slots"),
            tensors["conv_state"],
            tensors["ssm_state"],
            MemoryWeights(*(tensors[name] for name in MemoryWeights._fields)),
            window=case.window,
            first_write=case.first_write,
            n_writes=case.writes,
            write_group=case.group,
            first_step=case.first_step,
            normalise=case.normalise,
            gate=self.gate,
            dropout_mask=dropout,
            backend=backend,
        )
        return memory._asdict()

    def results(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Results and gradients, with everything in ``dtype`` (None: as it is)."""
        tensors = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in self.tensors.items()}
        outputs = self.call(tensors, backend)
        grads = [self.grads[name].to(out.dtype) for name, out in outputs.items()]
        found = torch.autograd.grad(list(outputs.values()), list(tensors.values()), grads, materialize_grads=True)
        named = {name: out.detach() for name, out in outputs.items()}
        return named | {f"d_{name}": grad for name, grad in zip(tensors, found, strict=True)}


def make_problem(case: Case, dtype: torch.dtype, device: str, wide: tuple[str, ...] = ()) -> Problem:
    """Inputs in (-1, 1) but for a < 0, a dt of about 0.1 and weights that keep the scale; those in ``wide`` in float32."""
    length = case.window.write_step(case.first_write + case.writes - 1) + 1 - case.first_step
    layers, inner, width = case.layers, case.inner, case.width
    shapes = {
        "tokens": (case.batch, length, width),
        "slots": (case.batch, case.slots or 0, width),
        "conv_state": (layers, case.batch, inner, case.taps - 1),
        "ssm_state": (layers, case.batch, inner, case.state),
        "w_q": (case.key, width),
        "w_k": (case.key, width),
        "norm": (layers, width),
        "in_proj": (layers, 2 * inner, width),
        "conv_weight": (layers, inner, case.taps),
        "conv_bias": (layers, inner),
        "x_proj": (layers, case.rank + 2 * case.state, inner),
        "dt_proj": (layers, inner, case.rank),
        "dt_bias": (layers, inner),
        "a": (layers, inner, case.state),
        "d": (layers, inner),
        "out_proj": (layers, width, inner),
        "norm_f": (width,),
    }
    tensors = {name: 2 * torch.rand(shape, device=device) - 1 for name, shape in shapes.items()}
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "w_q", "w_k"):
        tensors[name] *= shapes[name][-1] ** -0.5
    for name in ("norm", "norm_f"):
        tensors[name] = 1 + tensors[name] / 2
    tensors["dt_bias"] -= 2
    tensors["a"] = -torch.exp(2 * tensors["a"])
    tensors = {name: value.to(torch.float32 if name in wide else dtype) for name, value in tensors.items()}
    if case.slots is None:
        del tensors["slots"]
    rows, size = (case.batch, case.writes), case.window.n_tokens + (0 if case.slots is None else case.window.n_memory)
    gate = None
    if case.gate:  # of each row the first writes happen, of the last one all
        counts = torch.linspace(1, case.writes, case.batch, device=device).round()
        counts = counts if case.batch > 1 else counts.new_full((1,), case.writes - 2)
        gate = torch.arange(case.writes, device=device) < counts[:, None]
    dropout = (torch.rand(*rows, size, device=device) < 0.8) / 0.8 if case.dropout else None
    grads = {
        "slots": 2 * torch.rand(*rows, width, device=device) - 1,
        "conv_state": 2 * torch.rand(shapes["conv_state"], device=device) - 1,
        "ssm_state": 2 * torch.rand(shapes["ssm_state"], device=device) - 1,
        "pooling": 2 * torch.rand(*rows, size, device=device) - 1,
    }
    if gate is not None:  # the slots of the other writes mean nothing
        grads["slots"] *= gate[..., None]
    return Problem(case, tensors, gate, dropout, grads)


def poisoned_results(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Those of a call in memory that holds NaN."""
    with poisoned_memory():
        return problem.results(backend)


def relative_errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Of all results, and of all gradients, as one vector in which each has length 1.

    Along a chain of writes a rounding grows or not as numbers happen to fall, and any single result may be right by luck.
    """
    errors = {}
    for kind, names in (("results", RESULTS), ("gradients", [name for name in exact if name not in RESULTS])):
        parts = [(results[name].double() - exact[name]).flatten() / exact[name].norm() for name in names if exact[name].numel()]
        errors[kind] = torch.cat(parts).norm().item()
    return errors
