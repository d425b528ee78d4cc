"""Texts packed into rows, as the collator of ``transformers`` packs them: each counts as it does alone."""

import pytest
import torch
from hf_models import VOCAB, build
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

LENGTHS = [5, 2, 40, 17, 18, 3]


def collated(**options):
    texts = [torch.randint(VOCAB, (length,)) for length in LENGTHS]
    return texts, DataCollatorWithFlattening(**options)([{"input_ids": text.tolist()} for text in texts])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
    ],
    ids=["positions", "all", "bounds"],
)
def test_what_the_collator_packs_gives_the_loss_and_logits_of_each_text(options):
    model = build(dropout=0.0)
    texts, batch = collated(**options)
    output = model(**batch)
    alone = [model(text[None], labels=text[None], num_items_in_batch=sum(LENGTHS) - len(LENGTHS)) for text in texts]
    torch.testing.assert_close(output.logits, torch.cat([of_text.logits for of_text in alone], dim=1))
    torch.testing.assert_close(output.loss, sum(of_text.loss for of_text in alone))
    assert output.past_key_values is None
    in_training = model.train()(**batch)
    assert in_training.logits is None
    torch.testing.assert_close(in_training.loss.float(), output.loss)


def test_the_first_token_of_a_text_is_no_target_whatever_its_label():
    model = build()
    _, batch = collated()
    expected = model(**batch).loss
    torch.testing.assert_close(model(**{**batch, "labels": batch["input_ids"]}).loss, expected)


def test_labels_of_32_bits_are_labels():
    model, (_, batch) = build(dropout=0.0), collated()
    narrow = {**batch, "labels": batch["labels"].int()}
    assert torch.equal(model(**narrow).loss, model(**batch).loss)
    assert torch.equal(model.train()(**narrow).loss, model(**batch).loss)


def test_rows_of_several_texts_each():
    model, ids = build(), torch.randint(VOCAB, (2, 12))
    positions = torch.tensor([[*range(12)], [*range(5), *range(7)]])
    output = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), labels=ids)
    alone = [model(text[None]).logits[0] for text in (ids[0], ids[1, :5], ids[1, 5:])]
    torch.testing.assert_close(output.logits, torch.stack([alone[0], torch.cat(alone[1:])]))
    targets = ids.clone()
    targets[1, 5] = -100
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected.float())


def test_the_trainer_learns_from_packed_texts_what_it_learns_from_padded_ones(tmp_path):
    texts = [{"input_ids": torch.randint(VOCAB, (length,)).tolist()} for length in LENGTHS]
    fresh = list(build(dropout=0.0).parameters())

    def pad(examples):
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = -100  # releases differ in whether they count it
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def weights_after(collator):
        model = build(dropout=0.0)
        options = dict(per_device_train_batch_size=3, max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True)
        options |= dict(save_strategy="no", disable_tqdm=True, logging_steps=1)
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), data_collator=collator, train_dataset=texts)
        trainer.train()
        return list(model.parameters())

    for mine, theirs, before in zip(weights_after(DataCollatorWithFlattening()), weights_after(pad), fresh, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not torch.equal(mine, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2]])}, r"position_ids must have the shape of input_ids, \(1, 4\), got \(1, 3\)"),
        ({"position_ids": torch.tensor([[0, 1, 0, 2]])}, "position_ids must count .*, got 2 at token 3"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4]])}, "position_ids must count .*, got 1 at token 0"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "cu_seq_lens_q": [0, 3, 4]}, r"cu_seq_lens_q must be .*\(0, 2, 4\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q must rise from 0 to T = 4"),
        ({"cu_seq_lens_q": [0, 2, 4], "attention_mask": torch.tensor([[1, 1, 1, 0]])}, "attention_mask must be all ones"),
        ({"cu_seq_lens_q": [0, 9, 4], "labels": torch.ones(1, 4).long()}, "cu_seq_lens_q must rise from 0 to T = 4"),
        ({"cu_seq_lens_q": [0, 2, 4], "use_cache": True}, "packed texts keep no state"),
    ],
    ids=["shape", "count", "start", "differ", "bounds", "labels", "mask", "cache"],
)
def test_packing_without_a_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.ones(1, 4, dtype=torch.long), **options)


def test_what_only_goes_with_packing_is_refused_alone():
    with pytest.raises(TypeError, match="forward has no argument 'seq_idx'"):
        build()(torch.ones(1, 4, dtype=torch.long), seq_idx=torch.zeros(1, 4, dtype=torch.int32))


def test_a_text_does_not_go_on_in_the_next_row():
    with pytest.raises(ValueError, match="in every row anew, got 2 at token 2"):
        build()(torch.ones(2, 2, dtype=torch.long), position_ids=torch.arange(4).view(2, 2))
    with pytest.raises(ValueError, match="cu_seq_lens_q must have 2, where a row begins"):
        build()(torch.ones(2, 2, dtype=torch.long), cu_seq_lens_q=[0, 1, 4])
