"""``smt eval``: what a trained model is worth, and what its memory is worth to it."""

from __future__ import annotations

import argparse

from smt.cli.parser import add_device

EXAMPLES = """\
  smt eval results/stdlib/20260101_120000      every task, on the run's held-out documents
  smt eval RUN --tasks perplexity,position --data pg19 --hf openai-community/gpt2
  smt eval RUN --data recall --tasks recall --trials 16
  smt eval --hf openai-community/gpt2 --data my_novels/ --context 512 --out gpt2_512"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt eval``."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder that smt train or smt convert left")
    parser.add_argument("--hf", metavar="NAME", help="a causal language model of Hugging Face, alone or to compare with")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="that --hf sees at most (default: all that it takes)")
    parser.add_argument("--data", metavar="SOURCE", help="a file, a folder or a source (default: that of the run)")
    parser.add_argument("--tasks", metavar="NAME,...", help="perplexity,position,needle,recall,ablation,pooling (default: all)")
    parser.add_argument("--documents", type=int, metavar="N", help="the first N held-out documents (default: all)")
    parser.add_argument("--trials", type=int, default=8, metavar="N", help="needles per cell of the grid (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the needles (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="for evaluation.json and plots (default: the run's folder)")
    add_device(parser)


def run(options: argparse.Namespace, started: float) -> int:
    """Evaluate, and print the table."""
    if options.run is None and options.hf is None:
        raise ValueError("smt eval needs a run's folder or --hf NAME")
    if options.hf is None and options.context is not None:
        raise ValueError(f"--context is what the model of --hf sees at most, got it without: {options.context}")
    out = options.out or options.run
    if out is None:
        raise ValueError("smt eval --hf needs --out FOLDER for its files")
    from smt.evaluation.report import Report
    from smt.evaluation.run import EvaluationConfig, evaluate_subjects
    from smt.evaluation.subjects import data_named, data_of_run, open_causal_lm, open_run
    from smt.runtime.device import find_device
    from smt.runtime.files import check_folder

    tasks = {} if options.tasks is None else {"tasks": tuple(filter(None, options.tasks.split(",")))}
    config = EvaluationConfig(documents=options.documents, trials=options.trials, seed=options.seed, **tasks)
    device = find_device(options.device)
    subjects = [] if options.run is None else [open_run(options.run, device)]
    data = data_named(options.data) if options.data else data_of_run(options.run) if options.run else None
    if data is None:
        raise ValueError("smt eval needs --data: the model does not say what it was trained on")
    check_folder(out)
    if options.hf is not None:
        subjects.append(open_causal_lm(options.hf, device, options.context))
    report = Report()
    try:
        evaluate_subjects(subjects, data, config, report, run_folder=None if options.data else options.run)
    finally:
        if report.rows:  # what was measured before an error, too
            print(report.table())
            for note in report.notes:
                print(f"note: {note}")
            print(flush=True)
    print(f"files           {', '.join(str(path) for path in report.save(out))}")
    return 0
