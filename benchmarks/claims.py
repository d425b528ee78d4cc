"""The published claims beside what counting gives: ``python benchmarks/claims.py`` prints them as a Markdown table.

The published sizes: GPT-2 small (12 layers, d = 768), Mamba with 24 layers, W = 65, S = 16. What counts as a multiply-add (MAC)
is said in ``smt.model.cost``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smt.config import SMTConfig
from smt.model.cost import (
    attention_products,
    break_even_context,
    break_even_length,
    break_even_state_context,
    full_attention_ratio,
    gpt2_decode_cost,
    gpt2_parameters,
    gpt2_training_cost,
    kv_cache_floats,
    literal_cost,
    pooling_passes,
    pooling_products,
    position_passes,
    published_state_floats,
    smt_cost,
    ssm_parameters,
    ssm_products,
)
from smt.state.state import SMTState

PUBLISHED_SPEEDUP = 2300
GPT2_VOCABULARY, GPT2_POSITIONS = 50257, 1024
CONTEXT = 4096  # the context that the published figures assume


@dataclass(frozen=True)
class Claim:
    """A published claim, what counting gives, and what that means.

    Attributes:
        claim: as published.
        figures: name -> recomputed number.
        verdict: in words, with the figures filled in.
    """

    claim: str
    figures: dict[str, float]
    verdict: str


def claims() -> list[Claim]:
    """Every claim about cost, recounted."""
    return [*_cost_claims(), *_size_claims(), *_comparisons()]


def _cost_claims() -> list[Claim]:
    config = SMTConfig.published()
    window, stride, d = config.window_size, config.stride, config.d_model
    one_layer = attention_products(config, window, window) // 2
    pooling, light = (pooling_products(config, window, form_keys=form) for form in (True, False))
    passes = pooling_passes(SMTConfig(), window)
    lighter = (pooling + passes) / (light + passes)
    ssm = ssm_products(config)
    literal = literal_cost(config).total
    whole_sequence = CONTEXT**2 * d
    one_step = CONTEXT * d
    return [
        _claim(
            "window attention 3.2M FLOPs per step",
            "{macs:,.0f} MACs: the scores of one layer; no values, no projections, no MLP, no other layer",
            macs=one_layer,
        ),
        _claim(
            "pooling 2.4M, amortised",
            "right with keys formed: {per_write:,.0f} MACs per write, {per_step:,.0f} per step; without keys 1/{fewer:.1f} of "
            "the products, 1/{fewer_with_passes:.1f} with the mean and the norm's passes counted on both sides",
            per_write=pooling,
            per_step=pooling / stride,
            fewer=pooling / light,
            fewer_with_passes=lighter,
        ),
        _claim(
            "SSM 0.04M, amortised",
            "{published:,.0f} = d²/S is not a Mamba: 24 layers cost {per_write:,.0f} MACs per write, {per_step:,.0f} per step",
            published=d * d / stride,
            per_write=ssm,
            per_step=ssm / stride,
        ),
        _claim("total 5.6M per step", "{macs:,.0f} MACs per token, taken literally", macs=literal),
        _claim(
            "full attention 12.9B, so 2300x",
            "{sequence:,.0f} = 4096² d is a whole sequence, compared with one step; a KV-cached step has {step:,.0f} on the "
            "same term: {ratio:.2f}x",
            sequence=whole_sequence,
            step=one_step,
            ratio=one_step / one_layer,
        ),
    ]


def _size_claims() -> list[Claim]:
    config = SMTConfig.published()
    state, with_window = published_state_floats(config)
    cache, stream = kv_cache_floats(config), SMTState.size_in_bytes(SMTConfig(), 1, torch.float32)
    gpt2 = gpt2_parameters(SMTConfig.published(vocab_size=GPT2_VOCABULARY), GPT2_POSITIONS)
    steps = range(100)
    return [
        _claim("63x less memory", "{ratio:.1f} = 4096 / 65 counts positions, not bytes", ratio=CONTEXT / config.window_size),
        _claim(
            "SSM state 16",
            "{state:,.0f} numbers, {with_window:,.0f} with the window; GPT-2's KV cache is {cache:,.0f} per token: {less:.0f}x "
            "more at 4,096, as much at {even:.0f} tokens (state alone, weights not counted)",
            state=state,
            with_window=with_window,
            cache=cache,
            less=CONTEXT * cache / with_window,
            even=break_even_state_context(config),
        ),
        _claim(
            "(this package) state of stream",
            "{ours:.2f} MiB at any length in fp32, keys and values of the window included; GPT-2's cache of 4,096 tokens "
            "{theirs:.0f} MiB: {less:.1f}x",
            ours=stream / 2**20,
            theirs=4 * CONTEXT * cache / 2**20,
            less=4 * CONTEXT * cache / stream,
        ),
        _claim("embedding 38.6M", "right: {parameters:,.0f}", parameters=config.vocab_size * config.d_model),
        _claim("pooling 1.2M parameters", "right: {parameters:,.0f}", parameters=2 * config.d_model * config.d_k),
        _claim(
            "GPT-2 117M",
            "{parameters:,.0f}, of which {used:,.0f} are used: its own token embedding is not",
            parameters=gpt2,
            used=gpt2 - GPT2_VOCABULARY * config.d_model,
        ),
        _claim(
            "Mamba 130M",
            "{layers:,.0f} in layers and norms; the rest is its embedding",
            layers=ssm_parameters(config),
        ),
        _claim(
            "writes 6.25 %, 6 of 100",
            "right for t > 0: {writes:.0f}; pseudo-code that also writes at t = 0 makes {with_first:.0f}",
            writes=config.window.writes_made(len(steps)),
            with_first=sum(step % config.stride == 0 for step in steps),
        ),
    ]


def _comparisons() -> list[Claim]:
    config = SMTConfig.published()
    literal = literal_cost(config).total
    contexts = (1024, CONTEXT, 32768)
    decode = {f"at_{context}": literal / gpt2_decode_cost(config, context).total for context in contexts}
    train = {f"at_{length}": literal / gpt2_training_cost(config, length).total for length in contexts}
    passes = {encoding: position_passes(SMTConfig(encoding=encoding)) for encoding in ("token", "stride", "stream")}
    models = {encoding: smt_cost(SMTConfig(encoding=encoding)).total for encoding in ("stride", "stream")}
    window = config.window_size
    three = "{at_1024:.1f}x at 1,024, {at_4096:.1f}x at 4,096, {at_32768:.1f}x at 32,768"
    return [
        _claim("cheaper than GPT-2 in decoding", "the literal form costs " + three + " tokens of context", **decode),
        _claim("cheaper than GPT-2 in training", "the literal form costs " + three + " tokens of length", **train),
        _claim(
            "cheaper than GPT-2 at some length",
            "from {context:,.0f} tokens of context in decoding, {length:,.0f} of length in training",
            context=break_even_context(config),
            length=break_even_length(config),
        ),
        _claim(
            "(this package) stride and stream",
            "{stride:.0f}x and {stream:.0f}x fewer positions go through the decoder than in the literal form; with memory "
            "and head {stride_model:.1f}x and {stream_model:.1f}x fewer MACs",
            stride=passes["token"] / passes["stride"],
            stream=passes["token"] / passes["stream"],
            stride_model=literal / models["stride"],
            stream_model=literal / models["stream"],
        ),
        _claim(
            "(this package) attention alone",
            "full causal attention sees {at_4096:.1f}x, {at_16384:.0f}x and {at_65536:.0f}x more keys than the window at "
            "4,096, 16,384 and 65,536",
            **{f"at_{length}": full_attention_ratio(length, window) for length in (4096, 16384, 65536)},
        ),
    ]


def _claim(claim: str, verdict: str, **figures: float) -> Claim:
    return Claim(claim, figures, verdict.format(**figures))


def as_markdown() -> str:
    """The table."""
    lines = ["| published | recounted |", "|---|---|"]
    return "\n".join(lines + [f"| {claim.claim} | {claim.verdict} |" for claim in claims()])


if __name__ == "__main__":
    print(as_markdown())
