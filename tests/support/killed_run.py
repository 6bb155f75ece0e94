"""``stockpot run`` that one of its processes leaves by SIGKILL, once a checkpoint is there.

Words: rank that dies, pattern of the checkpoint in the run folder, then those of ``stockpot``.
Instead of a pattern ``stage 1``: when that stage of a run is about to be written down as finished,
and the other processes have had time to do what they do meanwhile.
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


def die_before_writing(number: int) -> None:
    from stockpot.experiment.record import Record

    write = Record.finish_stage

    def finish_stage(self: Record, stage: dict, *lines: list) -> None:
        if stage["stage"] == number:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, stage, *lines)

    Record.finish_stage = finish_stage  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, pattern = sys.argv[1:3]
    sys.argv = ["stockpot", *sys.argv[3:]]
    if os.environ.get("RANK", "0") == rank:
        if pattern.startswith("stage "):
            die_before_writing(int(pattern.removeprefix("stage ")))
        else:
            folder = Path(sys.argv[sys.argv.index("-o") + 1])
            threading.Thread(target=watch, args=(folder, pattern), daemon=True).start()
    from stockpot.cli import main

    main()
