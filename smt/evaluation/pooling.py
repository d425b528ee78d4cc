"""What the memory pools: the weights of each write over the slots and tokens of its window.

Only writes whose whole window exists are counted, so that every entry had its chance. The entropy is that of a write's weights,
in nats: ln W where all entries weigh the same, 0 where one has everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smt.data.walk import DocumentWalk
from smt.model.evaluating import evaluating
from smt.model.transformer import StrideMemoryTransformer
from smt.runtime.precision import precision
from smt.state.carried import CarriedStates


@dataclass(frozen=True)
class WritePooling:
    """Figures of weights, of one write or averaged over many.

    Attributes:
        ssm_total, input_total: weight of all slots, and of all tokens.
        ssm_max, input_max: the largest weight of a slot, and of a token.
        entropy: in nats.
    """

    ssm_total: float
    input_total: float
    ssm_max: float
    input_max: float
    entropy: float


@dataclass(frozen=True)
class PoolingAnalysis:
    """Pooling weights over a set of documents.

    Attributes:
        n_memory: slots of the window; they are its first entries.
        weights: mean weight of each entry of the window.
        mean: averages over the writes.
        by_write: averages over the documents that make the write, by its number from ``first_write`` on.
        first_write: the first write whose window is full.
        n_writes: how many are counted.
    """

    n_memory: int
    weights: tuple[float, ...]
    mean: WritePooling
    by_write: tuple[WritePooling, ...]
    first_write: int
    n_writes: int


@torch.no_grad()
def pooling_weights(
    model: StrideMemoryTransformer, documents: Sequence[Tensor], *, batch_size: int = 16, length: int = 512
) -> list[Tensor]:
    """Of every document its writes' weights (K, W), slots first."""
    weights: list[list[Tensor]] = [[] for _ in documents]
    states = CarriedStates()
    device = model.embedding.weight.device
    with evaluating(model):
        sizes = {"batch_size": batch_size, "length": length}
        for batch in DocumentWalk.once(documents, **sizes):
            reading, state = states.continued(batch)
            with precision(device):
                _, aux = model.encode(reading.input_ids.to(device), state, return_weights=True)
            states.keep(batch, aux.state)
            made = model.config.window.writes_made
            for row, (document, position, count) in enumerate(reading.places()):
                n_writes = made(position + count) - made(position)  # padding behind a document's end writes, too
                weights[document].append(aux.attention_weights[row, :n_writes].float().cpu())
    return [torch.cat(pieces) for pieces in weights]


def analyse_pooling(model: StrideMemoryTransformer, documents: Sequence[Tensor], **sizes: int) -> PoolingAnalysis:
    """Summarise the pooling weights of ``documents``.

    Raises:
        ValueError: the memory does not write, or no document is long enough to fill a window.
    """
    config = model.config
    if not config.writes:
        raise ValueError("a model with writes = False pools nothing")
    first = _first_full_write(model)
    full = [weights[first:] for weights in pooling_weights(model, documents, **sizes) if len(weights) > first]
    if not full:
        least = config.window.write_step(first) + 1
        raise ValueError(f"pooling needs a document of at least {least} tokens, the longest has {max(map(len, documents))}")
    every, n_memory = torch.cat(full), config.n_ssm_outputs
    by_number = [[weights[index] for weights in full if len(weights) > index] for index in range(max(map(len, full)))]
    return PoolingAnalysis(
        n_memory=n_memory,
        weights=tuple(every.mean(0).tolist()),
        mean=summarise(every, n_memory),
        by_write=tuple(summarise(torch.stack(weights), n_memory) for weights in by_number),
        first_write=first,
        n_writes=len(every),
    )


def summarise(weights: Tensor, n_memory: int) -> WritePooling:
    """Averages over the writes of ``weights`` (K, W), whose first ``n_memory`` entries are slots."""
    slots, tokens = weights[:, :n_memory], weights[:, n_memory:]
    largest = [part.amax(1).mean().item() if part.shape[1] else 0.0 for part in (slots, tokens)]
    entropy = torch.special.entr(weights).sum(1).mean().item()
    return WritePooling(slots.sum(1).mean().item(), tokens.sum(1).mean().item(), *largest, entropy)


def _first_full_write(model: StrideMemoryTransformer) -> int:
    """The first write whose pooling sees m tokens, and n slots where slots are pooled."""
    config = model.config
    n_slots = config.n_ssm_outputs if config.pool_source == "window" else 0
    write = 0
    while (
        config.window.write_step(write) + 1 < config.m_input_tokens
        or config.window.pooled_slots(write, config.write_group)[1] < n_slots
    ):
        write += 1
    return write
