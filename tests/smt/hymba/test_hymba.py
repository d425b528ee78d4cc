"""Every layout is what its equations say, sees what it should, and owns what it should."""

import copy
import inspect

import plain
import pytest
import torch
from models import LAYOUTS, SIZES, configuration, model_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smt.hymba import Hymba, HymbaConfig, attention_map
from smt.hymba.layers import ParallelMixer
from smt.hymba.model import PROGRAMS


def tokens(*shape):
    return torch.randint(SIZES["vocab_size"], shape)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_loss_and_every_gradient_are_those_of_the_equations(name):
    config = configuration(name)
    model, ids, targets = model_of(config, torch.float64), tokens(2, 11), tokens(2, 11)
    targets[0, 4], targets[1, 7:] = -100, -100
    weights = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    expected = torch.stack([plain.hymba(config, weights, row)[0] for row in ids])
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    output = model(ids, targets=targets)
    output["loss"].backward()
    assert list(output) == ["loss", "logits"]
    torch.testing.assert_close(output["logits"], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output["loss"], loss, rtol=1e-10, atol=1e-10)
    for key, gradient in zip(weights, gradients, strict=True):
        assert gradient.abs().max() > 1e-7, key
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, rtol=1e-8, atol=1e-10, msg=key)


def test_the_parallel_block_is_that_of_the_paper_in_single_precision():
    config = configuration("parallel-no-metas", n_layers=1, global_layers=(), sliding_window=5)
    model, calls = model_of(config), []
    mixer = model.layers[0].mixer
    assert isinstance(mixer, ParallelMixer)
    mixer.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output[0])))
    with torch.no_grad():
        model(tokens(1, 9))
        ((x, mixed),) = calls
        layer = {f"mixer.{key}": value for key, value in mixer.named_parameters()}
        expected, _ = plain.mix(config, config.layers()[0], layer, x[0], 0, {})
    torch.testing.assert_close(mixed[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "mamba"])
def test_attention_maps_are_the_weights_that_the_equations_give(name):
    config = configuration(name)
    model, ids = model_of(config), tokens(1, 9)
    weights = {key: value.detach().double() for key, value in model.named_parameters()}
    _, maps = plain.hymba(config, weights, ids[0])
    for layer, plan in enumerate(config.layers()):
        if plan.attention:
            made = attention_map(model, ids, layer)
            assert made.dtype == torch.float32
            torch.testing.assert_close(made.double(), maps[layer], rtol=1e-4, atol=1e-5)


def test_maps_leave_the_mode_of_the_model_and_know_what_they_show():
    model, ids = model_of(configuration("hybrid", dropout=0.9)).train(), tokens(1, 6)
    assert torch.equal(attention_map(model, ids, 4), attention_map(model, ids, 4)) and model.training
    for arguments, message in [
        ((ids, 6), r"layer must lie in 0\.\.n_layers - 1 = 0\.\.5, got 6"),
        ((ids, 1), "layer must have attention, which 1 has not in the layout hybrid"),
        ((ids.expand(2, -1), 0), r"input_ids must have shape \(1, T\), got \(2, 6\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_map(model, *arguments)


@pytest.mark.parametrize(("n_layers", "window"), [(1, 4), (1, 1), (3, 3)])
def test_local_layers_see_as_far_as_their_windows_reach_and_no_farther(n_layers, window):
    model = model_of(configuration("local", n_layers=n_layers, sliding_window=window, kv_sharing="none"))
    ids = tokens(1, 16)
    far = ids.clone()
    far[0, 2] = (ids[0, 2] + 1) % SIZES["vocab_size"]
    with torch.no_grad():
        change = (model(far)["logits"] - model(ids)["logits"]).abs().amax(dim=(0, 2))
    reach = n_layers * (window - 1)
    assert change[2 + reach] > 1e-4 and (change[2 : 3 + reach] > 0).all()
    assert (change[3 + reach :] == 0).all() and (change[:2] == 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_model_sees_the_future_and_metas_are_seen_from_everywhere(name):
    model, ids = model_of(configuration(name)), tokens(1, 12)
    future = ids.clone()
    future[0, 8] = (ids[0, 8] + 1) % SIZES["vocab_size"]
    with torch.no_grad():
        before = model(ids)["logits"]
        change = (model(future)["logits"] - before).abs().amax(dim=(0, 2))
        assert (change[:8] < 1e-5).all() and change[8] > 1e-2
        if model.meta_tokens is not None:
            model.meta_tokens.weight[0] += 1.0
            assert ((model(ids)["logits"] - before).abs().amax(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_consumers_own_no_projection_of_keys_and_values(name):
    config = configuration(name)
    model, size = Hymba(config), config.d_model // 4
    for index, (layer, plan) in enumerate(zip(model.layers, config.layers(), strict=True)):
        ssm = 2 * config.ssm_d_inner if plan.mamba else 0
        pieces = config.ssm_expand_factor if plan.mamba else 1
        keys = config.kv_heads * size * (1 + pieces) if plan.kv_source == index else 0
        queries = config.d_model if plan.attention else 0
        assert layer.mixer.in_proj.weight.shape == (queries + keys + ssm, config.d_model)
    consumers = [index for index, plan in enumerate(config.layers()) if plan.kv_source not in (None, index)]
    assert bool(consumers) == (
        config.layout in ("local", "hybrid") or name in ("parallel", "parallel-runs", "parallel-no-metas")
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_are_counted_each_once(name):
    model = Hymba(configuration(name))
    counts, parts = model.count_parameters(), model.parts()
    in_parts = [parameter for part in parts.values() for parameter in part.parameters()]
    assert sorted(map(id, in_parts)) == sorted(map(id, model.parameters()))
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(counts["breakdown"].values()) == counts["total"] and counts["breakdown"]["lm_head"] == 0
    model.embedding.requires_grad_(False)
    assert counts["trainable"] - model.count_parameters()["trainable"] == model.embedding.weight.numel()
    assert ("ssm" in parts) == (model.config.layout in ("mamba", "hybrid", "hybrid_50_50"))


def test_local_attention_costs_no_more_once_its_window_is_full():
    config = configuration("hybrid", layout="local", n_layers=4, global_layers=())
    model = model_of(config)
    with torch.no_grad():
        cache = model.new_cache(1)
        model(tokens(1, 2), cache=cache)
        products = {}
        for context in (3, 4, 5, 6):
            # It does not know the CPU's fused attention.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(tokens(1, 1), cache=cache)["logits"]
            products[context] = counter.get_total_flops() // 2
    assert products[4] - products[3] == 4 * 2 * 32, "4 layers, of width 32: scores with one key more, and its value"
    assert products[4] == products[5] == products[6]


def test_fresh_weights_have_the_scales_of_gpt2_and_mamba():
    config = HymbaConfig(layout="parallel", d_model=256, n_layers=8, n_heads=4, vocab_size=1000)
    layer, std = Hymba(config).layers[1], 0.02 * (768 / 256) ** 0.5
    spreads = {layer.mixer.in_proj: std, layer.mixer.x_proj: std, layer.mlp.gate_and_up: std}
    spreads |= {layer.mixer.out_proj: std / 4, layer.mlp.down: std / 4}
    for linear, expected in spreads.items():
        assert linear.weight.std().item() == pytest.approx(expected, rel=0.05)
    dt = torch.nn.functional.softplus(layer.mixer.dt_proj.bias)
    assert 1e-4 <= dt.min() < dt.max() <= 0.1 + 1e-6
    assert Hymba(config).meta_tokens.weight.std().item() == pytest.approx(std, rel=0.05)


def test_checkpointing_runs_layers_again_and_changes_no_gradient():
    ids, plainly, calls = tokens(2, 7), model_of(configuration("parallel")).train(), []
    checkpointed = copy.deepcopy(plainly)
    checkpointed.gradient_checkpointing_enable()
    for model in (plainly, checkpointed):
        model.layers[1].register_forward_pre_hook(lambda module, inputs: calls.append(module))
    assert_gradients_equal(plainly, checkpointed, ids)
    # The meta tokens and the tokens, and both once more.
    assert (calls.count(plainly.layers[1]), calls.count(checkpointed.layers[1])) == (2, 4)


def test_compiling_makes_one_program_of_each_kind_of_layer_and_changes_no_gradient():
    ids, plainly, programs = tokens(2, 7), model_of(configuration("parallel-no-metas", n_layers=5, global_layers=(4,))), []
    compiled = copy.deepcopy(plainly)
    compiled.compile(backend=lambda graph, inputs: programs.append(graph) or graph.forward, fullgraph=True)
    assert_gradients_equal(plainly, compiled, ids)
    assert len(programs) == 3  # local layers with and without keys of their own, and a global one
    assert copy.deepcopy(compiled)._compiled is None


@pytest.mark.parametrize("own", [True, False], ids=["of its own", "of the process"])
def test_compiling_makes_all_its_programs_and_leaves_the_limit_of_others_where_it_can(own, monkeypatch):
    if own and "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this release of PyTorch knows one limit for all functions")
    if not own:
        whole = torch.compile

        def of_older_releases(model, *, fullgraph, backend):
            return whole(model, fullgraph=fullgraph, backend=backend)

        monkeypatch.setattr(torch, "compile", of_older_releases)
    model, programs = model_of(configuration("parallel-no-metas", n_layers=2, global_layers=(1,))), []
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        model.compile(backend=lambda graph, inputs: programs.append(graph) or graph.forward, fullgraph=True)
        assert torch._dynamo.config.recompile_limit == (1 if own else PROGRAMS)
        model(tokens(2, 7))
    assert len(programs) == 2


def assert_gradients_equal(plainly, other, ids):
    for model in (plainly, other):
        model(ids, targets=ids)["loss"].backward()
    for name, parameter in plainly.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_the_embedding_counts_for_the_head_that_is_tied_to_it():
    class Shifted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.shift = base, base.weight, nn.Parameter(torch.randn_like(base.weight))

        def forward(self, ids):
            return self.base(ids) + self.shift[ids]

    model, ids = model_of(configuration("parallel")), tokens(2, 9)
    merged = copy.deepcopy(model)
    model.embedding = Shifted(model.embedding)
    merged.embedding.weight.data += model.embedding.shift.data
    (found, expected) = (each(ids, targets=ids) for each in (model, merged))
    for name in ("loss", "logits"):
        torch.testing.assert_close(found[name], expected[name])
    assert torch.equal(model.generate(ids, 3, temperature=0), merged.generate(ids, 3, temperature=0))


@pytest.mark.parametrize("name", ["hybrid", "parallel"])
def test_shapes_are_told_without_values(name):
    with torch.device("meta"):
        model, ids = model_of(configuration(name)), tokens(2, 9)
        assert model(ids, targets=ids)["logits"].shape == (2, 9, SIZES["vocab_size"])


def test_dropout_falls_on_residual_branches_in_training_alone():
    model, ids = model_of(configuration("parallel", dropout=0.5)), tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids)["logits"], model(ids)["logits"])
        model.train()
        assert not torch.equal(model(ids)["logits"], model(ids)["logits"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "input_ids must be an int64 or int32 tensor, got torch.float32"),
        ({"input_ids": torch.tensor([[40]])}, ValueError, r"input_ids must lie in 0\.\.vocab_size - 1 = 0\.\.39, got 40\.\.40"),
        ({"input_ids": torch.zeros(3).long()}, ValueError, r"input_ids must have shape \(B, T\) with B, T >= 1, got \(3,\)"),
        (
            {"targets": torch.zeros(1, 2).long()},
            ValueError,
            r"targets must have the shape of input_ids, \(2, 3\), got \(1, 2\)",
        ),
        (
            {"targets": torch.full((2, 3), 40)},
            ValueError,
            r"targets must lie in 0\.\.vocab_size - 1 = 0\.\.39 or be -100, got 40",
        ),
        ({"n_valid": torch.tensor([1, 2])}, ValueError, "n_valid is for a cache"),
    ],
)
def test_bad_calls_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        model_of(configuration("local"))(**{"input_ids": torch.zeros(2, 3).long(), **arguments})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_are_formed_once_and_with_a_gradient_only_if_the_pass_had_one(mode):
    model, ids = model_of(configuration("local")), tokens(1, 4)
    with mode():
        without = model(ids)
    assert not without["logits"].requires_grad and without["logits"].tolist() == model(ids)["logits"].tolist()
    output = model(ids, targets=ids)
    with torch.no_grad():
        assert output["logits"] is output["logits"]
    assert output["logits"].requires_grad


def test_what_is_not_there_is_named():
    with pytest.raises(TypeError, match="config must be a HymbaConfig, got dict"):
        Hymba({})
    output = model_of(configuration("local"))(torch.zeros(2, 3).long())
    assert list(output) == ["logits"] and len(output) == 1 and "loss" not in output
    with pytest.raises(KeyError, match="there are logits, and loss with targets"):
        output["loss"]
