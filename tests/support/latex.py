"""A small reader of LaTeX tables."""

from __future__ import annotations

import re

MEANS = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    **{f"\\{letter}": letter for letter in "&%$#_{}"},
    "{[}": "[",
    "{]}": "]",
    "{*}": "*",
    '{"}': '"',
}
"""What TeX sets for these, from the LaTeX companion's table of text symbols."""
_TOKEN = re.compile("|".join(map(re.escape, sorted(MEANS, key=len, reverse=True))))


def shown(text: str) -> str:
    """What LaTeX sets for a text; fails on a character that would not be set as itself."""
    at, found = 0, ""
    while at < len(text):
        if match := _TOKEN.match(text, at):
            found += MEANS[match[0]]
            at = match.end()
        else:
            assert text[at] not in "\\&%$#_{}~^<>", f"{text[at]!r} is bare in {text!r}"
            found += text[at]
            at += 1
    return found


def parse(tex: str) -> tuple[list[str], list[list[str]], str]:
    """Heads, rows and the caption of the table; checks its structure on the way."""
    lines = [line.strip() for line in tex.splitlines() if not line.startswith("%")]
    opened: list[str] = []
    for line in lines:
        for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", line):
            if kind == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name
    assert opened == []
    (spec,) = re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}", tex)
    assert [line for line in lines if line.endswith("rule")] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    top, middle, bottom = (lines.index(rf"\{name}rule") for name in ("top", "mid", "bottom"))
    body = [*lines[top + 1 : middle], *lines[middle + 1 : bottom]]
    rows = []
    for line in body:
        assert line.endswith(r"\\")
        assert not line.startswith(("[", "*")), "an argument of the break before it"
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))])
    assert {len(row) for row in rows} == {len(spec)}
    bare = re.sub(r"\\[{}]", "", tex)
    assert bare.count("{") == bare.count("}")
    depth = 0
    for letter in bare:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    (caption,) = re.findall(r"\\caption\{(.*)\}$", tex, re.M)
    return [shown(cell) for cell in rows[0]], rows[1:], caption
