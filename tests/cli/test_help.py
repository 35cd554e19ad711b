"""What --help shows: options in groups, and examples that can be typed."""

import shlex

import pytest

from xquant_vllm.cli.main import main, parser

COMMANDS = [
    (),
    ("factorize",),
    ("eval",),
    ("eval", "perplexity"),
    ("eval", "needle"),
    ("plan",),
    ("inspect",),
    ("cache",),
    ("cache", "list"),
    ("cache", "clear"),
    ("doctor",),
]


def help_of(capsys, *command):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_ends_with_examples_that_parse(capsys, command):
    text = help_of(capsys, *command)
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        assert words[: 1 + len(command)] == ["xquant", *command]
        assert callable(parser().parse_args(words[1:]).command)


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        (("factorize",), ["output", "calibration", "method", "measured loss", "where to compute"]),
        (("eval", "perplexity"), ["what is evaluated", "method", "how it runs", "output"]),
        (("eval", "needle"), ["what is evaluated", "method", "how it runs", "output"]),
        (("plan",), ["how it is served", "recommendation", "requests", "output"]),
    ],
)
def test_options_stand_in_groups(capsys, command, groups):
    lines = help_of(capsys, *command).splitlines()
    titles = [line[:-1] for line in lines if line.endswith(":") and not line.startswith((" ", "usage"))]
    assert titles == ["positional arguments", "options", *groups, "examples"]
    start = lines.index("options:")
    assert lines[start + 1 : start + 3] == ["  -h, --help            show this help message and exit", ""]
