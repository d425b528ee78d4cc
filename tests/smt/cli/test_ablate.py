"""``smt ablate`` runs the cells of a grid or a study, goes on where it stopped, and compares them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from command_line import TINY

from smt.cli import main

OPTIONS = [*TINY, "--steps", "2", "--sample_tokens", "0"]
GRID = ["--grid", "encoding=stride,stream", "pool_source=window,tokens"]
LABELS = [f"encoding={encoding},pool_source={source}" for encoding in ("stride", "stream") for source in ("window", "tokens")]


def ablate(texts, out, *arguments):
    return main(["ablate", "--text", str(texts), "--out", str(out), *OPTIONS, *arguments])


@pytest.fixture(scope="module")
def study(texts, tmp_path_factory):
    """The folder of a finished grid with a control."""
    out = tmp_path_factory.mktemp("studies")
    assert ablate(texts, out, *GRID, "--name", "grid", "--control", LABELS[0]) == 0
    return out / "grid"


def changed(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_cell_of_the_grid_has_a_run_in_a_folder_of_its_label(study):
    assert sorted(path.name for path in study.iterdir() if path.is_dir()) == sorted(LABELS)
    for label in LABELS:
        values = json.loads((study / label / "results.json").read_text())
        assert values["experiment"] == "grid" and values["results"]["steps"] == 2
        assert f"encoding={values['model']['encoding']},pool_source={values['model']['pool_source']}" == label


def test_the_table_is_sorted_by_perplexity_in_three_formats_beside_its_plots(study):
    for name in ("ablation_results.png", "loss_by_position.png", f"loss_more_than_{LABELS[0]}.png"):
        assert (study / name).read_bytes().startswith(b"\x89PNG")
    values = json.loads((study / "ablation_results.json").read_text())
    perplexities = [row["perplexity"] for row in values["runs"]]
    assert perplexities == sorted(perplexities) and {row["run"] for row in values["runs"]} == set(LABELS)
    with (study / "ablation_results.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == [row["run"] for row in values["runs"]]
    assert all(f"| {label} |" in (study / "ablation_results.md").read_text() for label in LABELS)


def test_differences_to_the_control_are_those_of_the_losses_on_the_same_tokens(study):
    values = json.loads((study / "ablation_results.json").read_text())
    rows = {row["run"]: row for row in values["runs"]}
    positions = {
        label: sum(mean["nats"] * mean["n_tokens"] for mean in curve["bins"]) / sum(mean["n_tokens"] for mean in curve["bins"])
        for label, curve in values["loss_by_position"].items()
    }
    assert rows[LABELS[0]]["difference"] is None
    for label in LABELS[1:]:
        assert rows[label]["difference"] == pytest.approx(positions[label] - positions[LABELS[0]], abs=1e-9)
        assert values["differences"][label]["control"] == LABELS[0] and rows[label]["difference"] != 0


def test_cells_of_other_tokens_are_compared_by_bits_per_byte_and_it_says_why_nothing_else_is(texts, tmp_path, capsys):
    assert ablate(texts, tmp_path, "--grid", "tokenizer=bpe,unigram", "--name", "tokens", "--control", "tokenizer=bpe") == 0
    values = json.loads((tmp_path / "tokens" / "ablation_results.json").read_text())
    why = "no loss by position and no differences to a control: the held-out tokens of tokenizer=unigram are not those of"
    assert values["sorted_by"] == "bits_per_byte" and values["differences"] == values["loss_by_position"] == {}
    assert any(note.startswith(why) for note in values["notes"]) and why in capsys.readouterr().out
    assert not (tmp_path / "tokens" / "loss_by_position.png").exists()


def test_an_architecture_is_a_field_like_any_other(texts, tmp_path):
    short = ["--eval_chunk_length", "16", "--name", "two"]
    assert ablate(texts, tmp_path, "--grid", "architecture=smt,gpt2", *short) == 0
    values = json.loads((tmp_path / "two" / "ablation_results.json").read_text())
    shown = {row["run"]: (row["encoding"], row["pool_source"]) for row in values["runs"]}
    assert shown == {"architecture=smt": ("stream", "window"), "architecture=gpt2": ("gpt2", None)}


def test_the_same_command_runs_only_the_cell_that_is_missing(study, texts, tmp_path, capsys):
    again = tmp_path / "grid"
    shutil.copytree(study, again)
    (again / LABELS[2] / "results.json").unlink()
    shutil.rmtree(again / LABELS[2] / "checkpoints")  # those of a finished run are for use, not for resuming
    before = changed(again)
    assert ablate(texts, tmp_path, *GRID, "--name", "grid", "--control", LABELS[0]) == 0
    printed = capsys.readouterr().out
    after = changed(again)
    touched = {path for path in after if after[path] != before.get(path)}
    assert f"{LABELS[2]}/results.json" in touched
    assert {path.split("/")[0] for path in touched if "/" in path} == {LABELS[2]}
    assert printed.count("finished before, not run again") == 3 and printed.count(": begins") == 1


def test_a_folder_of_another_configuration_is_an_error_before_anything_runs(study, texts, tmp_path, capsys):
    again = tmp_path / "grid"
    shutil.copytree(study, again)
    shutil.rmtree(again / LABELS[0])
    before = changed(tmp_path)
    assert ablate(texts, tmp_path, *GRID, "--name", "grid", "--seed", "7") == 1
    error = capsys.readouterr().err
    assert f"{again / LABELS[1]} was run with seed = 42, not 7; give the study another --name or --out" in error
    assert changed(tmp_path) == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_fails_is_recorded_and_the_others_go_on(jobs, texts, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("variants: {broken: {text: missing.txt}, whole: {}}")
    for name in ("tokenizers", "json", "yaml", "torch", "smt"):  # what is in the current folder is not imported
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
        arguments = ["ablate", "--study", str(tmp_path / "study.yaml"), "--config", str(config_of(texts, tmp_path))]
        assert main([*arguments, "--out", str(tmp_path), "--jobs", str(jobs)]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "smt: error: 1 of 2 cells failed" and "Traceback" not in captured.err
    values = json.loads((tmp_path / "study" / "ablation_results.json").read_text())
    assert [row["run"] for row in values["runs"]] == ["whole"]
    message = f"ValueError: text must be a file or a folder, {tmp_path / 'missing.txt'} does not exist"
    assert values["failures"] == {"broken": message} and captured.out.count(message) == 1
    assert "Traceback" in (tmp_path / "study" / "broken" / "failure.txt").read_text()
    assert (tmp_path / "study" / "whole" / "output.txt").exists() == (jobs > 1)


def test_the_table_is_printed_and_kept_whatever_becomes_of_the_plots(study, texts, tmp_path, capsys, monkeypatch):
    shutil.copytree(study, tmp_path / "grid")
    for path in (tmp_path / "grid").glob("*.*"):
        path.unlink()

    def fails(*arguments, **options):
        raise RuntimeError("no font")

    monkeypatch.setattr("smt.training.plots.comparison", fails)
    monkeypatch.setattr("smt.experiments.report.plot_positions", fails)
    assert ablate(texts, tmp_path, *GRID, "--name", "grid") == 0
    captured = capsys.readouterr()
    assert all(label in captured.out for label in LABELS)
    assert {path.name for path in (tmp_path / "grid").glob("*.*") if path.is_file()} == {
        "ablation_results.md", "ablation_results.csv", "ablation_results.json",
    }  # fmt: skip
    for name in ("ablation_results.png", "loss_by_position.png"):
        assert f"smt: warning: there is no {name}: RuntimeError: no font" in captured.err


def test_cells_whose_text_has_changed_since_are_not_scored_on_another(study, texts, tmp_path, capsys):
    shutil.copytree(study, tmp_path / "grid")
    for label in LABELS:
        path = tmp_path / "grid" / label / "text.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "held_out": "of another text"}))
    assert ablate(texts, tmp_path, *GRID, "--name", "grid") == 0
    assert f"no loss by position: {LABELS[0]} cannot be scored: the held-out text of" in capsys.readouterr().out


def config_of(texts, folder):
    """A configuration with the settings of these tests, and its text."""
    from smt.training.settings import RunConfig

    names = [name.lstrip("-").replace("-", "_") for name in " ".join(OPTIONS).replace("=", " ").split()[::2]]
    values = " ".join(OPTIONS).replace("=", " ").split()[1::2]
    RunConfig.from_yaml("stdlib", {**dict(zip(names, values, strict=True)), "text": str(texts)}).to_yaml(folder / "base.yaml")
    return folder / "base.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "strid=1,2"], "there is no setting 'strid'; did you mean 'stride'?"),
        (["--grid", "stride"], "--grid takes FIELD=VALUE,VALUE once for each field, got 'stride'"),
        (["--grid", "stride=1,2", "stride=3"], "once for each field, got 'stride=3'"),
        (["--grid", "stride="], "grid must give stride a value, got none"),
        (["--grid", "stride=2,2"], "grid must give stride different values, got 2 twice"),
        (["--grid", "stride=2,99"], "stride must lie in 1..m_input_tokens = 1..50, got 99"),
        (["--grid", "stride=8,16", "--stride", "8"], "stride is varied by the study"),
        (["--grid", "stride=8,16", "--control", "8"], "control has no '8'; did you mean 'stride=8'?"),
        (["--grid", "stride=8,16", "--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--grid", "stride=8,16", "--name", "a/b"], "name must be the name of a folder, got 'a/b'"),
        (["--study", "missing"], "study must be a YAML file or one of those packaged ("),
        (["--study", "switches", "--config", "missing"], "config must be a YAML file or one of those packaged ("),
    ],
    ids=["field", "no-value", "twice", "empty", "equal", "range", "override", "control", "jobs", "name", "study", "config"],
)
def test_errors_are_one_line_before_anything_runs(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("smt: error: ") and message in error[-1]
    assert all(line.startswith("smt: warning: ") for line in error[:-1])
    assert not list(tmp_path.iterdir())
