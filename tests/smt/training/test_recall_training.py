"""Recall is trained by its answers alone, and counted by them; the packaged configuration fits its documents."""

from dataclasses import replace

import pytest

from smt.data.recall import RecallTask, words
from smt.data.settings import DataConfig
from smt.data.tokenized import tokenize_corpus
from smt.data.walk import DocumentWalk
from smt.training.run import run
from smt.training.settings import RunConfig

SIZES = dict(
    vocab_size=300, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4,
)  # fmt: skip
RECALL = {"keys": 4, "values": 4, "fillers": 2, "pairs": 1, "queries": 2, "length": 30, "longest": 20, "documents": 12}


@pytest.fixture
def config(tmp_path):
    data = {
        "source": "recall",
        "recall": RECALL,
        "cache": str(tmp_path / "cache"),
        "batch_size": 3,
        "chunk_length": 11,
        "lanes": 1,
    }
    training = {"steps": 8, "evaluations": 1, "device": "cpu", "sample_tokens": 0}
    return RunConfig.from_dict({"experiment": "recall", "model": SIZES, "data": data, "training": training})


def test_a_run_trains_on_answers_alone_and_counts_them_and_its_padding_is_that_of_steps(config, tmp_path, monkeypatch):
    seen = []
    give = DocumentWalk.__iter__
    monkeypatch.setattr(DocumentWalk, "__iter__", lambda walk: (seen.append(batch) or batch for batch in give(walk)))
    outcome = run(config, tmp_path / "out")
    text = tokenize_corpus(config.data, SIZES["vocab_size"])
    of_values = {token for word in words("v", 4) for token in text.tokenizer.encode(f" {word}").tolist()}
    trained, done = seen[:8], outcome.progress
    assert all(token in of_values for batch in seen for token in batch.targets[batch.targets >= 0].tolist())
    assert done.n_targets == sum(batch.n_targets for batch in trained) > 0
    assert done.n_tokens == outcome.results["train_tokens"] == sum(batch.n_steps for batch in trained) > 5 * done.n_targets
    positions = sum(batch.targets[batch.reading].numel() for batch in trained)
    assert done.padding == pytest.approx(1 - done.n_tokens / positions) and done.padding < 0.2
    assert outcome.evaluation.n_targets == text.validation.n_targets == sum(batch.n_targets for batch in seen[8:])
    assert outcome.evaluation.n_bytes == 64 * 2 * len(" vaba")


def test_a_bounded_evaluation_counts_the_answers_of_the_documents_that_it_reads(config, tmp_path):
    config = replace(config, data=replace(config.data, eval_documents=3))
    text = tokenize_corpus(config.data, SIZES["vocab_size"])
    outcome = run(config, tmp_path / "out")
    assert outcome.evaluation.n_targets == sum(flags.sum() for flags in text.validation.counted[:3])
    assert outcome.evaluation.n_bytes == 3 * 2 * len(" vaba")


def test_the_packaged_configuration_has_a_token_for_every_word_and_reads_documents_whole(tmp_path):
    config = RunConfig.from_yaml("recall")
    task = RecallTask(**config.data.recall)
    data = DataConfig(source="recall", recall={**config.data.recall, "documents": 500}, cache=str(tmp_path))
    text = tokenize_corpus(data, config.model.vocab_size)
    every = [
        word for letter, count in (("k", task.keys), ("v", task.values), ("f", task.fillers)) for word in words(letter, count)
    ]
    assert all(len(text.tokenizer.encode(f" {word}")) == 1 for word in every)
    assert {length - 1 for length in text.train.lengths} == {config.data.chunk_length}
    assert text.train.n_targets == 500 * task.pairs * task.queries
    assert config.training.steps * config.data.batch_size <= task.documents  # no document is read twice
    assert task.longest >= 4 * config.model.window_size
