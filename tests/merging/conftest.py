"""Small checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.merging import tensors_of, write_model

SHAPES = {
    "model.embed_tokens.weight": (97, 24),
    "model.layers.0.mlp.weight": (48, 24),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.weight": (48, 24),
    "model.layers.1.norm.weight": (24,),
    "model.layers.2.mlp.weight": (90, 101),
    "model.scalar": (),
    "model.empty": (0, 5),
    "lm_head.weight": (97, 24),
}


@pytest.fixture
def models(tmp_path: Path) -> Callable[..., tuple[Path, list[Path]]]:
    """A function that writes a base and models tuned from it; returns their folders."""

    def make(
        count: int = 3, dtype: str = "BF16", shards: int = 1, **config: Any
    ) -> tuple[Path, list[Path]]:
        base = tensors_of(0, SHAPES, dtype)
        settings = {"model_type": "toy", **config}
        folder = write_model(tmp_path / "base", base, settings, shards)
        tuned = [
            write_model(
                tmp_path / f"tuned{i}", tensors_of(i + 1, SHAPES, dtype, base), settings, shards
            )
            for i in range(count)
        ]
        return folder, tuned

    return make


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the format's own library."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
