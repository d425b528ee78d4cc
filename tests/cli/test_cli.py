"""The command line does what it says, and says what went wrong in one line."""

import json
import subprocess
import sys

import pytest

from smt.cli import main

TINY = [
    "--steps", "3", "--vocab-size", "270", "--d_model", "16", "--d_k", "8", "--transformer-n-layers", "1",
    "--ssm_n_layers", "1", "--transformer_n_heads", "2", "--m_input_tokens", "6", "--stride=2", "--n_ssm_outputs", "3",
    "--batch_size", "2", "--chunk_length", "16", "--lanes", "2", "--sample_tokens", "4", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.txt").write_text(" ".join(f"word{(index * j) % 11}" for j in range(60)))
    return folder


def test_train_prints_its_results_once_and_says_where_its_files_are(texts, tmp_path, capsys):
    out = tmp_path / "runs"
    assert main(["train", "--text", str(texts), "--out", str(out), "--experiment", "tiny", *TINY]) == 0
    printed = capsys.readouterr().out
    for phrase in ("validation loss ", "perplexity ", "bits per byte  ", "tokens/s", "sample: ", "files  "):
        assert printed.count(phrase) == 1, phrase
    (folder,) = (out / "tiny").iterdir()
    assert f"files           {folder}" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["model"]["stride"] == 2 and results["training"]["steps"] == 3 and results["results"]["steps"] == 3
    assert f"{results['results']['val_bits_per_byte']:.3f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strid", "3"], "there is no option '--strid'; did you mean '--stride'?"),
        (["--stride", "99"], "stride must lie in 1..m_input_tokens = 1..50, got 99"),
        (["--d_model", "191"], "transformer_n_heads must divide d_model = 191, got 2"),
        (["--vocab_size", "many"], "vocab_size must be of type int, got 'many'"),
        (["--encoding", "tokens"], "encoding must be one of token, stride, stream, got 'tokens'"),
        (
            ["--config", "missing.yaml"],
            "one of the examples (finetune, pg19, shakespeare, stdlib, tiny, wikitext103, wikitext2)",
        ),
        (["--text", "missing.txt"], "text must be a file or a folder, missing.txt does not exist"),
        (["--source", "wikitext"], "got 'wikitext'; did you mean 'wikitext2'?"),
        (["--source", "wikitext2"], "neither the Hugging Face Hub nor the cache of earlier downloads"),
        (["--tokenizer", "no/such"], "neither the Hub nor the cache of earlier downloads gave it"),
        (["more"], "unexpected argument 'more'"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else None,
)
def test_errors_are_one_line_without_a_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--steps", "1", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("smt: error: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_debug_raises_the_error_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", "--text", "missing.txt", "--debug"])


def test_a_missing_package_says_how_to_install_it(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["train", "--text", str(texts), "--out", str(tmp_path / "runs"), *TINY]) == 1
    assert 'tokenizers is not installed: pip install -e ".[train]"' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=["smt", "smt-train"])
def test_help_shows_examples(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and "smt train --steps 500" in printed


def test_train_help_lists_the_fields_of_every_part(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for option in ("--encoding", "--write-group", "--chunk_length", "--learning-rate", "--minutes"):
        assert option in printed


def test_no_command_is_an_error_that_shows_the_help(capsys):
    assert main([]) == 2
    assert "examples:" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["tran"])
    assert exit_.value.code == 2
    assert "tran" in capsys.readouterr().err


def test_the_command_line_starts_before_torch_so_that_its_threads_can_be_told_to_sleep():
    program = "import sys, smt.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
