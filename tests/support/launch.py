"""Programs started in several processes, as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

__all__ = ["launch", "launcher"]


def launcher(count: int) -> list[str]:
    """The words in front of ``-m module ...``; for one process plain Python."""
    if count == 1:
        return [sys.executable]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]


def launch(
    count: int,
    module: str,
    words: Sequence[object] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a module in so many processes, to the end."""
    return subprocess.run(
        [*launcher(count), "-m", module, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        check=False,
    )
