"""The assembled model: initial loss, gradients, loss, generation, parameters and bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from smt import SMTConfig, StrideMemoryTransformer
from smt.model.loss import head_loss
from smt_kernels import linear_cross_entropy

ENCODINGS = ["token", "stride", "stream"]
SIZES = {
    "vocab_size": 211,
    "d_model": 64,
    "d_k": 32,
    "transformer_n_layers": 2,
    "transformer_n_heads": 4,
    "ssm_n_layers": 2,
    "ssm_d_state": 8,
    "dropout": 0.0,
}


def build(**switches):
    torch.manual_seed(11)
    return StrideMemoryTransformer(SMTConfig(**{**SIZES, **switches}))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_loss_at_initialisation_is_that_of_a_uniform_guess(encoding):
    model = build(encoding=encoding, vocab_size=4096, d_model=256)
    loss, _ = model.loss(torch.randint(4096, (2, 200)))
    assert abs(loss.item() / math.log(4096) - 1) < 0.05


@pytest.mark.parametrize("empty_slots", ["mask", "zero"])
@pytest.mark.parametrize("pool_source", ["window", "tokens"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_fresh_parameter_learns_from_one_batch_of_96_tokens(encoding, pool_source, empty_slots, fresh_gates):
    model = build(encoding=encoding, pool_source=pool_source, empty_slots=empty_slots)
    model.loss(torch.randint(211, (2, 96)))[0].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_memory_carries_what_the_window_has_lost(encoding):
    """A token 200 steps back changes the logits with writes, and cannot without."""
    ids = torch.randint(211, (1, 230))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 211
    for writes in (True, False):
        # A sliding window's reach grows with depth; with one layer it is the window alone.
        model = build(encoding=encoding, writes=writes, transformer_n_layers=1, initializer_range=0.1).double().eval()
        with torch.no_grad():
            difference = (model(ids)[0] - model(changed)[0])[0, -1].abs().max().item()
        assert (difference > 0) == writes


def test_the_loss_under_autocast_multiplies_in_its_dtype_and_keeps_the_gradient_of_the_weight_in_float32():
    hidden, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(53, 16, requires_grad=True)
    targets = torch.randint(53, (2, 9), dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(hidden, weight, targets)
    rounded = hidden.bfloat16().detach().requires_grad_()
    expected = linear_cross_entropy(rounded.flatten(0, 1), weight, targets.flatten().long())
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    (ours,), (d_weight, d_rounded) = torch.autograd.grad(loss, [weight]), torch.autograd.grad(expected, [weight, rounded])
    assert torch.equal(ours, d_weight) and (ours != ours.bfloat16()).any() and d_rounded.dtype == torch.bfloat16


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_loss_equals_cross_entropy_of_the_logits(encoding):
    model = build(encoding=encoding).eval()
    ids = torch.randint(211, (2, 77))
    logits, _ = model(ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(ids)[0], expected, atol=1e-5, rtol=1e-5)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, targets=targets)[0], model.loss(ids)[0])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_greedy_generation_takes_the_most_likely_token_of_each_forward_pass(encoding):
    model = build(encoding=encoding, initializer_range=0.2)
    ids = torch.randint(211, (2, 30))
    output = model.generate(ids, 45, temperature=0)
    assert output.shape == (2, 75) and torch.equal(output[:, :30], ids)
    with torch.no_grad():
        logits = model.eval()(output)[0]
    assert torch.equal(output[:, 30:], logits[:, 29:-1].argmax(-1))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sampling_equals_sampling_from_full_forward_passes(encoding):
    model = build(encoding=encoding, initializer_range=0.2).eval()
    ids = torch.randint(211, (2, 27))
    output = model.generate(ids, 10, temperature=0.7, top_k=20, top_p=0.9, generator=torch.Generator().manual_seed(4))
    generator, expected = torch.Generator().manual_seed(4), ids
    for _ in range(10):  # the writes at steps 16 and 32 lie on both sides
        with torch.no_grad():
            logits = model(expected)[0][:, -1] / 0.7
        for row in logits:
            order = row.argsort(descending=True)
            row[order[20:]] = -math.inf
            mass, kept = 0.0, []
            for token, probability in zip(order.tolist(), row.softmax(-1)[order].tolist(), strict=True):
                if mass >= 0.9:
                    break
                kept.append(token)
                mass += probability
            dropped = torch.ones_like(row, dtype=torch.bool)
            dropped[kept] = False
            row[dropped] = -math.inf
        expected = torch.cat([expected, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    assert torch.equal(output, expected)


def test_generation_leaves_the_training_mode_as_it_was():
    model = build(dropout=0.5).train()
    first = model.generate(torch.randint(211, (1, 5)), 3, temperature=0)
    assert model.training and first.shape == (1, 8)


def test_count_parameters_of_the_published_sizes():
    with torch.device("meta"):
        counts = StrideMemoryTransformer(SMTConfig.published()).count_parameters()
    parts = counts["breakdown"]
    assert parts["embedding"] == 50280 * 768  # CLAIMS: 38.6M
    assert parts["attention_pooling"] == 2 * 768 * 768  # CLAIMS: 1.2M
    assert abs(parts["ssm"] - 90.52e6) < 0.01e6  # CLAIMS: 24 layers and norms
    assert parts["lm_head"] == 0
    assert parts["transformer"] == 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + 65 * 768
    assert counts["total"] == counts["trainable"] == sum(parts.values())


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.long), ValueError, r"shape \(B, T\) with B, T >= 1, got \(5,\)"),
        (torch.zeros(0, 5, dtype=torch.long), ValueError, r"B, T >= 1, got \(0, 5\)"),
        (torch.zeros(2, 0, dtype=torch.long), ValueError, r"B, T >= 1, got \(2, 0\)"),
        (torch.full((1, 4), 211), ValueError, r"must lie in 0\.\.vocab_size - 1 = 0\.\.210, got 211\.\.211"),
        (torch.full((1, 4), -1), ValueError, r"got -1\.\.-1"),
        (torch.zeros(1, 4), TypeError, "must be an int64 or int32 tensor, got torch.float32"),
        ([[1, 2]], TypeError, "got list"),
        (torch.zeros(1, 4, dtype=torch.long, device="meta"), ValueError, "must be on the model's device cpu, got meta"),
    ],
    ids=["rank", "no-rows", "no-steps", "too-large", "negative", "dtype", "list", "device"],
)
def test_bad_input_ids_are_explained(ids, error, message):
    with pytest.raises(error, match=message):
        build()(ids)


def test_bad_targets_and_options_are_explained():
    model = build()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"targets must have the shape of input_ids, \(1, 4\), got \(1, 3\)"):
        model.loss(ids, ids[:, 1:])
    for target in (211, -1):
        wrong = torch.tensor([[3, -100, target, 0]])
        with pytest.raises(ValueError, match=rf"targets must lie in 0\.\.vocab_size - 1 = 0\.\.210 or be -100, got {target}"):
            model.loss(ids, wrong)
    with pytest.raises(ValueError, match="last_only is of logits"):
        model(ids, targets=ids, last_only=True)
    for option, value in (("temperature", -1.0), ("top_k", 0), ("top_p", 0.0)):
        with pytest.raises(ValueError, match=f"{option} must"):
            model.generate(ids, 1, **{option: value})
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0"):
        model.generate(ids, -1)
    with pytest.raises(TypeError, match="config must be an SMTConfig, got dict"):
        StrideMemoryTransformer({})


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shapes_are_told_without_values(encoding, fake):
    with FakeTensorMode() if fake else torch.device("meta"):
        model, ids = build(encoding=encoding), torch.zeros(2, 70, dtype=torch.long)
        logits, aux = model(ids)
        assert logits.shape == (2, 70, 211) and aux.n_writes == 4
        model.loss(ids)[0].backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
        with torch.no_grad():
            assert model.eval()(ids[:, :1], aux.state)[0].shape == (2, 1, 211)


@pytest.mark.parametrize("field", ["dropout", "pooling_dropout"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dropout_acts_in_training_only(encoding, field):
    model = build(encoding=encoding, slot_gate="open", **{field: 0.3})
    ids = torch.randint(211, (1, 70))
    assert not torch.equal(model.train()(ids)[0], model(ids)[0])
    assert torch.equal(model.eval()(ids)[0], model(ids)[0])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dropout_falls_on_embeddings_slots_and_both_residual_branches(encoding):
    """Where all of it is dropped, the final norm sees zeros, and nothing that is kept tells one row from another."""
    model = build(encoding=encoding, dropout=math.nextafter(1, 0), slot_readout=False).train()
    for parameter in model.decoder.parameters():
        parameter.data.normal_()  # a branch of fresh biases would be zero by itself
    hidden, aux = model.encode(torch.randint(211, (2, 40)))
    assert torch.equal(hidden, model.decoder.norm.bias.expand_as(hidden))
    assert torch.equal(*aux.state.kv_slots[:, 1].unbind(1)) and not torch.equal(*aux.state.slots)


@pytest.mark.parametrize("pool_source", ["window", "tokens"])
def test_pooling_dropout_falls_on_what_is_written(pool_source):
    model = build(pooling_dropout=math.nextafter(1, 0), pool_source=pool_source).train()
    ids = torch.randint(211, (2, 40))
    slots = model(ids)[1].state.slots
    assert torch.equal(*slots) and not torch.equal(*model.eval()(ids)[1].state.slots)
    some = build(pooling_dropout=0.5, pool_source=pool_source).train()(ids[:1].repeat(2, 1))[1].state.slots
    assert not torch.equal(*some), "each row has weights of its own dropped"
