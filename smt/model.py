"""The Stride Memory Transformer: embed; run the writes, group by group; encode everything else in parallel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smt.checkpoint import load_model, save_model
from smt.config import SMTConfig
from smt.decoder import Decoder, Span
from smt.generation import generate
from smt.loss import IGNORE_INDEX, linear_cross_entropy
from smt.memory import StrideMemory
from smt.pretrained import load_gpt2, load_mamba
from smt.state import SMTState, keep_last
from smt.transfer import LoadReport

# The parts that parameters are counted, trained and frozen by.
PARTS = {"embedding": "embedding", "transformer": "decoder", "attention_pooling": "memory.pooling", "ssm": "memory.ssm"}


@dataclass(frozen=True)
class Aux:
    """What a forward pass tells besides its logits; fields are also items (``aux["n_writes"]``).

    Attributes:
        write_steps: the steps at whose end a slot was written in this call.
        n_writes: how many these are.
        write_frequency: writes per step of this call.
        attention_weights: (B, n_writes, W) pooling weights of each write before dropout, slots first; None unless asked for.
        state: what to pass to the next call.
    """

    write_steps: list[int]
    n_writes: int
    write_frequency: float
    attention_weights: Tensor | None
    state: SMTState

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
        nn.init.normal_(self.embedding.weight, std=config.initializer_range)
        self.memory.initialise()
        self.decoder.initialise()

    def forward(
        self, input_ids: Tensor, state: SMTState | None = None, *, return_weights: bool = False, last_only: bool = False
    ) -> tuple[Tensor, Aux]:
        """Next-token logits of every step.

        Args:
            input_ids: (B, T) integer tokens; on CPU their range is checked.
            state: the ``aux.state`` of the call before, to continue its sequences; None: start.
            return_weights: also return the pooling weights of each write.
            last_only: logits of the last step alone, (B, 1, V).

        Returns:
            logits (B, T, V) and ``Aux``.

        Raises:
            TypeError: input_ids is not an integer tensor.
            ValueError: wrong rank, an empty batch, another device, a token out of range, or a state of another config or
                batch size.
        """
        hidden, aux = self.encode(input_ids, state, return_weights=return_weights)
        return F.linear(hidden[:, -1:] if last_only else hidden, self.embedding.weight), aux

    def loss(self, input_ids: Tensor, targets: Tensor | None = None, state: SMTState | None = None) -> tuple[Tensor, Aux]:
        """Mean cross-entropy per target, without ever holding all logits.

        Args:
            input_ids: (B, T) integer tokens.
            targets: (B, T) int64, the token that should follow each step, or -100 to leave it out; None: ``input_ids``
                shifted by one, the last step left out.
            state: as in ``forward``.

        Returns:
            a scalar in nats and ``Aux``.
        """
        hidden, aux = self.encode(input_ids, state)
        if targets is None:
            targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX)
        elif targets.shape != input_ids.shape:
            raise ValueError(f"targets must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(targets.shape)}")
        return linear_cross_entropy(hidden.flatten(0, 1), self.embedding.weight, targets.flatten().long()), aux

    def encode(self, input_ids: Tensor, state: SMTState | None = None, *, return_weights: bool = False) -> tuple[Tensor, Aux]:
        """Hidden states (B, T, d) after the final norm, before the head; arguments and errors as in ``forward``."""
        self._check(input_ids, state)
        config, window = self.config, self.config.window
        embedded = self.embedding(input_ids)
        state = state if state is not None else self._initial_state(embedded)
        first, stop = state.step, state.step + input_ids.shape[1]
        n_tokens, n_slots = _existing(config, first)
        written = window.writes_made(first) if config.writes else 0
        writes = range(written, window.writes_made(stop) if config.writes else 0)

        tokens = Span(torch.cat([state.tokens[:, config.m_input_tokens - n_tokens :], embedded], dim=1), first - n_tokens)
        old_slots = state.slots[:, config.n_state_slots - n_slots :]
        new = self.memory(
            tokens.values,
            old_slots,
            state.conv,
            state.ssm,
            first_step=tokens.first,
            first_slot=written - n_slots,
            writes=writes,
            return_weights=return_weights,
        )
        slots = Span(torch.cat([old_slots, new.slots], dim=1), written - n_slots)
        layers = state.layers
        if config.encoding == "stream":
            held = min(n_tokens, config.m_input_tokens), min(n_slots, config.n_ssm_outputs)
            hidden, layers = self.decoder.encode_stream(Span(embedded, first), Span(new.slots, written), layers, held)
        else:
            hidden = self.decoder.encode_windows(tokens, slots, first)
        next_state = SMTState(
            config=config,
            steps=(stop,) * input_ids.shape[0],
            tokens=keep_last(tokens.values, config.m_input_tokens),
            slots=keep_last(slots.values, config.n_state_slots),
            conv=new.conv,
            ssm=new.ssm,
            layers=layers,
        )
        write_steps = [window.write_step(write) for write in writes]
        return hidden, Aux(write_steps, len(writes), len(writes) / input_ids.shape[1], new.weights, next_state)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``input_ids`` (B, T): see ``smt.generation.generate``."""
        return generate(self, input_ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    def count_parameters(self) -> dict[str, Any]:
        """Parameters: ``total``, ``trainable`` and ``breakdown`` by part; ``lm_head`` is 0 because it is the embedding."""
        count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
        return {
            "total": count(self),
            "trainable": sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad),
            "breakdown": {**{name: count(part) for name, part in self.parts().items()}, "lm_head": 0},
        }

    def parts(self) -> dict[str, nn.Module]:
        """``embedding``, ``transformer``, ``attention_pooling`` and ``ssm``; every parameter is in one of them."""
        return {name: self.get_submodule(path) for name, path in PARTS.items()}

    def load_gpt2(self, source: Any, *, embedding: bool | None = None, first_layers: bool = False) -> LoadReport:
        """Load a GPT-2 into decoder and embedding: see ``smt.pretrained.load_gpt2``."""
        return load_gpt2(self, source, embedding=embedding, first_layers=first_layers)

    def load_mamba(
        self, source: Any, *, embedding: bool | None = False, match_scale: bool = False, first_layers: bool = False
    ) -> LoadReport:
        """Load a Mamba into the memory: see ``smt.pretrained.load_mamba``."""
        return load_mamba(self, source, embedding=embedding, match_scale=match_scale, first_layers=first_layers)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and weights into ``folder``: see ``smt.checkpoint.save_model``."""
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> StrideMemoryTransformer:
        """The model that ``save_pretrained`` or a training run left in ``folder``: see ``smt.checkpoint.load_model``."""
        return load_model(cls, folder, device=device)

    def _initial_state(self, embedded: Tensor) -> SMTState:
        config = self.config
        state = SMTState.initial(config, embedded.shape[0], device=embedded.device, dtype=embedded.dtype)
        if config.empty_slots == "mask" or config.encoding != "stream":
            return state
        # "zero" in the stream: the entries before the first step are zero vectors that have gone through the layers.
        n_tokens, n_slots = _existing(config, 0)
        tokens = Span(state.tokens, -n_tokens)
        slots = Span(state.slots[:, config.n_state_slots - n_slots :], -n_slots)
        _, layers = self.decoder.encode_stream(tokens, slots, state.layers, (0, 0))
        return SMTState(config, state.steps, state.tokens, state.slots, state.conv, state.ssm, layers)

    def _check(self, input_ids: Tensor, state: SMTState | None) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise TypeError(f"input_ids must be an int64 or int32 tensor, got {got}")
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must have shape (B, T) with B, T >= 1, got {tuple(input_ids.shape)}")
        device = self.embedding.weight.device
        if input_ids.device != device:
            raise ValueError(f"input_ids must be on the model's device {device}, got {input_ids.device}")
        # On a GPU reading the range would wait for the device; the embedding's own assertion stands guard there.
        if device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                valid = f"0..vocab_size - 1 = 0..{self.config.vocab_size - 1}"
                raise ValueError(f"input_ids must lie in {valid}, got {low}..{high}")
        if state is not None:
            state.check(self.config, input_ids.shape[0])


def _existing(config: SMTConfig, step: int) -> tuple[int, int]:
    """How many tokens and slots of a state exist after ``step`` steps."""
    n_slots = config.window.writes_made(step)
    if config.empty_slots == "zero":  # the entries before the first are there, as zeros
        step, n_slots = config.m_input_tokens, n_slots + config.n_ssm_outputs
    return min(step, config.m_input_tokens), min(n_slots, config.n_state_slots) if config.writes else 0
