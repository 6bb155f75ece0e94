"""The pages of "Add SFA to your trainer": their code is run, and prints what they say."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[1] / "docs" / "trainers"
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>.*?) -->\n)?```python\n(?P<code>.*?)```(?:\n\n```\n(?P<output>.*?)```)?",
    re.DOTALL,
)
NEEDS = {"trl.md": "trl", "lightning.md": "lightning"}


def blocks(page: str) -> Iterator[re.Match[str]]:
    yield from BLOCK.finditer((PAGES / page).read_text())


@pytest.mark.parametrize("page", ["pytorch.md", "transformers.md", "trl.md", "lightning.md"])
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page):
        mark = block["mark"] or ""
        if mark.startswith("not run"):
            continue
        if mark.startswith("needs a model"):
            names["MODEL"] = str(request.getfixturevalue("stories"))
        exec(compile(block["code"], page, "exec"), names)  # all blocks of a page in one program
        ran += 1
        if block["output"]:
            assert capsys.readouterr().out.endswith(block["output"])
    assert ran


def test_only_code_for_libraries_that_are_not_installed_is_not_run() -> None:
    skipped = [
        (page.name, block["mark"])
        for page in sorted(PAGES.glob("*.md"))
        for block in blocks(page.name)
        if (block["mark"] or "").startswith("not run")
    ]
    assert [page for page, _ in skipped] == ["composer.md", "transformers.md", "transformers.md"]


@pytest.mark.parametrize("page", ["transformers.md", "composer.md"])
def test_code_that_is_not_run_at_least_compiles(page: str) -> None:
    for block in blocks(page):
        compile(block["code"], page, "exec")


def test_every_setting_is_in_the_table() -> None:
    import inspect

    from stockpot import SFA

    table = (PAGES / "README.md").read_text()
    for name, parameter in inspect.signature(SFA).parameters.items():
        assert f"| `{name}` |" in table
        if isinstance(parameter.default, int | float):
            assert f"| `{name}` | {parameter.default} |" in table
