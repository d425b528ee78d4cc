"""A run never loses or spoils its work: what diverges, what is interrupted, what lies beside it, and what it is called."""

import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import run_config, trainer_of

from smt.cli import main
from smt.data.local import read_text
from smt.evaluation.perplexity import Evaluation
from smt.experiments.record import RunRecord, UnfinishedRunError
from smt.training import ending
from smt.training import run as run_module
from smt.training.checkpoints import Checkpoints, Snapshot
from smt.training.objective import ChunkLoss
from smt.training.run import resume, run, run_in
from smt.training.run_folder import RunFolder, new_folder
from smt.training.settings import RunConfig
from smt.training.trainer import DivergedError, Trainer


class Interrupted(Exception):
    pass


def before_step(monkeypatch, step, act):
    """Call ``act`` before the optimiser step after ``step``."""
    take_step = Trainer._step

    def acting(self, *arguments, **options):
        if self.progress.step == step:
            act()
        take_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "_step", acting)


def interrupt():
    raise Interrupted


def interrupted_run(folder, config, step=3):
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, step, interrupt)
        with pytest.raises(Interrupted):
            run_in(folder, config)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def spoil(monkeypatch, what, calls):
    """The training losses of those numbers, or their gradients, are not finite."""
    forward, made = ChunkLoss.forward, []

    def spoilt(self, *arguments):
        loss, state = forward(self, *arguments)
        if torch.is_grad_enabled():
            made.append(None)
            if len(made) in calls:
                loss = loss * float("nan") if what == "loss" else _NoGradient.apply(loss)
        return loss, state

    monkeypatch.setattr(ChunkLoss, "forward", spoilt)


def as_on_a_gpu(monkeypatch):
    """Trainers read the numbers of a step when the next one has been launched, and keep the shape of their batches."""
    prepare = Trainer.__init__

    def prepared(self, *arguments, **options):
        prepare(self, *arguments, **options)
        self._reads_late = self._keeps_shapes = True

    monkeypatch.setattr(Trainer, "__init__", prepared)


@pytest.fixture(params=["at once", "late"])
def reading(request, monkeypatch):
    """When the numbers of a step are read."""
    if request.param == "late":
        as_on_a_gpu(monkeypatch)


@pytest.mark.usefixtures("reading")
class TestDivergence:
    def test_a_loss_stops_the_run_with_good_weights_a_checkpoint_and_results_and_it_goes_on_as_if_nothing_had_been(
        self, tmp_path, monkeypatch
    ):
        config = run_config(tmp_path, steps=6, evaluations=3, sample_tokens=0, gradient_accumulation_steps=2)
        folder = tmp_path / "a run"
        with monkeypatch.context() as patch:
            spoil(patch, "loss", calls=[8])  # the second batch of step 4
            with pytest.raises(DivergedError) as error:
                run_in(folder, config)
        assert error.match(r"^the training loss is nan in step 4 at a learning rate of \d\.\d+")
        assert error.match(rf"{folder} has a checkpoint of step 3, the weights of step \d with .*--resume '{folder}'")
        values = json.loads((folder / "results.json").read_text())
        assert values["stopped"].startswith("the training loss is nan in step 4") and values["results"]["steps"] == 3
        assert values["results"]["final_val_loss"] == json.loads((folder / "metrics_history.json").read_text())["val_loss"][-1]
        with pytest.raises(UnfinishedRunError, match="stopped before its end: the "):
            RunRecord.read(folder)
        for weights in (folder / "model.safetensors", folder / "checkpoints" / "step_00000003" / "model.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(weights).values())
        outcome, undisturbed = resume(folder), run_in(tmp_path / "undisturbed", config)
        assert "stopped" not in json.loads((folder / "results.json").read_text())
        assert outcome.results["final_val_loss"] == undisturbed.results["final_val_loss"]
        assert outcome.progress.history.train_loss == undisturbed.progress.history.train_loss

    def test_so_does_a_gradient_and_the_weights_stay_as_they_were(self, monkeypatch):
        trainer = trainer_of(steps=6, learning_rate=0.1)
        spoil(monkeypatch, "gradient", calls=[3])
        with pytest.raises(DivergedError, match=r"^the gradient's norm is (nan|inf) in step 3 at a learning rate of 0\.0"):
            trainer.train(lambda: Evaluation(1.0, 1, 1))
        assert trainer.progress.history.eval_steps == [2]
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class TestDivergenceElsewhere:
    def test_the_first_step_leaves_the_weights_that_the_run_began_with(self, tmp_path, monkeypatch):
        spoil(monkeypatch, "loss", calls=[1])
        with pytest.raises(DivergedError, match="in step 1 at"):
            run_in(tmp_path / "run", run_config(tmp_path, steps=6, sample_tokens=0))
        assert json.loads((tmp_path / "run" / "results.json").read_text())["results"]["best_step"] == 0
        assert (tmp_path / "run" / "model.safetensors").is_file()

    def test_where_no_evaluation_is_finite_there_are_results_all_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run_module, "evaluate", lambda *given, **options: Evaluation(float("nan"), 1, 1))
        with pytest.raises(DivergedError, match=r"^the held-out loss is nan in step 2 .* No weights .* had a finite"):
            run_in(tmp_path / "run", run_config(tmp_path, steps=4, sample_tokens=0))
        results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
        assert (results["steps"], results["final_val_loss"]) == (2, None)
        assert not (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "checkpoints").exists()

    def test_an_evaluation_of_nan_is_never_the_best_and_makes_no_checkpoint(self):
        trainer, losses, best, saved = trainer_of(steps=6, evaluations=3), [2.0, float("nan"), 3.0], [], []
        with pytest.raises(DivergedError, match="held-out loss is nan in step 4"):
            trainer.train(
                lambda: Evaluation(losses.pop(0), 1, 1),
                on_best=lambda: best.append(trainer.progress.step),
                on_checkpoint=lambda: saved.append(trainer.progress.step),
            )
        assert best == saved == [2] and trainer.progress.best["best_val_loss"] == 2.0

    def test_fp16_skips_gradients_that_a_smaller_loss_scale_will_mend_and_no_others(self):
        trainer = trainer_of()
        for scale, lost in ((2.0**16, False), (1.0, True)):
            trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda scale=scale: scale)
            assert trainer._has_lost_gradient(float("inf")) is lost


class TestFolder:
    def test_a_second_process_is_refused_while_one_trains_and_the_lock_dies_with_its_owner(self, tmp_path, monkeypatch):
        config, folder, refused = run_config(tmp_path, steps=2, sample_tokens=0), tmp_path / "run", []
        folder.mkdir()
        child = os.fork()
        if not child:
            RunFolder(folder).lock()
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL and (folder / "run.lock").exists()

        def second():
            with pytest.raises(ValueError, match=f"another process is training the run in {folder}") as error:
                resume(folder)
            refused.append(error)

        before_step(monkeypatch, 1, second)
        run_in(folder, config)
        assert refused and not (folder / "run.lock").exists()

    def test_what_lies_beside_the_checkpoints_is_left_alone_and_files_can_be_read_by_whom_the_umask_says(self, tmp_path):
        config, folder = run_config(tmp_path, steps=6, save_steps=1, sample_tokens=0), tmp_path / "run"
        before = os.umask(0o022)
        try:
            interrupted_run(folder, config)
        finally:
            os.umask(before)
        modes = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert len(modes) > 8 and set(modes.values()) == {0o644}, modes
        beside = folder / "checkpoints"
        shutil.copytree(beside / "step_00000003", beside / "step_00000003_best")
        (beside / "step_backup").mkdir()
        (beside / "step_4").mkdir()
        (beside / "step_00000009").touch()
        (beside / "step_mine.partial").mkdir()
        assert resume(folder).progress.step == 6
        assert {path.name for path in beside.iterdir()} == {
            "step_00000005", "step_00000006",
            "step_00000003_best", "step_backup", "step_4", "step_00000009", "step_mine.partial",
        }  # fmt: skip
        assert (beside / "step_00000003_best" / "optimizer.safetensors").is_file()

    def test_a_full_disk_leaves_the_checkpoints_before_and_names_the_path(self, tmp_path, monkeypatch):
        (tmp_path / "config.yaml").touch()
        checkpoints = Checkpoints(tmp_path, limit=1)
        checkpoints.save(1, Snapshot({}, {}, {}, {}))

        def full(path, *arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*step_00000002.*/progress\.json'"):
            checkpoints.save(2, Snapshot({}, {}, {}, {}))
        assert os.listdir(checkpoints.folder) == ["step_00000001"]

    def test_a_link_to_nothing_is_no_folder_for_runs(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nothing")
        with pytest.raises(ValueError, match=r"out must be a folder that can be written, .*link is a link to nothing"):
            new_folder(tmp_path / "link", "experiment")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "experiment").symlink_to(tmp_path / "nothing")
        with pytest.raises(ValueError, match="experiment is a link to nothing"):
            run(replace(run_config(tmp_path, steps=1), experiment="experiment"), tmp_path / "out")

    def test_a_damaged_checkpoint_is_named(self, tmp_path):
        (tmp_path / "config.yaml").touch()
        checkpoints = Checkpoints(tmp_path, limit=1)
        for name in ("progress.json", "optimizer.safetensors"):
            some = {"a": torch.zeros(1)}  # older releases of safetensors do not read a file of none
            checkpoints.save(1, Snapshot(some, some, some, {}))
            (checkpoints.folder / "step_00000001" / name).write_bytes(b"")
            with pytest.raises(ValueError, match=f"step_00000001/{name} is "):
                checkpoints.newest()


NAME = "cost $x_{$ [a-c] 100% *'\"_ é"  # between the dollars is no formula


@pytest.mark.usefixtures("drawn")
def test_a_run_of_any_name_and_text_of_any_path_trains_resumes_and_is_compared_from_any_folder(tmp_path, monkeypatch, recwarn):
    config = run_config(tmp_path, steps=4, evaluations=2, sample_tokens=2)
    (tmp_path / "there").mkdir()
    shutil.move(config.data.text, tmp_path / "there" / NAME)
    config = replace(config, experiment=NAME, data=replace(config.data, text=NAME, tokenizer="bpe", cache=f"cache {NAME}"))
    monkeypatch.chdir(tmp_path / "there")
    before_step(monkeypatch, 3, interrupt)
    with pytest.raises(Interrupted):
        run(config, "out")
    (folder,) = (tmp_path / "there" / "out" / NAME).iterdir()
    monkeypatch.undo()
    stored = RunConfig.from_yaml(folder / "config.yaml")
    assert (stored.data.text, stored.data.cache) == tuple(str(tmp_path / "there" / name) for name in (NAME, f"cache {NAME}"))
    assert resume(folder).progress.step == 4
    copied = tmp_path / f"_{NAME}" / folder.name
    shutil.copytree(folder, copied)
    assert main(["compare", str(folder), str(copied), "--out", str(tmp_path / f"compared {NAME}")]) == 0
    assert main(["plot", str(folder), str(copied), "--out", str(tmp_path / f"plot {NAME}.png")]) == 0
    assert main(["plot", str(folder)]) == 0
    assert (folder / "training_curves.png").is_file() and (tmp_path / f"compared {NAME}" / "comparison.png").is_file()
    assert r"| cost \$x_{\$ \[a-c\] 100% \*'" in (tmp_path / f"compared {NAME}" / "comparison.md").read_text()
    assert not [warning for warning in recwarn if "there is no" in str(warning.message)]


def test_paths_of_starting_points_are_stored_absolute_and_names_of_the_hub_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    (tmp_path / "bpe").mkdir()
    init_from = {"gpt2": "local", "mamba": "state-spaces/mamba-130m-hf"}
    anchored = RunConfig.from_dict({}, {"init_from": init_from, "tokenizer": "local", "dataset": "owner/name"}).anchored()
    assert anchored.training.init_from == {"gpt2": str(tmp_path / "local"), "mamba": "state-spaces/mamba-130m-hf"}
    assert (anchored.data.tokenizer, anchored.data.dataset) == (str(tmp_path / "local"), "owner/name")
    checkpoint = RunConfig.from_dict({}, {"init_from": {"checkpoint": "not/there"}, "tokenizer": "bpe"}).anchored()
    assert checkpoint.training.init_from == {"checkpoint": str(tmp_path / "not/there")} and checkpoint.data.tokenizer == "bpe"
    assert checkpoint.anchored() == checkpoint


class TestText:
    def test_a_resume_onto_other_held_out_text_is_refused(self, tmp_path):
        config, folder = run_config(tmp_path, steps=6, save_steps=1, sample_tokens=0), tmp_path / "run"
        interrupted_run(folder, config)
        (held_out,) = read_text(config.data.text).validation
        path = Path(config.data.text) / held_out.name
        path.write_text(path.read_text().replace("word1", "word2", 1))
        with pytest.raises(ValueError, match=f"the held-out text of .* is not that with which the run in {folder} began"):
            resume(folder)
        path.write_text(held_out.text)
        assert resume(folder).progress.step == 6

    def test_other_training_text_is_said(self, tmp_path):
        def text(training):
            return SimpleNamespace(
                source="mine", train=SimpleNamespace(text_hash=training), validation=SimpleNamespace(text_hash="b")
            )

        folder = RunFolder(tmp_path)
        assert folder.check_text(text("a")) is None  # of a run that has not noted it
        folder.save_text(text("a"))
        assert folder.check_text(text("a")) is None
        assert folder.check_text(text("c")) == f"the training text of mine is not that with which the run in {tmp_path} began"


def test_results_are_there_before_samples_and_pictures_and_do_not_depend_on_them(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        assert (tmp_path / "run" / "results.json").is_file()
        raise RuntimeError("no font")

    monkeypatch.setattr(ending, "_sample", fails)
    monkeypatch.setattr(ending, "training_curves", fails)
    with pytest.warns(UserWarning) as warned:
        outcome = run_in(tmp_path / "run", run_config(tmp_path, steps=2))
    assert [str(warning.message) for warning in warned if "there is no" in str(warning.message)] == [
        "there is no sample: RuntimeError: no font",
        "there is no training_curves.png: RuntimeError: no font",
    ]
    assert outcome.sample == ("", "") and RunRecord.read(tmp_path / "run").steps == 2


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_command_says_where_the_run_is_and_how_it_goes_on(name, code, tmp_path, monkeypatch, capsys):
    config = run_config(tmp_path, steps=6, save_steps=2, sample_tokens=0)
    config.to_yaml(tmp_path / "config.yaml")
    before_step(monkeypatch, 3, lambda: signal.raise_signal(getattr(signal, name)))
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "o u t")]
    assert main(arguments) == code
    said = capsys.readouterr().err.splitlines()[-1]
    (folder,) = (tmp_path / "o u t" / "tiny").iterdir()
    by = "" if name == "SIGINT" else f" by {name}"
    command = shlex.join(["train", "--resume", str(folder)])
    assert said == f"smt: interrupted{by}; the run is in {folder}: smt {command} goes on from step 3"
    monkeypatch.undo()
    if name == "SIGTERM":
        assert main(shlex.split(command)) == 0
