"""What every kernel takes, per call: compiled figures, bytes and FLOPs over the least, and the budgets that they must keep.

    keys = [Key("window_attention", "forward", 64, "bf16", target) for target in TARGETS]
    for row in audit(keys):
        print(row.bytes_ratio, row.flops_ratio, violations(row, load_budgets(path)))

Bytes and FLOPs are counted in the interpreter, under the launch settings of the target, on the small calls of
``smt_kernels.testing.cases``: ratios carry over to long calls, totals in proportion to tokens and heads. Only Triton kernels
are counted, not the matrix library's products between them. Needs ``TRITON_INTERPRET=1``, as the interpreter does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from torch import Tensor

from smt_kernels import launch
from smt_kernels.testing.aot import FAMILY, TARGETS, Call, KernelReport, compile_ahead
from smt_kernels.testing.cases import DTYPES, OPERATIONS, Case, make_case
from smt_kernels.testing.traffic import Traffic, count_traffic


@dataclass(frozen=True)
class Key:
    """Which call is audited, and for which target."""

    operation: str
    direction: str
    size: int
    dtype: str
    target: str

    @property
    def call(self) -> str:
        """Operation and direction, as budgets name them."""
        return f"{self.operation} {self.direction}"

    def __str__(self) -> str:
        return f"{self.call}, {self.target}, {self.dtype}, {OPERATIONS[self.operation].size_of} {self.size}"


@dataclass(frozen=True)
class Count:
    """What one interpreted call asked for.

    ``least_bytes`` are those of the arguments and results that its kernels touch, each moved once: what the kernels hand to
    each other, and read again, is not among them.
    """

    traffic: Traffic
    least_bytes: int
    useful_flops: int

    @property
    def bytes_ratio(self) -> float:
        return self.traffic.bytes / self.least_bytes

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs issued by dots over the useful ones; None where no kernel multiplies matrices."""
        return self.traffic.dot_flops / self.useful_flops if self.useful_flops else None


@dataclass(frozen=True)
class Row:
    """One audited call: its compiled kernels in the order of their launches, and what the call asks for.

    ``tokens``, ``heads`` and ``decoding`` are those of ``Case``: bytes and FLOPs are in proportion to tokens and heads.
    """

    key: Key
    kernels: list[KernelReport]
    count: Count
    tokens: int
    heads: int
    decoding: bool


def count(case: Case, family: str = "interpreter") -> Count:
    """Run a case made on ``"cpu"`` under the launch settings of ``family`` and count what its kernels ask for."""
    module, _, name = case.call.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    with mock.patch.object(launch, "architecture_family", lambda device: family), count_traffic() as traffic:
        results = function(**case.call.arguments)
    moved = _tensors([list(case.call.arguments.values()), results])
    least = sum(tensor.nbytes for tensor in moved if tensor.data_ptr() in traffic.addresses)
    return Count(traffic, least, case.useful_flops)


def audit(keys: Iterable[Key], processes: int | None = None) -> Iterator[Row]:
    """Compile and count the calls of ``keys``, in their order; ``processes`` compile at a time, by default one per core.

    Raises:
        RuntimeError: a call does not compile.
    """
    keys = list(keys)
    processes = processes or os.cpu_count() or 1
    with ThreadPoolExecutor(processes) as pool:
        compiled: dict[Key, tuple[Future, int]] = {}
        for target in TARGETS:
            mine = [key for key in keys if key.target == target]
            # A process takes seconds to start: as few as keep every core busy, with calls dealt out in turns.
            share = max(1, processes * len(mine) // max(1, len(keys)))
            for part in filter(None, (mine[start::share] for start in range(share))):
                future = pool.submit(compile_ahead, [_call(key) for key in part], [target])
                compiled |= {key: (future, index) for index, key in enumerate(part)}
        for key in keys:
            case = make_case(key.operation, key.direction, key.size, DTYPES[key.dtype], "cpu")
            counted = count(case, FAMILY[key.target])
            future, index = compiled[key]
            kernels = [report for report in future.result() if report.call == index]
            yield Row(key, kernels, counted, case.tokens, case.heads, case.decoding)


def load_budgets(path: Path) -> dict[str, Any]:
    """The budgets of a YAML file; ``benchmarks/kernel_budgets.yaml`` says what its entries mean."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def budgeted_keys(budgets: dict[str, Any], targets: Sequence[str] = TARGETS) -> list[Key]:
    """Every call that has budgets, for ``targets``."""
    return [
        Key(operation, direction, size, dtype, target)
        for target in targets
        for operation, sizes in budgets["sizes"].items()
        for direction in OPERATIONS[operation].directions
        for size in sizes
        for dtype in budgets["dtypes"]
    ]


def budget(key: Key, figure: str, budgets: dict[str, Any]) -> tuple[float | None, float | None]:
    """The budget of one figure of a call, and what it must keep: more only where the file says that it is exceeded."""
    asked = budgets["calls"].get(key.call, {}).get(figure)
    for entry in budgets["exceeded"]:
        here = key.target in entry.get("targets", TARGETS) and key.size in entry.get("sizes", (key.size,))
        if here and (entry["call"], entry["figure"]) == (key.call, figure):
            return asked, entry["keeps"]
    return asked, asked


def violations(row: Row, budgets: dict[str, Any]) -> list[str]:
    """Which budgets ``row`` breaks, each with the kernel and the figure; none where its size or dtype has no budget."""
    key, broken = row.key, []
    if key.size not in budgets["sizes"].get(key.operation, ()) or key.dtype not in budgets["dtypes"]:
        return []
    for kernel in row.kernels:
        name = f"{kernel.kernel} of {key}"
        if kernel.spills > budgets["spills"]:
            broken.append(f"{name}: {kernel.spills} spills, budget {budgets['spills']}")
        if kernel.shared_bytes > kernel.shared_limit:
            broken.append(f"{name}: {kernel.shared_bytes} bytes of shared memory, limit {kernel.shared_limit}")
        wanted = budgets["matrix_instructions"].get(key.operation)
        found = kernel.matrix_instructions
        if wanted is not None and (wanted[key.target] not in found if key.target in wanted else not found):
            broken.append(f"{name}: no {wanted.get(key.target, 'instruction')} of the matrix units")
    kernels = ", ".join(dict.fromkeys(kernel.kernel for kernel in row.kernels))
    for figure, value in figures(row).items():
        _, allowed = budget(key, figure, budgets)
        if value is not None and allowed is not None and value > allowed:
            broken.append(f"{kernels} of {key}: {figure} {value:.3g}, budget {allowed:g}")
    if row.count.traffic.raced or row.count.traffic.atomics:
        raced = ", ".join(row.count.traffic.raced) or "none"
        broken.append(f"{kernels} of {key}: {row.count.traffic.atomics} atomics, arguments that programs race for: {raced}")
    return broken


def figures(row: Row) -> dict[str, float | None]:
    """The figures of a call that have budgets, by the names that budgets give them."""
    counted = row.count
    return {"bytes": counted.bytes_ratio, "flops": counted.flops_ratio, "launches": len(counted.traffic.launches)}


def _call(key: Key) -> Call:
    return make_case(key.operation, key.direction, key.size, DTYPES[key.dtype], "meta").call


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
