"""The options of every command: which there are, what help says of them, and how they may be written."""

import argparse
from pathlib import Path

import pytest

from smt.cli import COMMANDS, main, parser_of
from smt.cli.parser import UsageError
from smt.data.recall import RecallTask
from smt.evaluation.run import TASKS
from smt.hymba.config import HymbaConfig
from smt.runtime.fields import as_text, choices_of, defaults_of
from smt.runtime.meanings import in_brief, meanings
from smt.training.settings import PARTS, RunConfig

FROZEN = Path(__file__).with_name("options.txt")


def options_of(command):
    """The actions of a command, but for help itself."""
    return [action for action in parser_of(command)._actions if action.dest != "help"]


def printed_help(command, capsys, monkeypatch, columns=600):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_no_option_comes_or_goes_by_accident():
    """A new one is written into the file, by hand."""
    names = {
        command: sorted(name for a in options_of(command) for name in a.option_strings or [a.metavar]) for command in COMMANDS
    }
    there = "".join(f"{command}\n" + "".join(f"  {name}\n" for name in of_it) for command, of_it in names.items())
    assert FROZEN.read_text(encoding="utf-8") == there


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_means_in_one_spelling(command, capsys, monkeypatch):
    printed = printed_help(command, capsys, monkeypatch)
    for action in options_of(command):
        assert action.help and action.help.strip() and not action.help.startswith(" ("), action.dest
        assert len(action.option_strings) <= 1 and all("-" not in name[2:] for name in action.option_strings)
        assert action.help.replace("%%", "%") in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_default_is_in_the_help(command):
    for action in options_of(command):
        if action.default not in (None, False, []):
            assert f"(default: {action.default})" in action.help, action.dest


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_every_field_has_its_meaning_its_choices_its_default_and_that_of_the_usual_configuration(command, capsys, monkeypatch):
    lines = [" ".join(line.split()) for line in printed_help(command, capsys, monkeypatch).splitlines()]
    usual = RunConfig.from_yaml("stdlib").flat()
    of_another = {name: value for name, value in defaults_of(HymbaConfig).items() if name not in usual}
    for settings, defaults in [*((settings, defaults_of(settings)) for settings in PARTS.values()), (HymbaConfig, of_another)]:
        for name, default in defaults.items():
            shown = f"default: {as_text(default)}"
            shown += f"; stdlib: {as_text(usual[name])}" if usual.get(name, default) != default else ""
            end = f"{in_brief(meanings(settings)[name])} ({shown})"
            (place,) = [index for index, line in enumerate(lines) if line.startswith(f"--{name} ")]
            option, found, _ = " ".join(lines[place : place + 2]).partition(end)
            words = "{" + ",".join(choices_of(settings).get(name, ())) + "}"
            assert found and (words if name in choices_of(settings) else f"--{name} ") in option
    for name, default in defaults_of(RecallTask).items():
        assert f"{name} {in_brief(meanings(RecallTask)[name])} (default: {default})" in lines
    assert (
        "default: 0.1; stdlib: 0.0" in " ".join(lines) and sum("configuration without the field" in line for line in lines) == 1
    )


def test_eval_help_names_every_task(capsys, monkeypatch):
    assert f"{','.join(TASKS)} (default: all)" in printed_help("eval", capsys, monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_hyphens_and_underscores_are_one_option_everywhere(command):
    parser = parser_of(command)
    for action in options_of(command):
        for name in action.option_strings:
            spellings = {name, name.replace("_", "-"), name.replace("_", "-", 1)}
            assert [*parser._as_declared(spellings)] == [name] * len(spellings)
            value = f"{name.replace('_', '-')}=a_b-c=d_e"
            assert [*parser._as_declared([value])] == [f"{name}=a_b-c=d_e"]


def test_both_spellings_are_read():
    parser = parser_of("generate")
    for option in ("--max_new_tokens", "--max-new-tokens"):
        for arguments in ([option, "7"], [f"{option}=7"]):
            assert parser.parse_args(["--model", "m", "--prompt", "x_y-z", *arguments]).max_new_tokens == 7
    assert parser.parse_args(["--model", "m", "--prompt=--top-k"]).prompt == "--top-k"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_name_and_no_path_is_empty(command):
    parser = parser_of(command)
    for action in options_of(command):
        if action.nargs != 0 and action.type is None:
            (name,) = action.option_strings or [action.metavar]
            with pytest.raises(UsageError, match=f"argument {name}: must not be empty; see smt {command} --help"):
                parser.parse_args([f"{name}=" if action.option_strings else ""])


def test_an_empty_text_is_one_line_before_anything_is_read(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--text", ""]) == 2
    assert capsys.readouterr().err == "smt: error: argument --text: must not be empty; see smt train --help\n"
    assert not list(tmp_path.iterdir())


def test_the_home_folder_is_found_behind_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parser_of("plot").parse_args(["~/a", "~/b", "--out=~/c"]) == argparse.Namespace(
        runs=[f"{tmp_path}/a", f"{tmp_path}/b"], out=f"{tmp_path}/c", debug=False
    )
    assert parser_of("generate").parse_args(["--model=m", "--prompt=~/a"]).prompt == "~/a"
