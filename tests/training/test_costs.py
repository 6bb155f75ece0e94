"""Peak memory of a stretch of work, seen from outside: a large allocation made and freed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stockpot.training.costs import PeakMemory

MB = 10**6
CPU = torch.device("cpu")


def resettable() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


needs_reset = pytest.mark.skipif(not resettable(), reason="this system cannot reset the peak")


def peak_of(work: Callable[[], object], memory: PeakMemory | None = None) -> int:
    memory = PeakMemory(CPU) if memory is None else memory
    memory.start()
    work()
    return memory.stop()


def allocate() -> None:
    block = torch.ones(300 * MB // 4)  # 300 MB, every page touched
    assert float(block[-1]) == 1
    del block


@needs_reset
def test_sees_what_was_made_and_freed_in_between():
    idle = peak_of(lambda: None)
    busy = peak_of(allocate)
    assert 280 * MB < busy - idle < 400 * MB


@needs_reset
def test_a_second_start_forgets_the_first_peak():
    memory = PeakMemory(CPU)
    idle = peak_of(lambda: None, memory)
    busy = peak_of(allocate, memory)
    again = peak_of(lambda: None, memory)
    assert busy - again > 200 * MB
    assert abs(again - idle) < 100 * MB


@needs_reset
def test_two_stops_after_one_start_give_the_same_peak():
    memory = PeakMemory(CPU)
    first = peak_of(allocate, memory)
    assert memory.stop() == pytest.approx(first, rel=0.02)


@needs_reset
def test_work_before_the_start_does_not_count():
    memory = PeakMemory(CPU)
    idle = peak_of(lambda: None)
    allocate()
    assert peak_of(lambda: None, memory) - idle < 100 * MB


@needs_reset
def test_counts_what_stays_allocated():
    held: list[torch.Tensor] = []
    idle = peak_of(lambda: None)
    peak = peak_of(lambda: held.append(torch.ones(200 * MB // 4)))
    assert 180 * MB < peak - idle < 300 * MB
    # A second stretch that only holds it has it as well.
    assert peak_of(lambda: None) - idle > 150 * MB


@needs_reset
def test_is_in_bytes_and_the_whole_process():
    memory = PeakMemory(CPU)
    memory.start()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = memory.stop()
    assert peak == pytest.approx(
        pages * os.sysconf("SC_PAGE_SIZE"), rel=0.015
    )  # closer than 1000 is to 1024
    assert peak > 100 * MB  # torch alone is more
