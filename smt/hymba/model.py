"""Hymba: meta tokens and tokens go through the same layers, and of the tokens alone the head tells what follows.

Meta tokens come first and see nothing of a text. So what they become is the same for every sequence: they are run once, in a
pass of their own of one row, and what they leave in each layer is the state that every sequence begins with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smt.hymba.attention import KeysAndValues
from smt.hymba.cache import HymbaCache, valid_counts
from smt.hymba.config import HymbaConfig
from smt.hymba.layers import NORM_EPS, HymbaLayer
from smt.hymba.output import HymbaOutput
from smt.hymba.passes import Held, sequence_layer, step_layer
from smt.model.batch import check_targets, check_tokens, token_counts
from smt.model.checkpoint import load_model, save_model
from smt.model.evaluating import evaluating
from smt.model.generation import NextLogits, generate, stream
from smt.model.graphs import of_one_shape
from smt.model.loss import head_loss
from smt.model.mamba import MambaMixer
from smt.model.parameters import count_parameters
from smt.model.rms_norm import RMSNorm
from smt.model.rotary import rotation
from smt.model.weights import rows_of
from smt.runtime.precision import dtype_of_products
from smt.state.rings import take

# Of one function, at most, when a model is compiled.
PROGRAMS = 32


class MetaTokens(nn.Module):
    """Learned vectors, (M, d), that stand before every sequence."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_meta_tokens, config.d_model))


class Hymba(nn.Module):
    """A decoder of attention and Mamba in one of six layouts; ``model.embedding`` is tied to the output head.

    Args:
        config: layout and sizes.
    """

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        if not isinstance(config, HymbaConfig):
            raise TypeError(f"config must be a HymbaConfig, got {type(config).__name__}")
        self.config, self.plans = config, config.layers()
        self.read_by_others = {first for first, *_ in config.get_kv_sharing_groups()}
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.meta_tokens = MetaTokens(config) if config.n_meta_tokens else None
        self.layers = nn.ModuleList(HymbaLayer(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self._compiled: Callable[..., Any] | None = None
        for learned in self._vectors():
            nn.init.normal_(learned.weight, std=config.initializer_std)
        for layer in self.layers:
            layer.initialise(config.initializer_std, config.n_layers)

    def forward(
        self,
        input_ids: Tensor,
        *,
        targets: Tensor | None = None,
        n_valid: Tensor | None = None,
        cache: HymbaCache | None = None,
    ) -> HymbaOutput:
        """Next-token logits of every step, and their loss; each row gives what it gives alone.

        Args:
            input_ids: (B, T) integer tokens; on CPU their range is checked, and that of targets.
            targets: (B, T) integers, the token that should follow each step, or -100 to leave it out.
            n_valid: (B,) integers in 0..T, how many tokens of each row are not padding on its right. Only a cache asks for it:
                without one no step sees what is behind it.
            cache: what came before, which takes these tokens in; without gradients, and not in training mode. Rows of
                different lengths take one token each; several go to rows that are all of one length, as new ones are.

        Returns:
            a mapping: ``logits`` (B, T, V), and with targets ``loss``, their mean cross-entropy in nats.

        Raises:
            TypeError: input_ids or n_valid is no tensor of integers.
            ValueError: wrong rank or shape, an empty batch, another device, a token, target or count out of range, a cache of
                another model or batch size, or a call that a cache does not take.
        """
        if targets is not None:
            check_targets("targets", targets, input_ids, self.config.vocab_size)
        hidden = self.hidden(input_ids, n_valid=n_valid, cache=cache)
        weight = self.head()
        return HymbaOutput(hidden, weight, None if targets is None else head_loss(hidden, weight, targets))

    def hidden(self, input_ids: Tensor, *, n_valid: Tensor | None = None, cache: HymbaCache | None = None) -> Tensor:
        """Hidden states (B, T, d) after the final norm, before the head; arguments and errors as in ``forward``."""
        check_tokens(input_ids, self.config.vocab_size, self.embedding.weight.device)
        batch, length = input_ids.shape
        if cache is None:
            if n_valid is not None:
                raise ValueError("n_valid is for a cache: without one no step sees the padding on its right")
            metas, held = self.before(batch)
            x, _ = self.through(self.embedding(input_ids), 0, held, metas)
            return self.norm(x)
        counts = self._check_call(input_ids, n_valid, cache)
        cache.make_writable()
        if length == 1 and counts == (1,) * batch:
            return self.norm(self._step(self.embedding(input_ids), cache))
        gate = None
        if min(counts) < length:
            device = input_ids.device
            gate = torch.arange(length, device=device) < torch.tensor(counts, device=device)[:, None]
        metas = [layer.metas for layer in cache.layers]
        held = [cache.held(index) for index in range(len(self.layers))]
        x, left = self.through(self.embedding(input_ids), cache.lengths[0], held, metas, gate, keep=True)
        cache.keep(left, length, counts)
        return self.norm(x)

    def head(self) -> Tensor:
        """The matrix (V, d) of the head, which is the embedding, adapters included."""
        return rows_of(self.embedding, self.config.vocab_size)

    def before(self, batch_size: int) -> tuple[list[KeysAndValues | None], list[Held]]:
        """The meta tokens' keys and values in each layer, (1, M, ...), and what layers hold before the first token of rows."""
        metas, states = zip(*self.begin(), strict=True)
        expanded = (tuple(part if part is None else part.expand(batch_size, -1, -1) for part in state) for state in states)
        return list(metas), [Held(None, state) for state in expanded]

    def begin(self) -> list[Held]:
        """What the meta tokens leave in each layer, of one row: what every sequence begins with."""
        config, weight = self.config, self.embedding.weight
        dtype = dtype_of_products(weight)
        shapes = (config.ssm_d_conv - 1, dtype), (config.ssm_d_state, torch.promote_types(dtype, torch.float32))
        zeros = tuple(weight.new_zeros(1, config.ssm_d_inner, size, dtype=dtype) for size, dtype in shapes)
        empty = [Held(None, zeros if plan.mamba else (None, None)) for plan in self.plans]
        if self.meta_tokens is not None:
            return self.through(self.meta_tokens.weight[None], -config.n_meta_tokens, empty, None, keep=True)[1]
        makers = [index for index, plan in enumerate(self.plans) if plan.kv_source == index]
        for index in makers:
            no_keys = weight.new_zeros(1, 0, config.kv_heads, config.head_dim, dtype=dtype)
            n_pieces = config.head_counts(index)[2] // config.kv_heads
            empty[index] = empty[index]._replace(tokens=(no_keys, no_keys[..., None, :].expand(-1, -1, -1, n_pieces, -1)))
        return empty

    def through(
        self,
        x: Tensor,
        first: int,
        held: Sequence[Held],
        metas: Sequence[KeysAndValues | None] | None,
        gate: Tensor | None = None,
        *,
        keep: bool = False,
        n_layers: int | None = None,
    ) -> tuple[Tensor, list[Held | None]]:
        """Run embeddings x (B, T, d) through the first ``n_layers``: what they become, and what each layer holds then.

        Args:
            first: which token of their rows the first of them is, below 0 a meta token.
            held: what each layer holds of what came before.
            metas: keys and values of the meta tokens in each layer; None: x are these, and see each other in every layer.
            gate: (B, T), which of them SSMs take; None: all.
            keep: return all that layers hold, instead of what other layers read alone.
        """
        config, x = self.config, self.dropout(x)
        positions = config.n_meta_tokens + first + torch.arange(x.shape[1], device=x.device)
        turn = rotation(positions, config.head_dim, config.rope_theta, dtype_of_products(x))
        left: list[Held | None] = []
        for index, (layer, plan) in enumerate(zip(self.layers[:n_layers], self.plans, strict=False)):
            source, shared, seen, window = plan.kv_source, None, None, None
            if source is not None:
                shared = left[source].tokens if source != index else None
                if metas is not None:
                    seen = metas[source]
                    window = config.sliding_window if plan.attention == "local" else None
            x, of_layer = self._run(layer, x, turn, layer.prepare(), held[index], shared, seen, window, gate)
            left.append(of_layer if keep or index in self.read_by_others else None)
        return x, left

    def _run(self, *arguments: Any) -> tuple[Tensor, Held]:
        layer = self._compiled or sequence_layer
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def _step(self, x: Tensor, cache: HymbaCache) -> Tensor:
        """One embedded token per row, (B, 1, d), through all layers, into the cache."""
        config, lengths = self.config, cache.device_lengths
        cache.make_room(max(cache.lengths) + 1)
        turn = rotation(config.n_meta_tokens + lengths, config.head_dim, config.rope_theta, dtype_of_products(x))
        turn = tuple(part[:, None] for part in turn)
        n_metas = torch.full_like(lengths, config.n_meta_tokens, dtype=torch.int32)
        for index, (layer, plan, of_layer) in enumerate(zip(self.layers, self.plans, cache.layers, strict=True)):
            source = cache.layers[index if plan.kv_source is None else plan.kv_source]
            at, count = lengths, lengths + 1
            if source.window is not None:
                at, count = at % source.window, count.clamp(max=source.window)
            places = at, count.int(), n_metas
            x, state = step_layer(
                layer,
                x,
                turn,
                layer.prepare(),
                of_layer.state,
                source.tokens,
                source.metas,
                *places,
                makes=plan.kv_source == index,
            )
            for old, new in zip(of_layer.state, state, strict=True):
                if old is not None:
                    old.copy_(new)
        cache.lengths, cache.device_lengths = tuple(length + 1 for length in cache.lengths), lengths + 1
        return x

    @torch.no_grad()
    def new_cache(self, batch_size: int, n_tokens: int = 0) -> HymbaCache:
        """What rows hold before their first token, for ``forward``; it is of the weights of now.

        Args:
            batch_size: rows.
            n_tokens: how many tokens global layers have room for at first; more make them larger.
        """
        if batch_size < 1 or n_tokens < 0:
            raise ValueError(f"batch_size must be at least 1 and n_tokens at least 0, got {batch_size} and {n_tokens}")
        return HymbaCache.of_metas(self.config, self.begin(), batch_size, n_tokens)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Prompts (B, T) and their continuations, (B, T + new): see ``smt.model.generation.generate``."""
        return generate(*self._generation(input_ids, max_new_tokens), vocab_size=self.config.vocab_size, **options)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """The next tokens (B,) of prompts (B, T), one step at a time: see ``smt.model.generation.stream``."""
        return stream(*self._generation(input_ids, max_new_tokens), vocab_size=self.config.vocab_size, **options)

    def _generation(self, input_ids: Tensor, max_new_tokens: int) -> tuple[NextLogits, Tensor, int]:
        check_tokens(input_ids, self.config.vocab_size, self.embedding.weight.device)
        return partial(self._next_logits, input_ids.shape[1] + max_new_tokens), input_ids, max_new_tokens

    def _next_logits(
        self, room: int, input_ids: Tensor, cache: HymbaCache | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, HymbaCache]:
        """Logits (B, V) of what follows each row, and its cache; prompts are padded on the left, as for every model here."""
        batch, length = input_ids.shape
        with evaluating(self):
            n_valid, last = None, torch.full((batch,), length - 1, device=input_ids.device)
            if cache is None:
                cache = self.new_cache(batch, room)
            if attention_mask is not None:
                n_valid = torch.tensor(token_counts(attention_mask, input_ids), device=input_ids.device)
                position, last = torch.arange(length, device=input_ids.device), n_valid - 1
                input_ids = take(input_ids, position + (length - n_valid)[:, None])
            hidden = self.hidden(input_ids, n_valid=n_valid, cache=cache)
        rows = torch.arange(batch, device=hidden.device)
        return F.linear(hidden[rows, last], self.head()), cache

    def compile(self, **options: Any) -> None:
        """Compile in place what repeats alone: a layer over a sequence, once for all layers of a kind.

        There are up to four kinds, each on meta tokens and on tokens, with gradients and without, and in few lengths: more than
        the compiler makes of one function unless it is told to. Older releases of PyTorch know one limit for all functions of
        the process (``torch._dynamo.config.recompile_limit``): there it is raised, and stays so, as it counts in later calls.

        Args:
            options: of ``torch.compile``; where graphs are recorded, ``dynamic`` is False unless given.
        """
        options = of_one_shape(options)
        limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": limit, **options}
        else:
            torch._dynamo.config.recompile_limit = limit
        self._compiled = torch.compile(sequence_layer, **options)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_compiled": None}  # as of any module: a copy is not compiled

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and weights into ``folder``: see ``smt.model.checkpoint.save_model``."""
        save_model(self, folder, architecture="hymba")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Hymba:
        """The model that ``save_pretrained`` or a training run left in ``folder``: see ``smt.model.checkpoint.load_model``."""
        return load_model(cls, folder, HymbaConfig, architecture="hymba", device=device)

    def gradient_checkpointing_enable(self) -> None:
        """Train with less memory: keep only the input of every layer and compute the rest again backward."""
        self.gradient_checkpointing = True

    def parts(self) -> dict[str, nn.Module]:
        """``embedding``, meta tokens included, ``transformer``, and ``ssm``: the mixers of layers without attention, if any.

        Every parameter is in one of them.
        """
        mambas, others = [], [self.norm]
        for layer in self.layers:
            if isinstance(layer.mixer, MambaMixer):
                mambas.append(layer.mixer)
                others += [layer.norm_1, layer.norm_2, layer.mlp]
            else:
                others.append(layer)
        parts = {"embedding": self._vectors(), "transformer": others, **({"ssm": mambas} if mambas else {})}
        return {name: nn.ModuleList(modules) for name, modules in parts.items()}

    def count_parameters(self) -> dict[str, Any]:
        """As ``StrideMemoryTransformer.count_parameters``."""
        return count_parameters(self)

    def _vectors(self) -> list[nn.Module]:
        """Embedding and meta tokens."""
        return [self.embedding] if self.meta_tokens is None else [self.embedding, self.meta_tokens]

    def _check_call(self, input_ids: Tensor, n_valid: Tensor | None, cache: HymbaCache) -> tuple[int, ...]:
        """How many tokens of each row the cache takes."""
        batch, length = input_ids.shape
        if not isinstance(cache, HymbaCache):
            raise TypeError(f"cache must be a HymbaCache, which new_cache makes, got {type(cache).__name__}")
        cache.check(self.config, batch, input_ids.device)
        if torch.is_grad_enabled() or self.training:
            raise ValueError(
                "a cache keeps no gradients and knows no dropout: call eval(), and the model under torch.no_grad()"
            )
        counts = (length,) * batch if n_valid is None else valid_counts(n_valid, input_ids)
        if len(set(cache.lengths)) > 1 and (length > 1 or counts != (1,) * batch):
            raise ValueError(
                f"rows that hold different numbers of tokens take one token each, got {length} and n_valid {counts}"
            )
        return counts
