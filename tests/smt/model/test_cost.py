"""The cost model: every published figure recounted, and the counts held against models and states that exist."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smt import SMTConfig, StrideMemoryTransformer
from smt.baselines import build_gpt2
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

PUBLISHED = SMTConfig.published()
ENCODINGS = ("token", "stride", "stream")


def small(**changes):
    sizes = {
        "vocab_size": 96,
        "d_model": 32,
        "d_k": 24,
        "n_ssm_outputs": 5,
        "m_input_tokens": 12,
        "stride": 4,
        "dropout": 0.0,
        "transformer_n_layers": 3,
        "transformer_n_heads": 4,
        "ssm_n_layers": 2,
    }
    return SMTConfig(**{**sizes, **changes})


def counted_products(counter, *modules):
    """Multiply-adds that torch counted in the modules of these names."""
    by_module = counter.get_flop_counts()
    return sum(sum(counts.values()) for name, counts in by_module.items() if name.endswith(modules)) / 2


@pytest.mark.parametrize(
    ("figure", "published", "digits"),
    [
        pytest.param(attention_products(PUBLISHED, 65, 65) / 2 / 1e6, 3.245, 3, id="scores-of-one-layer"),
        pytest.param(pooling_products(PUBLISHED, 65, form_keys=True) / 1e6, 39.03, 2, id="pooling-per-write"),
        pytest.param(pooling_products(PUBLISHED, 65, form_keys=True) / 16e6, 2.44, 2, id="pooling-per-step"),
        pytest.param(ssm_products(PUBLISHED) / 1e6, 91.6, 1, id="mamba-per-write"),
        pytest.param(ssm_products(PUBLISHED) / 16e6, 5.72, 2, id="mamba-per-step"),
        pytest.param(literal_cost(PUBLISHED).total / 1e9, 5.65, 2, id="literal-per-token"),
        pytest.param(4096**2 * 768 / 1e9, 12.9, 1, id="full-attention-of-a-sequence"),
        pytest.param(4096 / 65**2, 0.97, 2, id="scores-of-one-step-of-each"),
        pytest.param(4096 / PUBLISHED.window_size, 63, 0, id="positions-in-memory"),
        pytest.param(4096 * kv_cache_floats(PUBLISHED) / published_state_floats(PUBLISHED)[1], 96, 0, id="state-at-4096"),
        pytest.param(PUBLISHED.vocab_size * 768 / 1e6, 38.6, 1, id="embedding"),
        pytest.param(2 * 768 * 768 / 1e6, 1.2, 1, id="pooling-parameters"),
        pytest.param(gpt2_parameters(SMTConfig(vocab_size=50257), 1024) / 1e6, 124.44, 2, id="gpt2-parameters"),
        pytest.param(gpt2_parameters(SMTConfig(vocab_size=50257), 1024) / 1e6 - 50257 * 768 / 1e6, 85.84, 2, id="gpt2-used"),
        pytest.param(ssm_parameters(PUBLISHED) / 1e6, 90.52, 2, id="mamba-parameters"),
        pytest.param(literal_cost(PUBLISHED).total / gpt2_decode_cost(PUBLISHED, 1024).total, 39.6, 1, id="decode-1024"),
        pytest.param(literal_cost(PUBLISHED).total / gpt2_decode_cost(PUBLISHED, 4096).total, 28.4, 1, id="decode-4096"),
        pytest.param(literal_cost(PUBLISHED).total / gpt2_decode_cost(PUBLISHED, 32768).total, 7.8, 1, id="decode-32768"),
        pytest.param(literal_cost(PUBLISHED).total / gpt2_training_cost(PUBLISHED, 1024).total, 42.4, 1, id="training-1024"),
        pytest.param(literal_cost(PUBLISHED).total / gpt2_training_cost(PUBLISHED, 4096).total, 35.0, 1, id="training-4096"),
        pytest.param(literal_cost(PUBLISHED).total / gpt2_training_cost(PUBLISHED, 32768).total, 13.3, 1, id="training-32768"),
        pytest.param(break_even_context(PUBLISHED) / 1e5, 3.0, 1, id="break-even-decoding"),
        pytest.param(break_even_length(PUBLISHED) / 1e5, 6.0, 1, id="break-even-training"),
        pytest.param(65 / position_passes(SMTConfig(encoding="stride")), 16, 0, id="stride-divides-by"),
        pytest.param(65 / position_passes(SMTConfig(encoding="stream")), 61, 0, id="stream-divides-by"),
        pytest.param(full_attention_ratio(4096, 65), 31.5, 1, id="attention-alone-4096"),
        pytest.param(full_attention_ratio(16384, 65), 126, 0, id="attention-alone-16384"),
        pytest.param(full_attention_ratio(65536, 65), 504, 0, id="attention-alone-65536"),
    ],
)
def test_recounting_gives_the_figure_on_the_claims_page(figure, published, digits):
    assert round(figure, digits) == published


def test_published_state_sizes_are_exact():
    assert published_state_floats(PUBLISHED) == (737_280, 787_200)
    assert kv_cache_floats(PUBLISHED) == 18_432
    assert break_even_state_context(PUBLISHED) == 43


def test_pooling_without_keys_is_about_a_27th_once_its_passes_are_counted():
    keys, none, passes = (
        pooling_products(PUBLISHED, 65, form_keys=True),
        pooling_products(PUBLISHED, 65, form_keys=False),
        pooling_passes(SMTConfig(), 65),
    )
    assert round((keys + passes) / (none + passes)) == 27
    assert round(keys / none, 1) == 30.5  # the products alone


def test_the_literal_form_costs_more_below_the_break_even_and_less_above():
    literal, context, length = literal_cost(PUBLISHED).total, break_even_context(PUBLISHED), break_even_length(PUBLISHED)
    assert gpt2_decode_cost(PUBLISHED, context - 1).total < literal <= gpt2_decode_cost(PUBLISHED, context).total
    assert gpt2_training_cost(PUBLISHED, length - 2).total < literal <= gpt2_training_cost(PUBLISHED, length).total


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["H4", "H4-kv2"])
@pytest.mark.parametrize("pool_source", ["window", "tokens"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_decoder_and_its_memory_do_the_counted_products_in_each_encoding(encoding, pool_source, kv_heads):
    """Products with weights, as torch counts them while the model runs; those of attention depend on its implementation."""
    config = small(encoding=encoding, pool_source=pool_source, transformer_n_kv_heads=kv_heads)
    model = StrideMemoryTransformer(config).eval()
    blocks = 64
    length = 1 + blocks * config.stride  # step 0 is a block of its own, the others are whole
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64))
    counted = counted_products(counter, ".qkv", ".proj", ".up", ".down")
    cost = smt_cost(config)
    if encoding == "stream":
        of_tokens = smt_cost(dataclasses.replace(config, writes=False)).projections
        of_a_slot = (cost.projections - of_tokens) * config.stride
        expected = length * of_tokens + config.window.writes_made(length) * of_a_slot
    else:
        # The block of step 0 is one more window of ``stride``.
        expected = cost.projections * (length if encoding == "token" else (blocks + 1) * config.stride)
    assert counted == expected


@pytest.mark.parametrize("length", [33, 128])
def test_gpt2_does_the_counted_products(length):
    config = small()
    model = build_gpt2(config, n_positions=length).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64))
    cost = gpt2_training_cost(config, length)
    counted = counted_products(counter, ".c_attn", ".c_proj", ".c_fc", ".lm_head")
    assert counted == length * (cost.projections + cost.head)
    keys_seen = sum(range(1, length + 1))
    assert cost.attention == pytest.approx(2 * config.transformer_n_layers * config.d_model * keys_seen / length)


def test_parameters_of_the_baselines_are_those_of_real_models():
    config = small()
    assert sum(p.numel() for p in build_gpt2(config, n_positions=48).parameters()) == gpt2_parameters(config, 48)
    assert sum(p.numel() for p in StrideMemoryTransformer(config).memory.ssm.parameters()) == ssm_parameters(config)


def test_attention_is_counted_query_by_query():
    layers, d, n, m, stride = 3, 32, 5, 12, 4
    window = n + m
    stream = smt_cost(small(encoding="stream")).attention
    assert stream == 2 * d * (layers * window + (layers - 1) * n / stride)  # a token sees the window, a slot the slots
    assert smt_cost(small(encoding="stream", writes=False)).attention == 2 * d * layers * m
    for encoding, queries in (("token", 1), ("stride", stride)):
        # Every entry of a window in all layers but the last, and there those alone that have logits.
        pairs = (layers - 1) * window * window + queries * window
        assert smt_cost(small(encoding=encoding)).attention == 2 * d * pairs / queries


@pytest.mark.parametrize(("pool_source", "entries"), [("window", 17), ("tokens", 12)])
def test_the_memory_is_counted_once_in_a_stride(pool_source, entries):
    config = small(pool_source=pool_source)
    cost, without = smt_cost(config), smt_cost(small(slot_readout=False))
    d, d_k, stride = 32, 24, 4
    assert cost.pooling == (2 * d * d_k + 2 * entries * d) / stride  # W_q x and W_k^T q; scores and weighted sum
    assert cost.ssm == ssm_products(config) / stride
    assert cost.head - without.head == d * d / stride and without.head == 96 * d
    assert [pooling_passes(small(pooling_norm=norm), entries) for norm in (False, True)] == [entries * d, 3 * entries * d]


def test_costs_of_parts_add_up_and_no_memory_costs_nothing():
    cost = smt_cost(SMTConfig(encoding="stream"))
    assert cost.total == cost.projections + cost.attention + cost.pooling + cost.ssm + cost.head
    without = smt_cost(SMTConfig(encoding="stream", writes=False))
    assert without.pooling == without.ssm == 0 and without.decoder < cost.decoder


def test_gpt2_with_grouped_heads_is_refused():
    config = small(transformer_n_kv_heads=2)
    with pytest.raises(ValueError, match="transformer_n_kv_heads"):
        gpt2_decode_cost(config, 10)
    with pytest.raises(ValueError, match="transformer_n_kv_heads"):
        build_gpt2(config, n_positions=10)
    with pytest.raises(ValueError, match="n_positions must be at least 1, got 0"):
        build_gpt2(small(), n_positions=0)


def test_gpt2_baseline_takes_labels_and_uses_fused_attention():
    model = build_gpt2(small(), n_positions=20)
    input_ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids, labels=input_ids).loss
    assert loss.item() == pytest.approx(torch.tensor(96.0).log().item(), rel=0.05)
    assert model.config._attn_implementation == "sdpa"
