"""Error budgets: a kernel may err at most twice as much as plain PyTorch of the same precision; and poisoned memory.

    max |actual - exact| <= 2 max(|plain - exact|, |rounded - exact|) + eps(dtype) |exact|

``exact`` comes from the reference in fp64 and ``plain`` from the reference in the precision of the kernel, on the same inputs.
This is the rule of the FlashAttention tests. Plain PyTorch can be exact by luck, for example where only one key is visible or
a sum has one term. ``rounded`` is therefore the reference in fp64 with each of its operations off by the rounding of fp32 that
it must make (``smt_kernels.testing.rounding``), derived from the formula and the inputs, not from an implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from smt_kernels.testing.rounding import Rounding

Results = Mapping[str, Tensor]

# Of a single number one draw of signs may cancel, of four hardly.
DRAWS = 4


def assert_within_budget(actual: Results, exact: Results | Callable[[], Results], plain: Results) -> None:
    """Check every named result of one computation against the budget above.

    Args:
        actual: results of the implementation under test.
        exact: computes the same results by the reference in float64; it is called again, for ``rounded``, where plain PyTorch
            alone does not allow the error. If it is results instead, there is no ``rounded``.
        plain: the same results from the reference in the dtype of ``actual``.

    Raises:
        AssertionError: a result is missing, has another shape or dtype, is not finite where the exact one is, or is over
            budget; the message states every error of the computation.
        TypeError: ``exact`` is not float64.
    """
    compute, exact = (exact, exact()) if callable(exact) else (None, exact)
    assert actual.keys() == exact.keys() == plain.keys(), f"results differ: {list(actual)}, {list(exact)}, {list(plain)}"
    for name, value in actual.items():
        if exact[name].dtype != torch.float64:
            raise TypeError(f"exact[{name!r}] must be float64, got {exact[name].dtype}")
        assert value.shape == exact[name].shape, f"{name} has shape {tuple(value.shape)}, expected {tuple(exact[name].shape)}"
        assert value.dtype == plain[name].dtype, f"{name} has dtype {value.dtype}, expected {plain[name].dtype}"
    errors, plain_errors = _errors(actual, exact), _errors(plain, exact)
    one_rounding = {name: torch.finfo(x.dtype).eps * _largest(exact[name]) for name, x in actual.items()}
    rounded = dict.fromkeys(actual, 0.0)

    def over_budget() -> list[str]:
        return [n for n in actual if not errors[n] <= 2 * max(plain_errors[n], rounded[n]) + one_rounding[n]]

    if compute is not None and over_budget():
        for seed in range(DRAWS):
            with Rounding(seed):
                unlucky = compute()
            rounded = {name: max(rounded[name], error) for name, error in _errors(unlucky, exact).items()}
    lines = [
        f"{n}: error {errors[n]:.3e}, plain PyTorch {plain_errors[n]:.3e}, rounding of the formula {rounded[n]:.3e}, "
        f"budget {2 * max(plain_errors[n], rounded[n]) + one_rounding[n]:.3e}"
        for n in actual
    ]
    assert not over_budget(), f"over budget: {', '.join(over_budget())}\n" + "\n".join(lines)


def assert_equal_in_double(actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, terms: int) -> None:
    """Check float64 results that differ from ``exact`` only in the order of sums of at most ``terms`` terms.

    Such sums differ by at most ``2 * terms * eps`` times the sum of their terms' magnitudes (Higham, Accuracy and Stability of
    Numerical Algorithms, section 4.2), here bounded by ``terms`` times the largest result, or 1.

    Raises:
        AssertionError: a result is missing, or off by more than that.
    """
    assert actual.keys() == exact.keys(), f"results differ: {list(actual)}, {list(exact)}"
    for name, value in actual.items():
        bound = 2 * terms**2 * torch.finfo(torch.float64).eps * max(1.0, _largest(exact[name]))
        error = _largest_error(value, exact[name])
        assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}"


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that ``torch.empty`` and its kin allocate holds NaN (the largest integer for integer dtypes).

    A kernel that leaves part of its output unwritten then shows. Works by PyTorch's deterministic mode, in which operations
    without a deterministic form warn.
    """
    mode, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return finite.abs().max().item() if finite.numel() else 0.0


def _errors(results: Results, exact: Results) -> dict[str, float]:
    return {name: _largest_error(results[name], value) for name, value in exact.items()}


def _largest_error(x: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite entries must agree exactly, and a NaN is an infinite error."""
    x, exact = x.detach().double().cpu(), exact.detach().cpu()
    same = x == exact
    difference = torch.where(same, 0.0, (x - exact).abs())
    return torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf")).max().item() if x.numel() else 0.0
