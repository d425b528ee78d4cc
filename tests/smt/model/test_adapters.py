"""Adapters, parametrisations and hooks on any layer do what they do elsewhere, or the layer is named that cannot have them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from smt import SMTConfig, StrideMemoryTransformer

ENCODINGS = ["token", "stride", "stream"]
MIXER = "memory.ssm.layers.0.mixer"
# Their weights are taken by fused operations.
FUSED = [f"{MIXER}.x_proj", f"{MIXER}.dt_proj", f"{MIXER}.conv1d", "memory.pooling.w_q", "memory.pooling.w_k"]


def build(encoding="stream"):
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=37, d_model=16, d_k=8, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4,
        initializer_range=0.3, n_ssm_outputs=4, m_input_tokens=9, stride=3, dropout=0.0, encoding=encoding,
    )  # fmt: skip
    return StrideMemoryTransformer(SMTConfig(**sizes)).double().eval()


class LowRank(nn.Module):
    """An adapter as PEFT makes them: the layer's weight is still its ``weight``, and a call adds to what the layer gives."""

    def __init__(self, base_layer, dropout=0.0):
        super().__init__()
        self.base_layer = base_layer
        dtype = base_layer.weight.dtype
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False, dtype=dtype)
        self.lora_dropout = nn.Dropout(dropout)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x)))


def replace(model, name, **options):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, LowRank(model.get_submodule(name), **options))


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def run(model, ids, n_parallel=20):
    """Logits of some steps in parallel and of the others one by one, with writes in both."""
    logits, aux = model(ids[:, :n_parallel])
    pieces = [logits]
    for step in range(n_parallel, ids.shape[1]):
        logits, aux = model(ids[:, step : step + 1], aux.state)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_adapters_on_all_linear_layers_are_honoured_and_trained(encoding):
    model, merged = build(encoding), build(encoding)
    ids = torch.randint(37, (2, 30))
    names = linear_names(model)
    assert {*FUSED} - {f"{MIXER}.conv1d"} < {*names} and "decoder.slot_readout" in names
    for name in names:
        replace(model, name)
        adapter = model.get_submodule(name)
        merged.get_submodule(name).weight.data += adapter.lora_B.weight @ adapter.lora_A.weight
    torch.testing.assert_close(run(model, ids), run(merged, ids))
    model.requires_grad_(False)
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(names)
    for parameter in adapters.values():
        parameter.requires_grad_()
    model.loss(ids)[0].backward()
    assert [name for name, parameter in adapters.items() if parameter.grad is None or not parameter.grad.any()] == []


def test_an_adapter_on_the_embedding_counts_for_the_head_that_is_tied_to_it():
    class LowRankRows(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, dtype = base_layer, base_layer.weight.dtype
            self.rows = nn.Parameter(torch.randn(base_layer.num_embeddings, 2, dtype=dtype))
            self.columns = nn.Parameter(torch.randn(2, base_layer.embedding_dim, dtype=dtype))

        @property
        def weight(self):
            return self.base_layer.weight

        def forward(self, ids):
            return self.base_layer(ids) + self.rows[ids] @ self.columns

    model, merged, ids = build(), build(), torch.randint(37, (2, 30))
    model.embedding = LowRankRows(model.embedding)
    merged.embedding.weight.data += model.embedding.rows.data @ model.embedding.columns.data
    torch.testing.assert_close(run(model, ids), run(merged, ids))
    torch.testing.assert_close(model.loss(ids)[0], merged.loss(ids)[0])


def test_parametrised_weights_are_those_that_are_used():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, doubled = build(), build()
    ids = torch.randint(37, (2, 30))
    for name in [*linear_names(model), f"{MIXER}.conv1d"]:
        parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
        doubled.get_submodule(name).weight.data *= 2
    torch.testing.assert_close(run(model, ids), run(doubled, ids))
    model.loss(ids)[0].backward()
    doubled.loss(ids)[0].backward()
    for name in (*linear_names(doubled), f"{MIXER}.conv1d"):
        original = model.get_submodule(name).parametrizations.weight.original
        torch.testing.assert_close(original.grad, 2 * doubled.get_submodule(name).weight.grad, msg=name)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_module_runs_its_hooks_or_is_refused_by_its_name(encoding):
    ids = torch.randint(37, (1, 15))
    for name, module in build(encoding).named_modules():
        if not name or isinstance(module, nn.ModuleList):
            continue
        model, seen = build(encoding), []
        model.get_submodule(name).register_forward_hook(lambda *arguments, seen=seen: seen.append(len(arguments)))
        if name in (*FUSED, "decoder", "memory", "memory.pooling"):
            with pytest.raises(ValueError, match=f"^{name} is (never|not) called"):
                model(ids)
            continue
        with torch.no_grad():
            _, aux = model(ids)
            assert seen or isinstance(module, nn.Dropout), name
            seen.clear()
            model(torch.ones(1, 1, dtype=torch.long), aux.state)  # step 15 makes a write
            assert seen or isinstance(module, nn.Dropout), name


@pytest.mark.parametrize("name", [name for name in FUSED if not name.endswith("conv1d")])
def test_dropout_before_an_adapter_that_is_never_called_is_refused_in_training(name):
    model = build()
    replace(model, name, dropout=0.5)
    ids = torch.randint(37, (1, 14))
    model.eval()(ids)
    with pytest.raises(ValueError, match=f"^{name} is never called.*dropout has no effect"):
        model.train()(ids)


@pytest.mark.parametrize("name", FUSED)
def test_a_layer_that_is_offloaded_is_refused(name):
    model = build()
    layer = model.get_submodule(name)
    layer.forward = lambda x: x  # as accelerate puts its own in the place of a module's
    with pytest.raises(ValueError, match=f"^{name} is never called"):
        model(torch.randint(37, (1, 14)))


def test_another_convolution_is_refused():
    model = build()
    mixer = model.get_submodule(MIXER)
    mixer.conv1d = nn.Sequential(mixer.conv1d)
    with pytest.raises(ValueError, match=f"^{MIXER}.conv1d is never called"):
        model(torch.randint(37, (1, 14)))


class Around(nn.Module):
    """A wrapper as those of activation checkpointing: it hands on what it is asked for, and counts its calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *arguments, **named):
        self.calls += 1
        return self.inner(*arguments, **named)


@pytest.mark.parametrize("name", ["decoder", "memory.pooling", "memory.ssm", "memory.ssm.layers.0", MIXER])
def test_what_wraps_a_module_is_called_or_refused_by_its_name(name):
    model, ids = build(), torch.randint(37, (1, 26))
    expected = run(model, ids)
    parent, _, last = name.rpartition(".")
    around = Around(model.get_submodule(name))
    setattr(model.get_submodule(parent), last, around)
    if name in ("decoder", "memory.pooling"):
        with pytest.raises(ValueError, match=f"^{name} is not called"):
            model(ids)
        return
    torch.testing.assert_close(run(model, ids), expected)
    assert around.calls > 1


def test_a_mixer_in_which_the_weights_are_not_found_is_refused():
    model = build()
    layer = model.get_submodule(MIXER.rpartition(".")[0])
    layer.mixer = nn.Sequential(layer.mixer)
    with pytest.raises(ValueError, match=f"^{MIXER} must be a MambaMixer or hand on what it has, got Sequential"):
        model(torch.randint(37, (1, 14)))


class Curved(LowRank):
    """No matrix: it acts on what it gives."""

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x)).square()


@pytest.mark.parametrize("name", [name for name in FUSED if not name.endswith("conv1d")])
def test_what_no_matrix_can_do_is_refused(name):
    model = build()
    parent, _, last = name.rpartition(".")
    curved = Curved(model.get_submodule(name))
    setattr(model.get_submodule(parent), last, curved)
    with pytest.raises(ValueError, match=f"^{name} is never called.*Curved is not linear"):
        model(torch.randint(37, (1, 14)))


@pytest.mark.parametrize("name", [name for name in FUSED if not name.endswith(("conv1d", "dt_proj"))])
def test_a_bias_that_has_no_place_is_refused(name):
    model = build()
    replace(model, name)
    adapter = model.get_submodule(name)
    adapter.lora_B = nn.Linear(2, adapter.base_layer.out_features, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"^{name} is never called.*lora_B.bias has no effect"):
        model(torch.randint(37, (1, 14)))


def test_a_layer_without_parameters_is_refused():
    model = build()
    model.memory.pooling.w_q = nn.Identity()
    with pytest.raises(ValueError, match=r"^memory\.pooling\.w_q is never called.*Identity has no parameters"):
        model(torch.randint(37, (1, 14)))
