"""Files that several processes and machines use at once."""

import os
import threading
from pathlib import Path

import pytest
import torch

from stockpot.errors import StockpotError
from stockpot.files import await_file, exclusive, shared
from stockpot.methods.base import Memory
from stockpot.processes import Processes


def test_a_shared_lock_is_on_a_file_that_may_be_read(tmp_path: Path) -> None:
    """NFS refuses a shared lock on a file that was opened for writing alone."""
    with shared(tmp_path), shared(tmp_path):
        held = [
            number
            for number in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{number}")
            and os.readlink(f"/proc/self/fd/{number}") == str(tmp_path / ".lock")
        ]
        assert len(held) == 2
        for number in held:
            flags = Path(f"/proc/self/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
            assert int(flags, 8) & os.O_ACCMODE == os.O_RDWR
        with pytest.raises(StockpotError, match="another stockpot process"), exclusive(tmp_path):
            pass


def test_what_another_machine_writes_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "late"
    threading.Timer(0.3, path.touch).start()
    assert await_file(lambda: path if path.exists() else None, tmp_path, 20) == path
    assert await_file(lambda: None, tmp_path / "nowhere", 0.2) is None


class Other(Processes):
    """A process whose main one has found something before it."""

    def from_main(self, decide):
        decide()
        return ["ewc-0000.safetensors", "ewc-0001.safetensors"]


def test_all_processes_read_what_the_main_one_names(tmp_path: Path) -> None:
    """On a network file system a process may see what was kept last a while later."""
    Memory(tmp_path, 0).save("ewc", {"w": torch.zeros(2)})
    late = threading.Timer(0.5, lambda: Memory(tmp_path, 1).save("ewc", {"w": torch.ones(2)}))
    late.start()
    found = Memory(tmp_path, 2, Other(rank=1, world=2)).load("ewc")
    assert found is not None
    assert found["w"].tolist() == [1.0, 1.0]
    late.join()
    assert len(Memory(tmp_path, 2, Other(rank=1, world=2)).load_all("ewc")) == 2
    Memory(tmp_path, 2, Other(rank=1, world=2)).save("ewc", {"w": torch.ones(2)})
    assert not (tmp_path / "ewc-0002.safetensors").exists(), "only the main process writes"
