"""The command line in a real pseudo-terminal, and what a person sees on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyte

from support.launch import forking

_NOT_PASSED_ON = ("NO_COLOR", "FORCE_COLOR", "CI", "COLUMNS", "LINES", "TTY_COMPATIBLE")


def _stockpot(tty: str, words: Sequence[str], env: Mapping[str, str], stdout: str | None) -> None:
    """Be ``stockpot WORDS`` on a terminal, as its foreground job."""
    os.login_tty(os.open(tty, os.O_RDWR))
    if stdout is not None:
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
    for name in _NOT_PASSED_ON:
        os.environ.pop(name, None)
    os.environ.update({"TERM": "xterm-256color", **env})
    sys.argv = ["stockpot", *words]
    from stockpot.cli import main

    main()


class Terminal:
    """A terminal of some size in which ``stockpot`` runs.

    The process is forked from one that has loaded PyTorch, which saves seconds; all else is real.
    """

    def __init__(
        self,
        columns: int,
        lines: int,
        words: Sequence[object],
        env: Mapping[str, str] | None = None,
        stdout: Path | None = None,
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.written = b""
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        self._set_size(columns, lines)
        out = None if stdout is None else str(stdout)
        self.process = forking.Process(
            target=_stockpot, args=(os.ttyname(slave), list(map(str, words)), env or {}, out)
        )
        self.process.start()
        self._slave: int | None = slave

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int, reflow: bool = False) -> None:
        """Give the window another size, as dragging its corner does.

        Args:
            columns: how wide.
            lines: how high.
            reflow: what does not fit is broken into more lines, as by most terminals; else it is
                cut off, as by xterm.
        """
        self._set_size(columns, lines)
        if not reflow:
            self.screen.resize(lines, columns)
            return
        shown = [line.rstrip() for line in self.screen.display[: self.screen.cursor.y + 1]]
        broken = [
            line[at : at + columns] for line in shown for at in range(0, len(line) or 1, columns)
        ]
        hidden = self.screen.cursor.hidden
        self.screen = pyte.Screen(columns, lines)
        self.screen.cursor.hidden = hidden
        self._stream = pyte.ByteStream(self.screen)
        self._stream.feed("\r\n".join(broken).encode())

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    @property
    def text(self) -> str:
        """What the screen shows, without what is blank at the right and below."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def _read(self, seconds: float) -> None:
        ready, _, _ = select.select([self._master], [], [], seconds)
        if ready:
            data = os.read(self._master, 1 << 16)
            self.written += data
            self._stream.feed(data)

    def wait_for(self, seen: Callable[[str], bool], seconds: float = 60) -> str:
        """The screen's text as soon as a whole frame of it satisfies ``seen``."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._read(0.05)
            # In the middle of a frame more follows at once.
            if not select.select([self._master], [], [], 0.02)[0] and seen(self.text):
                return self.text
            if not self.process.is_alive():
                break
        raise AssertionError(f"not seen in {seconds} s; the screen was:\n{self.text}")

    def wait_for_the_end(self, seconds: float = 60) -> int:
        """The exit code; the screen is then as the program leaves it."""
        deadline = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < deadline:
            self._read(0.05)
        while select.select([self._master], [], [], 0.1)[0]:
            self._read(0)
        assert not self.process.is_alive(), f"still running; the screen was:\n{self.text}"
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def close(self) -> None:
        """Whatever happened, leave no process."""
        self.process.kill()
        self.process.join()
        os.close(self._master)
        if self._slave is not None:
            os.close(self._slave)
            self._slave = None
