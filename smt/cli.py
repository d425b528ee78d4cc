"""The command line: ``smt train``, ``smt eval``, ``smt generate`` and ``smt convert``.

Errors are one line on standard error, with a traceback only under ``--debug``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.fields import kind_of, nearest

if TYPE_CHECKING:
    from smt.training.run import Outcome

EXAMPLES = """examples:
  smt train                                    the standard library's source, in less than 5 minutes on 2 cores
  smt train --minutes 30 --d_model 256         longer, and wider
  smt train --steps 500                        bounded by steps, hence repeatable
  smt train --stride 10 --encoding token       any field of the model, the data or the training
  smt train --text my_novels/ --experiment novels
  smt train --config shakespeare               whole plays; wikitext2, wikitext103 and pg19 likewise
  smt train --config wikitext2 --dataset my_copy/ --tokenizer gpt2_files/
  smt train --config my_run.yaml --out runs
  smt eval results/stdlib/20260101_120000      everything that smt eval measures, on the run's held-out documents
  smt eval RUN --tasks perplexity,position --data pg19 --hf openai-community/gpt2
  smt eval RUN --data recall --tasks recall --trials 16
  smt generate --model results/stdlib/20260131_120000 --prompt "def main(" --greedy
  smt generate --model start --file prompts.txt --batch > continuations.jsonl
  smt convert --gpt2 openai-community/gpt2 --mamba state-spaces/mamba-130m-hf --out start
  smt train --config start/config.yaml --init_from checkpoint=start --learning_rates transformer=5e-6,ssm=5e-6
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit code: 0, 1 after an error, 2 without a command, 130 after Ctrl-C.
    """
    started = time.perf_counter()
    # PyTorch's threads spin while they wait for each other. Beside any other busy process that makes a run on two cores two to
    # six times slower; sleeping instead costs little on an idle machine. Read once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser, commands = _parsers()
    options, unknown = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        if unknown:
            raise ValueError(_unknown(unknown[0], commands[options.command]))
        return _COMMANDS[options.command](options, started)
    except KeyboardInterrupt:
        print("smt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        message = str(error) or type(error).__name__
        print(f"smt: error: {message}", file=sys.stderr)
        return 1


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    from smt.training.settings import PARTS

    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser(prog="smt", description="Train and evaluate Stride Memory Transformers.", **style)
    commands = parser.add_subparsers(dest="command", metavar="command")
    train = commands.add_parser(
        "train",
        help="train a model on text, evaluate it on held-out documents, and leave the run in a folder",
        description="Train a model on text, evaluate it on held-out documents, and leave the run in a folder.",
        **style,
    )
    train.add_argument("--config", default="stdlib", help="YAML file, or the name of a packaged example (default: stdlib)")
    train.add_argument("--out", default="results", help="folder for runs (default: results)")
    train.add_argument("--experiment", help="name of the run's folder in it (default: that of the configuration)")
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for part, settings in PARTS.items():
        group = train.add_argument_group(f"{part} (replaces the field of the configuration)")
        for field in fields(settings):
            names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
            group.add_argument(*names, dest=f"field_{field.name}", metavar=_metavar(kind_of(settings, field.name)))
    return parser, {
        "train": train,
        "eval": _eval_parser(commands, style),
        "generate": _generate_parser(commands, style),
        "convert": _convert_parser(commands, style),
    }


def _eval_parser(commands: Any, style: dict[str, Any]) -> argparse.ArgumentParser:
    about = "measure a trained model: perplexity, loss by position, recall, and what its memory is worth"
    parser = commands.add_parser("eval", help=about, description=f"{about[0].upper()}{about[1:]}.", **style)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder that smt train or smt convert left")
    parser.add_argument("--hf", metavar="NAME", help="a causal language model of Hugging Face, alone or to compare with")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="that --hf sees at most (default: all that it takes)")
    parser.add_argument("--data", metavar="SOURCE", help="a file, a folder or a source (default: that of the run)")
    parser.add_argument("--tasks", metavar="NAME,...", help="perplexity,position,needle,recall,ablation,pooling (default: all)")
    parser.add_argument("--documents", type=int, metavar="N", help="the first N held-out documents (default: all)")
    parser.add_argument("--trials", type=int, default=8, metavar="N", help="needles per cell of the grid (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the needles (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="for evaluation.json and plots (default: the run's folder)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _generate_parser(commands: Any, style: dict[str, Any]) -> argparse.ArgumentParser:
    about = "continue a prompt, writing text as it is drawn, or many prompts in batches"
    parser = commands.add_parser("generate", help=about, description=f"{about[0].upper()}{about[1:]}.", **style)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the folder of a run or a checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument("--file", metavar="PATH", help="a file to continue, as it is; - is standard input")
    parser.add_argument("--batch", action="store_true", help="each line of the file is a prompt; JSON lines are written")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts that run together (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to draw at most (default: 200)")
    parser.add_argument("--temperature", type=float, metavar="T", help="divides the logits; 0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the k likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="draw from that much probability (default: 0.95)"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default: 42)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _convert_parser(commands: Any, style: dict[str, Any]) -> argparse.ArgumentParser:
    about = "put a pretrained GPT-2, a Mamba or both into one model, and write it as a checkpoint"
    parser = commands.add_parser("convert", help=about, description=f"{about[0].upper()}{about[1:]}.", **style)
    parser.add_argument("--gpt2", metavar="SOURCE", help="folder or hub name of a GPT-2, for decoder and embedding")
    parser.add_argument("--mamba", metavar="SOURCE", help="folder or hub name of a Mamba-1, for the memory")
    parser.add_argument("--config", metavar="YAML", help="the model's configuration (default: the sources' sizes)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the checkpoint; new or empty")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field of the model")
    parser.add_argument("--embedding", metavar="WHOSE", help="gpt2, mamba or none (default: of the first source)")
    parser.add_argument("--match-scale", action="store_true", help="give the memory's output the scale of the embedding")
    parser.add_argument("--first-layers", action="store_true", help="of a deeper source, take the first layers")
    parser.add_argument("--seed", type=int, default=42, help="of what stays fresh (default: 42)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _eval(options: argparse.Namespace, started: float) -> int:
    if options.run is None and options.hf is None:
        raise ValueError("smt eval needs a run's folder or --hf NAME")
    out = options.out or options.run
    if out is None:
        raise ValueError("smt eval --hf needs --out FOLDER for its files")
    from smt.device import find_device
    from smt.evaluation.run import EvaluationConfig, data_named, evaluate_subjects
    from smt.evaluation.subjects import data_of_run, open_causal_lm, open_run

    tasks = {} if options.tasks is None else {"tasks": tuple(filter(None, options.tasks.split(",")))}
    config = EvaluationConfig(documents=options.documents, trials=options.trials, seed=options.seed, **tasks)
    device = find_device(options.device)
    subjects = [] if options.run is None else [open_run(options.run, device)]
    data = data_named(options.data) if options.data else data_of_run(options.run) if options.run else None
    if data is None:
        raise ValueError("smt eval needs --data: the model does not say what it was trained on")
    if options.hf is not None:
        subjects.append(open_causal_lm(options.hf, device, options.context))
    report = evaluate_subjects(subjects, data, config, out)
    print(report.table())
    for note in report.notes:
        print(f"note: {note}")
    print(f"\nfiles           {', '.join(str(path) for path in report.files)}")
    return 0


def _train(options: argparse.Namespace, started: float) -> int:
    given = {name.removeprefix("field_"): value for name, value in vars(options).items() if name.startswith("field_")}
    overrides = {name: value for name, value in given.items() if value is not None}
    if options.experiment is not None:
        overrides["experiment"] = options.experiment
    from smt.training.run import run
    from smt.training.settings import RunConfig

    config = RunConfig.from_yaml(options.config, overrides)
    _report(run(config, options.out, started=started))
    return 0


def _generate(options: argparse.Namespace, started: float) -> int:
    if options.greedy and options.temperature:
        raise ValueError(
            f"--greedy takes the likeliest token, --temperature {options.temperature:g} does not: give one of them"
        )
    if options.batch and options.file is None:
        raise ValueError("--batch needs --file, with a prompt on each line")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    text = options.prompt if options.file is None else _read(options.file)
    temperature = 0.0 if options.greedy else 0.8 if options.temperature is None else options.temperature

    from smt.continuation import Continuer, Sampling
    from smt.device import find_device

    sampling = Sampling(options.max_new_tokens, temperature, options.top_k, options.top_p, options.seed)
    continuer = Continuer.from_folder(options.model, sampling, find_device(options.device))
    if not options.batch:
        for piece in continuer.stream(text):
            print(_printable(piece), end="", flush=True)
        print()
        return 0
    prompts = text.splitlines()
    for start in range(0, len(prompts), options.batch_size):
        together = prompts[start : start + options.batch_size]
        for prompt, continuation in zip(together, continuer.batch(together), strict=True):
            print(json.dumps({"prompt": prompt, "continuation": continuation}), flush=True)
    return 0


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _convert(options: argparse.Namespace, started: float) -> int:
    from smt.conversion import convert

    for setting in options.set:
        if "=" not in setting:
            raise ValueError(f"--set takes FIELD=VALUE, got {setting!r}")
    config, report = convert(
        options.out,
        gpt2=options.gpt2,
        mamba=options.mamba,
        config=options.config,
        fields=dict(setting.split("=", 1) for setting in options.set),
        embedding=options.embedding,
        match_scale=options.match_scale,
        first_layers=options.first_layers,
        seed=options.seed,
    )
    print(f"{config.summary()}\n\n{report}\n\nfiles           {options.out}")
    return 0


_COMMANDS = {"train": _train, "eval": _eval, "generate": _generate, "convert": _convert}


def _metavar(kind: str) -> str:
    if kind.startswith("dict"):
        return "NAME=VALUE,..."
    return "NAME,..." if kind.startswith("tuple") else kind.replace(" | None", "").upper()


def _report(outcome: Outcome) -> None:
    prompt, continuation = outcome.sample
    if continuation:
        print("\nsample: the beginning of a held-out document, and after >>> how the model goes on")
        print(_printable(_indented(f"{prompt}>>>{continuation}")))
    evaluation, progress = outcome.evaluation, outcome.progress
    bound = outcome.config.data.eval_documents
    documents = "documents whole" if bound is None else f"the first {bound} documents at most, whole"
    print(
        f"\nheld-out text   {evaluation.n_targets:,} tokens, {evaluation.n_bytes:,} bytes, {documents}, memory carried\n"
        f"validation loss {evaluation.loss:.4f} nats per token\n"
        f"perplexity      {evaluation.perplexity:.2f}\n"
        f"bits per byte   {evaluation.bits_per_byte:.3f}\n"
        f"training        {progress.n_tokens:,} tokens in {progress.step:,} steps, {progress.padding:.1%} padding\n"
        f"speed           {progress.tokens_per_second:,.0f} tokens/s\n"
        f"total time      {outcome.results['seconds']:.0f} s\n"
        f"files           {outcome.folder}"
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _printable(text: str) -> str:
    """The text as standard output can show it: a sample may hold any character, a terminal need not."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; settings are given as --name value"
    return f"there is no option {argument!r}; did you mean {nearest(argument.split('=')[0], known)!r}?"
