"""What a figure depends on besides its configuration: versions, machine, and which code it was."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    """Versions, device, threads and the revision of the code, as ``results.json`` records them."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "revision": revision(),
    }


def revision() -> str | None:
    """The commit of this code, with ``+`` behind it where files have been changed since; None outside of a git checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed elsewhere: a repository around it is not ours
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
