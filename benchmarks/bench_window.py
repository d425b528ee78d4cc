"""What the window is worth: attention alone and whole training steps, against full causal attention, measured side by side.

    python benchmarks/bench_window.py --quick
    python benchmarks/bench_window.py --full --json window.json --plot window.png

On a CUDA device, without options, it is ``benchmarks/bench_card.py`` that measures: bf16, GPT-2 small's sizes, compiled models.

Each ratio stands beside the ratio of multiply-adds (the limit, if both sides do theirs at one rate) and beside the published
claim, which counts a whole sequence of full attention against one step of the window (``python benchmarks/claims.py``). Nothing
is printed as measured that was not timed here; a case that would take longer than ``--max-seconds`` says so. No table is
printed if an implementation that is timed disagrees with the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import bench_card
import torch
from attention_cases import AttentionSizes, attention_cases, flex_obstacle, triton_obstacle
from claims import PUBLISHED_SPEEDUP
from correctness import LENGTH, WrongResult, check_attention, check_models
from measure import Case, Row, Unavailable, measure
from report import draw, print_header, print_machine, print_rows, write_csv, write_json
from training_cases import training_cases

from smt import SMTConfig
from smt.runtime.environment import environment
from smt.runtime.process import keep_freed_memory, restart_with_threads, use_huge_pages
from smt_kernels import WindowSpec

ATTENTION_LENGTHS = [512 * 2**i for i in range(8)]
TRAINING_LENGTHS = [512 * 2**i for i in range(5)]
# Of the lengths, repeats and seconds: what ends within ten minutes on two cores, a minute, and whenever.
DEFAULT, QUICK, FULL = (6, 3, 7, 20.0), (4, 2, 3, 3.0), (8, 5, 15, 120.0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# That takes the training steps.
MODEL = {"vocab_size": 4096, "d_model": 256, "transformer_n_layers": 4, "transformer_n_heads": 4, "ssm_n_layers": 4}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=_lengths, help="attention alone, comma-separated; default 512,1024,...,16384")
    parser.add_argument("--training-lengths", type=_lengths, help="training steps; default 512,1024,2048")
    parser.add_argument("--sections", choices=("attention", "training", "both"), default="both", help="what to measure")
    parser.add_argument("--heads", type=_positive, default=12, help="heads of attention alone")
    parser.add_argument("--head-dim", type=_positive, default=64, help="their size")
    parser.add_argument("--batch", type=_positive, default=1, help="sequences")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of attention alone; training steps are fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=_positive, help="CPU threads (OMP_NUM_THREADS); default: PyTorch's")
    parser.add_argument("--max-seconds", type=float, help="for all calls of one measurement; default 20, full 120, quick 3")
    parser.add_argument("--repeats", type=_positive, help="calls of one measurement at most; default 7, full 15, quick 3")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="short lengths, no FlexAttention; about a minute on 2 cores")
    extent.add_argument("--full", action="store_true", help="attention up to 65,536 tokens, training up to 8,192")
    parser.add_argument("--json", type=Path, help="write rows, settings and environment")
    parser.add_argument("--csv", type=Path, help="the same as CSV")
    parser.add_argument("--plot", type=Path, help="draw the rows (PNG, PDF or SVG)")
    options = parser.parse_args(arguments)
    n_attention, n_training, repeats, seconds = QUICK if options.quick else FULL if options.full else DEFAULT
    options.lengths = options.lengths or ATTENTION_LENGTHS[:n_attention]
    options.training_lengths = options.training_lengths or TRAINING_LENGTHS[:n_training]
    options.max_seconds = options.max_seconds or seconds
    options.repeats = options.repeats or repeats
    for path in (options.json, options.csv, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"the folder of {path} does not exist")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 if an implementation disagrees with the reference."""
    if torch.cuda.is_available() and not (sys.argv[1:] if arguments is None else arguments):
        return bench_card.main([])
    options = parse(arguments)
    if options.threads:
        restart_with_threads(options.threads)
    use_huge_pages()
    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device(options.device)
    described = environment(device)
    print_machine(described)
    sizes = AttentionSizes(options.batch, options.heads, options.head_dim, DTYPES[options.dtype], device, WindowSpec())
    config = SMTConfig(**MODEL, dropout=0.0)
    attention, training = options.sections != "training", options.sections != "attention"
    try:
        _check(sizes, config, attention, training, with_flex=not options.quick)
    except WrongResult as error:
        print(f"\nNo speed-ups are printed, because a result differs from the reference:\n{error}", file=sys.stderr)
        return 1

    rows: list[Row] = []
    if attention:
        what = f"attention, {options.heads} heads of {options.head_dim}, batch {options.batch}, {options.dtype}"
        for backward, task in ((False, f"Forward: {what}"), (True, f"Forward and backward: {what}")):
            cases = attention_cases(sizes, backward=backward, with_flex=not options.quick)
            rows += _table(task, cases, options.lengths, options, device, published=f"{PUBLISHED_SPEEDUP:,}x")
    if training:
        task = (
            f"Training step (forward, loss, backward): d {config.d_model}, {config.transformer_n_layers} layers "
            f"+ {config.ssm_n_layers} Mamba, batch {options.batch}, fp32"
        )
        cases = training_cases(config, options.training_lengths, options.batch, device)
        rows += _table(task, cases, options.training_lengths, options, device)
    print("FLOP limit: the ratio of multiply-adds, which is the speed-up if both sides did theirs at one rate")
    if attention:
        print(f"published: {PUBLISHED_SPEEDUP:,}x fewer FLOPs than full attention at 4,096; benchmarks/claims.py recounts it")

    settings = {
        name: getattr(options, name) for name in ("batch", "heads", "head_dim", "dtype", "max_seconds", "repeats", "quick")
    }
    settings["model"] = config.to_dict()
    if options.json:
        write_json(options.json, described, settings, rows)
    if options.csv:
        write_csv(options.csv, described, settings, rows)
    if options.plot:
        draw(options.plot, described, rows, (PUBLISHED_SPEEDUP, f"published claim, {PUBLISHED_SPEEDUP:,}x"))
    return 0


def _check(sizes: AttentionSizes, config: SMTConfig, attention: bool, training: bool, *, with_flex: bool) -> None:
    if attention:
        check_attention(sizes, "blocked")
        if triton_obstacle(sizes)(LENGTH) is None:
            check_attention(sizes, "triton")
        for backward in (False, True):
            if flex_obstacle(sizes, backward, with_flex)(LENGTH) is None:
                with contextlib.suppress(Unavailable):  # its row will say why
                    check_attention(sizes, "flex", backward=backward)
    if training:
        check_models(config, sizes.device)


def _table(
    task: str,
    cases: list[Case],
    lengths: list[int],
    options: argparse.Namespace,
    device: torch.device,
    published: str = "",
) -> list[Row]:
    width = max(len(case.name) for case in cases)
    print_header(task, cases[0].name, width, published)
    rows = []
    limits = {"max_seconds": options.max_seconds, "max_repeats": options.repeats}
    for of_length in measure(task, cases, lengths, batch=options.batch, device=device, **limits):
        print_rows(of_length, width, published)
        rows += of_length
    return rows


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _lengths(text: str) -> list[int]:
    return sorted(_positive(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
