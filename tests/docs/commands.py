"""What the documentation tells people to type: run where that is quick, else held to the parser that would read it."""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.docs.pages import ROOT
from xquant_vllm.cli.main import main
from xquant_vllm.kivi.plugin import settings as kivi
from xquant_vllm.plugin.registration import BACKENDS
from xquant_vllm.scheme import settings as xquant

# Run as they are. What is not here, and not checked below, must be marked as not run.
_HARMLESS = ("python", "python3", "ls", "cat", "head", "tail", "grep", "echo", "cd", "cp", "mkdir")
_SECONDS = 60
_TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
_ENDS = {"&&", "||", ";", "|", "&", ">", ">>", "<", "2>"}


class Workplace:
    """A working directory in which a page's blocks run in their order. Scripts find a copy of the repository there."""

    def __init__(self, folder: Path, model: Path) -> None:
        """Lay it out.

        Args:
            folder: an empty folder, the process's working directory.
            model: a tiny checkpoint, which stands in for every model that a page names.
        """
        self.folder, self._model = folder, model
        for name in ("my_text.txt", "my_other_text.txt"):
            (folder / name).write_text(_TEXT)
        (folder / "MODEL").symlink_to(model)

    def check(self, command: str, *, run: bool) -> None:
        """Run a command of a page, or hold it to the parser that would read it.

        Args:
            command: as typed.
            run: False for a command that is marked as not run.

        Raises:
            AssertionError: it would fail.
        """
        for words in split(command):
            tool = Path(words[0]).name
            if tool == "vllm":
                check_serve(words[1:])
            elif tool == "xquant":
                self._xquant(words[1:], run=run)
            elif tool == "make":
                check_make(words[1:])
            elif tool == "curl" and "localhost" in command:
                check_curl(words[1:])
            else:
                self._scripts_exist(words)
                if run:
                    assert tool in _HARMLESS, (
                        f"{tool!r} is not run here: put `<!-- not run: REASON -->` above the block"
                    )
                    self._shell(words)

    def _scripts_exist(self, words: list[str]) -> None:
        if Path(words[0]).name.startswith("python"):
            for word in words[1:2]:
                assert not word.endswith(".py") or (ROOT / word).is_file(), f"there is no {word}"

    def _shell(self, words: list[str]) -> None:
        if not (self.folder / "Makefile").exists():
            shutil.copytree(ROOT, self.folder, ignore=_not_source, dirs_exist_ok=True)
            for name in (".venv", "models"):
                (self.folder / name).symlink_to(ROOT / name)
        path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _made_here(self, model: str) -> bool:
        """Whether a model is a folder that an earlier command of the page has written."""
        folder = (self.folder / model).resolve()
        return (folder / "config.json").is_file() and folder.is_relative_to(self.folder.resolve())

    def _xquant(self, words: list[str], *, run: bool) -> None:
        """Run ``xquant``, on the tiny checkpoint and with few tokens."""
        words = synopsis(words)
        if words[0] == "serve":
            check_xquant_serve(words)
            return
        options = parse_xquant(words)
        slow = getattr(options, "through", "") == "vllm" or getattr(options, "device", "cpu") != "cpu"
        if not run or slow or getattr(options, "dataset", None):
            return
        model, out = getattr(options, "model", None), getattr(options, "out", None)
        if model is not None and not self._made_here(model):
            words = [str(self._model) if word == model else word for word in words]
        if out is not None and out.suffix == "":
            shutil.rmtree(self.folder / out, ignore_errors=True)
        for word in words:
            if word.endswith(".txt") and not (self.folder / word).exists():
                (self.folder / word).write_text(_TEXT)
        # The user's own cache is not to be emptied.
        place = mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self.folder / ".cache")})
        with captured() as said, place:
            status = main([*words, *smaller(options)])
        assert status == 0, said.getvalue()


def _not_source(folder: str, names: list[str]) -> set[str]:
    """What a copy of the repository does without."""
    built = {".git", ".venv", "models", "build", "dist", "logs"} if Path(folder) == ROOT else set()
    return built | {name for name in names if name == "__pycache__" or name.endswith("_cache")}


def split(command: str) -> Iterator[list[str]]:
    """The simple commands of a line, in words; without settings of the environment, redirections and comments."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    dropped = False
    for word in [*lexer, ";"]:
        if word in _ENDS:
            if words:
                yield words
            words, dropped = [], word in (">", ">>", "<", "2>")
        elif not dropped and (words or not re.fullmatch(r"[A-Z_]+=.*", word)):
            words.append(word)


def synopsis(words: list[str]) -> list[str]:
    """Words of a command without the brackets around options that may be left out; brackets inside of JSON stay."""
    opened = False
    plain = []
    for word in words:
        if word.startswith("[-"):
            opened, word = True, word[1:]
        if opened and word.endswith("]"):
            opened, word = False, word[:-1]
        plain.append(word)
    return plain


def parse_xquant(words: list[str]) -> argparse.Namespace:
    """What ``xquant`` makes of its arguments; not of ``xquant serve``, which would become a server.

    Raises:
        AssertionError: it refuses them.
    """
    assert words[0] != "serve", "see check_xquant_serve"
    original = argparse.ArgumentParser.parse_args
    parsed: list[argparse.Namespace] = []

    class Parsed(Exception):
        pass

    def parse_args(parser: Any, arguments: Any = None, namespace: Any = None) -> None:
        parsed.append(original(parser, arguments, namespace))
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args), captured() as said:
        try:
            main(words)
        except Parsed:
            return parsed[0]
        except SystemExit as stop:
            status = stop.code
    assert not status, said.getvalue()  # as of --help
    return argparse.Namespace()


def smaller(options: argparse.Namespace) -> list[str]:
    """Options that make a run of ``xquant`` quick; later ones win over those given."""
    given = vars(options)
    sizes = {"window": ["64"], "windows": ["1"], "lengths": ["256"], "depths": ["0.5"], "trials": ["1"]}
    words = [word for name, values in sizes.items() if name in given for word in (f"--{name}", *values)]
    if given.get("calibration") not in (None, "none"):
        words += ["--calibration-tokens", "256"]
    return words


@functools.cache
def _serve_parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def check_serve(words: list[str]) -> None:
    """Hold ``vllm serve`` to vLLM's own parser, and the settings in it to those of the backends.

    Raises:
        AssertionError: vLLM does not know an option, or a backend refuses a setting.
    """
    assert words[0] == "serve", f"`vllm {words[0]}` is not checked here"
    with captured() as said:
        try:
            options = _serve_parser().parse_args(synopsis(words[1:]))
        except SystemExit:
            raise AssertionError(said.getvalue().splitlines()[-1]) from None
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = options.attention_backend
    known = {*BACKENDS, *AttentionBackendEnum.__members__}
    assert backend is None or str(backend).upper() in known, f"there is no attention backend {backend}"
    parsers = {xquant.CONFIG_KEY: xquant.parse_settings, kivi.CONFIG_KEY: kivi.parse_settings}
    for key, settings in (options.additional_config or {}).items():
        assert key in parsers, f"--additional-config has {key!r}, which no backend of this package reads"
        parsers[key](settings)


def check_xquant_serve(words: list[str]) -> None:
    """Hold ``xquant serve`` to its parser, and what it makes of the rest to that of ``vllm serve``.

    Raises:
        AssertionError: as above.
    """
    seen: list[list[str]] = []
    with captured() as said, mock.patch("os.execv", lambda _, arguments: seen.append(arguments[1:])):
        status = main(words)
    assert status == 0, said.getvalue()
    check_serve(seen[0])


def check_make(words: list[str]) -> None:
    """Check that the Makefile has the targets and the variables.

    Raises:
        AssertionError: it lacks one.
    """
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, sets, _ = word.partition("=")
        found = re.search(rf"^{re.escape(name)} \?=", makefile, re.M) if sets else _target(makefile, name)
        assert word.startswith("-") or found, f"the Makefile has no {name}"


def _target(makefile: str, name: str) -> bool:
    return re.search(rf"^{re.escape(name)}:", makefile, re.M) is not None


def check_curl(words: list[str]) -> None:
    """Check that what is sent to a server is JSON."""
    for option, value in itertools.pairwise(words):
        if option in ("-d", "--data", "--json"):
            json.loads(value)


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """What a command prints, for messages."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
