"""Accelerate as runs use it: processes, precision and trackers; what the machine offers is its business."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.runtime.device import find_device
from smt.runtime.extras import MissingExtraError
from smt.training.settings import RunConfig, TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(training: TrainingConfig) -> Accelerator:
    """One process alone, or one of those that ``torchrun`` or ``accelerate launch`` has started.

    Raises:
        MissingExtraError: a tracker that is not installed.
        ValueError: no GPU where one is asked for, a number format that the device has not, or FSDP 1.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    for tracker in training.report_to:
        if importlib.util.find_spec(tracker) is None:  # Accelerate would leave it out and not say so
            raise MissingExtraError(f"report_to names {tracker}, which is not installed: pip install {tracker}")
    device = find_device(training.device)
    precision = training.mixed_precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "no"
    AcceleratorState._reset_state()  # settings of an earlier run in this process
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        # Where no row comes to a write, or all documents of a process have ended, parameters have no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("FSDP must be version 2, whose parameters keep their names: accelerate launch --fsdp_version 2")
    return accelerator


def agreed(accelerator: Accelerator, value: Callable[[], Any]) -> Any:
    """What the first process finds, on all of them."""
    from accelerate.utils import broadcast_object_list

    (found,) = broadcast_object_list([value() if accelerator.is_main_process else None])
    return found


def start_trackers(accelerator: Accelerator, config: RunConfig, folder: Path) -> None:
    """Tell the trackers of ``report_to`` what runs; those that write files do so below ``folder``."""
    if not config.training.report_to:
        return
    from accelerate.tracking import filter_trackers

    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(list(config.training.report_to), folder)  # only now is there a folder
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in config.flat().items()}
    accelerator.init_trackers(config.experiment, config=plain)
