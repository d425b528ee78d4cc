"""What every test runs under: the device, the interpreter where there is no GPU, threads, one seed per test.

Without a CUDA device, Triton kernels run in their interpreter, mended by ``smt_kernels.testing.interpreter``; with one,
they run natively, and ``TRITON_INTERPRET=1 pytest`` asks for the interpreter all the same. Five markers name needs:

    triton        triton must be installed (every parametrisation with the triton backend carries it)
    interpreter   kernels must be interpreted, because their memory accesses are counted
    cuda          kernels must run natively
    mamba         mamba-ssm and causal-conv1d must be installed
    null_gpu      the null GPU, on which the host's side of a GPU runs, must be possible

A test whose need is not met is deselected, and the last lines of the report say how many and why. A sixth names a choice:
``pytest -m native`` is every kernel in every dtype and mode, with few distinct ones to compile.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import random
import re
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import deprecations
import pytest
import torch

from smt_kernels.testing import null_gpu

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MAMBA_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))
NO_NULL_GPU = null_gpu.missing()

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before tests/conftest.py could set TRITON_INTERPRET=1; set it yourself")
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import smt_kernels.testing.interpreter  # noqa: F401  (bfloat16 is wrong without it)

# Workers run the tests side by side: a thread each is faster than two threads in turns.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
_NEEDS = {
    "triton": (TRITON_INSTALLED, "triton is not installed"),
    "cuda": (DEVICE == "cuda", "no kernel runs natively here"),
    "mamba": (MAMBA_INSTALLED, "mamba-ssm or causal-conv1d is not installed"),
    "null_gpu": (NO_NULL_GPU is None, f"no null GPU: {NO_NULL_GPU}"),
    "interpreter": (INTERPRETED, "kernels run natively here; set TRITON_INTERPRET=1 to count what they read and write"),
}
# Begun first, so that no worker is long at work when the others have ended.
LONGEST = ("test_kernel_budgets.py", "test_distributed.py", "test_resume.py", "test_null_gpu.py")
_deselected: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="other inputs for every test; a failure prints its seed")
    parser.addoption(
        "--every-target", action="store_true", help="compile kernels of all sizes for all four targets, not for sm_90"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Of triton 3.6's interpreter, for every number that it takes out of a block: 16,000, each sent from process to process.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning:triton")
    for line in deprecations.filters():
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """From two to four, as there are cores; where kernels are compiled for a GPU, which is most of the time there, up to 14."""
    cores = os.cpu_count() or 2
    return max(2, min(4, cores) if DEVICE == "cpu" else min(14, cores - 2))


def pytest_report_header() -> str:
    triton = "interpreted" if INTERPRETED else "native" if TRITON_INSTALLED else "not installed"
    return f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}, triton {triton}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    astray = [item.nodeid for item in items if _launches_kernels(item) and "device" not in item.fixturenames]
    if astray:
        raise pytest.UsageError(
            "these tests ask for triton and not for the fixture 'device', and would hand a GPU's kernels tensors of the CPU "
            "(triton(launches=False) marks those that launch none):\n" + "\n".join(astray)
        )
    kept, dropped = [], []
    for item in items:
        unmet = [reason for name, (met, reason) in _NEEDS.items() if not met and item.get_closest_marker(name)]
        _deselected.update(unmet[:1])
        (dropped if unmet else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = sorted(kept, key=lambda item: item.path.name not in LONGEST)


def _launches_kernels(item: pytest.Item) -> bool:
    """Whether a test that also runs natively launches kernels, by its markers or by the backend that its body names."""
    if item.get_closest_marker("interpreter"):
        return False
    if marker := item.get_closest_marker("triton"):
        return marker.kwargs.get("launches", True)
    return _names_triton(inspect.unwrap(item.function))  # what hypothesis made of a function has its own source at the end


@functools.cache
def _names_triton(function: Callable) -> bool:
    return bool(re.search(r"""(backend=|use_backend\()"triton\"""", inspect.getsource(function)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, count in _deselected.items():
        terminalreporter.write_line(f"{count} tests deselected: {reason}", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """As in a terminal: a shell in the background, or nohup, has processes ignore signals, and those that they start."""
    for name, meaning in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}.items():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, meaning)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens and tokenizers are kept for this session, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    """Fails a test by which we call what a library logs to be deprecated; where it warns of it, filters make that an error."""
    with deprecations.logged() as messages:
        yield
    assert not messages


@pytest.fixture(scope="session")  # so that tests of hypothesis may take it
def device() -> str:
    """Where the tests of this run put their tensors: ``cuda`` when kernels run natively, else ``cpu``."""
    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def no_power_is_lost() -> Iterator[None]:
    """Files are not waited for until they are on the disk, which takes a hundredth of a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds Python and torch from the name of the test and ``--seed``; a failing test prints it."""
    base = request.config.getoption("--seed")
    value = zlib.crc32(request.node.nodeid.encode()) ^ base
    random.seed(value)
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    request.node.add_report_section("setup", "seed", f"seed {value} (--seed {base})")
    return value
