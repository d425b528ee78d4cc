"""A study from its file to its report: two models, a few steps, text that is here."""

import json
import random
import re
import shutil
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from smt.cli import main
from smt.data.tokenizer import Tokenizer
from smt.experiments.cell import attempt
from smt.experiments.record import RunRecord
from smt.study import rates as rates_module
from smt.study import run as run_module
from smt.study.cell import EQUAL_TIME, ORPO, TRAINING, load, work
from smt.study.plots import plot_results, plot_stages
from smt.study.preference import preferences
from smt.study.prepared import prepare
from smt.study.record import STUDY_FILE
from smt.study.report import conditions, details, report, samples
from smt.study.settings import StudySettings
from smt.study.tables import results_csv
from smt.training.settings import RunConfig

ROOT = Path(__file__).resolve().parents[3]
STUDY = {
    "models": ["parallel", "smt"],
    "seeds": [1],
    "equal_time_seeds": 1,
    "learning_rates": [1e-3, 1e-2],
    "run": {
        "data": {
            "batch_size": 4, "chunk_length": 32, "part_length": 32, "lanes": 1, "eval_batch_size": 4, "eval_chunk_length": 32,
        },
        "training": {"steps": 3, "evaluations": 1, "sample_tokens": 0, "device": "cpu"},
    },
    "hymba": {
        "vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_mlp": 192, "sliding_window": 8,
        "global_layers": [0], "n_meta_tokens": 3, "ssm_d_state": 4, "dropout": 0.0,
    },
    "smt": {
        "d_model": 32, "d_k": 16, "transformer_n_heads": 2, "n_ssm_outputs": 3, "m_input_tokens": 6, "stride": 2,
        "write_group": 2, "ssm_d_state": 4, "dropout": 0.0,
    },
    "orpo": {"steps": 2, "evaluations": 1, "sample_tokens": 0, "batch_size": 2},
    "n_pairs": 6, "n_held_out_pairs": 4, "prompt_length": 8, "completion_length": 8, "context": 16, "decode_tokens": 4,
    "sample_tokens": 6, "map_tokens": 24,
}  # fmt: skip
FILES = {
    "study.json", "ablation_results.csv", "ablation_results.png", "training_stages_comparison.png", "generation_samples.txt",
    "detailed_metrics.txt", "report.md", "report.png", "attention_maps_training.png", "attention_maps_orpo.png",
}  # fmt: skip


def in_this_process(folders, jobs, module):
    """What processes of their own do, which would take seconds to begin."""
    works = {"smt.study.cell": work, "smt.study.rates": rates_module.work}
    return [(folder, attempt(folder, works[module])) for folder in folders]


def by(attempt_one):
    """In place of ``attempt_apart``: what a function of a folder makes of each."""
    return lambda folders, jobs, module: [(folder, attempt_one(folder)) for folder in folders]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a study, and the folder that ``smt study`` leaves."""
    tmp_path, draw = tmp_path_factory.mktemp("study"), random.Random(0)
    (tmp_path / "texts").mkdir()
    for index in range(5):
        (tmp_path / "texts" / f"{index}.txt").write_text(" ".join(f"word{draw.randrange(9)}" for _ in range(100 + index)))
    settings = json.loads(json.dumps(STUDY))
    settings["run"]["data"]["text"] = str(tmp_path / "texts")
    file = tmp_path / "micro.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "attempt_apart", in_this_process)
        patch.setattr(rates_module, "attempt_apart", in_this_process)
        assert main(["study", "--config", str(file), "--out", str(tmp_path)]) == 0
    return file, tmp_path / "micro"


def study_of(folder: Path) -> dict:
    return json.loads((folder / STUDY_FILE).read_text())


def test_every_file_is_there_and_made_from_the_json_alone(made):
    _, folder = made
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    study = study_of(folder)
    assert (folder / "ablation_results.csv").read_text() == results_csv(study)
    assert (folder / "report.md").read_text() == report(study)
    assert (folder / "generation_samples.txt").read_text() == samples(study)
    assert (folder / "detailed_metrics.txt").read_text() == details(study)
    assert "Seed 1: trained anew, for" in report(study)
    assert all(name in report(study) for name in ("parallel hybrid", "SMT (stream)", "15/9", "15/8", "15/5"))


def test_the_json_says_what_the_runs_say(made):
    _, folder = made
    study = study_of(folder)
    assert [(run["model"], run["stage"]) for run in study["runs"]] == [
        (model, stage) for model in STUDY["models"] for stage in (TRAINING, EQUAL_TIME, ORPO)
    ]
    for run in study["runs"]:
        record = RunRecord.read(folder / f"{run['model']},seed=1" / run["stage"])
        of_run = run["carried"] if run["model"] == "smt" else run["held_out"]
        assert of_run["loss"] == pytest.approx(record.best_loss) and run["train_tokens"] == record.tokens
        assert run["parameters"] == study["models"][run["model"]]["parameters"] == record.parameters
        if run["stage"] == TRAINING:
            assert run["kept"]["measured"] == run["kept"]["counted"] and run["peak_bytes"] > 2**20
            assert all(speed > 0 for speed in run["decoding"].values())
    tokens = {run["train_tokens"] for run in study["runs"] if run["stage"] == TRAINING}
    held_out = {run["held_out"]["n_targets"] for run in study["runs"]}
    assert len(tokens) == 1 and held_out == {study["text"]["held_out"]["tokens"]}
    parameters = [model["parameters"] for model in study["models"].values()]
    assert max(parameters) < 1.05 * min(parameters)


def test_every_model_has_the_learning_rate_that_suits_it(made):
    _, folder = made
    study = study_of(folder)
    for model, losses in study["learning_rates"].items():
        for rate, loss in losses.items():
            trial = RunRecord.read(folder / "learning_rates" / f"{model},learning_rate={rate},seed=0" / TRAINING)
            config = yaml.safe_load((trial.folder / "config.yaml").read_text())["training"]
            assert (config["learning_rate"], config["seed"]) == (float(rate), 0)
            if model == "parallel":  # ours is evaluated in its run with its memory carried
                assert loss == pytest.approx(trial.best_loss)
        chosen = yaml.safe_load((folder / f"{model},seed=1" / TRAINING / "config.yaml").read_text())["training"]
        assert chosen["learning_rate"] == float(min(losses, key=losses.get))
    assert set(study["learning_rates"]) == set(STUDY["models"]) and "## Learning rates" in report(study)


def test_a_learning_rate_at_which_training_fails_is_not_chosen(made, tmp_path, monkeypatch):
    file, _ = made
    prepared = prepare(StudySettings.from_yaml(file), tmp_path)
    losses = {("parallel", "0.001"): 2.0, ("smt", "0.001"): 5.0, ("smt", "0.01"): 4.0}

    def trains(folder):
        model, rate = re.fullmatch("(.*),learning_rate=(.*),seed=0", folder.name).groups()
        if (model, rate) not in losses:
            return "DivergedError: no"
        (folder / "training.json").write_text(json.dumps({"held_out": {"loss": losses[model, rate]}, "carried": None}))
        return None

    monkeypatch.setattr(rates_module, "attempt_apart", by(trains))
    assert rates_module.chosen_rates(prepared, lambda line: None) == {"parallel": 1e-3, "smt": 1e-2}
    assert rates_module.tried_rates(prepared)["parallel"] == {1e-3: 2.0}
    losses.clear()
    shutil.rmtree(prepared.folder)
    with pytest.raises(ValueError, match="no learning rate of parallel came to an end"):
        rates_module.chosen_rates(prepared, lambda line: None)


def test_all_models_begin_stage_2_with_pairs_of_their_own(made):
    _, folder = made
    of_models = [folder / f"{model},seed=1" for model in STUDY["models"]]
    chosen, rejected = (
        [[json.loads(line)[name] for line in (of / "pairs.jsonl").read_text().splitlines()] for of in of_models]
        for name in ("chosen_ids", "rejected_ids")
    )
    assert chosen[0] == chosen[1] and rejected[0] != rejected[1]
    for of in of_models:
        config = yaml.safe_load((of / ORPO / "config.yaml").read_text())
        assert config["training"]["init_from"] == {"checkpoint": str(of / TRAINING)}
        assert config["training"]["device"] == "cpu"  # as in stage 1, wherever a GPU is


def test_pairs_to_measure_on_are_of_held_out_documents_and_those_to_train_on_of_training_ones(made):
    file, folder = made
    text = prepare(StudySettings.from_yaml(file), folder.parent).text
    spelled = [[" ".join(map(str, document.tolist())) for document in part] for part in (text.train, text.validation)]
    for model in STUDY["models"]:
        for name, part in (("pairs.jsonl", 0), ("held_out_pairs.jsonl", 1)):
            lines = (folder / f"{model},seed=1" / name).read_text().splitlines()
            pieces = [" ".join(map(str, line["prompt_ids"] + line["chosen_ids"])) for line in map(json.loads, lines)]
            there, elsewhere = (
                [any(p in d for d in documents) for p in pieces] for documents in (spelled[part], spelled[1 - part])
            )
            assert pieces and all(there) and not all(elsewhere)


def test_preferences_before_and_after_stage_2_are_those_of_the_models_of_either_stage(made):
    _, folder = made
    for run in study_of(folder)["runs"]:
        if run["stage"] == ORPO:
            of = folder / f"{run['model']},seed=1"
            config = RunConfig.from_yaml(of / ORPO / "config.yaml")
            for when, stage in (("before", TRAINING), ("after", ORPO)):
                sizes = {"length": config.data.chunk_length, "batch_size": 4, "strength": config.training.orpo_lambda}
                found = preferences(load(of / stage, config), Tokenizer.load(of / ORPO), of / "held_out_pairs.jsonl", **sizes)
                assert run["preference"][when] == pytest.approx(found), (run["model"], when)


def test_a_second_time_nothing_is_trained_and_what_has_failed_is_tried_again(made, tmp_path, monkeypatch, capsys):
    file, folder = made
    shutil.copytree(folder, tmp_path / "micro")
    tried = []

    def fails(folder):
        tried.append(folder.name)
        return "RuntimeError: no"

    monkeypatch.setattr(run_module, "attempt_apart", by(fails))
    arguments = ["study", "--config", str(file), "--out", str(tmp_path)]
    assert main(arguments) == 0 and not tried
    assert "smt,seed=1: finished before, not run again" in capsys.readouterr().out
    before = (tmp_path / "micro" / "parallel,seed=1" / "training.json").read_text()
    (tmp_path / "micro" / "smt,seed=1" / "orpo.json").unlink()
    assert main(arguments) == 1 and tried == ["smt,seed=1"]
    study = study_of(tmp_path / "micro")
    assert study["failures"] == {"smt,seed=1": "RuntimeError: no"} and len(study["runs"]) == 5
    assert "1 of 2 cells failed" in capsys.readouterr().err
    assert (tmp_path / "micro" / "parallel,seed=1" / "training.json").read_text() == before


def test_another_study_is_not_mixed_into_a_folder(made, tmp_path, capsys):
    file, folder = made
    settings = yaml.safe_load(file.read_text())
    settings["run"]["training"]["steps"] = 4
    other = tmp_path / "micro.yaml"
    other.write_text(yaml.safe_dump(settings))
    assert main(["study", "--config", str(other), "--out", str(folder.parent)]) == 1
    assert (
        "parallel,learning_rate=0.001,seed=0 is of another study, with other training; give this one another"
        in capsys.readouterr().err
    )
    other.write_text(yaml.safe_dump({**settings, "learning_rates": []}))
    assert main(["study", "--config", str(other), "--out", str(folder.parent)]) == 1
    assert "is of another study, with other run; give this one another --out or name" in capsys.readouterr().err


def test_ours_may_carry_its_memory_through_longer_parts_in_training(made, tmp_path, monkeypatch):
    file, folder = made
    settings = replace(StudySettings.from_yaml(file), models=("smt", "smt_carried"), carried={"part_length": 64, "lanes": 2})
    asked = {}

    def keeps(folder):
        asked[folder.name] = yaml.safe_load((folder / "cell.yaml").read_text())
        return "RuntimeError: no"

    monkeypatch.setattr(run_module, "attempt_apart", by(keeps))
    prepared = prepare(settings, tmp_path)
    run_module.run_study(prepared, lambda line: None)
    anew, carried = (asked[f"{model},seed=1"]["run"] for model in settings.models)
    assert carried["model"] == anew["model"] and carried["training"] == anew["training"]
    assert carried["data"] == {**anew["data"], "part_length": 64, "lanes": 2}
    told = {**study_of(folder), "settings": json.loads(json.dumps(asdict(settings)))}
    assert "32 after 32 of parts of 64 tokens, through which it carries its memory" in "\n".join(conditions(told))


def test_a_seed_for_which_the_machine_was_slow_says_little_of_equal_time(made, tmp_path, monkeypatch):
    file, _ = made
    settings = replace(StudySettings.from_yaml(file), models=("global", "local"), seeds=(1, 2, 3), equal_time_seeds=1)

    def trains(folder):
        speed = 2 if folder.name == "local,seed=1" else 10
        of_training = {"steps": 20, "train_tokens": 200, "tokens_per_second": speed}
        (folder / "training.json").write_text(json.dumps(of_training))
        return None

    monkeypatch.setattr(run_module, "attempt_apart", by(trains))
    prepared = prepare(settings, tmp_path)
    run_module.run_study(prepared, lambda line: None)
    asked = [yaml.safe_load((cell.folder / "cell.yaml").read_text()) for cell in run_module.cells_of(prepared)]
    assert [of["equal_time_steps"] for of in asked if of["equal_time_steps"] is not None] == [20, 20]
    assert [of["run"]["training"]["seed"] for of in asked] == [1, 1, 2, 2, 3, 3]


def test_models_that_had_failed_and_further_seeds_are_given_the_time_of_the_first(made, tmp_path, monkeypatch):
    """The middle one of all models would be another now, and the time no longer equal."""
    file, _ = made
    settings = replace(StudySettings.from_yaml(file), models=("mamba", "global", "local"), equal_time_seeds=2)
    seconds, failing = {"mamba": 40.0, "global": 10.0, "local": 20.0}, {"mamba,seed=1"}

    def trains(folder):
        if folder.name in failing:
            return "RuntimeError: no"
        speed = 200 / seconds[folder.name.partition(",")[0]]
        of_training = {"steps": 20, "train_tokens": 200, "tokens_per_second": speed}
        steps = yaml.safe_load((folder / "cell.yaml").read_text())["equal_time_steps"]
        for stage in (TRAINING, ORPO, *[EQUAL_TIME] * (steps is not None)):
            (folder / f"{stage}.json").write_text(json.dumps(of_training))
        return None

    monkeypatch.setattr(run_module, "attempt_apart", by(trains))
    for seeds in [(1,), (1, 2)]:
        prepared = prepare(replace(settings, seeds=seeds), tmp_path)
        run_module.run_study(prepared, lambda line: None)
        failing.clear()
    wanted = {cell.label: yaml.safe_load((cell.folder / "cell.yaml").read_text()) for cell in run_module.cells_of(prepared)}
    steps = {label: of["equal_time_steps"] for label, of in wanted.items()}
    # 15 s, the middle of the two that did not fail at first.
    assert steps == {f"{model},seed={seed}": round(15 / (seconds[model] / 20)) for seed in (1, 2) for model in settings.models}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"trainings": {}}}, "run has no 'trainings'; did you mean 'training'"),
        ({"run": {"training": {"epochs": 1}}}, "run must bound training by a number of steps, got None"),
        ({"orpo": {"setps": 3}}, "there is no setting 'setps'; did you mean 'steps'"),
        ({"prompt_length": 200}, r"prompt_length \+ completion_length - 1 must be at most chunk_length = 128, got 263"),
    ],
    ids=["part", "epochs", "stage 2", "pairs"],
)
def test_what_would_end_a_study_later_is_refused_before_it_begins(changes, message, tmp_path):
    settings = StudySettings(**{"name": "a", "run": {"training": {"steps": 3}}, **changes})
    with pytest.raises(ValueError, match=message):
        prepare(settings, tmp_path)


@pytest.mark.usefixtures("drawn")
def test_maps_are_drawn_of_what_has_finished_and_nothing_is_trained(made, tmp_path, capsys):
    file, folder = made
    assert main(["study", "--config", str(file), "--out", str(tmp_path), "--maps"]) == 1
    assert "maps are drawn from runs that have finished; parallel has none" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "micro", ignore=shutil.ignore_patterns("*.png"))
    assert main(["study", "--config", str(file), "--out", str(tmp_path), "--maps"]) == 0
    assert not (tmp_path / "micro" / "report.png").exists()
    drawn = sorted(path.name for path in (tmp_path / "micro").glob("attention_maps_*.png"))
    assert drawn == ["attention_maps_orpo.png", "attention_maps_training.png"]


def test_losses_are_dots_and_say_whether_memory_was_carried(monkeypatch):
    study, saved = json.loads((ROOT / "benchmarks" / "results" / "hymba_cpu.json").read_text()), []
    monkeypatch.setattr("smt.study.plots.save", lambda canvas, path: saved.append(canvas))
    plot_results(study, "a.png")
    tokens, time, *bars = saved[0].axes
    assert not tokens.patches and not time.patches and all(axes.get_xlim()[0] == 0 for axes in bars)
    for axes, stage in ((tokens, TRAINING), (time, EQUAL_TIME)):
        runs = [run for run in study["runs"] if run["stage"] == stage and run["model"] == "smt_carried"]
        means = {f"{statistics.fmean(run[how]['loss'] for run in runs):.3f}" for how in ("held_out", "carried")}
        assert len(means) == 2 and means <= {text.get_text() for text in axes.texts}
    assert ["anew" in text.get_text() for text in tokens.get_legend().get_texts()] == [True, False]


def test_before_and_after_stage_2_are_joined_without_arrows_and_named_in_no_models_colour(monkeypatch):
    study, saved = json.loads((ROOT / "benchmarks" / "results" / "hymba_cpu.json").read_text()), []
    monkeypatch.setattr("smt.study.plots.save", lambda canvas, path: saved.append(canvas))
    plot_stages(study, "a.png")
    _, losses, margins = saved[0].axes
    for axes, n_markers in ((losses, 4), (margins, 2)):
        handles = axes.get_legend().legend_handles
        assert not axes.texts and len(handles) == n_markers and {handle.get_color() for handle in handles} == {"0.35"}
