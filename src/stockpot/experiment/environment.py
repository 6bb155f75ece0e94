"""On what an experiment ran: versions, hardware, source state, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from typing import Any

import torch

import stockpot

__all__ = ["describe_environment", "quiet_libraries"]

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "scikit-learn",
)


def quiet_libraries() -> None:
    """No progress bars and no chatter of the libraries, and tokenizers without threads.

    A process may be forked afterwards, which threads of a tokenizer would not survive.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers.trainer
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    del transformers


def describe_environment(seeds: tuple[int, ...]) -> dict[str, Any]:
    """What someone needs to know to get the same numbers."""
    versions = {"stockpot": stockpot.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "hardware": {
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "git": _git(),
        "seeds": list(seeds),
        "command": shlex.join(["stockpot", *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _git() -> dict[str, Any] | None:
    """Commit and state of the working directory, if it is a git checkout."""
    try:
        commit = _run_git("rev-parse", "HEAD")
        return {"commit": commit, "clean": not _run_git("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(*words: str) -> str:
    result = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()
