"""A process gets the CPU threads that it is to have before anything has counted them."""

import os
import sys

from smt.runtime.process import restart_with_threads


def test_it_begins_anew_with_the_threads_asked_for_unless_it_has_them(monkeypatch):
    begun, names = [], ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    monkeypatch.setattr(os, "execv", lambda *arguments: begun.append(arguments))
    for name in names:
        monkeypatch.setenv(name, "2")
    restart_with_threads(2)
    assert not begun
    monkeypatch.delenv(names[1])
    restart_with_threads(1)
    assert begun == [(sys.executable, sys.orig_argv)] and [os.environ[name] for name in names] == ["1", "1"]
