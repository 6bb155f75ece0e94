"""``stockpot run`` that one of its processes leaves by SIGKILL, once a checkpoint is there.

Words: rank that dies, pattern of the checkpoint in the run folder, then those of ``stockpot``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path


def watch(folder: Path, pattern: str) -> None:
    while not any(folder.glob(pattern)):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    rank, pattern = sys.argv[1:3]
    sys.argv = ["stockpot", *sys.argv[3:]]
    if os.environ.get("RANK", "0") == rank:
        folder = Path(sys.argv[sys.argv.index("-o") + 1])
        threading.Thread(target=watch, args=(folder, pattern), daemon=True).start()
    from stockpot.cli import main

    main()
