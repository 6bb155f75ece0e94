"""SFACallback in a real Lightning Trainer."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stockpot.errors import StockpotError

lightning = pytest.importorskip("lightning.pytorch")

from stockpot.integrations.lightning import SFACallback  # noqa: E402

DATA = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 2)
        self.optimizers_wanted = optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = (self.layer(batch) - batch[:, :2]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        made = [torch.optim.AdamW(self.parameters(), lr=0.05) for _ in range(2)]
        return made[: self.optimizers_wanted]


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    values = {"max_epochs": 2, "accumulate_grad_batches": 2, **settings}
    return lightning.Trainer(
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **values,
    )


def loader() -> Any:
    return torch.utils.data.DataLoader(DATA, batch_size=8)


def checkpoints(folder: Path) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def weights(module: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


class Averager(lightning.Callback):  # type: ignore[misc, name-defined]
    """Algorithm 1 in float64, without the library: 8 steps, merges at 2, 4, 6, 8."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.start = {n: p.double() for n, p in weights(module).items()}
        self.done = 0

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step > self.done and trainer.global_step % 2 == 0:
            for n, p in module.named_parameters():
                p.data.copy_(0.3 * self.start[n] + 0.7 * p.detach().double())
        self.done = trainer.global_step


def test_averages_at_the_merge_steps_and_in_the_checkpoint(tmp_path: Path) -> None:
    ours, hand = Module(), Module()
    callback = SFACallback(p=0.25, beta=0.3)
    trainer(tmp_path, callback, checkpoints(tmp_path)).fit(ours, loader())
    trainer(tmp_path / "b", Averager(), enable_checkpointing=False).fit(hand, loader())
    assert [event.step for event in callback.events] == [2, 4, 6, 8]
    for name, weight in weights(hand).items():
        torch.testing.assert_close(weights(ours)[name], weight, rtol=1e-5, atol=1e-6)
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=False)["state_dict"]
    for name, weight in weights(ours).items():
        assert torch.equal(saved[name], weight)


@pytest.mark.parametrize("step", [4, 8])  # ends of epochs: Lightning resumes exactly there
def test_resumed_from_a_checkpoint_it_ends_at_the_same_bits(tmp_path: Path, step: int) -> None:
    whole, resumed = Module(), Module()
    first = SFACallback(p=0.25, beta=0.3)
    trainer(tmp_path, first, checkpoints(tmp_path), max_epochs=3).fit(whole, loader())
    again = SFACallback(p=0.25, beta=0.3)
    trainer(tmp_path, again, max_epochs=3).fit(
        resumed, loader(), ckpt_path=str(tmp_path / f"step={step}.ckpt"), weights_only=False
    )
    assert [event.step for event in again.events] == [3, 6, 9, 12]
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name


class Stop(lightning.Callback):  # type: ignore[misc, name-defined]
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 5


def test_stopped_early_it_averages_in_memory_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SFACallback(p=0.5)
    with caplog.at_level(logging.WARNING, logger="stockpot"):
        trainer(tmp_path, callback, Stop()).fit(Module(), loader())
    assert [event.step for event in callback.events] == [4, 5]
    assert "trainer.save_checkpoint()" in caplog.text


def test_a_length_that_is_not_known_and_several_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="total_steps = inf"):
        trainer(tmp_path, SFACallback(), max_epochs=-1).fit(Module(), loader())
    with pytest.raises(StockpotError, match="one optimizer"):
        trainer(tmp_path, SFACallback(), accumulate_grad_batches=1).fit(Module(2), loader())
