"""Which backend runs is what was asked for, never silently another; ``test_import.py`` does without triton and a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from smt_kernels import (
    BACKENDS,
    BackendChoice,
    WindowSpec,
    attention_pool_sequence,
    backends,
    last_choice,
    launch,
    stream_attention,
    stream_attention_decode,
    use_backend,
    window_attention,
)

TRITON = pytest.param("triton", marks=pytest.mark.triton)


def call(operation: str, head_dim: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu", **options) -> Tensor:
    """The smallest call of an attention operation."""
    q, k, v = torch.randn(3, 1, 4, 1, head_dim, device=device).to(dtype)
    if operation == "window_attention":
        return window_attention(q, k, v, n_memory=1, **options)
    if operation == "stream_attention":
        return stream_attention(q, k, v, k, v, window=WindowSpec(1, 2, 2), **options)
    counts = torch.ones(1, dtype=torch.int32, device=device)
    return stream_attention_decode(q[:, 0], k, v, k, v, n_tokens=counts, n_slots=counts, **options)


ATTENTIONS = ("window_attention", "stream_attention", "stream_attention_decode")


def run(device: str = "cpu", backend: str | None = None, operation: str = "window_attention") -> BackendChoice:
    call(operation, device=device, backend=backend)
    return last_choice(operation)


@pytest.mark.parametrize("operation", ATTENTIONS)
def test_cpu_tensors_run_blocked_and_the_reason_is_told(operation):
    choice = run(operation=operation)
    assert choice.operation == operation and choice.backend == "blocked"
    assert choice.reason == "the tensors are on cpu, and Triton kernels are for CUDA devices"


@pytest.mark.parametrize("name", ["reference", "blocked", TRITON])
@pytest.mark.parametrize("operation", ATTENTIONS)
def test_the_argument_decides_before_use_backend(operation, name, device):
    with use_backend("reference" if name != "reference" else "blocked"):
        choice = run(device, name, operation)
    assert (choice.backend, choice.reason) == (name, "asked for by the backend argument")


@pytest.mark.parametrize("name", ["reference", "blocked", TRITON])
def test_use_backend_holds_inside_its_block_only(name, device):
    before = run(device)
    with use_backend(name):
        choice = run(device)
        assert (choice.backend, choice.reason) == (name, "asked for by use_backend")
        with use_backend(None):
            assert run(device) == before
        assert run(device).backend == name
    assert run(device) == before


def test_use_backend_is_undone_by_an_exception():
    before = run()
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert run() == before


def test_use_backend_holds_in_its_thread_only():
    """Two threads whose blocks overlap, neither of which may see, or leave behind, what the other asks for."""
    both_inside, one_outside = threading.Barrier(2), threading.Event()
    before = run()

    def outer() -> list[str]:
        with use_backend("reference"):
            both_inside.wait(timeout=60)
            found = [backends.choose("window_attention", torch.ones(1, 1), None)]
        one_outside.set()
        return [*found, backends.choose("window_attention", torch.ones(1, 1), None)]  # ``last_choice`` is of all threads

    def inner() -> list[str]:
        with use_backend("blocked"):
            both_inside.wait(timeout=60)
            assert one_outside.wait(timeout=60)
            found = [backends.choose("window_attention", torch.ones(1, 1), None)]
            with use_backend("reference"):
                return [*found, backends.choose("window_attention", torch.ones(1, 1), None)]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(outer), pool.submit(inner)
        assert one.result() == ["reference", before.backend] and other.result() == ["blocked", "reference"]
    assert run() == before


def test_compiled_code_follows_use_backend():
    q, k, v = torch.randn(3, 1, 4, 1, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: window_attention(q, k, v, n_memory=1), fullgraph=True, backend="eager")
    for name in ("reference", "blocked", None, "reference"):
        with use_backend(name):
            compiled(q)
            assert last_choice("window_attention").backend == (name or "blocked")


@pytest.mark.triton(launches=False)
@pytest.mark.parametrize(
    "capability, backend", [((7, 0), "blocked"), ((7, 5), "blocked"), ((8, 0), "triton"), ((9, 0), "triton")]
)
def test_gpus_before_ampere_run_blocked_and_say_why(capability, backend, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "compute_capability", lambda device: capability)
    example = torch.empty(1, 4, 1, 16, device="meta")
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=example.dtype, shape=example.shape)
    for operation in backends.TRITON_LIMITS:
        choice = backends.automatic_choice(operation, on_gpu)
        assert choice.backend == backend
        if backend == "blocked":
            assert choice.reason == f"compute capability 7.{capability[1]}; kernels need 8.0"


def test_use_backend_works_without_a_block():
    use_backend("reference")
    try:
        assert run().backend == "reference"
    finally:
        use_backend(None)
    assert run().backend == "blocked"


def test_an_unknown_name_is_refused_with_the_known_ones():
    message = "backend must be one of triton, blocked, reference, got 'cuda'"
    with pytest.raises(ValueError, match=message):
        use_backend("cuda")
    with pytest.raises(ValueError, match=message):
        run(backend="cuda")
    assert BACKENDS == ("triton", "blocked", "reference")


@pytest.mark.triton
@pytest.mark.parametrize("operation", ATTENTIONS)
def test_triton_refuses_a_dtype_that_its_kernel_does_not_take(operation, device):
    with pytest.raises(TypeError, match=r"asked for by the backend argument, but dtype torch.float64 is not one"):
        call(operation, dtype=torch.float64, device=device, backend="triton")


@pytest.mark.triton
@pytest.mark.parametrize("operation", ATTENTIONS)
def test_triton_refuses_a_head_that_its_kernel_does_not_take(operation, device):
    with pytest.raises(ValueError, match="its kernel takes a last dimension of at most 256, got 257"):
        call(operation, head_dim=257, device=device, backend="triton")
    call(operation, head_dim=257, device=device)
    assert last_choice(operation).backend == "blocked"


@pytest.mark.triton(launches=False)
@pytest.mark.parametrize("operation", ATTENTIONS)
def test_the_limit_of_a_kernel_is_that_of_its_launch_table(operation):
    assert backends.TRITON_LIMITS[operation] == launch.HEADS[-1]


def test_no_choice_is_known_before_the_first_call():
    assert last_choice("an operation that never ran") is None


WITHOUT_THE_INTERPRETER = """
import os
import torch
from smt_kernels import window_attention
q, k, v = torch.randn(3, 1, 20, 1, 16).bfloat16()
try:
    window_attention(q, k, v, n_memory=1, backend="triton")
except ValueError as error:
    print(error)
try:
    import smt_kernels.testing.interpreter
except RuntimeError as error:
    print(error)
os.environ["TRITON_INTERPRET"] = "1"
out, expected = (window_attention(q, k, v, n_memory=1, backend=name).float() for name in ("triton", "blocked"))
assert (out - expected).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
"""


@pytest.mark.triton(launches=False)
def test_triton_on_a_cpu_says_how_to_get_the_interpreter_which_is_right_without_the_testing_kit():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", WITHOUT_THE_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    of_the_call, of_the_kit = done.stdout.splitlines()
    assert "backend 'triton' was asked for by the backend argument, but the tensors are on cpu" in of_the_call
    assert "set TRITON_INTERPRET=1 before the first import of triton" in of_the_call
    assert of_the_kit.startswith("smt_kernels.testing.interpreter needs TRITON_INTERPRET=1, set before the first import")


@pytest.mark.parametrize("backend", ["reference", "blocked", TRITON])
def test_autocast_does_not_reach_into_an_operation(backend, device):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    tokens, w_q, w_k = random(2, 40, 16), random(16, 16), random(16, 16)
    q, k, v, memory_k, memory_v = random(1, 40, 2, 16), random(1, 40, 2, 16), random(1, 40, 2, 16), *random(2, 1, 2, 2, 16)
    window = WindowSpec(n_memory=2, n_tokens=20, stride=16)
    writes = {"window": window, "first_write": 0, "n_writes": 2}

    def results(*, autocast):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            assert ((tokens @ w_q).dtype == torch.bfloat16) == autocast
            pooled, weights = attention_pool_sequence(tokens, None, w_q, w_k, **writes, backend=backend)
            streamed = stream_attention(q, k, v, memory_k, memory_v, window=window, backend=backend)
            outputs = pooled, weights, streamed, window_attention(q, k, v, n_memory=2, backend=backend)
        total = sum(out.square().sum() for out in outputs)
        return *outputs, *torch.autograd.grad(total, (tokens, w_q, w_k, q, k, v, memory_v))

    for one, other in zip(results(autocast=False), results(autocast=True), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
