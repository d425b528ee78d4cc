"""``model.compile()``: one program for all layers, one for the memory, none anew from chunk to chunk, and the same numbers."""

from __future__ import annotations

import copy
import subprocess
import sys

import graph_steps
import pytest
import torch

from smt import SMTConfig, StrideMemoryTransformer
from smt_kernels import backends

CHUNKS, LENGTH = 20, 16


def build(**switches):
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=37, d_model=16, d_k=16, transformer_n_layers=2, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4,
        initializer_range=0.3, n_ssm_outputs=3, m_input_tokens=12, stride=4, write_group=2, encoding="stream", dropout=0.0,
    )  # fmt: skip
    return StrideMemoryTransformer(SMTConfig(**{**sizes, **switches}))


class Programs:
    """A backend of ``torch.compile`` that runs what it is given, and tells how often that was."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs, **options):
        self.count += 1
        return graph


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def walk(model, ids, after=lambda: None):
    """Losses and gradients of the chunks of ids (B, T), one after the other, on the state carried."""
    state, found = None, []
    for chunk in ids.split(LENGTH, dim=1):
        loss, aux = model.loss(chunk, state=state)
        loss.backward()
        state = aux.state.detach()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        model.zero_grad()
        after()
    return found


def test_no_chunk_but_the_first_three_compiles_anything():
    programs, counts = Programs(), []
    model, ids = build(), torch.randint(37, (2, CHUNKS * LENGTH))
    expected = walk(copy.deepcopy(model), ids)
    model.compile(backend=programs, mode="reduce-overhead", fullgraph=True)
    found = walk(model, ids, lambda: counts.append(programs.count))
    # One program for three layers, and one for the memory, which is to be a graph; one more of each where there is a past.
    assert counts[0] == 2 and counts[2:] == counts[2:3] * (CHUNKS - 2) and counts[2] <= 6
    for (loss, gradients), (expected_loss, expected_gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_what_other_operations_have_chosen_compiles_nothing_anew(monkeypatch):
    monkeypatch.setattr(backends, "_last", type(backends._last)())  # as in a fresh process
    programs = Programs()
    model, ids = build(), torch.randint(37, (2, LENGTH))
    model.compile(backend=programs, mode="reduce-overhead")
    for _ in range(3):
        model.loss(ids)[0].backward()
        assert programs.count == 2, "one for three layers, one for the memory"
    choices = [backends.last_choice(name).backend for name in ("stride_memory", "stream_attention", "linear_cross_entropy")]
    assert choices == ["blocked"] * 3


@pytest.mark.parametrize("encoding", ["stride", "stream"])
def test_with_graphs_the_state_lies_in_memory_that_no_graph_overwrites(encoding):
    returned = []  # by compiled code, whose next run overwrites it where it is a graph

    def backend(graph, inputs, **options):
        def run(*arguments):
            results = graph(*arguments)
            returned.extend(result for result in results if isinstance(result, torch.Tensor))
            return results

        return run

    model = build(encoding=encoding)
    model.compile(backend=backend, mode="reduce-overhead")
    state = None
    for chunk in torch.randint(37, (2, 3 * LENGTH)).split(LENGTH, dim=1):
        _, aux = model.loss(chunk, state=state)
        state = aux.state
        places = {tensor.untyped_storage().data_ptr() for tensor in returned}
        held = {name: value for name, value in vars(state).items() if isinstance(value, torch.Tensor) and value.numel()}
        assert {"tokens", "slots", "conv", "ssm"} <= set(held) and returned
        for name, tensor in held.items():
            assert tensor.untyped_storage().data_ptr() not in places, name


def test_without_graphs_only_layers_are_compiled_and_a_copy_is_not():
    programs = Programs()
    model = build(encoding="stride")
    model.compile(backend=programs)
    ids = torch.randint(37, (1, 24))
    expected = copy.deepcopy(model).loss(ids)[0]
    assert programs.count == 0
    torch.testing.assert_close(model.loss(ids)[0], expected)
    assert programs.count == 2, "the last layer has fewer queries than the others"


@pytest.mark.cuda
@pytest.mark.native
def test_on_a_gpu_steps_with_graphs_equal_those_without_on_chunks_that_go_on():
    done = subprocess.run([sys.executable, graph_steps.__file__, "cuda"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
