"""SFA in a real Composer Trainer; run by `make test-composer` in an environment of its own."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("composer")


@pytest.mark.parametrize("duration", ["2ep", "16ba"])
def test_it_averages_by_counting_batches(duration: str) -> None:
    from composer import Trainer
    from composer.models import ComposerModel

    from stockpot.integrations.composer import SFA

    class Model(ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 2)

        def forward(self, batch: Any) -> Any:
            return self.layer(batch[0])

        def loss(self, outputs: Any, batch: Any) -> Any:
            return (outputs - batch[1]).square().mean()

    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :2]), batch_size=8)
    model, hand = Model(), Model()
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    sfa = SFA(p=0.25, beta=0.3)
    Trainer(
        model=model,
        train_dataloader=data,
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[sfa],
        device="cpu",
        progress_bar=False,
    ).fit()
    assert [event.step for event in sfa.events] == [4, 8, 12, 16]
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.1)
    for step in range(1, 17):
        rows = slice(8 * ((step - 1) % 8), 8 * ((step - 1) % 8) + 8)
        optimizer.zero_grad()
        (hand.layer(x[rows]) - x[rows, :2]).square().mean().backward()
        optimizer.step()
        if step % 4 == 0:
            for n, p in hand.named_parameters():
                p.data.copy_(0.3 * start[n] + 0.7 * p.detach().double())
    for name, weight in hand.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], weight)
