"""SFA under DeepSpeed: two processes, against a float64 average taken from the true weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.launch import call_in_processes

pytest.importorskip("deepspeed")

BETA = 0.4
CASES = [
    # stage, precision, where the optimizer's state is, store
    (0, "fp32", "none", "cpu"),
    (0, "bf16", "none", "device"),
    (1, "fp32", "none", "disk"),
    (1, "bf16", "none", "cpu"),
    (2, "bf16", "cpu", "disk"),
    (2, "fp32", "none", "device"),
    (3, "bf16", "none", "cpu"),
    (3, "fp32", "cpu", "disk"),
    (3, "bf16", "cpu", "device"),
]


def engine_of(stage: int, precision: str, offload: str) -> Any:
    import deepspeed

    torch.manual_seed(0)
    # 35 + 7, 21 + 3: neither divides by two processes.
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 10}
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": zero,
            "bf16": {"enabled": precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )[0]


def step(engine: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(10 * seed + engine.global_rank)
    dtype = next(engine.module.parameters()).dtype
    x, y = (torch.randn(4, n, generator=generator).to(dtype) for n in (5, 3))
    engine.backward((engine(x) - y).square().mean())
    engine.step()


def truth(engine: Any) -> dict[str, Tensor]:
    """The whole true weights, by DeepSpeed's own accessor."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        halves = getattr(engine.optimizer, "fp16_groups", None)
        if halves is None:
            return {n: p.detach().double() for n, p in engine.module.named_parameters()}
        masters = {
            id(h): m
            for hs, ms in zip(halves, engine.optimizer.fp32_groups, strict=True)
            for h, m in zip(hs, ms, strict=True)
        }
        return {n: masters[id(p)].detach().double() for n, p in engine.module.named_parameters()}
    return {
        n: safe_get_full_fp32_param(p).detach().double().clone()
        for n, p in engine.module.named_parameters()
    }


def live(engine: Any) -> dict[str, Tensor]:
    """The whole weights that the forward pass computes with."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(
        list(parameters.values()), enabled=engine.zero_optimization_stage() == 3
    ):
        return {n: p.detach().double().clone() for n, p in parameters.items()}


def check(stage: int, precision: str, offload: str, store: Any, folder: Path) -> None:
    from stockpot import SFA

    engine = engine_of(stage, precision, offload)
    start = truth(engine)
    sfa = SFA(every=2, beta=BETA, store=store)
    sfa.attach(engine, engine.optimizer, total_steps=4)
    dtype = next(engine.module.parameters()).dtype
    averaged: dict[str, Tensor] = {}
    for number in range(1, 5):
        step(engine, number)
        before = truth(engine)
        event = sfa.step()
        after, seen = truth(engine), live(engine)
        for name, weight in before.items():
            average = BETA * start[name] + (1 - BETA) * weight
            expected = average if number in (2, 4) else weight
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(seen[name], expected.to(dtype).double(), atol=1e-7, rtol=0)
        if number == 3:  # it started from the average: no element moved by more than a step or two
            for name, weight in after.items():
                assert float((weight - averaged[name]).abs().max()) < 0.04
        if event is not None:
            averaged = after
            gap = sum(float((before[n] - start[n]).square().sum()) for n in start) ** 0.5
            assert abs(event.distance_before - gap) <= 1e-5 * gap
    engine.save_checkpoint(str(folder), tag="last")
    again = engine_of(stage, precision, offload)
    again.load_checkpoint(str(folder), tag="last")
    for name, weight in truth(again).items():
        torch.testing.assert_close(weight, averaged[name], rtol=0, atol=0)


def naive_write_is_undone() -> None:
    engine = engine_of(1, "bf16", "none")
    step(engine, 1)
    before = truth(engine)
    with torch.no_grad():
        for p in engine.module.parameters():
            p.zero_()
    step(engine, 2)
    for name, weight in truth(engine).items():
        assert float((weight - before[name]).abs().max()) < 0.04  # back where it was
    from stockpot import SFA
    from stockpot.errors import StockpotError

    with pytest.raises(StockpotError, match=r"engine\.optimizer"):
        SFA().attach(engine.module, total_steps=4)


def worker(rank: int, folder: str) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    for index, case in enumerate(CASES):
        try:
            check(*case, Path(folder) / str(index))
        except Exception as error:
            error.add_note(f"in the case {case}")
            raise
    naive_write_is_undone()
    torch.distributed.destroy_process_group()


def test_averages_reach_masters_live_weights_and_checkpoints(tmp_path: Path) -> None:
    call_in_processes(worker, str(tmp_path))
