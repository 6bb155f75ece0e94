"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys

__all__ = ["complain"]


def complain(message: str, head: str = "error") -> None:
    """Write a message to stderr, in red on a terminal (rich respects NO_COLOR)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((f"{head}: ", "bold red"), message))
    sys.stderr.flush()
