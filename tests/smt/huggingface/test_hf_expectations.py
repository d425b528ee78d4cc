"""What users of ``transformers`` and PEFT take for granted: fresh weights, ends of text, labels at padding, states anywhere."""

import json

import pytest
import torch
from hf_models import SIZES, VOCAB, build, padded
from transformers import AutoTokenizer, pipeline

from smt import SMTConfig, SMTForCausalLM, StrideMemoryTransformer
from smt.data.documents import Document
from smt.data.tokenizer import Tokenizer


def test_weights_of_another_shape_are_drawn_as_fresh_ones_and_named(tmp_path):
    build(torch.float32).save_pretrained(tmp_path)
    kept = SMTForCausalLM.from_pretrained(tmp_path)
    changed = {"ssm_d_state": 8, "slot_gate": "open"}
    config = kept.config.__class__(**{**kept.config.smt.to_dict(), "ssm_d_state": changed["ssm_d_state"]})
    torch.manual_seed(0)
    model, report = SMTForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    named = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    expected = {f"model.memory.ssm.layers.{i}.mixer.{name}" for i in range(2) for name in ("A_log", "x_proj.weight")}
    assert named == expected
    std = config.smt.initializer_std
    for name, parameter in model.named_parameters():
        if name not in named:
            assert torch.equal(parameter, kept.get_parameter(name)), name
        elif name.endswith("A_log"):
            assert torch.equal(parameter, torch.arange(1, 9).float().log().expand_as(parameter))
        else:  # 5 standard errors of a standard deviation
            assert abs(parameter.std() / std - 1) < 5 * (2 * parameter.numel()) ** -0.5
    assert torch.isfinite(model(torch.ones(1, 12, dtype=torch.long)).logits).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a run leaves it: weights in our layout beside a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train([Document("a", "some text " * 9)], 270)
    StrideMemoryTransformer(SMTConfig(**{**SIZES, "vocab_size": tokenizer.vocab_size})).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_a_run_ends_its_texts_with_the_token_of_its_tokenizer(run, tmp_path):
    end = Tokenizer.load(run).end_of_document
    model = SMTForCausalLM.from_pretrained(run)
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (end, end, end)
    with torch.no_grad():
        model.model.decoder.norm.weight.zero_()
        model.model.decoder.norm.bias.copy_(model.model.embedding.weight[end] * 100)
        if model.model.decoder.slot_readout is not None:
            model.model.decoder.slot_readout.weight.zero_()
    ids = torch.ones(1, 3, dtype=torch.long)
    assert model.generate(ids, max_new_tokens=5, do_sample=False).tolist() == [[1, 1, 1, end]]
    model.save_pretrained(tmp_path)
    assert SMTForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == end


def test_a_tokenizer_may_have_a_token_for_padding(run, tmp_path):
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.load(run)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "a"}))
    config = SMTForCausalLM.from_pretrained(tmp_path).config
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.end_of_document, tokenizer.token("a"))


def test_the_tokenizer_of_a_run_pads_a_batch_on_the_left(run):
    tokenizer, model = AutoTokenizer.from_pretrained(run), SMTForCausalLM.from_pretrained(run)
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (model.generation_config.pad_token_id, "left")
    texts = ["some text some", "text", "some text"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = dict(max_new_tokens=3, do_sample=False)
    assert write(texts, batch_size=3, **options) == [write(text, **options) for text in texts]


def test_a_folder_without_a_tokenizer_has_no_end(run, tmp_path):
    StrideMemoryTransformer.from_pretrained(run).save_pretrained(tmp_path)
    assert SMTForCausalLM.from_pretrained(tmp_path).config.eos_token_id is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_at_padding_are_left_out_whatever_they_are(side):
    model = build()
    ids, mask, _ = padded([6, 20, 11], side)
    expected = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=ids).loss, expected)


def test_arguments_that_the_model_does_not_know_are_refused():
    ids = torch.ones(1, 3, dtype=torch.long)
    for name in ("token_type_ids", "head_mask", "atention_mask"):
        with pytest.raises(TypeError, match=f"forward has no argument '{name}'"):
            build()(ids, **{name: ids})
    assert build()(ids, token_type_ids=None).logits.shape == (1, 3, VOCAB)


def test_a_model_over_several_devices_and_hooks_that_would_not_run_are_refused(tmp_path):
    build(torch.float32).save_pretrained(tmp_path)
    devices = {"model.embedding": "cpu", "model.memory": "cpu", "model.decoder": "disk"}
    with pytest.raises(ValueError, match=r"device_map must be of one device, .*: got \['cpu', 'disk'\]"):
        SMTForCausalLM.from_pretrained(tmp_path, device_map=devices, offload_folder=tmp_path / "offloaded")
    model = SMTForCausalLM.from_pretrained(tmp_path, device_map="auto")
    ids, seen = torch.ones(1, 3, dtype=torch.long, device=model.device), []
    model.register_forward_hook(lambda *given: seen.append(given))
    assert model(ids).logits.shape == (1, 3, VOCAB) and seen
    model.model.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=r"^model is not called, and hooks on it have no effect"):
        model(ids)


def test_a_cache_goes_on_in_another_mode_and_dtype_and_refuses_other_rows():
    ids = torch.randint(VOCAB, (2, 20))
    model = build(torch.float32)
    with torch.no_grad():
        expected = model(ids).logits[:, 12:]
    with torch.inference_mode():
        cache = model(ids[:, :12]).past_key_values
        other = build(torch.float64)(ids[:, :12]).past_key_values
    for past in (cache, other):
        with torch.no_grad():
            pieces = [model(ids[:, step : step + 1], past_key_values=past).logits for step in range(12, 20)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="state has 2 rows, input_ids has 1"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="state must be on the model's device"):
        cache.state = cache.state.to("meta")
        model(ids[:, :1], past_key_values=cache)


def test_fp64_loads_and_runs(tmp_path):
    build(torch.float64).save_pretrained(tmp_path)
    model = SMTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.randint(VOCAB, (2, 12))
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == torch.float64
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)
