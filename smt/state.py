"""What a model carries from one call to the next: constant in size, whatever the length of the past."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smt.config import SMTConfig

# The fields of a configuration that give the state its shape or its meaning.
_BINDING = (
    *("d_model", "transformer_n_layers", "transformer_n_heads", "transformer_n_kv_heads"),
    *("n_ssm_outputs", "m_input_tokens", "stride", "encoding", "empty_slots", "pool_source", "write_group", "writes"),
    *("ssm_n_layers", "ssm_d_state", "ssm_d_conv", "ssm_expand_factor"),
)


@dataclass(frozen=True)
class KeyValues:
    """Keys and values that one decoder layer keeps in ``stream``, each half right-aligned like the window itself.

    token_k, token_v: (B, m, H_kv, D); slot_k, slot_v: (B, n, H_kv, D).
    """

    token_k: Tensor
    token_v: Tensor
    slot_k: Tensor
    slot_v: Tensor


@dataclass(frozen=True)
class SMTState:
    """A value: passing it to a model does not change it. All buffers are right-aligned; entries that do not exist are zero.

    Attributes:
        config: the configuration it belongs to.
        steps: tokens seen so far, one count per row.
        tokens: (B, m, d) embeddings of the last m tokens.
        slots: (B, n + G - 1, d) the last slots.
        conv: per Mamba layer, (B, E, C - 1) the last inputs of its convolution.
        ssm: per Mamba layer, (B, E, N) its SSM state.
        layers: per decoder layer its keys and values in ``stream``; empty in the other encodings.
    """

    config: SMTConfig
    steps: tuple[int, ...]
    tokens: Tensor
    slots: Tensor
    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]
    layers: tuple[KeyValues, ...] = ()

    @classmethod
    def initial(cls, config: SMTConfig, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> SMTState:
        """The state before the first token: all zeros. The SSM state is fp32 at least."""
        zeros = lambda *shape, dtype=dtype: torch.zeros(batch_size, *shape, device=device, dtype=dtype)  # noqa: E731
        ssm_dtype = torch.promote_types(dtype, torch.float32)
        layers = ()
        if config.encoding == "stream":
            tokens = (config.m_input_tokens, config.n_kv_heads, config.head_dim)
            slots = (config.n_ssm_outputs, config.n_kv_heads, config.head_dim)
            shapes = tokens, tokens, slots, slots
            layers = tuple(KeyValues(*(zeros(*shape) for shape in shapes)) for _ in range(config.transformer_n_layers))
        return cls(
            config=config,
            steps=(0,) * batch_size,
            tokens=zeros(config.m_input_tokens, config.d_model),
            slots=zeros(config.n_state_slots, config.d_model),
            conv=tuple(zeros(config.ssm_d_inner, config.ssm_d_conv - 1) for _ in range(config.ssm_n_layers)),
            ssm=tuple(zeros(config.ssm_d_inner, config.ssm_d_state, dtype=ssm_dtype) for _ in range(config.ssm_n_layers)),
            layers=layers,
        )

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

    def to(self, *args: object, **kwargs: object) -> SMTState:
        """Every tensor moved as by ``Tensor.to``."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def rows(self, index: Tensor) -> SMTState:
        """The rows that ``index`` (int64) names, in that order; a row may come several times (beam search)."""
        chosen = self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        return replace(chosen, steps=tuple(self.steps[row] for row in index.tolist()))

    def n_bytes(self) -> int:
        """Bytes that the tensors hold."""
        kept = [tensor for kv in self.layers for tensor in (kv.token_k, kv.token_v, kv.slot_k, kv.slot_v)]
        return sum(tensor.nbytes for tensor in (self.tokens, self.slots, *self.conv, *self.ssm, *kept))

    def check(self, config: SMTConfig, batch_size: int) -> None:
        """Raise ValueError unless this is a state of ``batch_size`` rows of a model with ``config``."""
        for name in _BINDING:
            mine, theirs = getattr(self.config, name), getattr(config, name)
            if mine != theirs:
                raise ValueError(f"state belongs to a model with {name} = {mine!r}, this one has {theirs!r}")
        if self.batch_size != batch_size:
            raise ValueError(f"state has {self.batch_size} rows, input_ids has {batch_size}")

    def _map(self, function: Callable[[Tensor], Tensor]) -> SMTState:
        layers = tuple(
            KeyValues(*(function(tensor) for tensor in (kv.token_k, kv.token_v, kv.slot_k, kv.slot_v))) for kv in self.layers
        )
        return replace(
            self,
            tokens=function(self.tokens),
            slots=function(self.slots),
            conv=tuple(map(function, self.conv)),
            ssm=tuple(map(function, self.ssm)),
            layers=layers,
        )


def keep_last(held: Tensor, size: int) -> Tensor:
    """The last ``size`` entries of ``held`` (B, L, ...) along dimension 1, zeros in front where there are fewer."""
    missing = size - held.shape[1]
    if missing <= 0:
        return held[:, -missing:]
    return torch.cat([held.new_zeros(held.shape[0], missing, *held.shape[2:]), held], dim=1)
