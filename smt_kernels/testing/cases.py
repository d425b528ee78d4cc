"""One call of every operation in every direction, which the tests, the audit and the compilation ahead of time all take.

    case = make_case("stream_attention", "forward", 64, torch.bfloat16, "meta")
    compile_ahead([case.call])

On ``"meta"`` a case is compiled, on ``"cpu"`` it is interpreted and counted (``smt_kernels.testing.audit``). Sizes are small,
because the interpreter is slow, but large enough that what is requested per token is what a long call requests. Floating
point inputs are zeros: neither what a kernel compiles to nor what it reads depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smt_kernels.attention_pool.reference import Inputs, Kept, Timeline
from smt_kernels.launch import HEADS
from smt_kernels.stride_memory import kept as memory_kept
from smt_kernels.stride_memory.reference import Inputs as MemoryInputs
from smt_kernels.stride_memory.reference import MemoryWeights, Pass
from smt_kernels.stride_write.kept import CHUNK, layout
from smt_kernels.testing.aot import Call
from smt_kernels.window import WindowSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call of a launcher, and what it must do.

    Attributes:
        call: the launcher and its arguments.
        useful_flops: the products with entries that are visible; 0 where no kernel multiplies matrices.
        tokens: how many tokens of a sequence the call stands for: those that share one window, one write, or one step.
        heads: how many heads of the model it computes; 1 where an operation has none.
        decoding: whether each of ``tokens`` is one step of a row of its own, rather than all of them a sequence.
    """

    call: Call
    useful_flops: int
    tokens: int
    heads: int = 1
    decoding: bool = False


@dataclass(frozen=True)
class Operation:
    """How to make the cases of one operation: its directions, the sizes it is audited at, and what these are sizes of."""

    make: Callable[..., Case] = field(repr=False)
    directions: tuple[str, ...] = ("forward", "backward")
    sizes: tuple[int, ...] = HEADS
    size_of: str = "head"


def make_case(operation: str, direction: str, size: int, dtype: torch.dtype, device: str) -> Case:
    """The case of ``OPERATIONS[operation]`` in one direction, with tensors on ``device``."""
    return OPERATIONS[operation].make(direction, size, dtype, device)


def window_attention(
    direction: str,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    window: int = 65,
    n_queries: int | None = None,
    heads: int = 2,
    kv_heads: int = 2,
    fused: bool = False,
) -> Case:
    """Two whole windows of 15 slots; ``fused`` takes q, k and v as views of one projection."""
    spec, n_windows = WindowSpec(15, window - 15), 2
    n_queries = n_queries or window
    tensor = _maker(dtype, device)
    if fused:
        q, k, v = tensor(n_windows, window, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=2)
        q = q[:, window - n_queries :]
    else:
        q = tensor(n_windows, n_queries, heads, head_dim)
        k, v = (tensor(n_windows, window, kv_heads, head_dim) for _ in range(2))
    counts = {"valid_memory": spec.n_memory, "valid_tokens": spec.n_tokens}
    arguments = {"q": q, "k": k, "v": v, "n_memory": spec.n_memory, "scale": head_dim**-0.5}
    arguments |= {name: torch.full((n_windows,), count, dtype=torch.int32, device=device) for name, count in counts.items()}
    if direction == "backward":
        arguments |= _saved(tensor, n_windows, n_queries, heads, head_dim)
    visible = int(spec.window_visible(n_queries, None, None, torch.device("cpu")).sum()) * n_windows * heads
    call = Call(f"smt_kernels.window_attention.kernels:{direction}", arguments)
    return Case(call, _attention_flops(direction, head_dim, visible), n_windows * spec.stride, heads)


def stream_attention(direction: str, head_dim: int, dtype: torch.dtype, device: str) -> Case:
    """512 steps in the middle of a stream of the default window, with the history and the slots that they see."""
    window, first_step, history, n_queries = WindowSpec(), 256, 64, 512
    first_query, n_keys = first_step + history, history + n_queries
    first_slot = window.visible_slots(first_query)[0]
    n_slots = window.writes_before(first_step + n_keys - 1) - first_slot
    tensor = _maker(dtype, device)
    arguments = {"q": tensor(1, n_queries, 1, head_dim)} | {name: tensor(1, n_keys, 1, head_dim) for name in "kv"}
    arguments |= {name: tensor(1, n_slots, 1, head_dim) for name in ("memory_k", "memory_v")}
    arguments |= {"window": window, "scale": head_dim**-0.5, "first_step": first_step, "first_slot": first_slot}
    if direction == "backward":
        arguments |= _saved(tensor, 1, n_queries, 1, head_dim)
    steps = torch.arange(first_query, first_step + n_keys)
    tokens = window.token_visible(steps, torch.arange(first_step, first_step + n_keys))
    slots = window.slot_visible(steps, torch.arange(first_slot, first_slot + n_slots))
    call = Call(f"smt_kernels.stream_attention.kernels:{direction}", arguments)
    return Case(call, _attention_flops(direction, head_dim, int(tokens.sum() + slots.sum())), n_queries)


def stream_attention_decode(direction: str, head_dim: int, dtype: torch.dtype, device: str) -> Case:
    """One step of two rows whose rings are full."""
    window, n_batch, heads = WindowSpec(), 2, 2
    tensor = _maker(dtype, device)
    arguments = {"q": tensor(n_batch, heads, head_dim)}
    arguments |= {name: tensor(n_batch, window.n_tokens, heads, head_dim) for name in "kv"}
    arguments |= {name: tensor(n_batch, window.n_memory, heads, head_dim) for name in ("memory_k", "memory_v")}
    counts = {"n_tokens": window.n_tokens, "n_slots": window.n_memory}
    arguments |= {name: torch.full((n_batch,), count, dtype=torch.int32, device=device) for name, count in counts.items()}
    call = Call("smt_kernels.stream_attention_decode.kernels:forward", arguments | {"scale": head_dim**-0.5})
    return Case(call, _attention_flops("forward", head_dim, n_batch * heads * window.size), n_batch, heads, decoding=True)


def attention_pool(direction: str, width: int, dtype: torch.dtype, device: str) -> Case:
    """Three single windows, of which entries may be missing, with dropout."""
    rows, window = 3, WindowSpec()
    tensor = _maker(dtype, device)
    exists = torch.ones((rows, window.size), dtype=torch.bool, device=device)
    inputs = Inputs(tensor(rows, window.size, width), None, *_projections(tensor, width), exists, tensor(rows, 1, window.size))
    return _pool_case(direction, inputs, WindowSpec(0, window.size, window.size), Timeline(0, 1, 1, 1, 0), tensor)


def attention_pool_sequence(
    direction: str,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    n_writes: int = 32,
    with_slots: bool = True,
    batch: int = 1,
) -> Case:
    """Writes in the middle of a sequence, in groups of 8, with dropout."""
    window, first_write, group = WindowSpec(), 24, 8
    first_slot = window.pooled_slots(first_write, group)[0]
    n_slots = window.pooled_slots(first_write + n_writes - 1, group)[1] - first_slot
    tensor = _maker(dtype, device)
    tokens = tensor(batch, window.n_tokens + window.stride * (n_writes - 1), width)
    slots = tensor(batch, n_slots, width) if with_slots else None
    inputs = Inputs(tokens, slots, *_projections(tensor, width), None, tensor(batch, n_writes, window.size))
    first_step = window.visible_tokens(window.write_step(first_write))[0]
    timeline = Timeline(first_write, n_writes, group, first_step, first_slot)
    return _pool_case(direction, inputs, window, timeline, tensor)


def linear_cross_entropy(direction: str, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    """The softmax of two rows of logits: their losses alone, or their gradient in place, too; products are the library's."""
    n_rows, n_columns = 2, -(-vocabulary // 64) * 64
    tensor = _maker(dtype, device)
    arguments = {"logits": tensor(n_rows, n_columns), "targets": tensor(n_rows, dtype=torch.int64)}
    arguments |= {"losses": tensor(n_rows, dtype=torch.float32), "n_classes": vocabulary, "ignore_index": -100}
    call = Call(
        "smt_kernels.linear_cross_entropy.kernels:softmax_step", arguments | {"wants_gradient": direction == "gradient"}
    )
    return Case(call, 0, n_rows)


def stride_memory(direction: str, width: int, dtype: torch.dtype, device: str) -> Case:
    """One group of eight writes in the middle of a sequence through one layer of ``width`` channels, as under autocast."""
    window, batch, writes, first_write = WindowSpec(), 1, 8, 24
    inner, model, states, taps, rank = width, width // 2, 16, 4, width // 32
    tensor = _maker(dtype, device)

    def wide(*shape: int) -> Tensor:
        return tensor(*shape, dtype=torch.float32)

    first_step = window.visible_tokens(window.write_step(first_write))[0]
    tokens = tensor(batch, window.n_tokens + window.stride * (writes - 1), model)
    weights = MemoryWeights(
        *_projections(tensor, model),
        norm=wide(1, model),
        in_proj=tensor(1, 2 * inner, model),
        conv_weight=wide(1, inner, taps),
        conv_bias=wide(1, inner),
        x_proj=tensor(1, rank + 2 * states, inner),
        dt_proj=tensor(1, inner, rank),
        dt_bias=wide(1, inner),
        a=wide(1, inner, states),
        d=wide(1, inner),
        out_proj=tensor(1, model, inner),
        norm_f=wide(model),
    )
    states_of = {"conv": (1, batch, inner, taps - 1), "ssm": (1, batch, inner, states)}
    inputs = MemoryInputs(*(wide(*shape) for shape in states_of.values()), None, None)
    slots, timeline = tensor(batch, window.n_memory, model), Timeline(first_write, writes, 8, first_step, first_write - 15)
    run = Pass(tokens, slots, weights, inputs, window, timeline, normalise=True)
    arguments = {"run": run}
    if direction == "backward":
        arguments |= {"grad_slots": wide(batch, writes, model), "grad_pooling": None}
        arguments |= {f"grad_{name}": wide(*shape) for name, shape in states_of.items()}
        arguments |= {"pool_weights": wide(writes, batch, window.size)}
        arguments["buffer"] = wide(memory_kept.layout("triton", run).size)
    return Case(Call(f"smt_kernels.stride_memory.kernels:{direction}", arguments), 0, batch * writes * window.stride)


def stride_write(direction: str, width: int, dtype: torch.dtype, device: str) -> Case:
    """A single write, eight of them, or more than one chunk of the scan, forward or backward, with 16 states and every gate
    on; the SSM state is in fp32.
    """
    batch, states, taps, rank = 1, 16, 4, width // 32
    single, writes = direction == "single", {"single": 1, "forward": 8, "backward": 8}.get(direction, CHUNK + 8)
    tensor = _maker(dtype, device)
    weights = tensor(width, taps), tensor(width), tensor(rank + 2 * states, width), tensor(width, rank), tensor(width)
    weights += tensor(width, states, dtype=torch.float32), tensor(width)
    x, conv_state, ssm_state = _write_states(tensor, batch, writes, width, taps, states)
    arguments = {"x": x, "z": tensor(batch, writes, width), "conv_state": conv_state, "ssm_state": ssm_state}
    arguments |= {"parameters": weights, "gate": torch.ones((batch, writes), dtype=torch.bool, device=device)}
    backward = direction.endswith("backward")
    if backward:
        names = "grad_y", "grad_conv", "grad_ssm"
        arguments |= dict(zip(names, _write_states(tensor, batch, writes, width, taps, states), strict=True))
        size = layout("triton", x, conv_state, rank + 2 * states, states).size
        arguments["buffer"] = tensor(size, dtype=torch.float32)
    call = Call(f"smt_kernels.stride_write.kernels:{'backward' if backward else 'forward'}", arguments)
    return Case(call, 0, batch if single else batch * writes * WindowSpec().stride, decoding=single)


OPERATIONS = {
    "window_attention": Operation(window_attention),
    "stream_attention": Operation(stream_attention),
    "stream_attention_decode": Operation(stream_attention_decode, ("forward",)),
    "attention_pool": Operation(attention_pool, sizes=(256, 768), size_of="width"),
    "attention_pool_sequence": Operation(attention_pool_sequence, sizes=(256, 768), size_of="width"),
    "linear_cross_entropy": Operation(linear_cross_entropy, ("loss", "gradient"), (4096, 50257), "vocabulary"),
    "stride_memory": Operation(stride_memory, sizes=(512, 1536), size_of="width"),
    "stride_write": Operation(
        stride_write, ("single", "forward", "backward", "chunks forward", "chunks backward"), (512, 1536), "width"
    ),
}


def _maker(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return tensor


def _saved(tensor: Callable[..., Tensor], n_rows: int, n_queries: int, heads: int, head_dim: int) -> dict[str, Tensor]:
    """What the backward pass of an attention takes besides its inputs."""
    lse = tensor(n_rows, heads, n_queries, dtype=torch.float32)
    return {
        "grad_out": tensor(n_rows, n_queries, heads, head_dim),
        "out": tensor(n_rows, n_queries, heads, head_dim),
        "lse": lse,
    }


def _write_states(
    tensor: Callable[..., Tensor], batch: int, writes: int, width: int, taps: int, states: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x and both states, or y and both states, or their gradients."""
    ssm_state = tensor(batch, width, states, dtype=torch.float32)
    return tensor(batch, writes, width), tensor(batch, width, taps - 1), ssm_state


def _attention_flops(direction: str, head_dim: int, visible: int) -> int:
    """Scores and values forward; scores, dP, dV, dQ and dK backward."""
    return (2 if direction == "forward" else 5) * 2 * head_dim * visible


def _projections(tensor: Callable[..., Tensor], width: int) -> tuple[Tensor, Tensor]:
    return tensor(width, width), tensor(width, width)


def _pool_case(direction: str, inputs: Inputs, window: WindowSpec, timeline: Timeline, tensor: Callable[..., Tensor]) -> Case:
    """Useful are the products of every entry with mean, scores and sum forward; backward their five gradients."""
    arguments = {"inputs": inputs, "window": window, "timeline": timeline, "normalise": True}
    *rows, entries = inputs.dropout.shape
    width = len(inputs.w_q)
    if direction == "backward":
        arguments |= {"grad_pooled": tensor(*rows, width), "grad_weights": None}
        weights = tensor(*rows, entries, dtype=torch.float32)
        arguments["kept"] = Kept(weights, *(tensor(*rows, width) for _ in range(3)))
    n_windows = torch.Size(rows).numel()
    useful = (3 if direction == "forward" else 5) * 2 * width * entries * n_windows
    call = Call(f"smt_kernels.attention_pool.kernels:{direction}", arguments)
    return Case(call, useful, n_windows * WindowSpec().stride)
