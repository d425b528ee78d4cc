"""``SMTState`` where Hugging Face's ``generate`` expects a cache of keys and values."""

from __future__ import annotations

from torch import Tensor

from smt.state.state import SMTState


class SMTCache:
    """What a forward pass goes on from: the state of the rows, changed by every call. Its size does not depend on the past.

    Attributes:
        state: of the rows; None before the first call.
        n_columns: columns of ``input_ids`` taken so far, padding among them. ``state.steps`` counts tokens alone.
    """

    is_compileable = False
    is_linear = (False,)  # generate counts its columns, and passes on only what comes after them
    is_croppable = False
    _is_user_defined = True  # generate must not run a step ahead of what it returns: the step could not be taken back

    def __init__(self, state: SMTState | None = None) -> None:
        self.state = state
        self.n_columns = 0 if state is None else max(state.steps)

    def advance(self, state: SMTState, n_columns: int) -> None:
        """Take the state that a call over ``n_columns`` columns left."""
        self.state = state
        self.n_columns += n_columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns taken so far: ``generate`` cuts its ``input_ids`` there."""
        return self.n_columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes what row ``beam_idx[r]`` (int64) was."""
        if self.state is not None:
            self.state = self.state.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int64)."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.state is not None:
            self.state = self.state.rows([row for row in range(self.state.batch_size) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.n_columns = None, 0

    def crop(self, max_length: int) -> None:
        """Refused: tokens that are in the memory cannot be taken out again.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the state of {self.n_columns} columns cannot be cut to {max_length}: its memory has taken them in")
