"""The state of every lane of a ``DocumentWalk``, for a model whose rows are all at the same step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smt.config import SMTConfig
from smt.data.walk import Batch
from smt.state.state import SMTState


class CarriedStates:
    """What the rows of each lane remember; rows that wait are left out of its batches.

    A model without a state (full attention) is carried as None.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[SMTState | None, Tensor]] = {}

    def continued(self, batch: Batch) -> tuple[Batch, SMTState | None]:
        """The rows of ``batch`` that read, and the state that they continue; None where they begin.

        Where all rows of this process wait, while those of another read, its first row stands for them: it has no target, but
        takes part in what the processes do together.

        Raises:
            ValueError: some rows begin a document and others do not.
        """
        rows = batch.reading.nonzero()[:, 0]
        if not len(rows):
            return batch.rows(torch.tensor([0], device="cpu")), None
        begun = batch.reset[rows]
        if begun.any() and not begun.all():
            raise ValueError("the rows of a batch must begin their documents together; walk with together=True")
        if begun.all():
            return batch.rows(rows), None
        state, before = self._of[batch.lane]
        if state is not None and len(rows) < len(before):
            state = state.rows(torch.isin(before, rows).nonzero()[:, 0])
        return batch.rows(rows), state

    def keep(self, batch: Batch, state: SMTState | None) -> None:
        """Remember the state after the rows of ``batch`` that read."""
        if batch.reading.any():
            self._of[batch.lane] = state, batch.reading.nonzero()[:, 0]

    def copy(self) -> CarriedStates:
        """As it is now, whatever is kept in it later."""
        copied = CarriedStates()
        copied._of = dict(self._of)
        return copied

    def of_all_rows(self, n_rows: int) -> CarriedStates:
        """The same where rows that wait are kept beside those that read (``smt.training.shapes.full_shape``)."""
        filled = CarriedStates()
        for lane, (state, rows) in self._of.items():
            if state is not None and len(rows) < n_rows:
                places = torch.zeros(n_rows, dtype=torch.int64, device="cpu")
                places[rows] = torch.arange(len(rows), device="cpu")
                state = state.rows(places)
            filled._of[lane] = state, torch.arange(n_rows, device="cpu")
        return filled

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name: ``<lane>.rows``, ``<lane>.steps`` and the tensors of the lane's state."""
        named = {}
        for lane, (state, rows) in self._of.items():
            of_lane = {"rows": rows}
            if state is not None:
                of_lane |= {"steps": torch.tensor(state.steps, device="cpu"), **state.detach().tensors()}
            named |= {f"{lane}.{name}": tensor for name, tensor in of_lane.items()}
        return named

    @classmethod
    def from_tensors(cls, config: SMTConfig, tensors: dict[str, Tensor], device: torch.device) -> CarriedStates:
        """The inverse of ``tensors``, the states on ``device``."""
        lanes: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            lane, _, inner = name.partition(".")
            lanes.setdefault(int(lane), {})[inner] = tensor
        carried = cls()
        for lane, named in lanes.items():
            rows, steps = named.pop("rows"), named.pop("steps", None)
            moved = {name: tensor.to(device) for name, tensor in named.items()}
            state = None if steps is None else SMTState.from_tensors(config, steps.tolist(), moved)
            carried._of[lane] = state, rows
        return carried
