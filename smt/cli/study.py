"""``smt study``: several models on the same text, in two stages, and one report."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

from smt.runtime.process import Interrupted

EXAMPLES = """\
  smt study --quick                          every model and both stages in less than 10 minutes on 2 cores
  smt study --config hymba_cpu               three seeds, in a size for 2 cores
  smt study --config hymba                   15 layers of width 512, for a GPU
  smt study --quick --maps                   only draw attention maps, of runs that have finished
  smt study --config my_study.yaml --seeds 1,2
the same command again goes on with what has not finished"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt study``."""
    parser.add_argument("--config", default="hymba", metavar="YAML", help="file or packaged name (default: hymba)")
    parser.add_argument("--quick", action="store_true", help="the short form of the study, which its file describes")
    parser.add_argument("--seeds", metavar="N,...", help="instead of the file's")
    parser.add_argument("--maps", action="store_true", help="only draw attention maps, from runs that have finished")
    parser.add_argument("--out", default="results", metavar="FOLDER", help="where studies are kept (default: results)")


def run(options: argparse.Namespace, started: float) -> int:
    """Run what has not finished, then write and print the report."""
    from smt.runtime.extras import optional
    from smt.study.maps import draw_maps
    from smt.study.prepared import prepare
    from smt.study.record import record, save
    from smt.study.report import REPORT_FILE, save_report
    from smt.study.run import run_study
    from smt.study.settings import StudySettings

    settings = StudySettings.from_yaml(options.config, quick=options.quick, seeds=_seeds(options.seeds))
    prepared = prepare(settings, options.out)
    if options.maps:
        print(f"files           {', '.join(map(str, draw_maps(prepared)))}")
        return 0
    tell = partial(print, flush=True)
    for name, sized in prepared.models.items():
        tell(f"{name:<14}{sized.parameters:>12,} parameters, {sized.embedding / sized.parameters:.0%} of them the embedding")
    try:
        cells = run_study(prepared, tell)
    except Interrupted as interrupt:
        raise Interrupted(interrupt.signal, f"the study is in {prepared.folder}: the same command goes on with it") from None
    study = record(prepared, cells, _command(options))
    if not study["runs"]:
        raise ValueError(f"no cell came to an end: {'; '.join(f'{label}: {why}' for label, why in study['failures'].items())}")
    files = [save(study, prepared.folder), *save_report(study, prepared.folder)]
    if settings.map_model in settings.models:
        with optional("attention maps"):
            files += draw_maps(prepared)
    print(f"\n{Path(prepared.folder / REPORT_FILE).read_text(encoding='utf-8')}\nfiles           {', '.join(map(str, files))}")
    if study["failures"]:
        raise ValueError(f"{len(study['failures'])} of {len(cells)} cells failed")
    return 0


def _seeds(given: str | None) -> tuple[int, ...]:
    words = [word for word in (given or "").split(",") if word]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--seeds takes numbers with commas between them, got {given!r}")
    return tuple(map(int, words))


def _command(options: argparse.Namespace) -> str:
    """What repeats the study; where its results go, and files of one's own, are nobody else's business."""
    words = ["smt", "study", "--config", Path(options.config).stem]
    words += ["--quick"] * options.quick + (["--seeds", options.seeds] if options.seeds else [])
    return shlex.join(words)
