"""Accelerate as runs use it: processes, precision and trackers; what the machine offers is its business."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt.runtime.device import find_device
from smt.runtime.extras import MissingExtraError
from smt.runtime.precision import has_bfloat16
from smt.training.settings import RunConfig, TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def accelerator_of(training: TrainingConfig) -> Iterator[Accelerator]:
    """``make_accelerator``; afterwards its trackers are finished, and what Accelerate shares is as it was.

    A process that has its own ``Accelerator``, such as a notebook, keeps its settings, devices and processes. Processes that
    were connected here are so no longer, unless the block failed: others may wait for this one then, and not for its parting.
    """
    from torch import distributed

    before = [dict(shared) for shared in _shared()]
    were_connected = distributed.is_available() and distributed.is_initialized()
    accelerator = None
    try:
        accelerator = make_accelerator(training)
        yield accelerator
        if not were_connected:
            accelerator.state.destroy_process_group()
    finally:
        for tracker in [] if accelerator is None else accelerator.trackers:
            tracker.finish()
        for shared, values in zip_longest(_shared(), before, fillvalue={}):
            shared.clear()
            shared.update(values)


def make_accelerator(training: TrainingConfig) -> Accelerator:
    """One process alone, or one of those that ``torchrun`` or ``accelerate launch`` has started; the settings of any other
    ``Accelerator`` of this process are lost.

    Raises:
        MissingExtraError: a tracker that is not installed.
        ValueError: no GPU where one is asked for, a number format that the device has not, or FSDP 1.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    for tracker in training.report_to:
        if importlib.util.find_spec(tracker) is None:  # Accelerate would leave it out and not say so
            raise MissingExtraError(f"report_to names {tracker}, which is not installed: pip install {tracker}")
    device = find_device(training.device)
    precision = training.mixed_precision
    if precision == "auto":
        precision = "bf16" if has_bfloat16(device) else "no"
    if precision == "fp16" and device.type == "cpu":  # Accelerate would train in fp32
        raise ValueError("mixed_precision must be auto, no or bf16 on a CPU, got 'fp16'")
    for shared in _shared():
        shared.clear()
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


def _shared() -> list[dict[str, Any]]:
    """What all instances of Accelerate's states share in this process, as ``vars`` of any of them; gradients', then, where
    there are any, settings, and devices and processes."""
    from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized

    kinds = [GradientState, AcceleratorState, PartialState] if is_initialized() else [GradientState]
    return [vars(kind()) for kind in kinds]


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
