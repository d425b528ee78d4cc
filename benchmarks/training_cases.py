"""The whole model: forward, loss and backward of one batch, in every encoding, against a GPT-2 of the same decoder.

The optimizer's step is left out: it costs the same per parameter in every model and does not depend on the length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from measure import Case, Unavailable
from names import GPT2, POOLS_TOKENS, STREAM, STRIDE
from torch import Tensor

from smt import SMTConfig, StrideMemoryTransformer
from smt.baselines import build_gpt2
from smt.model.cost import gpt2_training_cost, smt_cost

# What is compared: name -> fields of the configuration.
VARIANTS = {
    "SMT token (published encoding)": {"encoding": "token"},
    STRIDE: {"encoding": "stride"},
    STREAM: {"encoding": "stream"},
    POOLS_TOKENS: {"encoding": "stream", "pool_source": "tokens"},
}


def training_cases(config: SMTConfig, lengths: list[int], batch: int, device: torch.device) -> list[Case]:
    """The cases of the table, GPT-2 first; the fields of ``VARIANTS`` replace those of ``config``."""
    try:
        gpt2 = build_gpt2(config, n_positions=max(lengths)).to(device).train()

        def prepare(length):
            return _step(gpt2, lambda ids: gpt2(ids, labels=ids).loss, _batch(config, length, batch, device))

    except ImportError as error:
        reason = str(error)

        def prepare(length: int) -> Callable[[], object]:
            raise Unavailable(reason)

    cases = [Case(GPT2, prepare, cost=lambda length: length * gpt2_training_cost(config, length).total)]
    for name, changes in VARIANTS.items():
        cases.append(_variant_case(name, dataclasses.replace(config, **changes), batch, device))
    return cases


def _variant_case(name: str, config: SMTConfig, batch: int, device: torch.device) -> Case:
    model = StrideMemoryTransformer(config).to(device).train()
    per_token = smt_cost(config).total
    return Case(
        name,
        lambda length: _step(model, lambda ids: model.loss(ids)[0], _batch(config, length, batch, device)),
        cost=lambda length: length,
        limit=lambda length: gpt2_training_cost(config, length).total / per_token,
    )


def _batch(config: SMTConfig, length: int, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(config.vocab_size, (batch, length), generator=generator).to(device)


def _step(model: torch.nn.Module, loss: Callable[[Tensor], Tensor], input_ids: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss(input_ids).backward()

    return step
