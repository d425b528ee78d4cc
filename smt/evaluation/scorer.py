"""One interface to every model that is evaluated: documents of tokens in, the log-likelihood of each token out.

    scores[i] = log p(document[i + 1] | document[0], ..., document[i])

``SMTScorer`` carries the memory through a whole document. ``WindowScorer`` runs any other model with as much context as it
takes: a longer document is read in overlapping windows, and each token scored once, with at least half a window before it.
``CausalLMScorer`` is that of the causal language models of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.data.walk import DocumentWalk
from smt.model.evaluating import evaluating
from smt.model.transformer import StrideMemoryTransformer
from smt.runtime.precision import precision
from smt.state.carried import CarriedStates
from smt_kernels.linear_cross_entropy import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits held at once, beside the weights small.
CHUNK_ELEMENTS = 2**24
# What configurations call the longest context, and what a model without one, such as a Mamba, reads at once.
CONTEXT_NAMES, UNNAMED_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 4096
# How a model of ours is run: input_ids (B, T) and the state before them -> hidden (B, T, d) and the state after them.
Encode = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a model makes of a document of L tokens.

    Attributes:
        log_probs: (L - 1,) fp64, the log-likelihood of every token but the first.
        greedy: (L - 1,) bool, whether it is the likeliest token of the vocabulary.
    """

    log_probs: Tensor
    greedy: Tensor

    @classmethod
    def of_length(cls, length: int) -> TokenScores:
        """Room for a document of ``length`` tokens; NaN where nothing has been scored."""
        values = torch.full((length - 1,), torch.nan, dtype=torch.float64, device="cpu")
        return cls(values, torch.zeros_like(values, dtype=torch.bool))

    def fill(self, start: int, log_probs: Tensor, greedy: Tensor) -> None:
        """Put the scores of the tokens ``start + 1``, ``start + 2``, ... in their places."""
        self.log_probs[start : start + len(log_probs)] = log_probs.cpu()
        self.greedy[start : start + len(greedy)] = greedy.cpu()


class Scorer(Protocol):
    """A model as the evaluations see it."""

    def score(self, documents: Sequence[Any]) -> list[TokenScores]:
        """The scores of documents of (L,) integer tokens, L >= 2, each from its own beginning."""


class SMTScorer:
    """A Stride Memory Transformer, its state carried from chunk to chunk; no dropout.

    Args:
        model: what is evaluated.
        encode: how it is run; None: as it is. The ablations of ``smt.evaluation.ablation`` are such functions.
        batch_size: documents that are read together.
        length: tokens of a chunk.
    """

    def __init__(
        self, model: StrideMemoryTransformer, encode: Encode | None = None, *, batch_size: int = 16, length: int = 512
    ) -> None:
        self.model = model
        self._encode = encode or self._plain
        self._batch_size, self._length = batch_size, length

    def _plain(self, input_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, aux = self.model.encode(input_ids, state)
        return hidden, aux.state

    @torch.no_grad()
    def score(self, documents: Sequence[Any]) -> list[TokenScores]:
        """As ``Scorer.score``."""
        weight = self.model.head()
        # Logits in bfloat16 have steps of 0.06: ties would decide what is likeliest.
        head = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scores = [TokenScores.of_length(len(document)) for document in documents]
        sizes = {"batch_size": self._batch_size, "length": self._length}
        states = CarriedStates()
        with evaluating(self.model):
            for batch in DocumentWalk.once(documents, **sizes):
                reading, state = states.continued(batch)
                reading = reading.to(weight.device)
                with precision(weight.device):
                    hidden, state = self._encode(reading.input_ids, state)
                log_probs, greedy = _through_head(hidden.to(head.dtype), head, reading.targets)
                states.keep(batch, state)
                for row, (document, position, count) in enumerate(reading.places()):
                    scores[document].fill(position, log_probs[row, :count], greedy[row, :count])
        return scores


class WindowScorer:
    """A model that reads every window anew.

    Args:
        model: what is run.
        logits: runs it: tokens (B, T) -> (B, T, V).
        vocab_size: V.
        context: tokens that it sees at most.
        device: where it is.
    """

    def __init__(
        self, model: nn.Module, logits: Callable[[Tensor], Tensor], vocab_size: int, context: int, device: torch.device
    ) -> None:
        self.model, self.context = model, context
        self._logits, self._vocab_size, self._device = logits, vocab_size, device

    @torch.no_grad()
    def score(self, documents: Sequence[Any]) -> list[TokenScores]:
        """As ``Scorer.score``."""
        scores = [TokenScores.of_length(len(document)) for document in documents]
        with evaluating(self.model):
            pieces = [
                (index, *bounds)
                for index, document in enumerate(documents)
                for bounds in windows(len(document) - 1, self.context)
            ]
            pieces.sort(key=lambda piece: piece[3] - piece[1])  # of similar length together: little padding
            while pieces:
                longest = pieces[-1][3] - pieces[-1][1]
                together = max(1, CHUNK_ELEMENTS // (longest * self._vocab_size))
                pieces, group = pieces[:-together], pieces[-together:]
                self._score(documents, group, longest, scores)
        return scores

    def _score(
        self, documents: Sequence[Any], group: list[tuple[int, int, int, int]], longest: int, scores: list[TokenScores]
    ) -> None:
        device = self._device
        # Padding is on the right, where no token before it sees it.
        ids = torch.zeros(len(group), longest + 1, dtype=torch.int64, device="cpu")
        for row, (index, start, _, stop) in enumerate(group):
            ids[row, : stop - start + 1] = _tokens(documents[index])[start : stop + 1]
        ids = ids.to(device)
        with precision(device):
            logits = self._logits(ids[:, :-1])
        log_probs, greedy = _of_targets(logits, ids[:, 1:])
        for row, (index, start, first, stop) in enumerate(group):
            scores[index].fill(first, log_probs[row, first - start : stop - start], greedy[row, first - start : stop - start])


class CausalLMScorer(WindowScorer):
    """Any causal language model of Hugging Face.

    Args:
        model: takes (B, T) tokens and gives ``logits`` (B, T, V).
        context: tokens that it sees at most; None: as many as its configuration allows, ``UNNAMED_CONTEXT`` if it names no
            bound: a whole book at once would not fit into memory.

    Raises:
        ValueError: a context below 2, or beyond what the model allows.
    """

    def __init__(self, model: PreTrainedModel, context: int | None = None) -> None:
        named = (getattr(model.config, name, None) for name in CONTEXT_NAMES)
        most = next((length for length in named if isinstance(length, int) and length > 0), None)
        if context is not None and (context < 2 or (most is not None and context > most)):
            raise ValueError(f"context must lie in 2..{most or 'any length'} for this model, got {context}")
        super().__init__(
            model,
            lambda ids: model(ids, use_cache=False).logits,
            model.config.get_text_config().vocab_size,
            context or most or UNNAMED_CONTEXT,
            model.device,
        )


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """Cut ``length`` steps into (start, first, stop): the steps [start, stop) are read, those from ``first`` on scored.

    Windows of ``context`` steps overlap by half; together they score every step once.
    """
    if length <= context:
        return [(0, 0, length)]
    advance = max(1, context // 2)
    stops = [context, *range(context + advance, length, advance), length]
    firsts = [0, *stops[:-1]]
    return [(max(0, stop - context), first, stop) for first, stop in zip(firsts, stops, strict=True)]


def _through_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (B, T, d), weight (V, d), targets (B, T) or -100 -> log-likelihoods and greedy, without holding all logits."""
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    parts = [
        _of_targets(F.linear(h, weight), t)
        for h, t in zip(hidden.flatten(0, 1).split(rows), targets.clamp(min=0).flatten().split(rows), strict=True)
    ]
    counted = targets != IGNORE_INDEX
    log_probs, greedy = (torch.cat(values).view_as(targets) for values in zip(*parts, strict=True))
    return log_probs.masked_fill(~counted, 0.0), greedy & counted


def _of_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (..., V), targets (...) -> fp64 log-likelihoods (...) and whether the target is the likeliest."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    return log_probs.double(), logits.argmax(-1) == targets


def _tokens(document: Any) -> Tensor:
    return torch.as_tensor([int(token) for token in document] if not isinstance(document, Tensor) else document).long()
