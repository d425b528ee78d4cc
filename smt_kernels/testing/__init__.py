"""What testing a kernel takes, also without a GPU.

``budget`` (how far a kernel may err) with ``rounding`` (what its formula must lose), ``cases`` (a call of every operation in
every direction), ``interpreter`` (bf16 in Triton's interpreter) with ``quick_interpreter`` (the same, faster), ``traffic``
(bytes and FLOPs that an interpreted kernel asks for), ``aot`` (compilation ahead of time), ``audit`` (both against budgets),
``null_gpu`` (a GPU that computes nothing, for the host's part), and ``libraries`` (the SSM write by mamba-ssm and
causal-conv1d).

Nothing is imported here: ``interpreter`` and ``traffic`` work only under ``TRITON_INTERPRET=1``, ``aot`` only without it.
"""
