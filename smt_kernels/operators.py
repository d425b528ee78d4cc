"""One registration for every operation: its operators, their fakes and autograd, and a direct call where nobody looks at them.

A custom operator is what ``torch.compile``, ``opcheck`` and dispatch modes see of an operation. Its schema and dispatch cost
about 0.1 ms per call forward and backward: as much as dozens of the small operations that a call on a few rows is made of. So
elsewhere an operation is called straight: as an autograd function, or as itself where no gradient is required.

``register(_empty, kept=2, gradients=3)`` in ``window_attention`` for example makes of ``_empty``'s annotations

    window_attention(Tensor q, Tensor k, Tensor v, Tensor? valid_memory, Tensor? valid_tokens, SymInt n_memory, float scale,
                     str backend) -> (Tensor, Tensor)
    window_attention_backward(Tensor grad_0, Tensor result_0, Tensor result_1, the same arguments) -> (Tensor, Tensor, Tensor)

where the results are the output and the log-sum-exp, both of which are kept, and the gradients are of q, k and v.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from smt_kernels.checks import unit_stride

# The module of an operation's folder that holds ``forward`` and ``backward`` of a backend.
_MODULES = {"blocked": "blocked", "triton": "kernels"}
_SCHEMA = {Tensor: "Tensor", int: "SymInt", float: "float", bool: "bool"}
_SCHEMA |= {Tensor | None: "Tensor?", int | None: "SymInt?"}


def register(
    empty: Callable[..., Any],
    *,
    outputs: int = 1,
    kept: int = 0,
    gradients: int = 0,
    empty_gradients: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the operation that ``empty`` describes; returns the function that runs it, ``run(*arguments, backend=backend)``.

    The operation has the name of the package that defines ``empty``, whose modules ``blocked`` and ``kernels`` hold

        forward(*arguments) -> results
        backward(*gradients of outputs, *what is kept, *arguments) -> gradients of the first arguments

    They compute in the dtypes of their arguments, under autocast too, and return nothing that shares memory with these.

    Args:
        empty: takes the arguments and the backend and returns the results, uninitialised: what fake tensors compute. Its
            annotations make the schema: tensors, numbers, and NamedTuples and dataclasses of them. The first leaf is a tensor.
        outputs: how many of the results, the first ones, gradients go through.
        kept: how many of the results, the last ones, are saved for ``backward``.
        gradients: how many of the arguments' tensors, the first ones, have gradients; 0: there is no ``backward``.
        empty_gradients: takes the arguments and the backend and returns what ``backward`` does, uninitialised; None: it
            returns all gradients, each with the shape and the dtype of its tensor.
    """
    return _Operation(empty, outputs, kept, gradients, empty_gradients)


def unaffected_by_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose first argument is a tensor, computing in the dtypes of its arguments.

    An operation says itself what it accumulates in; autocast would lower the products that it is made of.
    """

    @functools.wraps(function)
    def run(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        return _without_autocast(tensor.device.type, function, tensor, *arguments, **settings)

    return run


def _without_autocast(device: str, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    if device == "meta" or not torch.is_autocast_enabled(device):  # which does not know the former
        return function(*arguments, **settings)
    with torch.autocast(device, enabled=False):
        return function(*arguments, **settings)


class _Operation:
    """Both ways to run an operation. *Leaves* are its arguments or results as operators take them: tensors and numbers only."""

    def __init__(
        self,
        empty: Callable[..., Any],
        outputs: int,
        kept: int,
        gradients: int,
        empty_gradients: Callable[..., Any] | None,
    ) -> None:
        self._package, self._empty, self._outputs, self._gradients = empty.__module__, empty, outputs, gradients
        self._empty_gradients = empty_gradients
        hints = get_type_hints(empty)
        returned = hints.pop("return")
        hints.pop("backend")
        self._arguments = _Form(hints)
        self._results = _Form({f"result_{i}": kind for i, kind in enumerate(get_args(returned) or [returned])})
        self._kept = _Form(dict(list(self._results.kinds.items())[len(self._results.kinds) - kept :]))
        self._is_tensor = [kind in (Tensor, Tensor | None) for kind in self._arguments.leaves.values()]
        self._name = name = self._package.rpartition(".")[2]
        leaves = [f"{_SCHEMA[kind]} {leaf}" for leaf, kind in self._arguments.leaves.items()] + ["str backend"]
        self._operator = _operator(name, self._forward, leaves, len(self._results.leaves))
        self._operator.register_fake(self._fake)
        self._operator.register_vmap(_one_by_one(self._operator))
        self._direct = None
        if gradients:
            grads = [f"Tensor{'?' if i else ''} grad_{i}" for i in range(outputs)]
            of_kept = [f"Tensor {leaf}" for leaf in self._kept.leaves]
            self._backward_operator = _operator(f"{name}_backward", self._backward, grads + of_kept + leaves, gradients)
            self._backward_operator.register_fake(self._fake_backward)
            self._backward_operator.register_vmap(_one_by_one(self._backward_operator))
            self._operator.register_autograd(self._formula(self._backward_operator), setup_context=self._setup_context)
            self._backward_operator.register_autograd(self._refuse)
            backward = self._formula(self._backward_straight)
            self._direct = _function(name, forward=self._forward_straight, backward=backward)
            self._transformed = _function_of_transforms(name, self._forward, self._setup_context, backward)
            self._backward_transformed = _function_of_transforms(
                f"{name}_backward", self._backward, lambda ctx, inputs, output: None, self._refuse
            )

    def __call__(self, *arguments: Any, backend: str) -> Any:
        leaves = self._arguments.flat(arguments)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, leaves)):
            raise NotImplementedError(f"{self._name} has no derivatives in forward mode; use backend='reference'")
        if _observed(leaves):
            results = self._operator(*leaves, backend)
        elif is_transformed():
            # These need a context that is set up apart, for which every call inspects the signature of ``forward``.
            results = self._operator(*leaves, backend) if self._direct is None else self._transformed.apply(*leaves, backend)
        elif self._direct is not None and torch.is_grad_enabled() and any(map(_requires_gradient, leaves)):
            results = self._direct.apply(*leaves, backend)
        else:
            return _compute(self._package, backend, "forward", leaves[0], arguments)
        return results if isinstance(results, Tensor) else tuple(self._results.built(results))

    def _forward(self, *leaves: Any) -> Any:
        *leaves, backend = leaves
        results = _compute(self._package, backend, "forward", leaves[0], self._arguments.built(leaves))
        return results if isinstance(results, Tensor) else tuple(self._results.flat(results))

    def _forward_straight(self, ctx: Any, *leaves: Any) -> Any:
        results = self._forward(*leaves)
        self._setup_context(ctx, leaves, (results,) if isinstance(results, Tensor) else results)
        return results

    def _backward(self, *leaves: Any) -> tuple[Tensor, ...]:
        *leaves, backend = leaves
        grads, of_kept, leaves = _split(leaves, self._outputs, len(self._kept.leaves))
        grads = (None if grad is None else unit_stride(grad)[0] for grad in grads)
        arguments = *grads, *self._kept.built(of_kept), *self._arguments.built(leaves)
        return tuple(_compute(self._package, backend, "backward", leaves[0], arguments))

    def _backward_straight(self, *leaves: Any) -> tuple[Tensor, ...]:
        if is_transformed():
            return self._backward_transformed.apply(*leaves)
        # Where gradients of gradients are recorded, they are refused; and what ``torch.func`` has wrapped, operators unwrap.
        dispatched = torch.is_grad_enabled() or any(map(_is_wrapped, leaves))
        return (self._backward_operator if dispatched else self._backward)(*leaves)

    def _refuse(self, ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(f"{self._name} has no second derivatives; use backend='reference'")

    def _fake(self, *leaves: Any) -> Any:
        *leaves, backend = leaves
        results = self._empty(*self._arguments.built(leaves), backend)
        return results if isinstance(results, Tensor) else tuple(self._results.flat(results))

    def _fake_backward(self, *leaves: Any) -> tuple[Tensor, ...]:
        if self._empty_gradients is not None:
            *leaves, backend = leaves[self._outputs + len(self._kept.leaves) :]
            return self._empty_gradients(*self._arguments.built(leaves), backend)
        tensors = leaves[self._outputs + len(self._kept.leaves) :][: self._gradients]
        return tuple(tensors[0].new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[self._outputs :])
        *leaves, ctx.backend = inputs
        tensors = (leaf for leaf, is_tensor in zip(leaves, self._is_tensor, strict=True) if is_tensor)
        ctx.save_for_backward(*tensors, *output[len(output) - len(self._kept.leaves) :])
        ctx.numbers = [leaf for leaf, is_tensor in zip(leaves, self._is_tensor, strict=True) if not is_tensor]
        ctx.shape, ctx.dtype = output[0].shape, output[0].dtype

    def _formula(self, backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        """The gradients of all leaves, given those of the results and what ``_setup_context`` has saved."""

        def formula(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            tensors, of_kept = _split(ctx.saved_tensors, sum(self._is_tensor))
            of_tensors, of_numbers = iter(tensors), iter(ctx.numbers)
            leaves = [next(of_tensors if is_tensor else of_numbers) for is_tensor in self._is_tensor]
            first, *others = grads[: self._outputs]
            first = leaves[0].new_zeros(ctx.shape, dtype=ctx.dtype) if first is None else first
            found = backward(first, *others, *of_kept, *leaves, ctx.backend)
            found = [grad if needed else None for needed, grad in zip(ctx.needs_input_grad, found, strict=False)]
            return *found, *(None for _ in range(len(leaves) + 1 - len(found)))  # and none of the backend

        return formula


class _Form:
    """Values of several ``kinds``, and their leaves: a NamedTuple or a dataclass is its fields, everything else is itself."""

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        self.kinds = kinds
        self.leaves: dict[str, Any] = {}
        self._records: list[_Form | None] = []
        for name, kind in kinds.items():
            record = _Form(get_type_hints(kind)) if hasattr(kind, "_fields") or is_dataclass(kind) else None
            self.leaves |= {name: kind} if record is None else record.leaves
            self._records.append(record)

    def flat(self, values: Iterable[Any]) -> list[Any]:
        leaves = []
        for value, record in zip(values, self._records, strict=True):
            leaves += [value] if record is None else record.flat([getattr(value, field) for field in record.kinds])
        return leaves

    def built(self, leaves: Iterable[Any]) -> list[Any]:
        """The inverse of ``flat``."""
        leaves = iter(leaves)
        return [
            next(leaves) if record is None else kind(*record.built(leaves))
            for kind, record in zip(self.kinds.values(), self._records, strict=True)
        ]


def _operator(name: str, function: Callable[..., Any], leaves: list[str], n_results: int) -> Any:
    returned = ", ".join(["Tensor"] * n_results)
    schema = f"({', '.join(leaves)}) -> {returned if n_results == 1 else f'({returned})'}"
    return torch.library.custom_op(f"smt_kernels::{name}", function, mutates_args=(), schema=schema)


def _function(name: str, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
    return type(name, (torch.autograd.Function,), {key: staticmethod(do) for key, do in methods.items()})


def _function_of_transforms(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """For ``torch.func``, with a context that is set up apart."""
    rule = _one_by_one(lambda *leaves: function.apply(*leaves))
    function = _function(name, forward=forward, setup_context=setup_context, backward=backward, vmap=rule)
    return function


@functools.cache
def _module(package: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{package}.{_MODULES[backend]}")


def _compute(package: str, backend: str, direction: str, model: Tensor, arguments: Sequence[Any]) -> Any:
    """Run an implementation on the device of ``model``."""
    return _without_autocast(model.device.type, getattr(_module(package, backend), direction), *arguments)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, such as ``grad`` or ``vmap``, whose tensors have no values of their own."""
    return torch._C._are_functorch_transforms_active()


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of ``torch.vmap`` for an operator or a function: a call for each entry of the dimension that is mapped over."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *leaves: Any) -> tuple[Any, Any]:
        columns = [
            leaf.unbind(dim) if isinstance(leaf, Tensor) and dim is not None else [leaf] * info.batch_size
            for leaf, dim in zip(leaves, in_dims, strict=True)
        ]
        rows = [operator(*row) for row in zip(*columns, strict=True)]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        return tuple(map(torch.stack, zip(*rows, strict=True))), (0,) * len(rows[0])

    return rule


def _observed(leaves: Iterable[Any]) -> bool:
    """Whether somebody looks at operators: a compiler, a dispatch mode, or a tensor of a class of its own or without values."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(isinstance(leaf, Tensor) and (type(leaf) not in (Tensor, Parameter) or leaf.is_meta) for leaf in leaves)
    )


def _requires_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _is_wrapped(leaf: Any) -> bool:
    """Whether a tensor stands for others: of a transform that has ended (``torch.func.vjp``), or of batched gradients."""
    of_transforms = torch._C._functorch
    return isinstance(leaf, Tensor) and (
        of_transforms.is_functorch_wrapped_tensor(leaf) or of_transforms.is_legacy_batchedtensor(leaf)
    )


def _has_tangent(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None


def _split(values: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """``values`` cut into parts of the given sizes and the rest."""
    parts = []
    for size in sizes:
        parts.append(values[:size])
        values = values[size:]
    return [*parts, values]
