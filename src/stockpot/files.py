"""Writing so that nothing is ever half written, and reading so that damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stockpot.errors import DamagedRecordError, DiskFullError, StockpotError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NETWORK_SECONDS",
    "NO_SPACE",
    "await_file",
    "check_manifest",
    "exclusive",
    "link_or_copy",
    "read_json",
    "read_tensors",
    "read_text",
    "remove_scratch",
    "sha256",
    "shared",
    "space_errors",
    "write_json",
    "write_tensors",
    "write_text",
]


_T = TypeVar("_T")

NETWORK_SECONDS = 60.0
"""How long a network file system may keep what another machine has written to itself."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""How the operating system says that a disk or a quota is full."""
_FULL_BYTES = 64 * 1024
_HASH_AT_START = 64 * 2**20


@contextlib.contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise _disk_full(path) from error
    except Exception as error:
        # safetensors and torch report the same condition as errors of their own kinds, torch
        # without its reason.
        if "os error 28" not in str(error) and not _is_full(path):
            raise
        raise _disk_full(path) from error


def _is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < _FULL_BYTES
    except OSError:
        return False


def _disk_full(path: Path) -> DiskFullError:
    return DiskFullError(
        f"no space left on the disk while writing {path}. Everything finished before is intact; "
        "free some space and run the same command to go on."
    )


def exclusive(folder: Path) -> AbstractContextManager[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises:
        StockpotError: if another process holds or shares it.
    """
    return _locked(folder, alone=True)


def shared(folder: Path) -> AbstractContextManager[None]:
    """Hold a folder together with others that share it.

    Raises:
        StockpotError: if another process holds it for itself.
    """
    return _locked(folder, alone=False)


@contextlib.contextmanager
def _locked(folder: Path, alone: bool) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # not on this system; two runs in one folder are then not noticed
        yield
        return
    path = folder / ".lock"
    with space_errors(path):
        file = path.open("a+")  # sharing a lock on NFS wants a file that may be read
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StockpotError(
                f"another stockpot process is working in {folder}. Wait for it, or choose another "
                "folder with --output"
            ) from error
        yield


def await_file(
    look: Callable[[], _T | None], folder: Path, seconds: float = NETWORK_SECONDS
) -> _T | None:
    """What ``look`` finds in ``folder``, as soon as it finds something; None if it never does.

    A network file system may take a while to show here what was written on another machine.
    """
    deadline = time.monotonic() + seconds
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # so that what was not there before is asked for once more
    return found


def remove_scratch(folder: Path) -> None:
    """Delete what writes that were cut short by a kill left behind."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to that becomes ``path`` in one step, or leaves nothing behind."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with space_errors(path):
            yield scratch
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with _replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """Read a text file of the record.

    Raises:
        DamagedRecordError: if it is missing.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DamagedRecordError(f"{path} is missing from the record") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of the record.

    Raises:
        DamagedRecordError: if it is missing or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedRecordError(f"{path} is damaged: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as a safetensors file, atomically: same tensors, same bytes."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as scratch:
        # No metadata: safetensors writes its keys in an order that changes from call to call.
        save_file(plain, str(scratch))


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file into memory.

    Raises:
        DamagedRecordError: if it is missing, is not readable, or its hash is not the expected one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DamagedRecordError(f"{path} is missing from the record")
    if expected_sha256 is not None and sha256(path) != expected_sha256:
        raise DamagedRecordError(
            f"{path} is not the file that was written (its SHA-256 differs from the manifest's)"
        )
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedRecordError(f"{path} is damaged: {error}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_manifest(folder: Path, manifest: Mapping[str, Mapping[str, Any]], record: Path) -> None:
    """Check that files are there and are those that were written.

    Args:
        folder: where they are.
        manifest: their ``bytes`` and ``sha256``, by name.
        record: the whole experiment's folder, for the message.

    Raises:
        DamagedRecordError: if one is not.
    """
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            raise DamagedRecordError(f"{path} is missing from the record")
        size = path.stat().st_size
        # Hashing many large models at every start would cost more than it is worth.
        small = size <= _HASH_AT_START
        if size != entry["bytes"] or (small and sha256(path) != entry["sha256"]):
            raise DamagedRecordError(
                f"{path} is not the file that was written (the manifest has another size or "
                f"SHA-256). Restore it, or delete {record} to run the experiment again"
            )


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link where the file system allows it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with _replacing(target) as scratch:
            shutil.copyfile(source, scratch)
