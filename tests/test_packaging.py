"""What is installed is what is here: setup.py names every file that the packages need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("smt", "smt_kernels")


def files_of(root: Path) -> set[str]:
    """The files of both packages below ``root``, but for what Python compiles."""
    found = [path for package in PACKAGES for path in (root / package).rglob("*")]
    return {str(path.relative_to(root)) for path in found if path.is_file() and "__pycache__" not in path.parts}


def test_every_file_of_the_packages_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert files_of(tmp_path) == files_of(ROOT)
    assert {"smt/configs/tiny.yaml", "smt/experiments/studies/switches.yaml", "smt/huggingface/model_card.md"} < files_of(
        tmp_path
    )
