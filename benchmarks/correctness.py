"""What must hold before a speed-up is printed: each implementation that is timed computes what the reference computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from attention_cases import AttentionSizes, flex_attention
from torch import Tensor
from training_cases import VARIANTS

from smt import SMTConfig, StrideMemoryTransformer
from smt_kernels import stream_attention, use_backend
from smt_kernels.testing.budget import assert_within_budget


class WrongResult(Exception):
    """An implementation that is timed does not compute what the reference computes."""


LENGTH = 200  # several times the window, so that both halves are full, partly empty and moving
HEADS = 12  # with few numbers the largest error of plain PyTorch, and so the budget, is a matter of luck
NAMES = ("grad_q", "grad_k", "grad_v", "grad_memory_k", "grad_memory_v")


def check_attention(sizes: AttentionSizes, implementation: str, *, backward: bool = True) -> None:
    """Compare one implementation (a backend, or ``flex``) of a small input with the reference in float64.

    Raises:
        WrongResult: an error larger than twice that of plain PyTorch in the same precision.
    """
    window = sizes.window
    small = dataclasses.replace(sizes, batch=1, n_heads=HEADS)
    inputs = small.inputs(LENGTH, requires_grad=backward)
    grad_out = torch.randn_like(inputs[0])

    def results(backend: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        if backend == "flex":
            out = flex_attention(*tensors, window=window)
        else:
            out = stream_attention(*tensors, window=window, backend=backend)
        if not backward:
            return {"out": out}
        return {"out": out, **dict(zip(NAMES, torch.autograd.grad(out, tensors, grad_out.to(out.dtype)), strict=True))}

    in_double = [tensor.detach().double().requires_grad_(backward) for tensor in inputs]
    exact = functools.partial(results, "reference", in_double)
    _compare(f"stream_attention, {implementation}", results(implementation, inputs), exact, results("reference", inputs))


def check_models(config: SMTConfig, device: torch.device) -> None:
    """Compare loss and gradients of each variant on its fast backends with the reference in float64, on a small input.

    Raises:
        WrongResult: an error larger than twice that of plain PyTorch in the same precision.
    """
    generator = torch.Generator().manual_seed(2)
    head_dim = 32
    small = dataclasses.replace(
        config,
        vocab_size=128,
        d_model=2 * head_dim,
        d_k=2 * head_dim,
        transformer_n_layers=2,
        transformer_n_heads=2,
        ssm_n_layers=1,
        write_group=min(config.write_group, 2),
    )
    for changes in VARIANTS.values():
        variant = dataclasses.replace(small, **changes)
        length = 2 * variant.stride * variant.write_group + 5  # two groups of writes and a rest
        input_ids = torch.randint(variant.vocab_size, (1, length), generator=generator).to(device)
        model = StrideMemoryTransformer(variant).to(device)
        fast = _loss_and_gradients(model, input_ids)
        with use_backend("reference"):
            plain = _loss_and_gradients(model, input_ids)
            exact = functools.partial(_loss_and_gradients, model.double(), input_ids)
            _compare(f"model with {changes}", fast, exact, plain)


def check_decoding(config: SMTConfig, encodings: Sequence[str], device: torch.device) -> None:
    """Compare prefill and single steps with one forward pass of each encoding in float64, on a small model.

    Raises:
        WrongResult: an error larger than twice that of the forward pass in the precision of ``config``'s models.
    """
    head_dim, length = 32, config.m_input_tokens + 3 * config.stride
    small = dataclasses.replace(
        config,
        vocab_size=128,
        d_model=2 * head_dim,
        d_k=2 * head_dim,
        transformer_n_layers=2,
        transformer_n_heads=2,
        ssm_n_layers=1,
    )
    for encoding in encodings:
        model = StrideMemoryTransformer(dataclasses.replace(small, encoding=encoding)).to(device).eval()
        input_ids = torch.randint(128, (2, length), generator=torch.Generator().manual_seed(3)).to(device)
        with torch.no_grad():
            logits, aux = model(input_ids[:, : length // 2])
            pieces = [logits]
            for step in range(length // 2, length):
                logits, aux = model(input_ids[:, step : step + 1], aux.state, overwrite_state=True)
                pieces.append(logits)
            plain = model(input_ids)[0]
            exact = functools.partial(_logits, model.double(), input_ids)
            _compare(f"decoding, {encoding}", {"logits": torch.cat(pieces, dim=1)}, exact, {"logits": plain})


def _compare(what: str, actual: dict[str, Tensor], exact: Callable[[], dict[str, Tensor]], plain: dict[str, Tensor]) -> None:
    try:
        assert_within_budget(actual, exact, plain)
    except AssertionError as error:
        raise WrongResult(f"{what}: {error}") from error


def _logits(model: StrideMemoryTransformer, input_ids: Tensor) -> dict[str, Tensor]:
    return {"logits": model(input_ids)[0]}


def _loss_and_gradients(model: StrideMemoryTransformer, input_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model.loss(input_ids)[0]
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return {"loss": loss.detach(), "gradients": torch.cat(gradients)}
