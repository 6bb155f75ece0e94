"""SFA under DDP, FSDP1 and FSDP2: two processes, against a float64 average of whole weights."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.launch import call_in_processes

BETA = 0.4
STORES = ["device", "cpu", "disk", "path"]
KINDS = ["ddp", "fsdp1-orig", "fsdp1-flat", "fsdp2", "fsdp2-mixed", "fsdp2-bf16"]


def bare(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)  # 3 and 1 rows: uneven and empty shards
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1)).to(dtype)


def wrapped(kind: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(bare())
    if kind.startswith("fsdp1"):
        cpu = torch.device("cpu")
        model = bare()
        model[0] = FullyShardedDataParallel(
            model[0], device_id=cpu, use_orig_params=kind == "fsdp1-orig"
        )
        return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=kind == "fsdp1-orig")
    model = bare(torch.bfloat16 if kind == "fsdp2-bf16" else torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if kind == "fsdp2-mixed" else None)
    fully_shard(model[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def whole(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """All weights, by the trainer's own means."""
    if kind == "ddp":
        parameters = model.module.named_parameters()  # type: ignore[union-attr]
        return {n: p.detach().double().clone() for n, p in parameters}
    if kind.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {
                n.replace("_fsdp_wrapped_module.", ""): p.detach().double().clone()
                for n, p in model.named_parameters()
            }
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {n: p.detach().full_tensor().double() for n, p in model.named_parameters()}


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return tuple(torch.randn(4, n, generator=generator).to(dtype) for n in (5, 1))  # type: ignore[return-value]


def check(kind: str, store: str, folder: Path) -> None:
    from stockpot import SFA

    model = wrapped(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dtype = torch.bfloat16 if kind == "fsdp2-bf16" else torch.float32
    start = whole(model, kind)
    settings: dict[str, Any] = {"store": store}
    if store == "path":  # a whole checkpoint, of which each process reads its part
        from safetensors.torch import save_file

        path = folder / f"{kind}-{dist.get_rank()}.safetensors"
        save_file({n: w.to(dtype) for n, w in start.items()}, path)
        settings = {"store": "disk", "anchor": path}
    sfa = SFA(every=2, beta=BETA, **settings).attach(model, optimizer, total_steps=4)
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    last: dict[str, Tensor] = {}
    for step in range(1, 5):
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        with torch.no_grad():  # an evaluation leaves the outermost group gathered
            model(x)
        before = whole(model, kind)
        if kind.startswith("fsdp2"):
            with torch.no_grad():
                model(x)
        event = sfa.step()
        with torch.no_grad():
            output = model(x)
        after = whole(model, kind)
        for name, weight in before.items():
            average = BETA * start[name] + (1 - BETA) * weight if event else weight
            torch.testing.assert_close(after[name], average, rtol=rounding, atol=1e-7)
            if step == 3:  # the step after an average starts from it
                assert float((weight - last[name]).abs().max()) < 0.04
        if kind != "fsdp2-mixed":
            plain = bare(dtype)
            plain.load_state_dict({n: w.to(dtype) for n, w in after.items()})
            torch.testing.assert_close(output.detach(), plain(x).detach(), rtol=1e-2, atol=1e-3)
        if event is not None:
            last = after
            gap = sum(float((before[n] - start[n]).square().sum()) for n in start) ** 0.5
            assert abs(event.distance_before - gap) <= 1e-4 * gap
    sfa.detach()


def naive_write_is_lost() -> None:
    """After an evaluation, FSDP2's outermost parameters are copies."""
    model = wrapped("fsdp2")
    with torch.no_grad():
        model(torch.randn(4, 5))
        before = dict(model.named_parameters())["2.weight"]
        before.data.zero_()
    assert float(whole(model, "fsdp2")["2.weight"].abs().sum()) > 0.1


def no_weights_travel() -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    from stockpot import Anchor, average_

    model = wrapped("fsdp2")
    anchor = Anchor.capture(model)
    with CommDebugMode() as traffic:
        average_(model, anchor, 0.5)
    assert traffic.get_total_counts() <= 1  # one number: whether all is finite


def sharded_anchors_are_saved_in_parts(folder: Path) -> None:
    from stockpot import Anchor

    model = wrapped("fsdp2")
    anchor = Anchor.capture(model)
    anchor.save(folder / "part.safetensors")
    again = Anchor.load(folder / "part.safetensors")
    assert again.local
    assert again.fingerprint() == anchor.fingerprint()
    dist.barrier()
    assert len(list(folder.glob("part-*-of-00002.safetensors"))) == 2


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    for kind in KINDS:
        for store in STORES:
            try:
                check(kind, store, Path(folder))
            except Exception as error:
                error.add_note(f"in the case {kind}, store {store}")
                raise
    naive_write_is_lost()
    no_weights_travel()
    sharded_anchors_are_saved_in_parts(Path(folder))
    dist.destroy_process_group()


def test_averages_reach_the_true_weights_of_every_wrapper(tmp_path: Path) -> None:
    call_in_processes(worker, str(tmp_path))
