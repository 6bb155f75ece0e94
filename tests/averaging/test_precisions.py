"""The plain writer in each precision and store, in one process, against a float64 average."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stockpot.averaging import SFA

BETA = 0.4
# Half a unit in the last place, relative; weights are stored in this precision.
ROUNDING = {
    torch.float64: 1e-15,
    torch.float32: 2**-24,
    torch.bfloat16: 2**-9,
    torch.float16: 2**-11,
}


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


class Run:
    """A training loop as users write it, in one of the ways to use low precision."""

    def __init__(self, kind: str) -> None:
        dtype = getattr(torch, kind.split("-")[1]) if kind.startswith("pure") else torch.float32
        self.model = net(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02, eps=1e-4)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind.startswith("autocast"))
        self.scaler = torch.amp.GradScaler(
            "cpu", enabled=kind == "autocast-scaler", init_scale=16.0
        )
        self.dtype = dtype

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 6, generator=generator).to(self.dtype)
        y = torch.randint(4, (8,), generator=generator)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.model(x).float(), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("store", ["device", "cpu", "disk", "path"])
@pytest.mark.parametrize(
    "kind",
    [
        "pure-float64", "pure-float32", "pure-bfloat16", "pure-float16",
        "autocast", "autocast-scaler",
    ],
)  # fmt: skip
def test_an_average_is_rounded_once_and_the_next_step_starts_from_it(
    kind: str, store: str, tmp_path: Path
) -> None:
    run = Run(kind)
    start = weights(run.model)
    settings: dict[str, Any] = {"store": store}
    if store == "path":
        from safetensors.torch import save_file

        save_file(dict(run.model.state_dict()), tmp_path / "anchor.safetensors")
        settings = {"anchor": tmp_path / "anchor.safetensors"}
    sfa = SFA(every=3, beta=BETA, **settings).attach(run.model, run.optimizer, total_steps=7)
    for number in range(1, 4):
        run.step(number)
        before = weights(run.model)
        sfa.step()
    expected = {n: BETA * start[n] + (1 - BETA) * before[n] for n in start}
    torch.save(run.model.state_dict(), tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    for name, weight in weights(run.model).items():
        # 2: the float32 arithmetic before the one rounding.
        bound = 2 * ROUNDING[run.dtype] * expected[name].abs() + 1e-7 * (run.dtype.itemsize < 8)
        assert bool(((weight - expected[name]).abs() <= bound).all()), name
        assert torch.equal(saved[name].double(), weight)
    # The same optimizer, put on the reference by hand, takes the same step.
    reference = Run(kind)
    reference.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    reference.scaler.load_state_dict(run.scaler.state_dict())
    with torch.no_grad():
        for name, parameter in reference.model.named_parameters():
            parameter.copy_(expected[name])
    run.step(4)
    sfa.step()
    reference.step(4)
    for name, weight in weights(run.model).items():
        assert float((weight - weights(reference.model)[name]).abs().max()) <= 0.02 * 2**-3, name
        assert float((weight - expected[name]).abs().max()) > 0, name
