"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["can_redraw", "complain", "counted", "waiting"]


def complain(message: str, head: str = "error") -> None:
    """Write a message to stderr, in red on a terminal (rich respects NO_COLOR)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((f"{head}: ", "bold red"), message))
    sys.stderr.flush()


def counted(number: int, noun: str) -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def can_redraw(console: Console) -> bool:
    """Whether lines that were written can be written over, by someone who watches.

    Not in a pipe or a file (whatever FORCE_COLOR says), on a dumb terminal, on Windows' old
    console, or in the log of a build server.
    """
    return (
        console.is_interactive
        and console.file.isatty()
        and not console.is_dumb_terminal
        and not console.legacy_windows
        and not os.environ.get("CI")
    )


def waiting(console: Console, what: str) -> AbstractContextManager[Any]:
    """Say what is waited for as long as it takes, where that can be taken away again."""
    return console.status(what) if can_redraw(console) else nullcontext()
