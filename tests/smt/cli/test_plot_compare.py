"""``smt plot`` and ``smt compare`` read what runs have left."""

import csv
import json
import shutil

import pytest

from smt import StrideMemoryTransformer
from smt.cli import main

pytestmark = pytest.mark.usefixtures("drawn")


@pytest.fixture
def unfinished(runs, tmp_path):
    folder = tmp_path / "unfinished"
    shutil.copytree(runs["stride"], folder)
    (folder / "results.json").unlink()
    return folder


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_plot_draws_the_curves_of_a_run_again(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["stride"], run)
    drawn = (run / "training_curves.png").read_bytes()
    (run / "training_curves.png").unlink()
    assert main(["plot", str(run)]) == 0
    assert (run / "training_curves.png").read_bytes() == drawn
    assert capsys.readouterr().out == f"files           {run / 'training_curves.png'}\n"


def test_plot_draws_runs_into_one_figure_finished_or_not(runs, unfinished, tmp_path):
    out = tmp_path / "new" / "both.png"
    assert main(["plot", str(runs["stride"]), str(unfinished), "--out", str(out)]) == 0
    assert is_png(out) and not (unfinished / "training_curves.png").samefile(out)


def test_compare_sorts_by_perplexity_and_counts_what_the_model_counts(runs, capsys):
    folders = [str(runs[name]) for name in ("stride", "stream")]
    assert main(["compare", *folders, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    rows = {row["experiment"]: row for row in values["runs"]}
    assert values["sorted_by"] == "perplexity" and values["notes"] == []
    perplexities = [row["perplexity"] for row in values["runs"]]
    assert perplexities == sorted(perplexities) and len(set(perplexities)) == 2
    for name, row in rows.items():
        results = json.loads((runs[name] / "results.json").read_text())["results"]
        model = StrideMemoryTransformer.from_pretrained(runs[name])
        assert row["run"] == f"{name}/{runs[name].name}" and row["encoding"] == name and row["pool_source"] == "window"
        assert row["parameters"] == model.count_parameters()["total"]
        assert (row["steps"], row["tokens"]) == (results["steps"], results["train_tokens"])
        assert (row["bits_per_byte"], row["best_loss"]) == (results["val_bits_per_byte"], results["best_val_loss"])


def test_compare_prints_each_run_once_and_leaves_the_table_in_three_formats_and_the_plot(runs, tmp_path, capsys):
    folders = [str(runs[name]) for name in ("stride", "stream")]
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {f"comparison.{suffix}" for suffix in ("md", "csv", "json", "png")} and is_png(files["comparison.png"])
    rows = list(csv.DictReader(files["comparison.csv"].open()))
    assert [row["run"] for row in rows] == [row["run"] for row in json.loads(files["comparison.json"].read_text())["runs"]]
    markdown = files["comparison.md"].read_text()
    for row in rows:
        assert printed.count(row["run"]) == markdown.count(row["run"]) == 1
        assert f"{float(row['perplexity']):,.2f}" in printed and f"{float(row['bits_per_byte']):.4f}" in markdown


def test_runs_of_different_tokenizers_are_compared_by_bits_per_byte_and_the_table_says_so(runs, capsys):
    assert main(["compare", str(runs["stride"]), str(runs["other_tokens"])]) == 0
    table, note = capsys.readouterr().out.split("note: ")
    assert "different tokenizers" in note and "sorted by bits per byte" in note
    assert len(table.splitlines()) == 4
    assert main(["compare", str(runs["stride"]), str(runs["other_tokens"]), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    figures = [row["bits_per_byte"] for row in values["runs"]]
    assert values["sorted_by"] == "bits_per_byte" and figures == sorted(figures)


def test_runs_of_different_held_out_texts_are_named_as_such(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs["stride"], other)
    values = json.loads((other / "results.json").read_text())
    values["results"]["val_bytes"] += 1
    (other / "results.json").write_text(json.dumps(values))
    assert main(["compare", str(runs["stream"]), str(other)]) == 0
    assert "note: the runs were evaluated on different held-out texts" in capsys.readouterr().out


def test_a_run_without_results_is_named_and_left_out(runs, unfinished, capsys):
    assert main(["compare", str(unfinished), str(runs["stride"])]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"smt: warning: {unfinished} has no results.json: the run is not finished, or it is the folder of " \
        "none; left out\n"  # fmt: skip
    assert len(captured.out.splitlines()) == 3
    assert main(["compare", str(unfinished)]) == 1
    assert "smt: error: smt compare needs a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        (["plot", "RUN"], lambda run: (run / "metrics_history.json").unlink(), "there is no RUN/metrics_history.json"),
        (["plot", "RUN"], lambda run: (run / "metrics_history.json").write_text("{}"), "must hold the lists train_loss,"),
        (["plot", "RUN", "OTHER"], None, "smt plot needs --out FILE to draw several runs in one figure"),
        (["plot", "RUN", "--out", "a.docx"], None, "'docx' is not supported"),
        (["plot", "RUN", "RUN", "--out", "a.png"], None, "runs must be different folders, RUN is there 2 times"),
        (["compare", "RUN", "RUN"], None, "runs must be different folders, RUN is there 2 times"),
        (["compare", "RUN"], lambda run: (run / "results.json").write_text('{"a'), "results.json is damaged: "),
        (["compare", "RUN"], lambda run: (run / "results.json").write_text("[1]"), "must hold a mapping, got list"),
        (["compare", "RUN"], lambda run: (run / "results.json").write_text("{}"), "is not that of a run: KeyError('model')"),
    ],
    ids=["no-history", "no-lists", "no-out", "format", "plot-twice", "compare-twice", "damaged", "list", "foreign"],
)
def test_errors_are_one_line_without_a_traceback(command, change, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(runs["stride"], run)
    if change is not None:
        change(run)
    names = {"RUN": str(run), "OTHER": str(runs["stream"])}
    assert main([names.get(argument, argument) for argument in command]) == 1
    error = capsys.readouterr().err
    assert error.startswith("smt: error: ") and message.replace("RUN", str(run)) in error
    assert error.count("\n") == 1 and "Traceback" not in error
