"""Colours that people with any colour vision tell apart, by simulation."""

from itertools import combinations

import numpy as np
import pytest

from stockpot.methods import METHODS
from stockpot.report.style import METHOD_COLOURS, METHOD_MARKERS, METHOD_TITLES, colour, marker

# Colours.


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
CURVES = ("sfa", "l2", "ewc", "wise-ft", "rehearsal", "task-arithmetic", "ties")


def cielab(colour: str, vision: str) -> np.ndarray:
    """How somebody with this vision sees the colour, in CIE L*a*b* (D65)."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    share = RGB_TO_XYZ @ seen / RGB_TO_XYZ.sum(axis=1)
    root = np.where(share > (6 / 29) ** 3, np.cbrt(share), share * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = root
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_simulation_does_what_is_known():
    """Grey stays grey; red and green of one lightness come together."""
    for vision in VISION:
        assert np.linalg.norm(cielab("#808080", vision)[1:]) < 0.5
    red_green = [
        np.linalg.norm(cielab("#CC4444", vision) - cielab("#777722", vision)) for vision in VISION
    ]
    assert red_green[2] < 0.5 * red_green[0]
    assert np.linalg.norm(cielab("#FFFFFF", "usual") - [100, 0, 0]) < 0.1


@pytest.mark.parametrize(
    "vision",
    [
        "usual",
        "protanopia",
        "deuteranopia",
    ],
)
def test_colours_of_curves_are_told_apart(vision):
    """At least 10 in CIE76, some four times what is just noticeable on large patches."""
    apart = {
        (a, b): float(
            np.linalg.norm(cielab(METHOD_COLOURS[a], vision) - cielab(METHOD_COLOURS[b], vision))
        )
        for a, b in combinations(CURVES, 2)
    }
    assert {pair: d for pair, d in apart.items() if d < 10} == {}


def test_every_method_has_a_look_of_its_own():
    for table in (METHOD_COLOURS, METHOD_MARKERS, METHOD_TITLES):
        assert table.keys() == METHODS.keys()
        assert len(set(table.values())) == len(METHODS)
    assert colour("not-of-ours").startswith("#")
    assert marker("not-of-ours")
    assert {name for name in METHODS if METHODS[name].curve} - {"l1"} == set(CURVES)
