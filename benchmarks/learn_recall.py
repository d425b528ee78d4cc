"""Does a fresh memory learn to remember, whatever the seed? A key shown once is asked for 140 to 255 tokens later.

    python benchmarks/learn_recall.py --encodings stream,stride --seeds 0,1,2,3,4,5,6,7,8,9

Only slots can tell the key: the window has lost it, and every other token is random. All but the sizes are defaults of
``SMTConfig``; any field can be set (``--set pooling_dropout=0.1``). A row of the table is one training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smt import SMTConfig, StrideMemoryTransformer
from smt.runtime.environment import environment
from smt.runtime.fields import parse

N_KEYS, N_FILLERS = 32, 64
MARKER, QUESTION = N_FILLERS + N_KEYS, N_FILLERS + N_KEYS + 1
LENGTH, SHOWN, ASKED = 256, 59, 200  # tokens of a row; the marker stands before SHOWN, the question from ASKED on
SIZES = {"d_model": 64, "d_k": 64, "transformer_n_layers": 2, "transformer_n_heads": 4, "ssm_n_layers": 2}
STEPS, ROWS, LEARNING_RATE, WARMUP = 300, 32, 3e-3, 10
RECALLED = 0.95  # where a training has learned the task, and ends


def recall_batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids of random filler with a marker and a key near the start and a question near the end; targets there."""
    ids = torch.randint(N_FILLERS, (rows, LENGTH), generator=generator)
    shown = torch.randint(SHOWN, (rows,), generator=generator)
    asked = torch.randint(ASKED, LENGTH, (rows,), generator=generator)
    key = N_FILLERS + torch.randint(N_KEYS, (rows,), generator=generator)
    row = torch.arange(rows)
    ids[row, shown], ids[row, shown + 1], ids[row, asked] = MARKER, key, QUESTION
    targets = torch.full((rows, LENGTH), -100)
    targets[row, asked] = key
    return ids, targets


def answers(model: StrideMemoryTransformer, ids: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (rows, d) at the questions."""
    model.eval()
    with torch.no_grad():
        hidden, _ = model.encode(ids)
    model.train()
    return hidden[targets >= 0]


def accuracy(model: StrideMemoryTransformer) -> float:
    """Of 192 new questions, the share answered right; chance is 1 in 32."""
    ids, targets = recall_batch(192, torch.Generator().manual_seed(10**6))
    predicted = (answers(model, ids, targets) @ model.embedding.weight.T).argmax(-1)
    return (predicted == targets[targets >= 0]).double().mean().item()


def build(seed: int, **fields: Any) -> StrideMemoryTransformer:
    """A fresh model of the task's sizes, every other field a default unless given."""
    torch.manual_seed(seed)
    return StrideMemoryTransformer(SMTConfig(vocab_size=QUESTION + 1, **{**SIZES, **fields}))


def train(model: StrideMemoryTransformer, seed: int, first: int = 20) -> Iterator[tuple[int, float]]:
    """Train for ``STEPS`` steps at most; yields step and accuracy every 20 steps from ``first`` on, until it has learned."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=WARMUP)
    for step in range(1, STEPS + 1):
        loss, _ = model.loss(*recall_batch(ROWS, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step >= first and step % 20 == 0:
            recalled = accuracy(model)
            yield step, recalled
            if recalled >= RECALLED:
                return


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once for every encoding and seed, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encodings", default="stream,stride", help="encodings to train (default: stream,stride)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of weights, data and dropout (default: 0,1,2)")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of SMTConfig")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pairs = [given.split("=", 1) for given in options.set]
    fields = {name: parse(SMTConfig, name, value) for name, value in pairs}
    rows = []
    print("| encoding | seed | steps | recalled | seconds |\n|---|---|---|---|---|")
    for encoding in options.encodings.split(","):
        for seed in map(int, options.seeds.split(",")):
            started = time.perf_counter()
            *_, (step, recalled) = train(build(seed, encoding=encoding, **fields), seed)
            seconds = time.perf_counter() - started
            rows.append({"encoding": encoding, "seed": seed, "steps": step, "recalled": recalled, "seconds": seconds})
            print(f"| {encoding} | {seed} | {step} | {recalled:.1%} | {seconds:.0f} |", flush=True)
            if options.json is not None:
                written = {"fields": fields, "rows": rows, "environment": environment(torch.device("cpu"))}
                options.json.write_text(json.dumps(written, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
