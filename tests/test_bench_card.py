"""The benchmark for a GPU, on tiny sizes and the CPU: it stops in time, loses nothing, and one failure costs one row."""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from smt import SMTConfig
from smt.config import PUBLISHED
from smt.hymba import HymbaConfig
from smt_kernels import stream_attention

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
    bench, blocked = load("bench_card"), functools.partial(stream_attention, backend="blocked")
    monkeypatch.setattr(load("card_cases"), "flex_attention", blocked)  # which compiles for longer than all else takes
    monkeypatch.setattr(bench, "release", lambda device: None)  # garbage of a process that has imported much takes long
    rows = bench.run(suite, time.monotonic() + 600, options_for(tmp_path, "attention,all writes"))
    assert all(row.seconds > 0 for row in rows), [row for row in rows if row.seconds is None]
    assert {row.section.split(",")[0] for row in rows} == {
        "attention",
        "all writes of a step",
    }
    ours = [row for row in rows if row.case == "stream_attention" and row.section == "attention, forward"]
    assert len(ours) == 6 and all(row.ratio is not None for row in ours)
    assert sum(row.case.startswith("FlexAttention") for row in rows) == 6
    document = json.loads((tmp_path / "card.json").read_text())
    assert len(document["rows"]) == len(rows) and document["environment"]["torch"] == torch.__version__
    report = (tmp_path / "card.md").read_text()
    assert all(f"## {section}" in report for section in {row.section for row in rows})
    assert f"{ours[0].ratio:.2f}x" in report and f"{ours[0].ratio:.2f}x" in capsys.readouterr().out


def test_a_case_that_fails_costs_its_row_alone(load, suite, tmp_path, monkeypatch):
    bench, cards = load("bench_card"), load("card_cases")

    def measure():
        raise RuntimeError("an illegal\naddress")

    case = load("card_rows").Case
    good = case("a section", "good", "1", lambda: 0.5)
    monkeypatch.setattr(cards.Suite, "cases", lambda self: iter([good, case("a section", "bad", "1", measure), good]))
    rows = bench.run(suite, time.monotonic() + 600, options_for(tmp_path, None))
    assert [row.seconds for row in rows] == [0.5, None, 0.5]
    assert rows[1].note == "RuntimeError: an illegal address" and rows[2].ratio == 1.0
    assert "not measured" in (tmp_path / "card.md").read_text()


def test_nothing_begins_after_the_time_is_up_and_what_was_measured_is_kept(load, suite, tmp_path, monkeypatch):
    bench, cards = load("bench_card"), load("card_cases")
    cases = [load("card_rows").Case("a section", str(index), "1", lambda: 1.0) for index in range(5)]
    monkeypatch.setattr(cards.Suite, "cases", lambda self: iter(cases))
    clock = iter([0.0, 1.0, math.inf])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    rows = bench.run(suite, 10.0, options_for(tmp_path, None))
    assert [row.case for row in rows] == ["0", "1"]
    assert [row["case"] for row in json.loads((tmp_path / "card.json").read_text())["rows"]] == ["0", "1"]


@pytest.mark.parametrize("script", ["bench_card", "profile_memory"])
def test_without_a_gpu_it_says_so_and_measures_nothing(script, load, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(script).main([]) == 1
    assert "there is none here" in capsys.readouterr().err


def test_a_profile_counts_every_launch_of_the_writes_and_adds_up_their_times(load, suite):
    """Operators in place of kernels, which a CPU does not launch."""
    lines = load("profile_memory").table(suite.writes(2, 48, write_group=2), suite.device).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    *kernels, total = cells
    assert any(name == "`aten::mm`" for name, *_ in kernels) and total[0] == "all"
    assert sum(int(launches.replace(",", "")) for _, launches, *_ in kernels) == int(total[1].replace(",", ""))
    together = [float(time.removesuffix(" ms")) for *_, time in kernels]
    assert together == sorted(together, reverse=True)


def test_times_of_calls_are_medians_and_means_of_what_the_clock_said(load, monkeypatch):
    clock, now = load("card_clock"), [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock, "WARM_UPS", 1)
    lasting = iter([100.0, 1.0, 2.0, 9.0, 3.0, 4.0, 8.0])  # warm-up; each timed alone; in a row

    def call():
        now[0] += next(lasting)

    times = clock.time_call(call, torch.device("cpu"), repeats=3)
    assert (times.host, times.call) == (2.0, 5.0) and times.peak_bytes is times.kernels is None


def test_kernels_that_overlap_count_once_and_what_cannot_be_profiled_is_said(load, monkeypatch):
    clock, rows = load("card_clock"), load("card_rows")
    assert clock.covered([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75)]) == 4.0 and clock.covered([]) == 0.0

    def fails(call, device):
        raise RuntimeError("no permission")

    monkeypatch.setattr(clock, "kernel_seconds", fails)
    case = rows.Case("s", "c", "1", lambda: clock.time_call(lambda: None, torch.device("cpu"), kernels=True), note="compiled")
    row = case.row()
    assert row.seconds is not None and row.kernel_seconds is None
    assert row.note == "compiled; kernels not told apart: RuntimeError: no permission"


def test_a_library_that_is_missing_costs_its_rows_by_name(load, suite, tmp_path, monkeypatch):
    for name in ("causal_conv1d", "mamba_ssm"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = load("bench_card").run(suite, time.monotonic() + 600, options_for(tmp_path, "SSM write"))
    assert [(row.case, row.seconds is None) for row in rows] == 2 * [
        ("causal-conv1d and mamba-ssm", True), ("stride_write", False), ("mamba-ssm, its scan alone", True),
    ]  # fmt: skip
    assert rows[0].note == "not installed: causal_conv1d" and rows[2].note == "not installed: mamba_ssm"


def test_no_time_is_shown_of_a_write_that_is_wrong(load, suite):
    ssm = load("card_ssm")
    problem = ssm.make_problem(CONFIG, 1, 20, suite.device, time_last=True)
    ssm.check(ssm.our_write, problem)
    with pytest.raises(ArithmeticError, match="its results are off by"):
        ssm.check(lambda *arguments: 1.1 * ssm.our_write(*arguments), problem)


def test_every_case_is_listed_once_and_the_published_form_trains(load, suite):
    suite.sizes = dataclasses.replace(suite.sizes, lengths=(48, 24, 32))
    cases = [(case.section, case.name, case.shape) for case in suite.cases()]
    assert len(set(cases)) == len(cases)
    assert {(section, case) for _, _, section, case, _ in load("publish_card").SPEED} <= {case[:2] for case in cases}
    step = suite._smt(suite.tokens_of(1, 24), mode="eager", **PUBLISHED)
    suite._train(step)
    assert step.model.config.encoding == "token" and all(p.grad is not None for p in step.model.decoder.blocks.parameters())


def test_a_hymba_of_the_study_trains_and_decodes_in_the_benchmark(load, suite, monkeypatch):
    of_hymba, sizes = load("card_hymba"), {"d_model": 16, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 20}
    config = HymbaConfig(**sizes, dropout=0.0)
    monkeypatch.setattr(of_hymba, "PROMPT", 5)
    step = of_hymba.training_step(config, suite.tokens_of(2, 9, 20), suite.device, compiled=False)
    suite._train(step)
    assert all(parameter.grad is not None for parameter in step.model.parameters())
    assert of_hymba.decoding(config, 2, suite.tokens_of, suite.device).call > 0
