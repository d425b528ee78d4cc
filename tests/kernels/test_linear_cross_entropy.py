"""The loss through a linear head: every backend computes the definition, and only the gradients that are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from pairs import in_turn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smt_kernels import linear_cross_entropy
from smt_kernels.linear_cross_entropy import blocked
from smt_kernels.testing.budget import assert_within_budget, poisoned_memory

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]
BACKENDS = ["reference", *FAST_BACKENDS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Sizes of one problem, written N45-d12-V53: rows, width, classes; every how many-th row does not count."""

    rows: int
    width: int
    classes: int
    ignored: int = 4

    def __str__(self) -> str:
        return f"N{self.rows}-d{self.width}-V{self.classes}-i{self.ignored}"


# Several chunks (see ``small_chunks``), no padding, one row, one class, more classes than a block has, nothing ignored.
CASES = [Case(70, 12, 53), Case(7, 8, 64, 3), Case(1, 5, 130, 2), Case(9, 3, 1), Case(3, 4, 4200, 99)]


@pytest.fixture(autouse=True)
def small_chunks(request, monkeypatch):
    """Chunks of 64 rows, or of 7, the last one partial, of 53 classes."""
    monkeypatch.setattr(blocked, "CHUNK_ELEMENTS", {"cpu": 53 * 7, "cuda": 53 * 7})
    if request.node.get_closest_marker("triton"):
        from smt_kernels.linear_cross_entropy import kernels

        monkeypatch.setattr(kernels, "CHUNK_BYTES", 64 * 64 * 2)


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    targets = torch.randint(case.classes, (case.rows,), device=device)
    targets[1 :: case.ignored] = -100
    hidden, weight = torch.randn(case.rows, case.width, device=device), torch.randn(case.classes, case.width, device=device)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}


def results(inputs: dict[str, Tensor], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Loss and gradients of three times the loss, with everything in ``dtype`` (None: as it is)."""
    hidden, weight = (inputs[name].detach().to(dtype or inputs[name].dtype).requires_grad_() for name in ("hidden", "weight"))
    loss = linear_cross_entropy(hidden, weight, inputs["targets"], backend=backend)
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    return dict(zip(("loss", "d_hidden", "d_weight"), (loss.detach(), *grads), strict=True))


@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES, DTYPES))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_loss_and_gradients_err_at_most_twice_as_much_as_plain_pytorch(backend, case, dtype, device):
    inputs = make_inputs(case, dtype, device)
    with poisoned_memory():
        actual = results(inputs, backend)
    assert_within_budget(actual, results(inputs, "reference", torch.float64), results(inputs, "reference"))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_gradient_of_a_float32_weight_is_not_rounded_to_the_dtype_of_hidden(backend, device):
    inputs = make_inputs(CASES[0], torch.bfloat16, device)
    inputs["weight"] = inputs["weight"].float()
    actual = results(inputs, backend)
    assert actual["d_hidden"].dtype == torch.bfloat16 and actual["d_weight"].dtype == torch.float32
    assert_within_budget(actual, results(inputs, "reference", torch.float64), results(inputs, "reference"))
    assert (actual["d_weight"] != actual["d_weight"].bfloat16()).any(dim=1).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_small_probabilities_of_many_targets_are_not_lost_in_float16(backend, device, monkeypatch):
    """Of 256 targets and 4,096 classes p / count, which pushes classes down that are no target, has four bits in float16."""
    monkeypatch.undo()  # chunks as large as they are
    hidden, weight = torch.randn(256, 8, device=device).half(), 0.1 * torch.randn(4096, 8, device=device)
    targets = torch.randint(64, (256,), device=device)

    def pushed_down(hidden: Tensor, weight: Tensor, backend: str, scale: float) -> Tensor:
        weight = weight.detach().clone().requires_grad_()
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
        return torch.autograd.grad(loss * scale, weight)[0][64:] / scale

    exact = pushed_down(hidden.double(), weight.half().double(), "reference", 1.0)
    actual = pushed_down(hidden, weight, backend, 65536.0)
    undivided = pushed_down(hidden, weight, "reference", float(len(targets)))
    assert_within_budget({"weight": actual}, {"weight": exact}, {"weight": undivided})


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_loss_may_be_scaled_by_more_than_float16_holds(backend, device):
    hidden = torch.randn(1, 8, device=device).half().requires_grad_()
    weight = (1e-3 * torch.randn(5, 8, device=device)).half().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([3], device=device), backend=backend)
    scaled, plain = (torch.autograd.grad(factor * loss, hidden, retain_graph=True)[0] for factor in (2.0**17, 1.0))
    assert scaled.isfinite().all()
    torch.testing.assert_close(scaled, (plain.float() * 2**17).half(), rtol=0.01, atol=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_targets_that_count_loss_and_gradients_are_zero(backend, device):
    inputs = make_inputs(CASES[0], torch.float32, device)
    inputs["targets"].fill_(-100)
    assert not any(value.any() for value in results(inputs, backend).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_target_that_does_not_count_may_be_a_class(backend, device):
    inputs = make_inputs(CASES[0], torch.float64 if backend == "reference" else torch.float32, device)
    inputs["targets"].clamp_(min=0)
    loss = linear_cross_entropy(**inputs, ignore_index=0, backend=backend)
    logits = inputs["hidden"].double() @ inputs["weight"].double().T
    expected = torch.nn.functional.cross_entropy(logits, inputs["targets"], ignore_index=0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_have_any_strides_and_two_runs_give_the_same_bits(backend, device):
    inputs = make_inputs(CASES[0], torch.bfloat16, device)
    strided = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    first, second = results(inputs, backend), results(strided, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradients_pass_gradcheck(backend):
    inputs = make_inputs(Case(10, 3, 11), torch.float64, "cpu")
    hidden, weight = (inputs[name].requires_grad_() for name in ("hidden", "weight"))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, inputs["targets"], backend=backend), (hidden, weight)
    )


class Products(TorchDispatchMode):
    """The matrix products that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",), ("hidden", "weight")], ids=lambda wanted: "+".join(wanted))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_gradient_that_nobody_asks_for_is_neither_computed_nor_held(backend, wanted, device, monkeypatch):
    """Frozen embeddings have none, hidden states of a frozen decoder have none, and an evaluation has neither."""
    module, made = blocked, []
    if backend == "triton":
        from smt_kernels.linear_cross_entropy import kernels as module
    compute = module.loss_and_gradients

    def seen(*arguments):
        with Products() as products:
            made.append(compute(*arguments))
        assert products.count == n_chunks * (1 + len(wanted))
        return made[-1]

    monkeypatch.setattr(module, "loss_and_gradients", seen)
    inputs = make_inputs(CASES[0], torch.float32, device)
    n_chunks = 10 if backend == "blocked" else 2
    expected = results(inputs, "reference")
    tensors = [inputs[name].requires_grad_() for name in wanted]
    with torch.set_grad_enabled(bool(wanted)):
        loss = linear_cross_entropy(**inputs, backend=backend)
    [(_, _, of_hidden, of_weight)] = made
    assert (of_hidden.numel() > 0, of_weight.numel() > 0) == ("hidden" in wanted, "weight" in wanted)
    for name, grad in zip(wanted, torch.autograd.grad(3.0 * loss, tensors) if wanted else (), strict=True):
        torch.testing.assert_close(grad, expected[f"d_{name}"])
    assert loss.requires_grad == bool(wanted)


@pytest.mark.triton(launches=False)
def test_a_call_on_a_device_reads_nothing_back_and_holds_the_logits_of_one_chunk(monkeypatch):
    """On fake tensors, which cannot be read; the sizes are GPT-2's, for which the chunk of the module is meant."""
    monkeypatch.undo()
    from smt_kernels.linear_cross_entropy import kernels

    chunks = []
    monkeypatch.setattr(kernels, "softmax_step", lambda logits, *rest: chunks.append(logits.shape))
    with FakeTensorMode():
        hidden, weight = torch.empty(32768, 768, dtype=torch.float32), torch.empty(50257, 768)
        targets = torch.empty(32768, dtype=torch.int64)
        _, _, of_hidden, of_weight = kernels.forward(hidden, weight, targets, -100, True, True)
        assert of_hidden.shape == hidden.shape and of_weight.shape == weight.shape
    assert set(chunks) == {(2048, 50304)} and len(chunks) == 16
    assert kernels._rows_of_chunk(32768, 50304 * 2) == 4096 and kernels._rows_of_chunk(10, 128) == 64


def test_a_target_that_is_no_class_is_refused():
    inputs = make_inputs(CASES[0], torch.float32, "cpu")
    inputs["targets"][0] = 53
    with pytest.raises(IndexError, match="53"):
        linear_cross_entropy(**inputs)


@pytest.mark.triton
def test_a_target_that_is_no_class_makes_the_loss_of_the_kernel_nan(device):
    inputs = make_inputs(CASES[0], torch.float32, device)
    for unknown in (53, -1):  # 53 is a column of the padding
        inputs["targets"][0] = unknown
        assert linear_cross_entropy(**inputs, backend="triton").isnan()


BAD_ARGUMENTS = {
    "hidden has three dimensions": ({"hidden": torch.zeros(2, 3, 4)}, ValueError, "hidden must have shape (N, d), got"),
    "hidden is empty": ({"hidden": torch.zeros(0, 4)}, ValueError, "hidden must not be empty in N"),
    "weight has another width": ({"weight": torch.zeros(5, 3)}, ValueError, "weight must have shape (V, d=4), got (5, 3)"),
    "weight is of another dtype": (
        {"weight": torch.zeros(5, 4).half()}, TypeError, "weight must be torch.float32 for hidden of torch.float32, got",
    ),
    "targets are of another length": ({"targets": torch.zeros(2).long()}, ValueError, "targets must have shape (N=3)"),
    "targets are of another dtype": ({"targets": torch.zeros(3).int()}, TypeError, "targets must be int64, got torch.int32"),
    "ignore_index is no int": ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    "targets are elsewhere": ({"targets": torch.zeros(3, device="meta").long()}, ValueError, "targets must be on the device"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_named(changed, error, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3).long()}
    with pytest.raises(error, match=re.escape(message)):
        linear_cross_entropy(**arguments | changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_target_that_does_not_count_may_be_above_all_classes(backend, device):
    hidden, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (4, 10))
    targets = torch.tensor([3, 10, 1, 10], device=device)
    loss = linear_cross_entropy(hidden, weight, targets, ignore_index=10, backend=backend)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=10)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, expected))
    torch.testing.assert_close(found, wanted)
