"""Tensors whole and in parts: FSDP 2 keeps of each parameter, and of AdamW's moments, a part per process (``DTensor``)."""

from __future__ import annotations

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are in parts."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes, which must all ask; one that is not in parts, as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in parts as ``like`` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
