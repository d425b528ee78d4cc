"""Loading GPT-2 and Mamba: what fits is loaded, what does not is explained."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from smt import SMTConfig, StrideMemoryTransformer


def smt(**switches):
    sizes = {
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
    return GPT2LMHeadModel(GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, **changes}))


def mamba(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 61}
    return MambaForCausalLM(MambaConfig(**{**sizes, **changes}))


def test_the_reports_name_every_parameter():
    model = smt()
    report = model.load_gpt2(gpt2())
    every = {name for name, _ in model.named_parameters()}
    assert set(report.loaded) | set(report.fresh) == every and not set(report.loaded) & set(report.fresh)
    assert all(name.startswith("memory.") for name in report.fresh)
    assert report.skipped == {"wpe.weight[65:]": "positions beyond the window"}
    report = model.load_mamba(mamba())
    assert all(name.startswith("memory.ssm.") for name in report.loaded)
    assert set(report.fresh) == every - set(report.loaded)
    assert report.skipped == {"embeddings.weight": "embedding=False"}


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
    assert torch.allclose(model.memory.ssm.norm_f.weight, torch.tensor(0.02))
    model.load_gpt2(source)
    rms = source.transformer.wte.weight.square().mean().sqrt()
    assert torch.allclose(model.memory.ssm.norm_f.weight, rms)


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
    with pytest.warns(UserWarning, match="token embedding was not loaded: its vocabulary has 50 tokens, the model 61"):
        report = smt().load_gpt2(gpt2(vocab_size=50))
    assert "wte.weight" in report.skipped and "embedding.weight" in report.fresh
    with pytest.raises(ValueError, match="GPT-2 has vocab_size = 50, the model 61"):
        smt().load_gpt2(gpt2(vocab_size=50), embedding=True)
    with pytest.raises(ValueError, match="vocab_size = 50 but vocab_size = 61"):
        smt().load_mamba(mamba(vocab_size=50), embedding=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (gpt2(n_embd=64), "n_embd = 64 but d_model = 32"),
        (gpt2(n_layer=3), "n_layer = 3 but transformer_n_layers = 2"),
        (gpt2(n_head=2), "n_head = 2 but transformer_n_heads = 4"),
        (gpt2(n_positions=40), "n_positions = 40, the window needs 65"),
    ],
    ids=["width", "layers", "heads", "positions"],
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
    with pytest.raises(ValueError, match="use_bias=False and use_conv_bias=True, got True and True"):
        smt().load_mamba(mamba(use_bias=True))


def test_what_is_not_a_gpt2_or_cannot_take_one_is_refused():
    with pytest.raises(ValueError, match="encoding 'stream' has rotary positions"):
        smt(encoding="stream").load_gpt2(gpt2())
    with pytest.raises(TypeError, match="source must be a GPT2Model"):
        smt().load_gpt2(mamba())
    with pytest.raises(TypeError, match="source must be a MambaModel"):
        smt().load_mamba(gpt2())
