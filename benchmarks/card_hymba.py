"""Layouts of a Hymba in the sizes of the study: a training step, and a token of decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from card_clock import Times, time_call
from card_rows import Case
from torch import Tensor

from smt.hymba import Hymba, HymbaConfig

LAYOUTS = ("global", "local", "mamba", "hybrid", "parallel")
# Tokens that are read before those that are timed, and those of one call.
PROMPT, TOGETHER = 256, 16
# Gives tokens (rows, length) of a vocabulary.
TokensOf = Callable[[int, int, int], Tensor]


def hymba_training(config: HymbaConfig, step_case: Callable[..., Case], device: torch.device) -> Iterator[Case]:
    """A training step of each layout, global attention first; ``step_case`` takes a name, what makes a step, and a note."""
    for layout in LAYOUTS:

        def prepare(ids: Tensor, layout: str = layout) -> Callable[[], Tensor]:
            return training_step(dataclasses.replace(config, layout=layout), ids, device)

        yield step_case(layout, prepare, "layers compiled")


def training_step(config: HymbaConfig, ids: Tensor, device: torch.device, *, compiled: bool = True) -> Callable[[], Tensor]:
    """Gives the loss; its ``model`` is what is trained."""
    with device:
        model = Hymba(config).train()
    if compiled:
        model.compile()
    targets = ids.roll(-1, dims=1)

    def step() -> Tensor:
        return model(ids, targets=targets)["loss"]

    step.model = model
    return step


def hymba_decoding(config: HymbaConfig, tokens_of: TokensOf, device: torch.device) -> Iterator[Case]:
    """One token for each of some rows, on the cache of a prompt, in bf16."""
    for rows in (1, 64):
        for layout in ("global", "parallel"):

            def measure(rows: int = rows, layout: str = layout) -> Times:
                return decoding(dataclasses.replace(config, layout=layout), rows, tokens_of, device)

            yield Case("a token of decoding, Hymba", layout, f"{rows} rows", measure, rows)


@torch.no_grad()
def decoding(config: HymbaConfig, rows: int, tokens_of: TokensOf, device: torch.device) -> Times:
    """Times of a token."""
    with device:
        model = Hymba(config).to(torch.bfloat16).eval()
    cache = model.new_cache(rows, 4 * PROMPT)
    model(tokens_of(rows, PROMPT, config.vocab_size), cache=cache)
    token = tokens_of(rows, 1, config.vocab_size)

    def some() -> None:
        for _ in range(TOGETHER):
            model(token, cache=cache)["logits"]

    times = time_call(some, device)
    return Times(times.call / TOGETHER, times.host / TOGETHER, times.peak_bytes)
