"""Weights that fused operations multiply by, of layers that are therefore never called.

What a user has put in place of such a layer, or around it, must not be passed over. A parametrisation is in the weight. An
adapter (LoRA and its like), or a layer that keeps its weight in another format, is a linear map still, whose matrix is what it
makes of the unit vectors. What acts on activations, a hook or a dropout, cannot be honoured, and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import is_parametrized

from smt_kernels.checks import readable
from smt_kernels.operators import is_transformed

# Of the largest output, what a layer may be off that no matrix is: one in 8 bits rounds its inputs by 1 / 254 of the largest.
ROUNDED = 0.05


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is what it was built as: nothing would happen in a call but the product with its weight."""
    return (type(layer) is kind or (isinstance(layer, kind) and is_parametrized(layer))) and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether something runs when the module is called, beside or instead of its ``forward``."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__


def matrix_and_bias(linear: nn.Module, n_inputs: int, name: str) -> tuple[Tensor, Tensor | None]:
    """The matrix (out, in) and the bias (out,) that ``linear`` applies.

    Raises:
        ValueError: it does what no matrix and bias can do, as far as can be seen on a CPU; the message names it.
    """
    if is_plain(linear, nn.Linear):
        return linear.weight, linear.bias
    parameters = list(linear.parameters())
    if not parameters:
        raise ValueError(
            f"{name} is never called, a fused operation takes its weight: {type(linear).__name__} has no parameters"
        )
    for part in linear.modules():
        if is_hooked(part):
            raise ValueError(f"{name} is never called, a fused operation takes its weight: hooks and offloading have no effect")
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{name} is never called, a fused operation takes its weight: dropout has no effect, set it to 0")
    device = parameters[0].device
    # A weight that is kept in integers is multiplied in the default format.
    dtype = next((each.dtype for each in parameters if each.is_floating_point()), torch.get_default_dtype())
    with torch.autocast(device.type, enabled=False):
        of_zero = linear(torch.zeros(1, n_inputs, device=device, dtype=dtype))
        of_units = linear(torch.eye(n_inputs, device=device, dtype=dtype))
    matrix, bias = (of_units - of_zero).mT, of_zero[0]
    if readable(matrix) and not is_transformed():
        _check_linear(linear, matrix.detach(), bias.detach(), name)
    return matrix, bias


def matrix_of(linear: nn.Module, n_inputs: int, name: str) -> Tensor:
    """The matrix (out, in) that ``linear`` applies.

    Raises:
        ValueError: it does what no matrix can do, or has a bias; the message names it.
    """
    if is_plain(linear, nn.Linear) and linear.bias is None:
        return linear.weight
    biases = [key for key, each in linear.named_parameters() if key.split(".")[-1] == "bias" and each is not None]
    if biases:
        raise ValueError(f"{name} is never called, a fused operation takes its weight: {biases[0]} has no effect")
    return matrix_and_bias(linear, n_inputs, name)[0]


@torch.no_grad()
def _check_linear(linear: nn.Module, matrix: Tensor, bias: Tensor, name: str) -> None:
    """Raise ValueError where unit vectors do not tell what ``linear`` makes of others."""
    x = torch.linspace(-20, 30, 2 * matrix.shape[1], device=matrix.device, dtype=matrix.dtype).view(2, -1)
    with torch.autocast(matrix.device.type, enabled=False):
        given, told = linear(x), x @ matrix.mT + bias
    if (given - told).abs().max() > ROUNDED * told.abs().max():
        raise ValueError(f"{name} is never called, a fused operation takes its weight: {type(linear).__name__} is not linear")


def rows_of(embedding: nn.Module, n_rows: int) -> Tensor:
    """The matrix (n_rows, d) that ``embedding`` looks up: what stands in its place counts for the tied head, too."""
    if isinstance(embedding, nn.Embedding):
        return embedding.weight
    return embedding(torch.arange(n_rows, device=embedding.weight.device))


def parameters_of(layer: nn.Module, kind: type[nn.Module], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer in whose place nothing else can stand.

    Raises:
        ValueError: something does; the message names the layer.
    """
    if not is_plain(layer, kind):
        raise ValueError(f"{name} is never called, a fused operation takes its weight: adapters and hooks have no effect")
    return layer.weight, layer.bias
