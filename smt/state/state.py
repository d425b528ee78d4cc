"""What a model carries from one call to the next: constant in size, whatever the length of the past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from smt.config import SMTConfig
from smt.state.file import read_state, write_state
from smt.state.layout import KeyValues, state_shapes

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
    and slot w at w % (n + G - 1).

    Attributes:
        config: the configuration it belongs to.
        steps: tokens seen so far, one count per row.
        tokens: (B, m, d), ring of the embeddings of the last m tokens; zeros before the first.
        slots: (B, n + G - 1, d), ring of the last slots; zeros before the first.
        conv: per Mamba layer, (B, E, C - 1) the last inputs of its convolution.
        ssm: per Mamba layer, (B, E, N) its SSM state.
        layers: what each decoder layer keeps.
    """

    config: SMTConfig
    steps: tuple[int, ...]
    tokens: Tensor
    slots: Tensor
    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]
    layers: tuple[KeyValues, ...]

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
            name: torch.zeros(batch_size, *shape, device=device, dtype=dtypes[_kind(name)])
            for name, shape in state_shapes(config).items()
        }
        return cls.from_tensors(config, (0,) * batch_size, tensors)

    @classmethod
    def from_tensors(cls, config: SMTConfig, steps: Sequence[int], tensors: dict[str, Tensor]) -> SMTState:
        """The inverse of ``tensors``."""
        kept = KeyValues.__dataclass_fields__
        layers = range(config.transformer_n_layers)
        return cls(
            config=config,
            steps=tuple(steps),
            tokens=tensors["tokens"],
            slots=tensors["slots"],
            conv=tuple(tensors[f"conv.{index}"] for index in range(config.ssm_n_layers)),
            ssm=tuple(tensors[f"ssm.{index}"] for index in range(config.ssm_n_layers)),
            layers=tuple(KeyValues(**{name: tensors[f"layers.{index}.{name}"] for name in kept}) for index in layers),
        )

    @staticmethod
    def size_in_bytes(
        config: SMTConfig, batch_size: int, dtype: torch.dtype, attention_dtype: torch.dtype | None = None
    ) -> int:
        """What ``n_bytes`` gives for every state of these sizes, at any step."""
        dtypes = _dtypes(dtype, attention_dtype)
        return sum(batch_size * prod(shape) * dtypes[_kind(name)].itemsize for name, shape in state_shapes(config).items())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: ``tokens``, ``slots``, ``conv.0``, ..., ``ssm.0``, ..., ``layers.0.token_k``, ..."""
        named = {"tokens": self.tokens, "slots": self.slots}
        for kind in ("conv", "ssm"):
            named.update((f"{kind}.{index}", tensor) for index, tensor in enumerate(getattr(self, kind)))
        for index, layer in enumerate(self.layers):
            named.update((f"layers.{index}.{name}", tensor) for name, tensor in layer.tensors().items())
        return named

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

    def detach(self) -> SMTState:
        """The same values with no gradient history (truncated backpropagation through time)."""
        return self._map(Tensor.detach)

    def clone(self) -> SMTState:
        """A copy in tensors of its own."""
        return self._map(Tensor.clone)

    def to(self, *args: object, **kwargs: object) -> SMTState:
        """Every tensor moved as by ``Tensor.to``; SSM states stay in fp32 at least."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()}
        for name, tensor in self.tensors().items():
            if _kind(name) == "ssm":
                wide = torch.promote_types(moved[name].dtype, torch.float32)
                moved[name] = tensor.to(moved[name].device, wide)
        return self.from_tensors(self.config, self.steps, moved)

    def in_dtype(self, dtype: torch.dtype) -> SMTState:
        """As a model of another dtype has it; keys and values that autocast has left in a dtype of their own stay in it."""
        moved = self.to(dtype)
        return moved if self.layers[0].slot_k.dtype == self.tokens.dtype else replace(moved, layers=self.layers)

    def cast_like(self, other: SMTState) -> SMTState:
        """Every tensor in the dtype that it has in ``other``."""
        wanted = other.tensors()
        cast = {name: tensor.to(wanted[name].dtype) for name, tensor in self.tensors().items()}
        return self.from_tensors(self.config, self.steps, cast)

    def rows(self, index: Tensor | Sequence[int]) -> SMTState:
        """The rows that ``index`` (int64) names, in that order; a row may come several times (beam search)."""
        index = torch.as_tensor(index)
        here = index.to(self.tokens.device)  # once: each copy to a GPU waits for it
        chosen = self._map(lambda tensor: tensor.index_select(0, here))
        return replace(chosen, steps=tuple(self.steps[row] for row in index.tolist()))

    def overwrite_rows(self, index: Sequence[int], rows: SMTState) -> SMTState:
        """This state with the rows ``index`` replaced by ``rows``, in the same tensors."""
        where = torch.tensor(index, device=self.tokens.device)
        theirs = rows.tensors()
        written = {name: tensor.index_copy_(0, where, theirs[name]) for name, tensor in self.tensors().items()}
        steps = list(self.steps)
        for row, step in zip(index, rows.steps, strict=True):
            steps[row] = step
        return self.from_tensors(self.config, steps, written)

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
        parts = [state.tensors() for state in states]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return SMTState.from_tensors(states[0].config, [step for state in states for step in state.steps], joined)

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

    def _map(self, function: Callable[[Tensor], Tensor]) -> SMTState:
        return self.from_tensors(self.config, self.steps, {name: function(tensor) for name, tensor in self.tensors().items()})


def _kind(name: str) -> str:
    return name.split(".")[0]


def _dtypes(dtype: torch.dtype, attention_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    wide = torch.promote_types(dtype, torch.float32)
    return {"tokens": dtype, "slots": dtype, "conv": dtype, "ssm": wide, "layers": attention_dtype or dtype}
