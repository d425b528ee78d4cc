"""A stack of Mamba-1 blocks that runs one time step per memory write: x += Mamba(RMSNorm(x)), then a final RMSNorm.

Parameter names and shapes are those of Hugging Face's ``MambaModel``, so its weights load by name. What lies between a mixer's
two projections, and how fresh weights are drawn, is a class of its own: other models put it between others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from smt.config import ModelConfig, SMTConfig
from smt.model.rms_norm import RMSNorm
from smt.model.weights import is_plain, matrix_and_bias, matrix_of, parameters_of
from smt_kernels import stride_write
from smt_kernels.precision import NORM_EPS

# Mamba (Gu & Dao, 2023), section 3.6: time steps start log-uniform in this range.
DT_MIN, DT_MAX = 1e-3, 1e-1


Mixer = TypeVar("Mixer", bound="SelectiveMixer")


class SelectiveMixer(nn.Module):
    """A selective SSM between two projections; what the first forms besides its input and gate is a subclass's business.

    Args:
        config: sizes.
        n_projected: what the first projection gives of each entry.
    """

    def __init__(self, config: ModelConfig, n_projected: int) -> None:
        super().__init__()
        d_inner, d_state, rank = config.ssm_d_inner, config.ssm_d_state, config.dt_rank
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.d_inner, self.rank = d_inner, rank
        self.in_proj = nn.Linear(config.d_model, n_projected, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.ssm_d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1, dtype=wide)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)

    def prepare(self, name: str) -> dict[str, Tensor]:
        """The weights of ``stride_write``, formed once for all groups of writes of a pass.

        Args:
            name: of this mixer in the model.

        Raises:
            ValueError: a layer does more than its weight tells.
        """
        conv_weight, conv_bias = parameters_of(self.conv1d, nn.Conv1d, f"{name}.conv1d")
        x_proj_weight = matrix_of(self.x_proj, self.d_inner, f"{name}.x_proj")
        dt_proj_weight, dt_proj_bias = matrix_and_bias(self.dt_proj, self.rank, f"{name}.dt_proj")
        wide = torch.promote_types(torch.promote_types(self.A_log.dtype, self.D.dtype), torch.float32)
        return {
            "conv_weight": conv_weight[:, 0],
            "conv_bias": conv_bias,
            "x_proj_weight": x_proj_weight,
            "dt_proj_weight": dt_proj_weight,
            "dt_proj_bias": dt_proj_bias,
            "a": -torch.exp(self.A_log.to(wide)),
            "d": self.D,
        }

    def scan(
        self,
        u: Tensor,
        z: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        weights: dict[str, Tensor],
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input and gate u, z (B, K, E), states (B, E, C - 1) and (B, E, N), gate of writes (B, K) -> y (B, K, E) and both
        states after K steps."""
        # Under autocast the projections are in low precision and the weights are not, which stride_write takes as they are.
        return stride_write(u, z, conv_state.to(u.dtype), ssm_state, **weights, gate=gate)

    @torch.no_grad()
    def initialise(self, std: float, residual_std: float) -> None:
        """Fresh weights as in Mamba.

        Args:
            std: of projections.
            residual_std: of the last one, whose output is added to a stream.
        """
        for linear in (self.in_proj, self.x_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=residual_std)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def _apply(self: Mixer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixer:
        """As of any module, but what decays the states stays in fp32 at least, as they do."""
        before = {name: value.detach() for name, value in self.named_parameters() if name.endswith("A_log")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self.get_parameter(name)
            if after.dtype.itemsize < min(4, value.dtype.itemsize):
                after.data = value.to(after.device, torch.float32)
        return self


class MambaMixer(SelectiveMixer):
    """One Mamba-1 mixer: two projections around ``stride_write``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, 2 * config.ssm_d_inner)

    def forward(
        self, x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: dict[str, Tensor], gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, K, d), states (B, E, C - 1) and (B, E, N), gate (B, K) -> (B, K, d) and both states after K steps."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y, conv_state, ssm_state = self.scan(u, z, conv_state, ssm_state, weights, gate)
        return self.out_proj(y), conv_state, ssm_state

    def is_plain(self) -> bool:
        """Whether a call does nothing but its formula, with the matrices of both projections."""
        projections = self.in_proj, self.out_proj
        return is_plain(self, MambaMixer) and all(is_plain(each, nn.Linear) and each.bias is None for each in projections)


class MambaLayer(nn.Module):
    """x + Mamba(RMSNorm(x))."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=NORM_EPS)
        self.mixer = MambaMixer(config)

    def forward(
        self, x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: dict[str, Tensor], gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``MambaMixer.forward``."""
        update, conv_state, ssm_state = self.mixer(self.norm(x), conv_state, ssm_state, weights, gate)
        return x + update, conv_state, ssm_state

    def is_plain(self) -> bool:
        """As ``MambaMixer.is_plain``."""
        own = is_plain(self, MambaLayer) and is_plain(self.norm, RMSNorm)
        return own and isinstance(self.mixer, MambaMixer) and self.mixer.is_plain()  # what wraps it may hand ``is_plain`` on


class MambaStack(nn.Module):
    """The SSM of the memory."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.ssm_n_layers))
        self.norm_f = RMSNorm(config.d_model, eps=NORM_EPS)

    def is_plain(self) -> bool:
        """Whether ``forward`` is all that a call does, and nobody has put anything else in the place of a part or around it."""
        own = is_plain(self, MambaStack) and is_plain(self.norm_f, RMSNorm)
        return own and all(isinstance(layer, MambaLayer) and layer.is_plain() for layer in self.layers)

    def prepare(self) -> list[dict[str, Tensor]]:
        """What ``forward`` needs of each layer; errors as ``MambaMixer.prepare``."""
        prepared = []
        for index, layer in enumerate(self.layers):
            name, mixer = f"memory.ssm.layers.{index}.mixer", layer.mixer
            if not hasattr(mixer, "prepare"):
                raise ValueError(f"{name} must be a MambaMixer or hand on what it has, got {type(mixer).__name__}")
            prepared.append(mixer.prepare(name))
        return prepared

    def stacked(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights that ``stride_memory`` takes of the layers, (L, ...), matrices in ``dtype``; errors as ``prepare``."""
        prepared, mixers = self.prepare(), [layer.mixer for layer in self.layers]
        names = {"x_proj": "x_proj_weight", "dt_proj": "dt_proj_weight", "dt_bias": "dt_proj_bias"}
        names |= {name: name for name in ("conv_weight", "conv_bias", "a", "d")}
        stacked = {name: torch.stack([weights[theirs] for weights in prepared]) for name, theirs in names.items()}
        stacked |= {name: torch.stack([getattr(mixer, name).weight for mixer in mixers]) for name in ("in_proj", "out_proj")}
        stacked |= {name: stacked[name].to(dtype) for name in ("x_proj", "dt_proj", "in_proj", "out_proj")}
        return stacked | {"norm": torch.stack([layer.norm.weight for layer in self.layers]), "norm_f": self.norm_f.weight}

    def forward(
        self, x: Tensor, conv: Tensor, ssm: Tensor, weights: list[dict[str, Tensor]], gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, K, d), states (L, B, E, C - 1) and (L, B, E, N), gate (B, K) -> slots (B, K, d), states after K steps.

        Between layers x has the dtype of the norms.
        """
        x = x.to(self.norm_f.weight.dtype)
        new_conv, new_ssm = [], []
        for layer, *state, prepared in zip(self.layers, conv, ssm, weights, strict=True):
            x, conv_state, ssm_state = layer(x, *state, prepared, gate)
            new_conv.append(conv_state)
            new_ssm.append(ssm_state)
        return self.norm_f(x), torch.stack(new_conv), torch.stack(new_ssm)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        """Fresh weights as in Mamba; the final norm's weight is ``std``, so that slots have the scale of embeddings."""
        for layer in self.layers:
            layer.mixer.initialise(std, std / math.sqrt(len(self.layers)))
        self.norm_f.weight.fill_(std)
