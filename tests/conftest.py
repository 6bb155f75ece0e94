import os
from pathlib import Path

# One thread: small tensors are fastest so, forked children stay safe, and two test workers fit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def mirror() -> Path:
    """The offline mirror of real data sets; tests that need it are skipped without it."""
    folder = os.environ.get("STOCKPOT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs STOCKPOT_DATA, a folder with the hub's data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def stories() -> Path:
    """A tiny real language model with its tokenizer: a folder in STOCKPOT_MODELS."""
    models = os.environ.get("STOCKPOT_MODELS")
    if not models:
        pytest.skip("set STOCKPOT_MODELS to a folder that holds stories260K")
    return Path(models) / "stories260K"
