"""The command line does what it says, and says what went wrong in one line."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from command_line import TINY

from smt.cli import COMMANDS, main


def test_train_prints_its_results_once_and_says_where_its_files_are(texts, tmp_path, capsys):
    out = tmp_path / "runs"
    assert main(["train", "--text", str(texts), "--out", str(out), "--experiment", "tiny", *TINY]) == 0
    printed, progress = capsys.readouterr()
    assert re.fullmatch(r"100%, step 3, loss \d\.\d{3}, [\d,]+ tokens/s, \d:\d\d:\d\d passed, 0:00:00 remaining\n", progress)
    for phrase in ("validation loss ", "perplexity ", "bits per byte  ", "tokens/s", "sample: ", "files  "):
        assert printed.count(phrase) == 1, phrase
    (folder,) = (out / "tiny").iterdir()
    assert f"files           {folder}" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["model"]["stride"] == 2 and results["training"]["steps"] == 3 and results["results"]["steps"] == 3
    assert f"{results['results']['val_bits_per_byte']:.3f}" in printed


@pytest.mark.parametrize(
    ("arguments", "experiment"),
    [
        ([], "stdlib"),
        (["--text", "books/my_novels/"], "my_novels"),
        (["--text", "novel.txt"], "novel"),
        (["--text", "novel.txt", "--experiment", "first"], "first"),
        (["--text", "novel.txt", "--config", "shakespeare"], "shakespeare"),
        (["--dataset", "user/stories"], "stories"),
        (["--source", "recall"], "recall"),
    ],
    ids=lambda value: "-".join(value).replace("/", "-") if isinstance(value, list) else None,
)
def test_runs_of_ones_own_text_are_in_a_folder_of_its_name(arguments, experiment, monkeypatch):
    configs = []

    def begin(config, out, started):
        configs.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr("smt.training.run.run", begin)
    assert main(["train", "--device", "cpu", *arguments]) == 1
    assert [config.experiment for config in configs] == [experiment]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "99"], "stride must lie in 1..m_input_tokens = 1..50, got 99"),
        (["--d_model", "191"], "transformer_n_heads must divide d_model = 191, got 2"),
        (["--vocab_size", "many"], "vocab_size must be of type int, got 'many'"),
        (["--encoding", "tokens"], "encoding must be one of token, stride, stream, got 'tokens'"),
        (
            ["--config", "missing.yaml"],
            "those packaged (finetune, novels, orpo, pg19, recall, recall_pairs, shakespeare, stdlib, stdlib_gpu, tiny, ",
        ),
        (["--architecture", "gpt3"], "architecture must be one of smt, gpt2, hymba, got 'gpt3'"),
        (["--resume", "missing"], "--resume goes on with a run as it was begun; it takes no other setting"),
        (["--text", "missing.txt"], "/missing.txt does not exist"),
        (["--source", "wikitext"], "got 'wikitext'; did you mean 'wikitext2'?"),
        (["--source", "wikitext2"], "neither the Hugging Face Hub nor the cache of earlier downloads"),
        (["--tokenizer", "no/such"], "neither the Hub nor the cache of earlier downloads gave it"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else None,
)
def test_errors_are_one_line_without_a_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--steps", "1", "--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("smt: error: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_debug_raises_the_error_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", "--text", "missing.txt", "--device", "cpu", "--debug"])


def test_a_missing_package_says_how_to_install_it(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["train", "--text", str(texts), "--out", str(tmp_path / "runs"), *TINY]) == 1
    assert 'tokenizers is not installed: pip install -e ".[train]"' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "there is no command 'tran'; did you mean 'train'?"),
        (["--debug"], "there is no command '--debug'"),
        (["train", "--strid", "3"], "there is no option '--strid'; did you mean '--stride'?"),
        (["train", "--steps"], "argument --steps: expected one argument; see smt train --help"),
        (["train", "more"], "unexpected argument 'more'"),
        (["generate", "--model", "m", "--prompt", "a", "--top", "3"], "there is no option '--top'; did you mean '--top_p'?"),
        (["generate", "--model", "m"], "one of the arguments --prompt --file is required"),
        (["generate", "--model", "m", "--prompt", "a", "--file", "b"], "not allowed with argument --prompt"),
        (["generate", "--prompt", "a"], "the following arguments are required: --model; see smt generate --help"),
        (["convert", "--out", "o", "--encoding", "token"], "there is no option '--encoding'"),
        (["eval", "--trials", "few"], "argument --trials: invalid int value: 'few'; see smt eval --help"),
        (["compare"], "the following arguments are required: RUN"),
        (["plot"], "the following arguments are required: RUN"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else None,
)
def test_a_command_line_that_cannot_be_read_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("smt: error: ") and message in captured.err and captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_says_what_it_does_with_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    usage, about, *_ = (printed := capsys.readouterr().out).split("\n\n")
    assert usage.startswith(f"usage: smt {command} ")
    assert " ".join(about.split()).lower() == f"{COMMANDS[command].lower()}."
    assert "--debug" in printed and f"\nexamples:\n  smt {command} " in printed


def test_the_help_lists_every_command_with_examples_and_no_command_shows_it_and_fails(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command, about in COMMANDS.items():
        assert f"\n  {command:<10}{about}\n" in printed
    assert "\nexamples:\n  smt train " in printed
    assert main([]) == 2 and capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ValueError("stride must be 1"), 1, "smt: error: stride must be 1\n"),
        (KeyError("model"), 1, "smt: error: KeyError: 'model'; --debug shows where\n"),
        (AssertionError(), 1, "smt: error: AssertionError: ; --debug shows where\n"),
        (KeyboardInterrupt(), 130, "smt: interrupted\n"),
    ],
    ids=["expected", "unexpected", "empty", "ctrl-c"],
)
def test_whatever_a_command_raises_is_one_line_and_no_success(raised, code, message, monkeypatch, capsys):
    def fail(options, started):
        raise raised

    monkeypatch.setattr("smt.cli.info.run", fail)
    assert main(["info"]) == code
    assert capsys.readouterr() == ("", message)


def test_warnings_are_one_line(capsys, tmp_path):
    assert main(["train", "--config", "tiny", "--device", "cpu", "--stride", "1", "--text", str(tmp_path / "missing")]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("smt: warning: stride = 1 is far from m_input_tokens // 3 = 5")
    assert error.startswith("smt: error: text must be a file or a folder")


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys, smt.cli; sys.exit(smt.cli.main(['--help']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["plot", "--help"]], ids="-".join)
def test_help_needs_no_torch(arguments):
    program = f"""
import sys, smt.cli
try:
    smt.cli.main({arguments})
except SystemExit:
    pass
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(
    ("folder", "message"),
    [("missing", "there is no run to resume in missing"), ("RUN", "has finished: there is nothing to resume")],
    ids=["missing", "finished"],
)
def test_resuming_what_cannot_go_on_is_one_line(folder, message, runs, capsys):
    assert main(["train", "--resume", folder.replace("RUN", str(runs["stride"]))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("smt: error: ") and message in error and error.count("\n") == 1


def test_an_interrupted_run_goes_on_and_reports_its_results(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["stride"], run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints")  # those of a finished run are for use, not for resuming
    assert main(["train", "--resume", str(run)]) == 0
    assert f"files           {run}" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())["results"]["steps"] == 3
