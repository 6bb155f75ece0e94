"""The embedded data set: scikit-learn's handwritten digits, real images without a download."""

from __future__ import annotations

import torch

from stockpot.streams.images import LabelledImages

__all__ = ["load_digits"]


def load_digits() -> LabelledImages:
    """1,797 images of 8x8 pixels in [0, 1]; 80 % of each label to train, 20 % to test.

    The split is fixed and stratified (``train_test_split`` with ``random_state=0``), so that every
    run and every seed scores the same 360 images.
    """
    from sklearn.datasets import load_digits as read
    from sklearn.model_selection import train_test_split

    bunch = read()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, random_state=0, stratify=bunch.target
    )
    return LabelledImages(images[train], labels[train], images[test], labels[test])
