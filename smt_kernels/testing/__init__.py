"""What testing a kernel takes: bf16 in the interpreter, error budgets, traffic counts, compilation ahead of time.

Nothing is imported here: ``interpreter`` and ``traffic`` work only under ``TRITON_INTERPRET=1``, ``aot`` only without it.
"""
