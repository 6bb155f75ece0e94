"""Hashes of the inputs, taken beside the merge. No torch: it starts while torch is imported."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from stockpot.merging.checkpoint import CheckpointError

__all__ = ["Hasher"]


class Hasher(threading.Thread):
    """SHA-256 of files, one after another, beside the merge; it warms the cache for it as well.

    Args:
        paths: the files.
        stated: hashes that files must have.
        progress: called with the bytes hashed since the last call.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        stated: Mapping[Path, str],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._paths = list(dict.fromkeys(paths))
        self._stated = stated
        self._progress = progress
        self._halt = threading.Event()
        self.error: Exception | None = None
        self.hashes: dict[Path, str] = {}

    def run(self) -> None:
        """Hash all files; the first that is not as stated ends it."""
        try:
            for path in self._paths:
                digest = self._hash(path)
                if digest is None:
                    return
                if (expected := self._stated.get(path, digest).lower()) != digest:
                    raise CheckpointError(
                        f"{path} is not the file that was stated: its SHA-256 is {digest}, not "
                        f"{expected}"
                    )
                self.hashes[path] = digest
        except Exception as error:
            self.error = error

    def _hash(self, path: Path) -> str | None:
        digest = hashlib.sha256()
        buffer = bytearray(1 << 20)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if self._halt.is_set():
                    return None
                digest.update(memoryview(buffer)[:count])
                if self._progress is not None:
                    self._progress(count)
        return digest.hexdigest()

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Leave off."""
        self._halt.set()

    def result(self) -> dict[Path, str]:
        """Wait for all hashes."""
        self.join()
        self.check()
        return self.hashes
