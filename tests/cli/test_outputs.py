"""``--out`` and ``--resume``: what cannot be written is refused before anything is computed, and no result is lost."""

import io
import json

import pytest

from xquant_vllm.cli.main import main
from xquant_vllm.evaluation.model.hooked_model import HookedModel
from xquant_vllm.offline.writable import check_file, check_folder, check_new_folder

SMALL = {"perplexity": ("--window", "64", "--windows", "1"), "needle": ("--lengths", "96", "--trials", "1")}


def evaluate(task, model, *options):
    return main(["eval", task, str(model), *SMALL[task], "--method", "16bit", *map(str, options)])


def refusal(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def untouched(monkeypatch):
    """Fails where a model is even looked for."""
    for module in ("xquant_vllm.cli.eval_subject", "xquant_vllm.offline.factorize"):
        monkeypatch.setattr(f"{module}.open_checkpoint", None)


@pytest.mark.parametrize("task", SMALL)
@pytest.mark.parametrize(
    ("option", "place", "why"),
    [
        ("--out", "", "is a folder; name a file, for example {tmp_path}/result.json"),
        ("--out", "file/result.json", "cannot be written: {tmp_path}/file is no folder; name another file"),
        ("--out", "file/a/b/result.json", "cannot be written: {tmp_path}/file is no folder; name another file"),
        ("--out", "x" * 255, "cannot be written: File name too long ({tmp_path}); name another file"),
        ("--out", "/proc/result.json", "cannot be written: No such file or directory (/proc); name another file"),
        ("--out", "/dev/null", "is no ordinary file; name one that may be replaced"),
        ("--resume", "file", "cannot be written: {tmp_path}/file is no folder; name another folder"),
        ("--resume", "file/scores", "cannot be written: {tmp_path}/file is no folder; name another folder"),
        ("--resume", "/proc/scores", "cannot be written: No such file or directory (/proc); name another folder"),
    ],
)
def test_an_evaluation_that_could_not_write_is_refused_at_once(untouched, tmp_path, capsys, task, option, place, why):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / place
    assert evaluate(task, "no model", option, path) == 2
    assert refusal(capsys) == f"xquant: {option} {path} {why.format(tmp_path=tmp_path)}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("place", "force", "why"),
    [
        ("file", False, "is a file, and a folder is to be written; choose another name"),
        ("file", True, "is a file, and a folder is to be written; choose another name"),
        ("file/new", False, "cannot be written: {tmp_path}/file is no folder; name another folder"),
        ("dangling", False, "is a link to what is not there; choose another name"),
        ("x" * 255, False, "cannot be written: File name too long ({tmp_path}); name another folder"),
        ("/proc/new", False, "cannot be written: No such file or directory (/proc); name another folder"),
    ],
)
def test_a_folder_that_could_not_be_made_is_refused_at_once(untouched, tmp_path, capsys, place, force, why):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    path = tmp_path / place
    assert main(["factorize", "no model", "--out", str(path), *(["--force"] if force else [])]) == 2
    assert refusal(capsys) == f"xquant: --out {path} {why.format(tmp_path=tmp_path)}"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize("check", [check_file, check_folder, check_new_folder])
def test_a_place_without_permission_is_refused(tmp_path, monkeypatch, check):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"^xquant: --out .*/a/b cannot be written: Permission denied \(.*\); name an"):
        check("--out", tmp_path / "a" / "b")


def test_checks_leave_nothing_behind(tmp_path):
    check_file("--out", tmp_path / "a" / "b.json")
    check_folder("--resume", tmp_path / "a" / "b")
    check_new_folder("--out", tmp_path / "a" / "b")
    check_file("--out", None)
    check_folder("--resume", None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", SMALL)
def test_a_result_that_cannot_be_written_at_the_end_is_printed(llama, tokenizer, tmp_path, capsys, monkeypatch, task):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xquant_vllm.cli.eval_output.replace_json", refuse)
    assert evaluate(task, llama, "--out", tmp_path / "result.json", "--json") == 2
    output = capsys.readouterr()
    assert json.loads(output.out)["task"] == task
    assert output.err.splitlines()[-1] == (
        f"xquant: --out {tmp_path / 'result.json'} cannot be written ([Errno 28] No space left on device); the result "
        "stands on standard output"
    )


def test_a_result_that_cannot_be_printed_is_written(llama, tokenizer, tmp_path, capsys, monkeypatch):
    class Closed(io.StringIO):
        """A pipe whose reader is gone: it fails when there is something to flush."""

        def flush(self):
            if self.getvalue():
                raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Closed())
    assert evaluate("perplexity", llama, "--out", tmp_path / "result.json") == 2
    assert json.loads((tmp_path / "result.json").read_text())["task"] == "perplexity"
    assert f"; it is in {tmp_path / 'result.json'}" in capsys.readouterr().err.splitlines()[-1]


def test_folders_above_are_made_and_a_failure_takes_them_away_again(llama, tokenizer, tmp_path, capsys, monkeypatch):
    assert evaluate("perplexity", llama, "--out", tmp_path / "a" / "b" / "result.json") == 0
    assert (tmp_path / "a" / "b" / "result.json").exists()
    monkeypatch.setattr(HookedModel, "logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate("perplexity", llama, "--out", tmp_path / "c" / "result.json")
    monkeypatch.setattr("xquant_vllm.offline.factorize.link_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["factorize", str(llama), "--out", str(tmp_path / "c" / "d" / "out")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
