"""``smt generate``: text that goes on where a prompt ends."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from smt.cli.parser import add_device, text

EXAMPLES = """\
  smt generate --model results/stdlib/20260131_120000 --prompt "def main(" --greedy
  smt generate --model start --file draft.txt --temperature 1 --top_k 50
  smt generate --model start --file prompts.txt --batch > continuations.jsonl"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt generate``."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the folder of a run or a checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=text, metavar="TEXT", help="the text to continue")
    source.add_argument("--file", metavar="PATH", help="a file to continue, as it is; - is standard input")
    parser.add_argument(
        "--batch", action="store_true", help="each line of the file is a prompt, up to its line feed; JSON lines are written"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts that run together (default: 8)")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="tokens to draw at most (default: 200)")
    parser.add_argument("--temperature", type=float, metavar="T", help="divides the logits; 0 is greedy (default: 0.8)")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the k likeliest tokens (default: all)")
    parser.add_argument(
        "--top_p", type=float, default=0.95, metavar="P", help="draw from that much probability (default: 0.95)"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default: 42)")
    add_device(parser)


def run(options: argparse.Namespace, started: float) -> int:
    """Write the continuation as it is drawn, or a JSON line for each prompt."""
    if options.greedy and options.temperature:
        raise ValueError(
            f"--greedy takes the likeliest token, --temperature {options.temperature:g} does not: give one of them"
        )
    if options.batch and options.file is None:
        raise ValueError("--batch needs --file, with a prompt on each line")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {options.batch_size}")
    temperature = 0.0 if options.greedy else 0.8 if options.temperature is None else options.temperature

    from smt.cli.continuation import Continuer, Sampling
    from smt.runtime.device import find_device

    sampling = Sampling(options.max_new_tokens, temperature, options.top_k, options.top_p, options.seed)
    given = options.prompt if options.file is None else _read(options.file)
    continuer = Continuer.from_folder(options.model, sampling, find_device(options.device))
    if not options.batch:
        for piece in continuer.stream(given):
            print(piece, end="", flush=True)
        print()
        return 0
    prompts = [line.removesuffix("\r") for line in given.removesuffix("\n").split("\n")] if given else []
    for start in range(0, len(prompts), options.batch_size):
        together = prompts[start : start + options.batch_size]
        for prompt, continuation in zip(together, continuer.batch(together), strict=True):
            print(json.dumps({"prompt": prompt, "continuation": continuation}), flush=True)
    return 0


def _read(path: str) -> str:
    """The text as it is: a carriage return is a character, a mark of byte order is none, whatever the system's encoding."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{'standard input' if path == '-' else path} is not UTF-8 text: {error}") from None
