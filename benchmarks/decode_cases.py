"""What is compared in decoding: the three encodings, Hugging Face's GPT-2 with a KV cache, and Hugging Face's Mamba.

All have the decoder of one configuration: GPT-2 its blocks, the Mamba twice as many layers, which hold as many weights. Weights
are random. Calls decode ``stride`` tokens in a row, so that each contains one write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Case, Unavailable
from names import CACHE, MAMBA, STATIC_CACHE
from torch import Tensor

from smt import SMTConfig, SMTState, StrideMemoryTransformer
from smt.baselines.gpt2 import build_gpt2
from smt.model.cost import gpt2_training_cost, kv_cache_floats

ENCODINGS = ("stream", "stride", "token")


@dataclass(frozen=True)
class Made:
    """How a case came to a context: the bytes it carries there, and a remark where the past is not one that it has read."""

    state_bytes: int
    remark: str | None = None


class DecodeCases:
    """The cases of one batch size; ``made`` tells of each (case, context) that was prepared.

    Args:
        longest: the longest context.
        max_prefill: tokens that are read at most to come to a context; a state constant in size is then moved on from there.
        max_bytes: KV caches above this are not built.
    """

    def __init__(
        self, config: SMTConfig, batch: int, longest: int, *, max_prefill: int, max_bytes: float, device: torch.device
    ) -> None:
        self.config, self.batch, self.device = config, batch, device
        self.max_prefill, self.max_bytes = max_prefill, max_bytes
        self.made: dict[tuple[str, int], Made] = {}
        self.models = {
            encoding: StrideMemoryTransformer(dataclasses.replace(config, encoding=encoding)).to(device).eval()
            for encoding in ENCODINGS
        }
        self.gpt2 = build_gpt2(config, n_positions=longest + config.stride).to(device).eval()
        self.mamba = _build_mamba(config).to(device).eval()

    def decoding(self) -> list[Case]:
        """``stride`` tokens per call, at a context; the first case is the baseline."""

        def gpt2(context):  # only to predict the next context's time
            return 1e4 + context

        return [
            Case(CACHE, self._dynamic, gpt2, calibrate=False),
            Case(STATIC_CACHE, self._static, gpt2, calibrate=False),
            Case(MAMBA, self._mamba, _constant, calibrate=False),
            *self.ours(),
        ]

    def ours(self) -> list[Case]:
        """Our part of ``decoding``."""
        return [
            Case(
                f"SMT {encoding}", lambda context, encoding=encoding: self._ours(encoding, context), _constant, calibrate=False
            )
            for encoding in ENCODINGS
        ]

    def prefill(self) -> list[Case]:
        """All tokens of a context in one call, and the logits of the last."""

        def linear(length):
            return length

        def quadratic(length):
            return length * gpt2_training_cost(self.config, length).total

        def gpt2(ids):
            return self.gpt2(ids, use_cache=True, logits_to_keep=1)

        cases = [Case(CACHE, lambda length: self._reading(gpt2, length), quadratic)]
        for encoding, model in self.models.items():

            def read(ids, model=model):
                return model(ids, last_only=True)

            cases.append(Case(f"SMT {encoding}", lambda length, read=read: self._reading(read, length), linear))
        return cases

    def _ours(self, encoding: str, context: int) -> Callable[[], object]:
        model, (state, remark) = self.models[encoding], self.state_at(encoding, context)
        self._note(f"SMT {encoding}", context, state.n_bytes(), remark)
        token = self._tokens(1)

        def step(state: SMTState) -> SMTState:
            return model(token, state, last_only=True, overwrite_state=True)[1].state

        @torch.no_grad()
        def call() -> None:
            carried = state.clone()
            for _ in range(self.config.stride):
                carried = step(carried)

        return call

    def state_at(self, encoding: str, context: int) -> tuple[SMTState, str | None]:
        """A state at the step ``context``, and how it came there where not all of that was read."""
        read, remark = context, None
        if context > self.max_prefill:
            read = self.max_prefill - (self.max_prefill - context) % self.config.stride
            remark = f"state after {read:,} tokens, moved on"
        with torch.no_grad():
            state = self.models[encoding](self._tokens(read), last_only=True)[1].state
        return SMTState.from_tensors(state.config, (context,) * self.batch, state.tensors()), remark

    def _dynamic(self, context: int) -> Callable[[], object]:
        from transformers import DynamicCache

        cache = DynamicCache()
        self._fill(CACHE, cache, context)
        return self._gpt2_call(cache, lambda: cache.crop(-self.config.stride))

    def _static(self, context: int) -> Callable[[], object]:
        from transformers import StaticCache

        cache = StaticCache(config=self.gpt2.config, max_cache_len=context + self.config.stride)
        self._fill(STATIC_CACHE, cache, context)

        def rewind() -> None:
            for layer in cache.layers:
                if hasattr(layer, "cumulative_length"):  # older releases count what is not zero
                    layer.cumulative_length.fill_(context)
                else:
                    layer.keys[:, :, context:] = 0.0

        return self._gpt2_call(cache, rewind)

    def _gpt2_call(self, cache: object, rewind: Callable[[], None]) -> Callable[[], object]:
        token = self._tokens(1)

        @torch.no_grad()
        def call() -> None:
            for _ in range(self.config.stride):
                self.gpt2(token, past_key_values=cache, use_cache=True)
            rewind()

        return call

    def _fill(self, case: str, cache: object, context: int) -> None:
        """Random keys and values instead of a prefill, whose time is quadratic."""
        size = 4 * self.batch * kv_cache_floats(self.config) * context
        if size > self.max_bytes:
            raise Unavailable(f"a KV cache of {size / 2**30:.1f} GiB > {self.max_bytes / 2**30:g} GiB, not built")
        shape = self.batch, self.config.transformer_n_heads, context, self.config.head_dim
        for layer in range(self.config.transformer_n_layers):
            cache.update(*(torch.randn(shape, device=self.device) for _ in range(2)), layer)
        self._note(case, context, size, "cache of random keys and values")

    def _mamba(self, context: int) -> Callable[[], object]:
        with torch.no_grad():
            cache = self.mamba(self._tokens(2 * self.config.ssm_d_conv), use_cache=True).cache_params
        if hasattr(cache, "layers"):
            kinds = [getattr(layer, kind) for layer in cache.layers for kind in ("conv_states", "recurrent_states")]
            states, settings = [state for kind in kinds for state in kind.values()], {}
        else:  # older releases have a cache of Mamba's own, and want to know that it is full
            states = [*cache.conv_states, *cache.ssm_states]
            settings = {"cache_position": torch.tensor([2 * self.config.ssm_d_conv], device=self.device)}
        self._note(MAMBA, context, sum(state.nbytes for state in states), "state after a few tokens")
        token = self._tokens(1)

        @torch.no_grad()
        def call() -> None:
            for _ in range(self.config.stride):
                self.mamba(token, cache_params=cache, use_cache=True, **settings)

        return call

    def _reading(self, read: Callable[[Tensor], object], length: int) -> Callable[[], object]:
        ids = self._tokens(length)
        return torch.no_grad()(lambda: read(ids))

    def _tokens(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self.config.vocab_size, (self.batch, length), generator=generator).to(self.device)

    def _note(self, case: str, context: int, state_bytes: int, remark: str | None) -> None:
        self.made[case, context] = Made(state_bytes, remark)


def _build_mamba(config: SMTConfig) -> torch.nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=2 * config.transformer_n_layers,
            state_size=config.ssm_d_state,
            conv_kernel=config.ssm_d_conv,
            expand=config.ssm_expand_factor,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def _constant(context: int) -> float:
    return 1.0
