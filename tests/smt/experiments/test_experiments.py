"""Studies: what their cells are, how a cell may end, and what their comparison computes."""

import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from smt.data.documents import Document, hold_out
from smt.data.tokenizer import Tokenizer
from smt.evaluation.scorer import TokenScores
from smt.experiments import cell as cell_module
from smt.experiments import report
from smt.experiments.comparison import Comparison
from smt.experiments.paired import BLOCK, FEW_DOCUMENTS, paired_difference
from smt.experiments.record import named, read_records
from smt.experiments.run import FAILURE_FILE, CellOutcome, run_study
from smt.experiments.seeds import as_text
from smt.experiments.settings import STUDY_FOLDER, Study
from smt.runtime.process import Interrupted, signals_as_interrupts
from smt.training.settings import RunConfig

STUDY = """
base: tiny
variants:
  whole: {}
  narrow: {d_model: 16, freeze: [ssm]}
budgets:
  short: {steps: 3}
  long: {minutes: 2}
  whole: {epochs: 2}
"""


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    return path


class TestStudy:
    def test_a_grid_is_the_product_of_its_values_on_one_base(self):
        study = Study.of_grid("tiny", {"stride": ["4", "8"], "encoding": ["token", "stream"]}, {"seed": "3"})
        assert study.name == "tiny-stride-encoding"
        assert [cell.label for cell in study.cells] == [
            f"stride={stride},encoding={encoding}" for stride in (4, 8) for encoding in ("token", "stream")
        ]
        for cell in study.cells:
            model = cell.config.model
            assert f"stride={model.stride},encoding={model.encoding}" == cell.label
            assert cell.config.experiment == study.name
            expected = RunConfig.from_yaml("tiny", {"stride": model.stride, "encoding": model.encoding, "seed": 3})
            assert (model, cell.config.training) == (expected.model, expected.training)

    def test_a_file_gives_budgets_times_variants_and_one_bound_lifts_the_others(self, study_file):
        study = Study.from_yaml(study_file, {"seed": 3})
        assert study.name == "mine"
        assert [cell.label for cell in study.cells] == [
            f"{budget},{variant}" for budget in ("short", "long", "whole") for variant in ("whole", "narrow")
        ]
        short, _, _, long, whole, _ = (cell.config for cell in study.cells)
        assert (whole.training.steps, whole.training.epochs) == (None, 2)
        assert (short.training.steps, short.model.d_model, short.training.freeze) == (3, 32, ())
        assert (long.training.steps, long.training.minutes, long.model.d_model) == (None, 2, 16)
        assert long.training.freeze == ("ssm",) and long.training.seed == 3

    def test_a_control_is_a_label_or_the_variant_of_the_same_budget(self, study_file):
        study = Study.from_yaml(study_file)
        found = {cell.label: study.control_of(cell, "whole").label for cell in study.cells}
        assert found == {label: f"{label.split(',')[0]},whole" for label in found}
        assert {study.control_of(cell, "short,narrow").label for cell in study.cells} == {"short,narrow"}

    def test_every_seed_has_every_budget_and_variant_and_a_control_is_of_the_same_seed(self, tmp_path):
        (tmp_path / "seeds.yaml").write_text(STUDY + "seeds: [4, 7]\n")
        study = Study.from_yaml(tmp_path / "seeds.yaml")
        assert [cell.label for cell in study.cells][:5] == [
            *(f"short,seed_{seed},{variant}" for seed in (4, 7) for variant in ("whole", "narrow")),
            "long,seed_4,whole",
        ]
        assert [cell.config.training.seed for cell in study.cells] == 3 * [4, 4, 7, 7]
        assert {cell.name for cell in study.cells if cell.budget == "short"} == {"short,whole", "short,narrow"}
        for cell in study.cells:
            assert study.control_of(cell, "whole").label == cell.label.replace("narrow", "whole")

    @pytest.mark.parametrize("path", sorted(STUDY_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
    @pytest.mark.filterwarnings("ignore:stride")
    def test_every_packaged_study_is_valid(self, path):
        assert len(Study.from_yaml(path.stem).cells) > 1

    @pytest.mark.parametrize("name", ["..", ".", "...", "a/b"])
    def test_the_name_of_a_study_is_that_of_a_folder_of_its_own(self, name):
        with pytest.raises(ValueError, match="name must be the name of a folder"):
            Study.of_grid("tiny", {"seed": ["1"]}, name=name)

    def test_a_variant_may_have_the_word_no_for_a_number_format(self, tmp_path):
        (tmp_path / "formats.yaml").write_text("{base: tiny, variants: {plain: {mixed_precision: no}}}")
        (cell,) = Study.from_yaml(tmp_path / "formats.yaml").cells
        assert cell.config.training.mixed_precision == "no"

    def test_values_that_are_no_names_of_folders_still_give_one(self):
        (cell, _) = Study.of_grid("tiny", {"text": ["../a b", "c"]}).cells
        assert cell.label == "text=.._a_b" and cell.config.data.text == "../a b"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[1]", "must hold a mapping with base, variants, budgets, seeds, got list"),
            ("base: [", "is not YAML"),
            ("variant: {}", "bad.yaml has no 'variant'; did you mean 'variants'"),
            ("variants: {a: {}}", "must name its base"),
            ("base: tiny", "must have variants, got none"),
            ("{base: tiny, variants: [a]}", "variants of .* must be a mapping from names to fields"),
            ("{base: tiny, variants: {a: 3}}", "a of variants in .* must be a mapping of fields, got 3"),
            ("{base: tiny, variants: {a: {strid: 3}}}", "no setting 'strid'; did you mean 'stride'"),
            ("{base: tiny, variants: {a: {experiment: b}}}", "cannot have an experiment"),
            ("{base: tiny, variants: {a: {steps: 1}}, budgets: {b: {steps: 2}}}", "steps is varied by the study"),
            ("{base: tiny, variants: {a b: {}, a_b: {}}}", "two cells of the label 'a_b'"),
            ("{base: tiny, variants: {..: {}}}", "a label of the study bad must be the name of a folder, got '..'"),
            ("{base: tiny, variants: {a: {}}, seeds: 3}", "seeds of .* must be a list of different whole numbers, got 3"),
            ("{base: tiny, variants: {a: {}}, seeds: []}", r"different whole numbers, got \[\]"),
            ("{base: tiny, variants: {a: {}}, seeds: [1, true]}", r"different whole numbers, got \[1, True\]"),
            ("{base: tiny, variants: {a: {}}, seeds: [1, 1]}", r"different whole numbers, got \[1, 1\]"),
            ("{base: tiny, variants: {a: {seed: 1}}, seeds: [1, 2]}", "seed is varied by the study"),
        ],
    )
    def test_a_bad_file_is_refused(self, content, message, tmp_path):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            Study.from_yaml(tmp_path / "bad.yaml")


class TestRunning:
    @pytest.mark.parametrize(("command", "error"), [("kill -9 $$", "the process ended by signal 9"), ("exit 1", "exit code 1")])
    def test_a_process_that_dies_is_a_failed_cell_whatever_an_earlier_attempt_left(self, command, error, tmp_path, monkeypatch):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(program))
        study = Study.of_grid("tiny", {"seed": ["1", "2"]}, name="dying")
        (tmp_path / "dying" / "seed=1").mkdir(parents=True)
        (tmp_path / "dying" / "seed=1" / FAILURE_FILE).write_text("ValueError: of an earlier attempt\n")
        told = []
        outcomes = run_study(study, tmp_path, jobs=2, tell=told.append)
        assert len(outcomes) == 2 and all(error in outcome.error for outcome in outcomes)
        assert sum("begins" in line for line in told) == sum("failed" in line for line in told) == 2

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
    def test_a_signal_ends_the_processes_of_all_cells_and_none_begins_after_it(self, name, tmp_path, monkeypatch):
        program = tmp_path / "python"
        number = getattr(signal, name).value
        # The second of two tells the process that began them.
        program.write_text(
            f'#!/bin/sh\ncd {tmp_path}\necho $$ > "pid.$$"\n'
            f"if mkdir first 2> /dev/null; then :; else kill -{number} $PPID; fi\nexec sleep 600\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(program))
        study = Study.of_grid("tiny", {"seed": ["1", "2", "3"]}, name="interrupted")
        with pytest.raises(Interrupted) as interrupt, signals_as_interrupts():
            run_study(study, tmp_path, jobs=2, tell=lambda line: None)
        assert interrupt.value.signal == number
        processes = [int(path.read_text()) for path in tmp_path.glob("pid.*")]
        assert len(processes) == 2
        for process in processes:
            with pytest.raises(ProcessLookupError):
                os.kill(process, 0)

    def test_the_process_of_a_cell_ends_when_the_one_that_began_it_is_killed(self, monkeypatch):
        # Standard input ends when its other end is closed, as the system does for whoever is killed.
        reading, writing = os.pipe()
        ended, stopped = [], threading.Event()
        monkeypatch.setattr("sys.stdin", os.fdopen(reading))
        monkeypatch.setattr(cell_module.os, "kill", lambda process, number: (ended.append((process, number)), stopped.set()))
        monkeypatch.setattr(cell_module, "attempt", lambda folder, work: (os.close(writing), stopped.wait(60))[0])
        assert cell_module.main("folder") == 0
        assert ended == [(os.getpid(), signal.SIGTERM)]

    def test_a_run_that_diverged_is_not_finished(self, tmp_path, monkeypatch):
        study = Study.of_grid("tiny", {"seed": ["1"]}, name="diverged")
        folder = tmp_path / "diverged" / "seed=1"
        folder.mkdir(parents=True)
        study.cells[0].config.to_yaml(folder / "cell.yaml")
        (folder / "results.json").write_text('{"stopped": "the training loss is nan in step 3"}')
        monkeypatch.setattr("smt.experiments.run.attempt", lambda folder: "again")
        (outcome,) = run_study(study, tmp_path, tell=lambda line: None)
        assert outcome.error == "again"
        records, unfinished = read_records([folder])
        assert not records and "stopped before its end: the training loss is nan in step 3" in unfinished[0]

    def test_a_folder_with_something_else_is_left_alone(self, tmp_path):
        study = Study.of_grid("tiny", {"seed": ["1", "2"]}, name="mine")
        (tmp_path / "mine" / "seed=2").mkdir(parents=True)
        (tmp_path / "mine" / "seed=2" / "novel.txt").write_text("It was")
        with pytest.raises(ValueError, match="seed=2 holds something else than a cell of a study"):
            run_study(study, tmp_path)
        assert not (tmp_path / "mine" / "seed=1").exists()


def test_cells_are_scored_on_the_documents_that_their_runs_are_evaluated_on(tmp_path, monkeypatch):
    corpus = hold_out("here", lambda skipped: (Document(f"{index}", f"text {index}") for index in range(100)))
    tokenizer, read = Tokenizer.train(corpus.train, 260), []

    class Scorer:
        def score(self, documents):
            read.append([tokenizer.decode(document[1:-1]) for document in documents])
            return []

    monkeypatch.setattr(report, "open_run", lambda folder, device: SimpleNamespace(tokenizer=tokenizer, scorer=Scorer()))
    monkeypatch.setattr(report, "read_corpus", lambda settings: corpus)
    cells = Study.of_grid("tiny", {"seed": ["1", "2"]}, {"eval_documents": 2, "device": "cpu"}).cells
    outcomes = [CellOutcome(cell, tmp_path) for cell in cells]
    assert report.score_cells(outcomes) == ({"seed=1": [], "seed=2": []}, None)
    assert read == [[document.text for document in corpus.validation][:2]] * 2


@pytest.mark.parametrize("source", ["stdlib", "recall"])
def test_it_is_said_where_differences_count_other_tokens_than_the_table(source, tmp_path, monkeypatch):
    study = Study.of_grid("tiny", {"seed": ["1", "2"]}, {"source": source})
    found = {cell.label: scores(torch.rand(9)) for cell in study.cells}
    monkeypatch.setattr(report, "score_cells", lambda finished: (found, None))
    monkeypatch.setattr(report.RunRecord, "read", lambda folder, name: record_of(name, 2.0))
    outcomes = [CellOutcome(cell, tmp_path) for cell in study.cells]
    said = "loss by position and differences count every word"
    notes = report.report_study(study, outcomes, "seed=1").comparison.notes
    assert any(note.startswith(said) for note in notes) == (source == "recall")


def test_differences_are_taken_within_a_seed_then_their_means_over_the_seeds_that_all_finished(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "{base: tiny, variants: {memory: {}, failing: {d_model: 16}, none: {writes: false}}, seeds: [1, 2, 3]}"
    )
    study = Study.from_yaml(tmp_path / "mine.yaml")
    losses, gains = torch.rand(3, 20, 30).double(), torch.rand(3, 20, 30).double()
    found = {f"seed_{seed},none": scores(*losses[seed - 1]) for seed in (1, 2, 3)}
    found |= {f"seed_{seed},memory": scores(*(losses[seed - 1] - gains[seed - 1])) for seed in (1, 2, 3)}
    found |= {f"seed_{seed},failing": scores(*losses[seed - 1]) for seed in (1, 2)}
    monkeypatch.setattr(report, "score_cells", lambda finished: (found, None))
    best = {label: torch.cat([-score.log_probs for score in of]).mean().item() for label, of in found.items()}
    monkeypatch.setattr(report.RunRecord, "read", lambda folder, name: record_of(name, 2.0, best[name]))
    outcomes = [CellOutcome(cell, tmp_path, None if cell.label in found else "failed") for cell in study.cells]
    made = report.report_study(study, outcomes, "none")
    memory, none = made.over_seeds
    assert (memory.name, none.name) == ("memory", "none") and none.difference is None
    of_seeds = -gains.mean((1, 2))
    assert memory.difference.mean == pytest.approx(of_seeds.mean().item())
    assert memory.difference.standard_error == pytest.approx(of_seeds.std().item() / math.sqrt(3))
    assert none.loss.mean == pytest.approx(losses.mean().item())
    assert as_text(made.over_seeds).splitlines()[2].split()[-3:] == [
        f"{memory.difference.mean:+.4f}",
        "±",
        f"{memory.difference.standard_error:.4f}",
    ]
    assert set(made.more["loss_by_position"]) == {"memory", "none"}
    (curve,) = made.more["differences_by_position"]["none"].values()
    last = curve["edges"][-2]
    assert curve["bins"][-1]["nats"] == pytest.approx(-gains[:, :, last - 1 :].mean().item())


def test_runs_are_sorted_from_the_best_on_and_one_that_has_no_figure_is_last():
    figures = {"a": math.nan, "b": 3.0, "c": math.inf, "d": 2.0}
    compared = Comparison.of([record_of(name, perplexity) for name, perplexity in figures.items()])
    assert [record.name for record in compared.records][:2] == ["d", "b"] and compared.by == "perplexity"


def record_of(name, perplexity, best_loss=1.0):
    return SimpleNamespace(name=name, tokenizer="t", held_out="h", perplexity=perplexity, best_loss=best_loss)


def scores(*losses):
    return [TokenScores(-loss.double(), torch.zeros(len(loss), dtype=torch.bool)) for loss in losses]


class TestPairedDifference:
    def test_it_is_the_difference_per_token_with_the_error_of_a_mean_over_documents_of_one_length(self):
        control, changed = torch.rand(2, 40, 7).double()
        found = paired_difference(scores(*(control + changed)), scores(*control))
        means = changed.mean(1)
        assert found.nats == pytest.approx(means.mean().item())
        assert found.standard_error == pytest.approx(means.std().item() / math.sqrt(40))
        assert (found.n_tokens, found.n_units, found.unit) == (280, 40, "documents")

    def test_few_documents_are_cut_into_blocks(self):
        loss = torch.rand(2, 3, 2 * BLOCK)
        found = paired_difference(scores(*loss[0]), scores(*loss[1]))
        blocks = (loss[0] - loss[1]).double().reshape(6, BLOCK).mean(1)
        assert len(loss[0]) < FEW_DOCUMENTS and (found.n_units, found.unit) == (6, f"blocks of {BLOCK} tokens")
        assert found.standard_error == pytest.approx(blocks.std().item() / math.sqrt(6))

    def test_what_is_hard_for_both_does_not_count(self):
        hard, gain = 50 * torch.rand(30, 9), 0.1 + 0.01 * torch.rand(30, 9)
        found = paired_difference(scores(*(hard - gain)), scores(*hard))
        assert -0.11 < found.nats < -0.1 and found.standard_error < 1e-3

    def test_of_a_single_block_no_error_is_known(self):
        assert paired_difference(scores(torch.rand(9)), scores(torch.rand(9))).standard_error is None

    @pytest.mark.parametrize("others", [[], [8], [9, 9]], ids=str)
    def test_other_documents_are_refused(self, others):
        with pytest.raises(ValueError, match="scores must be of the same documents"):
            paired_difference(scores(torch.rand(9)), scores(*map(torch.rand, others)))


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["r/a/1"], ["1"]),
        (["r/a/1", "r/a/2"], ["1", "2"]),
        (["r/a/1", "r/b/1"], ["a/1", "b/1"]),
        (["r/a/1", "2"], ["r/a/1", "2"]),
    ],
    ids=["one", "siblings", "cousins", "apart"],
)
def test_runs_are_named_by_what_tells_their_paths_apart(folders, names):
    assert list(named(folders)) == names
