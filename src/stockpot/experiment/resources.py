"""What one run needs of a machine, as an experiment's file may say it."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["ResourceSettings"]

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


class ResourceSettings(BaseModel):
    """What each run is given when several run at once (``--jobs``, ``--on``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: int = Field(1, ge=1, description="CPU cores of one run")
    gpus: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="GPUs of one run: a whole number, or a fraction below 1 that divides one; 0 on "
        "a machine with GPUs: all of them are shared by all runs in turn",
    )
    memory: str | None = Field(
        None, description="host memory of one run, such as 8 GB or 500 MiB; null: not counted"
    )
    retries: int = Field(
        2, ge=0, description="how often a run is tried again whose process was killed"
    )

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus = {gpus}: above 1 only whole GPUs can be given to a run")
        return gpus

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, memory: str | None) -> str | None:
        if memory is not None and not _bytes(memory):
            raise ValueError(f"memory = {memory!r} is no size; write 8 GB, 500 MiB or the like")
        return memory

    @property
    def processes(self) -> int:
        """How many processes share a run where a batch system starts it: one per GPU."""
        return max(1, int(self.gpus))

    @property
    def memory_bytes(self) -> int | None:
        """``memory`` in bytes."""
        return None if self.memory is None else _bytes(self.memory)


def _bytes(text: str) -> int:
    """Bytes of ``8 GB`` (10**9) or ``8 GiB`` (2**30); 0 if it is none."""
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        return 0
    number, unit, binary = found.groups()
    power = " kmgt".index(unit.lower() or " ")
    return int(float(number) * (1024**power if binary else 1000**power))
