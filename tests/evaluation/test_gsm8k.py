from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.evaluation import gsm8k

ANSWERS = [
    "",
    " ",
    "\n",
    "18",
    "-18",
    "18.",
    "18.0",
    "$18",
    "$18.50",
    "-$18",
    "$-18",
    "1,800",
    "1,8,00",
    "1 800",
    "18 apples and 7 pears",
    "18 apples. 7 pears.",
    "No number at all.",
    "Wait...",
    "The answer is 18...",
    "5, 6,",
    "3/4",
    "50%",
    "1e3",
    "+18",
    "--18",
    "- 18",
    "#### 18",
    "####18",
    "#### 18.",
    "#### 18\n",
    "#### 18\n#### 19",
    "####  18",
    "### 18",
    "##### 18",
    "#### $18",
    "#### -18",
    "#### -$18",
    "#### 1,800",
    "#### 1,800.",
    "#### 18 dollars",
    "#### 18. Next: 19",
    "#### .",
    "#### ,",
    "#### eighteen",
    "#### ",
    "####",
    "She has 9 * 2 = <<9*2=18>>18 eggs.\n#### 18",
    "She has 9 * 2 = <<9*2=18>>18 eggs.\n#### 19",
    "The answer is: 18",
    "The answer is: 18.",
    "The answer is: $1,800.00.",
    r"The answer is \boxed{18}.",
    "\N{ARABIC-INDIC DIGIT ONE}\N{ARABIC-INDIC DIGIT EIGHT}",
    "\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT EIGHT}",
    "\N{MINUS SIGN}18",
    "\N{EURO SIGN}18",
    "18\N{NO-BREAK SPACE}000",
    "\N{SUPERSCRIPT TWO}",
    "\N{VULGAR FRACTION ONE HALF}",
    "[invalid]",
    "#### [invalid]",
    "$",
    "$$",
    ".",
    "..",
    "-",
    "-.5",
    ".5",
    "0018",
]


@pytest.fixture(scope="module")
def harness():
    """The judgement of lm-evaluation-harness, from its own description of the task."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters import build_filter_ensemble

    folder = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    task = yaml.safe_load((folder / "gsm8k.yaml").read_text())
    (metric,) = task["metric_list"]
    known = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    options = {name: metric[name] for name in known}
    filters = {}
    for entry in task["filter_list"]:
        parts = [
            (part["function"], {name: part[name] for name in part if name != "function"})
            for part in entry["filter"]
        ]
        filters[entry["name"]] = build_filter_ensemble(entry["name"], parts)

    def judge(kind, texts, answers):
        instances = [
            Instance("generate_until", doc={}, arguments=("", {}), idx=number, resps=[text])
            for number, text in enumerate(texts)
        ]
        filters[kind].apply(instances)
        found = [instance.filtered_resps[kind] for instance in instances]
        right = [
            bool(
                exact_match_hf_evaluate(predictions=[one], references=[answer], **options)[
                    "exact_match"
                ]
            )
            for one, answer in zip(found, answers, strict=True)
        ]
        return found, right

    return judge


KINDS = {"strict-match": gsm8k.strict, "flexible-extract": gsm8k.flexible}


def assert_agreement(harness, texts, answers):
    for kind, extract in KINDS.items():
        found, right = harness(kind, texts, answers)
        assert [extract(text) for text in texts] == found
        ours = [
            gsm8k.is_correct(extract(text), gsm8k.gold(answer))
            for text, answer in zip(texts, answers, strict=True)
        ]
        assert ours == right


@pytest.mark.parametrize(
    "answer",
    ["#### 18", "Text.\n#### 18", "#### 1,800", "#### -18", "#### 18.5", "#### 18.", "a #### 18\n"],
)
def test_answers_of_all_kinds_are_judged_as_by_lm_eval(harness, answer):
    assert_agreement(harness, ANSWERS, [answer] * len(ANSWERS))


def test_the_data_sets_answers_are_judged_as_by_lm_eval(harness, mirror):
    path = mirror / "openai" / "gsm8k" / "data" / "test-00000-of-00001.parquet"
    answers = pyarrow.parquet.read_table(path).column("answer").to_pylist()
    assert len(answers) == 1319
    assert_agreement(harness, answers, answers)
    assert all(gsm8k.is_correct(gsm8k.strict(answer), gsm8k.gold(answer)) for answer in answers)
    assert_agreement(harness, answers, answers[1:] + answers[:1])
    numbers = [gsm8k.gold(answer) for answer in answers]
    written = [f"... so she has $18 and 7. The answer is: {number}" for number in numbers]
    assert_agreement(harness, written, answers)
    assert all(
        gsm8k.is_correct(gsm8k.flexible(text), number)
        for text, number in zip(written, numbers, strict=True)
    )
    assert {gsm8k.strict(text) for text in written} == {"[invalid]"}


# NUL is left out: numpy's text, in which lm-eval compares, drops it at the end.
words = st.lists(
    st.sampled_from(
        ["#### ", "####", "#", " ", "\n", "-", "$", ",", ".", "18", "7", "0", "x", "\N{EURO SIGN}"]
    )
    | st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=3),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=words, answer=words)
def test_any_text_is_judged_as_by_lm_eval(harness, text, answer):
    assert_agreement(harness, [text], [answer])
    assert_agreement(harness, [answer], [answer])


def test_examples_of_each_kind():
    text = "He pays $5. #### 1,234. In all 7."
    assert gsm8k.strict(text) == "1,234."
    assert gsm8k.flexible(text) == "7."
    assert gsm8k.is_correct("1,234.", gsm8k.gold("so\n#### 1234"))
    assert gsm8k.is_correct("$1,234", "1234")
    assert not gsm8k.is_correct("1234.0", "1234")
    assert not gsm8k.is_correct(gsm8k.strict("1234"), "1234")
    assert gsm8k.strict("none") == gsm8k.flexible("none") == "[invalid]"


def test_the_prompt_is_lm_evals():
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.utils import apply_template

    folder = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    template = yaml.safe_load((folder / "gsm8k.yaml").read_text())["doc_to_text"]
    question = "Two & two <b>\n{{x}}"
    assert gsm8k.prompt(question) == apply_template(template, {"question": question})
