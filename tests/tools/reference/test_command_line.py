"""The page on commands says what the parsers say."""

import argparse

from reference.command_line import page

from xquant_vllm.cli.help_format import examples


def a_parser():
    parser = argparse.ArgumentParser(prog="tool", description="Does things.")
    commands = parser.add_subparsers(metavar="COMMAND")
    run = commands.add_parser("run", help="run *it*", description="Run it.", **examples("tool run MODEL --bits 4 2"))
    run.add_argument("model", metavar="MODEL", help="what to run, in A_B or _c_")
    run.add_argument("words", nargs=argparse.REMAINDER, help="the rest")
    group = run.add_argument_group("output")
    group.add_argument("-o", "--out", metavar="DIR", required=True, help="where to")
    group.add_argument("--bits", type=int, nargs="+", default=4, help="bits (default %(default)s); not with --fast")
    group.add_argument("--kind", choices=["a", "b"])
    group.add_argument("--fast", action="store_true", help="50%% less")
    group.add_argument("--hidden", help=argparse.SUPPRESS)
    nested = commands.add_parser("look", help="look").add_subparsers(metavar="AT")
    nested.add_parser("inside", help="look inside")
    return parser


def test_every_command_has_its_section():
    text = page(a_parser())
    assert "| [`tool run`](#tool-run) | run \\*it\\* |" in text
    assert "## tool look inside" in text
    assert "## tool look\n" not in text
    assert "```text\ntool run MODEL [WORDS ...] -o, --out DIR [options]\n```" in text


def test_every_option_is_there_with_its_values():
    text = page(a_parser())
    assert "**Output**\n\n* `-o, --out DIR` (needed): where to\n" in text
    assert "* `--bits BITS ...`: bits (default 4); not with `--fast`\n" in text
    assert "* `--kind {a,b}`\n" in text
    assert "* `--fast`: 50% less\n" in text
    assert "hidden" not in text


def test_words_are_not_formatted():
    assert "* `MODEL`: what to run, in A_B or \\_c\\_\n" in page(a_parser())


def test_examples_are_commands_of_a_console():
    assert "```console\n$ tool run MODEL --bits 4 2\n```" in page(a_parser())
