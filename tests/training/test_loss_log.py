"""What a watcher is told between two recorded losses."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from stockpot.training import losses as logging
from stockpot.training.losses import LossLog


@given(
    losses=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=120),
    asked=st.sets(st.integers(1, 120)),
    resumed=st.integers(0, 120),
)
def test_glimpses_are_means_since_the_last_and_change_nothing(losses, asked, resumed):
    before = logging._GLIMPSE_SECONDS
    logging._GLIMPSE_SECONDS = 0.0
    try:
        watched, alone = LossLog(len(losses)), LossLog(len(losses))
        told = 0
        for step, loss in enumerate(losses, 1):
            for log in (watched, alone):
                log.add(torch.tensor(loss))
            alone.close_window(step)
            if watched.close_window(step) is not None:
                told = step
            elif step in asked:
                np.testing.assert_allclose(
                    watched.glimpse(step), np.mean(losses[told:step]), rtol=1e-6, atol=1e-9
                )
                told = step
            if step == resumed:
                state, watched = watched.state(), LossLog(len(losses))
                watched.restore(state, torch.device("cpu"))
                told = watched.points[-1][0] if watched.points else 0
        assert watched.points == alone.points
    finally:
        logging._GLIMPSE_SECONDS = before


def test_no_glimpse_so_soon():
    log = LossLog(1000)
    log.add(torch.tensor(1.0))
    assert log.glimpse(1) is None
