"""A signal that ends the process is an exception, so that what runs can be left in good order."""

import signal

import pytest

from smt.runtime.process import Interrupted, signals_as_interrupts, signals_held


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_each_is_raised_inside_the_block_and_has_its_old_meaning_after_it(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as interrupt, signals_as_interrupts():
        signal.raise_signal(number)
    assert interrupt.value.signal == number and signal.getsignal(number) == before


def test_one_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_of_several_processes_is_ended_by_what_launched_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with signals_as_interrupts():
        assert signal.getsignal(signal.SIGTERM) == before


def test_one_that_is_held_is_raised_at_the_end_of_the_block():
    done = []
    with pytest.raises(Interrupted) as interrupt, signals_as_interrupts():
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            done.append("in the block")
        done.append("behind it")
    assert interrupt.value.signal == signal.SIGTERM and done == ["in the block"]
