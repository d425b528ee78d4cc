"""Every kernel keeps its budgets on every architecture, and the audit names the kernel and the figure that does not."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]

BUDGETS = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_budgets.yaml"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def audit():
    from smt_kernels.testing import audit

    return audit


@pytest.fixture
def budgets(audit) -> dict:
    return audit.load_budgets(BUDGETS)


@pytest.fixture(scope="module")
def row(audit):
    """One audited call of one target."""
    return next(audit.audit([audit.Key("window_attention", "forward", 64, "bf16", "sm_80")], processes=1))


# One test per target: each compiles its kernels once, in one process, and the workers of the test run share the targets.
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_keeps_its_budgets(audit, budgets, target):
    keys = audit.budgeted_keys(budgets, [target])
    rows = list(audit.audit(keys, processes=1))
    assert [row.key for row in rows] == keys and all(row.kernels for row in rows)
    assert not [line for row in rows for line in audit.violations(row, budgets)]
    for row in rows:
        assert all(kernel.target == target and kernel.shared_bytes >= 0 for kernel in row.kernels)
        assert [kernel.kernel for kernel in row.kernels] == [launch.kernel for launch in row.count.traffic.launches]


def test_the_audit_names_the_kernel_and_the_figure_of_a_broken_budget(audit, budgets, row):
    assert audit.violations(row, budgets) == []
    spilling = dataclasses.replace(row, kernels=[dataclasses.replace(row.kernels[0], spills=12, matrix_instructions={})])
    assert audit.violations(spilling, budgets) == [
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: 12 spills, budget 0",
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: no HMMA of the matrix units",
    ]
    large = dataclasses.replace(row, kernels=[dataclasses.replace(row.kernels[0], shared_bytes=200 << 10)])
    assert "204800 bytes of shared memory, limit 101376" in audit.violations(large, budgets)[0]
    traffic = copy.deepcopy(row.count.traffic)
    traffic.read["q"] += 2 * row.count.least_bytes
    traffic.raced["out"] = 4
    wasteful = dataclasses.replace(row, count=dataclasses.replace(row.count, traffic=traffic))
    assert audit.violations(wasteful, budgets) == [
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: bytes 3, budget 1.1",
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: 0 atomics, arguments that programs race for: out",
    ]


def test_an_exceeded_budget_must_keep_the_figure_it_has(audit, budgets, row):
    budgets["calls"]["window_attention forward"]["flops"] = 2
    assert "flops 2.51, budget 2" in audit.violations(row, budgets)[0]
    exceeded = {"call": "window_attention forward", "figure": "flops", "targets": ["sm_80"], "keeps": 2.6}
    assert audit.violations(row, budgets | {"exceeded": [exceeded]}) == []
    assert audit.violations(row, budgets | {"exceeded": [exceeded | {"keeps": 2.4}]})
    assert audit.violations(row, budgets | {"exceeded": [exceeded | {"targets": ["sm_90"]}]})


def test_the_least_bytes_are_those_of_arguments_and_results(audit, row):
    """q, k, v and out in bf16, lse in fp32, and two counts, for two windows of 65 with two heads of 64."""
    assert row.count.least_bytes == 2 * 65 * 2 * (4 * 64 * 2 + 4) + 2 * 2 * 4
    visible = 2 * 2 * sum(range(1, 66))
    assert row.count.useful_flops == 2 * 2 * 64 * visible


def test_budgets_name_what_exists(audit, budgets):
    from smt_kernels.testing.cases import OPERATIONS

    assert budgets["sizes"].keys() == OPERATIONS.keys()
    calls = {f"{name} {direction}" for name, operation in OPERATIONS.items() for direction in operation.directions}
    assert budgets["calls"].keys() == calls
    for entry in budgets["exceeded"]:
        assert entry["call"] in calls and entry["because"] and set(entry.get("targets", TARGETS)) <= set(TARGETS)
        assert entry["keeps"] > budgets["calls"][entry["call"]][entry["figure"]]
