"""What the documentation shows works: commands and Python of every page, run in the order of the page."""

import argparse
import shutil
from pathlib import Path

import pytest

from tests.docs.commands import Workplace, check_make, check_serve, smaller, split, synopsis
from tests.docs.pages import Block, blocks, page_name, pages
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny checkpoint with a tokenizer, whose tokens are bytes."""
    import tokenizers
    import transformers

    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=4096)
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def place(model, tmp_path, monkeypatch) -> Workplace:
    """Where commands run."""
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, model)


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_the_blocks_of_a_page_work(page, place):
    names: dict[str, object] = {"__name__": "__main__"}
    failures = []
    for block in blocks(page.read_text(), page_name(page)):
        try:
            _check(block, place, names)
        except Exception as error:
            failures.append(f"{block.where}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def _check(block: Block, place: Workplace, names: dict[str, object]) -> None:
    if block.language == "console":
        commands = block.commands()
        assert commands, "a console block has lines that start with `$ `"
        for command in commands:
            place.check(command, run=block.reason is None)
        return
    code = compile("\n".join(block.lines), block.where, "exec")
    if block.reason is None:
        if "factorize" in code.co_names:
            shutil.rmtree(place.folder / "DIR", ignore_errors=True)
        exec(code, names)


def test_marks_and_continued_lines_are_read():
    text = "\n".join(
        [
            "<!-- not run: takes minutes -->",
            "```console",
            "$ make test  # all",
            "passed",
            "$ xquant eval \\",
            "    needle M && ls",
            "```",
        ]
    )
    (block,) = blocks(text, "page")
    assert block.reason == "takes minutes"
    words = [words for command in block.commands() for words in split(command)]
    assert words == [["make", "test"], ["xquant", "eval", "needle", "M"], ["ls"]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- not run: boring -->\n```console\n$ ls\n```", "unknown reason 'boring'"),
        ("<!-- not run: takes minutes -->\nwords", "opens no block"),
        ("<!-- not run: takes minutes -->\n```\nx\n```", "none that would be run"),
        ("```console\n$ ls", "not closed"),
    ],
)
def test_bad_marks_are_found(text, problem):
    with pytest.raises(ValueError, match=problem):
        blocks(text, "page")


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("vllm serve M --attention-backend xquamt", "no attention backend xquamt"),
        ("vllm serve M --no-such-option", "no-such-option"),
        ("""vllm serve M --additional-config '{"xquant": {"bits": 5}}'""", "no page format has 5-bit codes"),
        ("""vllm serve M --additional-config '{"xqant": {}}'""", "'xqant'"),
        ("make no-such-target", "no no-such-target"),
        ("make demo BITZ=4", "no BITZ"),
        ("xquant eval perplexity MODEL --no-such-option", "no-such-option"),
        ("xquant factorize no-such-model --out DIR --calibration x.md", r"x\.md"),
        ("python no-such-script.py", r"no no-such-script\.py"),
        ("rm -r MODEL", "'rm' is not run here"),
    ],
)
def test_commands_that_would_fail_are_found(command, problem, place):
    with pytest.raises(Exception, match=problem):
        place.check(command, run=True)


def test_options_that_may_be_left_out_are_checked_too():
    assert synopsis(["M", "[--depths", "0", "1]", "--settings", "[1]"]) == [
        "M",
        "--depths",
        "0",
        "1",
        "--settings",
        "[1]",
    ]
    check_serve(["serve", "M", "[--max-model-len", "4096]"])


def test_targets_with_variables_are_known():
    check_make(["demo", "BITS=3", "--jobs=2"])


def test_runs_are_made_small():
    assert smaller(argparse.Namespace(window=1024, calibration="x.txt")) == [
        "--window",
        "64",
        "--calibration-tokens",
        "256",
    ]
