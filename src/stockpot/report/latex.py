"""The results as a LaTeX table with the rules of the package booktabs."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.report.table import Column, Group, method_title

__all__ = ["to_latex"]

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # At the beginning of a row they would belong to the \\ before it.
    "[": "{[}",
    "*": "{*}",
}


def escape(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    return "".join(_SPECIAL.get(letter, letter) for letter in " ".join(text.splitlines()))


def to_latex(groups: Sequence[Group], columns: Sequence[Column], tasks: Sequence[str]) -> str:
    r"""A ``table`` with one row per method and setting: ``$81.2 \pm 2.0$``.

    Needs ``\usepackage{booktabs}``; ``±`` is half of a 95 % interval, as everywhere.
    """
    shown = [c for c in columns if any(c.value(group) is not None for group in groups)]
    head = [_head(column) for column in shown]
    rows = [" & ".join([escape(method_title(g)), *(_cell(c, g) for c in shown)]) for g in groups]
    counts = sorted({len(group.runs) for group in groups})
    runs = f"{counts[-1]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    over = f"mean over {runs} runs $\\pm$ half of a 95\\,\\% interval"
    over = "one run" if counts == [1] else over
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{Scores after the last of {len(tasks)} tasks; {over}.}}",
        f"  \\begin{{tabular}}{{l{'r' * len(shown)}}}",
        r"    \toprule",
        "    " + " & ".join(["method", *head]) + r" \\",
        r"    \midrule",
        *(f"    {row} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _head(column: Column) -> str:
    return escape(f"{column.title} ({column.unit})" if column.unit else column.title)


def _cell(column: Column, group: Group) -> str:
    text = column.text(group)
    if text == "-":
        return "--"
    mean, plus_minus, half = text.partition(" ±")
    return f"${mean} \\pm {half}$" if plus_minus else f"${mean}$"
