"""What every kernel takes, per call: compiled figures, bytes and FLOPs over the least, and the budgets that they must keep.

    keys = [Key("window_attention", "forward", 64, "bf16", target) for target in TARGETS]
    for row in audit(keys):
        print(row.count.bytes_ratio, row.count.flops_ratio, violations(row, load_budgets(path), compiler_version()))

Bytes and FLOPs are counted in the interpreter, under the launch settings of the target, on the small calls of
``smt_kernels.testing.cases``: ratios carry over to long calls, totals in proportion to tokens and heads. Only Triton kernels
are counted, not the matrix library's products between them. Needs ``TRITON_INTERPRET=1``, as the interpreter does.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from smt_kernels import launch
from smt_kernels.testing.aot import FAMILY, TARGETS, KernelReport, compile_ahead
from smt_kernels.testing.cases import DTYPES, OPERATIONS, Case, make_case
from smt_kernels.testing.traffic import Traffic, count_traffic

# Per launch of a call: the kernel, its grid, and its arguments but for tensors.
Launched = tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]


class UncheckedCompilerWarning(UserWarning):
    """A kernel breaks its budget with a compiler that the budgets were not checked with."""


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
    with count_traffic() as traffic:
        results = _run(case, family)
    moved = _tensors([list(case.call.arguments.values()), results])
    least = sum(tensor.nbytes for tensor in moved if tensor.data_ptr() in traffic.addresses)
    return Count(traffic, least, case.useful_flops)


def audit(keys: Iterable[Key], processes: int | None = None) -> Iterator[Row]:
    """Compile and count the calls of ``keys``, in their order; ``processes`` compile at a time, by default one per core.

    Raises:
        RuntimeError: a call does not compile.
    """
    keys = list(keys)
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(compile_keys, keys, processes)
        for key, counted in count_keys(keys):
            case = _case(key, "meta")
            yield Row(key, compiled.result()[key], counted, case.tokens, case.heads, case.decoding)


def compile_keys(keys: Iterable[Key], processes: int | None = None) -> dict[Key, list[KernelReport]]:
    """The compiled kernels of every key in the order of their launches, by ``processes`` at a time, by default one per core.

    Raises:
        RuntimeError: a call does not compile.
    """
    targets: dict[Key, tuple[str, ...]] = {}  # of every call
    for key in keys:
        call = replace(key, target="")
        targets[call] = (*targets.get(call, ()), key.target)
    processes = processes or os.cpu_count() or 1
    compiled: dict[Key, list[KernelReport]] = {}
    with ThreadPoolExecutor(processes) as pool:
        # A process takes seconds to start: as few as keep every core busy, with calls dealt out in turns.
        parts = []
        for wanted in dict.fromkeys(targets.values()):
            calls = [call for call in targets if targets[call] == wanted]
            for part in filter(None, (calls[start::processes] for start in range(processes))):
                parts.append((part, wanted, pool.submit(compile_ahead, [_case(call, "meta").call for call in part], wanted)))
        for part, wanted, future in parts:
            compiled |= {replace(call, target=target): [] for call in part for target in wanted}
            for report in future.result():
                compiled[replace(part[report.call], target=report.target)].append(report)
    return compiled


def count_keys(keys: Iterable[Key]) -> Iterator[tuple[Key, Count]]:
    """Every key with what its call asks for, counted once for all targets that launch the same."""
    counted: dict[tuple[Key, Launched], Count] = {}
    for key in keys:
        family = FAMILY[key.target]
        known = replace(key, target=""), launched(_case(key, "cpu"), family)
        if known not in counted:
            counted[known] = count(_case(key, "cpu"), family)
        yield key, counted[known]


def launched(case: Case, family: str) -> Launched:
    """What a case made on ``"cpu"`` launches under the settings of ``family``: kernels, grids, arguments without tensors."""
    launches = []

    def record(self: Any, *arguments: Any, **named: Any) -> None:
        given = dict(zip(self.arg_names, arguments, strict=False)) | named
        plain = tuple(repr(given.get(name)) for name in self.arg_names if not isinstance(given.get(name), Tensor))
        launches.append((self.fn.__name__, self.grid, plain))

    with mock.patch.object(GridExecutor, "__call__", record):
        _run(case, family)
    return tuple(launches)


def load_budgets(path: Path) -> dict[str, Any]:
    """The budgets of a YAML file; ``benchmarks/kernel_budgets.yaml`` says what its entries mean.

    Raises:
        ValueError: the file names compilers, calls, figures or targets that do not exist, or exceeds a budget without need.
    """
    budgets = yaml.safe_load(path.read_text(encoding="utf-8"))
    _require_versions("compilers", budgets["compilers"])
    for entry in budgets["exceeded"]:
        _check_exceeded(entry, budgets)
    return budgets


def _check_exceeded(entry: dict[str, Any], budgets: dict[str, Any]) -> None:
    name = f"the entry of exceeded for {entry.get('call')!r}, {entry.get('figure')!r}"
    required, optional = {"call", "figure", "keeps", "because"}, {"sizes", "targets", "compilers"}
    if not required <= entry.keys() <= required | optional:
        raise ValueError(f"{name} must have {', '.join(sorted(required))} and may have {', '.join(sorted(optional))}")
    asked = {"spills": budgets["spills"], **budgets["calls"].get(entry["call"], {})}.get(entry["figure"])
    if entry["call"] not in budgets["calls"] or asked is None or not entry["keeps"] > asked:
        raise ValueError(f"{name} must exceed a budget, which is {asked}, got {entry['keeps']!r}")
    if not entry["because"]:
        raise ValueError(f"{name} must say why it is exceeded")
    if not set(entry.get("targets", TARGETS)) <= set(TARGETS):
        raise ValueError(f"targets of {name} must be some of {', '.join(TARGETS)}, got {entry['targets']!r}")
    sizes = budgets["sizes"][entry["call"].split()[0]]
    if not set(entry.get("sizes", sizes)) <= set(sizes):
        raise ValueError(f"sizes of {name} must be some of {', '.join(map(str, sizes))}, got {entry['sizes']!r}")
    if "compilers" in entry:
        _require_versions(f"compilers of {name}", entry["compilers"])
        if not set(entry["compilers"]) <= set(budgets["compilers"]):
            raise ValueError(f"compilers of {name} must be some of those of the file, got {entry['compilers']!r}")


def _require_versions(name: str, value: Any) -> None:
    # YAML reads 3.10 without quotes as the number 3.1.
    if not isinstance(value, list) or not value or not all(isinstance(x, str) and re.fullmatch(r"\d+\.\d+", x) for x in value):
        raise ValueError(f'{name} must be a list of versions in quotes, like ["3.8", "3.9"], got {value!r}')


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


def budget(key: Key, figure: str, budgets: dict[str, Any], compiler: str) -> tuple[float | None, float | None]:
    """The budget of one figure of a call, and what it must keep: more only where the file says that it is exceeded."""
    asked = budgets["spills"] if figure == "spills" else budgets["calls"].get(key.call, {}).get(figure)
    for entry in budgets["exceeded"]:
        here = key.target in entry.get("targets", TARGETS) and key.size in entry.get("sizes", (key.size,))
        here = here and compiler in entry.get("compilers", (compiler,))
        if here and (entry["call"], entry["figure"]) == (key.call, figure):
            return asked, entry["keeps"]
    return asked, asked


def violations(row: Row, budgets: dict[str, Any], compiler: str) -> list[str]:
    """Which budgets ``row`` breaks, each with the kernel and the figure; none where its size or dtype has no budget."""
    key = row.key
    if key.size not in budgets["sizes"].get(key.operation, ()) or key.dtype not in budgets["dtypes"]:
        return []
    return compiled_violations(key, row.kernels, budgets, compiler) + counted_violations(key, row.count, budgets, compiler)


def counted_violations(key: Key, counted: Count, budgets: dict[str, Any], compiler: str) -> list[str]:
    """Which budgets of bytes, FLOPs and launches a call breaks, whatever its size and dtype, each with kernels and figure."""
    broken, traffic = [], counted.traffic
    kernels = ", ".join(dict.fromkeys(launch.kernel for launch in traffic.launches))
    for figure, value in figures(counted).items():
        _, allowed = budget(key, figure, budgets, compiler)
        if value is not None and allowed is not None and value > allowed:
            broken.append(f"{kernels} of {key}: {figure} {value:.3g}, budget {allowed:g}")
    if traffic.raced or traffic.atomics:
        raced = ", ".join(traffic.raced) or "none"
        broken.append(f"{kernels} of {key}: {traffic.atomics} atomics, arguments that programs race for: {raced}")
    return broken


def compiled_violations(key: Key, kernels: Iterable[KernelReport], budgets: dict[str, Any], compiler: str) -> list[str]:
    """Which budgets of every kernel those of a call break, whatever its size and dtype, each with the kernel and the figure."""
    broken = []
    _, spills = budget(key, "spills", budgets, compiler)
    for kernel in kernels:
        name = f"{kernel.kernel} of {key}"
        if kernel.spills > spills:
            broken.append(f"{name}: {kernel.spills} spills, budget {spills}")
        if kernel.shared_bytes > kernel.shared_limit:
            broken.append(f"{name}: {kernel.shared_bytes} bytes of shared memory, limit {kernel.shared_limit}")
        wanted = budgets["matrix_instructions"].get(key.operation)
        found = kernel.matrix_instructions
        if wanted is not None and (wanted[key.target] not in found if key.target in wanted else not found):
            broken.append(f"{name}: no {wanted.get(key.target, 'instruction')} of the matrix units")
    return broken


def enforce(broken: Iterable[str], budgets: dict[str, Any], compiler: str) -> None:
    """Fail for ``broken`` budgets if they were checked with ``compiler``; else warn of each, as its kernels may be in order.

    Raises:
        AssertionError: a budget is broken with a compiler that the file names.
    """
    broken = list(broken)
    if broken and compiler in budgets["compilers"]:
        raise AssertionError(f"over budget with triton {compiler}:\n" + "\n".join(broken))
    for line in broken:
        warnings.warn(f"{unchecked(budgets, compiler)}: {line}", UncheckedCompilerWarning, stacklevel=2)


def unchecked(budgets: dict[str, Any], compiler: str) -> str:
    """What precedes a broken budget that does not count, since no budget was checked with ``compiler``."""
    checked = ", ".join(budgets["compilers"])
    return f"over budget with triton {compiler}, which does not count since budgets were checked with {checked}"


def figures(counted: Count) -> dict[str, float | None]:
    """The figures of a call that have budgets, by the names that budgets give them."""
    return {"bytes": counted.bytes_ratio, "flops": counted.flops_ratio, "launches": len(counted.traffic.launches)}


def _case(key: Key, device: str) -> Case:
    return make_case(key.operation, key.direction, key.size, DTYPES[key.dtype], device)


def _run(case: Case, family: str) -> Any:
    module, _, name = case.call.function.partition(":")
    with mock.patch.object(launch, "architecture_family", lambda device: family):
        return getattr(importlib.import_module(module), name)(**case.call.arguments)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
