"""docs/command-line.md: every command of ``xquant``, from its parser."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

from reference import MARK

_INTRODUCTION = """\
What `xquant --help` and the `--help` of every command say, on one page. Options may stand in any order. A command ends
with 0; with 2 if it is refused or fails, and then its last line says why and what to do; with 130 after Ctrl-C.

What can be set when a server starts is in [settings.md](settings.md).
"""

# In helps: an option, with a value of it if one follows, or the command that starts a server.
_CODE = re.compile(r"(vllm serve [\w -]*\w|(?<![\w-])--[a-z][\w-]*(?: vllm\b)?)")


@dataclass
class _Command:
    """A command that can be typed: its words, its parser, and what the list of commands says of it."""

    words: str
    parser: argparse.ArgumentParser
    summary: str


def page(parser: argparse.ArgumentParser) -> str:
    """The page in Markdown.

    Args:
        parser: of the program, with its commands.
    """
    commands = list(_commands(parser, parser.prog, parser.description or ""))
    lines = ["# Command line", "", MARK, "", _INTRODUCTION]
    lines += ["| command | what it does |", "|---|---|"]
    lines += [f"| [`{one.words}`](#{_anchor(one.words)}) | {_plain(one.summary)} |" for one in commands]
    for command in commands:
        lines += ["", *_section(command)]
    return "\n".join(lines) + "\n"


def _commands(parser: argparse.ArgumentParser, words: str, summary: str) -> Iterator[_Command]:
    """The commands below a parser, in its order; those that only lead to others are left out."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield _Command(words, parser, summary)
    for group in groups:
        for choice in group._choices_actions:  # each once, without other names, and without those that are hidden
            yield from _commands(group.choices[choice.dest], f"{words} {choice.dest}", choice.help or "")


def _section(command: _Command) -> Iterator[str]:
    parser = command.parser
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    needed = [_invocation(action) for action in shown if action.required and action.option_strings]
    arguments = [_values(action) for action in shown if not action.option_strings]
    yield f"## {command.words}"
    yield ""
    if parser.description:
        yield _plain(_expanded(parser.description, parser))
        yield ""
    yield "```text"
    yield " ".join([command.words, *arguments, *needed, "[options]"])
    yield "```"
    for group in parser._action_groups:
        items = [action for action in group._group_actions if action in shown and action.dest != "help"]
        if items:
            title = "arguments" if group.title == "positional arguments" else group.title or "options"
            yield ""
            yield f"**{title[0].upper()}{title[1:]}**"
            yield ""
            yield from (_item(action, parser) for action in items)
    examples = _examples(parser.epilog or "")
    if examples:
        yield from ("", "**Examples**", "", "<!-- not run: takes minutes -->", "```console")
        yield from (f"$ {example}" for example in examples)
        yield "```"


def _item(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    needed = " (needed)" if action.required and action.option_strings else ""
    text = _plain(_expanded(action.help or "", parser, action))
    return f"* `{_invocation(action)}`{needed}{': ' if text else ''}{text}"


def _invocation(action: argparse.Action) -> str:
    """How an argument is typed: ``--bits BITS ...``."""
    if not action.option_strings:
        return _values(action)
    names = ", ".join(action.option_strings)
    values = _values(action)
    return f"{names} {values}" if values else names


def _values(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    name = action.metavar or (_choice(action) if action.choices else action.dest.upper())
    name = " ".join(name) if isinstance(name, tuple) else name
    if isinstance(action.nargs, int):
        return " ".join([name] * action.nargs)
    forms = {"+": "{} ...", "*": "[{} ...]", "?": "[{}]", argparse.REMAINDER: "[{} ...]"}
    return forms.get(str(action.nargs), "{}").format(name)


def _choice(action: argparse.Action) -> str:
    return "{" + ",".join(map(str, action.choices or ())) + "}"


def _expanded(text: str, parser: argparse.ArgumentParser, action: argparse.Action | None = None) -> str:
    """A text with its ``%(default)s`` and the like filled in, on one line."""
    values = {**(vars(action) if action is not None else {}), "prog": parser.prog}
    return " ".join((text % values if action is not None or "%(" in text else text).split())


def _examples(epilog: str) -> list[str]:
    """The commands at the end of a help: lines that are indented."""
    return [line.strip() for line in epilog.splitlines() if line.startswith("  ")]


def _plain(text: str) -> str:
    """A text in which Markdown finds nothing to format. Options, and commands that start a server, stand as code."""
    parts = _CODE.split(text)
    return "".join(f"`{part}`" if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _escaped(text: str) -> str:
    return re.sub(r"([\\*<\[\]|`]|\b_|_\b)", r"\\\1", text)


def _anchor(words: str) -> str:
    return words.replace(" ", "-")
