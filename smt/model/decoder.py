"""The decoder: GPT-2 blocks over the window, in three encodings of falling cost (``docs/model.md``).

``token`` and ``stride`` cut the sequence into windows and encode each on its own; ``stream`` runs slots and tokens through the
layers once, and every token attends to the keys and values of its window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smt.config import SMTConfig
from smt.model.layers import (
    FRESH_GATE,
    GATE_RATE,
    Block,
    StreamPlace,
    WindowPlace,
    stream_layer,
    window_layer,
)
from smt.model.readout import SlotReadout
from smt.model.rotary import rotation
from smt.model.windows import Span, cut_windows, window_cache, window_layout
from smt.runtime.precision import dtype_of_products
from smt.state.rings import ends
from smt_kernels.precision import NORM_EPS


class Decoder(nn.Module):
    """GPT-2 blocks and a final LayerNorm, with learned positions in the window or rotary ones in the stream.

    With ``gradient_checkpointing``, training keeps the input of every block and recomputes the rest in the backward pass.
    ``transformers`` sets both attributes by name.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.config = config
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.transformer_n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.slot_readout = SlotReadout(config.d_model, config.d_model, bias=False) if config.reads_out else None
        if config.encoding == "stream":
            self.slot_type = nn.Parameter(torch.empty(config.d_model))
        else:
            self.positions = nn.Parameter(torch.empty(config.window_size, config.d_model))

    def initialise(self) -> None:
        """Fresh weights as in GPT-2: normal, zero biases, residual projections scaled by 1 / sqrt(2 layers)."""
        std = self.config.initializer_std
        for block in self.blocks:
            for linear in (block.attention.qkv, block.attention.proj, block.up, block.down):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
            for residual in (block.attention.proj, block.down):
                nn.init.normal_(residual.weight, std=std / math.sqrt(2 * len(self.blocks)))
            if block.attention.gating == "learned":
                nn.init.constant_(block.attention.slot_gate, FRESH_GATE / GATE_RATE)
        if self.slot_readout is not None:
            self.slot_readout.reset_parameters()
        nn.init.normal_(self.slot_type if self.config.encoding == "stream" else self.positions, std=std)

    def encode_windows(
        self, tokens: Span, slots: Span, first: int, stops: Sequence[int], *, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Encode steps ``first`` to the end of ``tokens``, each inside its window (``token`` and ``stride``).

        Args:
            tokens: (B, T, d) embeddings, at least n_tokens - 1 steps of history before ``first`` where they exist.
            slots: (B, K, d), all that any of the steps sees.
            first: the first step to encode.
            stops: for each row the step after its last.
            keep: whether keys and values are to be kept for single steps.

        Returns:
            (B, tokens.stop - first, d), after the final norm, and what the layers keep of each row's last window, of tokens and
            of slots, without gradient (``SMTState``); None unless asked for.
        """
        config, batch = self.config, tokens.values.shape[0]
        layout = window_layout(config, first, tokens.stop)
        windows, valid_memory, valid_tokens = cut_windows(config, layout, tokens, slots)
        of_step = config.window.block_of if config.encoding == "stride" else lambda step: step
        last = ends(of_step(first), [of_step(stop - 1) for stop in stops], windows.device)

        def of_last(values: Tensor) -> Tensor:
            of_rows = values.unflatten(0, (batch, len(layout.ends)))
            return of_rows[torch.arange(batch, device=last.device), last] if isinstance(last, Tensor) else of_rows[:, last]

        x, kept = self.through_windows(windows, valid_memory, valid_tokens, layout.tail, of_last if keep else None)
        queries = x.reshape(batch, -1, config.d_model)  # every window's queries, in order of their steps
        hidden = queries[:, layout.skip : layout.skip + tokens.stop - first]
        return hidden, None if kept is None else window_cache(config, kept, _steps(stops, windows.device) - 1)

    def through_windows(
        self,
        windows: Tensor,
        valid_memory: Tensor | None,
        valid_tokens: Tensor | None,
        tail: int,
        keep: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run windows through all layers.

        Args:
            windows: (N, n + L, d) slots and the first L tokens of the window, L <= m.
            valid_memory, valid_tokens: (N,) int32, how many of each right-aligned half exist; None: all.
            tail: how many of the last entries to return.
            keep: takes keys or values (N, n + L, H_kv, D) and returns what is to be kept of them; None: nothing is.

        Returns:
            (N, tail, d) after the final norm, and (L, 2, ...) what is kept of keys and values.
        """
        x = self.dropout(windows + self.positions[: windows.shape[1]])
        kept = []
        for index, block in enumerate(self.blocks):
            # Nothing reads the last layer's output but at the queries.
            n_queries = tail if index == len(self.blocks) - 1 else x.shape[1]
            place = WindowPlace(self.config.n_ssm_outputs, n_queries)
            x, k, v = self._run(window_layer, block, x, valid_memory, valid_tokens, place)
            if keep is not None:
                kept.append(torch.stack([keep(k), keep(v)]))
        return self.norm(x), None if keep is None else torch.stack(kept)

    def encode_stream(
        self,
        tokens: Span,
        slots: Span,
        held: tuple[Tensor, Tensor],
        step: Tensor,
        stops: Sequence[int],
        slot_stops: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode new tokens and new slots on top of the keys and values that each layer holds (``stream``).

        Steps and slots are counted from any step that is like the first (``WindowSpec.canonical_step``); only positions are
        absolute, and they are counted on the device.

        Args:
            tokens: (B, T, d) embeddings of the new steps.
            slots: (B, K, d) the new slots.
            held: (L, 2, B, entries, H_kv, D) keys and values of the tokens and of the slots before, oldest first.
            step: (1,) int64, where the first of the new steps really is.
            stops, slot_stops: for each row, the step after its last and the slot after its last.

        Returns:
            (B, T, d) after the final norm, and what to hold next: of the last m tokens, and, if there are new ones, of the last
            n slots of each row.
        """
        config, n_slots, device = self.config, slots.values.shape[1], tokens.values.device
        window = config.window
        new = torch.arange(tokens.first, tokens.stop, device=device)
        x = tokens.values
        if n_slots:
            new = torch.cat([window.write_step(torch.arange(slots.first, slots.stop, device=device)), new])
            x = torch.cat([slots.values + self.slot_type, x], dim=1)
        dtype = dtype_of_products(x)
        turn = rotation(new + (step - tokens.first), config.head_dim, config.rope_theta, dtype)
        firsts = tokens.first - held[0].shape[3], slots.first - held[1].shape[3]
        of_rows = ends(firsts[0], stops, device), ends(firsts[1], slot_stops, device)
        # Layers tell no group of writes from another: fewer steps are different to them.
        strides = (tokens.first - window.canonical_step(tokens.first)) // window.stride
        firsts = firsts[0] - strides * window.stride, firsts[1] - strides
        x, kept = self.dropout(x), []
        for index, (block, *before) in enumerate(zip(self.blocks, *(part.to(dtype).unbind() for part in held), strict=True)):
            # Nothing reads the last layer's slots, but a layer of its own to compile would cost more than they do.
            slots_go_on = index < len(self.blocks) - 1 or bool(self._compiled)
            place = StreamPlace(window, n_slots, *firsts, *of_rows, slots_go_on)
            x, *of_layer = self._run(stream_layer, block, x, turn, *before, place)
            kept.append(of_layer)
        of_tokens, *of_slots = (torch.stack(parts) for parts in zip(*kept, strict=True))
        if n_slots and slots_go_on:
            x = x[:, n_slots:]
        return self.norm(x), of_tokens, of_slots[0] if of_slots else None

    def compile(self, **options: Any) -> None:
        """Compile a layer, once for all of them, with the ``options`` of ``torch.compile``."""
        self._compiled = {layer: torch.compile(layer, **options) for layer in (stream_layer, window_layer)}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_compiled": {}}  # as of any module: a copy is not compiled

    def _run(self, layer: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        layer = self._compiled.get(layer, layer)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *arguments)
        return layer(*arguments)


def _steps(steps: Sequence[int], device: torch.device) -> Tensor:
    """(B,) int64, or (1,) where they are all the same."""
    end = ends(0, steps, device)
    return end if isinstance(end, Tensor) else torch.full((1,), end, device=device)
