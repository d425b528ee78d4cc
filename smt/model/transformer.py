"""The Stride Memory Transformer: embed; run the writes, group by group; encode everything else in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.config import SMTConfig
from smt.model.batch import check_rows, check_targets, check_tokens, encode_batch, token_counts
from smt.model.checkpoint import load_model, save_model
from smt.model.decoder import Decoder
from smt.model.evaluating import evaluating
from smt.model.generation import generate, stream
from smt.model.graphs import of_one_shape, records_graphs
from smt.model.loss import head_loss
from smt.model.memory import AttentionPooling, StrideMemory
from smt.model.packed import text_bounds, text_lengths
from smt.model.parallel import initial_state
from smt.model.parameters import count_parameters
from smt.model.weights import is_hooked, rows_of
from smt.pretrained.loading import load_gpt2, load_mamba
from smt.pretrained.transfer import LoadReport
from smt.runtime.device import from_host
from smt.state.state import SMTState
from smt_kernels.linear_cross_entropy import IGNORE_INDEX

# The parts that parameters are counted, trained and frozen by.
PARTS = {"embedding": "embedding", "transformer": "decoder", "attention_pooling": "memory.pooling", "ssm": "memory.ssm"}


@dataclass(frozen=True, eq=False)
class Aux:
    """What a forward pass tells besides its logits or its loss; fields and properties are also items (``aux["n_writes"]``).

    Attributes:
        config: the model's.
        writes: for each row the indices of the writes that it made in this call.
        n_tokens: tokens that all rows took together.
        attention_weights: (B, K, W) pooling weights of each row's K writes before dropout, slots first, zeros behind those of a
            row that made fewer; None unless asked for.
        state: what to pass to the next call.
    """

    config: SMTConfig
    writes: tuple[range, ...]
    n_tokens: int
    attention_weights: Tensor | None
    state: SMTState

    @property
    def write_steps(self) -> list[int]:
        """The steps at whose end a slot was written, when they are those of every row.

        Raises:
            ValueError: the rows made different writes; ``writes`` tells each row's.
        """
        if any(of_row != self.writes[0] for of_row in self.writes):
            raise ValueError("the rows made different writes: see writes, one range per row")
        return [self.config.window.write_step(write) for write in self.writes[0]]

    @property
    def n_writes(self) -> int:
        """How many writes these are, under the same condition."""
        return len(self.write_steps)

    @property
    def write_frequency(self) -> float:
        """Writes per token of all rows."""
        return sum(map(len, self.writes)) / max(1, self.n_tokens)

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None


class StrideMemoryTransformer(nn.Module):
    """A decoder language model with a constant-size view of an unbounded past.

    ``model.embedding`` is tied to the output head; ``model.memory`` pools and writes; ``model.decoder`` attends.
    """

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        if not isinstance(config, SMTConfig):
            raise TypeError(f"config must be an SMTConfig, got {type(config).__name__}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.memory = StrideMemory(config)
        self.decoder = Decoder(config)
        nn.init.normal_(self.embedding.weight, std=config.initializer_std)
        self.memory.initialise()
        self.decoder.initialise()

    def forward(
        self,
        input_ids: Tensor,
        state: SMTState | None = None,
        *,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        return_weights: bool = False,
        last_only: bool = False,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, Aux]:
        """Next-token logits of every step, or their loss; each row gives what it gives alone.

        Any number of tokens runs in parallel. One token per row, without gradients and not in training mode, is a decoding
        step: its time and memory are constant, whatever the length of the past.

        Args:
            input_ids: (B, T) integer tokens; on CPU their range is checked, and that of targets.
            state: the ``aux.state`` of the call before, to continue its sequences; None: start. Rows may be at any steps.
            targets: (B, T) integers, the token that should follow each step, or -100 to leave it out, as at padding: give
                their mean cross-entropy instead of logits, which are then never all held.
            attention_mask: (B, T), 0 at padding, which is on the left, and 1 at tokens; a row of zeros takes nothing. Logits at
                padding mean nothing, but are finite. None: no padding.
            cu_seqlens: (N + 1,) integers from 0 to T: ``input_ids`` (1, T) are N packed texts, of which number i is
                ``input_ids[0, cu_seqlens[i] : cu_seqlens[i + 1]]`` and row i of the state and of ``Aux``. None: no packing.
            return_weights: also return the pooling weights of each write.
            last_only: logits of the last step alone, (B, 1, V); of packed texts, of each one's, (N, 1, V).
            overwrite_state: the new state may take the tensors of ``state``, which must not be used again.

        Returns:
            logits (B, T, V), or a scalar in nats per target, and ``Aux``.

        Raises:
            TypeError: input_ids, targets or cu_seqlens are not integers, or state is no ``SMTState``.
            ValueError: wrong rank, an empty batch, another device, a token or target out of range, a state of another config or
                batch size, a mask that is not left padding, or beside ``cu_seqlens``, ``cu_seqlens`` that do not rise from 0 to
                T, targets of another shape, or beside ``last_only``.
        """
        check_rows(input_ids)
        if cu_seqlens is not None:
            cu_seqlens = text_bounds(cu_seqlens, input_ids)
        if targets is not None:
            check_targets("targets", targets, input_ids, self.config.vocab_size)
            if last_only:
                raise ValueError("last_only is of logits: targets need every step")
        hidden, aux = self.encode(
            input_ids,
            state,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            return_weights=return_weights,
            overwrite_state=overwrite_state,
        )
        if targets is not None:
            if attention_mask is not None:
                targets = targets.masked_fill(attention_mask == 0, IGNORE_INDEX)
            return head_loss(hidden, self.head(), targets), aux
        if last_only and cu_seqlens is not None:
            hidden = hidden[0, from_host(cu_seqlens[1:], hidden.device) - 1][:, None]
        elif last_only:
            hidden = hidden[:, -1:]
        return F.linear(hidden, self.head()), aux

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        state: SMTState | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Aux]:
        """Mean cross-entropy per target: ``forward`` with ``targets``, by default the tokens that follow.

        Args:
            input_ids: (B, T) integer tokens.
            targets: as in ``forward``; None: ``input_ids`` shifted by one, the last step left out, of packed texts of each.
            state, cu_seqlens: as in ``forward``.

        Returns:
            a scalar in nats and ``Aux``.
        """
        if targets is None:
            check_rows(input_ids)
            targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
            if cu_seqlens is not None:
                cu_seqlens = text_bounds(cu_seqlens, input_ids)
                targets.index_fill_(1, from_host(cu_seqlens[1:], targets.device) - 1, IGNORE_INDEX)
        return self(input_ids, state, targets=targets, cu_seqlens=cu_seqlens)

    def encode(
        self,
        input_ids: Tensor,
        state: SMTState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        return_weights: bool = False,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, Aux]:
        """Hidden states (B, T, d) after the final norm, before the head; arguments and errors as in ``forward``."""
        self._check(input_ids)
        if cu_seqlens is not None and attention_mask is not None:
            raise ValueError("attention_mask must be None beside cu_seqlens: packed texts have no padding")
        counts, firsts = (input_ids.shape[1],) * input_ids.shape[0], None
        if attention_mask is not None:
            counts = token_counts(attention_mask, input_ids)
        elif cu_seqlens is not None:
            bounds = text_bounds(cu_seqlens, input_ids)
            counts, firsts = text_lengths(bounds), bounds[:-1]
        self._check_state(state, len(counts))
        if state is None:
            state = self.initial_state(len(counts))
        elif not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled() and state.is_inference():
            state = state.clone()  # tensors of inference mode can be read alone: neither overwritten nor kept for a gradient
        if state.tokens.dtype != self.embedding.weight.dtype:
            state = state.in_dtype(self.embedding.weight.dtype)
        encoded = encode_batch(
            self.memory,
            self.decoder,
            self.embedding(input_ids),
            state,
            counts,
            decodes=not torch.is_grad_enabled() and not self.training,
            return_weights=return_weights,
            overwrite_state=overwrite_state,
            firsts=firsts,
        )
        made = self.config.window.writes_made if self.config.writes else lambda step: 0
        writes = tuple(range(made(step), made(step + count)) for step, count in zip(state.steps, counts, strict=True))
        return encoded.hidden, Aux(self.config, writes, sum(counts), encoded.weights, encoded.state)

    def head(self) -> Tensor:
        """The matrix (V, d) of the head, which is the embedding, adapters included."""
        return rows_of(self.embedding, self.config.vocab_size)

    def initial_state(self, batch_size: int) -> SMTState:
        """The state before the first token of each row."""
        weight = self.embedding.weight
        return initial_state(self.decoder, batch_size, device=weight.device, dtype=weight.dtype)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Prompts (B, T) and their continuations, (B, T + new): see ``smt.model.generation.generate``."""
        return generate(self._next_logits, input_ids, max_new_tokens, vocab_size=self.config.vocab_size, **options)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """The next tokens (B,) of prompts (B, T), one step at a time: see ``smt.model.generation.stream``."""
        return stream(self._next_logits, input_ids, max_new_tokens, vocab_size=self.config.vocab_size, **options)

    def set_embedding(self, embedding: nn.Embedding) -> None:
        """Replace the embedding, and with it the head: another vocabulary over the same memory and decoder."""
        if embedding.embedding_dim != self.config.d_model:
            raise ValueError(f"embedding must have width d_model = {self.config.d_model}, got {embedding.embedding_dim}")
        self.embedding = embedding
        config = replace(self.config, vocab_size=embedding.num_embeddings)
        self.config = self.memory.config = self.decoder.config = config

    def gradient_checkpointing_enable(self) -> None:
        """Train with less memory: keep only the input of every decoder block, recompute the rest backward."""
        self.decoder.gradient_checkpointing = True

    def compile(self, **options: Any) -> None:
        """Compile in place, like ``nn.Module.compile``, but only what repeats: one decoder layer for all, which takes seconds.

        After two or three chunks of one length nothing is compiled again. With a ``mode`` that records CUDA graphs
        (``reduce-overhead``), the memory is a graph too: its hundreds of small launches become one, forward and backward. What
        a graph returns is overwritten when it runs again, all but the state: to add up the gradients of several passes, give
        them tensors of their own first, by ``optimizer.zero_grad(set_to_none=False)`` after the first pass. Call
        ``torch.compiler.cudagraph_mark_step_begin()`` at the beginning of a step, as every step is a graph of many parts. It
        does not go with gradient checkpointing.

        Args:
            options: of ``torch.compile``; where graphs are recorded, ``dynamic`` is False unless given.
        """
        options = of_one_shape(options)
        self.decoder.compile(**options)
        if records_graphs(options):
            self.memory.compile(**options)

    def count_parameters(self) -> dict[str, Any]:
        """Parameters: ``total``, ``trainable`` and ``breakdown`` by part; ``lm_head`` is 0 because it is the embedding."""
        return count_parameters(self)

    def parts(self) -> dict[str, nn.Module]:
        """``embedding``, ``transformer``, ``attention_pooling`` and ``ssm``; every parameter is in one of them."""
        return {name: self.get_submodule(path) for name, path in PARTS.items()}

    def load_gpt2(self, source: Any, *, embedding: bool | None = None, first_layers: bool = False) -> LoadReport:
        """Load a GPT-2 into decoder and embedding: see ``smt.pretrained.loading.load_gpt2``."""
        return load_gpt2(self, source, embedding=embedding, first_layers=first_layers)

    def load_mamba(
        self, source: Any, *, embedding: bool | None = False, match_scale: bool = False, first_layers: bool = False
    ) -> LoadReport:
        """Load a Mamba into the memory: see ``smt.pretrained.loading.load_mamba``."""
        return load_mamba(self, source, embedding=embedding, match_scale=match_scale, first_layers=first_layers)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and weights into ``folder``: see ``smt.model.checkpoint.save_model``."""
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> StrideMemoryTransformer:
        """The model that ``save_pretrained`` or a training run left in ``folder``: see ``smt.model.checkpoint.load_model``."""
        return load_model(cls, folder, device=device)

    def _next_logits(self, input_ids: Tensor, state: SMTState | None, attention_mask: Tensor | None) -> tuple[Tensor, SMTState]:
        """Logits (B, V) of what follows each row, and the state, which may have taken the tensors of the old; no dropout."""
        with evaluating(self):
            logits, aux = self(input_ids, state, attention_mask=attention_mask, last_only=True, overwrite_state=True)
        return logits[:, -1], aux.state

    def _check(self, input_ids: Tensor) -> None:
        # They hold others, or a decoding step goes around them.
        pooling = "memory.pooling", self.memory.pooling, AttentionPooling
        for name, module, kind in (("decoder", self.decoder, Decoder), ("memory", self.memory, StrideMemory), pooling):
            if is_hooked(module) or not isinstance(module, kind):
                raise ValueError(
                    f"{name} is not called, or not at every step: wrappers and hooks have no effect on it; take its parts"
                )
        check_tokens(input_ids, self.config.vocab_size, self.embedding.weight.device)

    def _check_state(self, state: SMTState | None, batch_size: int) -> None:
        device = self.embedding.weight.device
        if state is not None:
            if not isinstance(state, SMTState):
                raise TypeError(f"state must be an SMTState, such as aux.state, got {type(state).__name__}")
            state.check(self.config, batch_size)
            if state.tokens.device != device:
                raise ValueError(f"state must be on the model's device {device}, got {state.tokens.device}")
