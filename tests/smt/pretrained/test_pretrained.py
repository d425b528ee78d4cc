"""Loading GPT-2 and Mamba: what fits is loaded, what does not is explained."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, MambaConfig, MambaForCausalLM

from smt import SMTConfig, StrideMemoryTransformer
from smt.model.windows import Span
from smt.pretrained.loading import config_of
from smt.pretrained.sources import Source, open_source
from smt.state.state import SMTState

# Older releases of transformers list the head of a Mamba, which is its embedding, among its tensors.
TIED = {"lm_head.weight"}


def smt(**switches):
    sizes = {
        "encoding": "stride",
        "vocab_size": 61,
        "d_model": 32,
        "d_k": 16,
        "transformer_n_layers": 2,
        "transformer_n_heads": 4,
        "ssm_n_layers": 2,
        "ssm_d_state": 8,
    }
    return StrideMemoryTransformer(SMTConfig(**{**sizes, **switches}))


def gpt2(**changes):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))


def mamba(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 61}
    return MambaForCausalLM(MambaConfig(**{**sizes, **changes}))


def randomised(source):
    """The source with every weight drawn anew: zeros and ones would hide a bias that is lost or a norm in the wrong place."""
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return source


def original(source, folder):
    """What a state-spaces checkpoint of the same weights looks like."""
    names = {name.replace("embeddings", "embedding"): tensor for name, tensor in source.state_dict().items()}
    folder.mkdir()
    torch.save(names, folder / "pytorch_model.bin")
    fields = {"d_model": 32, "n_layer": 2, "vocab_size": 57, "ssm_cfg": {"d_state": 8}, "rms_norm": True}
    fields |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def ssm_on(model, x):
    """The memory's SSM alone on (B, K, d)."""
    start = SMTState.initial(model.config, x.shape[0], device=x.device, dtype=x.dtype)
    return model.memory.ssm(x, start.conv, start.ssm, model.memory.ssm.prepare())[0]


@pytest.mark.parametrize("form", [GPT2LMHeadModel, GPT2Model], ids=["with-head", "bare"])
@pytest.mark.parametrize("encoding", ["token", "stride"])
def test_the_decoder_on_a_window_is_gpt2_on_it(encoding, form):
    source = randomised(gpt2()).eval()
    if form is GPT2Model:
        source = source.transformer
    model = smt(encoding=encoding, slot_gate="open", slot_readout=False).eval()
    model.load_gpt2(source)
    window = model.config.window
    step = window.write_step(window.n_memory) + window.stride  # the end of a block, with every slot and token there
    slots, tokens = torch.randn(3, window.n_memory, 32), torch.randn(3, window.n_tokens, 32)
    newest = window.writes_made(step) - window.n_memory
    n_queries = 1 if encoding == "token" else window.stride
    with torch.no_grad():
        spans = Span(tokens, step - window.n_tokens + 1), Span(slots, newest)
        ours, _ = model.decoder.encode_windows(*spans, step - n_queries + 1, [step + 1] * 3, keep=False)
        theirs = getattr(source, "transformer", source)(inputs_embeds=torch.cat([slots, tokens], dim=1)).last_hidden_state
    torch.testing.assert_close(ours, theirs[:, -n_queries:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["with-head", "bare", "original"])
def test_the_memory_is_mamba(form, tmp_path):
    source = randomised(mamba()).eval()
    model = smt()
    model.load_mamba({"with-head": source, "bare": source.backbone}.get(form) or original(source, tmp_path / "mamba"))
    x = 0.005 * torch.randn(2, 19, 32)  # so small that the eps of norms counts
    with torch.no_grad():
        torch.testing.assert_close(ssm_on(model, x), source.backbone(inputs_embeds=x).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_the_original_names_give_the_same_model_as_hugging_faces(tmp_path):
    source = randomised(mamba())
    ours, theirs = smt(), smt()
    report = ours.load_mamba(original(source, tmp_path / "mamba"), embedding=True)
    theirs.load_mamba(source, embedding=True)
    assert "embedding.weight" in report.loaded and set(report.skipped) <= TIED
    for name in report.loaded:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name


def test_weights_in_low_precision_are_loaded_into_a_model_in_full():
    source = randomised(gpt2())
    model = smt()
    model.load_gpt2(source.to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embedding.weight, source.transformer.wte.weight.float())


def test_the_reports_name_every_parameter():
    model = smt()
    report = model.load_gpt2(gpt2())
    every = {name for name, _ in model.named_parameters()}
    assert set(report.loaded) | set(report.fresh) == every and not set(report.loaded) & set(report.fresh)
    assert all(name.startswith("memory.") or name.endswith((".slot_gate", "slot_readout.weight")) for name in report.fresh)
    assert report.skipped == {"wpe.weight[65:]": "positions beyond the window"}
    report = model.load_mamba(mamba())
    assert all(name.startswith("memory.ssm.") for name in report.loaded)
    assert set(report.fresh) == every - set(report.loaded)
    assert set(report.skipped) - TIED == {"embeddings.weight"} and report.skipped["embeddings.weight"] == "embedding=False"


def test_a_folder_loads_like_the_model_it_was_saved_from(tmp_path):
    source, from_folder, from_object = gpt2(), smt(), smt()
    source.save_pretrained(tmp_path / "gpt2")
    recurrent = mamba()
    recurrent.save_pretrained(tmp_path / "mamba")
    from_folder.load_gpt2(tmp_path / "gpt2")
    from_folder.load_mamba(str(tmp_path / "mamba"))
    from_object.load_gpt2(source)
    from_object.load_mamba(recurrent)
    for name in ("decoder.", "embedding.", "memory.ssm."):
        ours, theirs = ([p for key, p in m.named_parameters() if key.startswith(name)] for m in (from_folder, from_object))
        assert ours and all(map(torch.equal, ours, theirs))


def test_a_fresh_memory_follows_the_scale_of_a_loaded_embedding():
    source = gpt2()
    source.transformer.wte.weight.data.mul_(7)
    model = smt()
    assert torch.allclose(model.memory.ssm.norm_f.weight, torch.tensor(model.config.initializer_std))
    for _ in range(2):  # and so does one that has followed another before
        model.load_gpt2(source)
        rms = source.transformer.wte.weight.square().mean().sqrt()
        assert torch.allclose(model.memory.ssm.norm_f.weight, rms)
        source.transformer.wte.weight.data.mul_(3)


def test_without_its_embedding_a_gpt2_leaves_the_memory_alone():
    model = smt()
    before = [parameter.clone() for parameter in model.memory.parameters()]
    report = model.load_gpt2(gpt2(), embedding=False)
    assert all(map(torch.equal, before, model.memory.parameters()))
    assert report.skipped["wte.weight"] == "embedding=False" and "embedding.weight" in report.fresh


def test_a_gpt2_may_have_just_the_positions_of_the_window():
    source, model = gpt2(n_positions=65), smt()
    report = model.load_gpt2(source)
    assert torch.equal(model.decoder.positions, source.transformer.wpe.weight) and not report.skipped


def test_a_loaded_memory_keeps_its_scale_unless_asked_to_match():
    source = mamba()
    source.backbone.norm_f.weight.data.fill_(3.0)
    model = smt()
    model.load_mamba(source)
    model.load_gpt2(gpt2())
    assert torch.allclose(model.memory.ssm.norm_f.weight, torch.tensor(3.0))
    model.load_mamba(source, match_scale=True)
    assert torch.allclose(model.memory.ssm.norm_f.weight, model.embedding.weight.square().mean().sqrt())


def test_another_vocabulary_is_skipped_with_a_warning_and_refused_when_asked_for():
    with pytest.warns(UserWarning, match=r"embedding of .* was not loaded: its vocabulary has 50 tokens, the model 61"):
        report = smt().load_gpt2(gpt2(vocab_size=50))
    assert "wte.weight" in report.skipped and "embedding.weight" in report.fresh
    with pytest.raises(
        ValueError, match=r"GPT-2 .* cannot be loaded: its vocabulary has 50 .* build the model with vocab_size=50"
    ):
        smt().load_gpt2(gpt2(vocab_size=50), embedding=True)
    with pytest.raises(ValueError, match=r"Mamba .* cannot be loaded: its vocabulary has 50 tokens, the model 61"):
        smt().load_mamba(mamba(vocab_size=50), embedding=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (gpt2(n_embd=64), "n_embd = 64 but d_model = 32"),
        (gpt2(n_layer=3), "n_layer = 3 but transformer_n_layers = 2"),
        (gpt2(n_head=2), "n_head = 2 but transformer_n_heads = 4"),
        (gpt2(n_embd=64, n_layer=1), "n_embd = 64 but d_model = 32; n_layer = 1 but transformer_n_layers = 2"),
        (gpt2(n_inner=64), r"n_inner = 64, the decoder needs 4 \* n_embd = 128"),
        (gpt2(n_positions=40), "n_positions = 40, the window needs 65"),
        (gpt2(activation_function="relu"), "activation_function = 'relu' instead of 'gelu_new'"),
        (gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True instead of False"),
    ],
    ids=["width", "layers", "heads", "width-and-layers", "inner-width", "positions", "activation", "scaling"],
)
def test_a_gpt2_of_another_size_is_refused_with_names_and_sizes(source, message):
    model = smt()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.load_gpt2(source)
    assert all(map(torch.equal, before, model.parameters())), "a refused source must leave the model as it was"


def test_a_mamba_of_another_size_or_form_is_refused():
    with pytest.raises(ValueError, match="state_size = 16 but ssm_d_state = 8"):
        smt().load_mamba(mamba(state_size=16))
    with pytest.raises(ValueError, match="use_bias = True instead of False; use_conv_bias = False instead of True"):
        smt().load_mamba(mamba(use_bias=True, use_conv_bias=False))


def test_an_original_mamba_of_another_form_is_refused(tmp_path):
    folder = original(mamba(), tmp_path / "mamba")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"ssm_cfg": {"layer": "Mamba2", "d_state": 128}, "attn_layer_idx": [3]}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"attn_layer_idx = \[3\] instead of .* ssm_cfg.layer = 'Mamba2' instead of 'Mamba1'"):
        smt().load_mamba(folder)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        *(("gpt2", field, value) for field, value in (("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False))),
        ("gpt2", "add_cross_attention", True),
        *(("mamba", field, value) for field, value in (("layer_norm_epsilon", 1e-6), ("hidden_act", "gelu"))),
        *(("original", field, value) for field, value in (("rms_norm", False), ("d_intermediate", 64))),
        *(("original", "ssm_cfg", {"d_state": 8, field: value}) for field, value in (("bias", True), ("conv_bias", False))),
    ],
)
def test_what_changes_the_meaning_of_weights_is_refused(family, field, value):
    fields = {"d_model": 32, "n_layer": 2, "ssm_cfg": {"d_state": 8}}
    source = open_source(gpt2()) if family == "gpt2" else open_source(mamba()) if family == "mamba" else Source("", fields, {})
    source.config[field] = value
    field, value = next(reversed(value.items())) if isinstance(value, dict) else (field, value)
    with pytest.raises(ValueError, match=f"computes something else than this model: .*{field} = {value!r} instead of "):
        (smt().load_gpt2 if family == "gpt2" else smt().load_mamba)(source)


def test_a_gpt2_does_not_fit_fewer_heads_of_keys_and_values():
    message = "as many key/value heads as query heads but transformer_n_kv_heads = 2$"
    with pytest.raises(ValueError, match=message):
        smt(transformer_n_kv_heads=2).load_gpt2(gpt2())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.weight"), "lacks h.1.ln_2.weight, which decoder.blocks.1.norm_2.weight needs"),
        (lambda t: t.pop("transformer.wpe.weight"), "lacks wpe.weight, its positions"),
        (lambda t: t.update({"transformer.h.0.extra": torch.ones(1)}), "has h.0.extra, which has no place in the model"),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(31)}),
            r"ln_f.bias is \(31,\) but decoder.norm.bias is \(32,\)",
        ),
    ],
    ids=["missing", "no-positions", "foreign", "shape"],
)
def test_a_damaged_source_is_refused_with_the_tensor_and_changes_nothing(change, message):
    source = open_source(gpt2())
    change(source.tensors)
    model = smt()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.load_gpt2(source)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_deeper_source_gives_its_first_layers_only_when_asked_to():
    deep_gpt2, deep_mamba = randomised(gpt2(n_layer=4)), randomised(mamba(num_hidden_layers=3))
    model = smt()
    with pytest.raises(ValueError, match="num_hidden_layers = 3 but ssm_n_layers = 2; first_layers=True takes the first"):
        model.load_mamba(deep_mamba)
    report = model.load_gpt2(deep_gpt2, first_layers=True)
    assert torch.equal(model.decoder.blocks[1].up.weight, deep_gpt2.transformer.h[1].mlp.c_fc.weight.T)
    assert report.skipped["h.3.ln_1.weight"] == "beyond the model's 2 layers"
    report = model.load_mamba(deep_mamba, first_layers=True)
    assert torch.equal(model.memory.ssm.layers[1].mixer.A_log, deep_mamba.backbone.layers[1].mixer.A_log)
    assert report.skipped["layers.2.mixer.D"] == "beyond the model's 2 layers"
    with pytest.raises(ValueError, match=r"n_layer = 1 but transformer_n_layers = 2$"):
        model.load_gpt2(gpt2(n_layer=1), first_layers=True)


def test_a_head_that_is_not_tied_and_masks_of_old_checkpoints_are_skipped_and_said():
    source = open_source(gpt2())
    source.tensors.update({"lm_head.weight": torch.zeros(61, 32), "transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9)})
    report = smt().load_gpt2(source)
    assert report.skipped["lm_head.weight"] == "the model's head is its embedding"
    assert report.skipped["h.0.attn.bias"] == "a causal mask, not a weight"


def test_a_report_reads_as_a_table_and_two_add_up():
    model = smt()
    first, second = model.load_gpt2(gpt2()), model.load_mamba(mamba())
    text = str(first)
    assert text.startswith("GPT-2 from a GPT2LMHeadModel\n  loaded (28)")
    assert "\n    decoder.blocks.{0..1}.attention.qkv.weight\n" in text
    assert "\n  skipped (1)\n    wpe.weight[65:]: positions beyond the window\n" in text
    both = first + second
    gates = [f"decoder.blocks.{layer}.attention.slot_gate" for layer in range(2)]
    assert sorted(both.fresh) == [
        *gates,
        "decoder.slot_readout.weight",
        "memory.pooling.w_k.weight",
        "memory.pooling.w_q.weight",
    ]
    assert set(both.loaded) | set(both.fresh) == {name for name, _ in model.named_parameters()}
    assert both.skipped.keys() - TIED == {"wpe.weight[65:]", "embeddings.weight"}


def test_the_config_of_sources_takes_them_whole(tmp_path):
    folder = original(mamba(), tmp_path / "mamba")
    config = config_of(gpt2=gpt2(vocab_size=50), mamba=folder, stride=10)
    assert (config.d_model, config.d_k, config.transformer_n_layers, config.transformer_n_heads) == (32, 32, 2, 4)
    assert (config.ssm_n_layers, config.ssm_d_state, config.ssm_d_conv, config.dt_rank) == (2, 8, 4, 2)
    assert (config.vocab_size, config.stride, config.encoding) == (50, 10, "stride")
    alone = config_of(mamba=folder, transformer_n_heads=2)
    assert alone.vocab_size == 61, "the rows of the embedding, padding included"
    assert alone.encoding == "stream"
    of_40 = Source("a folder", {"d_model": 40, "n_layer": 1}, {"embedding.weight": torch.zeros(7, 40)})
    assert config_of(mamba=of_40, transformer_n_heads=4).ssm_dt_rank == 3, "40 / 16, rounded up"
    assert config_of(mamba=mamba(hidden_size=128)).transformer_n_heads == 2, "heads of 64"
    with pytest.raises(ValueError, match=r"Mamba .* has hidden_size = 32, but d_model = 64: one width for all"):
        config_of(gpt2=gpt2(n_embd=64), mamba=mamba())


def test_what_is_not_a_gpt2_or_cannot_take_one_is_refused():
    with pytest.raises(ValueError, match="encoding 'stream' has rotary positions"):
        smt(encoding="stream").load_gpt2(gpt2())
    with pytest.raises(ValueError, match="a MambaForCausalLM is not a GPT-2: its config has model_type = 'mamba'"):
        smt().load_gpt2(mamba())
    with pytest.raises(ValueError, match="a GPT2LMHeadModel is not a Mamba-1: its config has model_type = 'gpt2'"):
        smt().load_mamba(gpt2())
    with pytest.raises(TypeError, match="source must be a model with a config"):
        smt().load_gpt2(61)
