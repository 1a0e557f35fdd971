"""What of a conversation an assistant says, whatever a chat template puts around it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmprune_cli.errors import CheckpointError
from llmprune_cli.text.conversations import Message, Spelled, Speller, joined
from llmprune_cli.text.reading import read
from support.tiny import save_byte_level

TURN = "{% for m in messages %}<s>{{ m['role'] }}\n"
AS_IT_IS = TURN + "{{ m['content'] }}</s>\n{% endfor %}"
TRIMMED = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }} </s>{% endfor %}"
WITHOUT_END = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
SYSTEM_LAST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.index0 >= messages | length - 2 %}{{ messages[0]['content'] }} {% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
THINKING = (
    TURN + "{% set said = m['content'] %}{% if m['role'] == 'assistant' %}{% set parts = said.split('</think>') %}"
    "{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n"
    "{% endif %}{% set said = parts[-1].lstrip('\n') %}{% endif %}{{ said }}</s>\n{% endfor %}"
)
PLAIN = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What does an assistant say to 1+1? 2"},
    {"role": "assistant", "content": " 2\n"},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "a"},
]
THOUGHT = [
    *(PLAIN[1], {"role": "assistant", "content": "<think>\nOne more.\n</think>\n\n2"}, PLAIN[3]),
    {"role": "assistant", "content": "<think>\nMy words.\n</think>\n\na"},
]
ODD = [
    {"role": "assistant", "content": "<think>only thoughts</think>\n"},
    {"role": "user", "content": "QZ0QZ and QZ7QZ, or QZ"},
    {"role": "assistant", "content": "Use <think>"},
    {"role": "assistant", "content": "one"},
    {"role": "tool", "content": "one"},
    {"role": "assistant", "content": "two"},
]
REPEATED = AS_IT_IS + "Last: {{ messages[-1]['content'] }}."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("conversations")
    save_byte_level(folder)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def answers(tokenizer: PreTrainedTokenizerBase, template: str | None, conversation: list[Message]) -> list[str]:
    tokenizer.chat_template = template
    found = Speller(tokenizer, True).spell(conversation)
    assert Speller(tokenizer).spell(conversation) == Spelled(found.text) and found.answers is not None
    return [found.text[first:end] for first, end in found.answers]


@pytest.mark.parametrize(
    ("template", "conversation", "expected"),
    [
        (None, PLAIN, [" 2\n", "a"]),
        (AS_IT_IS, PLAIN, [" 2\n</s>", "a</s>"]),
        (TRIMMED, PLAIN, ["2 </s>", "a </s>"]),
        (WITHOUT_END, PLAIN, [" 2", "a"]),
        (SYSTEM_LAST, PLAIN, [" 2\n</s>", "a</s>"]),
        (AS_IT_IS, THOUGHT, ["<think>\nOne more.\n</think>\n\n2</s>", "<think>\nMy words.\n</think>\n\na</s>"]),
        (AS_IT_IS, ODD, ["<think>only thoughts</think>\n</s>", "Use <think></s>", "one</s>", "two</s>"]),
        (REPEATED, PLAIN, [" 2\n</s>", "a</s>", "a"]),
        (THINKING, THOUGHT, ["2</s>", "<think>\nMy words.\n</think>\n\na</s>"]),
        (THINKING, PLAIN, [" 2\n</s>", "<think>\n\n</think>\n\na</s>"]),
    ],
    ids=[
        "no template",
        "as it is",
        "trimmed",
        "without end",
        "system last",
        "thoughts",
        "odd",
        "repeated",
        "thinking",
        "no thoughts",
    ],
)
def test_an_assistant_says_its_words_and_what_ends_its_turn(
    tokenizer: PreTrainedTokenizerBase, template: str | None, conversation: list[Message], expected: list[str]
) -> None:
    assert answers(tokenizer, template, conversation) == expected


@pytest.mark.parametrize("template", [None, AS_IT_IS])
def test_an_assistant_that_says_nothing_has_no_words(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    assert answers(tokenizer, template, [PLAIN[1], {"role": "assistant", "content": ""}, PLAIN[4]])[:-1] == []
    assert answers(tokenizer, template, PLAIN[:2]) == []


@pytest.mark.parametrize("change", ["upper", "replace('2', 'two')"])
def test_a_template_that_changes_what_an_assistant_says(tokenizer: PreTrainedTokenizerBase, change: str) -> None:
    tokenizer.chat_template = AS_IT_IS.replace("m['content']", f"m['content'].{change.replace('upper', 'upper()')}")
    with pytest.raises(CheckpointError, match=r"changes what an assistant says.*leave out --loss-on assistant"):
        Speller(tokenizer, True).spell(PLAIN)
    assert Speller(tokenizer).spell(PLAIN).text  # which is asked for without it


def test_places_are_those_in_all_documents_together() -> None:
    documents = [Spelled("one"), Spelled("two", ((0, 2),)), Spelled(""), Spelled("three", ((1, 2), (3, 5)))]
    found = joined(documents, "--")
    assert found.answers is not None
    assert [found.text[first:end] for first, end in found.answers] == ["one", "tw", "h", "ee"]
    assert joined(documents[:1], "--") == Spelled("one")


def test_tokens_within_ranges_are_those_that_have_a_character_of_one(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The answer é    is it.\n</s>And so on</s>"
    reading = read(text, tokenizer)
    ranges = [
        (text.index("er"), text.index("s it")),
        (text.index("</s>"), text.index("d so")),
        (len(text) - 1, len(text)),
    ]
    spans = [reading.encoding.token_to_chars(number) for number in range(len(reading.tokens))]
    expected = [span is not None and any(a < span.end and span.start < b for a, b in ranges) for span in spans]
    found = reading.within(ranges)
    assert found.tolist() == expected and 0 < int(found.sum()) < len(found)
    sizes = reading.sizes()
    assert sizes is not None and int(sizes.sum()) == len(text.encode())
    assert not reading.within([]).any()


def test_a_token_of_spaces_is_where_the_last_of_them_is(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of such a token, some tokenizers tell but the end."""
    text = "say:    x"
    reading = read(text, tokenizer)
    spans = torch.tensor([(0, 4), (7, 7), (8, 9)])  # "say:", "   ", " x"

    class Told:
        offsets = spans.tolist()

    told = type(reading)(text, reading.tokens[:3], tokenizer, {0: Told})  # type: ignore[arg-type]
    assert told.within([(4, 8)]).tolist() == [False, True, False]
    assert told.within([(0, 4), (8, 9)]).tolist() == [True, False, True]
