"""Hashes of the inputs, taken beside the merge. No torch: it starts while torch is imported."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stockpot.merging.checkpoint import CheckpointError

__all__ = ["HASHES", "Hasher"]

HASHES = ("xxh3", "sha256")
"""XXH3 (128 bits) tells files apart at the speed of reading them, unless somebody forges one.
SHA-256, which the hub shows as well, takes as long as a merge."""


def _new(kind: str) -> Any:
    if kind == "sha256":
        return hashlib.sha256()
    import xxhash

    return xxhash.xxh3_128()


class Hasher:
    """Hashes of whole files, by threads of its own; it warms the cache for the merge as well.

    It works inside its ``with`` block.

    Args:
        paths: the files.
        kind: one of `HASHES`, for files without a stated hash.
        stated: SHA-256 that files must have.
        threads: files that are hashed at the same time.
        progress: called with the bytes hashed since the last call.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        kind: str,
        stated: Mapping[Path, str],
        threads: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._paths = tuple(dict.fromkeys(paths))
        self._pending = iter(self._paths)
        self._kind = kind
        self._stated = stated
        self._progress = progress
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._hashes: dict[Path, str] = {}
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def placeholders(self) -> dict[Path, str]:
        """For each file, a text as long as its hash will be."""
        kinds = {path: self._kind_of(path) for path in self._paths}
        return {path: f"{kind}:{_new(kind).hexdigest()}" for path, kind in kinds.items()}

    def _kind_of(self, path: Path) -> str:
        return "sha256" if path in self._stated else self._kind

    def __enter__(self) -> Hasher:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        """Leave off, and wait for it."""
        self._halt.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        """Hash files until there are none; the first that is not as stated ends it."""
        try:
            while not self._halt.is_set():
                with self._lock:
                    path = next(self._pending, None)
                if path is None:
                    return
                self._hash(path)
        except Exception as error:
            self._error = error
            self._halt.set()

    def _hash(self, path: Path) -> None:
        kind = self._kind_of(path)
        digest = _new(kind)
        buffer = bytearray(1 << 20)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if self._halt.is_set():
                    return
                digest.update(memoryview(buffer)[:count])
                if self._progress is not None:
                    self._progress(count)
        found = digest.hexdigest()
        if (expected := self._stated.get(path, found).lower()) != found:
            raise CheckpointError(
                f"{path} is not the file that was stated: its SHA-256 is {found}, not {expected}"
            )
        with self._lock:
            self._hashes[path] = f"{kind}:{found}"

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self._error is not None:
            raise self._error

    def result(self) -> dict[Path, str]:
        """Wait for all hashes."""
        for thread in self._threads:
            thread.join()
        self.check()
        return self._hashes
