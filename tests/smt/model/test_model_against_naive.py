"""The model equals a naive loop over ``docs/model.md``, built from Hugging Face's GPT-2 and Mamba, or written out."""

import pytest
import torch
from naive import Stream, naive_forward
from transformers import GPT2Config, GPT2Model, MambaConfig, MambaModel

from smt import SMTConfig, StrideMemoryTransformer
from smt.model.readout import contribution

D_MODEL, VOCAB = 32, 61


def build(seed, n, m, stride, **switches):
    """The model and the Hugging Face modules it was loaded from, with slots of the scale of the embeddings.

    GPT-2's weights do not fit ``stream``: there every parameter of the decoder is drawn.
    """
    torch.manual_seed(seed)
    gpt2 = GPT2Model(GPT2Config(n_embd=D_MODEL, n_layer=2, n_head=4, n_positions=128, vocab_size=VOCAB)).eval()
    mamba = MambaModel(MambaConfig(hidden_size=D_MODEL, num_hidden_layers=2, state_size=8, vocab_size=VOCAB)).eval()
    for parameter in [*gpt2.parameters(), *mamba.parameters()]:
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    config = SMTConfig(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        n_ssm_outputs=n,
        m_input_tokens=m,
        stride=stride,
        d_k=24,
        transformer_n_layers=2,
        transformer_n_heads=4,
        ssm_n_layers=2,
        ssm_d_state=8,
        **{"encoding": "stride", **switches},
    )
    model = StrideMemoryTransformer(config).eval()
    if config.encoding == "stream":
        for parameter in model.decoder.parameters():
            parameter.data.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.05))
        model.embedding.weight.data.normal_(std=0.3)
    else:
        model.load_gpt2(gpt2)
    model.load_mamba(mamba)
    model.memory.pooling.w_q.weight.data.normal_(std=0.4)
    model.memory.pooling.w_k.weight.data.normal_(std=0.4)
    return model, gpt2, mamba


def stream_of(model, gates):
    """The naive decoder with the weights of ours."""

    def of(module):
        return module.weight, module.bias

    layers = [
        {
            "gate": gate,
            "qkv": of(block.attention.qkv),
            "proj": of(block.attention.proj),
            **{name: of(getattr(block, name)) for name in ("norm_1", "norm_2", "up", "down")},
        }
        for block, gate in zip(model.decoder.blocks, gates, strict=True)
    ]
    config, decoder = model.config, model.decoder
    sizes = {"n": config.n_ssm_outputs, "m": config.m_input_tokens, "stride": config.stride, "theta": config.rope_theta}
    heads = {"heads": config.transformer_n_heads, "kv_heads": config.n_kv_heads}
    return Stream(layers, decoder.slot_type, of(decoder.norm), **heads, **sizes)


def compare(
    length, n, m, stride, encoding, empty_slots, pool_source, pooling_norm, write_group, slot_gate="learned", slot_readout=True,
    **switches,
):  # fmt: skip
    model, gpt2, mamba = build(
        length, n, m, stride, encoding=encoding, empty_slots=empty_slots, pool_source=pool_source,
        pooling_norm=pooling_norm, write_group=write_group, slot_gate=slot_gate, slot_readout=slot_readout, **switches,
    )  # fmt: skip
    n_gates = model.config.n_kv_heads
    gates = None if slot_gate == "open" else [torch.zeros(n_gates) for _ in model.decoder.blocks]
    if slot_gate == "learned":
        gates = [20 * block.attention.slot_gate.detach()[:, 0] for block in model.decoder.blocks]
    if encoding == "stream":
        gpt2 = stream_of(model, gates or [torch.ones(n_gates)] * len(model.decoder.blocks))
    readout = None
    if slot_readout and slot_gate != "closed":
        readout = model.decoder.slot_readout.weight
        assert readout.std() > 0.1, "a matrix of zeros tells nothing"
    ids = torch.randint(VOCAB, (2, length))
    pooling = model.memory.pooling
    with torch.no_grad():
        expected, write_steps, weights = naive_forward(
            ids, model.embedding.weight, gpt2, mamba, pooling.w_q.weight, pooling.w_k.weight, n=n, m=m, stride=stride,
            encoding=encoding, empty=empty_slots, source=pool_source, norm=pooling_norm, group=write_group, gates=gates,
            readout=readout,
        )  # fmt: skip
        logits, aux = model(ids, return_weights=True)
    assert aux.write_steps == write_steps
    assert (logits - expected).abs().max() < 1e-4
    assert expected.std() > 0.1, "logits that do not vary would agree with anything"
    for made, theirs in zip(aux.attention_weights.unbind(1), weights, strict=True):
        assert torch.allclose(made[made > 0].flatten(), theirs.flatten(), atol=1e-5)


# Every value of a switch with every value of each other.
@pytest.mark.filterwarnings("ignore:stride")
@pytest.mark.parametrize(
    ("write_group", "empty_slots", "pool_source", "pooling_norm"),
    [
        (1, "mask", "window", False),
        (1, "zero", "tokens", True),
        (4, "mask", "tokens", True),
        (4, "zero", "window", False),
        (16, "mask", "window", True),
        (16, "zero", "tokens", False),
    ],
)
@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_forward_equals_the_naive_loop(encoding, empty_slots, pool_source, pooling_norm, write_group):
    # 71 steps of window 4 + 10: 17 writes, so that groups of 16 are passed and both halves fill up on the way.
    compare(71, 4, 10, 4, encoding, empty_slots, pool_source, pooling_norm, write_group)


@pytest.mark.parametrize("length", [1, 17, 66, 200])
@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_forward_equals_the_naive_loop_in_the_published_window(encoding, length):
    compare(length, 15, 50, 16, encoding, "mask", "window", True, 8)


def test_a_stream_with_fewer_heads_of_keys_and_another_base_equals_the_naive_loop():
    compare(71, 4, 10, 4, "stream", "mask", "window", True, 4, transformer_n_kv_heads=2, rope_theta=50.0)


def test_the_published_configuration_equals_the_naive_loop():
    config = SMTConfig.published(vocab_size=VOCAB)
    compare(
        130, config.n_ssm_outputs, config.m_input_tokens, config.stride, config.encoding, config.empty_slots,
        config.pool_source, config.pooling_norm, config.write_group, config.slot_gate, config.slot_readout,
    )  # fmt: skip


@pytest.mark.parametrize("slot_readout", [True, False], ids=["readout", "no-readout"])
@pytest.mark.parametrize("slot_gate", ["learned", "open", "closed"])
@pytest.mark.parametrize("encoding", ["token", "stride", "stream"])
def test_gates_scale_what_heads_read_from_slots_and_closed_ones_close_the_readout(encoding, slot_gate, slot_readout):
    compare(40, 4, 10, 4, encoding, "mask", "window", True, 8, slot_gate, slot_readout)


def test_fresh_gates_are_nearly_closed_and_slots_take_attention_behind_closed_ones(fresh_gates):
    ids = torch.randint(VOCAB, (1, 60))
    learned, opened, closed, without = (
        build(0, 4, 10, 4, slot_gate=gate, writes=writes)[0](ids)[0][:, 30:]
        for gate, writes in (("learned", True), ("open", True), ("closed", True), ("closed", False))
    )
    assert 0 < (learned - closed).norm() < 0.02 * (opened - closed).norm()
    assert not torch.allclose(closed, opened, atol=1e-3)
    assert not torch.allclose(closed, without, atol=1e-3)


def test_a_fresh_readout_tells_nothing_and_learns_from_every_token_after_the_first_write(fresh_gates):
    ids = torch.randint(VOCAB, (1, 60))
    model, without = (build(0, 4, 10, 4, slot_readout=readout)[0] for readout in (True, False))
    hidden, _ = model.encode(ids)
    assert torch.equal(hidden, without.encode(ids)[0]) and without.decoder.slot_readout is None
    for step, learns in ((4, False), (5, True), (59, True)):
        (gradient,) = torch.autograd.grad(hidden[0, step].sum(), model.decoder.slot_readout.weight, retain_graph=True)
        assert bool(gradient.any()) == learns


def test_small_slots_are_told_less_than_their_direction_and_an_empty_one_nothing():
    slots = torch.tensor([[1e-3, -1e-3], [0.0, 0.0]])
    expected = slots / (slots.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(contribution(torch.nn.Identity(), slots), expected)


def test_one_hundred_tokens_make_six_writes():
    model, _, _ = build(0, 15, 50, 16)
    _, aux = model(torch.randint(VOCAB, (1, 100)))
    assert aux.write_steps == [16, 32, 48, 64, 80, 96]
    assert aux["n_writes"] == 6
    assert aux.write_frequency == 6 / 100
