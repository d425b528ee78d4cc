"""States of the rows that walk along documents: each row goes on from its own, whichever others wait."""

import pytest
import torch

from smt import SMTConfig, SMTState
from smt.data.walk import Batch
from smt.state.carried import CarriedStates

CONFIG = SMTConfig(
    vocab_size=37, d_model=16, d_k=8, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1, ssm_d_state=4
)


def batch(reading, begins=False, lane=0):
    """A batch of as many rows as ``reading`` has letters, of which those that are ``r`` read."""
    n_rows = len(reading)
    reads = torch.tensor([letter == "r" for letter in reading])
    ids = torch.arange(n_rows)[:, None]
    return Batch(
        lane=lane, input_ids=ids, targets=ids, valid=reads[:, None], reset=reads & torch.tensor(begins),
        documents=torch.where(reads, torch.arange(n_rows), -1), positions=torch.zeros(n_rows, dtype=torch.int64),
    )  # fmt: skip


def state_of(*rows, step=5):
    """A state in which every number of a row is the row's."""
    state = SMTState.initial(CONFIG, max(rows) + 1, device="cpu", dtype=torch.float32)
    for row in rows:
        state.tokens[row] = row
    return SMTState.from_tensors(CONFIG, (step,) * len(state.steps), state.tensors()).rows(list(rows))


def rows_of(state):
    return state.tokens[:, 0, 0].tolist()


def test_a_row_goes_on_from_its_own_state_when_one_before_it_waits():
    states = CarriedStates()
    read, state = states.continued(batch("rrrr", begins=True))
    assert state is None and read.input_ids[:, 0].tolist() == [0, 1, 2, 3]
    states.keep(batch("rrrr"), state_of(0, 1, 2, 3))
    states.keep(batch("rr", lane=1), state_of(0, 1, step=9))
    for reading, rows in (("r-rr", [0, 2, 3]), ("--rr", [2, 3]), ("---r", [3])):
        read, state = states.continued(batch(reading))
        assert read.input_ids[:, 0].tolist() == rows_of(state) == rows
        states.keep(batch(reading), state)
    assert states.continued(batch("rr", lane=1))[1].steps == (9, 9)


def test_where_all_rows_wait_the_first_stands_for_them_and_nothing_is_kept():
    states = CarriedStates()
    states.keep(batch("r-r"), state_of(0, 2))
    read, state = states.continued(batch("---"))
    assert state is None and read.input_ids.tolist() == [[0]]
    states.keep(batch("---"), state_of(1))
    assert rows_of(states.continued(batch("r-r"))[1]) == [0, 2]


def test_rows_that_begin_beside_others_that_go_on_are_refused():
    states = CarriedStates()
    states.keep(batch("rr"), state_of(0, 1))
    with pytest.raises(ValueError, match="must begin their documents together; walk with together=True"):
        states.continued(batch("rr", begins=[True, False]))


def test_a_copy_is_as_it_was_and_tensors_give_it_back():
    states = CarriedStates()
    states.keep(batch("r-r"), state_of(0, 2))
    states.keep(batch("rr", lane=7), None)  # of a model without a state
    copied = states.copy()
    states.keep(batch("r-r"), state_of(5, 6, step=50))
    again = CarriedStates.from_tensors(CONFIG, copied.tensors(), torch.device("cpu"))
    for carried in (copied, again):
        state = carried.continued(batch("--r"))[1]
        assert rows_of(state) == [2] and state.steps == (5,) and carried.continued(batch("rr", lane=7))[1] is None


def test_rows_that_wait_are_filled_in_beside_those_that_read():
    states = CarriedStates()
    states.keep(batch("--rr"), state_of(2, 3))
    filled = states.of_all_rows(4)
    state = filled.continued(batch("rrrr"))[1]
    assert rows_of(state)[2:] == [2, 3] and state.batch_size == 4
