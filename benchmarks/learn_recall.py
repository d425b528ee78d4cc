"""Does a fresh memory learn to remember, whatever the seed? A key shown once is asked for 140 to 255 tokens later.

    python benchmarks/learn_recall.py --encodings stream,stride --seeds 0,1,2,3,4,5,6,7,8,9
    python benchmarks/learn_recall.py --length 512 --steps 600 --set write_group=16   # asked for when no slot has seen it

Only slots can tell the key: the window has lost it, and every other token is random. All but the sizes are defaults of
``SMTConfig``; any field can be set (``--set pooling_dropout=0.1``). A row of the table is one training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smt import SMTConfig, StrideMemoryTransformer
from smt.runtime.environment import environment
from smt.runtime.fields import parse

SIZES = {"d_model": 64, "transformer_n_layers": 2, "transformer_n_heads": 4, "ssm_n_layers": 2}
STEPS, WARMUP, LEARNING_RATE = 300, 10, 3e-3
# Until slots tell something they are noise, and what a fast SSM learns first is to make all of them the same.
SSM_LEARNING_RATE = 1e-3
RECALLED = 0.95  # where a training has learned the task, and ends
EVERY = 20  # steps between questions


@dataclass(frozen=True)
class Task:
    """Rows of random filler with a marker and a key near the start and a question near the end.

    Attributes:
        length: tokens of a row.
        shown: the marker stands before this one.
        asking: of how many of the last one is the question.
        n_keys: of which one is asked for.
        n_fillers: of which the rest is drawn.
        rows: of a batch.
    """

    length: int = 256
    shown: int = 59
    asking: int = 56
    n_keys: int = 32
    n_fillers: int = 64
    rows: int = 32

    @property
    def marker(self) -> int:
        """The id that stands before the key; fillers are from 0 on, keys behind them."""
        return self.n_fillers + self.n_keys

    @property
    def question(self) -> int:
        """The id at which the key is to be named, the last of the vocabulary."""
        return self.marker + 1

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids (rows, length) and targets, which are counted at the question alone."""
        ids = torch.randint(self.n_fillers, (rows, self.length), generator=generator)
        shown = torch.randint(self.shown, (rows,), generator=generator)
        asked = torch.randint(self.length - self.asking, self.length, (rows,), generator=generator)
        key = self.n_fillers + torch.randint(self.n_keys, (rows,), generator=generator)
        row = torch.arange(rows)
        ids[row, shown], ids[row, shown + 1], ids[row, asked] = self.marker, key, self.question
        targets = torch.full((rows, self.length), -100)
        targets[row, asked] = key
        return ids, targets

    def build(self, seed: int, **fields: Any) -> StrideMemoryTransformer:
        """A fresh model of the task's sizes, every other field a default unless given."""
        torch.manual_seed(seed)
        return StrideMemoryTransformer(SMTConfig(vocab_size=self.question + 1, **{**SIZES, **fields}))

    def accuracy(self, model: StrideMemoryTransformer) -> float:
        """Of 192 new questions, the share answered right; chance is 1 in ``n_keys``."""
        ids, targets = self.batch(192, torch.Generator().manual_seed(10**6))
        predicted = (answers(model, ids, targets) @ model.embedding.weight.T).argmax(-1)
        return (predicted == targets[targets >= 0]).double().mean().item()

    def train(
        self,
        model: StrideMemoryTransformer,
        seed: int,
        steps: int = STEPS,
        first: int = 20,
        ssm_rate: float = SSM_LEARNING_RATE,
    ) -> Iterator[tuple[int, float]]:
        """Train for ``steps`` at most; yields step and accuracy every 20 steps from ``first`` on, until it has learned."""
        generator = torch.Generator().manual_seed(seed)
        parts = model.parts()
        groups = [{"params": parts.pop("ssm").parameters(), "lr": ssm_rate}]
        groups += [{"params": part.parameters()} for part in parts.values()]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=WARMUP)
        for step in range(1, steps + 1):
            loss, _ = model.loss(*self.batch(self.rows, generator))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            if step >= first and step % EVERY == 0:
                recalled = self.accuracy(model)
                yield step, recalled
                if recalled >= RECALLED:
                    return


def answers(model: StrideMemoryTransformer, ids: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (rows, d) at the questions."""
    model.eval()
    with torch.no_grad():
        hidden, _ = model.encode(ids)
    model.train()
    return hidden[targets >= 0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once for every encoding and seed, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encodings", default="stream,stride", help="encodings to train (default: stream,stride)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of weights, data and dropout (default: 0,1,2)")
    parser.add_argument(
        "--length", type=int, default=256, help="tokens of a row; the question is one of the last 56 (default: 256)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of a training at most (default: {STEPS})")
    of_ssm = f"learning rate of the SSM, where that of the rest is {LEARNING_RATE:g} (default: {SSM_LEARNING_RATE:g})"
    parser.add_argument("--ssm_learning_rate", type=float, default=SSM_LEARNING_RATE, help=of_ssm)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of SMTConfig")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.steps < EVERY:
        parser.error(f"--steps must be at least {EVERY}, got {options.steps}")
    pairs = [given.split("=", 1) for given in options.set]
    fields = {name: parse(SMTConfig, name, value) for name, value in pairs}
    task, rows = Task(length=options.length), []
    print("| encoding | seed | steps | recalled | seconds |\n|---|---|---|---|---|")
    for encoding in options.encodings.split(","):
        for seed in map(int, options.seeds.split(",")):
            started = time.perf_counter()
            model = task.build(seed, encoding=encoding, **fields)
            *_, (step, recalled) = task.train(model, seed, options.steps, ssm_rate=options.ssm_learning_rate)
            seconds = time.perf_counter() - started
            of_run = {"steps": step, "recalled": recalled, "learned": recalled >= RECALLED, "seconds": seconds}
            rows.append({"encoding": encoding, "seed": seed, **of_run})
            print(f"| {encoding} | {seed} | {step} | {recalled:.1%} | {seconds:.0f} |", flush=True)
            if options.json is not None:
                written = {
                    "length": task.length,
                    "fields": fields,
                    "rows": rows,
                    "environment": environment(torch.device("cpu")),
                }
                options.json.write_text(json.dumps(written, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
