"""Every kernel keeps its budgets on every architecture, and the audit names the kernel and the figure that does not."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.triton, pytest.mark.interpreter]

BUDGETS = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_budgets.yaml"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Compiling for all targets and sizes takes as long as half of the other tests; CI does.
FIRST_TARGETS = ("sm_90",)


@pytest.fixture(scope="module")
def audit():
    from smt_kernels.testing import audit

    return audit


@pytest.fixture
def budgets(audit) -> dict:
    return audit.load_budgets(BUDGETS)


@pytest.fixture(scope="module")
def row(audit):
    """One call of one target: what it asks for is counted, what it compiles to is made up."""
    from smt_kernels.testing.aot import KernelReport

    case = audit.make_case("window_attention", "forward", 64, audit.DTYPES["bf16"], "cpu")
    kernel = KernelReport("", "_forward_kernel", "sm_80", 4, 128, 0, 64 << 10, 99 << 10, 0.25, {"HMMA": 64}, 1000)
    key = audit.Key("window_attention", "forward", 64, "bf16", "sm_80")
    return audit.Row(key, [kernel], audit.count(case, "ampere"), case.tokens, case.heads, case.decoding)


@pytest.fixture
def spilling(row):
    """The same, with a kernel that spills."""
    return dataclasses.replace(row, kernels=[dataclasses.replace(row.kernels[0], spills=12)])


@pytest.fixture
def written(tmp_path, budgets):
    """Write budgets that differ from those of the project, and return their path."""

    def write(**changes):
        path = tmp_path / "budgets.yaml"
        path.write_text(yaml.safe_dump(budgets | changes), encoding="utf-8")
        return path

    return write


def test_every_kernel_compiles_within_its_budgets(audit, budgets, request):
    from smt_kernels.testing.aot import compiler_version
    from smt_kernels.testing.cases import DTYPES

    thorough = request.config.getoption("--every-target")
    sizes = {name: of if thorough else of[:1] for name, of in budgets["sizes"].items()}
    # GPT-2's; bytes are counted at a smaller one, since they would take long.
    sizes |= {"stride_memory": [1536], "stride_write": [1536]}
    keys = audit.budgeted_keys(budgets | {"sizes": sizes}, TARGETS if thorough else FIRST_TARGETS)
    compiler = compiler_version()
    # Several writes of one chunk are compiled as a part of ``stride_memory``; in CI alone, they and pooling in other ways, too.
    skipped = ("stride_write forward", "stride_write backward") if thorough else ("stride_write", "attention_pool")
    keys = [key for key in keys if not key.call.startswith(skipped) or key.direction == "single"]
    compiled = audit.compile_keys(keys, processes=None if thorough else 1)
    for key in keys:
        smallest = min(budgets["sizes"][key.operation])  # at any size it is the same that is launched
        case = audit.make_case(key.operation, key.direction, smallest, DTYPES[key.dtype], "cpu")
        launched = [kernel for kernel, *_ in audit.launched(case, audit.FAMILY[key.target])]
        assert launched and [kernel.kernel for kernel in compiled[key]] == launched
        assert all(kernel.target == key.target and kernel.shared_bytes >= 0 for kernel in compiled[key])
    broken = [line for key in keys for line in audit.compiled_violations(key, compiled[key], budgets, compiler)]
    audit.enforce(broken, budgets, compiler)


def test_window_attention_of_gpt2_s_heads_spills_nothing_in_fp32(audit, request):
    """Budgets are of bf16, whose products are others."""
    from smt_kernels.testing.aot import compiler_version

    targets = TARGETS[:3] if request.config.getoption("--every-target") else FIRST_TARGETS
    keys = [audit.Key("window_attention", way, 64, "fp32", to) for way in ("forward", "backward") for to in targets]
    forward = "forward", "sm_80"
    known = {"3.6": {forward: 10}, "3.9": {forward: 8}}.get(compiler_version(), {})
    spills = {key: [kernel.spills for kernel in kernels] for key, kernels in audit.compile_keys(keys, processes=1).items()}
    assert spills == {key: [known.get((key.direction, key.target), 0)] for key in keys}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_longest_heads_of_fp32_fit_the_shared_memory_of_a_chip(audit, target):
    """Budgets are of bf16, and of shorter heads. Ampere's limit here is that of its consumer chips, 99 KiB."""
    (kernels,) = audit.compile_keys([audit.Key("stream_attention", "backward", 256, "fp32", target)], processes=1).values()
    limit = {"sm_80": 99 << 10, "sm_90": 227 << 10}[target]
    assert len(kernels) == 3 and all(kernel.shared_bytes <= kernel.shared_limit == limit for kernel in kernels)


@pytest.mark.parametrize("operation", yaml.safe_load(BUDGETS.read_text(encoding="utf-8"))["sizes"])
def test_every_call_asks_for_what_its_budgets_allow_under_the_settings_of_every_target(audit, budgets, operation, request):
    from smt_kernels.testing.aot import compiler_version

    keys, compiler = audit.budgeted_keys(budgets | {"sizes": {operation: budgets["sizes"][operation]}}), compiler_version()
    if not request.config.getoption("--every-target"):
        # The ratio of bytes depends little on the width, the time of the interpreter much.
        long = ("stride_memory", "stride_write chunks")
        keys = [dataclasses.replace(key, size=key.size // 4) if key.call.startswith(long) else key for key in keys]
    counts = list(audit.count_keys(keys))
    assert [key for key, _ in counts] == keys
    broken = [line for key, count in counts for line in audit.counted_violations(key, count, budgets, compiler)]
    audit.enforce(broken, budgets, compiler)


def test_the_audit_gives_a_row_for_every_key_in_order(audit, row, monkeypatch):
    """Calls for the same targets are compiled together, whose reports come in order of target, then call."""

    def compiled(calls, targets):
        (kernel,) = row.kernels
        named = [f"{call.function}, {call.arguments['q'].shape[-1]}" for call in calls]
        return [
            dataclasses.replace(kernel, kernel=name, target=target, call=index)
            for target in targets
            for index, name in enumerate(named)
        ]

    monkeypatch.setattr(audit, "compile_ahead", compiled)
    decode, window = "stream_attention_decode", "window_attention"
    calls = [(decode, 32, "gfx942"), (window, 16, "sm_90"), (decode, 16, "gfx942")]
    calls += [(decode, 32, "sm_80"), (decode, 16, "sm_80")]
    keys = [audit.Key(operation, "forward", size, "bf16", target) for operation, size, target in calls]
    rows = list(audit.audit(keys, processes=2))
    assert [row.key for row in rows] == keys
    for key, (kernel,), counted in ((row.key, row.kernels, row.count) for row in rows):
        assert kernel.kernel == f"smt_kernels.{key.operation}.kernels:forward, {key.size}" and kernel.target == key.target
        assert len(counted.traffic.launches) == 1 and counted.traffic.bytes > 0


def test_what_is_launched_with_other_settings_is_counted_anew(audit):
    """Backward, 64 queries at a time on Hopper and 32 on the others."""
    keys = [audit.Key("window_attention", "backward", 64, "bf16", target) for target in TARGETS]
    counts = {key.target: count for key, count in audit.count_keys(keys)}
    assert counts["sm_80"] is counts["sm_100"] is counts["gfx942"] is not counts["sm_90"]
    alone = audit.count(audit.make_case("window_attention", "backward", 64, audit.DTYPES["bf16"], "cpu"), "hopper")
    assert (counts["sm_90"].traffic.read, counts["sm_90"].flops_ratio) == (alone.traffic.read, alone.flops_ratio)


def test_the_audit_names_the_kernel_and_the_figure_of_a_broken_budget(audit, budgets, row, spilling):
    assert audit.violations(row, budgets, "3.9") == []
    broken = dataclasses.replace(spilling, kernels=[dataclasses.replace(spilling.kernels[0], matrix_instructions={})])
    assert audit.violations(broken, budgets, "3.9") == [
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: 12 spills, budget 0",
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: no HMMA of the matrix units",
    ]
    large = dataclasses.replace(row, kernels=[dataclasses.replace(row.kernels[0], shared_bytes=200 << 10)])
    assert "204800 bytes of shared memory, limit 101376" in audit.violations(large, budgets, "3.9")[0]
    traffic = copy.deepcopy(row.count.traffic)
    traffic.read["q"] += 2 * row.count.least_bytes
    traffic.raced["out"] = 4
    wasteful = dataclasses.replace(row, count=dataclasses.replace(row.count, traffic=traffic))
    assert audit.violations(wasteful, budgets, "3.9") == [
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: bytes 3, budget 1.1",
        "_forward_kernel of window_attention forward, sm_80, bf16, head 64: 0 atomics, arguments that programs race for: out",
    ]


def test_an_exceeded_budget_must_keep_the_figure_it_has(audit, budgets, row):
    budgets["calls"]["window_attention forward"]["flops"] = 2
    assert "flops 2.51, budget 2" in audit.violations(row, budgets, "3.9")[0]
    exceeded = {"call": "window_attention forward", "figure": "flops", "targets": ["sm_80"], "keeps": 2.6}
    assert audit.violations(row, budgets | {"exceeded": [exceeded]}, "3.9") == []
    assert audit.violations(row, budgets | {"exceeded": [exceeded | {"keeps": 2.4}]}, "3.9")
    assert audit.violations(row, budgets | {"exceeded": [exceeded | {"targets": ["sm_90"]}]}, "3.9")


def test_the_least_bytes_are_those_of_arguments_and_results(audit, row):
    """q, k, v and out in bf16, lse in fp32, and two counts, for two windows of 65 with two heads of 64."""
    assert row.count.least_bytes == 2 * 65 * 2 * (4 * 64 * 2 + 4) + 2 * 2 * 4
    visible = 2 * 2 * sum(range(1, 66))
    assert row.count.useful_flops == 2 * 2 * 64 * visible


def test_an_entry_for_a_compiler_applies_there_alone(audit, budgets, spilling):
    exceeded = {"call": "window_attention forward", "figure": "spills", "keeps": 12, "compilers": ["3.6", "3.7"]}
    budgets["exceeded"] = [exceeded]
    broken = {version: audit.violations(spilling, budgets, version) for version in budgets["compilers"]}
    named = ["_forward_kernel of window_attention forward, sm_80, bf16, head 64: 12 spills, budget 0"]
    assert broken == {"3.6": [], "3.7": [], "3.8": named, "3.9": named}
    budgets["exceeded"] = [exceeded | {"keeps": 11}]
    assert audit.violations(spilling, budgets, "3.6") == ["".join(named).replace("budget 0", "budget 11")]


class TestCompilers:
    """A broken budget fails where budgets were checked, and is reported by name where they were not."""

    LINE = "_forward_kernel of window_attention forward, sm_80, bf16, head 64: 12 spills, budget 0"

    def test_one_that_budgets_were_checked_with_fails(self, audit, budgets, spilling):
        for known in budgets["compilers"]:
            with pytest.raises(AssertionError, match=f"over budget with triton {known}:\n{self.LINE}"):
                audit.enforce(audit.violations(spilling, budgets, known), budgets, known)

    def test_any_other_is_reported(self, audit, budgets, spilling):
        with pytest.warns(audit.UncheckedCompilerWarning) as reported:
            audit.enforce(audit.violations(spilling, budgets, "4.0"), budgets, "4.0")
        (report,) = reported
        assert str(report.message).endswith(self.LINE) and "over budget with triton 4.0," in str(report.message)

    def test_nothing_is_said_of_budgets_that_are_kept(self, audit, budgets, row):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for compiler in ("3.9", "4.0"):
                audit.enforce(audit.violations(row, budgets, compiler), budgets, compiler)

    def test_the_one_installed_is_named_as_budgets_name_it(self):
        import triton

        from smt_kernels.testing.aot import compiler_version

        assert triton.__version__.startswith(compiler_version() + ".") and compiler_version().count(".") == 1


EXCEEDED = {"call": "stream_attention forward", "figure": "bytes", "keeps": 1.7, "because": "a reason"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"compilers": "3.9"}, "must be a list of versions in quotes"),
        ({"compilers": [3.9]}, "must be a list of versions in quotes"),
        ({"compilers": ["3.9.0"]}, "must be a list of versions in quotes"),
        ({"compilers": []}, "must be a list of versions in quotes"),
        ({"compilers": ["2.0"]}, "must be some of those of the file"),
        ({"targets": ["sm_75"]}, "must be some of sm_80"),
        ({"sizes": [65]}, "must be some of"),
        ({"call": "stride_write sideways"}, "must exceed a budget, which is None"),
        ({"figure": "seconds"}, "must exceed a budget, which is None"),
        ({"keeps": 1.2}, "must exceed a budget, which is 1.6"),
        ({"because": ""}, "must say why"),
        ({"compiler": ["3.9"]}, "must have because, call, figure, keeps and may have compilers, sizes, targets"),
    ],
)
def test_an_entry_that_says_nothing_sensible_is_refused(audit, written, change, message):
    audit.load_budgets(written(exceeded=[EXCEEDED | {"compilers": ["3.9"]}]))
    with pytest.raises(ValueError, match=message):
        audit.load_budgets(written(exceeded=[EXCEEDED | change]))


@pytest.mark.parametrize("compilers", ["3.9", [3.9], ["3.9.0"], []], ids=repr)
def test_budgets_must_name_the_compilers_they_were_checked_with(audit, written, compilers):
    with pytest.raises(ValueError, match="compilers must be a list of versions in quotes"):
        audit.load_budgets(written(compilers=compilers))


def test_budgets_name_what_exists(audit, budgets):
    from smt_kernels.testing.cases import OPERATIONS

    assert budgets["sizes"].keys() == OPERATIONS.keys()
    calls = {f"{name} {direction}" for name, operation in OPERATIONS.items() for direction in operation.directions}
    assert budgets["calls"].keys() == calls
