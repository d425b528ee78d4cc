"""What a token costs after a long past: prefill and decoding in three encodings, beside a GPT-2 with a KV cache and a Mamba.

    python benchmarks/bench_decode.py --quick
    python benchmarks/bench_decode.py --batches 1,8 --json decode.json --plot decode.png

A call decodes one stride of tokens, write included; its time divided by the tokens is what is shown. GPT-2's caches are filled
with random keys and values, and beyond ``--max-prefill`` tokens our state, which has one size at any step, is moved on to the
context: each such row says so. No table is printed if decoding disagrees with the forward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from correctness import WrongResult, check_decoding
from decode_cases import ENCODINGS, DecodeCases
from measure import Case, Row, measure, time_in_turns
from report import draw_decoding, print_machine, write_json

from smt import SMTConfig
from smt.runtime.environment import environment
from smt.runtime.process import keep_freed_memory, restart_with_threads, use_huge_pages

SECTIONS = ("prefill", "decode", "constancy", "all")
CONTEXTS = [256 * 8**i for i in range(4)]


@dataclass(frozen=True)
class DecodeRow(Row):
    """A row whose ``seconds_per_token`` is the time of one decoding step of all sequences; in prefill, of one of their tokens.

    Attributes:
        tokens: tokens per sequence and call.
        state_bytes: what is carried at this context, of all sequences.
        remark: how the context was come to, where it was not read.
    """

    tokens: int = 0
    state_bytes: int | None = None
    remark: str | None = None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=_numbers, help="comma-separated; default 256,2048,16384,131072")
    parser.add_argument("--batches", type=_numbers, help="sequences, comma-separated; default 1,8, quick 1")
    parser.add_argument("--sections", choices=SECTIONS, default="all", help="what to measure")
    parser.add_argument("--max-prefill", type=_number, help="tokens read to come to a context; default 2048, quick 512")
    parser.add_argument(
        "--max-gib", type=float, default=2.0, help="largest KV cache that is built; decoding takes about four times as much"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=_number, help="CPU threads (OMP_NUM_THREADS); default: PyTorch's")
    parser.add_argument("--max-seconds", type=float, help="for all calls of one measurement; default 20, quick 2")
    parser.add_argument("--repeats", type=_number, help="calls of one measurement at most; default 9, quick 3")
    parser.add_argument("--d-model", type=_number, default=256, help="width, a multiple of 64; heads are of 64")
    parser.add_argument("--layers", type=_number, default=4, help="layers of the decoder, and of the memory's Mamba")
    parser.add_argument("--vocab-size", type=_number, default=4096)
    parser.add_argument("--quick", action="store_true", help="one batch size, short prefill; about a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write rows, settings and environment")
    parser.add_argument("--plot", type=Path, help="draw the rows of decoding (PNG, PDF or SVG)")
    options = parser.parse_args(arguments)
    options.contexts = options.contexts or CONTEXTS
    options.batches = options.batches or ([1] if options.quick else [1, 8])
    options.max_prefill = options.max_prefill or (512 if options.quick else 2048)
    options.max_seconds = options.max_seconds or (2.0 if options.quick else 20.0)
    options.repeats = options.repeats or (3 if options.quick else 9)
    for path in (options.json, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"the folder of {path} does not exist")
    if options.d_model % 64:
        parser.error(f"--d-model must be a multiple of 64, got {options.d_model}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 if decoding disagrees with the forward pass."""
    options = parse(arguments)
    if options.threads:
        restart_with_threads(options.threads)
    use_huge_pages()
    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device(options.device)
    described = environment(device)
    print_machine(described)
    config = SMTConfig(
        vocab_size=options.vocab_size,
        d_model=options.d_model,
        dropout=0.0,
        transformer_n_layers=options.layers,
        transformer_n_heads=options.d_model // 64,
        ssm_n_layers=options.layers,
    )
    try:
        check_decoding(config, ENCODINGS, device)
    except WrongResult as error:
        print(f"\nNo times are printed, because a result differs from the forward pass:\n{error}", file=sys.stderr)
        return 1

    names = ("contexts", "batches", "max_prefill", "max_gib", "max_seconds", "repeats", "quick")
    settings = {name: getattr(options, name) for name in names} | {"model": config.to_dict()}
    rows: list[DecodeRow] = []
    for batch in options.batches:
        cases = DecodeCases(
            config,
            batch,
            max(options.contexts),
            max_prefill=options.max_prefill,
            max_bytes=options.max_gib * 2**30,
            device=device,
        )
        sizes = f"d {config.d_model}, {options.layers} + {options.layers} layers, batch {batch}, fp32"
        if options.sections in ("prefill", "all"):
            rows += _table(f"Prefill: {sizes}", cases.prefill(), cases, batch, None, options, device)
        if options.sections in ("decode", "all"):
            rows += _table(f"Decoding: {sizes}", cases.decoding(), cases, batch, config.stride, options, device)
        if options.sections in ("constancy", "all"):
            rows += _constancy(f"Constancy: {sizes}", cases, batch, options, device)
        if options.json:  # what is there is kept if a larger batch does not fit
            write_json(options.json, described, settings, rows)
    if options.plot:
        draw_decoding(options.plot, described, [row for row in rows if row.task.startswith("Decoding")])
    return 0


def _table(
    task: str,
    cases: list[Case],
    made: DecodeCases,
    batch: int,
    tokens: int | None,
    options: argparse.Namespace,
    device: torch.device,
) -> list[DecodeRow]:
    """Measure and print one table; ``tokens`` per call, None: as many as the context has."""
    decoding = tokens is not None
    print(f"\n{task}; ratio = time of {cases[0].name} / time of the case, n = calls timed in turns")
    print(f"{'context':>9}  {'case':<24}{'per token':>11}{'tokens/s':>11}{'n':>4}{'ratio':>8}{'state':>11}")
    rows = []
    limits = {"max_seconds": options.max_seconds, "max_repeats": options.repeats}
    for of_context in measure(task, cases, options.contexts, batch=batch, device=device, **limits):
        for row in of_context:
            known = made.made.get((row.case, row.length)) if decoding else None
            per_call = tokens or row.length
            seconds = None if row.seconds is None else row.seconds / per_call / (1 if decoding else batch)
            extra = {} if known is None else {"state_bytes": known.state_bytes, "remark": known.remark}
            fields = dataclasses.asdict(row) | {"seconds_per_token": seconds, "tokens": per_call} | extra
            rows.append(DecodeRow(**fields))
            print(_line(rows[-1]))
        print(flush=True)
    return rows


def _constancy(task: str, made: DecodeCases, batch: int, options: argparse.Namespace, device: torch.device) -> list[DecodeRow]:
    """Time our encodings at all contexts in turns: calls that follow each other see the machine in one state."""
    print(f"\n{task}; all contexts in turns, change = time / time at {options.contexts[0]:,}")
    print(f"{'':>9}  {'case':<24}" + "".join(f"{context:>19,}" for context in options.contexts))
    rows, tokens = [], made.config.stride
    for case in made.ours():
        calls = {str(context): case.prepare(context) for context in options.contexts}
        samples = time_in_turns(calls, options.max_seconds, options.repeats, device)
        shortest, cells = samples[str(options.contexts[0])].median, []
        for context in options.contexts:
            timed, known = samples[str(context)], made.made[case.name, context]
            rows.append(
                DecodeRow(
                    task,
                    case.name,
                    context,
                    batch,
                    seconds=timed.median,
                    fastest=min(timed.seconds),
                    slowest=max(timed.seconds),
                    repeats=len(timed.seconds),
                    seconds_per_token=timed.median / tokens,
                    ratio=shortest / timed.median,
                    tokens=tokens,
                    state_bytes=known.state_bytes,
                    remark=known.remark,
                )
            )
            cells.append(f"{timed.median / tokens * 1e3:.3f} ms {timed.median / shortest - 1:+.0%}")
        print(f"{'':>9}  {case.name:<24}" + "".join(f"{cell:>19}" for cell in cells), flush=True)
    return rows


def _line(row: DecodeRow) -> str:
    start = f"{row.length:>9,}  {row.case:<24}"
    if row.not_measured is not None:
        return f"{start}  -- {row.not_measured}"
    rate = row.batch * row.tokens / row.seconds
    state = "" if row.state_bytes is None else f"{row.state_bytes / 2**20:,.2f} MiB"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    line = f"{start}{row.seconds_per_token * 1e3:>8.3f} ms{rate:>11,.0f}{row.repeats:>4}{ratio:>8}{state:>11}"
    return line if row.remark is None else f"{line}  {row.remark}"


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
