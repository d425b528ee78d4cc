"""The SSM write in plain PyTorch, with its own backward; runs on any device.

Everything is computed for all K writes at once, except the recurrence, which is one operation per write in each direction:

    u = silu(conv(x));  (low, b, c) = W_x u;  dt = softplus(W_dt low + bias);  decay = exp(dt a)
    h_k = decay_k h_{k-1} + dt_k u_k b_k;   y_k = (c_k . h_k + d u_k) silu(z_k)
    dh_k = decay_{k+1} dh_{k+1} + c_k dy_k silu(z_k)

Inside, time comes first and the long dimension last, (K, B, N, E), so that any run of writes is contiguous. The forward pass
holds the states of a few writes at a time, as many as stay in cache; the backward pass computes them again instead of keeping
them. Gating: the gated-on writes of each row are moved to its front, and all K are run without gates; behind them dt = 0 keeps
the state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the states that are worked on at a time. On a CPU they stay in cache and their buffers are reused; elsewhere
# launching costs more than memory.
STATES_ON_CPU, STATES_ELSEWHERE = 2**16, 2**26

LOG2_E = math.log2(math.e)


class Parameters(NamedTuple):
    """The weights of a write."""

    conv_weight: Tensor  # (E, C)
    conv_bias: Tensor  # (E,)
    x_proj_weight: Tensor  # (R + 2 N, E)
    dt_proj_weight: Tensor  # (E, R)
    dt_proj_bias: Tensor  # (E,)
    a: Tensor  # (E, N)
    d: Tensor  # (E,)


def forward(
    x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor, parameters: tuple[Tensor, ...], gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, z (B, K, E), conv_state (B, E, C - 1), ssm_state (B, E, N), gate (B, K) -> y (B, K, E) and both states after K."""
    order = None if gate is None else _order(gate)
    weights = Parameters(*map(_accumulation, parameters))
    run = _run(x, conv_state, ssm_state, weights, order)
    inner = torch.mul(run.u, weights.d)
    states, decay = (run.initial.new_empty(run.writes_at_once + extra, *run.initial.shape) for extra in (1, 0))
    states[0] = run.initial
    for part in run.parts():
        size = part.stop - part.start
        _recur(run, part, states[: size + 1], decay[:size])
        inner[part] += _rows(run.c[part], states[1 : size + 1])
        states[0] = states[size]
    y = inner.mul_(F.silu(_to_front(z, order)))
    new_conv, new_ssm = run.inputs[x.shape[1] :], states[0]
    if order is not None:
        new_conv = run.inputs.gather(0, order.conv_rows(conv_state))
        new_ssm = torch.where(order.count[0, :, :, None] > 0, new_ssm, run.initial)  # bit for bit, even the sign of a zero
    return _fresh(_to_place(y, order), x), _fresh(new_conv.permute(1, 2, 0), conv_state), _fresh(new_ssm.mT, ssm_state)


def backward(
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_ssm: Tensor | None,
    x: Tensor,
    z: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    parameters: tuple[Tensor, ...],
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, z, conv_state, ssm_state and of each of ``Parameters``, each in the dtype of its input."""
    order = None if gate is None else _order(gate)
    weights = Parameters(*map(_accumulation, parameters))
    run = _run(x, conv_state, ssm_state, weights, order)
    inner = torch.mul(run.u, weights.d)
    states, decay = (run.initial.new_empty(x.shape[1] + extra, *run.initial.shape) for extra in (1, 0))
    states[0] = run.initial
    for part in run.parts():
        _recur(run, part, states[part.start : part.stop + 1], decay[part])
        inner[part] += _rows(run.c[part], states[1:][part])

    z, grad = _to_front(z, order), _to_front(grad_y, order)
    dz = torch.ops.aten.silu_backward(grad * inner, z)
    d_inner = grad * F.silu(z)
    scan = _scan_backward(run, states, decay, d_inner, grad_ssm)
    d_dt = scan.dt.addcmul_(scan.written, run.u)
    if order is not None:
        d_dt.masked_fill_(order.behind, 0.0)
    d_dt = torch.ops.aten.softplus_backward(d_dt, run.dt_input, 1.0, 20.0)
    d_projected = torch.cat([d_dt @ weights.dt_proj_weight, scan.b, scan.c], dim=-1)
    du = (d_projected @ weights.x_proj_weight).addcmul_(d_inner, weights.d).addcmul_(scan.written, run.dt)
    d_conv = torch.ops.aten.silu_backward(du, run.conv)
    d_inputs, d_conv_weight = _conv_backward(d_conv, run.inputs, weights.conv_weight, grad_conv, order)
    history = conv_state.shape[2]
    grads = (
        _to_place(d_inputs[history:], order),
        _to_place(dz, order),
        d_inputs[:history].permute(1, 2, 0),
        scan.initial.mT,
        d_conv_weight,
        d_conv.sum((0, 1)),
        d_projected.flatten(0, 1).T @ run.u.flatten(0, 1),
        d_dt.flatten(0, 1).T @ run.low.flatten(0, 1),
        d_dt.sum((0, 1)),
        scan.a.mT,
        (d_inner * run.u).sum((0, 1)),
    )
    inputs = x, z, conv_state, ssm_state, *parameters
    return tuple(_fresh(grad, model) for grad, model in zip(grads, inputs, strict=True))


class _Run(NamedTuple):
    """What K ungated writes need for the recurrence, in the accumulation dtype."""

    inputs: Tensor  # (C - 1 + K, B, E), the conv state and then x
    conv: Tensor  # (K, B, E)
    u: Tensor  # (K, B, E)
    low: Tensor  # (K, B, R)
    b: Tensor  # (K, B, N)
    c: Tensor  # (K, B, N)
    dt_input: Tensor  # (K, B, E), before the softplus
    dt: Tensor  # (K, B, E)
    written: Tensor  # (K, B, E), dt u
    a: Tensor  # (N, E)
    rate: Tensor  # (N, E), a / ln 2: exp2 is vectorised on CPUs where exp is not, and takes a third of its time
    initial: Tensor  # (B, N, E)

    @property
    def writes_at_once(self) -> int:
        elements = STATES_ON_CPU if self.dt.device.type == "cpu" else STATES_ELSEWHERE
        return min(max(elements // self.initial.numel(), 1), len(self.dt))

    def parts(self) -> list[slice]:
        """The writes in runs of at most ``writes_at_once``, oldest first."""
        n_writes, size = len(self.dt), self.writes_at_once
        return [slice(start, min(start + size, n_writes)) for start in range(0, n_writes, size)]


class _ScanGradients(NamedTuple):
    """Gradients of what the recurrence takes, named as in ``_Run``; ``dt`` only as far as it goes through the decay."""

    dt: Tensor
    written: Tensor
    b: Tensor
    c: Tensor
    a: Tensor
    initial: Tensor


def _run(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: Parameters, order: _Order | None) -> _Run:
    n_writes, (_, rank), n_state = x.shape[1], weights.dt_proj_weight.shape, weights.a.shape[1]
    inputs = torch.cat([_accumulation(conv_state).permute(2, 0, 1), _to_front(x, order)])
    conv = weights.conv_bias
    for tap, weight in enumerate(weights.conv_weight.unbind(1)):
        conv = torch.addcmul(conv, inputs[tap : tap + n_writes], weight)
    u = F.silu(conv)
    low, b, c = (u @ weights.x_proj_weight.T).split([rank, n_state, n_state], dim=-1)
    dt_input = F.linear(low, weights.dt_proj_weight, weights.dt_proj_bias)
    dt = F.softplus(dt_input)
    if order is not None:
        dt.masked_fill_(order.behind, 0.0)
    a = weights.a.mT.contiguous()
    return _Run(inputs, conv, u, low, b, c, dt_input, dt, dt * u, a, a * LOG2_E, _accumulation(ssm_state).mT)


def _recur(run: _Run, part: slice, states: Tensor, decay: Tensor) -> None:
    """Fill states[1:] and decay for the writes ``part``, from the state before them in states[0]."""
    torch.mul(run.dt[part][:, :, None], run.rate, out=decay).exp2_()
    torch.mul(run.b[part][..., None], run.written[part][:, :, None], out=states[1:])
    previous, *following = states.unbind(0)
    for state, factor in zip(following, decay.unbind(0), strict=True):
        previous = state.addcmul_(factor, previous)


def _scan_backward(run: _Run, states: Tensor, decay: Tensor, d_inner: Tensor, grad_ssm: Tensor | None) -> _ScanGradients:
    """states (K + 1, B, N, E), decay (K, B, N, E), which is overwritten, d_inner (K, B, E), grad_ssm (B, E, N)."""
    d_dt, d_written, d_b, d_c, d_a = map(torch.empty_like, (run.dt, run.dt, run.b, run.c, run.a))
    d_a.zero_()
    later = None if grad_ssm is None else _accumulation(grad_ssm).mT  # what reaches the last state of a part from behind it
    buffer = states.new_empty(run.writes_at_once, *states.shape[1:])
    for part in reversed(run.parts()):
        factors, grad = decay[part], buffer[: part.stop - part.start]
        torch.mul(run.c[part][..., None], d_inner[part][:, :, None], out=grad)
        if later is not None:
            grad[-1].add_(later)
        following = grad[-1]
        for step in range(len(grad) - 2, -1, -1):
            following = grad[step].addcmul_(factors[step + 1], following)
        d_written[part] = _rows(run.b[part], grad)
        d_b[part] = _rows(run.written[part], grad.mT)
        d_c[part] = _rows(d_inner[part], states[1:][part].mT)
        grad.mul_(factors)
        later = grad[0].clone()
        grad.mul_(states[part])  # now the gradient of dt a
        d_a.add_(torch.mul(grad, run.dt[part][:, :, None], out=factors).sum((0, 1)))
        torch.sum(grad.mul_(run.a), dim=2, out=d_dt[part])
    return _ScanGradients(d_dt, d_written, d_b, d_c, d_a, later)


def _rows(vectors: Tensor, matrices: Tensor) -> Tensor:
    """vectors (K, B, X) times matrices (K, B, X, Y), as rows: on CPUs several times faster than transposed, with columns."""
    return (vectors[:, :, None] @ matrices)[:, :, 0]


def _conv_backward(
    d_conv: Tensor, inputs: Tensor, conv_weight: Tensor, grad_conv: Tensor | None, order: _Order | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the conv inputs (C - 1 + K, B, E) and weight (E, C), from d_conv (K, B, E) and that of the new state."""
    n_writes = len(d_conv)
    d_inputs = torch.zeros_like(inputs)
    if grad_conv is not None:
        d_state = _accumulation(grad_conv).permute(2, 0, 1)
        if order is None:
            d_inputs[n_writes:] = d_state
        else:
            d_inputs.scatter_(0, order.conv_rows(grad_conv), d_state)
    d_taps = []
    for tap, weight in enumerate(conv_weight.unbind(1)):
        part = slice(tap, tap + n_writes)
        d_inputs[part].addcmul_(d_conv, weight)
        d_taps.append((inputs[part] * d_conv).sum((0, 1)))
    return d_inputs, torch.stack(d_taps, dim=1)


class _Order(NamedTuple):
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


def _order(gate: Tensor) -> _Order:
    gate = gate.T[..., None]
    off = ~gate
    if len(gate) == 1:
        return _Order(off, off, gate.long(), None, None)
    passed = gate.cumsum(0)
    behind = torch.arange(len(gate), device=gate.device)[:, None, None] >= passed[-1:]
    return _Order(off, behind, passed[-1:], off.to(torch.uint8).argsort(dim=0, stable=True), (passed - 1).clamp_(min=0))


def _to_front(x: Tensor, order: _Order | None) -> Tensor:
    """x (B, K, E) as (K, B, E) in the accumulation dtype, each row's gated-on writes first and zeros behind them."""
    x = _accumulation(x).transpose(0, 1)
    if order is None:
        return x
    x = x.masked_fill(order.off, 0.0)
    return x if order.to_front is None else x.gather(0, order.to_front.expand_as(x))


def _to_place(x: Tensor, order: _Order | None) -> Tensor:
    """The inverse of ``_to_front``: x (K, B, E) as (B, K, E), back in place and 0 where the gate is off."""
    if order is not None:
        x = x if order.to_place is None else x.gather(0, order.to_place.expand_as(x))
        x = x.masked_fill(order.off, 0.0)
    return x.transpose(0, 1)


def _accumulation(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _fresh(x: Tensor, model: Tensor) -> Tensor:
    """x in memory of its own, contiguous, in the dtype of ``model``."""
    return x.to(model.dtype, memory_format=torch.contiguous_format, copy=True)
