"""Two processes, as torchrun starts them, that train in a folder as settings in JSON say; for ``test_distributed.py``.

Usage: two_processes.py FOLDER SETTINGS.json

The second is a fork of the first, which has imported what both need. Leaves in the folder what ``same_training`` gives, in
``same.pt``; a run, in ``ddp``; and one that was sharded, interrupted and resumed, in ``fsdp``.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

import accelerate  # noqa: F401  (else imported after the fork, as the next three)
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
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


def fork() -> int:
    """The process id of the second process, which has rank 1; there, 0."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    second = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if second else "1"
    return second


if __name__ == "__main__":
    folder, settings = map(Path, sys.argv[1:])
    config = RunConfig.from_dict(json.loads(settings.read_text()))
    second = fork()
    train_the_same(folder / "same.pt")
    run_in(folder / "ddp", config)
    shard_on_cpu()
    interrupt(folder / "fsdp", config, 13)
    run_in(folder / "fsdp", config)
    if second:
        _, status = os.waitpid(second, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
