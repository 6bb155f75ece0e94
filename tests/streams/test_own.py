"""The user's own tasks: every format to the letter, every bad row with its place."""

import csv
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.errors import ConfigError, StockpotError
from stockpot.experiment.config import load_experiment
from stockpot.streams.draws import held_out, limited, shuffled
from stockpot.streams.language_settings import OwnTasks
from stockpot.streams.rows import read_file
from stockpot.streams.text import Message, Question, exchange


def tasks(*entries, **options):
    return OwnTasks(tasks=entries, **options).load()


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


PAIRS = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(20)]

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
pairs = st.lists(st.tuples(words, words), min_size=1, max_size=6)


@given(pairs, st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]), st.booleans())
@settings(max_examples=120, deadline=None)
def test_files_are_read_to_the_letter(rows, suffix, plain):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        records = [{"prompt": prompt, "response": response} for prompt, response in rows]
        if suffix == ".jsonl":
            lines = [json.dumps(record, ensure_ascii=plain) for record in records]
            path.write_bytes("\n".join(lines).encode())
        elif suffix == ".json":
            path.write_text(json.dumps(records, ensure_ascii=plain, indent=2), encoding="utf-8")
        elif suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(
                    file,
                    ["prompt", "response"],
                    delimiter="," if suffix == ".csv" else "\t",
                    quoting=csv.QUOTE_MINIMAL if plain else csv.QUOTE_ALL,
                )
                writer.writeheader()
                writer.writerows(records)
        task = tasks({"train": str(path), "test": str(path)}).tasks[0]
    expected = [exchange(prompt, response) for prompt, response in rows]
    assert list(task.train) == expected
    assert list(task.test) == expected


def test_line_numbers_count_lines_of_the_file(tmp_path):
    text = 'prompt,response\n"two\nlines",x\n\n"a ""quoted"", one\r\n\n",y\nlast,z\n'
    rows = read_file(write(tmp_path / "a.csv", "\ufeff" + text))
    assert rows.columns == ("prompt", "response")
    assert rows.column("prompt") == ["two\nlines", 'a "quoted", one\r\n\n', "last"]
    assert [rows.place(n).rsplit(":", 1)[1] for n in range(3)] == ["2", "5", "8"]
    rows = read_file(write(tmp_path / "a.jsonl", '{"a": "\u2028"}\n\n{"a": 1, "b": 2}\n'))
    assert [rows.place(n).rsplit(":", 1)[1] for n in range(2)] == ["1", "3"]
    rows = read_file(write(tmp_path / "a.json", '\n [{"a":\n 1},\n\n{"a": 2},{"a":"\\n"}\n]\n'))
    assert [rows.place(n).rsplit(":", 1)[1] for n in range(3)] == ["2", "5", "5"]
    rows = read_file(write(tmp_path / "b.json", '{"a": 1}\n{"a": 2}\n'))  # JSON lines after all
    assert [rows.place(n).rsplit(":", 1)[1] for n in range(2)] == ["1", "2"]


GOOD = '{"prompt": "p", "response": "r"}\n'
TALK = '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}\n'


def talk(*turns):
    return TALK + json.dumps({"messages": list(turns)})


USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("file", "text", "place", "what"),
    [
        ("a.jsonl", GOOD + '{"prompt": "p"', ":2", "not valid JSON"),
        ("a.jsonl", GOOD + "\n" + '{"prompt": "p"}', ":3", "no 'response'; expected text"),
        ("a.jsonl", GOOD + '{"prompt": "p", "response": " "}', ":2", "'response' is empty"),
        ("a.jsonl", GOOD + '{"prompt": "p", "response": null}', ":2", "'response' is null"),
        ("a.jsonl", GOOD + '{"prompt": 5, "response": "r"}', ":2", "'prompt' is 5, not text"),
        ("a.jsonl", GOOD + '{"prompt": [], "response": "r"}', ":2", "'prompt' is a list"),
        ("a.jsonl", GOOD + '{"prompt": "\\ud83d", "response": "r"}', ":2", "half of a character"),
        ("a.jsonl", GOOD + '["p", "r"]', ":2", "expected an object"),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "\xe9"}', ":2", "byte 0xe9 is not UTF-8"),
        ("a.jsonl", "\n", "", "has no rows"),
        ("a.json", "[" + GOOD + ",\n" + '{"prompt": ""', ":3", "not valid JSON"),
        ("a.json", "[" + GOOD + GOOD + "]", ":2", "expected ',' or ']'"),
        ("a.json", "[" + GOOD + ",]", ":2", "not valid JSON"),
        ("a.json", "[" + GOOD + "]\n]", ":3", "something follows"),
        ("a.json", "[" + GOOD + ",\n 7]", ":3", "expected an object"),
        ("a.json", "[]", "", "has no rows"),
        ("a.csv", 'prompt,response\n"a\nb",c\nd\n', ":4", "1 value where the header names 2"),
        ("a.csv", 'prompt,response\n"a\nb",c\nd,\n', ":4", "'response' is empty"),
        ("a.csv", 'prompt,response\n"a\nb",c\n"d"e,f\n', ":4", "not valid CSV"),
        ("a.csv", 'prompt,response\na,b\n"c,d\n', ":3", "not valid CSV"),
        ("a.tsv", "prompt\tresponse\na\tb\tc\n", ":2", "3 values where the header names 2"),
        ("a.csv", "prompt,prompt\na,b\n", ":1", "names 'prompt' twice"),
        ("a.csv", "prompt,\na,b\n", ":1", "column 2 of the header has no name"),
        ("a.csv", "prompt,response\n", "", "has no rows"),
        ("a.parquet", "no parquet", "", "not a parquet file"),
        ("a.jsonl", '{"text": "t", "label": 1.5}', ":1", "expected text or a whole number"),
        ("a.jsonl", '{"text": "t", "label": ""}', ":1", "'label' is empty"),
        ("a.jsonl", '{"text": "t", "label": null}', ":1", "'label' is null"),
        ("a.jsonl", '{"messages": "hello"}', ":1", "is text; expected a list of turns"),
        ("a.jsonl", '{"messages": []}', ":1", "is empty; expected a list of turns"),
        ("a.jsonl", TALK + '{"message": []}', ":2", "no 'messages'"),
        ("a.jsonl", talk("hello"), ":2", r"messages\[0\] is no object"),
        ("a.jsonl", talk({"content": "u"}), ":2", r"messages\[0\] has no 'role'"),
        ("a.jsonl", talk({"role": "bot", "content": "u"}), ":2", "expected system, user, ass"),
        ("a.jsonl", talk(USER), ":2", "no turn of the assistant"),
        ("a.jsonl", talk(USER, ASSISTANT, USER), ":2", "ends with a turn of role 'user'"),
        ("a.jsonl", talk(ASSISTANT), ":2", "is of role 'assistant'; expected system or user first"),
        ("a.jsonl", talk(USER, USER, ASSISTANT), ":2", r"\[1\] is of role 'user' after 'user'"),
        ("a.jsonl", talk(USER, {"role": "assistant"}), ":2", r"no 'messages\[1\].content'"),
        ("a.jsonl", talk(USER, {**ASSISTANT, "content": ""}), ":2", "content' is empty"),
        ("a.jsonl", talk(USER, {**ASSISTANT, "content": [1]}), ":2", "is a list, not text"),
        ("a.jsonl", talk(USER, {**ASSISTANT, "tool_calls": [1]}), ":2", "has 'tool_calls'"),
    ],
)
def test_bad_rows_are_refused_at_their_line(tmp_path, file, text, place, what):
    path = write(tmp_path / file, text)
    with pytest.raises(StockpotError, match=what) as error:
        tasks(path)
    assert f"{path}{place}" in str(error.value)
    if place:
        assert str(error.value).startswith(f"{path}{place}: ")


def test_bad_rows_of_parquet_have_their_number(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([*PAIRS, {"prompt": "p", "response": None}]), path)
    with pytest.raises(StockpotError, match=r"a.parquet, row 20 \(the first is 0\): 'response' is"):
        tasks(str(path))


def test_conversations_keep_their_turns(tmp_path):
    system = {"role": "system", "content": ""}
    tool = {"role": "tool", "content": "42"}
    turns = [system, USER, ASSISTANT, tool, tool, ASSISTANT, USER, ASSISTANT]
    rows = [{"messages": turns}, {"messages": [{"role": "user", "content": "v"}, ASSISTANT]}]
    path = tmp_path / "talk.parquet"  # where every turn has every key
    pq.write_table(pa.Table.from_pylist(rows), path)
    task = tasks({"train": str(path), "test": str(path)}).tasks[0]
    assert task.name == "talk"
    assert task.train[0].messages == tuple(Message(**turn) for turn in turns)


def test_columns_are_mapped_and_forms_found(tmp_path):
    rows = [{"q": f"q{n}", "a": f"a{n}", "text": f"t{n}", "label": n % 2} for n in range(40)]
    path = jsonl(tmp_path / "both.jsonl", rows)
    mapped = {"train": path, "columns": {"prompt": "q", "response": "a"}}
    with pytest.raises(StockpotError, match="say form: prompt or form: label"):
        tasks(mapped)
    stream = tasks({**mapped, "form": "prompt", "name": "one"}, {"train": path, "name": "two"})
    one, two = stream.tasks
    assert {*one.train, *one.test} == {exchange(row["q"], row["a"]) for row in rows}
    assert {*two.train, *two.test} == {exchange(row["text"], str(row["label"])) for row in rows}
    assert not one.benchmarks
    with pytest.raises(
        StockpotError, match=r"no column 'x', which columns.prompt names \(it has q"
    ):
        tasks({"train": path, "columns": {"prompt": "x"}})
    with pytest.raises(StockpotError, match="has the columns q, a, text, label; expected 'message"):
        tasks({"train": path, "form": "messages"})
    with pytest.raises(StockpotError, match="has the columns a; expected 'prompt' and 'response'"):
        tasks(jsonl(tmp_path / "none.jsonl", [{"a": "b"}]))


def test_labels_become_choices_over_all_labels_of_training(tmp_path):
    names = ["spam", "ham", "true"]
    rows = [{"text": f"t{n}", "label": names[n % 3] if n % 3 < 2 else True} for n in range(60)]
    task = tasks(jsonl(tmp_path / "mail.jsonl", rows), test_share=0.2).tasks[0]
    assert len(task.test) == 12
    # A fifth of each label.
    assert sorted(example.messages[1].content for example in task.test) == sorted(names * 4)
    questions = task.benchmarks["labels"].questions
    assert questions == tuple(
        Question(e.messages[0].content, ("ham", "spam", "true"), index)
        for e in task.test
        for index in [["ham", "spam", "true"].index(e.messages[1].content)]
    )
    train = jsonl(tmp_path / "train.jsonl", rows[:3])
    test = jsonl(tmp_path / "test.jsonl", [rows[0], {"text": "t", "label": "egg"}])
    with pytest.raises(StockpotError, match=r"test.jsonl:2: the label 'egg' is not among those of"):
        tasks({"train": train, "test": test})
    spam = jsonl(tmp_path / "spam.jsonl", [rows[0], rows[3]])
    with pytest.raises(StockpotError, match="every row has the label 'spam'"):
        tasks({"train": spam, "test": spam})


def test_held_out_rows_are_a_seeded_draw(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS + PAIRS[:7])
    one, again, other = (tasks(path, seed=seed).tasks[0] for seed in (0, 0, 1))
    assert one == again
    assert one.test != other.test
    assert len(one.test) == 2
    assert not {e.messages[0] for e in one.train} & {e.messages[0] for e in one.test}
    few = tasks(path, train_limit=5, test_limit=1).tasks[0]
    assert (len(few.train), len(few.test)) == (5, 1)
    assert set(few.train) < set(one.train)
    with pytest.raises(StockpotError, match="all rows have one prompt; add rows, or give 'test'"):
        tasks(jsonl(tmp_path / "same.jsonl", PAIRS[:1] * 9))


def test_order_names_and_limits_of_the_stream(tmp_path):
    paths = [jsonl(tmp_path / f"{name}.jsonl", PAIRS) for name in ("math", "law")]
    stream = tasks(*paths, order=(1, 0), train_limit=3)
    assert [task.name for task in stream.tasks] == ["law", "math"]
    assert [len(task.train) for task in stream.tasks] == [3, 3]


@pytest.fixture
def data_set(tmp_path):
    """A folder as a data set: labels with names, and a test split of other columns."""
    import datasets

    folder = tmp_path / "news"
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["dull", "new"])}
    )
    rows = {"text": [f"t{n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    (folder / "data").mkdir(parents=True)
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(folder / "data/train-00000-of-00001.parquet")
    more = data.select(range(4)).add_column("more", [1.0] * 4)
    more.to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


def test_data_sets_have_splits_and_names_of_labels(data_set):
    held, own = (
        tasks({"train": str(data_set), **options}).tasks[0]
        for options in ({}, {"test_split": "test"})
    )
    assert held.name == "news"
    assert (len(held.train), len(held.test)) == (18, 2)
    assert (len(own.train), len(own.test)) == (20, 4)
    assert own.test[1] == exchange("t1", "new")
    with pytest.raises(StockpotError, match=r"has no split 'dev' \(it has train, test\)"):
        tasks({"train": str(data_set), "split": "dev"})


def test_sets_that_were_programs_are_read_as_the_hub_keeps_them(monkeypatch):
    import datasets

    from stockpot.streams.rows import open_data_set

    asked = []

    def load(place, config=None, **options):
        asked.append((place, config, options))
        if not options:
            raise RuntimeError("Dataset scripts are no longer supported, but found a.py")
        return {}

    monkeypatch.delenv("STOCKPOT_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    open_data_set("some/set", "all")
    assert asked[1][2] == {"data_dir": "all", "revision": "refs/convert/parquet"}


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("STOCKPOT_DATA", str(tmp_path))
    with pytest.raises(StockpotError, match=r"nothing.jsonl: there is no such file"):
        tasks(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(StockpotError, match=r"give a local folder as stream.tasks.0.train"):
        tasks("nobody/nothing")
    with pytest.raises(StockpotError, match=r"ends in .jsonl, .json, .csv"):
        tasks(write(tmp_path / "a.txt", "text"))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{name: a, trian: a.csv}", "1: stream.tasks.0.trian: unknown key 'trian' (did you mean"),
        ("{name: a}", "1: stream.tasks.0.train: is missing"),
        ("{train: 5}", "1: stream.tasks.0.train: 5 should be a valid string (a file (.jsonl"),
        ("{train: a.csv, columns: {promt: q}}", "stream.tasks.0.columns.promt: unknown key 'promt"),
        ("{train: a.csv, columns: 3}", "stream.tasks.0.columns: 3 should be a valid dictionary"),
        ("{train: a.csv, form: chat}", "stream.tasks.0.form: 'chat' is not one of prompt, mess"),
        ("{train: a.csv, split: x}", "stream.tasks.0: split = x: a.csv is a file, which has none"),
        ("7", "stream.tasks.0: 7 is neither a path nor a mapping"),
        ("''", "stream.tasks.0.train: '' is too short"),
        ("a.csv, b/a.csv", "stream.tasks: two tasks are named 'a'; give each its own name"),
        ("", "stream.tasks: [] is too short: at least 1"),
        ("a.csv], order: [1", "stream: order = [1]: tasks are numbered 0 to 0"),
        ("a.csv], test_share: 2, x: [", "stream.test_share: 2 should be less than 1"),
    ],
)
def test_wrong_settings_are_named_by_their_place(tmp_path, entry, expected):
    path = tmp_path / "e.yaml"
    path.write_text(
        f"stream: {{name: tasks, tasks: [{entry}]}}\nmodel: mlp\nmethods: [sequential]\n"
    )
    with pytest.raises(ConfigError) as error:
        load_experiment(path)
    assert expected in str(error.value)


def test_settings_can_be_written_and_read_again(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(
        "stream: {name: tasks, tasks: [a.csv, {train: b/c, columns: {prompt: q}, test_split: t}]}\n"
        "model: mlp\nmethods: [sequential]\n"
    )
    experiment = load_experiment(path)
    path.write_text(experiment.to_yaml())
    assert load_experiment(path).stream == experiment.stream


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 10), st.integers(0, 3))
def test_draws(numbers, count, seed):
    prompts = [f"p{number}" for number in numbers]
    strata = [number % 3 for number in numbers]
    train, test = held_out(prompts, count, seed, strata)
    chosen = {prompts[n] for n in test}
    assert len(chosen) == len(test) <= count
    assert not chosen & {prompts[n] for n in train}
    assert {prompts[n] for n in train} | chosen == set(prompts)
    assert {strata[n] for n in train} == set(strata)
    backwards = held_out(prompts[::-1], count, seed, strata[::-1])[1]
    assert {prompts[::-1][n] for n in backwards} == chosen
    assert limited(numbers, None, seed) == numbers
    assert len(limited(prompts, count, seed)) == min(count, len(prompts))
    places = list(range(len(numbers)))
    assert set(limited(places, count, seed)) <= set(limited(places, count + 1, seed))
    assert limited(places, count, seed) == sorted(limited(places, count, seed))
    assert sorted(shuffled(places, seed)) == places
