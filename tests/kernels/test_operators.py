"""Every operation is a citizen of PyTorch: its operators pass opcheck and compile, and eager calls do without them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from smt_kernels import (
    MemoryWeights,
    WindowSpec,
    attention_pool,
    attention_pool_sequence,
    linear_cross_entropy,
    stream_attention,
    stream_attention_decode,
    stride_memory,
    stride_write,
    window_attention,
)

TRITON = pytest.param("triton", marks=pytest.mark.triton)
FAST_BACKENDS = ["blocked", TRITON]


@dataclass
class Call:
    """A small call of a public function: tensors that gradients are taken of, and its other arguments."""

    function: Callable[..., Any]
    inputs: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        outputs = self.function(**inputs, **self.settings, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @property
    def differentiable(self) -> bool:
        return self.function is not stream_attention_decode

    @property
    def package(self) -> str:
        return self.function.__module__

    def leaves(self) -> dict[str, Tensor]:
        return {name: x.detach().clone().requires_grad_(self.differentiable) for name, x in self.inputs.items()}

    def results(self, function: Callable[..., tuple[Tensor, ...]], backend: str) -> list[Tensor]:
        """Outputs of ``function``, which is this call or does the same, and all gradients."""
        inputs = self.leaves()
        outputs = function(inputs, backend)
        if not self.differentiable:
            return [*outputs]
        total = sum((out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum() for out in outputs)
        return [*(out.detach() for out in outputs), *torch.autograd.grad(total, list(inputs.values()))]


def attention(device: str, *, n_queries: int = 6, n_keys: int = 6, n_slots: int | None = None) -> dict[str, Tensor]:
    sizes = {"q": (n_queries, 2), "k": (n_keys, 1), "v": (n_keys, 1)}
    sizes |= {} if n_slots is None else {"memory_k": (n_slots, 1), "memory_v": (n_slots, 1)}
    return {name: torch.randn(2, length, heads, 4, device=device) for name, (length, heads) in sizes.items()}


def counts(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def whole_window(device: str) -> Call:
    return Call(window_attention, attention(device), {"n_memory": 2})


def tail_of_a_ragged_window(device: str) -> Call:
    settings = {"valid_memory": counts(device, 0, 2), "valid_tokens": counts(device, 4, 1), "tail": 4}
    return Call(window_attention, attention(device, n_queries=4), {"n_memory": 2, **settings})


def stream(device: str) -> Call:
    return Call(stream_attention, attention(device, n_keys=9, n_slots=2), {"window": WindowSpec(2, 6, 4), "first_step": 3})


def stream_without_memory(device: str) -> Call:
    return Call(stream_attention, attention(device), {"window": WindowSpec(0, 3, None)})


def decode(device: str) -> Call:
    inputs = attention(device, n_keys=5, n_slots=3)
    inputs["q"] = inputs["q"][:, 0]
    return Call(stream_attention_decode, inputs, {"n_tokens": counts(device, 3, 5), "n_slots": counts(device, 1, 0)})


def pool(device: str, *entries: str) -> dict[str, Tensor]:
    shapes = {"windows": (2, 6, 4), "tokens": (2, 20, 4), "slots": (2, 5, 4), "w_q": (3, 4), "w_k": (3, 4)}
    return {name: torch.rand(shapes[name], device=device) for name in (*entries, "w_q", "w_k")}


def windows(device: str) -> Call:
    return Call(attention_pool, pool(device, "windows"), {"n_memory": 2})


def ragged_windows(device: str) -> Call:
    settings = {"valid_memory": counts(device, 0, 2), "dropout_mask": torch.rand(2, 6, device=device)}
    return Call(attention_pool, pool(device, "windows"), {"n_memory": 2, "normalise": False, **settings})


def sequence(device: str) -> Call:
    settings = {"window": WindowSpec(3, 7, 4), "first_write": 0, "n_writes": 3, "write_group": 2}
    mask = torch.rand(2, 3, 10, device=device)
    return Call(attention_pool_sequence, pool(device, "tokens", "slots"), settings | {"dropout_mask": mask})


def sequence_of_tokens(device: str) -> Call:
    settings = {"window": WindowSpec(3, 7, 4), "first_write": 0, "n_writes": 3, "slots": None}
    return Call(attention_pool_sequence, pool(device, "tokens"), settings)


def writes(device: str, n_writes: int, gate: Tensor | None) -> Call:
    shapes = {"x": (2, n_writes, 5), "z": (2, n_writes, 5), "conv_state": (2, 5, 3), "ssm_state": (2, 5, 4)}
    shapes |= {"conv_weight": (5, 4), "conv_bias": (5,), "x_proj_weight": (11, 5), "dt_proj_weight": (5, 3)}
    shapes |= {"dt_proj_bias": (5,), "a": (5, 4), "d": (5,)}
    inputs = {name: torch.rand(shape, device=device) for name, shape in shapes.items()}
    inputs["a"].neg_()
    return Call(stride_write, inputs, {"gate": gate})


def single_write(device: str) -> Call:
    return writes(device, 1, None)


def gated_writes(device: str) -> Call:
    return writes(device, 3, torch.tensor([[True, False, True], [False, False, True]], device=device))


def loss(device: str) -> Call:
    inputs = {"hidden": torch.rand(6, 4, device=device), "weight": torch.rand(9, 4, device=device)}
    return Call(linear_cross_entropy, inputs, {"targets": torch.tensor([0, 8, -100, 3, 3, 5], device=device)})


def memory(device: str, n_slots: int | None, **settings: Any) -> Call:
    shapes = {"tokens": (2, 15, 4), "conv_state": (1, 2, 5, 2), "ssm_state": (1, 2, 5, 4), "w_q": (3, 4), "w_k": (3, 4)}
    shapes |= {"norm": (1, 4), "in_proj": (1, 10, 4), "conv_weight": (1, 5, 3), "conv_bias": (1, 5), "x_proj": (1, 11, 5)}
    shapes |= {"dt_proj": (1, 5, 3), "dt_bias": (1, 5), "a": (1, 5, 4), "d": (1, 5), "out_proj": (1, 4, 5), "norm_f": (4,)}
    inputs = {name: torch.rand(shape, device=device) for name, shape in shapes.items()}
    inputs["a"].neg_()
    if n_slots is not None:
        inputs["slots"] = torch.rand(2, n_slots, 4, device=device)

    def call(tokens, conv_state, ssm_state, slots=None, **rest):
        named = {name: rest.pop(name) for name in MemoryWeights._fields}
        return tuple(stride_memory(tokens, slots, conv_state, ssm_state, MemoryWeights(**named), **rest))

    call.__module__ = stride_memory.__module__
    return Call(call, inputs, {"window": WindowSpec(2, 5, 4), "n_writes": 3, **settings})


def memory_of_slots(device: str) -> Call:
    gate = torch.tensor([[True, True, False], [True, True, True]], device=device)
    return memory(
        device, 1, first_write=1, first_step=2, write_group=2, gate=gate, dropout_mask=torch.rand(2, 3, 7, device=device)
    )


def memory_of_tokens(device: str) -> Call:
    return memory(device, None, first_write=0)


DIFFERENTIABLE = [whole_window, tail_of_a_ragged_window, stream, stream_without_memory, windows, ragged_windows]
DIFFERENTIABLE += [sequence, sequence_of_tokens, single_write, gated_writes, memory_of_slots, memory_of_tokens, loss]
EVERY_CALL = [*DIFFERENTIABLE, decode]
# One of each operation that is registered.
OPERATIONS = [whole_window, stream, sequence, gated_writes, memory_of_slots, loss]


class Seen(TorchDispatchMode):
    """The operators of this package that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "smt_kernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def copied(arguments: tuple[Any, ...], *, differentiable: bool) -> tuple[Any, ...]:
    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(differentiable and x.requires_grad) if isinstance(x, Tensor) else x

    return tuple(map(copy, arguments))


# What an implementation can break; gradients and tracing are the operator's own, whose arguments name the implementation.
OF_AN_IMPLEMENTATION = ("test_schema", "test_faketensor")
EVERYTHING = (*OF_AN_IMPLEMENTATION, "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("make", DIFFERENTIABLE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_operators_pass_opcheck(backend, make, device):
    checks = EVERYTHING if backend == "blocked" else OF_AN_IMPLEMENTATION
    call = make(device)
    inputs = call.leaves()
    with Seen() as seen:
        outputs = call(inputs, backend)
        # Gradients of all outputs, and of the first alone.
        for used in [outputs, outputs[:1]] if backend == "blocked" and len(outputs) > 1 else [outputs]:
            grads = [torch.rand_like(out) for out in used]
            torch.autograd.grad(used, list(inputs.values()), grads, allow_unused=True, retain_graph=True)
    (forward, arguments), *backward = seen.calls
    torch.library.opcheck(forward, copied(arguments, differentiable=True), test_utils=checks)
    assert backward
    for function, arguments in backward:
        torch.library.opcheck(function, copied(arguments, differentiable=False), test_utils=checks)


@pytest.mark.triton
def test_the_operator_without_a_backward_passes_opcheck(device):
    call = decode(device)
    with Seen() as seen:
        call(call.inputs, "triton")
    [(function, arguments)] = seen.calls
    torch.library.opcheck(function, arguments)


# Every call on one backend; triton differs in what the compiler does not see, and the reference is plain PyTorch, of which only
# tracing can fail.
@pytest.mark.parametrize(
    ("backend", "make"),
    [
        *(("blocked", make) for make in EVERY_CALL),
        *(("reference", make) for make in OPERATIONS),
        *(pytest.param("triton", make, marks=pytest.mark.triton) for make in [stream, decode]),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_it_compiles_without_graph_breaks(backend, make, device):
    call = make(device)

    def around(inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        first, *others = call({name: x * 1.0 for name, x in inputs.items()}, backend)
        return first.sin(), *others

    torch._dynamo.reset()
    compiler = "eager" if backend == "reference" else "aot_eager"
    compiled = call.results(torch.compile(around, fullgraph=True, backend=compiler), backend)
    for actual, expected in zip(compiled, call.results(around, backend), strict=True):
        torch.testing.assert_close(actual, expected) if make is decode else None
        assert make is decode or torch.equal(actual, expected)


@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_it_compiles_without_graph_breaks_for_sizes_that_vary_beside_weights_whose_sizes_do_not(make):
    call = make("cpu")
    weights = {name: Parameter(x) for name, x in call.inputs.items() if name.startswith(("w_", "conv_", "x_", "dt_", "norm"))}
    for module_input in ("conv_state", "x"):
        weights.pop(module_input, None)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for actual, expected in zip(compiled(call.inputs | weights, "blocked"), call(call.inputs, "blocked"), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_it_is_traced_with_sizes_that_vary(make):
    call = make("cpu")
    first, *others = call.inputs

    def out(value: Tensor) -> Tensor:
        return call({first: value} | {name: call.inputs[name] for name in others}, "blocked")[0]

    traced = make_fx(out, tracing_mode="symbolic", _allow_non_fake_inputs=True)(call.inputs[first])
    assert torch.equal(traced(call.inputs[first]), out(call.inputs[first]))


@pytest.mark.parametrize("make", [*OPERATIONS, pytest.param(decode, marks=pytest.mark.triton)], ids=lambda make: make.__name__)
def test_eager_calls_compute_the_same_without_the_operator(make, device, monkeypatch):
    call, backend = make(device), "triton" if make is decode else "blocked"
    with Seen() as seen:
        expected = call.results(call, backend)
    assert seen.calls

    def refuse(*arguments):
        raise AssertionError("the operator was called")

    monkeypatch.setattr(importlib.import_module(call.package)._run, "_operator", refuse)
    for actual, wanted in zip(call.results(call, backend), expected, strict=True):
        assert torch.equal(actual, wanted)
    with torch.no_grad():
        assert torch.equal(call(call.inputs, backend)[0], expected[0])


@pytest.mark.parametrize("make", EVERY_CALL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_autocast_changes_no_operation(backend, make):
    call = make("cpu")

    def under_autocast(inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return call(inputs, backend)

    results = zip(call.results(under_autocast, backend), call.results(call, backend), strict=True)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in results)


@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_fake_tensors_never_reach_the_implementation(make, monkeypatch):
    call = make("cpu")
    blocked = importlib.import_module(f"{call.package}.blocked")
    shapes = [out.shape for out in call(call.inputs, "blocked")]
    monkeypatch.setattr(blocked, "forward", None)
    with FakeTensorMode() as mode:
        fake = Call(call.function, {n: mode.from_tensor(x) for n, x in call.inputs.items()}, dict(call.settings))
        fake.settings |= {n: mode.from_tensor(x) for n, x in call.settings.items() if isinstance(x, Tensor)}
        assert [out.shape for out in fake(fake.inputs, "blocked")] == shapes
    assert [out.shape for out in fake(fake.inputs, "blocked")] == shapes  # outside the mode, too


@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_compiled_code_holds_the_operator(make):
    graphs, call = [], make("cpu")

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend=keep)(call.inputs, "blocked")
    assert f"smt_kernels.{call.package.rpartition('.')[2]}" in graphs[0]


@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_torch_func_finds_the_gradient(make):
    call = make("cpu")
    first, *others = call.inputs

    def loss(value: Tensor) -> Tensor:
        inputs = {first: value} | {name: call.inputs[name] for name in others}
        return call(inputs, "blocked")[0].sin().sum()

    value = call.inputs[first].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(value), value)
    assert torch.equal(torch.func.grad(loss)(call.inputs[first]), expected)


@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_torch_func_maps_over_the_gradient(make):
    call = make("cpu")
    first, *others = call.inputs
    values = torch.stack([call.inputs[first], 2 * call.inputs[first]])

    def loss(value: Tensor) -> Tensor:
        inputs = {first: value} | {name: call.inputs[name] for name in others}
        return call(inputs, "blocked")[0].sin().sum()

    gradient = torch.func.grad(loss)
    expected = torch.stack([gradient(value) for value in values])
    torch.testing.assert_close(torch.vmap(gradient)(values), expected)
    torch.testing.assert_close(torch.func.grad(lambda values: torch.vmap(loss)(values).sum())(values), expected)
    torch.testing.assert_close(torch.vmap(loss)(values), torch.stack([loss(value) for value in values]))


@pytest.mark.parametrize("backend", ["blocked", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("make", [stream, sequence], ids=lambda make: make.__name__)
def test_torch_func_keeps_a_function_of_gradients_and_autograd_takes_batches_of_them(make, backend, device):
    call = make(device)
    first, *others = call.inputs

    def out(value: Tensor) -> Tensor:
        return call({first: value} | {name: call.inputs[name] for name in others}, backend)[0]

    value = call.inputs[first].clone().requires_grad_()
    result = out(value)
    grads = torch.randn(2, *result.shape, dtype=result.dtype, device=device)
    expected = [torch.autograd.grad(result, value, grad, retain_graph=True)[0] for grad in grads]
    _, pull_back = torch.func.vjp(out, call.inputs[first])
    torch.testing.assert_close(pull_back(grads[0])[0], expected[0])
    (batched,) = torch.autograd.grad(result, value, grads, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of PyTorch's own jvp
@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_forward_mode_is_refused_not_answered_with_zeros(make):
    call = make("cpu")
    first, *others = call.inputs

    def out(value: Tensor) -> Tensor:
        return call({first: value} | {name: call.inputs[name] for name in others}, "blocked")[0]

    tangent = torch.ones_like(call.inputs[first])
    with pytest.raises(NotImplementedError, match="has no derivatives in forward mode"):
        torch.func.jvp(out, (call.inputs[first],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no derivatives in forward mode"):
        out(forward_ad.make_dual(call.inputs[first], tangent))


@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
def test_second_derivatives_are_refused_not_answered_with_zeros(make):
    call = make("cpu")
    first, *others = call.inputs

    def loss(value: Tensor, backend: str = "blocked") -> Tensor:
        return call({first: value} | {name: call.inputs[name] for name in others}, backend)[0].sin().sum()

    def penalty(value: Tensor, backend: str = "blocked") -> Tensor:
        return torch.func.grad(lambda value: loss(value, backend))(value).square().sum()

    value = call.inputs[first].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(value), value)
    (grad,) = torch.autograd.grad(loss(value), value, create_graph=True)
    assert torch.equal(grad, expected)
    torch.testing.assert_close(torch.func.grad(loss)(value.detach()), expected)
    refusal = pytest.raises(NotImplementedError, match="has no second derivatives; use backend='reference'")
    with refusal:
        grad.square().sum().backward()
    with refusal:
        torch.func.grad(penalty)(value.detach())
    with refusal:
        torch.vmap(torch.func.grad(penalty))(value.detach()[None])
    assert torch.func.grad(lambda value: penalty(value, "reference"))(value.detach()).abs().sum() > 0


@pytest.mark.parametrize("make", EVERY_CALL, ids=lambda make: make.__name__)
def test_layouts_that_it_does_not_take_are_refused_by_name(make):
    call = make("cpu")
    for name, tensor in call.inputs.items():
        with pytest.raises(TypeError, match=f"{name} must be a strided tensor, got torch.sparse_coo"):
            call(call.inputs | {name: tensor.to_sparse()}, "blocked")
        with pytest.raises(TypeError, match=f"{name} must be a strided tensor, got a nested one"):
            call(call.inputs | {name: torch.nested.as_nested_tensor([tensor[0], tensor[0]])}, "blocked")


@pytest.mark.parametrize("make", [whole_window, stream, decode], ids=lambda make: make.__name__)
def test_a_scale_is_a_number(make):
    call = make("cpu")
    for scale in (Parameter(torch.tensor(0.3)), "2", True):
        with pytest.raises(TypeError, match=f"scale must be a number, got {type(scale).__name__}"):
            replace(call, settings=call.settings | {"scale": scale})(call.inputs, "blocked")
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        replace(call, settings=call.settings | {"scale": float("nan")})(call.inputs, "blocked")


@pytest.mark.parametrize("make", [whole_window, stream, decode], ids=lambda make: make.__name__)
@pytest.mark.parametrize("backend", ["reference", "blocked", pytest.param("triton", marks=pytest.mark.triton)])
def test_results_can_be_viewed_as_one_vector_for_all_heads(backend, make, device):
    call = make(device)
    (out,) = call(call.inputs, backend)
    assert out.view(*out.shape[:-2], -1).shape[-1] == 8
