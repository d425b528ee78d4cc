"""``smt convert`` writes a checkpoint and says what is in it, or says in one line what is wrong."""

import pytest
from pretrained_folders import WINDOW, gpt2_folder, mamba_folder

from smt import SMTConfig, StrideMemoryTransformer
from smt.cli import main

FLAGS = [f"--set={name}={value}" for name, value in WINDOW.items()]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    return mamba_folder(tmp_path_factory.mktemp("mamba"))


def test_the_command_writes_a_checkpoint_and_prints_its_report(gpt2, mamba, tmp_path, capsys):
    out = tmp_path / "start"
    assert main(["convert", "--gpt2", str(gpt2), "--mamba", str(mamba), "--out", str(out), *FLAGS]) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    for phrase in (
        f"GPT-2 from {gpt2}",
        f"Mamba from {mamba}",
        "  loaded (",
        "positions beyond the window",
        "  fresh (4)",
        str(out),
    ):
        assert phrase in printed.out
    assert StrideMemoryTransformer.from_pretrained(out).config.stride == 2


def test_every_option_reaches_the_conversion(tmp_path, monkeypatch):
    asked = []

    def converted(out, **options):
        asked.append({"out": out, **options})
        return SMTConfig(), "a report"

    monkeypatch.setattr("smt.cli.conversion.convert", converted)
    switches = ["--match_scale", "--first_layers", "--embedding", "mamba", "--seed", "7", "--config", "c.yaml"]
    assert main(["convert", "--gpt2", "g", "--mamba", "m", "--out", "o", "--set", "stride=3", *switches]) == 0
    assert main(["convert", "--mamba", "m", "--out", "o"]) == 0
    named = {"out": "o", "gpt2": "g", "mamba": "m", "config": "c.yaml", "fields": {"stride": "3"}, "embedding": "mamba"}
    plain = {"out": "o", "gpt2": None, "mamba": "m", "config": None, "fields": {}, "embedding": None}
    assert asked == [
        {**named, "match_scale": True, "first_layers": True, "seed": 7},
        {**plain, "match_scale": False, "first_layers": False, "seed": 42},
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "convert needs a source: gpt2, mamba or both"),
        (["--gpt2", "GPT2", "--match_scale"], "match_scale gives the output of a mamba another scale, got it without one"),
        (["--gpt2", "GPT2", "--set", "stride"], "--set takes FIELD=VALUE, got 'stride'"),
        (["--gpt2", "GPT2", "--set", "strid=2"], "SMTConfig has no field 'strid'; did you mean 'stride'?"),
        (["--gpt2", "GPT2", "--set", "stride=two"], "stride must be of type int, got 'two'"),
        (["--gpt2", "GPT2", "--set", "d_model=32"], "has n_embd = 16, but d_model = 32: one width for all"),
        (["--gpt2", "GPT2", "--set", "transformer_n_layers=2"], "n_layer = 1 but transformer_n_layers = 2"),
        (["--gpt2", "GPT2", "--set", "vocab_size=99"], "cannot be loaded: its vocabulary has 264 tokens, the model 99"),
        (["--gpt2", "GPT2", "--embedding", "mamba"], "embedding must be one of gpt2, none, got 'mamba'"),
        (["--gpt2", "./missing"], "./missing does not exist"),
        (["--mamba", "GPT2"], "is not a Mamba-1: its config has model_type = 'gpt2'"),
        (["--gpt2", "GPT2", "--config", "missing.yaml"], "there is no missing.yaml"),
        (["--gpt2", "GPT2", "--out", "GPT2"], "out must be a new or an empty folder"),
    ],
    ids=[
        *("no-source", "scale", "set", "field", "type", "width", "layers", "vocabulary", "embedding", "folder", "kind"),
        *("config", "out"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(arguments, message, gpt2, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(gpt2) if argument == "GPT2" else argument for argument in arguments]
    before = {path.name for path in gpt2.iterdir()}
    assert main(["convert", "--out", "start", *FLAGS, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("smt: error: ") and message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir()) and {path.name for path in gpt2.iterdir()} == before
