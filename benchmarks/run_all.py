"""Every correctness test and every benchmark of this checkout, and one report: the command for a machine with a GPU.

    python benchmarks/run_all.py --minutes 6 --out results/gpu
    python benchmarks/run_all.py --out results/gpu

With ``--minutes``, on a GPU: the smoke tests of every kernel and then ``bench_card.py``, as far as time goes. Else everything.
Writes REPORT.md, report.json and the full output of every part into the folder. Without a CUDA device it says so, in the report
too, and the kernels are interpreted; with one, tests and benchmarks run them natively. A part that fails or takes longer than
its limit is named at the end and makes the exit status 1; the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from smt.runtime.environment import environment

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = Path(__file__).resolve().parent
TAIL_LINES = 60  # of a part's output, in the report


@dataclass(frozen=True)
class Part:
    """One command: a name, its arguments after ``python``, seconds it may take, and where its output belongs.

    ``interpreted`` runs kernels in the interpreter on a machine with a GPU too; without a GPU the tests do so of themselves.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    interpreted: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a part ended: ``passed``, ``failed`` or ``timed out``, with its output in ``log`` inside the folder."""

    name: str
    command: str
    outcome: str
    seconds: float
    log: str


def card_parts(out: Path, minutes: float) -> list[Part]:
    """What is run on a GPU in a few minutes: the smoke tests, at most a third of the time, and the figures that matter."""
    workers = str(max(2, min(14, (os.cpu_count() or 2) - 2)))
    smoke = ("-m", "pytest", "tests/kernels", "tests/smt/model", "tests/smt/hymba", "-m", "native", "-n", workers)
    files = ("--json", str(out / "card.json"), "--markdown", str(out / "card.md"))
    return [
        Part("smoke tests", smoke, 20 * minutes),
        Part("bench_card", (_script("bench_card.py"), "--minutes", f"{minutes * 0.6:g}", *files), 40 * minutes),
    ]


def parts(out: Path, cuda: bool, quick: bool) -> list[Part]:
    """What is run, in order: correctness first, so that a time is never read without it."""
    minutes = 60.0
    tests = ("-m", "pytest", "tests")
    found = [Part("tests", tests, 40 * minutes)]
    if cuda:
        found.append(
            Part("tests of what kernels read and write", (*tests, "-m", "interpreter"), 20 * minutes, interpreted=True)
        )
    audit = ("--quick",) if quick else ("--sizes", "64,128,256,512,768,1536", "--dtypes", "bf16")
    found.append(Part("audit", (_script("audit_kernels.py"), "--markdown", *audit), 30 * minutes))
    if cuda:
        files = ("--json", str(out / "card.json"), "--markdown", str(out / "card.md"))
        found.append(Part("bench_card", (_script("bench_card.py"), "--minutes", "15", *files), 20 * minutes))
    flags = ("--quick",) if quick else ()
    dtypes = ("bf16", "fp32") if cuda else ("fp32",)
    for dtype in dtypes:
        files = [part for form in ("json", "csv", "png") for part in (_flag(form), str(out / f"bench_window_{dtype}.{form}"))]
        sections = () if dtype == "fp32" else ("--sections", "attention")  # training steps are in fp32
        arguments = (_script("bench_window.py"), "--dtype", dtype, *sections, *flags, *files)
        found.append(Part(f"bench_window, {dtype}", arguments, 30 * minutes))
    decode = (_script("bench_decode.py"), *flags, "--json", str(out / "bench_decode.json"))
    found.append(Part("bench_decode", decode, 20 * minutes))
    rows = f"--benchmark-json={out / 'operations.json'}"
    found.append(Part("operations", ("-m", "pytest", "benchmarks", rows), 20 * minutes))
    found.append(Part("claims", (_script("claims.py"),), 5 * minutes))
    return found


def run(part: Part, out: Path, limit: float | None = None) -> Outcome:
    """Run one part, its output into a file of its own; ``limit`` in place of the part's, if it is shorter."""
    log = "".join(letter if letter.isalnum() else "_" for letter in part.name) + ".log"
    limit = part.limit if limit is None else min(limit, part.limit)
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The scripts find the packages of this checkout, installed or not.
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), variables.get("PYTHONPATH"))))
    variables |= {"TRITON_INTERPRET": "1"} if part.interpreted else {}
    start, outcome = time.monotonic(), "timed out"
    with (out / log).open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix",
        )  # fmt: skip
        try:
            outcome = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            _end(process)
    (out / log).write_text(_public((out / log).read_text(encoding="utf-8", errors="replace"), out), encoding="utf-8")
    return Outcome(part.name, _public(" ".join(("python", *part.arguments)), out), outcome, time.monotonic() - start, log)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, write the report; 1 if one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/run_all"), help="folder of the report, made if need be")
    parser.add_argument("--quick", action="store_true", help="short lengths, and the audit of one target")
    parser.add_argument("--minutes", type=float, help="on a GPU: the smoke tests and bench_card.py in these minutes")
    parser.add_argument("--only", help="comma-separated beginnings of the names of parts to run")
    parser.add_argument("--max-seconds", type=float, help="for each part, where its own limit is longer")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    described = environment(torch.device("cuda" if cuda else "cpu"))
    if options.minutes is not None and not cuda:
        parser.error("--minutes is for a GPU, and there is none here")
    chosen = card_parts(out, options.minutes) if options.minutes is not None else parts(out, cuda, options.quick)
    if options.only:
        chosen = [part for part in chosen if part.name.startswith(tuple(options.only.split(",")))]
        if not chosen:
            parser.error(f"--only must begin the name of a part, got {options.only!r}")
    print(_device_line(cuda, described))
    outcomes = []
    for part in chosen:
        print(f"{part.name} ...", end=" ", flush=True)
        outcomes.append(run(part, out, options.max_seconds))
        print(f"{outcomes[-1].outcome}, {outcomes[-1].seconds:.0f} s", flush=True)
        _write(out, described, cuda, outcomes)  # after each, so that an interrupted run leaves its report
    print(f"report: {options.out / 'REPORT.md'}")
    wrong = [f"{outcome.name} ({outcome.outcome})" for outcome in outcomes if outcome.outcome != "passed"]
    if wrong:
        print(f"not passed: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _device_line(cuda: bool, described: dict) -> str:
    if cuda:
        return f"CUDA device: {described['device']}; kernels run natively."
    return "No CUDA device: kernels run in Triton's interpreter, whose times say nothing; no figure here is of a GPU."


def _write(out: Path, described: dict, cuda: bool, outcomes: list[Outcome]) -> None:
    """REPORT.md and report.json: the environment, how every part ended, and the last lines of each output."""
    document = {"environment": described, "cuda": cuda, "parts": [asdict(outcome) for outcome in outcomes]}
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = ["# Tests and benchmarks", "", _device_line(cuda, described), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in described.items()]
    lines += ["", "| part | outcome | seconds | output |", "|---|---|---|---|"]
    lines += [f"| {part.name} | {part.outcome} | {part.seconds:.0f} | [{part.log}]({part.log}) |" for part in outcomes]
    for part in outcomes:
        output = (out / part.log).read_text(encoding="utf-8").rstrip().splitlines()
        lines += ["", f"## {part.name}: {part.outcome}", "", f"`{part.command}`", ""]
        if any(line.startswith("|") for line in output):
            # A Markdown table stands as it is, without what was printed on the way.
            lines += [line for line in output if line.startswith("|")]
            output = output[output.index(next(line for line in reversed(output) if line.startswith("|"))) + 1 :]
        if len(output) > TAIL_LINES:
            lines += [f"The last {TAIL_LINES} lines:", ""]
        lines += ["", "```", *output[-TAIL_LINES:], "```"]
    (out / "REPORT.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _public(text: str, out: Path) -> str:
    """The text without the folders of this machine, fit to be published."""
    for folder in (out, ROOT):
        text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), ".")
    return text.replace(str(Path.home()), "~")


def _script(name: str) -> str:
    return str((BENCHMARKS / name).relative_to(ROOT))


def _flag(form: str) -> str:
    return "--plot" if form == "png" else f"--{form}"


def _end(process: subprocess.Popen) -> None:
    """End a part and the processes that it started."""
    if os.name == "posix":
        os.killpg(process.pid, 9)
    else:
        process.kill()
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
