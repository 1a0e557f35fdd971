"""Text as people have it: each kind of file and of conversation is the text that it spells."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_cli.errors import CheckpointError, MissingPackageError, UsageError
from llmprune_cli.options import Text
from llmprune_cli.run.calibration import JUDGED_TOKENS, prepare_calibration
from llmprune_cli.text import files
from llmprune_cli.text.columns import find_columns, texts_in
from llmprune_cli.text.conversations import Spelled, Speller
from llmprune_cli.text.corpus import Corpus, own_corpus
from llmprune_cli.text.files import check_file, read_rows, read_text
from llmprune_cli.text.names import Part, parts_of
from llmprune_cli.text.windows import Reader
from support.cli import evaluated, run_cli
from support.refusals import CHECKPOINT, USAGE, assert_refused

ASKED, ANSWERED = "Why is the sky blue? ", "Since air scatters short waves most. "
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
SHARED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": ASKED}, {"type": "image"}]}, TURNS[1]]
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "messages in parts": {"messages": PARTS},
    "conversations": {"conversations": SHARED},
    "prompt and completion": {"prompt": ASKED, "completion": ANSWERED},
    "prompt and completion as turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "instruction and output": {"instruction": ASKED, "input": "", "output": ANSWERED},
}


@pytest.fixture(scope="module")
def marked(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template marks the roles, so that losing one is seen."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("marked") / "model"))
    template = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


SPELLED = f"[user] {ASKED}\n[assistant] {ANSWERED}\n"
WINDOWS = ("--max-seq-len", "32", "--limit", "4", "-q")


def nll(model: Path, text: Path, *options: str) -> float:
    found: float = evaluated(model, "--dataset", text, *WINDOWS, *options)["results"][0]["mean_nll"]
    return found


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_spelled_by_the_models_template(marked: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "plain.txt").write_text(SPELLED * 3)
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(CHATS[name])}\n" * 3)
    assert nll(marked, tmp_path / "chat.jsonl") == nll(marked, tmp_path / "plain.txt")


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "sky", "arguments": "{}"}}]}


@pytest.mark.parametrize("call", [CALL, {**CALL, "content": None}, {"role": "assistant", "content": None}])
def test_turns_without_words_are_empty_and_conversations_without_turns_are_left_out(
    marked: Path, tmp_path: Path, call: dict[str, object]
) -> None:
    rows = [{"messages": []}, {"messages": [TURNS[0], call, TURNS[1]]}, {"messages": None}]
    (tmp_path / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows * 3))
    (tmp_path / "plain.txt").write_text(f"[user] {ASKED}\n[assistant] \n[assistant] {ANSWERED}\n" * 3)
    assert nll(marked, tmp_path / "chat.jsonl") == nll(marked, tmp_path / "plain.txt")
    rows = [{"prompt": ASKED, "completion": None}, {"prompt": None, "completion": None}]
    (tmp_path / "asked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows * 6))
    (tmp_path / "plain.txt").write_text(f"[user] {ASKED}\n" * 6)
    assert nll(marked, tmp_path / "asked.jsonl") == nll(marked, tmp_path / "plain.txt")


def test_a_conversation_that_the_template_refuses_is_named_by_its_row(marked: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(marked, tmp_path / "model"))
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Users begin.') }}{% endif %}Yes"
    (model / "chat_template.jinja").write_text(template)
    rows = [{"messages": TURNS}, {"messages": []}, {"messages": TURNS[1:]}]
    (tmp_path / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = run_cli("eval", model, "--dataset", tmp_path / "chat.jsonl", *WINDOWS)
    assert_refused(run, CHECKPOINT, "chat.jsonl, row 3: the model's chat template refuses", "Users begin. Mend")


@pytest.mark.parametrize("first", [{"id": 1, "body": None}, {"id": 1}])
def test_columns_are_those_of_the_first_rows_together(
    tiny_llama: Path, tmp_path: Path, first: dict[str, object]
) -> None:
    rows = [first, *({"id": number, "body": "Once upon a time. " * 4} for number in range(5))]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "plain.txt").write_text("\n\n" + "\n\n".join(["Once upon a time. " * 4] * 5))
    assert nll(tiny_llama, tmp_path / "a.jsonl") == nll(tiny_llama, tmp_path / "plain.txt")
    rows = [{"id": 1, "title": "A", "body": None}, {"id": 2, "title": "B", "body": "Once"}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = run_cli("eval", tiny_llama, "--dataset", tmp_path / "a.jsonl", *WINDOWS)
    assert_refused(run, CHECKPOINT, "no column 'text' (it has id, title, body)")


def write_gz(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


ROWS = ["Once upon a time. " * 8, 'A "quoted", text. ' * 8]
KINDS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text("".join(f"{json.dumps({'text': row})}\n" for row in ROWS)),
    "a.json": lambda path: path.write_text(json.dumps([{"text": row} for row in ROWS], indent=1)),
    "a.jsonl.gz": lambda path: write_gz(path, "".join(f"{json.dumps({'text': row})}\n" for row in ROWS)),
    "a.json.gz": lambda path: write_gz(path, json.dumps([{"text": row} for row in ROWS])),
    "a.txt.gz": lambda path: write_gz(path, "\n\n".join(ROWS)),
    "a.csv": lambda path: path.write_text(
        "id,text\n" + "".join(f'{n},"{row.replace(chr(34), chr(34) * 2)}"\n' for n, row in enumerate(ROWS))
    ),
    "a.tsv": lambda path: path.write_text("body\n" + f"{ROWS[0]}\n" + ROWS[1].replace('"', "'") + "\n"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_text(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    check_file(tmp_path / name)
    if ".txt" in name:
        assert read_text(tmp_path / name) == "\n\n".join(ROWS)
        return
    rows = list(read_rows(tmp_path / name))
    columns = find_columns(name, list(rows[0]), ["body"], None)
    texts, is_chat = texts_in(name, rows, columns, Speller(None).spell)
    assert [own.text.replace("'", '"') for own in texts] == ROWS and not is_chat


def write_zst(path: Path, text: str) -> None:
    pytest.importorskip("zstandard", reason="pip install zstandard")
    import zstandard

    path.write_bytes(zstandard.ZstdCompressor().compress(text.encode()))


KINDS["a.jsonl.zst"] = lambda path: write_zst(path, "".join(f"{json.dumps({'text': row})}\n" for row in ROWS))


@pytest.mark.parametrize("name", ["a.csv", "a.json.gz", "a.jsonl.zst"])
def test_a_command_reads_packed_files_and_tables(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    (tmp_path / "plain.txt").write_text("\n\n".join(ROWS))
    assert nll(tiny_llama, tmp_path / name) == nll(tiny_llama, tmp_path / "plain.txt")


def test_a_column_may_be_named(tiny_llama: Path, tmp_path: Path) -> None:
    row = {"title": "A tale. " * 20, "body": "Once upon a time. " * 20}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    for column, text in row.items():
        (tmp_path / "plain.txt").write_text(text)
        found = nll(tiny_llama, tmp_path / "a.jsonl", "--text-column", column)
        assert found == nll(tiny_llama, tmp_path / "plain.txt")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', ("a.jsonl, line 3 is not JSON", "Mend or remove")),
        ("a.jsonl", '{"text": "x"}\n[1]\n', ("a.jsonl, line 2 holds a JSON list",)),
        ("a.json", '[{"text": "x"},\n{"text" "y"}]', ("a.json, line 2 is not JSON",)),
        ("a.csv", "id,text\n1,x\n2,y,z\n", ("a.csv, line 3 has another number of columns", "id, text")),
        ("a.jsonl", '{"messages": [{"who": "me"}]}\n', ("row 1: messages hold no conversation",)),
        ("a.jsonl", "", ("a.jsonl holds no rows",)),
    ],
)
def test_what_is_broken_is_named_by_its_line(
    tiny_llama: Path, tmp_path: Path, name: str, content: str, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(content)
    assert_refused(run_cli("eval", tiny_llama, "--dataset", tmp_path / name, *WINDOWS), CHECKPOINT, *words)


def test_another_encoding_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content, encoding in (("Käse".encode("latin-1"), "WINDOWS-1252"), ("Käse".encode("utf-16"), "UTF-16")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"iconv -f {encoding} -t UTF-8 .*a.txt > a-utf8.txt"):
            check_file(path)
    path.write_bytes(b"\xef\xbb\xbfWith a mark")
    assert read_text(path) == "With a mark"
    listed = tmp_path / "listed.json"
    listed.write_bytes(b'\xef\xbb\xbf[{"text": "With a mark"}]')
    assert list(files.read_rows(listed)) == [{"text": "With a mark"}]
    path.write_bytes("ä".encode() * files.SAMPLE_BYTES + b"x")  # whatever a cut does to a letter
    check_file(path)


def test_a_command_says_how_to_convert_another_encoding(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Once upon a time. ".encode("utf-16") * 9)
    run = run_cli("eval", tiny_llama, "--dataset", tmp_path / "a.txt", *WINDOWS)
    assert_refused(run, CHECKPOINT, "iconv -f UTF-16 -t UTF-8", "a-utf8.txt")


def test_zstd_without_its_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install zstandard"):
        check_file(tmp_path / "a.jsonl.zst")


def test_a_mixture_has_shares() -> None:
    assert parts_of("a.txt") == (Part("a.txt", 1.0),) and parts_of("org/name:plain") == (Part("org/name:plain", 1.0),)
    assert parts_of("a.jsonl:3,b:1") == (Part("a.jsonl", 0.75), Part("b", 0.25))
    assert parts_of("a.txt, b.txt") == (Part("a.txt", 0.5), Part("b.txt", 0.5))
    assert parts_of("a.txt:0.7") == (Part("a.txt", 1.0),) and parts_of("self:2") == (Part("self", 1.0),)
    assert parts_of("org/name:0.7") == (Part("org/name:0.7", 1.0),)  # a configuration
    for wrong in ("a:0.5,b", "a:0,b:1", "a,,b", "a.txt:0", "a.txt:nan"):
        with pytest.raises(UsageError):
            parts_of(wrong)


def test_what_a_text_has_not_is_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """A mixture where one text is read, and a column of plain text."""
    for name in (f"{text_file}:0.5,{text_file}:0.5", f"{text_file}:0.5"):
        refused = run_cli("eval", tiny_llama, "--dataset", name, *WINDOWS)
        assert_refused(refused, USAGE, "--dataset takes one text", "Run the command for each")
    column = ("--text-column", "body")
    out = ("--output", tmp_path / "out")
    for asked in (
        ("eval", tiny_llama, "--dataset", text_file, *WINDOWS),
        ("prune", tiny_llama, "--mlp", "50%", "--calibration", f"{text_file}:0.5,{text_file}:0.5", *out),
        ("recover", tiny_llama, "--text", text_file, *out),
    ):
        assert_refused(run_cli(*asked, *column), USAGE, "--text-column body is about tables", "Leave it out")


def test_a_share_of_one_text_is_all_of_it(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    way = ("--mlp", "50%", "--importance", "activation", "--refit", "none", "--calibration-seq-len", "40")
    run = run_cli(
        "prune", tiny_llama, *way, "--calibration", f"{text_file}:0.7", "--output", tmp_path / "out", "--json"
    )
    assert run.code == 0, run.stderr
    assert json.loads(run.stdout)["calibration"]["dataset"] == str(text_file)


def test_several_texts_are_calibrated_on_in_their_shares(tiny_llama: Path, tmp_path: Path) -> None:
    for name, word in (("a.txt", "alpha "), ("b.txt", "beta ")):
        (tmp_path / name).write_text(word * 400)
    asked = ("--calibration", f"{tmp_path / 'a.txt'}:0.75,{tmp_path / 'b.txt'}:0.25", "--calibration-seq-len", "40")
    way = ("--intermediate-size", "24", "--importance", "range", "--refit", "none", "--calibration-tokens", "640")
    run = run_cli("prune", tiny_llama, *way, *asked, "-o", tmp_path / "out", "--json")
    assert run.code == 0, run.stderr
    card = json.loads(run.stdout)["calibration"]
    assert card["tokens"] == 640 and "a.txt" in card["origin"] and "b.txt" in card["origin"]


@pytest.mark.parametrize(("shares", "windows"), [("0.75", (12, 4)), ("0.25", (4, 12))])
def test_each_text_has_its_share_of_the_windows(
    tiny_llama: Path, tmp_path: Path, shares: str, windows: tuple[int, int]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for name, word in (("a.txt", "alpha "), ("b.txt", "beta ")):
        (tmp_path / name).write_text(word * 400)
    mixture = f"{tmp_path}/a.txt:{shares},{tmp_path}/b.txt:{1 - float(shares)}"
    text = Text(mixture, calibration_tokens=640, calibration_seq_len=40)
    drawn = tokenizer.batch_decode(prepare_calibration(text, Reader(tokenizer, 96, 64), 0, print).fitted)
    assert (sum("lph" in own for own in drawn), sum("bet" in own for own in drawn)) == windows


@pytest.mark.parametrize("others", [True, False])
def test_a_model_is_judged_on_text_of_others_if_there_is_any(tiny_llama: Path, tmp_path: Path, others: bool) -> None:
    """What it writes itself is that much, too: enough to fit on and to choose by, and to judge by if need be."""
    from transformers import AutoTokenizer

    text, asked = tmp_path / "long.txt", list[int]()
    text.write_text("Others say this. " * 2000)

    def write(tokens: int) -> Corpus:
        asked.append(tokens)
        return own_corpus(Spelled("xyz" * (tokens // 3 + 1)), "a model")

    name = f"self:0.25,{text}:0.75" if others else "self"
    options = Text(name, calibration_tokens=1200, calibration_seq_len=40)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = prepare_calibration(options, Reader(tokenizer, 96, 64), 0, pytest.fail, write)
    own, held_out, judged = (
        sum("xyz" in window for window in tokenizer.batch_decode(windows))
        for windows in (found.fitted, found.held_out, found.judged)
    )
    assert (own, held_out) == ((8, 1) if others else (30, 3))
    assert found.judged[:, 1:].numel() >= JUDGED_TOKENS and judged == (0 if others else len(found.judged))
    assert asked[0] < (600 if others else 1.2 * JUDGED_TOKENS)


def test_of_a_small_share_a_model_writes_a_window_to_fit_on_and_one_to_choose_by(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "long.txt"
    text.write_text("Others say this. " * 2000)
    options = Text(f"self:0.02,{text}:0.98", calibration_tokens=1200, calibration_seq_len=40)
    found = prepare_calibration(
        *(options, Reader(AutoTokenizer.from_pretrained(tiny_llama), 96, 64), 0, pytest.fail),
        lambda tokens: own_corpus(Spelled("x" * tokens), "a model"),
    )
    assert len(found.fitted) >= 30 and len(found.held_out) >= 2


def test_fewer_tokens_than_a_window_are_said_to_be_one_window(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    way = ("--intermediate-size", "24", "--importance", "range", "--refit", "none", "--calibration-tokens", "10")
    run = run_cli(
        "prune", tiny_llama, *way, "--calibration", text_file, "--calibration-seq-len", "40", "-o", tmp_path / "o"
    )
    assert run.code == 0 and "--calibration-tokens 10 is less than one window of 40" in run.stderr
    assert "Fitted on 40 tokens" in run.stdout


def test_a_dry_run_says_of_windows_what_the_run_says(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = ("--calibration-tokens", "20", "--calibration-seq-len", "1000")
    way = ("--intermediate-size", "24", "--importance", "range", "--refit", "none", "--calibration", text_file)
    for delivery in (("--dry-run",), ("-o", tmp_path / "out")):
        run = run_cli("prune", tiny_llama, *way, *asked, *delivery)
        assert run.code == 0 and "Windows have 64 tokens instead of 1,000" in run.stderr, run.stderr
        assert "--calibration-tokens 20 is less than one window of 64" in run.stderr
    assert "instead of" not in run_cli("prune", tiny_llama, *way, "--dry-run").stderr  # nobody asked for 512


def test_the_result_is_judged_on_the_same_text_apart_whatever_is_fitted_on(tiny_llama: Path, tmp_path: Path) -> None:
    """The card says on how many tokens, and what they are depends on nothing but the text and the seed."""
    from transformers import AutoTokenizer

    text = tmp_path / "long.txt"
    text.write_text(" ".join(f"{number} is followed by {number + 1}." for number in range(2000)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = [
        prepare_calibration(
            Text(str(text), calibration_tokens=count, calibration_seq_len=60), Reader(tokenizer, 96, 64), 0, print
        )
        for count in (600, 6000)
    ]
    assert found[0].judged.tolist() == found[1].judged.tolist()
    for own in found:
        seen, judged = ({*map(tuple, part.tolist())} for part in (torch.cat([own.fitted, own.held_out]), own.judged))
        assert not seen & judged and own.judged[:, 1:].numel() >= JUDGED_TOKENS == 16_384
    way = ("--intermediate-size", "24", "--importance", "range", "--refit", "none", "--calibration-tokens", "600")
    run = run_cli("prune", tiny_llama, *way, "--calibration", text, "--calibration-seq-len", "60", "-o", tmp_path / "o")
    (said,) = re.findall(r"judged on ([0-9,]+) others", run.stdout)
    assert int(said.replace(",", "")) == found[0].judged[:, 1:].numel(), run.stderr
