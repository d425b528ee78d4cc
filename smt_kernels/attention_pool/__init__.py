"""Attention pooling: each window of memory slots and tokens becomes one vector.

    x^_i = x_i / rms(x_i);   u = W_k^T W_q mean_i(x^_i);   a = softmax_i(u . x^_i / sqrt(d_k));   pooled = sum_i a_i x^_i

``attention_pool`` takes windows; ``attention_pool_sequence`` takes the tokens and slots that the windows of many writes share.

The folder, in the order to read it:

    reference.py          the definition, and the tuples that all files hand on: inputs, timeline, what is kept
    blocked.py            the same as dense products over runs of neighbouring windows, for any device
    strips.py             which window sees which entries, inside kernels
    kernels.py            the Triton backend: what is launched, with which settings, and the library's products between
    forward_kernels.py    the two forward launches: mean; weights and pooled
    backward_kernels.py   the two backward launches: queries; entries

Before kernels: ``smt_kernels.tiles``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smt_kernels import backends, checks
from smt_kernels.attention_pool import reference
from smt_kernels.attention_pool.reference import Inputs, Kept, Timeline
from smt_kernels.operators import register
from smt_kernels.precision import accumulation_dtype
from smt_kernels.window import WindowSpec


def attention_pool(
    windows: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    *,
    n_memory: int,
    valid_memory: Tensor | None = None,
    valid_tokens: Tensor | None = None,
    normalise: bool = True,
    dropout_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool each of N windows of W entries, the first ``n_memory`` of which are memory slots, by attention from its own mean.

    Args:
        windows: (N, W, d). What stands at entries that do not exist has no influence.
        w_q, w_k: projections (d_k, d) in the dtype of windows.
        n_memory: memory entries per window, 0 <= n_memory <= W.
        valid_memory, valid_tokens: (N,) int32, how many entries of each right-aligned half exist; None: all. Every window must
            have at least one (checked on CPU; elsewhere a window without entries gives nan).
        normalise: divide every entry by its root mean square first (eps 1e-5), for mean, scores and sum alike.
        dropout_mask: (N, W) in the dtype of windows, factors of the weights (0 or 1 / (1 - p)), not differentiated; None: 1.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        pooled (N, d) and the weights before dropout (N, W), 0 where an entry does not exist, in the dtype of windows.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or count that does not fit, or a window without entries.

    Source: Bahdanau et al. (2015) pooling with the scores of Vaswani et al. (2017), section 3.2.1.
    """
    _check_windows(windows, n_memory, valid_memory, valid_tokens)
    n_windows, size, _ = windows.shape
    _check_projections("windows", windows, w_q, w_k)
    dropout_mask = _dropout("windows", windows, dropout_mask, {"N": n_windows, "W": size})
    exists = None
    if valid_memory is not None or valid_tokens is not None:
        window = WindowSpec(n_memory, size - n_memory, stride=None)
        exists = window.entry_exists(valid_memory, valid_tokens, windows.device)
    backend = backends.choose("attention_pool", windows, backend)
    if backend == "reference":
        if exists is None:
            exists = torch.ones(1, size, dtype=torch.bool, device=windows.device)
        return reference.attention_pool(windows, w_q, w_k, exists, normalise=normalise, dropout_mask=dropout_mask)
    windows, w_q, w_k = checks.unit_stride(windows, w_q, w_k)
    # A window is a sequence that makes one write, at its last step.
    dropout = None if dropout_mask is None else dropout_mask[:, None]
    inputs, alone = Inputs(windows, None, w_q, w_k, exists, dropout), WindowSpec(0, size, stride=size)
    pooled, kept = _run(inputs, alone, Timeline(0, 1, 1, first_step=1, first_slot=0), normalise, backend=backend)
    return pooled[:, 0], kept.weights[:, 0].to(windows.dtype)


def attention_pool_sequence(
    tokens: Tensor,
    slots: Tensor | None,
    w_q: Tensor,
    w_k: Tensor,
    *,
    window: WindowSpec,
    first_write: int,
    n_writes: int,
    write_group: int = 1,
    first_step: int = 0,
    first_slot: int = 0,
    normalise: bool = True,
    dropout_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool the windows of ``n_writes`` consecutive writes straight from a sequence of tokens and slots.

    Write w, made at step t = stride * (w + 1), pools the last ``window.n_memory`` slots of earlier groups and the tokens
    (t - ``window.n_tokens``, t], of both those that are held: what lies before the first held token or slot, or after the last
    held slot, does not exist. The same as ``attention_pool`` on windows cut out of the sequence. A gradient has the length of
    ``tokens``: pass the tokens that the writes need (the last ``n_tokens + stride * (n_writes - 1)``) and not a long past.

    Args:
        tokens: (B, T, d), of which tokens[:, 0] is step ``first_step``. Holds at least the write steps of all writes.
        slots: (B, K, d) in the dtype of tokens, of which slots[:, 0] is slot ``first_slot``, K >= 0; None: pool tokens only.
        w_q, w_k: projections (d_k, d) in the dtype of tokens.
        window: sizes and stride of the window.
        first_write, n_writes: the writes, ``first_write >= 0``, ``n_writes >= 1``.
        write_group: writes per group, at least 1; the slots of the group itself are not pooled.
        first_step, first_slot: what the first token and slot are called; negative where they precede the sequence.
        normalise: divide every entry by its root mean square first (eps 1e-5), for mean, scores and sum alike.
        dropout_mask: (B, n_writes, W) in the dtype of tokens, factors of the weights (0 or 1 / (1 - p)), not differentiated.
        backend: ``triton``, ``blocked`` or ``reference``; None: see ``smt_kernels.backends``.

    Returns:
        pooled (B, n_writes, d) and the weights before dropout (B, n_writes, W), 0 where an entry does not exist, in the dtype
        of tokens; W is ``window.size``, without slots ``window.n_tokens``.

    Raises:
        TypeError: a dtype or the type of a setting that does not fit.
        ValueError: a shape, device or setting that does not fit, or tokens that do not reach from the first to the last write.

    Source: the pooling of ``docs/model.md``, ``write_group`` included.
    """
    checks.shape("tokens", tokens, {"B": None, "T": None, "d": None})
    checks.floating("tokens", tokens)
    batch, length, width = tokens.shape
    if slots is not None:
        checks.shape("slots", slots, {"B": batch, "K": None, "d": width}, may_be_empty=("K",))
        checks.like("slots", slots, "tokens", tokens)
    _check_projections("tokens", tokens, w_q, w_k)
    timeline = Timeline(first_write, n_writes, write_group, first_step, first_slot)
    check_timeline(window, timeline, length)
    size = window.n_tokens if slots is None else window.size
    dropout_mask = _dropout("tokens", tokens, dropout_mask, {"B": batch, "n_writes": n_writes, "W": size})
    backend = backends.choose("attention_pool_sequence", tokens, backend)
    if backend == "reference":
        settings = {"window": window, "timeline": timeline, "normalise": normalise}
        return reference.attention_pool_sequence(tokens, slots, w_q, w_k, dropout_mask=dropout_mask, **settings)
    tokens, w_q, w_k = checks.unit_stride(tokens, w_q, w_k)
    inputs = Inputs(tokens, slots, w_q, w_k, None, dropout_mask)
    pooled, kept = _run(inputs, window, timeline, normalise, backend=backend)
    return pooled, kept.weights.to(tokens.dtype)


def _check_windows(windows: Tensor, n_memory: int, valid_memory: Tensor | None, valid_tokens: Tensor | None) -> None:
    checks.shape("windows", windows, {"N": None, "W": None, "d": None})
    checks.floating("windows", windows)
    n_windows, size, _ = windows.shape
    checks.integer("n_memory", n_memory)
    if not 0 <= n_memory <= size:
        raise ValueError(f"n_memory must lie in 0..W = 0..{size}, got {n_memory}")
    total = 0
    for name, valid, upper in (("valid_memory", valid_memory, n_memory), ("valid_tokens", valid_tokens, size - n_memory)):
        if valid is not None:
            checks.counts(name, valid, n_windows, upper, windows)
        total = total + (upper if valid is None else valid)
    if isinstance(total, Tensor) and checks.readable(total) and bool((total == 0).any()):
        empty = (total == 0).nonzero().flatten().tolist()
        raise ValueError(f"valid_memory + valid_tokens must be at least 1 in every window, got 0 in windows {empty}")


def _check_projections(model_name: str, model: Tensor, w_q: Tensor, w_k: Tensor) -> None:
    checks.shape("w_q", w_q, {"d_k": None, "d": model.shape[-1]})
    checks.shape("w_k", w_k, {"d_k": w_q.shape[0], "d": model.shape[-1]})
    checks.like("w_q", w_q, model_name, model)
    checks.like("w_k", w_k, model_name, model)


def _dropout(model_name: str, model: Tensor, dropout_mask: Tensor | None, expected: dict[str, int]) -> Tensor | None:
    """The mask, checked, without gradient."""
    if dropout_mask is None:
        return None
    checks.shape("dropout_mask", dropout_mask, expected)
    checks.like("dropout_mask", dropout_mask, model_name, model)
    return dropout_mask.detach()


def check_timeline(window: WindowSpec, timeline: Timeline, length: int) -> None:
    """Raise TypeError or ValueError unless all writes can be made, with ``length`` tokens held."""
    first_write, n_writes, write_group, first_step, first_slot = timeline
    if not isinstance(window, WindowSpec):
        raise TypeError(f"window must be a WindowSpec, got {type(window).__name__}")
    if window.stride is None:
        raise ValueError(f"window must have a stride, for writes to happen, got {window}")
    for name, value, least in (("first_write", first_write, 0), ("n_writes", n_writes, 1), ("write_group", write_group, 1)):
        checks.integer(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    checks.integer("first_step", first_step)
    checks.integer("first_slot", first_slot)
    first, last = window.write_step(first_write), window.write_step(first_write + n_writes - 1)
    if not first_step <= first <= last < first_step + length:
        held = f"{first_step}..{first_step + length - 1}"
        raise ValueError(
            f"tokens must hold the steps {first}..{last} of the first to the last write, got {held} (first_step = {first_step})"
        )


def _empty(inputs: Inputs, window: WindowSpec, timeline: Timeline, normalise: bool, backend: str) -> tuple[Tensor, Kept]:
    """pooled (B, n_writes, d), and what is kept: Triton multiplies mean, query and u in the dtype of the entries."""
    tokens, rows = inputs.tokens, (len(inputs.tokens), timeline.n_writes)
    width, rank = tokens.shape[-1], len(inputs.w_q)
    wide = accumulation_dtype(tokens.dtype)
    size = window.n_tokens if inputs.slots is None else window.size
    dtypes = wide, *[tokens.dtype if backend == "triton" else wide] * 3
    kept = (tokens.new_empty((*rows, n), dtype=dtype) for n, dtype in zip((size, width, rank, width), dtypes, strict=True))
    return tokens.new_empty((*rows, width)), Kept(*kept)


_run = register(_empty, outputs=2, kept=1, gradients=4)
