"""How methods look in every figure: one colour, one marker, one name each."""

from __future__ import annotations

__all__ = [
    "METHOD_COLOURS",
    "METHOD_MARKERS",
    "METHOD_TITLES",
    "colour",
    "literal",
    "marker",
    "title",
]

# Okabe and Ito (2008), distinguishable with every common colour vision deficiency; methods that
# share a colour differ in their marker and are rarely drawn as curves together.
METHOD_COLOURS = {
    "sfa": "#D55E00",
    "wise-ft": "#E69F00",
    "l2": "#009E73",
    "l1": "#999999",
    "ewc": "#0072B2",
    "rehearsal": "#CC79A7",
    "task-arithmetic": "#56B4E9",
    "ties": "#4B0082",
    "fisher-merging": "#8C6D31",
    "sequential": "#B22222",
    "multitask": "#000000",
}
METHOD_MARKERS = {
    "sfa": "o",
    "wise-ft": "h",
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


def marker(method: str) -> str:
    """The method's marker."""
    return METHOD_MARKERS.get(method, "o")


def literal(text: str) -> str:
    """Text that matplotlib shows as it is, and does not read as mathematics."""
    return text.replace("$", r"\$")


def title(method: str) -> str:
    """The method's name as a reader would write it."""
    return METHOD_TITLES.get(method, method)
