"""``smt convert``: pretrained weights as a checkpoint of ours."""

from __future__ import annotations

import argparse

from smt.runtime.fields import check_seed

EXAMPLES = """\
  smt convert --gpt2 openai-community/gpt2 --mamba state-spaces/mamba-130m-hf --match_scale --out start
  smt convert --gpt2 gpt2_files/ --set stride=10 --set ssm_n_layers=4 --out start
  smt train --config start/config.yaml --init_from checkpoint=start"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``smt convert``."""
    parser.add_argument("--gpt2", metavar="SOURCE", help="folder or hub name of a GPT-2, for decoder and embedding")
    parser.add_argument("--mamba", metavar="SOURCE", help="folder or hub name of a Mamba-1, for the memory")
    parser.add_argument("--config", metavar="YAML", help="the model's configuration (default: the sources' sizes)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write the checkpoint; new or empty")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field of the model")
    parser.add_argument("--embedding", metavar="WHOSE", help="gpt2, mamba or none (default: the first source's)")
    parser.add_argument("--match_scale", action="store_true", help="give the memory's output the scale of the embedding")
    parser.add_argument("--first_layers", action="store_true", help="of a deeper source, take the first layers")
    parser.add_argument("--seed", type=int, default=42, help="of what stays fresh (default: 42)")


def run(options: argparse.Namespace, started: float) -> int:
    """Write the checkpoint, and print what is in it."""
    check_seed("seed", options.seed)
    from smt.cli.conversion import convert

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
