"""The decoding benchmark says how it came to each context, leaves out what it cannot measure, and compares what is right."""

import importlib
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

# Older releases of transformers know no other names.
pytestmark = pytest.mark.filterwarnings("ignore:`(past_key_values|cache_params)` is deprecated:FutureWarning")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module of ``benchmarks``, as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run: its output, its rows and its plot."""
    folder = tmp_path_factory.mktemp("bench")
    sizes = "--quick --contexts 64,900 --d-model 64 --layers 1 --vocab-size 50 --max-prefill 100 --repeats 1 --device cpu"
    outputs = ["--json", str(folder / "rows.json"), "--plot", str(folder / "rows.png"), "--max-gib", "0.0003"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.syspath_prepend(str(BENCHMARKS))
        assert importlib.import_module("bench_decode").main([*sizes.split(), *outputs]) == 0
    return output.getvalue(), json.loads((folder / "rows.json").read_text())["rows"], folder / "rows.png"


def of(rows, task, case):
    return {row["length"]: row for row in rows if row["task"].startswith(task) and row["case"] == case}


def test_rows_hold_time_per_token_ratio_and_the_bytes_carried(run):
    output, rows, plot = run
    for encoding in ("stream", "stride", "token"):
        short, long = of(rows, "Decoding", f"SMT {encoding}").values()
        assert short["state_bytes"] == long["state_bytes"] > 0
        assert short["seconds_per_token"] == pytest.approx(short["seconds"] / 16)
        baseline = of(rows, "Decoding", "GPT-2, KV cache")[64]
        assert short["ratio"] == pytest.approx(baseline["seconds"] / short["seconds"])
        prefill = of(rows, "Prefill", f"SMT {encoding}")[64]
        assert prefill["seconds_per_token"] == pytest.approx(prefill["seconds"] / 64)
        assert f"SMT {encoding}" in output
    assert of(rows, "Decoding", "GPT-2, KV cache")[64]["state_bytes"] == 2 * 64 * 64 * 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_context_that_was_not_read_says_so(run):
    output, rows, _ = run
    short, long = of(rows, "Decoding", "SMT stream").values()
    # 100 tokens at most, and as many strides and tokens as 900 has: 900 % 16 == 100 % 16 == 4.
    assert short["remark"] is None and long["remark"] == "state after 100 tokens, moved on"
    assert long["remark"] in output and "cache of random keys and values" in output


def test_a_cache_that_is_too_large_is_left_out_with_the_reason(run):
    output, rows, _ = run
    row = of(rows, "Decoding", "GPT-2, static KV cache")[900]
    assert row["seconds"] is None and "not built" in row["not_measured"] and row["not_measured"] in output


def test_constancy_is_relative_to_the_shortest_context(run):
    _, rows, _ = run
    for encoding in ("stream", "stride", "token"):
        short, long = of(rows, "Constancy", f"SMT {encoding}").values()
        assert short["ratio"] == 1.0 and long["ratio"] == pytest.approx(short["seconds"] / long["seconds"])


def test_no_time_is_printed_when_decoding_is_wrong(load, monkeypatch, capsys):
    bench = load("bench_decode")
    layers = importlib.import_module("smt.model.step_layers")
    right = layers.rotation
    monkeypatch.setattr(layers, "rotation", lambda *arguments: [1.01 * part for part in right(*arguments)])
    assert bench.main(["--quick", "--contexts", "64", "--d-model", "64", "--layers", "1", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "decoding, stream" in captured.err and "ratio" not in captured.out


def test_a_folder_that_does_not_exist_is_refused_before_anything_runs(load, capsys):
    with pytest.raises(SystemExit):
        load("bench_decode").main(["--json", "no_such_folder/rows.json"])


def test_a_state_that_is_moved_on_is_at_its_step_on_the_device_too(load):
    sizes = {"d_model": 16, "d_k": 16, "transformer_n_layers": 1, "transformer_n_heads": 2, "ssm_n_layers": 1}
    config = load("smt").SMTConfig(vocab_size=20, **sizes)
    limits = {"longest": 900, "max_prefill": 100, "max_bytes": 0.0, "device": torch.device("cpu")}
    cases = load("decode_cases").DecodeCases(config, 2, **limits)
    for encoding in ("stream", "stride", "token"):
        state, remark = cases.state_at(encoding, 900)
        assert state.steps == (900, 900) and state.device_steps.tolist() == [900, 900]
        assert remark == "state after 100 tokens, moved on"
