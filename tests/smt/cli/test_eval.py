"""``smt eval`` measures what it is told to, on our models and on Hugging Face's, and leaves its files where it says."""

import json
import math
import shutil

import pytest
import torch
import yaml

from smt import SMTConfig, StrideMemoryTransformer
from smt.baselines.gpt2 import build_gpt2
from smt.cli import main
from smt.data.documents import Document, hash_documents
from smt.data.local import read_text
from smt.data.tokenizer import Tokenizer
from smt.evaluation import run as run_module
from smt.evaluation.recall import Recall
from smt.evaluation.run import TASKS

SIZES = dict(
    vocab_size=300, d_model=16, d_k=8, dropout=0.0, n_ssm_outputs=3, m_input_tokens=6, stride=2, write_group=2,
    transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text, a checkpoint of ours and one of a GPT-2, with one tokenizer."""
    root = tmp_path_factory.mktemp("eval")
    (root / "text").mkdir()
    for index in range(4):
        (root / "text" / f"{index}.txt").write_text(" ".join(f"wörd{(index * j) % 11}" for j in range(60)), encoding="utf-8")
    tokenizer = Tokenizer.train([Document("all", (root / "text" / "1.txt").read_text(encoding="utf-8"))], 300)
    torch.manual_seed(0)
    StrideMemoryTransformer(SMTConfig(**SIZES)).save_pretrained(root / "ours")
    build_gpt2(SMTConfig(**SIZES), n_positions=64).save_pretrained(root / "gpt2")
    for name in ("ours", "gpt2"):
        tokenizer.save(root / name)
    return root


def evaluate(folders, out, *arguments):
    return main(["eval", *arguments, "--data", str(folders / "text"), "--out", str(out), "--trials", "1", "--device", "cpu"])


@pytest.mark.usefixtures("drawn")
def test_every_task_runs_on_both_kinds_of_model_and_leaves_table_json_and_plots(folders, tmp_path, capsys):
    assert evaluate(folders, tmp_path, str(folders / "ours"), "--hf", str(folders / "gpt2")) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert list(results) == list(TASKS)
    for task in ("perplexity", "position"):
        assert set(results[task]) == {"SMT", "gpt2"}
    for task in ("needle", "recall"):
        assert set(results[task]) == {"SMT", "SMT, no writes", "gpt2"}
    for model, figures in results["perplexity"].items():
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["bits_per_character"] > figures["bits_per_byte"]  # ö has two bytes
        assert f"{figures['perplexity']:,.2f}" in printed, model
    plots = {"loss_by_position", "needle", "recall", "ablation", "pooling"}
    assert {path.stem for path in tmp_path.glob("*.png")} == plots
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert "note: ablation: not for gpt2, without a memory" in printed
    assert str(tmp_path / "evaluation.json") in printed


def test_the_ablation_without_writes_is_a_checkpoint_that_never_writes(folders, tmp_path):
    model = StrideMemoryTransformer.from_pretrained(folders / "ours")
    control = StrideMemoryTransformer(SMTConfig(**SIZES, writes=False))
    control.load_state_dict(model.state_dict())
    control.save_pretrained(tmp_path / "control")
    Tokenizer.load(folders / "ours").save(tmp_path / "control")
    assert evaluate(folders, tmp_path / "a", str(folders / "ours"), "--tasks", "ablation") == 0
    assert evaluate(folders, tmp_path / "b", str(tmp_path / "control"), "--tasks", "perplexity") == 0
    ablation = json.loads((tmp_path / "a" / "evaluation.json").read_text())["results"]["ablation"]["SMT"]
    perplexity = json.loads((tmp_path / "b" / "evaluation.json").read_text())["results"]["perplexity"]["SMT"]
    assert ablation["no writes"]["all"]["nats"] == pytest.approx(perplexity["loss"], rel=1e-6)
    assert ablation["whole"]["all"]["nats"] != pytest.approx(perplexity["loss"], rel=1e-6)


def test_the_text_is_tokenised_once_for_all_tasks_of_a_model_and_its_control(folders, tmp_path, monkeypatch):
    read, made = run_module.held_out_text, []
    monkeypatch.setattr(run_module, "usual_lengths", lambda size, available: (size,))  # one, for speed
    monkeypatch.setattr(run_module, "held_out_text", lambda *arguments: made.append(arguments) or read(*arguments))
    assert evaluate(folders, tmp_path, str(folders / "ours"), "--tasks", "perplexity,needle") == 0
    assert len(made) == 1


def test_how_much_is_evaluated_is_as_the_options_say(folders, tmp_path, monkeypatch):
    asked, grid, recalled = [], run_module.needle_in_haystack, []
    monkeypatch.setattr(run_module, "usual_lengths", lambda size, available: (size,))
    monkeypatch.setattr(
        run_module, "needle_in_haystack", lambda *given, **options: asked.append(options) or grid(*given, **options)
    )
    monkeypatch.setattr(run_module, "recall", lambda *given, **options: recalled.append(options) or Recall(0.5, ()))
    arguments = [str(folders / "ours"), "--data", str(folders / "text"), "--out", str(tmp_path), "--device", "cpu"]
    options = ["--tasks", "needle,recall", "--documents", "1", "--trials", "3", "--seed", "5"]
    assert main(["eval", *arguments, *options]) == 0
    assert asked and all((given["n_trials"], given["seed"]) == (3, 5) for given in asked)
    assert recalled and all(given["n_documents"] == 4 * 3 for given in recalled)
    settings = json.loads((tmp_path / "evaluation.json").read_text())["evaluation"]
    assert settings == {"tasks": ["needle", "recall"], "documents": 1, "trials": 3, "seed": 5}


def test_what_was_measured_is_printed_and_kept_whatever_becomes_of_plots_and_later_tasks(
    folders, tmp_path, capsys, monkeypatch
):
    def fails(*arguments):
        raise ValueError("no font")

    monkeypatch.setattr("smt.evaluation.plots.plot_positions", fails)
    assert evaluate(folders, tmp_path, str(folders / "ours"), "--tasks", "perplexity,position") == 0
    captured = capsys.readouterr()
    assert "bits per byte" in captured.out and "there is no loss_by_position.png: ValueError: no font" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    monkeypatch.setitem(TASKS, "position", fails)
    assert evaluate(folders, tmp_path, str(folders / "ours"), "--tasks", "perplexity,position") == 1
    captured = capsys.readouterr()
    assert "bits per byte" in captured.out and captured.err.splitlines()[-1] == "smt: error: no font"


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(folders, tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("it was evaluated")

    monkeypatch.setattr("smt.evaluation.run.evaluate_subjects", refuse)
    (tmp_path / "file").touch()
    assert evaluate(folders, tmp_path / "file" / "out", str(folders / "ours")) == 1
    assert "out must be a folder that can be written, " in capsys.readouterr().err


def test_it_is_said_when_the_held_out_text_of_the_run_has_changed(folders, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folders / "ours", run)
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**values, "data": {"text": str(folders / "text")}}))
    said = f"note: the held-out text of {folders / 'text'} is not that with which the run in {run} began"
    for there, changed in ((hash_documents(read_text(folders / "text").validation), False), ("another", True)):
        (run / "text.json").write_text(json.dumps({"source": "text", "training": "", "held_out": there}))
        assert main(["eval", str(run), "--tasks", "perplexity", "--device", "cpu"]) == 0
        assert (said in capsys.readouterr().out) == changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "smt eval needs a run's folder or --hf NAME"),
        (["nowhere"], "run must be a folder that smt train left, nowhere is none"),
        (["{ours}", "--tasks", "needles"], "tasks has no 'needles'; did you mean 'needle'?"),
        (["{ours}", "--data", "pg20"], "data must be a file, a folder or one of stdlib, shakespeare,"),
        (["{ours}"], "smt eval needs --data: the model does not say what it was trained on"),
        (["{ours}", "--documents", "0", "--data", "stdlib"], "documents must be at least 1, got 0"),
        (["--hf", "{gpt2}"], "smt eval --hf needs --out FOLDER for its files"),
        (["--hf", "{gpt2}", "--out", "out"], "smt eval needs --data"),
        (["--hf", "{gpt2}", "--out", "out", "--data", "{text}", "--context", "99"], "context must lie in 2..64"),
        (["{ours}", "--data", "{text}", "--context", "16"], "--context is what the model of --hf sees at most, got it without"),
        (["{text}", "--data", "{text}"], "there is no "),
    ],
    ids=[
        *("nothing", "no-run", "task", "data", "no-data", "documents", "no-out", "hf-no-data", "context"),
        *("context-of-none", "no-checkpoint"),
    ],
)
def test_errors_are_one_line_without_a_traceback(folders, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {name: str(folders / name) for name in ("ours", "gpt2", "text")}
    assert main(["eval", *(argument.format(**names) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    *progress, last = error.splitlines()  # transformers shows how it loads weights
    assert last.startswith("smt: error: ") and message in last
    assert all("Loading weights" in line for line in progress if line)
    assert not list(tmp_path.iterdir())
