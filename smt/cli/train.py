"""``smt train``: from text to a trained model, its evaluation and a folder with both."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from smt.cli.run_fields import USUAL_CONFIG, USUAL_GPU_CONFIG, add_run_fields, overrides, usual_config
from smt.runtime.tables import shown_perplexity

if TYPE_CHECKING:
    from smt.evaluation.preference import PairEvaluation
    from smt.training.run import Outcome

EXAMPLES = """\
  smt train                                    the standard library's source, in less than 5 minutes on 2 cores or a GPU
  smt train --minutes 30 --d_model 256         longer, and wider
  smt train --steps 500                        bounded by steps, hence repeatable
  smt train --stride 10 --encoding token       any field of the model, the data or the training
  smt train --text my_novels/                  your own text; runs are in results/my_novels
  smt train --config shakespeare               whole plays; wikitext2, wikitext103 and pg19 likewise
  smt train --config wikitext2 --dataset my_copy/ --tokenizer gpt2_files/
  smt train --config my_run.yaml --out runs
  smt train --resume results/stdlib/20260101_120000
  smt train --stage orpo --init_from checkpoint=results/stdlib/20260101_120000 --pairs pairs.jsonl
  torchrun --nproc-per-node 2 -m smt train     on two processes
  smt train --config start/config.yaml --init_from checkpoint=start --learning_rates transformer=5e-6,ssm=5e-6"""

USUAL = f"{USUAL_CONFIG}, on a GPU {USUAL_GPU_CONFIG}; orpo for that stage"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt train``."""
    parser.add_argument("--config", metavar="YAML", help=f"file, or the name of a packaged example (default: {USUAL})")
    parser.add_argument("--out", metavar="FOLDER", help="where runs are kept (default: results)")
    parser.add_argument("--experiment", metavar="NAME", help="their folder in it (default: named after the text)")
    parser.add_argument("--resume", metavar="RUN", help="continue the interrupted run in that folder, as it was started")
    add_run_fields(parser)


def run(options: argparse.Namespace, started: float) -> int:
    """Train, and print what came of it."""
    given = overrides(options)
    if options.experiment is not None:
        given["experiment"] = options.experiment
    if options.resume is not None and (given or options.config or options.out):
        raise ValueError("--resume goes on with a run as it was begun; it takes no other setting")
    from smt.training.run import resume
    from smt.training.run import run as train
    from smt.training.second_stage import SECOND_STAGE, staged

    if options.resume is not None:
        outcome = resume(options.resume, started=started)
    else:
        usual = SECOND_STAGE if given.get("stage") == SECOND_STAGE else usual_config(given)
        if options.config is None and usual != SECOND_STAGE:
            given = {**_named_after(given.get("text") or given.get("dataset") or given.get("source")), **given}
        config = staged(options.config or usual, given)
        outcome = train(config, options.out or "results", started=started)
    if outcome.is_main:
        _report(outcome, time.perf_counter() - started)
    return 0


def _named_after(text: str | None) -> dict[str, str]:
    """The experiment of a run of a text of its own: a path, a name of the hub, or that of a source."""
    name = "" if text is None else Path(text).absolute().stem
    return {"experiment": name} if name else {}


def _report(outcome: Outcome, seconds: float) -> None:
    prompt, continuation = outcome.sample
    if continuation:
        print("\nsample: the beginning of a held-out document, and after >>> how the model goes on")
        print(_indented(f"{prompt}>>>{continuation}"))
    evaluation, progress = outcome.evaluation, outcome.progress
    bound = outcome.config.data.eval_documents
    documents = "documents whole" if bound is None else f"the first {bound} documents at most, whole"
    carried = "memory carried" if outcome.config.architecture == "smt" else f"{outcome.config.data.eval_chunk_length} at a time"
    print(
        f"\nheld-out text   {evaluation.n_targets:,} tokens, {evaluation.n_bytes:,} bytes, {documents}, {carried}\n"
        f"validation loss {evaluation.loss:.4f} nats per token\n"
        f"perplexity      {shown_perplexity(evaluation.perplexity)}\n"
        f"bits per byte   {evaluation.bits_per_byte:.3f}\n"
        f"{_of_pairs(evaluation.pairs)}"
        f"training        {progress.n_tokens:,} tokens in {progress.step:,} steps, {progress.padding:.1%} padding\n"
        f"speed           {progress.tokens_per_second:,.0f} tokens/s\n"
        f"total time      {seconds:.0f} s\n"
        f"files           {outcome.folder}"
    )


def _of_pairs(pairs: PairEvaluation | None) -> str:
    if pairs is None:
        return ""
    return (
        f"held-out pairs  {pairs.n_pairs:,}, {pairs.accuracy:.1%} with the chosen more likely, log odds apart by "
        f"{pairs.margin:.3f}, loss {pairs.loss:.4f}\n"
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.split("\n"))
