"""``SMTForCausalLM`` in the hands of ``transformers``: Auto classes, folders, losses, checkpointing, number formats."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hf_models import ENCODINGS, SIZES, VOCAB, build, padded
from transformers import AutoConfig, AutoModelForCausalLM

from smt import SMTConfig, SMTForCausalLM, SMTPreTrainedConfig, StrideMemoryTransformer
from smt.huggingface.model_card import model_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    build(torch.float32).save_pretrained(path)
    return path


def test_auto_classes_know_a_model_that_is_imported_after_them(folder):
    """The other order is that of this process: conftest.py imports smt."""
    imports = "from transformers import AutoModelForCausalLM; import smt"
    program = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "SMTForCausalLM", done.stderr


def test_a_saved_model_is_the_same_after_loading(folder):
    model, again = build(torch.float32), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(VOCAB, (2, 20))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert not again.training
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, SMTPreTrainedConfig) and config.smt == SMTConfig(**SIZES)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 2)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["SMTForCausalLM"]


def test_checkpoints_go_from_one_class_to_the_other(folder, tmp_path):
    model = StrideMemoryTransformer(SMTConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "ours")
    loaded = SMTForCausalLM.from_pretrained(tmp_path / "ours")
    loaded.model.save_pretrained(tmp_path / "back")
    ids = torch.randint(VOCAB, (2, 20))
    expected = model(ids)[0]
    for other in (loaded.model, StrideMemoryTransformer.from_pretrained(tmp_path / "back"), SMTForCausalLM.of(model).model):
        assert torch.equal(other(ids)[0], expected)


def test_wrapping_keeps_the_weights_themselves():
    model = StrideMemoryTransformer(SMTConfig(**SIZES))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrapped = SMTForCausalLM.of(model, eos_token_id=3)
    assert wrapped.generation_config.eos_token_id == 3
    assert SMTForCausalLM.of(StrideMemoryTransformer(SMTConfig(**SIZES)).bfloat16()).config.dtype == torch.bfloat16
    for name, parameter in wrapped.model.named_parameters():
        assert parameter is model.get_parameter(name) and torch.equal(parameter, before[name])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_wrapping_keeps_the_mode(training):
    model = StrideMemoryTransformer(SMTConfig(**SIZES)).train(training)
    model.decoder.eval()  # a part may have a mode of its own
    wrapped = SMTForCausalLM.of(model)
    assert wrapped.training is model.training is training and not model.decoder.training


def test_weights_may_be_given_without_a_folder():
    model, ids = build(torch.float32), torch.randint(VOCAB, (2, 20))
    again = SMTForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"^state_dict lacks model\.embedding\.weight$"):
        lacking = {name: tensor for name, tensor in model.state_dict().items() if name != "model.embedding.weight"}
        SMTForCausalLM.from_pretrained(None, config=model.config, state_dict=lacking)


def test_fresh_weights_are_those_of_the_model_itself():
    torch.manual_seed(5)
    model = StrideMemoryTransformer(SMTConfig(**SIZES))
    torch.manual_seed(5)
    auto = AutoModelForCausalLM.from_config(SMTPreTrainedConfig(**SIZES))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, auto.model.get_parameter(name)), name


def test_weights_that_are_not_the_models_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = build(torch.float32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.memory.pooling.w_q.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.memory\.pooling\.w_q\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_can_be_read_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        build(torch.float32).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_one_process_of_several_writes_the_card(tmp_path):
    build(torch.float32).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_model_card_is_written_once(tmp_path):
    model = build(torch.float32)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card == model_card(model.model) and "4 memory slots" in card and "$" not in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def shifted_loss(logits, labels, **options):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, **options)


def test_labels_are_shifted_inside_and_100_is_left_out():
    model = build(torch.float32)
    ids = torch.randint(VOCAB, (2, 20))
    labels = ids.masked_fill(torch.rand(2, 20) < 0.3, -100)
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss, shifted_loss(output.logits, labels))
    torch.testing.assert_close(model(ids, labels=ids).loss, model.model.loss(ids)[0])
    assert output.past_key_values is None and model(ids, labels=ids, return_dict=False)[0] == model(ids, labels=ids).loss
    model.config.return_dict = False
    assert type(model(ids)) is tuple and torch.equal(model(ids, return_dict=True).logits, model(ids)[0])


def test_training_holds_no_logits_unless_asked_for():
    model = build(torch.float32, dropout=0.0).train()
    ids = torch.randint(VOCAB, (2, 20))
    labels = ids.masked_fill(torch.rand(2, 20) < 0.3, -100)
    asked = model(ids, labels=labels, skip_logits=False, num_items_in_batch=17)
    torch.testing.assert_close(asked.loss, shifted_loss(asked.logits, labels, reduction="sum") / 17)
    expected = torch.autograd.grad(asked.loss, list(model.parameters()))
    output = model(ids, labels=labels, num_items_in_batch=torch.tensor(17))
    assert output.logits is None and "logits" not in output and len(output.to_tuple()) == 1
    torch.testing.assert_close(output.loss, asked.loss)
    for mine, theirs in zip(torch.autograd.grad(output.loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    assert model.eval()(ids, labels=labels, skip_logits=True).logits is None
    with pytest.raises(ValueError, match="skip_logits needs labels"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mean_over_no_label_is_not_a_number_in_either_mode(mode):
    model, ids = getattr(build(), mode)(), torch.randint(VOCAB, (2, 20))
    none = torch.full_like(ids, -100)
    assert model(ids, labels=none).loss.isnan() and model(ids, labels=none, num_items_in_batch=17).loss == 0


def test_accumulated_losses_are_those_of_one_batch():
    model = build(torch.float32)
    ids = torch.randint(VOCAB, (4, 20))
    labels = ids.clone()
    labels[0, 4:] = labels[2, 9:] = -100
    n_items = (labels[:, 1:] != -100).sum()
    parts = [model(ids[rows], labels=labels[rows], num_items_in_batch=n_items).loss for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_loss_and_gradients_as_they_are_alone(side):
    model = build()
    ids, mask, alone = padded([6, 20, 11], side)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    # The mean over all targets of the rows, each alone; a row's first token is nobody's target.
    n_targets = sum(len(prompt) - 1 for prompt in alone)
    expected = sum(model(prompt[None], labels=prompt[None], num_items_in_batch=n_targets).loss for prompt in alone)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs)


def test_a_state_with_padding_behind_it_is_never_returned():
    model = build()
    ids, mask, _ = padded([6, 20], "right")
    assert model(ids, attention_mask=mask).past_key_values is None
    assert model(ids, attention_mask=mask.bool()).past_key_values is None
    with pytest.raises(ValueError, match="padded on the left"):
        model(ids, attention_mask=mask, use_cache=True)


def test_a_state_is_returned_where_it_is_likely_used_or_asked_for():
    model, ids = build(), torch.randint(VOCAB, (2, 12))
    assert model(ids).past_key_values is not None and model(ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None and model(ids, labels=ids, use_cache=True).past_key_values is not None
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.config.use_cache = True
    assert model.train()(ids).past_key_values is None and model(ids, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_label_of_a_first_token_is_never_looked_at(mode):
    model, ids = getattr(build(dropout=0.0), mode)(), torch.randint(VOCAB, (2, 12))
    labels = ids.clone()
    labels[:, 0] = 99_999
    assert torch.equal(model(ids, labels=labels).loss, model(ids, labels=ids).loss)


def test_logits_to_keep_are_the_last_or_those_named():
    model = build()
    ids = torch.randint(VOCAB, (2, 12))
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 7])).logits, logits[:, [2, 7]])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(encoding):
    model = build(encoding=encoding, dropout=0.0).train()
    ids = torch.randint(VOCAB, (2, 40))
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # as the release names it

    def step():
        kept = {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        return sum(kept.values()), torch.autograd.grad(loss, list(model.parameters()))

    n_bytes, gradients = step()
    getattr(model, f"{kind}_checkpointing_enable")()
    n_bytes_less, again = step()
    for mine, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert n_bytes_less < 0.7 * n_bytes
    getattr(model, f"{kind}_checkpointing_disable")()
    assert step()[0] == n_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_loads_keep_the_rates_of_the_memory(dtype, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in dtypes if name.endswith("A_log")} == {torch.float32}
    rates = "model.memory.ssm.layers.1.mixer.A_log"
    assert torch.equal(model.get_parameter(rates), build(torch.float32).get_parameter(rates)), "to the last digit"
    assert {dtypes[name] for name in dtypes if not name.endswith("A_log")} == {dtype}
    ids = torch.randint(VOCAB, (2, 20))
    output = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert output.shape == (2, 25) and model(ids).logits.dtype == dtype


def test_new_tokens_are_drawn_as_fresh_ones_and_another_embedding_is_another_vocabulary():
    model = build(torch.float32)
    model.resize_token_embeddings(VOCAB + 500, mean_resizing=False)
    assert model.get_input_embeddings().weight[VOCAB:].std().item() == pytest.approx(0.3, rel=0.05)
    model.set_input_embeddings(torch.nn.Embedding(50, 16))
    assert model.config.vocab_size == model.model.config.vocab_size == model(torch.tensor([[49]])).logits.shape[-1] == 50


def test_a_larger_vocabulary_keeps_what_was_learnt():
    model = build(torch.float32)
    ids = torch.randint(VOCAB, (2, 20))
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 3)
    torch.testing.assert_close(model(ids).logits[..., :VOCAB], before)
    assert model.config.vocab_size == model.model.config.vocab_size == VOCAB + 3
    assert model(ids).past_key_values.state.config == model.model.config
    assert model(torch.full((1, 4), VOCAB + 2)).logits.shape == (1, 4, VOCAB + 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, ValueError, "inputs_embeds cannot be used"),
        ({"output_attentions": True}, ValueError, "output_attentions cannot be used"),
        ({"past_key_values": ()}, TypeError, "past_key_values must be an SMTCache, got tuple"),
        ({"labels": torch.ones(1, 3, dtype=torch.long), "logits_to_keep": 1}, ValueError, "labels need all logits"),
        ({"labels": torch.ones(3, dtype=torch.long)}, ValueError, r"labels must have the shape of input_ids, \(1, 3\)"),
        (
            {"labels": torch.tensor([[1, VOCAB, 1]])},
            ValueError,
            "labels must lie in 0..vocab_size - 1 = 0..36 or be -100, got 37",
        ),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, ValueError, r"attention_mask must have shape \(B, T\)"),
        ({"attention_mask": torch.ones(1, 4)}, ValueError, "attention_mask must have the shape of input_ids"),
        ({"input_ids": None}, ValueError, "input_ids must be given"),
    ],
    ids=["embeds", "attentions", "past", "logits", "labels", "range", "4d", "width", "none"],
)
def test_inputs_without_a_meaning_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        build()(**{"input_ids": torch.ones(1, 3, dtype=torch.long), **options})


def test_a_configuration_is_checked_when_it_is_built():
    with pytest.raises(ValueError, match="stride must lie in"):
        SMTPreTrainedConfig(**{**SIZES, "stride": 99})
    with pytest.raises(ValueError, match="the head is the embedding"):
        SMTPreTrainedConfig(**SIZES, tie_word_embeddings=False)
    config = SMTPreTrainedConfig(**SIZES)
    config.tie_word_embeddings = False  # as from_pretrained(..., tie_word_embeddings=False) does
    with pytest.raises(ValueError, match="the head is the embedding"):
        SMTForCausalLM(config)
    assert SMTPreTrainedConfig(**SIZES).hidden_size == 16 and SMTPreTrainedConfig(hidden_size=24).d_model == 24


def test_a_batch_padded_on_the_right_without_a_mask_scores_rows_as_alone():
    model = build()  # lm-eval calls it like this
    ids, _, alone = padded([6, 20, 11], "right")
    logits = model(ids).logits
    for row, prompt in enumerate(alone):
        torch.testing.assert_close(logits[row, : len(prompt)], model(prompt[None]).logits[0])


def test_evaluation_harnesses_find_no_longest_context():
    config = SMTPreTrainedConfig(**SIZES)
    assert not any(hasattr(config, name) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
