"""What training and decoding ask of a GPU, natively: kernels are compiled and launched, and steps recorded."""

from __future__ import annotations

import json
import subprocess
import sys

import null_gpu_steps
import pytest

from smt_kernels.testing import null_gpu

pytestmark = pytest.mark.null_gpu


def test_steps_wait_for_nothing_and_a_graph_holds_them():  # in one process, since each compiles the kernels anew
    command = [sys.executable, "-m", "smt_kernels.testing.null_gpu", sys.executable, null_gpu_steps.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    asked = json.loads(done.stdout.splitlines()[-1])
    for what in ("training", "backward", "decoding"):
        assert asked[what]["triton"] > 0 and asked[what]["products"] > 0, what
        assert (asked[what]["to_device"], asked[what]["to_host"], asked[what]["waits"]) == (0, 0, 0), what
    for what in ("packed", "rows at several steps"):  # what the host says of each row is sent, and nobody waits for it
        assert asked[what]["to_device"] > 0 and (asked[what]["to_host"], asked[what]["waits"]) == (0, 0), what
    assert asked["recorded"]["kernels"] == asked["backward"]["kernels"] <= asked["recorded"]["captured"]
    assert (asked["recorded"]["to_device"], asked["recorded"]["to_host"]) == (0, 0)
    assert asked["two streams"]["kernels"] == asked["two streams"]["captured"] == 1
    assert "null GPU" in asked["waiting while a graph is recorded"]


def test_without_it_there_are_no_counts():
    with pytest.raises(RuntimeError, match="does not run on the null GPU"):
        null_gpu.counts()


def test_a_device_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"capability must be one of 75, 80, .*, got 61"):
        null_gpu.environment(61)


def test_whoever_lacks_what_it_needs_is_told(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert null_gpu.missing() == "there is no no-such-compiler"
    with pytest.raises(RuntimeError, match="no null GPU can be built: there is no no-such-compiler"):
        null_gpu.environment()
