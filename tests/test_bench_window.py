"""The benchmark says only what it measured, beside the limit and the claim, and says nothing when a result is wrong."""

import csv
import importlib
import json
import math
import platform
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch):
    """Import a module of ``benchmarks``, as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_small_run_says_what_it_measured_beside_limit_and_claim_and_why_it_left_out_the_rest(
    load, tmp_path, monkeypatch, capsys
):
    """One test, so that no two workers make a run each."""
    bench = load("bench_window")
    monkeypatch.setattr(bench, "MODEL", {**dict.fromkeys(bench.MODEL, 1), "vocab_size": 64, "d_model": 32, "d_k": 16})
    sizes = "--quick --lengths 64,96 --training-lengths 48 --heads 2 --head-dim 16 --repeats 2 --max-seconds 60 --device cpu"
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "png")}
    outputs = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])]
    assert bench.main([*sizes.split(), *outputs]) == 0
    output, document = capsys.readouterr().out, json.loads(files["json"].read_text())
    check_measured_rows(document["rows"])
    check_what_is_left_out(output, document["rows"])
    measured = next(line for line in output.splitlines() if "stream_attention, blocked" in line and "2,300x" in line)
    assert measured.rstrip().endswith("2,300x")
    check_environment(document["environment"], files["json"].read_text())
    check_other_files(document["rows"], files)


def check_measured_rows(rows):
    assert {row["case"] for row in rows} >= {"full causal (SDPA)", "stream_attention, blocked", "SMT stride", "SMT stream"}
    for row in rows:
        if row["not_measured"] is None:
            assert row["seconds_per_token"] == pytest.approx(row["seconds"] / (row["batch"] * row["length"]))
            assert row["fastest"] <= row["seconds"] <= row["slowest"] and row["repeats"] >= 1
        else:
            assert row["seconds"] is row["ratio"] is row["fraction_of_limit"] is None and row["repeats"] == 0
    blocked = [row for row in rows if row["case"] == "stream_attention, blocked" and row["ratio"] is not None]
    for row in blocked:
        assert row["flop_limit"] == pytest.approx((row["length"] + 1) / 2 / 65)
        assert row["fraction_of_limit"] == pytest.approx(row["ratio"] / row["flop_limit"])
    assert blocked


def check_what_is_left_out(output, rows):
    reasons = {(row["case"], row["length"]): row for row in rows if row["not_measured"]}
    assert "interpreter" in reasons["stream_attention, triton", 96]["not_measured"]
    assert all(row["not_measured"] in output for row in reasons.values())


def check_environment(environment, text):
    """It is recorded without host name or path."""
    assert {"torch", "triton", "python", "processor", "cores", "threads", "device", "revision", "date"} <= environment.keys()
    assert environment["torch"] == torch.__version__ and environment["device"] == "cpu"
    assert environment["threads"] == torch.get_num_threads()
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text and platform.node() not in text


def check_other_files(rows, files):
    lines = files["csv"].read_text().splitlines()
    assert f"# torch: {torch.__version__}" in lines
    table = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [(row["case"], int(row["length"])) for row in table] == [(row["case"], row["length"]) for row in rows]
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_no_speed_up_is_printed_when_blocked_is_wrong(load, monkeypatch, capsys):
    bench = load("bench_window")
    blocked = importlib.import_module("smt_kernels.stream_attention.blocked")
    right = blocked.forward
    monkeypatch.setattr(blocked, "forward", lambda *arguments: tuple(result * 1.001 for result in right(*arguments)))
    assert bench.main(["--quick", "--sections", "attention", "--lengths", "64", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "stream_attention, blocked" in captured.err and "over budget" in captured.err
    assert "ratio" not in captured.out


@pytest.mark.parametrize("length", [64, 300, 1000], ids=lambda length: f"T{length}")
def test_the_window_of_flex_attention_covers_what_a_full_scan_finds(load, length):
    from torch.nn.attention.flex_attention import create_block_mask

    from smt_kernels import WindowSpec

    cases, window = load("attention_cases"), WindowSpec()
    n_slots = window.writes_before(length - 1)
    ours = cases.flex_block_mask(window, n_slots, length, CPU)
    scanned = create_block_mask(ours.mask_mod, None, None, length, n_slots + length, device="cpu")
    assert torch.equal(ours.to_dense(), scanned.to_dense())
    query = torch.arange(length)
    visible = ours.mask_mod(0, 0, query[:, None], torch.arange(n_slots + length)[None])
    tokens, slots = window.token_visible(query, query), window.slot_visible(query, torch.arange(n_slots))
    assert torch.equal(visible, torch.cat([slots, tokens], dim=1))


def test_calls_are_timed_in_turns_and_slow_ones_less_often(load):
    measure, order = load("measure"), []
    calls = {name: (lambda name=name: order.append(name)) for name in ("slow", "fast")}
    first = {"slow": 4.0, "fast": 1.0}  # seconds of a first call: the budget allows the slow one 2 more
    samples = measure.interleave(calls, first, 12.0, 6, CPU)
    assert len(samples["slow"].seconds) == 2 and len(samples["fast"].seconds) == 6
    assert order == ["fast", "fast", "slow", "fast"] * 2


def test_a_call_that_fills_its_budget_is_timed_once(load):
    measure = load("measure")
    samples = measure.interleave({"slow": lambda: None}, {"slow": 9.0}, 12.0, 6, CPU)
    assert samples["slow"].seconds == [9.0]


def test_a_prediction_is_never_a_measurement(load):
    measure = load("measure")
    ran = []

    def prepare(length):
        return lambda: ran.append(length)

    def missing(length):
        raise measure.Unavailable("not here")

    cases = [
        measure.Case("baseline", prepare, cost=lambda length: 10.0 ** (9 * length)),
        measure.Case("missing", missing, cost=lambda length: 1.0, limit=lambda length: 2.0),
    ]
    tables = list(measure.measure("task", cases, [4, 8], batch=1, max_seconds=1e6, max_repeats=2, device=CPU))
    rows = [row for rows in tables for row in rows]
    assert all(row.not_measured is not None for row in rows) and not {4, 8} & set(ran)
    assert rows[0].predicted_seconds > 1e6 and rows[0].seconds is None
    assert rows[1].not_measured == "not here" and rows[1].flop_limit == 2.0


def test_every_claim_is_recounted_from_the_cost_model(load):
    claims = load("claims")
    table = claims.as_markdown()
    assert len(table.splitlines()) == 2 + len(claims.claims())
    figures = [figure for claim in claims.claims() for figure in claim.figures.values()]
    assert all(math.isfinite(figure) for figure in figures)
    for text in (
        "3,244,800",
        "91,570,176",
        "5,645,405,280",
        "0.97x",
        "39.6x",
        "35.0x",
        "737,280",
        "18,432",
        "43 tokens",
        "504x",
    ):
        assert text in table


def test_a_folder_that_does_not_exist_is_refused_before_anything_runs(load, capsys):
    with pytest.raises(SystemExit):
        load("bench_window").main(["--json", "no_such_folder/rows.json"])
    assert "does not exist" in capsys.readouterr().err
