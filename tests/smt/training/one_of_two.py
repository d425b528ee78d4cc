"""One of the processes that ``test_distributed.py`` starts: trains in a folder as settings in JSON say.

Usage: torchrun --nproc-per-node 2 one_of_two.py FOLDER SETTINGS.json

Leaves in the folder what ``same_training`` gives, in ``same.pt``; a run, in ``ddp``; and one that was sharded, interrupted
and resumed, in ``fsdp``.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from same_training import TASKS, trained

from smt.training.run import run_in
from smt.training.settings import RunConfig
from smt.training.trainer import Trainer

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def shard_on_cpu() -> None:
    """Ask Accelerate for FSDP, which it turns on for accelerators alone; what it then does runs on CPUs, too."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    initialise = AcceleratorState.__init__

    def initialised(self, *arguments, fsdp_plugin=None, **options):
        initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = initialised
    os.environ.update(FSDP)


class Stopped(Exception):
    pass


def interrupt(folder: Path, config: RunConfig, last: int) -> None:
    """Run until the step after ``last``, and leave nothing behind but the folder."""
    take_step = Trainer._step

    def step(self, *arguments, **options):
        if self.progress.step == last:
            raise Stopped
        take_step(self, *arguments, **options)

    Trainer._step = step
    with suppress(Stopped):
        run_in(folder, config)
    Trainer._step = take_step
    assert not (folder / "results.json").exists()
    torch.manual_seed(99)  # nothing of these processes may matter


def train_the_same(file: Path) -> None:
    """What ``same_training`` gives on this process and the other, by task and number of accumulated batches."""
    results = {task: {count: trained(task, count, processes=2) for count in (1, 4)} for task in TASKS}
    if os.environ["RANK"] == "0":
        torch.save(results, file)


if __name__ == "__main__":
    folder, settings = map(Path, sys.argv[1:])
    config = RunConfig.from_dict(json.loads(settings.read_text()))
    train_the_same(folder / "same.pt")
    run_in(folder / "ddp", config)
    shard_on_cpu()
    interrupt(folder / "fsdp", config, 13)
    run_in(folder / "fsdp", config)
