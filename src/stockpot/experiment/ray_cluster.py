"""The connection to a Ray cluster: one that is there, or one of this machine and of ours alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stockpot.errors import ConfigError, StockpotError, first_line

__all__ = ["Cluster"]

_CLIENT = "ray://"
_OBJECT_STORE = 80 * 2**20
"""Bytes; Ray's least is 75 MiB, and nothing of ours goes through it."""
_TOKEN = secrets.token_hex(32)
"""Keeps other users of this machine out of a cluster of ours; Ray reads it once per process."""
_CONNECT_SECONDS = 10.0
_LONGEST_TEMPORARY = 30
"""Of a folder's path, for Ray's sockets lie below and a socket's path has at most 107 bytes."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # all that Ray itself would print of a worker that died
}


class Cluster:
    """The connection to Ray, and Ray itself if we started it."""

    def __init__(self, address: str | None) -> None:
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(_environment(_QUIET))
        try:
            self.own = self._connect(_plain(address))
        except BaseException:
            self._undo.close()
            raise

    def _connect(self, address: str | None) -> bool:
        """Whether a cluster was started."""
        import ray

        if ray.is_initialized():  # by the program that called us; it stays as it is
            return False
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        try:
            if address != "local" and (address or _one_runs()):
                _check_answers(address or os.environ.get("RAY_ADDRESS"))
                ray.init(address=address or "auto", **quiet)
                self._undo.callback(ray.shutdown)
                return False
        except (ConnectionError, RuntimeError, ValueError, OSError, ImportError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address or os.environ.get('RAY_ADDRESS') or 'auto'}: "
                f"{first_line(error)}. Ray's client listens on port 10001 of the head node "
                "(--on ray://HOST:10001); a cluster with a token wants RAY_AUTH_MODE=token; "
                "--on ray://local starts a cluster on this machine"
            ) from error
        self._start(quiet)
        return True

    def _start(self, quiet: Mapping[str, Any]) -> None:
        import ray

        _remove_abandoned()
        folder = _temporary_folder()
        self._undo.callback(shutil.rmtree, folder, ignore_errors=True)
        # Ray asks for a token, and would leave one in the user's home folder.
        ours = {"RAY_AUTH_TOKEN": _TOKEN}
        # As without Ray: a machine that is nearly full is the kernel's business. In containers Ray
        # may take the machine's memory for its own.
        ours |= {"RAY_memory_monitor_refresh_ms": "0"}
        self._undo.callback(_read_environment_anew)
        self._undo.enter_context(_environment(ours))
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                **quiet,
            )
        except Exception as error:
            raise StockpotError(
                f"Ray does not start on this machine: {first_line(error)}. --jobs N runs N "
                "processes without it"
            ) from error
        self._undo.callback(ray.shutdown)

    def nodes(self) -> list[Mapping[str, float]]:
        """What each machine of the cluster has."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def close(self) -> None:
        """Leave the cluster; stop it if it is ours."""
        self._undo.close()


def _plain(address: str | None) -> str | None:
    """``ray://auto`` and ``ray://local`` are no hosts."""
    word = (address or "").removeprefix(_CLIENT)
    if word in ("", "auto"):
        return None
    return word if word == "local" else address


def _check_answers(address: str | None) -> None:
    """Raise OSError if nobody listens; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix(_CLIENT).rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


def _one_runs() -> bool:
    """Whether there is a cluster to be used unasked.

    One that another program started for itself alone is none: it ends with that program.
    """
    if os.environ.get("RAY_ADDRESS"):
        return True
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None) is not None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, as long as this lasts; Ray's own changes go with them."""
    before = set(os.environ)
    os.environ.update({key: value for key, value in values.items() if key not in before})
    try:
        yield
    finally:
        for key in set(os.environ) - before:
            if key.startswith("RAY_") or key == "PYTHONBREAKPOINT":
                del os.environ[key]


def _read_environment_anew() -> None:
    """Have Ray forget the token of a cluster of ours: nothing of another one would reach us."""
    with contextlib.suppress(AttributeError):  # older versions have no tokens
        from ray import _raylet

        library: Any = _raylet
        library.Config.initialize("")
        library.AuthenticationTokenLoader.instance().reset_cache()


def _temporary_folder() -> Path:
    """A folder for Ray's logs and sockets, named after this process."""
    base = tempfile.gettempdir()
    base = base if len(base) <= _LONGEST_TEMPORARY else "/tmp"
    return Path(tempfile.mkdtemp(prefix=f"stockpot-{os.getpid()}-", dir=base))


def _remove_abandoned() -> None:
    """Delete the folders of processes that were killed."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(base).glob("stockpot-*-*"):
            with contextlib.suppress(ValueError, PermissionError):
                pid = int(folder.name.split("-")[1])
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    shutil.rmtree(folder, ignore_errors=True)
