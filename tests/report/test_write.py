"""The files that a report is: what is in them, that they are whole, and the same each time."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from stockpot.cli.app import app
from stockpot.errors import StockpotError
from stockpot.experiment import load_experiment, run_experiment
from stockpot.experiment.observer import Observer
from stockpot.report.document import describe_pool
from stockpot.report.findings import headline
from stockpot.report.table import group_runs, to_markdown
from stockpot.report.write import read_pools, render_page, write_report
from support.experiments import run_file, write_experiment
from support.records import TEN, THREE, write_made_up
from support.reports import T2

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source"}
HOSTILE = 'a <b>&amp; "x" --> <!--<script> </style></svg>\u2028<script src=//e.com/x.js></script>'


class Page(HTMLParser):
    """Reads a page, insisting that every element is closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def data(self) -> dict[str, Any]:
        """What the page draws."""
        (data,) = [t for _, t in self.texts if t.startswith('{"experiments"')]
        return dict(json.loads(data))

    def text_of(self, tag: str) -> str:
        return "".join(text for where, text in self.texts if where == tag)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A record as the runner writes it."""
    folder = tmp_path_factory.mktemp("real")
    methods = "[sequential, multitask, {name: sfa, p: [0.5, 1], beta: 0.5}]"
    path = write_experiment(folder, methods, seeds="[0, 1]")
    assert not run_file(path, folder / "out").failures
    write_report(folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report whose every free text tries to break out."""
    folder = write_made_up(
        tmp_path_factory.mktemp("hostile") / "run",
        tasks=[f"{HOSTILE} {n}" for n in range(3)],
        name=HOSTILE,
        labels={"sequential": f"sequential {HOSTILE}"},
        described={"model": {"name": "mlp", "id": HOSTILE}},
    )
    return write_report(folder)


@pytest.mark.parametrize("which", ["hostile", "real"])
def test_the_page_is_well_formed_and_loads_nothing(which, request):
    path = request.getfixturevalue(which)
    page = Page(path if which == "hostile" else path / "report.html")
    names = [tag for tag, _ in page.tags]
    assert not set(names) & {"iframe", "object", "embed", "base", "img", "form", "svg", "b"}
    assert names.count("script") == 9
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in {"src", "srcset", "href", "xlink:href", "action"} & attributes.keys():
            assert (tag, attributes[key]) == ("link", "data:,")
    assert "@import" not in page.text_of("style")
    assert "url(" not in page.text_of("style")
    policy = dict(page.tags)["meta"]
    assert ("meta", {"charset": "utf-8"}) in page.tags
    assert any(
        attributes.get("http-equiv") == "Content-Security-Policy"
        and (attributes.get("content") or "").startswith("default-src 'none'")
        for tag, attributes in page.tags
        if tag == "meta"
    ), policy


def test_hostile_names_reach_the_page_as_they_are(hostile):
    page = Page(hostile)
    (experiment,) = page.data()["experiments"]
    assert experiment["name"] == HOSTILE
    assert experiment["about"]["model"] == HOSTILE
    assert experiment["tasks"] == [f"{HOSTILE} {n}" for n in range(3)]
    assert f"sequential {HOSTILE}" in [group["label"] for group in experiment["groups"]]
    assert page.text_of("title").startswith(HOSTILE)


@given(st.text(max_size=60))
def test_any_name_round_trips_through_the_page(name):
    """JSON in a script element: nothing in a name may end it or be another text."""
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return
    text = render_page([{"name": name, "tables": []}], "now")
    raw = text.split('<script type="application/json" id="data">')[1]
    body = raw.split("</script>")[0]
    assert "<" not in body
    assert json.loads(body)["experiments"] == [{"name": name, "tables": []}]


def test_the_tables_are_there_without_scripts(hostile):
    page = Page(hostile)
    assert "sequential a <b>&amp;" in page.text_of("pre")


def test_the_page_holds_what_the_record_holds(real):
    (pool,) = read_pools([real])
    data = Page(real / "report.html").data()
    assert data["experiments"] == json.loads(json.dumps([describe_pool(pool)]))
    summary = json.loads((real / "summary.json").read_text())
    assert data["experiments"][0]["answer"] == headline(group_runs(summary))
    assert pool.gaps == []


def test_files_of_a_real_record(real):
    summary = json.loads((real / "summary.json").read_text())
    groups = group_runs(summary)
    for file in ("plane.png", "plane.svg", "accuracy_matrix.png", "accuracy_matrix.svg"):
        assert (real / "figures" / file).stat().st_size > 1000
    assert (real / "results.md").read_text() == to_markdown(groups, summary[0]["tasks"])
    assert "booktabs" in (real / "results.tex").read_text()
    rows = list(csv.DictReader((real / "results.csv").open()))
    assert len(rows) == 4
    for row in rows:
        seeds = [run for run in summary if run["label"] == row["setting"]]
        assert int(row["seeds"]) == len(seeds) == 2
        values = [run["R"][-1][0] for run in seeds]
        assert float(row["final.0-1"]) == pytest.approx(sum(values) / 2)
        half = T2 * abs(values[0] - values[1]) / 2
        assert float(row["final.0-1.half_width_95"]) == pytest.approx(half, abs=1e-9)
        for key in ("peak_memory", "stored_bytes", "seconds"):
            known = [run["metrics"][key] for run in seeds]
            assert float(row[key]) == pytest.approx(sum(known) / 2)


def test_report_twice_gives_the_same_files(real):
    def files() -> dict[str, bytes]:
        paths = [*(real / "figures").iterdir(), *real.glob("re*.*")]
        return {path.name: path.read_bytes() for path in paths}

    before = files()
    assert len(before) == 8
    write_report(real)
    assert files() == before


def test_nothing_else_in_the_folder_changes(real):
    def rest() -> dict[str, bytes]:
        paths = [path for path in real.rglob("*") if path.is_file()]
        own = ("report.html", "results.csv", "results.md", "results.tex")
        return {
            str(path): path.read_bytes()
            for path in paths
            if path.name not in own and path.parent.name != "figures"
        }

    before = rest()
    write_report(real)
    assert rest() == before


def test_one_task_and_one_seed_have_no_plane_and_no_intervals(tmp_path):
    folder = write_made_up(tmp_path / "one", tasks=["all"], methods=THREE[:1], seeds=[0])
    page = Page(write_report(folder))
    assert not (folder / "figures/plane.svg").exists()
    assert (folder / "figures/accuracy_matrix.svg").exists()
    (experiment,) = page.data()["experiments"]
    assert {cell[1] for cell in experiment["groups"][0]["cells"] if cell} == {None}
    assert "±" not in experiment["tables"][0]["md"]


def test_a_page_that_reloads_says_how_often_and_others_do_not(tmp_path):
    folder = write_made_up(tmp_path / "one", seeds=[0])
    refresh = ("meta", {"http-equiv": "refresh", "content": "30"})
    assert refresh in Page(write_report(folder, refresh=30)).tags
    assert refresh not in Page(write_report(folder)).tags


def test_the_page_says_how_many_runs_were_planned_and_which_failed(tmp_path):
    path = write_experiment(tmp_path, "[sequential, {name: l2, strength: 1e30}]")
    outcome = run_file(path, tmp_path / "out", ["training.optimizer=sgd"])
    assert len(outcome.failures) == 1
    (experiment,) = Page(write_report(tmp_path / "out")).data()["experiments"]
    assert (experiment["finished"], experiment["planned"]) == (1, 2)
    assert experiment["failed"] == 1
    assert "1 of 2 runs failed" in experiment["answer"]
    assert any("l2-strength1e+30-seed0 failed: " in gap for gap in experiment["gaps"])


def test_an_interrupted_experiment_can_be_reported(tmp_path):
    """``stockpot report``: of a run folder, finished or not."""

    class Stop(Observer):
        def run_begins(self, run: Any, finished: int) -> None:
            if run.method.name == "multitask":
                raise KeyboardInterrupt

    path = write_experiment(tmp_path, "[sequential, multitask]")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(load_experiment(path, output=tmp_path / "out"), Stop())
    assert (tmp_path / "out/runs/sequential-seed0/manifest.json").exists()
    (pool,) = read_pools([tmp_path / "out"])
    assert write_report(tmp_path / "out").exists()
    assert (len(pool.finished), pool.planned, pool.gaps) == (1, 2, [])


def test_nothing_is_written_where_there_is_nothing_to_report(tmp_path):
    folder = write_made_up(tmp_path / "run", seeds=[0])
    (folder / "scores.jsonl").write_text("")
    (folder / "summary.json").write_text("[]")
    before = sorted(folder.iterdir())
    with pytest.raises(StockpotError, match="nothing to report"):
        write_report(folder)
    assert sorted(folder.iterdir()) == before


def test_a_large_record_stays_under_eight_megabytes(tmp_path):
    """20 tasks, 10 methods, 3 seeds, with all that can be measured while they train."""
    tasks = [f"task {n}" for n in range(1, 21)]
    folder = write_made_up(
        tmp_path / "run", tasks=tasks, methods=TEN, seeds=(0, 1, 2), every=10, line=11
    )
    (pool,) = read_pools([folder])
    document = describe_pool(pool)
    assert (len(document["runs"]), document["gaps"]) == (30, [])
    taken = sum(len(run["during"]) for run in document["runs"])
    assert taken * 20 == len((folder / "curves.jsonl").read_text().splitlines())
    assert 3e6 < len(render_page([document], "now").encode()) < 8e6


# The command.


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_says_what_is_missing_and_still_succeeds(tmp_path):
    folder = write_made_up(tmp_path / "run")
    with (folder / "scores.jsonl").open("a") as file:
        file.write('{"run": "sfa')
    result = command(folder)
    assert result.exit_code == 0
    assert re.search(r"scores\.jsonl: line \d+ cannot be read", result.output.replace("\n", " "))
    assert (folder / "report.html").exists()


def test_the_command_of_unfinished_runs(tmp_path):
    stages = dict.fromkeys(("sequential-seed0", "multitask-seed0"), 0)
    folder = write_made_up(
        tmp_path / "run", seeds=[0], stages={**stages, "sfa-p=0.25-beta=0.5-seed0": 1}
    )
    result = command(folder)
    assert result.exit_code == 0
    assert "3 of 3 runs are not finished" in result.output


def test_the_command_for_machines(tmp_path):
    folder = write_made_up(tmp_path / "run")
    (folder / "environment.json").unlink()
    result = CliRunner().invoke(app, ["report", str(folder), "--json"])
    document = json.loads(result.stdout)
    (experiment,) = document["experiments"]
    assert experiment["gaps"] == ["environment.json is missing"]
    assert experiment["planned"] == experiment["finished"] == 6
    summary = {run["run"]: run for run in json.loads((folder / "summary.json").read_text())}
    for run in experiment["runs"]:
        assert run["R"] == summary[run["run"]]["R"]
    assert Path(document["report"]).exists()


def test_the_command_of_no_record(tmp_path):
    result = command(tmp_path)
    assert result.exit_code != 0
    assert isinstance(result.exception, StockpotError | SystemExit)
