"""``smt info`` says what is installed and which backends run."""

import importlib.metadata
import json

import torch

from smt.cli import info, main
from smt.runtime.environment import version_of
from smt_kernels.backends import TRITON_LIMITS, last_choice


def test_json_holds_versions_threads_and_the_backend_of_every_operation_with_its_reason(capsys):
    before = {operation: last_choice(operation) for operation in TRITON_LIMITS}
    assert main(["info", "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["threads"] == torch.get_num_threads() and facts["device"] == "cpu"
    assert set(facts["operations"]) == set(TRITON_LIMITS)
    for choice in facts["operations"].values():
        assert choice["backend"] == "blocked" and "the tensors are on cpu" in choice["reason"]
    assert before == {operation: last_choice(operation) for operation in TRITON_LIMITS}, "asking is no call"


def test_the_table_has_every_package_once_and_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", (*info.PACKAGES, "no-such-package"))
    assert main(["info", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for package in info.PACKAGES:
        (line,) = [line for line in lines if line.split()[:1] == [package]]
        assert ("not installed" in line) == (version_of(package) is None)
    assert any(line.split()[:2] == ["no-such-package", "not"] for line in lines)


def test_a_gpu_that_is_not_there_is_one_line(capsys):
    if torch.cuda.is_available():
        expected, code = "", 0
    else:
        expected, code = "smt: error: device 'cuda' was asked for, but PyTorch finds no GPU", 1
    assert main(["info", "--device", "cuda"]) == code
    assert capsys.readouterr().err.startswith(expected)
