"""What of an example is learned, against TRL's labels and the tokenizer's own words."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from stockpot.errors import StockpotError
from stockpot.models.language import encode_stream
from stockpot.models.rendering import Cut, Format
from stockpot.models.settings import HuggingFace
from stockpot.streams.text import Example, Message, Question, TextStream, TextTask, exchange
from stockpot.streams.tokens import IGNORED
from support.text import CHATML, STRIPPING, byte_tokenizer


@pytest.fixture(scope="module")
def words(stories: Path) -> Any:
    """The tokenizer of stories260K: SentencePiece with byte fallback, <s> in front."""
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def bytewise() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chat() -> Any:
    return byte_tokenizer(CHATML)


def form(tokenizer: Any, template: bool = False, max_length: int = 512, **more: Any) -> Format:
    return Format(tokenizer, False, max_length, template, **more)


def rows(how: Format, *examples: Example) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each example, without padding."""
    data, _ = how.data(examples)
    batches = [data.__getitems__([n]) for n in range(len(data))]
    return [(b["input_ids"][0].tolist(), b["labels"][0].tolist()) for b in batches]


def learned(how: Format, example: Example) -> str:
    ((_, labels),) = rows(how, example)
    return str(how.tokenizer.decode([token for token in labels if token != IGNORED]))


def conversation(*turns: str) -> Example:
    """``user: hello`` and so on."""
    return Example(tuple(Message(*turn.split(": ", 1)) for turn in turns))


# Against TRL.


def trl_rows(
    stories: Path, tokenizer: Any, examples: list[dict[str, Any]], **options: Any
) -> list[tuple[list[int], list[int]]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(stories)
    arguments = SFTConfig(
        output_dir="unused", report_to=[], use_cpu=True, max_length=None, **options
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=copy.deepcopy(tokenizer),
    )
    found = trainer.train_dataset
    return list(zip(found["input_ids"], found["labels"], strict=True))


PAIRS = [
    ("Once upon", "a time there was"),
    ("Hi 😀", "é 🎉 漢字"),
    ("Once upon ", "a time"),
    ("List:\n", "- one\n- two\n"),
    ("List:\n", "    indented"),
    ("Tab\t", "bed"),
    ("One. Two?", "Yes, \u200bno."),
    ("zero width \u200d", "👩\u200d🚀 e\u0301"),
]


@pytest.mark.parametrize("kind", ["words", "bytewise"])
def test_prompts_and_responses_are_learned_as_in_trl(stories, kind, request):
    tokenizer = request.getfixturevalue(kind)
    written = [
        {"prompt": prompt, "completion": ("" if prompt[-1].isspace() else " ") + response}
        for prompt, response in PAIRS
    ]
    expected = trl_rows(stories, tokenizer, written, completion_only_loss=True)
    ours = rows(form(tokenizer), *(exchange(*pair) for pair in PAIRS))
    for pair, (tokens, labels), (theirs, wanted) in zip(PAIRS, ours, expected, strict=True):
        assert tokens == theirs, pair
        # White space at a prompt's end is learned with the response: many tokens begin with it.
        stem = len(tokenizer(pair[0].rstrip())["input_ids"])
        assert labels[:stem] == wanted[:stem] == [IGNORED] * stem
        assert labels[stem:] == theirs[stem:]
        if pair[0] == pair[0].rstrip():
            assert labels == wanted


CHATS = [
    conversation("user: Hi there", "assistant: Hello."),
    conversation("system: be kind", "user: Hi", "assistant: one\ntwo"),
    conversation(
        "user: Hi 😀",
        "assistant: é 🎉",
        "user: more?",
        "assistant: no|yes",
        "user: a",
        "assistant: b",
    ),
]


def as_trl(example: Example) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in example.messages]}


def test_assistants_turns_are_learned_as_in_trl(stories, chat):
    model = form(chat, template=True)
    expected = trl_rows(stories, chat, [as_trl(e) for e in CHATS], assistant_only_loss=True)
    assert rows(model, *CHATS) == [(list(a), list(b)) for a, b in expected]


def test_prompt_and_response_with_a_template_are_learned_as_in_trl(stories, chat):
    pairs = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": response}],
        }
        for prompt, response in PAIRS
    ]
    expected = trl_rows(stories, chat, pairs, completion_only_loss=True)
    ours = rows(form(chat, template=True), *(exchange(*pair) for pair in PAIRS))
    assert ours == [(list(a), list(b)) for a, b in expected]


# By hand.


def test_only_the_response_and_one_end_are_learned(words):
    assert learned(form(words), exchange("Once upon", "a time")) == "a time</s>"
    ((tokens, labels),) = rows(form(words), exchange("Once upon", "a time"))
    assert words.convert_ids_to_tokens(tokens) == [
        "<s>", "▁Once", "▁upon", "▁a", "▁time", "</s>"
    ]  # fmt: skip
    assert labels == [IGNORED] * 3 + tokens[3:]


def test_a_response_that_ends_itself_ends_once(words, bytewise):
    for tokenizer in (words, bytewise):
        ((tokens, labels),) = rows(form(tokenizer), exchange("Hi", "you</s>"))
        assert tokens.count(tokenizer.eos_token_id) == 1
        assert labels[-1] == tokenizer.eos_token_id


def test_every_turn_ends_without_a_template(words):
    example = conversation(
        "system: be kind", "user: Hi", "assistant: one", "user: more", "assistant: two"
    )
    assert learned(form(words), example) == "one</s> two</s>"
    ((tokens, _),) = rows(form(words), example)
    assert tokens.count(words.eos_token_id) == 2
    text = words.decode(tokens[1:]).replace(" ", "")
    assert text == "be kind\n\nHi one</s>\n\nmore two</s>".replace(" ", "")


def test_turns_that_a_template_rewrites_are_not_learned():
    tokenizer = byte_tokenizer(STRIPPING)
    example = CHATS[2]
    how = form(tokenizer, template=True)
    ((tokens, _),) = rows(how, example)
    assert "no|" not in tokenizer.decode(tokens)
    # "no|yes" became "yes"; the turns before and after stand as they were said.
    assert learned(how, example) == "é 🎉<|im_end|>\nb<|im_end|>\n"
    last = conversation("user: Hi", "assistant: thought|said")
    assert learned(how, last) == "thought|said<|im_end|>\n"


def test_a_template_that_rewrites_every_turn_learns_the_last(chat):
    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}!{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>' }}"
    )
    how = form(tokenizer, template=True)
    example = conversation("user: Hi", "assistant: yes")
    ((tokens, labels),) = rows(how, example)
    asked = tokenizer(how.prompt("Hi"))["input_ids"]
    assert tokens[: len(asked)] == asked
    assert tokenizer.decode(tokens[len(asked) :]) == "yes</s>"
    assert labels == [IGNORED] * len(asked) + tokens[len(asked) :]


def test_a_template_that_refuses_says_so(chat):
    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(StockpotError, match="system, user, assistant: no system turns") as caught:
        form(tokenizer, template=True).data([conversation("system: a", "user: b", "assistant: c")])
    assert "model.chat_template: false" in str(caught.value)


# A prompt is the same tokens wherever it stands.

TEXT = st.text(
    st.one_of(
        st.sampled_from("aeot bnm \n\t.,?é漢😀\u200d\u0301"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=24,
)
quickly = hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quickly
@given(prompt=TEXT, response=TEXT.filter(str.strip))
def test_what_is_trained_on_begins_as_what_is_asked(words, prompt, response):
    how = form(words)
    ((tokens, labels),) = rows(how, exchange(prompt, response))
    asked = words(how.prompt(prompt))["input_ids"]
    assert tokens[: len(asked)] == asked
    assert labels == [IGNORED] * len(asked) + tokens[len(asked) :]
    assert labels[-1] == words.eos_token_id


@quickly
@given(prompt=TEXT, response=st.sampled_from(["yes", "Once more", "é", "漢字", "😀 no", "1"]))
def test_so_it_does_with_other_tokenizers_and_templates(bytewise, chat, prompt, response):
    for tokenizer, template in ((bytewise, False), (chat, True)):
        how = form(tokenizer, template)
        ((tokens, labels),) = rows(how, exchange(prompt, response))
        asked = tokenizer(how.prompt(prompt), add_special_tokens=not template)["input_ids"]
        assert tokens[: len(asked)] == asked
        assert labels == [IGNORED] * len(asked) + tokens[len(asked) :]


@pytest.mark.parametrize("template", [False, True])
def test_choices_are_scored_after_the_prompt_that_is_asked(words, chat, template):
    how = form(chat, True) if template else form(words)
    prompts = ["Once upon", "Answer: ", "", "List:\n", "é 😀"]
    questions = [Question(prompt, ("yes", "no way", " 漢"), 0) for prompt in prompts]
    data = how.choices(questions)
    for number, (prompt, choice) in enumerate(product(prompts, questions[0].choices)):
        batch = data.__getitems__([number])
        tokens, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        asked = how.tokenizer(how.prompt(prompt), add_special_tokens=not template)["input_ids"]
        assert tokens[: len(asked)] == asked
        assert labels == [IGNORED] * len(asked) + tokens[len(asked) :]
        assert how.tokenizer.decode(tokens[len(asked) :]).strip() == choice.strip()
        assert how.tokenizer.eos_token_id not in tokens


def test_an_empty_prompt(words, bytewise):
    assert learned(form(words), exchange("", "Yes")) == "Yes</s>"
    ((tokens, labels),) = rows(form(bytewise), exchange("", "Yes"))
    assert labels == tokens  # nothing stands before it: its first token cannot be said


# Examples that are too long.


@quickly
@given(
    prompt=st.integers(0, 40),
    response=st.integers(1, 40),
    max_length=st.integers(8, 40),
    bos=st.booleans(),
)
def test_what_is_cut_when_an_example_is_too_long(
    words, bytewise, prompt, response, max_length, bos
):
    tokenizer = words if bos else bytewise
    letters = ("", " a")  # one token each, in both
    asked, said = letters[1] * prompt, letters[1] * response
    example = exchange(asked.strip(), said.strip())
    ((whole, labels),) = rows(form(tokenizer, max_length=512), example)
    first = next(n for n, label in enumerate(labels) if label != IGNORED)
    data, cut = form(tokenizer, max_length=max_length).data([example])
    batch = data.__getitems__([0])
    kept, kept_labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    if len(whole) <= max_length:
        assert (kept, kept_labels, cut) == (whole, labels, Cut(1, 0, 0))
        return
    assert len(kept) == max_length
    begin = next(n for n, label in enumerate(kept_labels) if label != IGNORED)
    answer = kept_labels[begin:]
    assert answer == labels[first : first + len(answer)]  # it keeps its start
    assert all(label == IGNORED for label in kept_labels[:begin])
    head = int(bos)
    assert kept[:head] == whole[:head]
    assert kept[head:begin] == whole[first - (begin - head) : first]  # it keeps its end
    shortened = len(answer) < len(whole) - first
    assert cut == Cut(1, int(not shortened), int(shortened))
    assert begin >= min(first, max_length // 2)  # the prompt has half if it needs it
    assert len(answer) >= min(len(whole) - first, max_length - max_length // 2)


def test_cuts_are_counted_and_told():
    assert Cut(9, 0, 0).note("law (train)", 128) is None
    note = Cut(5000, 1200, 3).note("law (train)", 128)
    assert note == (
        "law (train): of 5,000 examples 1,200 lost the beginning of their prompt and 3 lost the "
        "end of their response: they are longer than model.max_length = 128 tokens"
    )


def test_a_long_conversation_keeps_its_end_token_mask_aligned(words):
    turns = []
    for number in range(6):
        turns += [f"user: number {number} {'a ' * 6}", f"assistant: word {number} {'b ' * 6}"]
    ((whole, labels),) = rows(form(words), conversation(*turns))
    for max_length in (8, 20, 33, 60):
        ((tokens, cut),) = rows(form(words, max_length=max_length), conversation(*turns))
        assert len(tokens) == max_length
        assert all(label in (IGNORED, token) for token, label in zip(tokens, cut, strict=True))
        # From the first learned token on it is the conversation from its first answer on.
        begin = next(n for n, label in enumerate(cut) if label != IGNORED)
        first = next(n for n, label in enumerate(labels) if label != IGNORED)
        length = max_length - begin
        assert cut[begin:] == labels[first : first + length]
        assert tokens[begin:] == whole[first : first + length]


def test_many_examples_are_tokenised_in_parts(words, monkeypatch):
    examples = [exchange(f"number {n}", "a " * (n % 5 + 1)) for n in range(23)]
    how = form(words, max_length=12)
    whole = rows(how, *examples)
    monkeypatch.setattr("stockpot.models.rendering._BATCH", 4)
    assert rows(how, *examples) == whole


# Encoder and decoder.


def pairs(how: Format, *examples: Example) -> list[tuple[str, list[int]]]:
    data, _ = how.data(examples)
    found = []
    for number in range(len(data)):
        batch = data.__getitems__([number])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        found.append((how.tokenizer.decode(ids), labels))
    return found


def test_the_encoder_reads_and_the_decoder_says():
    tokenizer = byte_tokenizer(ends=True)
    how = Format(tokenizer, True, 512, False)
    examples = [exchange("Hi 😀", "é 漢"), CHATS[2]]
    found = pairs(how, *examples)
    assert found == [
        ("Hi 😀</s>", tokenizer("é 漢")["input_ids"]),
        ("Hi 😀\n\né 🎉\n\nmore?\n\nno|yes\n\na</s>", tokenizer("b")["input_ids"]),
    ]
    assert all(labels[-1] == 1 and labels.count(1) == 1 for _, labels in found)
    choices = how.choices([Question("Hi ", ("é", "no way"), 1)])
    for number, choice in enumerate(("é", "no way")):
        batch = choices.__getitems__([number])
        assert batch["labels"][0].tolist() == tokenizer(choice)["input_ids"][:-1]
        assert batch["input_ids"][0].tolist() == tokenizer("Hi")["input_ids"]


def test_encoder_and_decoder_have_a_limit_each():
    tokenizer = byte_tokenizer(ends=True)
    prompt, response = " ".join("abcdefghijkl"), " ".join("mnopqrstuvwx")
    asked, said = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
    how = Format(tokenizer, True, 10, False)
    data, cut = how.data([exchange(prompt, response), exchange("a", response), exchange("a", "b")])
    batch = data.__getitems__([0])
    assert batch["input_ids"][0].tolist() == asked[-10:]
    assert batch["labels"][0].tolist() == said[:10]
    assert cut == Cut(3, 1, 2)


# A whole stream.


def stream_of(*examples: Example) -> TextStream:
    return TextStream("one", (TextTask("task", examples, (exchange("Hi", "you"),)),))


def test_an_example_without_anything_to_learn_is_refused(stories):
    settings = HuggingFace(id=str(stories))
    with pytest.raises(StockpotError, match="'task', train example 1: nothing of it is learned"):
        encode_stream(
            stream_of(exchange("Hi", "you"), conversation("user: only a question")), settings
        )


def test_a_stream_says_what_was_cut(stories):
    long = exchange("a " * 30, "b")
    encoded = encode_stream(
        stream_of(long, exchange("a", "b")), HuggingFace(id=str(stories), max_length=16)
    )
    (note,) = encoded.notes
    assert note.startswith("task (train): of 2 examples 1 lost the beginning of their prompt")
    assert [len(task.train) for task in encoded.tasks] == [2]
    assert int(encoded.tasks[0].train.lengths().max()) == 16
