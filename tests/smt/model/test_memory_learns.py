"""The memory learns to name a key 40 to 62 tokens after it was shown, where only slots can tell (learn_recall.py)."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def learn_recall(monkeypatch):
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("learn_recall")


# No slot that a question sees was written while the window held the key: the state of the SSM must have kept it.
MODEL = {"n_ssm_outputs": 7, "m_input_tokens": 12, "stride": 4, "ssm_n_layers": 1}


# Ten seeds of ten learn it in 40 to 60 steps with either encoding; the benchmark has more keys, and longer windows.
@pytest.mark.parametrize(("encoding", "seed"), [("stream", 0), ("stride", 1)])
def test_memory_recalls_what_the_window_has_lost_and_nothing_else_does(learn_recall, encoding, seed, fresh_gates):
    # A quarter of the benchmark's length, with half as many keys.
    task = learn_recall.Task(length=64, shown=12, asking=12, n_keys=16, n_fillers=32, rows=16)
    model = task.build(seed, encoding=encoding, **MODEL)
    *_, (step, recalled) = task.train(model, seed, first=40)
    assert recalled >= learn_recall.RECALLED, f"{recalled:.1%} after {step} steps"

    # Without writes no weights can do better than guess: the answer does not depend on the key at all.
    control = task.build(seed, encoding=encoding, writes=False, **MODEL)
    control.load_state_dict(model.state_dict())
    ids, targets = task.batch(32, torch.Generator().manual_seed(seed + 10))
    is_key = (ids >= task.n_fillers) & (ids < task.marker)
    other_keys = torch.where(is_key, (ids - task.n_fillers + 1) % task.n_keys + task.n_fillers, ids)
    assert torch.equal(learn_recall.answers(control, ids, targets), learn_recall.answers(control, other_keys, targets))
    assert not torch.equal(learn_recall.answers(model, ids, targets), learn_recall.answers(model, other_keys, targets))
    # 192 questions at 1 in 16: 12 right on average; 26 or more have a probability below 2e-4.
    assert task.accuracy(control) < 26 / 192
