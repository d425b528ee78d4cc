"""The SSM write in plain PyTorch, with its own backward; runs on any device.

Everything is computed for all K writes at once, except the recurrence, which is one operation per write in each direction:

    u = silu(conv(x));  (low, b, c) = W_x u;  dt = softplus(W_dt low + bias);  decay = exp(dt a)
    h_k = decay_k h_{k-1} + dt_k u_k b_k;   y_k = (c_k . h_k + d u_k) silu(z_k)
    dh_k = decay_{k+1} dh_{k+1} + c_k dy_k silu(z_k)

Inside, time comes first and the long dimension last, (K, B, N, E), so that any run of writes is contiguous. The forward pass
holds the states of a few writes at a time, as many as stay in cache, and keeps those before each chunk; the backward pass
recomputes the others, chunk by chunk, but what is of the size of x is kept. Gating: the gated-on writes of each row are moved
to its front, and all K are run without gates; behind them dt = 0 keeps the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smt_kernels.precision import LOG2_E, accumulation, copied
from smt_kernels.stride_write.kept import CHUNK, KeptBlocked, layout
from smt_kernels.stride_write.reference import Weights

# Elements of the states that are worked on at a time. On a CPU they stay in cache and their buffers are reused; elsewhere
# launching costs more than memory.
STATES_ON_CPU, STATES_ELSEWHERE = 2**16, 2**26


def forward(
    x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, parameters: Weights, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z (B, K, E), conv_state (B, E, C - 1), ssm_state (B, E, N), gate (B, K) -> y (B, K, E), both states after K, and
    the buffer that ``backward`` takes.
    """
    weights = Weights(*map(accumulation, parameters))
    sizes = len(weights.x_proj_weight), weights.a.shape[1]
    buffer, kept = layout("blocked", x, conv_state, *sizes).new(x)
    halves = (accumulation(half).transpose(0, 1) for half in (x, z))
    y, new_conv, new_ssm = write(*halves, conv_state, ssm_state, weights, moves_of(gate), kept)
    return _owned(y.transpose(0, 1), x), copied(new_conv, conv_state), copied(new_ssm, ssm_state), buffer


def write(
    x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: Weights, moves: Moves | None, kept: KeptBlocked
) -> tuple[Tensor, Tensor, Tensor]:
    """x, z (K, B, E), weights in the accumulation dtype -> y (K, B, E), both states, (B, E, .), after K; fills ``kept``."""
    n_writes, rank = len(x), weights.dt_proj_weight.shape[1]
    torch.cat([accumulation(conv_state).permute(2, 0, 1), _to_front(x, moves)], out=kept.inputs)
    taps = weights.conv_weight.T[:, None, None]
    torch.sum(_by_tap(kept.inputs, n_writes) * taps, dim=0, out=kept.conv).add_(weights.conv_bias)
    torch.ops.aten.silu.out(kept.conv, out=kept.u)
    torch.matmul(kept.u, weights.x_proj_weight.T, out=kept.projected)
    torch.matmul(kept.projected[..., :rank], weights.dt_proj_weight.T, out=kept.dt_input).add_(weights.dt_proj_bias)
    torch.ops.aten.softplus.out(kept.dt_input, out=kept.dt)
    if moves is not None:
        kept.dt.masked_fill_(moves.behind, 0.0)

    scan = _Scan(kept, weights.a)
    initial = accumulation(ssm_state).mT
    torch.mul(kept.u, weights.d, out=kept.inner)
    states, decay = scan.buffers(scan.at_once)
    states[0] = initial
    for index, chunk in enumerate(scan.chunks()):
        kept.starts[index : index + 1] = states[0]  # which is empty where one chunk is all
        for part in scan.parts(chunk):
            size = part.stop - part.start
            scan.run(part, states[: size + 1], decay[:size])
            kept.inner[part] += _rows(scan.c[part], states[1 : size + 1])
            if part.stop < n_writes:
                states[0] = states[size]
    y = kept.inner * F.silu(_to_front(z, moves))
    new_conv, new_ssm = kept.inputs[n_writes:], states[size]
    if moves is not None:
        new_conv = kept.inputs.gather(0, moves.conv_rows(conv_state))
        new_ssm = torch.where(moves.count[0, :, :, None] > 0, new_ssm, initial)  # bit for bit, even the sign of a zero
    return _to_place(y, moves), new_conv.permute(1, 2, 0), new_ssm.mT


def backward(
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    buffer: Tensor,
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    parameters: Weights,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, z, conv_state, ssm_state and of each of ``Weights``, each in the dtype of its input."""
    weights = Weights(*map(accumulation, parameters))
    kept = layout("blocked", x, conv_state, len(weights.x_proj_weight), weights.a.shape[1]).of(buffer)
    grad, z_wide = (accumulation(tensor).transpose(0, 1) for tensor in (grad_y, z))
    starts = kept.starts if len(kept.starts) else accumulation(ssm_state).mT[None]
    found = write_backward(grad, grad_conv, grad_ssm, z_wide, starts, weights, moves_of(gate), kept)
    low = kept.projected[..., : weights.dt_proj_weight.shape[1]]
    grads = (
        found.x.transpose(0, 1).clone(),  # it is a part of two gradients, and none may share memory
        found.z.transpose(0, 1),
        found.conv_state.permute(1, 2, 0).clone(),
        found.ssm_state.mT,
        found.conv_weight,
        found.conv.sum((0, 1)),
        found.projected.flatten(0, 1).T @ kept.u.flatten(0, 1),
        found.dt_input.flatten(0, 1).T @ low.flatten(0, 1),
        found.dt_input.sum((0, 1)),
        found.a.mT,
        found.d,
    )
    inputs = x, z, conv_state, ssm_state, *parameters
    return tuple(_owned(grad, model) for grad, model in zip(grads, inputs, strict=True))


class WriteGradients(NamedTuple):
    """Those of activations, from which those of the larger weights are products, and of the smaller weights."""

    x: Tensor  # (K, B, E)
    z: Tensor  # (K, B, E)
    conv_state: Tensor  # (C - 1, B, E)
    ssm_state: Tensor  # (B, N, E)
    conv: Tensor  # (K, B, E); this, projected and dt_input lie as what is kept does
    projected: Tensor  # (K, B, R + 2 N)
    dt_input: Tensor  # (K, B, E)
    conv_weight: Tensor  # (E, C)
    a: Tensor  # (N, E)
    d: Tensor  # (E,)


def write_backward(
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    z: Tensor,
    starts: Tensor,
    weights: Weights,
    moves: Moves | None,
    kept: KeptBlocked,
) -> WriteGradients:
    """From grad_y (K, B, E) and those of both states, (B, E, .); starts (chunks, B, N, E), the states before each chunk, z and
    weights in the accumulation dtype.
    """
    rank = weights.dt_proj_weight.shape[1]
    z, grad = _to_front(z, moves), _to_front(grad_y, moves)
    dz = torch.ops.aten.silu_backward(grad * kept.inner, z)
    d_inner = grad * F.silu(z)
    d_projected = torch.empty_like(kept.projected)
    d_scan = _Scan(kept, weights.a).backward(starts, d_inner, grad_ssm, d_projected[..., rank:])
    d_dt = d_scan.dt.addcmul_(d_scan.written, kept.u)
    if moves is not None:
        d_dt.masked_fill_(moves.behind, 0.0)
    d_dt = torch.ops.aten.softplus_backward(d_dt, kept.dt_input, 1.0, 20.0)
    torch.matmul(d_dt, weights.dt_proj_weight, out=d_projected[..., :rank])
    du = (d_projected @ weights.x_proj_weight).addcmul_(d_inner, weights.d).addcmul_(d_scan.written, kept.dt)
    d_conv = torch.ops.aten.silu_backward(du, kept.conv)
    d_inputs, d_conv_weight = _conv_backward(d_conv, kept.inputs, weights.conv_weight, grad_conv, moves)
    history = len(d_inputs) - len(z)
    return WriteGradients(
        x=_to_place(d_inputs[history:], moves),
        z=_to_place(dz, moves),
        conv_state=d_inputs[:history],
        ssm_state=d_scan.initial,
        conv=d_conv,
        projected=d_projected,
        dt_input=d_dt,
        conv_weight=d_conv_weight,
        a=d_scan.a,
        d=(d_inner * kept.u).sum((0, 1)),
    )


class Moves(NamedTuple):
    """How the gated-on writes of each row are moved to its front and back."""

    off: Tensor  # (K, B, 1), where the gate is off
    behind: Tensor  # (K, B, 1), which places are left behind the moved writes
    count: Tensor  # (1, B, 1), gated-on writes
    to_front: Tensor | None  # (K, B, 1), which write comes to each place; None where K = 1 leaves no choice
    to_place: Tensor | None  # (K, B, 1), where each gated-on write has gone

    def conv_rows(self, conv_state: Tensor) -> Tensor:
        """Which conv inputs are the conv state of each row after its gated-on writes, (C - 1, B, E)."""
        batch, width, history = conv_state.shape
        return (self.count + torch.arange(history, device=conv_state.device)[:, None, None]).expand(-1, batch, width)


def moves_of(gate: Tensor | None) -> Moves | None:
    """How the writes of ``gate`` (B, K) are moved; None where all happen."""
    if gate is None:
        return None
    gate = gate.T[..., None]
    off = ~gate
    if len(gate) == 1:
        return Moves(off, off, gate.long(), None, None)
    passed = gate.cumsum(0)
    behind = torch.arange(len(gate), device=gate.device)[:, None, None] >= passed[-1:]
    return Moves(off, behind, passed[-1:], off.to(torch.uint8).argsort(dim=0, stable=True), (passed - 1).clamp_(min=0))


def _to_front(x: Tensor, moves: Moves | None) -> Tensor:
    """x (K, B, E), each row's gated-on writes first and zeros behind them."""
    if moves is None:
        return x
    x = x.masked_fill(moves.off, 0.0)
    return x if moves.to_front is None else x.gather(0, moves.to_front.expand_as(x))


def _to_place(x: Tensor, moves: Moves | None) -> Tensor:
    """The inverse of ``_to_front``: back in place, and 0 where the gate is off."""
    if moves is not None:
        x = x if moves.to_place is None else x.gather(0, moves.to_place.expand_as(x))
        x = x.masked_fill(moves.off, 0.0)
    return x


class _ScanGradients(NamedTuple):
    """Gradients of what the recurrence takes; ``dt`` only as far as it goes through the decay."""

    dt: Tensor  # (K, B, E)
    written: Tensor  # (K, B, E)
    a: Tensor  # (N, E)
    initial: Tensor  # (B, N, E)


class _Scan:
    """The recurrence h_k = exp(dt_k a) h_{k-1} + b_k written_k with written = dt u, over a few writes at a time."""

    def __init__(self, kept: KeptBlocked, a: Tensor) -> None:
        n_state = a.shape[1]
        self.dt, self.written = kept.dt, kept.dt * kept.u
        self.b, self.c = kept.projected[..., -2 * n_state :].chunk(2, dim=-1)
        self.a = a.mT.contiguous()  # (N, E)
        self.at_once = _writes_at_once(self.dt.transpose(0, 1), n_state)

    def chunks(self) -> list[slice]:
        """The writes in runs of at most ``CHUNK``, oldest first."""
        return _runs(slice(0, len(self.dt)), CHUNK)

    def parts(self, chunk: slice) -> list[slice]:
        """Those of a chunk in runs of at most ``at_once``, oldest first."""
        return _runs(chunk, self.at_once)

    def buffers(self, n_writes: int) -> tuple[Tensor, Tensor]:
        """Room for the states (the one before the first write in front) and the decays of ``n_writes``."""
        shape = self.dt.shape[1], *self.a.shape
        return self.dt.new_empty(n_writes + 1, *shape), self.dt.new_empty(n_writes, *shape)

    def run(self, part: slice, states: Tensor, decay: Tensor) -> None:
        """Fill states[1:] and decay for the writes ``part``, from the state before them in states[0]."""
        # exp2 is vectorised on CPUs where exp is not, and takes a third of its time.
        torch.mul(self.dt[part][:, :, None], self.a * LOG2_E, out=decay).exp2_()
        torch.mul(self.b[part][..., None], self.written[part][:, :, None], out=states[1:])
        previous, *following = states.unbind(0)
        for state, factor in zip(following, decay.unbind(0), strict=True):
            previous = state.addcmul_(factor, previous)

    def backward(self, starts: Tensor, d_inner: Tensor, grad_ssm: Tensor | None, d_b_and_c: Tensor) -> _ScanGradients:
        """starts (chunks, B, N, E), the states before each chunk, d_inner (K, B, E), grad_ssm (B, E, N); fills d_b_and_c
        (K, B, 2 N).
        """
        d_dt, d_written, d_a = torch.empty_like(self.dt), torch.empty_like(self.dt), []
        d_b, d_c = d_b_and_c.chunk(2, dim=-1)
        later = None if grad_ssm is None else accumulation(grad_ssm).mT  # what reaches the last state of a part from behind
        states, decay = self.buffers(min(CHUNK, len(self.dt)))
        buffer = states.new_empty(self.at_once, *states.shape[1:])
        for start, chunk in zip(reversed(starts), reversed(self.chunks()), strict=True):
            states[0] = start
            d_a.append(torch.zeros_like(self.a))
            parts = [(part, slice(part.start - chunk.start, part.stop - chunk.start)) for part in self.parts(chunk)]
            for part, here in parts:
                self.run(part, states[here.start : here.stop + 1], decay[here])
            for part, here in reversed(parts):
                factors, grad = decay[here], buffer[: here.stop - here.start]
                torch.mul(self.c[part][..., None], d_inner[part][:, :, None], out=grad)
                steps = list(grad.unbind(0))
                if later is not None:
                    steps[-1].add_(later)
                following = steps.pop()
                for step, factor in zip(reversed(steps), reversed(factors.unbind(0)), strict=False):
                    following = step.addcmul_(factor, following)
                d_written[part] = _rows(self.b[part], grad)
                d_b[part] = _rows(self.written[part], grad.mT)
                d_c[part] = _rows(d_inner[part], states[1:][here].mT)
                later = grad.mul_(factors)[0].clone()
                grad.mul_(states[here])  # now the gradient of dt a
                d_a[-1] += torch.mul(grad, self.dt[part][:, :, None], out=factors).sum((0, 1))
                torch.sum(grad.mul_(self.a), dim=2, out=d_dt[part])
        return _ScanGradients(d_dt, d_written, d_a[0] if len(d_a) == 1 else torch.stack(d_a).sum(0), later)


def _runs(writes: slice, at_most: int) -> list[slice]:
    """Writes in runs of ``at_most``, oldest first."""
    return [slice(start, min(start + at_most, writes.stop)) for start in range(writes.start, writes.stop, at_most)]


def _writes_at_once(x: Tensor, n_state: int) -> int:
    """How many of the writes x (B, K, E) are worked on at a time."""
    batch, n_writes, width = x.shape
    elements = STATES_ON_CPU if x.device.type == "cpu" else STATES_ELSEWHERE
    return min(max(elements // (batch * width * n_state), 1), n_writes)


def _rows(vectors: Tensor, matrices: Tensor) -> Tensor:
    """vectors (K, B, X) times matrices (K, B, X, Y), as rows: on CPUs several times faster than transposed, with columns."""
    return (vectors[:, :, None] @ matrices)[:, :, 0]


def _by_tap(inputs: Tensor, n_writes: int) -> Tensor:
    """inputs (C - 1 + K, B, E) as the convolution sees them, (C, K, B, E): tap c of write k is input c + k."""
    return inputs.unfold(0, n_writes, 1).permute(0, 3, 1, 2)


def _conv_backward(
    d_conv: Tensor, inputs: Tensor, conv_weight: Tensor, grad_conv: Tensor | None, moves: Moves | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the conv inputs (C - 1 + K, B, E) and weight (E, C), from d_conv (K, B, E) and that of the new state."""
    n_writes, n_taps = len(d_conv), conv_weight.shape[1]
    # Input i reaches write i - c through tap c: the convolution with its taps reversed.
    reached = _by_tap(F.pad(d_conv, (0, 0, 0, 0, n_taps - 1, n_taps - 1)), len(inputs))
    d_inputs = (reached * conv_weight.flip(1).T[:, None, None]).sum(0)
    if grad_conv is not None:
        d_state = accumulation(grad_conv).permute(2, 0, 1)
        if moves is None:
            d_inputs[n_writes:] += d_state
        else:
            d_inputs.scatter_add_(0, moves.conv_rows(grad_conv), d_state)
    return d_inputs, (_by_tap(inputs, n_writes) * d_conv).sum((1, 2)).T


def _owned(x: Tensor, model: Tensor) -> Tensor:
    """x, which nobody else holds, contiguous in the dtype of ``model``."""
    return x.to(model.dtype).contiguous()
