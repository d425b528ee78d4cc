"""Importing the package and training needs no GPU, no triton and no optional package."""

import os
import subprocess
import sys


def test_import_and_a_training_step_without_gpu_triton_or_extras_of_which_only_transformers_classes_are_missing():
    script = """
import sys
for name in ("triton", "transformers", "tokenizers", "matplotlib", "tqdm"):
    sys.modules[name] = None
import smt
import torch
from smt import SMTConfig, StrideMemoryTransformer
config = SMTConfig(vocab_size=50, d_model=32, d_k=16, transformer_n_layers=1, transformer_n_heads=2, ssm_n_layers=1)
loss, aux = StrideMemoryTransformer(config).loss(torch.randint(50, (1, 40)))
loss.backward()
assert aux.n_writes == 2
try:
    smt.SMTForCausalLM
except ImportError as error:
    assert 'pip install -e ".[hf]"' in str(error), error
else:
    raise AssertionError("no error")
"""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
