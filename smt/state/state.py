"""What a model carries from one call to the next: constant in size, whatever the length of the past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from smt.config import SMTConfig
from smt.runtime.device import from_host
from smt.state.file import read_state, write_state
from smt.state.layout import KEYS_AND_VALUES, ROWS, misfit, state_shapes, without_entries
from smt_kernels.operators import is_transformed

# The fields of a configuration that give the state its shape or its meaning.
_BINDING = (
    *("d_model", "transformer_n_layers", "transformer_n_heads", "transformer_n_kv_heads", "rope_theta"),
    *("n_ssm_outputs", "m_input_tokens", "stride", "encoding", "empty_slots", "pool_source", "write_group", "writes"),
    *("ssm_n_layers", "ssm_d_state", "ssm_d_conv", "ssm_expand_factor"),
)


@dataclass(frozen=True, eq=False)
class SMTState:
    """A value: passing it to a model does not change it, unless the call is told ``overwrite_state=True``.

    Rows are independent and may have come to different steps. Rings (``smt.state.rings``) hold the step t of a token at t % m
    and slot w at w % (n + G - 1). The L decoder layers and M Mamba layers lie one behind the other in one tensor of each kind.

    Attributes:
        config: the configuration it belongs to.
        steps: tokens seen so far, one count per row.
        device_steps: (B,) int64, the same where the tensors are, so that nothing need be copied there at any step.
        tokens: (B, m, d), ring of the embeddings of the last m tokens; zeros before the first.
        slots: (B, n + G - 1, d), ring of the last slots; zeros before the first.
        conv: (M, B, E, C - 1), the last inputs of each Mamba layer's convolution.
        ssm: (M, B, E, N), each one's SSM state.
        kv_tokens: (L, 2, B, m, H_kv, D), keys and values that each decoder layer keeps of tokens. In ``stream`` a ring of the
            last ones; in ``stride`` those of the block's window from its first existing one on; in ``token`` none, m = 0.
        kv_slots: (L, 2, B, n, H_kv, D), those of slots. In ``stream`` a ring; in ``stride`` the slots that the block sees,
            oldest first; in ``token`` the same, right-aligned as in the window.

    What stands at entries that do not exist is never attended. ``stride`` and ``token`` need keys and values for single steps
    alone; training does not form them (``has_keys``), and the first such step then does.
    """

    config: SMTConfig
    steps: tuple[int, ...]
    device_steps: Tensor
    tokens: Tensor
    slots: Tensor
    conv: Tensor
    ssm: Tensor
    kv_tokens: Tensor
    kv_slots: Tensor

    @classmethod
    def initial(
        cls,
        config: SMTConfig,
        batch_size: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        attention_dtype: torch.dtype | None = None,
    ) -> SMTState:
        """The state before the first token: all zeros. The SSM state is fp32 at least.

        Args:
            attention_dtype: of the decoder's keys and values; None: ``dtype``.
        """
        dtypes = _dtypes(dtype, attention_dtype)
        tensors = {
            name: torch.zeros(shape.of(batch_size), device=device, dtype=dtypes[name])
            for name, shape in state_shapes(config).items()
        }
        device_steps = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(config=config, steps=(0,) * batch_size, device_steps=device_steps, **tensors)

    @classmethod
    def from_tensors(cls, config: SMTConfig, steps: Sequence[int], tensors: dict[str, Tensor]) -> SMTState:
        """The inverse of ``tensors``.

        Raises:
            ValueError: they are not those that ``config`` and ``steps`` want.
        """
        wrong = misfit(config, len(steps), tensors)
        if wrong is not None:
            raise ValueError(f"the tensors of a state: {wrong}")
        device = tensors["tokens"].device
        if len(set(steps)) == 1:  # filled in there; a list would be copied
            device_steps = torch.full((len(steps),), steps[0], dtype=torch.int64, device=device)
        else:
            device_steps = from_host(list(steps), device)
        return cls(config=config, steps=tuple(steps), device_steps=device_steps, **tensors)

    @staticmethod
    def size_in_bytes(
        config: SMTConfig, batch_size: int, dtype: torch.dtype, attention_dtype: torch.dtype | None = None
    ) -> int:
        """What ``n_bytes`` gives for every state of these sizes, at any step, if it ``has_keys``."""
        dtypes = _dtypes(dtype, attention_dtype)
        return sum(prod(shape.of(batch_size)) * dtypes[name].itemsize for name, shape in state_shapes(config).items())

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered, by name: ``tokens``, ``slots``, ``conv``, ``ssm``, ``kv_tokens``, ``kv_slots``."""
        return {name: getattr(self, name) for name in ROWS}

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.steps)

    @property
    def step(self) -> int:
        """The step of the next token, when all rows are at the same one.

        Raises:
            ValueError: the rows are at different steps.
        """
        if len(set(self.steps)) != 1:
            raise ValueError(f"the rows of state must be at the same step, got steps {self.steps}")
        return self.steps[0]

    @property
    def has_keys(self) -> bool:
        """Whether the keys and values that single steps go on from have been formed."""
        shapes = state_shapes(self.config)
        return all(getattr(self, name).shape == shapes[name].of(self.batch_size) for name in KEYS_AND_VALUES)

    def without_keys(self) -> SMTState:
        """The same without them (``stride`` and ``token``)."""
        shapes = state_shapes(self.config)
        empty = {
            name: getattr(self, name).new_empty(without_entries(shapes[name]).of(self.batch_size)) for name in KEYS_AND_VALUES
        }
        return replace(self, **empty)

    def detach(self) -> SMTState:
        """The same values with no gradient history (truncated backpropagation through time)."""
        return self._map(lambda name, tensor: tensor.detach())

    def clone(self) -> SMTState:
        """A copy in tensors of its own."""
        return self._map(lambda name, tensor: tensor.clone())

    def to(self, *args: object, **kwargs: object) -> SMTState:
        """Every tensor moved as by ``Tensor.to``; SSM states stay in fp32 at least."""

        def moved(name: str, tensor: Tensor) -> Tensor:
            there = tensor.to(*args, **kwargs)
            if not there.is_floating_point():
                raise TypeError(f"a state is of a floating dtype, got {there.dtype}")
            if name != "ssm" or there.dtype.itemsize >= torch.float32.itemsize:
                return there
            return tensor.to(there.device, torch.float32)  # not from ``there``, which has lost digits

        state = self._map(moved)
        return replace(state, device_steps=self.device_steps.to(state.tokens.device))

    def in_dtype(self, dtype: torch.dtype) -> SMTState:
        """As a model of another dtype has it; keys and values that autocast has left in a dtype of their own stay in it."""
        moved = self.to(dtype)
        if self.kv_slots.dtype == self.tokens.dtype:
            return moved
        return replace(moved, kv_tokens=self.kv_tokens, kv_slots=self.kv_slots)

    def cast_like(self, other: SMTState) -> SMTState:
        """Every tensor in the dtype that it has in ``other``."""
        return self._map(lambda name, tensor: tensor.to(getattr(other, name).dtype))

    def rows(self, index: Tensor | Sequence[int]) -> SMTState:
        """The rows that ``index`` (int64, at least one) names, in that order; a row may come several times (beam search).

        Raises:
            ValueError: it names none.
        """
        if not len(index):
            raise ValueError("index must name a row, a state has at least one")
        here = index.to(self.tokens.device) if isinstance(index, Tensor) else from_host(index, self.tokens.device)
        chosen = self._map(lambda name, tensor: tensor.index_select(ROWS[name], here))
        alike = len(set(self.steps)) == 1  # and nothing to read from the device
        steps = (
            self.steps[:1] * len(index)
            if alike
            else tuple(self.steps[row] for row in (index.tolist() if isinstance(index, Tensor) else index))
        )
        return replace(chosen, steps=steps, device_steps=self.device_steps.index_select(0, here))

    def overwrite_rows(self, index: Sequence[int], rows: SMTState) -> SMTState:
        """This state with the rows ``index`` replaced by ``rows``, in the same tensors."""
        where = from_host(index, self.tokens.device)
        copy = Tensor.index_copy if is_transformed() else Tensor.index_copy_  # what vmap maps over fits in no tensor of one row
        written = self._map(lambda name, tensor: copy(tensor, ROWS[name], where, getattr(rows, name)))
        steps = list(self.steps)
        for row, step in zip(index, rows.steps, strict=True):
            steps[row] = step
        return replace(written, steps=tuple(steps), device_steps=self.device_steps.index_copy(0, where, rows.device_steps))

    @staticmethod
    def join(states: Sequence[SMTState]) -> SMTState:
        """The rows of several states of one configuration as one batch.

        Raises:
            ValueError: no state, or states of different configurations.
        """
        if not states:
            raise ValueError("join needs at least one state")
        for state in states[1:]:
            state.check(states[0].config, state.batch_size)
        if not all(state.has_keys for state in states):
            states = [state.without_keys() for state in states]
        joined = states[0]._map(lambda name, _: torch.cat([getattr(state, name) for state in states], dim=ROWS[name]))
        return replace(
            joined,
            steps=tuple(step for state in states for step in state.steps),
            device_steps=torch.cat([state.device_steps for state in states]),
        )

    def is_inference(self) -> bool:
        """Whether some of the tensors are of inference mode."""
        return any(tensor.is_inference() for tensor in self.tensors().values())

    def n_bytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def save(self, path: str | Path) -> None:
        """Write a file that ``load`` reads: see ``smt.state.file``."""
        write_state(path, self.config, self.steps, self.tensors())

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> SMTState:
        """Read what ``save`` wrote: see ``smt.state.file.read_state``."""
        return SMTState.from_tensors(*read_state(path, device))

    def check(self, config: SMTConfig, batch_size: int) -> None:
        """Raise ValueError unless this is a state of ``batch_size`` rows of a model with ``config``."""
        if self.config is not config:
            for name in _BINDING:
                mine, theirs = getattr(self.config, name), getattr(config, name)
                if mine != theirs:
                    raise ValueError(f"state belongs to a model with {name} = {mine!r}, this one has {theirs!r}")
        if self.batch_size != batch_size:
            raise ValueError(f"state has {self.batch_size} rows, input_ids has {batch_size}")

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> SMTState:
        return replace(self, **{name: function(name, tensor) for name, tensor in self.tensors().items()})


def _dtypes(dtype: torch.dtype, attention_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    attention_dtype = attention_dtype or dtype
    wide = torch.promote_types(dtype, torch.float32)
    own = {"ssm": wide, "kv_tokens": attention_dtype, "kv_slots": attention_dtype}
    return {name: own.get(name, dtype) for name in ROWS}
