"""Importing the package loads nothing heavy; running and training need no GPU, no triton and no optional package."""

import os
import subprocess
import sys

SCRIPT = """
import sys
import smt
optional = ("triton", "transformers", "tokenizers", "matplotlib", "tqdm")
assert not {"torch", *optional} & sys.modules.keys()
sys.modules.update(dict.fromkeys(optional))

import torch
from smt import SMTConfig, StrideMemoryTransformer
from smt_kernels import last_choice, window_attention
assert "torch._dynamo" not in sys.modules  # the compiler, which takes as long as all of PyTorch
config = SMTConfig(vocab_size=50, d_model=32, d_k=16, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1)
loss, aux = StrideMemoryTransformer(config).loss(torch.randint(50, (1, 40)))
loss.backward()
assert aux.n_writes == 2

def error_of(kind, call):
    try:
        call()
    except kind as error:
        return error

qkv = torch.randn(3, 1, 4, 1, 16)
window_attention(*qkv, n_memory=1)
assert last_choice("window_attention").backend == "blocked"
print(error_of(ValueError, lambda: window_attention(*qkv, n_memory=1, backend="triton")))
print(error_of(ImportError, lambda: smt.SMTForCausalLM))
"""


def test_import_and_a_training_step_without_gpu_triton_or_extras_of_which_only_their_own_parts_are_missing():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kernel, model = done.stdout.splitlines()
    assert "triton is not installed" in kernel and 'pip install -e ".[hf]"' in model


def test_finished_runs_are_compared_without_torch():
    script = "import sys, smt.experiments.comparison, smt.experiments.record; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
