"""What a trained model's memory is worth: the same weights and text, with the memory hindered in three ways.

- ``no writes``: no slot ever exists (``SMTConfig.writes=False``).
- ``slots zeroed``: slots exist but are zero vectors. Slots are read by attention and by the pooling of later slots alone, and
  those are zero as well, so zeroing them where they are written zeroes all that attention sees.
- ``frozen``: after a number of tokens nothing is written any more. The window keeps the slots that it has, the SSM stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smt.config import SMTConfig
from smt.evaluation.position import Mean, mean_between
from smt.evaluation.scorer import SMTScorer, TokenScores
from smt.model.parallel import encode_chunk
from smt.model.transformer import StrideMemoryTransformer
from smt.state.state import SMTState

NO_WRITES, SLOTS_ZEROED, FROZEN = "no writes", "slots zeroed", "frozen"


@dataclass(frozen=True)
class Ablation:
    """Losses of one variant of the model.

    Attributes:
        window: at the positions that the window's tokens reach, up to m.
        slots: at the positions up to the reach of its slots, n S + m.
        beyond: at those behind.
        all: at all positions.
    """

    window: Mean | None
    slots: Mean | None
    beyond: Mean | None
    all: Mean | None


def ablate(
    model: StrideMemoryTransformer, documents: Sequence[Tensor], whole: Sequence[TokenScores], **sizes: int
) -> dict[str, Ablation]:
    """Losses with the memory whole, which are known, and hindered.

    Args:
        documents: tokens of each.
        whole: the scores of ``documents`` by the model as it is.
        sizes: of ``SMTScorer``.
    """
    config = model.config
    results = {"whole": _losses(config, whole)}
    frozen = FrozenWrites(model, slot_reach(config))
    with zeroed_slots(model):
        results[SLOTS_ZEROED] = _losses(config, SMTScorer(model, **sizes).score(documents))
    results[f"{FROZEN} after {frozen.after}"] = _losses(config, SMTScorer(model, frozen, **sizes).score(documents))
    results[NO_WRITES] = _losses(config, SMTScorer(without_writes(model), **sizes).score(documents))
    return results


def slot_reach(config: SMTConfig) -> int:
    """How many tokens back the slots of a window have pooled directly, n S + m."""
    return config.n_ssm_outputs * config.stride + config.m_input_tokens


def without_writes(model: StrideMemoryTransformer) -> StrideMemoryTransformer:
    """The same weights, shared, in a model whose memory never writes."""
    with torch.device("meta"):
        control = StrideMemoryTransformer(replace(model.config, writes=False))
    control.load_state_dict(model.state_dict(), assign=True)
    return control.train(model.training)


@contextmanager
def zeroed_slots(model: StrideMemoryTransformer) -> Iterator[None]:
    """Inside the block every slot that ``model`` writes is the zero vector."""

    def zero(module: torch.nn.Module, arguments: tuple, output: tuple) -> tuple:
        slots, *states = output
        return torch.zeros_like(slots), *states

    handle = model.memory.ssm.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class FrozenState:
    """Where a document stands, and the state whose memory it keeps; None: it has not come so far."""

    state: SMTState
    held: SMTState | None

    def rows(self, index: Tensor) -> FrozenState:
        """The rows that ``index`` names."""
        return FrozenState(self.state.rows(index), None if self.held is None else self.held.rows(index))


class FrozenWrites:
    """Runs a model whose memory changes no more once ``after`` tokens have been read; an ``Encode`` of ``SMTScorer``.

    Windows count writes by steps. So the writes that would follow are made, and after each of them the state gets its old
    memory back, as if the slots that it had were the newest ones.

    Raises:
        ValueError: ``after`` is so early that the window has free slots, which later steps would count as written.
    """

    def __init__(self, model: StrideMemoryTransformer, after: int) -> None:
        config = model.config
        if config.window.writes_made(after) < config.n_ssm_outputs:
            least = config.window.write_step(config.n_ssm_outputs - 1) + 1
            raise ValueError(f"after must be at least {least}, when all {config.n_ssm_outputs} slots exist, got {after}")
        self.model, self.after = model, after

    def __call__(self, input_ids: Tensor, state: FrozenState | None) -> tuple[Tensor, FrozenState]:
        """input_ids (B, T), rows at one step -> hidden (B, T, d) and the state after them."""
        model, batch = self.model, input_ids.shape[0]
        state = state or FrozenState(model.initial_state(batch), None)
        hidden = []
        while input_ids.shape[1]:
            step = state.state.step
            width = min(input_ids.shape[1], self._next_write(step) - step if step >= self.after else self.after - step)
            piece, input_ids = input_ids[:, :width], input_ids[:, width:]
            encoded = encode_chunk(
                model.memory,
                model.decoder,
                model.embedding(piece),
                state.state,
                [width] * batch,
                keep_keys=False,
                return_weights=False,
            )
            hidden.append(encoded.hidden)
            state = self._frozen(encoded.state, state.held)
        return torch.cat(hidden, dim=1), state

    def _next_write(self, step: int) -> int:
        """How many tokens have been read after the next write."""
        window = self.model.config.window
        return window.write_step(window.writes_made(step)) + 1

    def _frozen(self, state: SMTState, held: SMTState | None) -> FrozenState:
        if state.step < self.after:
            return FrozenState(state, None)
        if held is None:
            return FrozenState(state, state)
        made = self.model.config.window.writes_made
        later = made(state.step) - made(held.step)
        kv_slots = state.kv_slots
        if self.model.config.encoding == "stream":  # elsewhere the layers keep slots for decoding alone
            kv_slots = held.kv_slots.roll(later, dims=3)
        slots = held.slots.roll(later, dims=1)
        return FrozenState(replace(state, slots=slots, conv=held.conv, ssm=held.ssm, kv_slots=kv_slots), held)


def _losses(config: SMTConfig, scores: Sequence[TokenScores]) -> Ablation:
    near, far = config.m_input_tokens + 1, slot_reach(config) + 1
    return Ablation(
        window=mean_between(scores, 1, near),
        slots=mean_between(scores, near, far),
        beyond=mean_between(scores, far),
        all=mean_between(scores, 1),
    )
