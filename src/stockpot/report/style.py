"""How methods look in every figure: one colour, one marker, one name each."""

from __future__ import annotations

__all__ = [
    "DARK_COLOURS",
    "METHOD_COLOURS",
    "METHOD_MARKERS",
    "METHOD_TITLES",
    "colour",
    "dark_colour",
    "literal",
    "marker",
    "symbol",
    "title",
]

# Okabe and Ito (2008) and four more, distinguishable with every common colour vision deficiency;
# methods differ in their marker too.
METHOD_COLOURS = {
    "sfa": "#D55E00",
    "wise-ft": "#E69F00",
    "l2": "#009E73",
    "l1": "#745774",
    "ewc": "#0072B2",
    "rehearsal": "#CC79A7",
    "task-arithmetic": "#56B4E9",
    "ties": "#4B0082",
    "fisher-merging": "#928546",
    "sequential": "#881225",
    "multitask": "#000000",
}
# The same on a dark page, each with a contrast of 3 or more against it.
DARK_COLOURS = {
    "sfa": "#F0701A",
    "wise-ft": "#EDE243",
    "l2": "#2BA67D",
    "l1": "#63788C",
    "ewc": "#3F7CC4",
    "rehearsal": "#CBBBCC",
    "task-arithmetic": "#56B4E9",
    "ties": "#9346E8",
    "fisher-merging": "#DFA967",
    "sequential": "#B74737",
    "multitask": "#FFFFFF",
}
METHOD_MARKERS = {
    "sfa": "o",
    "wise-ft": ">",
    "l2": "s",
    "l1": "p",
    "ewc": "^",
    "rehearsal": "D",
    "task-arithmetic": "P",
    "ties": "v",
    "fisher-merging": "<",
    "sequential": "X",
    "multitask": "*",
}
# Plotly's names of the same markers.
_SYMBOLS = {
    "o": "circle",
    ">": "triangle-right",
    "s": "square",
    "p": "pentagon",
    "^": "triangle-up",
    "D": "diamond",
    "P": "cross",
    "v": "triangle-down",
    "<": "triangle-left",
    "X": "x",
    "*": "star",
}
METHOD_TITLES = {
    "sfa": "SFA",
    "wise-ft": "WiSE-FT",
    "l2": "L2",
    "l1": "L1",
    "ewc": "EWC",
    "rehearsal": "rehearsal",
    "task-arithmetic": "task arithmetic",
    "ties": "TIES",
    "fisher-merging": "Fisher merging",
    "sequential": "sequential",
    "multitask": "multitask",
}


def colour(method: str) -> str:
    """The method's colour."""
    return METHOD_COLOURS.get(method, "#444444")


def dark_colour(method: str) -> str:
    """The method's colour on a dark page."""
    return DARK_COLOURS.get(method, "#AAAAAA")


def symbol(method: str) -> str:
    """The method's marker on the page."""
    return _SYMBOLS[marker(method)]


def marker(method: str) -> str:
    """The method's marker."""
    return METHOD_MARKERS.get(method, "o")


def literal(text: str) -> str:
    """Text that matplotlib shows as it is, and does not read as mathematics."""
    return text.replace("$", r"\$")


def title(method: str) -> str:
    """The method's name as a reader would write it."""
    return METHOD_TITLES.get(method, method)
