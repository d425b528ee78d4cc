"""Measuring side by side: the cases of one table run in turns in one process, and a case that would take too long is not run.

A ratio of two times is worth something only if the machine was in one state for both. So the repeats of all cases of one length
are interleaved, and the median of each is taken. What a call will cost is predicted from the last length measured; a case whose
prediction exceeds the budget becomes a row that says so, and its prediction is never shown as a measurement.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

# Shorter calls are repeated inside one sample, so that the clock's and the launch's jitter stay small beside it.
MIN_SAMPLE_SECONDS = 0.01


class Unavailable(Exception):
    """A case that cannot run here; the message is the reason, as the table shows it."""


@dataclass(frozen=True)
class Case:
    """Something to time at several lengths.

    Attributes:
        name: as the table shows it.
        prepare: makes the inputs of one length and returns the call to time; raises ``Unavailable``.
        cost: work at one length in any unit, to predict the time of the next length.
        limit: the ratio of the baseline's multiply-adds to this case's, None for the baseline: the speed-up if both did theirs
            at one rate. A baseline whose kernels run below the rate of matrix products can be beaten by more.
        calibrate: whether a short call may stand in for the first length (not where every length is compiled anew).
    """

    name: str
    prepare: Callable[[int], Callable[[], object]]
    cost: Callable[[int], float]
    limit: Callable[[int], float] | None = None
    calibrate: bool = True


@dataclass(frozen=True)
class Row:
    """One line of a table: a measurement, or the reason why there is none.

    Attributes:
        task: what was timed.
        case: which implementation or model.
        length: tokens per sequence.
        batch: sequences.
        seconds: median of ``repeats`` interleaved calls; None if not measured.
        fastest, slowest: the extremes of the same calls.
        seconds_per_token: seconds / (batch * length).
        ratio: the baseline's seconds divided by these.
        flop_limit: the ratio of multiply-adds, see ``Case.limit``.
        fraction_of_limit: ratio / flop_limit.
        not_measured: why there is no measurement.
        predicted_seconds: what one call was expected to take, if that is the reason.
    """

    task: str
    case: str
    length: int
    batch: int
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    repeats: int = 0
    seconds_per_token: float | None = None
    ratio: float | None = None
    flop_limit: float | None = None
    fraction_of_limit: float | None = None
    not_measured: str | None = None
    predicted_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return asdict(self)


@dataclass
class Samples:
    """The times of one case."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(
    task: str,
    cases: list[Case],
    lengths: list[int],
    *,
    batch: int,
    max_seconds: float,
    max_repeats: int,
    device: torch.device,
) -> Iterator[list[Row]]:
    """Time ``cases``, the first of which is the baseline, length by length; yields the rows of one length at a time.

    Args:
        max_seconds: for all repeats of one case at one length; a case of which one call is predicted to exceed it is not run.
        max_repeats: samples of one case at one length.
    """
    last = _calibrate(cases, max(1, lengths[0] // 4), max_seconds, device)  # case -> (length, seconds)
    for length in lengths:
        calls: dict[str, Callable[[], object]] = {}
        reasons: dict[str, tuple[str, float | None]] = {}
        first: dict[str, float] = {}
        for case in cases:
            predicted = None
            if case.name in last:
                known_length, known_seconds = last[case.name]
                predicted = known_seconds * case.cost(length) / case.cost(known_length)
            if predicted is not None and predicted > max_seconds:
                reasons[case.name] = f"predicted {predicted:.3g} s > {max_seconds:g} s, not run", predicted
                continue
            try:
                call = case.prepare(length)
                first[case.name] = _time(call, device)
            except Unavailable as reason:
                reasons[case.name] = str(reason), None
                continue
            except torch.OutOfMemoryError:
                reasons[case.name] = "out of device memory", None
                continue
            calls[case.name] = call
        samples = interleave(calls, first, max_seconds, max_repeats, device)
        calls.clear()  # free the inputs of this length before those of the next are made
        for name, timed in samples.items():
            last[name] = length, timed.median
        yield [_row(task, case, cases[0], length, batch, samples, reasons) for case in cases]


def _calibrate(cases: list[Case], length: int, max_seconds: float, device: torch.device) -> dict[str, tuple[int, float]]:
    """The fastest of a few calls of each case at a short length, from which the first length of the table is predicted."""
    known = {}
    for case in cases:
        if not case.calibrate:
            continue
        try:
            call = case.prepare(length)
        except Unavailable:
            continue  # the first length will say why
        seconds = _time(call, device)
        for _ in range(3 if seconds < max_seconds / 4 else 0):
            seconds = min(seconds, _time(call, device))
        known[case.name] = length, seconds
    return known


def time_in_turns(
    calls: dict[str, Callable[[], object]], max_seconds: float, max_repeats: int, device: torch.device
) -> dict[str, Samples]:
    """``interleave`` after a first call of each."""
    first = {name: _time(call, device) for name, call in calls.items()}
    return interleave(calls, first, max_seconds, max_repeats, device)


def interleave(
    calls: dict[str, Callable[[], object]], first: dict[str, float], max_seconds: float, max_repeats: int, device: torch.device
) -> dict[str, Samples]:
    """Run ``calls`` in turns; ``first`` holds the time of a first call of each: its warm-up, or a slow one's only sample."""
    samples = {name: Samples([]) for name in calls}
    plans = {}
    for name in calls:
        inner = max(1, math.ceil(MIN_SAMPLE_SECONDS / first[name]))
        plans[name] = inner, min(max_repeats, int(max_seconds / (first[name] * inner)) - 1)
        if plans[name][1] < 1:
            samples[name].seconds.append(first[name])
    rounds = max((repeats for _, repeats in plans.values()), default=0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name, (inner, repeats) in plans.items():
                # Fewer repeats are spread evenly over the rounds.
                if (turn + 1) * repeats // rounds > turn * repeats // rounds:
                    samples[name].seconds.append(_time(calls[name], device, inner))
    finally:
        if collecting:
            gc.enable()
    return samples


def _time(call: Callable[[], object], device: torch.device, inner: int = 1) -> float:
    """Seconds of one call, the mean of ``inner`` in a row."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(inner):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / inner


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(
    task: str,
    case: Case,
    baseline: Case,
    length: int,
    batch: int,
    samples: dict[str, Samples],
    reasons: dict[str, tuple[str, float | None]],
) -> Row:
    limit = case.limit(length) if case.limit is not None else None
    if case.name not in samples:
        reason, predicted = reasons[case.name]
        return Row(task, case.name, length, batch, flop_limit=limit, not_measured=reason, predicted_seconds=predicted)
    timed = samples[case.name]
    ratio = samples[baseline.name].median / timed.median if baseline.name in samples else None
    return Row(
        task,
        case.name,
        length,
        batch,
        seconds=timed.median,
        fastest=min(timed.seconds),
        slowest=max(timed.seconds),
        repeats=len(timed.seconds),
        seconds_per_token=timed.median / (batch * length),
        ratio=ratio,
        flop_limit=limit,
        fraction_of_limit=ratio / limit if ratio is not None and limit is not None else None,
    )
