"""The paper's language tasks against the files themselves, read by pyarrow alone."""

import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from stockpot.errors import StockpotError
from stockpot.streams.language_sets import INSTRUCTIONS, constraint
from stockpot.streams.language_settings import Domains, Instructions
from stockpot.streams.text import Choices, MathProblem, ProgramProblem, exchange


@pytest.fixture
def rows(mirror):
    """The rows of a split of the mirror, without the code under test."""

    def read(source, split="train"):
        return pq.read_table(
            mirror / source / "data" / f"{split}-00000-of-00001.parquet"
        ).to_pylist()

    return read


def prompts(examples):
    return [example.messages[0].content for example in examples]


def responses(examples):
    return [example.messages[1].content for example in examples]


def inside(prompt, texts):
    """Which of the texts a prompt holds."""
    return [text for text in texts if text in prompt]


@pytest.fixture
def folder(tmp_path):
    """Makes a data set of some rows, in a folder."""

    def make(name, **splits):
        (tmp_path / name / "data").mkdir(parents=True)
        for split, some in splits.items():
            path = tmp_path / name / "data" / f"{split}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(some), path)
        return str(tmp_path / name)

    return make


def test_math(rows):
    (task,) = Domains(tasks=("math",)).load().tasks
    original = [row for row in rows("meta-math/MetaMathQA") if row["response"].strip()]
    asked = {f"Question: {row['query'].strip()}\nAnswer:" for row in original}
    written = {row["response"].strip() for row in original}
    assert len(task.test) == 500
    assert len(set(prompts(task.train))) == len(asked) - 500
    assert set(prompts(task.train)) | set(prompts(task.test)) == asked
    assert not set(prompts(task.train)) & set(prompts(task.test))
    assert set(responses(task.train)) | set(responses(task.test)) <= written
    answers = {}
    for row in original:
        answers.setdefault(f"Question: {row['query'].strip()}\nAnswer:", set()).add(
            row["response"].strip()
        )
    assert all(e.messages[1].content in answers[e.messages[0].content] for e in task.train)
    gsm8k = [MathProblem(**row) for row in rows("openai/gsm8k", "test")]
    assert list(task.benchmarks) == ["gsm8k"]
    assert list(task.benchmarks["gsm8k"].problems) == gsm8k


def test_code(rows):
    (task,) = Domains(tasks=("code",)).load().tasks
    original = rows("ise-uiuc/Magicoder-Evol-Instruct-110K")
    pairs = {exchange(r["instruction"].strip(), r["response"].strip()) for r in original}
    assert len(task.test) == len(original) // 20 == 195
    assert len(task.train) == len(original) - 195
    assert {*task.train, *task.test} == pairs
    problems = [ProgramProblem(**row) for row in rows("openai/openai_humaneval", "test")]
    assert list(task.benchmarks["humaneval"].problems) == problems


def test_law_asks_for_the_right_holding(rows):
    (task,) = Domains(tasks=("law",)).load().tasks
    assert list(task.benchmarks) == ["casehold", "tos", "overruling"]
    right = {
        row["citing_prompt"].strip(): (
            *(row[f"holding_{n}"].strip() for n in range(5)),
            int(row["label"]),
        )
        for split in ("train", "test")
        for row in rows("casehold/casehold", split)
    }
    questions = task.benchmarks["casehold"].questions
    asked = [row["citing_prompt"].strip() for row in rows("casehold/casehold", "test")]
    assert len(questions) == len(asked) == 200
    for question, citing in zip(questions, asked, strict=True):
        assert question.prompt.startswith(citing)
        assert (*question.choices, question.answer) == right[citing]
    learned = [e for e in task.train if e.messages[0].content.endswith("\nHolding:")]
    assert len(learned) == 800
    for example in learned:
        citing = example.messages[0].content.rsplit("\n\n", 1)[0]
        assert example.messages[1].content == right[citing][right[citing][5]]


@pytest.mark.parametrize(
    ("name", "source", "column", "begin"),
    [
        ("tos", "LawInformedAI/claudette_tos", "text", "Clause: "),
        ("overruling", "LawInformedAI/overruling", "sentence1", "Sentence: "),
    ],
)
def test_law_holds_out_a_share_of_each_label(rows, name, source, column, begin):
    (task,) = Domains(tasks=("law",), test_share=0.25).load().tasks
    labels = {}
    for row in rows(source):
        labels.setdefault(row[column].strip(), int(row["label"]))
    questions = task.benchmarks[name].questions
    assert len(questions) == round(len(labels) / 4)
    for label in (0, 1):
        wanted = list(labels.values()).count(label) / 4
        assert abs(sum(q.answer == label for q in questions) - wanted) <= 1
    for question in questions:
        text = question.prompt.removeprefix(begin).split("\n\n")[0]
        assert question.choices == ("no", "yes")
        assert question.answer == labels[text]
    held = {question.prompt for question in questions}
    assert not held & set(prompts(task.train))
    answers = dict(zip(prompts(task.test), responses(task.test), strict=True))
    assert all(answers[q.prompt] == q.choices[q.answer] for q in questions)


def test_order_limits_and_seeds(mirror):
    settings = {"train_limit": 30, "test_limit": 20, "benchmark_limit": 10}
    one, again = (Domains(tasks=("code", "law"), **settings).load() for _ in range(2))
    other = Domains(tasks=("code", "law"), seed=1, **settings).load()
    assert one.name == "domains/code-law"
    assert [task.name for task in one.tasks] == ["code", "law"]
    assert one == again
    for task, different in zip(one.tasks, other.tasks, strict=True):
        assert (len(task.train), len(task.test)) == (30, 20)
        assert set(task.train) != set(different.train)
        assert set(task.test) != set(different.test)
        for benchmark in task.benchmarks.values():
            questions = (
                benchmark.questions if isinstance(benchmark, Choices) else benchmark.problems
            )
            assert len(questions) == 10
    assert len(Domains(tasks=("code",), held_out=7).load().tasks[0].test) == 7


def test_only_what_is_needed_is_read(mirror, monkeypatch):
    from stockpot.streams import language

    opened = []
    original = language.open_data_set

    def watch(source, *rest):
        opened.append(source)
        return original(source, *rest)

    monkeypatch.setattr(language, "open_data_set", watch)
    (task,) = Domains(tasks=("math",), benchmarks=()).load().tasks
    assert opened == ["meta-math/MetaMathQA"]
    assert task.benchmarks == {}
    (law,) = Domains(tasks=("law",), benchmarks=("overruling",)).load().tasks
    assert list(law.benchmarks) == ["overruling"]


def test_copies_with_other_columns_and_bad_labels(folder, monkeypatch):
    monkeypatch.delenv("STOCKPOT_DATA", raising=False)
    case = {"citing_prompt": "c", **{f"holding_{n}": f"h{n}" for n in range(5)}, "label": "3"}
    text = [{"sentence": f"s{n}", "label": str(n % 2)} for n in range(20)]
    paths = {
        "casehold/casehold": folder("c", train=[case | {"citing_prompt": "d"}, case], test=[case]),
        "LawInformedAI/claudette_tos": folder("t", train=text),
        "LawInformedAI/overruling": folder("o", train=[*text, {"sentence": " ", "label": "0"}]),
    }
    (task,) = Domains(tasks=("law",), paths=paths).load().tasks
    # The case that is tested is not trained on, nor is the empty sentence.
    assert (len(task.train), len(task.test)) == (1 + 16 + 16, 1 + 4 + 4)
    assert task.benchmarks["casehold"].questions[0].choices[3] == "h3"
    paths["LawInformedAI/overruling"] = folder("p", train=[*text, {"sentence": "s", "label": "2"}])
    with pytest.raises(StockpotError, match=r"overruling', split 'train', row 20 .* expected 0 to"):
        Domains(tasks=("law",), paths=paths).load()
    paths["LawInformedAI/overruling"] = folder("q", train=[{"words": "s", "label": 1}])
    with pytest.raises(StockpotError, match="no column 'text' or 'sentence' or 'sentence1'"):
        Domains(tasks=("law",), paths=paths).load()


def test_instructions(rows):
    stream = Instructions().load()
    assert [task.name for task in stream.tasks] == list(INSTRUCTIONS)
    sizes = [(len(task.train), len(task.test)) for task in stream.tasks]
    assert sizes == [(16000, 359), (1984, 1885), (1000, 100), (3263, 401), (1100, 280)]
    for task in stream.tasks:
        assert not set(prompts(task.train)) & set(prompts(task.test))
        assert not task.benchmarks
    simple, curious, headlines, facts, covid = stream.tasks
    for row, example in zip(rows("GEM/wiki_auto_asset_turk"), simple.train, strict=True):
        assert row["source"].strip() in example.messages[0].content
        assert example.messages[1].content == row["target"].strip()
    for row, example in zip(rows("inquisitive/inquisitive", "test"), curious.test, strict=True):
        context, sentence, words, _ = (part.strip() for part in row["source"].split("[SEP]"))
        assert sentence in example.messages[0].content
        assert f'"{words}"' in example.messages[0].content
        assert ("Context: " in example.messages[0].content) == (context != "NO_CONTEXT")
    for row, example in zip(rows("EdinburghNLP/xsum"), headlines.train, strict=True):
        word = re.search(r'contains the word "(.*)"\.\n', example.messages[0].content).group(1)
        assert re.search(rf"\b{re.escape(word)}\b", row["summary"])
        assert example.messages[1].content == row["summary"].strip()
    for row, example in zip(rows("covidfact/covidfact", "test"), facts.test, strict=True):
        assert row["claim"].strip() in example.messages[0].content
        assert example.messages[1].content == ("no" if row["label"].startswith("not") else "yes")
    for row, example in zip(rows("deepset/covid_qa_deepset"), covid.train, strict=True):
        assert row["question"].strip() in example.messages[0].content
        assert example.messages[1].content == row["answer"].strip()


def test_constraints_are_words_of_the_headline():
    assert constraint("The US has remembered it") == "remembered"
    assert constraint("a I to") == "to"
    assert constraint("2016 99") == "2016"
    assert constraint("Möwe an der See") == "Möwe"


def test_answers_as_the_hub_keeps_them_and_no_test_split(folder, monkeypatch):
    monkeypatch.delenv("STOCKPOT_DATA", raising=False)
    some = [
        {"context": f"c{n}", "question": "q?", "answers": {"text": [f"a{n}"], "answer_start": [0]}}
        for n in range(20)
    ]
    paths = {"deepset/covid_qa_deepset": folder("covid", train=some)}
    (task,) = Instructions(tasks=("covid-qa",), paths=paths).load().tasks
    assert (len(task.train), len(task.test)) == (18, 2)
    assert {*responses(task.train), *responses(task.test)} == {f"a{n}" for n in range(20)}


def test_tweets_come_from_the_users_file(tmp_path):
    path = tmp_path / "tweets.csv"
    lines = [f"author {n % 2},tweet {n}" for n in range(40)]
    path.write_text("author,text\n" + "\n".join(lines) + "\n")
    (task,) = Instructions(tasks=("twitter",), twitter=str(path)).load().tasks
    assert (len(task.train), len(task.test)) == (36, 4)
    assert not set(task.train) & set(task.test)
    assert sorted(prompts(task.test)) == [
        f"Write a tweet in the style of author {n}.\nTweet:" for n in (0, 0, 1, 1)
    ]
    path.write_text("author,text\na,b\nc,\n")
    with pytest.raises(StockpotError, match=r"tweets.csv:3: 'text' is empty"):
        Instructions(tasks=("twitter",), twitter=str(path)).load()
    path.write_text("who,what\na,b\n")
    with pytest.raises(StockpotError, match="expected author and text, or prompt and response"):
        Instructions(tasks=("twitter",), twitter=str(path)).load()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Instructions, {"tasks": ("twitter",)}, "needs your own file of tweets"),
        (Instructions, {"paths": {"xsum": "x"}}, "'xsum' is not read here"),
        (Domains, {"tasks": ("math", "math")}, "two tasks are named 'math'"),
        (Domains, {"tasks": ()}, "at least 1"),
        (Domains, {"tasks": ("law",), "benchmarks": ("gsm8k",)}, "scored on math, not among"),
        (Domains, {"paths": {"openai/gsm8": "x"}}, "did you mean 'openai/gsm8k'"),
        (Domains, {"held_out": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(kind, options, message):
    with pytest.raises(ValidationError, match=message):
        kind(**options)


def test_settings_load_no_torch():
    code = (
        "from stockpot.streams import STREAMS\n"
        "STREAMS['domains'](), STREAMS['instructions'](), STREAMS['tasks'](tasks=('a.csv',))\n"
        "import sys; assert not {'torch', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
