"""The benchmark for a GPU, on tiny sizes and the CPU: it stops in time, loses nothing, and one failure costs one row."""

import argparse
import importlib
import json
import math
import time
from pathlib import Path

import pytest
import torch

from smt import SMTConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CONFIG = SMTConfig(
    vocab_size=50,
    d_model=12,
    d_k=8,
    dropout=0.0,
    transformer_n_layers=1,
    transformer_n_heads=3,
    ssm_n_layers=1,
    encoding="stream",
)


@pytest.fixture
def load(monkeypatch):
    """Import a module of ``benchmarks``, as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def suite(load, monkeypatch):
    monkeypatch.setattr(load("bench_card"), "ceilings", lambda device: {"copy": 1e12, "product": 1e13})
    for count in ("REPEATS", "WARM_UPS"):
        monkeypatch.setattr(load("card_clock"), count, 1)
    cards = load("card_cases")
    return cards.Suite(cards.Sizes(CONFIG, tokens=96, lengths=(48, 24), short=20), torch.device("cpu"))


def options_for(folder, only):
    return argparse.Namespace(only=only, json=folder / "card.json", markdown=folder / "card.md")


def test_sections_are_measured_and_reported_with_ratios_to_what_a_user_would_take(load, suite, tmp_path, capsys, monkeypatch):
    bench = load("bench_card")
    monkeypatch.setattr(bench, "release", lambda device: None)  # garbage of a process that has imported much takes long
    rows = bench.run(suite, time.monotonic() + 600, options_for(tmp_path, "attention,all writes"))
    assert all(row.seconds > 0 for row in rows), [row for row in rows if row.seconds is None]
    assert {row.section.split(",")[0] for row in rows} == {
        "attention",
        "all writes of a step",
    }
    ours = [row for row in rows if row.case == "stream_attention" and row.section == "attention, forward"]
    assert len(ours) == 6 and all(row.ratio is not None for row in ours)
    document = json.loads((tmp_path / "card.json").read_text())
    assert len(document["rows"]) == len(rows) and document["environment"]["torch"] == torch.__version__
    report = (tmp_path / "card.md").read_text()
    assert all(f"## {section}" in report for section in {row.section for row in rows})
    assert f"{ours[0].ratio:.2f}x" in report and f"{ours[0].ratio:.2f}x" in capsys.readouterr().out


def test_a_case_that_fails_costs_its_row_alone(load, suite, tmp_path, monkeypatch):
    bench, cards = load("bench_card"), load("card_cases")

    def measure():
        raise RuntimeError("an illegal\naddress")

    good = cards.Case("a section", "good", "1", lambda: 0.5)
    monkeypatch.setattr(cards.Suite, "cases", lambda self: iter([good, cards.Case("a section", "bad", "1", measure), good]))
    rows = bench.run(suite, time.monotonic() + 600, options_for(tmp_path, None))
    assert [row.seconds for row in rows] == [0.5, None, 0.5]
    assert rows[1].note == "RuntimeError: an illegal address" and rows[2].ratio == 1.0
    assert "not measured" in (tmp_path / "card.md").read_text()


def test_nothing_begins_after_the_time_is_up_and_what_was_measured_is_kept(load, suite, tmp_path, monkeypatch):
    bench, cards = load("bench_card"), load("card_cases")
    cases = [cards.Case("a section", str(index), "1", lambda: 1.0) for index in range(5)]
    monkeypatch.setattr(cards.Suite, "cases", lambda self: iter(cases))
    clock = iter([0.0, 1.0, math.inf])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    rows = bench.run(suite, 10.0, options_for(tmp_path, None))
    assert [row.case for row in rows] == ["0", "1"]
    assert [row["case"] for row in json.loads((tmp_path / "card.json").read_text())["rows"]] == ["0", "1"]


def test_without_a_gpu_it_says_so_and_measures_nothing(load, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load("bench_card").main([]) == 1
    assert "there is none here" in capsys.readouterr().err


def test_times_of_calls_are_medians_and_means_of_what_the_clock_said(load):
    times = load("card_clock").time_call(lambda: time.sleep(0.002), torch.device("cpu"), repeats=3)
    assert 0.002 <= times.host <= times.call * 1.5 and times.peak_bytes is None
