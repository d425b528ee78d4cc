"""Whom the tokens of a layer see: the meta tokens, and of those before them and themselves all, or the last of a window.

Values may be P times as wide as keys. They are cut into P pieces of the width of keys, and each is attended to with the same
queries and keys, as in the paper's code: kernels take heads of one width, and nothing is copied for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from smt_kernels import WindowSpec, stream_attention, stream_attention_decode

HALF = (torch.float16, torch.bfloat16)
# Keys (B, T, H_kv, D) and values (B, T, H_kv, P, D).
KeysAndValues = tuple[Tensor, Tensor]


def attend(q: Tensor, tokens: KeysAndValues, metas: KeysAndValues | None, window: int | None) -> Tensor:
    """Causal attention of a sequence.

    Args:
        q: (B, T, H, D), queries of the last T tokens.
        tokens: (B, S, ...) keys and values, S >= T.
        metas: (1, M, ...) those of the meta tokens, which stand before every row; None: there are none.
        window: how many tokens each query sees at most, itself among them; None: all.

    Returns:
        (B, T, H, P, D).
    """
    if metas is not None:
        metas = tuple(part.to(q.dtype).expand(q.shape[0], *part.shape[1:]) for part in metas)
    if window is None:
        if metas is not None:
            tokens = tuple(torch.cat(parts, dim=1) for parts in zip(metas, tokens, strict=True))
        return _by_pieces(lambda k, v: _causal(q, k, v), tokens)
    spec = WindowSpec(0 if metas is None else metas[0].shape[1], window, stride=None)
    return _by_pieces(lambda *parts: stream_attention(q, *parts, window=spec), tokens, metas)


def attend_step(q: Tensor, tokens: KeysAndValues, metas: KeysAndValues, n_tokens: Tensor, n_metas: Tensor) -> Tensor:
    """Attention of one query per row.

    A window is a ring, all that was is a ring that has not come round: both are ``stream_attention_decode``.

    Args:
        q: (B, H, D).
        tokens: (B, room, ...) keys and values.
        metas: (1, M, ...).
        n_tokens: (B,) int32, how many tokens each row holds.
        n_metas: (B,) int32, M each.

    Returns:
        (B, H, P, D).
    """
    tokens = tuple(part.to(q.dtype) for part in tokens)
    metas = tuple(part.to(q.dtype).expand(q.shape[0], *part.shape[1:]) for part in metas)
    return _by_pieces(lambda *parts: stream_attention_decode(q, *parts, n_tokens=n_tokens, n_slots=n_metas), tokens, metas)


def _by_pieces(attention: Callable[..., Tensor], *held: KeysAndValues | None) -> Tensor:
    """``attention`` of keys and one piece of values, of each of ``held``: (..., H, D) for every piece, (..., H, P, D)."""
    held = [(k, v.unbind(-2)) for k, v in filter(None, held)]
    pieces = zip(*(values for _, values in held), strict=True)
    keys = [k for k, _ in held]
    attended = [attention(*(part for pair in zip(keys, piece, strict=True) for part in pair)) for piece in pieces]
    return attended[0].unsqueeze(-2) if len(attended) == 1 else torch.stack(attended, dim=-2)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last of T queries (B, T, H, D) sees all of S >= T keys, the one before it one less, and so on: (B, T, H, D)."""
    n_queries, n_before = q.shape[1], k.shape[1] - q.shape[1]
    is_square, grouped = n_before <= n_queries, q.shape[2] != k.shape[2]
    if grouped and q.device.type == "cuda" and not (is_square and q.dtype in HALF):
        # Of the fused kernels for GPUs the one that groups heads takes nothing else: all scores would be formed and kept.
        k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for part in (k, v))
        grouped = False
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if is_square:
        # Fused kernels know a causal square without a mask: queries in front, whose results nobody wants, complete it.
        q = pad(q, (0, 0, 0, 0, n_before, 0)).transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)[:, n_before:]
    seen = torch.ones(n_queries, k.shape[2], dtype=torch.bool, device=q.device).tril(n_before)
    return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen, enable_gqa=grouped).transpose(1, 2)
