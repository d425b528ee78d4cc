"""The audit prints what was counted and predicted beside its budgets; the report names every part that did not pass."""

import dataclasses
import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(monkeypatch):
    """Import a module of ``benchmarks``, as its scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def audited(load, monkeypatch):
    """The audit command with rows made up, so that nothing is compiled."""
    command = load("audit_kernels")
    from smt_kernels.testing.aot import KernelReport
    from smt_kernels.testing.audit import Count, Row
    from smt_kernels.testing.traffic import Launch, Traffic

    def made_up(keys, processes):
        for key in keys:
            kernel = KernelReport("", "_kernel", key.target, 4, 96, 0, 2048, 4096, 0.25, {"HMMA": 6, "HGMMA": 2}, 100)
            launches = [Launch("_kernel", (1,), 150, 400)]
            traffic = Traffic(read=Counter(q=150), dot_flops=400, launches=launches)
            yield Row(key, [kernel], Count(traffic, 100, 160), tokens=1, heads=1, decoding=False)

    monkeypatch.setattr(command, "audit", made_up)
    monkeypatch.setattr(command, "compiler_version", lambda: "3.9")
    return command


@pytest.mark.triton
@pytest.mark.interpreter
class TestAudit:
    def test_markdown_holds_every_figure_and_labels_what_is_predicted(self, audited, capsys):
        audited.main(
            ["--markdown", "--operations", "stream_attention", "--sizes", "64", "--dtypes", "bf16", "--targets", "sm_90"]
        )
        lines = capsys.readouterr().out.splitlines()
        header, _, forward, backward = [line for line in lines if line.startswith("|")]
        assert "| predicted | full attention predicted |" in header
        assert "| 96 | 0 | 2 | 25% | 6 HMMA+2 HGMMA | 1.50 | 2.50 | 1 |" in forward
        assert "stream_attention backward" in backward
        assert any("predicted, not measured" in line for line in lines)

    def test_a_broken_budget_names_the_kernel_and_the_figure(self, audited, capsys):
        arguments = ["--operations", "window_attention", "--sizes", "64", "--dtypes", "bf16", "--targets", "sm_90"]
        assert audited.main(arguments) == 1
        captured = capsys.readouterr()
        assert "over budget: _kernel of window_attention forward, sm_90, bf16, head 64: bytes 1.5, budget 1.1" in captured.err
        assert "1.50 (budget 1.1)" in captured.out

    def test_with_a_compiler_that_budgets_were_not_checked_with_it_is_reported_and_does_not_count(
        self, audited, monkeypatch, capsys
    ):
        monkeypatch.setattr(audited, "compiler_version", lambda: "4.0")
        arguments = ["--operations", "window_attention", "--sizes", "64", "--dtypes", "bf16", "--targets", "sm_90"]
        assert audited.main(arguments) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "forward, sm_90" in line and "bytes 1.5" in line]
        assert line.startswith("over budget with triton 4.0, ") and "checked with 3.6" in line
        audited.main(["--json", *arguments])
        assert json.loads(capsys.readouterr().out)["compiler_checked"] is False

    def test_json_holds_rows_and_the_environment(self, audited, capsys):
        audited.main(["--json", "--quick"])
        document = json.loads(capsys.readouterr().out)
        assert document["environment"]["torch"] and document["predictions"]["gpus"]["sm_90"]["bandwidth"] == 3.35e12
        assert {row["operation"] for row in document["rows"]} == {
            "window_attention",
            "stream_attention",
            "stream_attention_decode",
        }
        for row in document["rows"]:
            assert row["bytes"] == row["bytes_requested"] / row["least_bytes"] == 1.5
            assert row["predicted_seconds"] > 0 and row["full_attention_predicted_seconds"] > 0

    def test_predictions_are_rooflines_of_the_counts(self, load, audited):
        roofline = load("roofline")
        from smt_kernels.testing.audit import Key

        (row,) = audited.audit([Key("stream_attention", "forward", 64, "bf16", "sm_90")], 1)
        calls, share = 8 * 4096 * 12, (row.kernels[0].occupancy / 0.5) ** (1 / 3)
        assert 0 < share <= 1 and roofline.bandwidth_share(0.75) == 1
        assert roofline.predicted_seconds(row) == pytest.approx(calls * 150 / (share * 0.88 * 3.35e12) + 2e-6)
        pairs = 8 * 12 * 4096 * 4097 // 2
        assert roofline.full_attention_seconds(row) == pytest.approx(4 * 64 * pairs / (0.81 * 989e12) + 2e-6)
        elsewhere = dataclasses.replace(row, key=dataclasses.replace(row.key, target="gfx942"))
        assert roofline.predicted_seconds(elsewhere) is roofline.full_attention_seconds(elsewhere) is None

    def test_what_does_not_exist_is_refused(self, audited, capsys):
        with pytest.raises(SystemExit):
            audited.main(["--targets", "sm_75"])
        assert "must be some of sm_80, sm_90, sm_100, gfx942, got 'sm_75'" in capsys.readouterr().err


class TestReport:
    @pytest.fixture
    def report(self, load, monkeypatch, tmp_path, capsys):
        """Run four small parts, one of which fails and one of which takes too long."""
        run_all = load("run_all")
        codes = {
            "good": "import os; print(os.environ.get('TRITON_INTERPRET')); print(os.getcwd())",
            "bad": "print('what went wrong'); raise SystemExit(3)",
            "endless": "import time; time.sleep(60)",
            "table": "print('| a | b |'); print('after')",
        }
        made_up = [run_all.Part(name, ("-c", code), 30.0 if name != "endless" else 0.5) for name, code in codes.items()]
        monkeypatch.setattr(run_all, "parts", lambda *arguments: made_up)
        monkeypatch.setattr(run_all.torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        status = run_all.main(["--out", str(tmp_path / "report")])
        return status, tmp_path / "report", capsys.readouterr()

    def test_the_parts_after_a_failing_one_run_and_the_end_names_it(self, report):
        status, out, captured = report
        assert status == 1 and "not passed: bad (failed), endless (timed out)" in captured.err
        outcomes = {part["name"]: part["outcome"] for part in json.loads((out / "report.json").read_text())["parts"]}
        assert outcomes == {"good": "passed", "bad": "failed", "endless": "timed out", "table": "passed"}

    def test_the_report_holds_every_output_and_says_that_there_was_no_gpu(self, report):
        _, out, _ = report
        text = (out / "REPORT.md").read_text()
        assert "No CUDA device" in text and "what went wrong" in text and "\n| a | b |\n" in text
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text

    def test_whether_kernels_are_interpreted_is_left_to_the_tests(self, report):
        """A part does not inherit the choice of this process; ``tests/conftest.py`` makes it anew."""
        _, out, _ = report
        assert (out / "good.log").read_text().startswith("None\n")

    def test_tests_run_natively_and_counts_interpreted_where_there_is_a_gpu(self, load, tmp_path):
        run_all = load("run_all")
        native = {part.name: part for part in run_all.parts(tmp_path, True, False)}
        assert not native["tests"].interpreted and native["tests of what kernels read and write"].interpreted
        assert {"audit", "operations", "bench_window, bf16", "bench_window, fp32"} <= native.keys()
        assert "tests of what kernels read and write" not in [part.name for part in run_all.parts(tmp_path, False, False)]
        scripts = [argument for part in native.values() for argument in part.arguments if argument.endswith(".py")]
        assert scripts and all((ROOT / script).is_file() for script in scripts)
