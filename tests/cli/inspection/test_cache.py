"""``xquant cache``: what it lists and removes."""

import json
import os
import time

import pytest
import torch

from xquant_vllm.cli.main import main
from xquant_vllm.scheme.factor_cache import FactorCache

SETTINGS = {"basis": "head", "outlier_channels": {"key": 1, "value": 0}, "rotate": True, "dtype": "bfloat16"}
DAY = 86400


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two models, and a file that is somebody else's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "xquant_vllm"
    for model, days, layers in (("org/one", 1, 3), ("/models/two", 40, 2)):
        for layer in range(layers):
            store(folder, model, layer, days)
    (folder / "notes.txt").write_text("mine")
    return folder


def store(folder, model, layer, days):
    made = FactorCache(folder)
    weight = torch.full((2, 2), float(layer))
    path = made.path(f"recipe of {model}", weight, weight)
    about = None if model is None else {"model": model, "layer": layer, "settings": SETTINGS}
    made.store(path, {"x": torch.zeros(100)}, about)
    os.utime(path, (time.time() - days * DAY,) * 2)


def listed(capsys):
    capsys.readouterr()
    assert main(["cache", "list", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_entries_are_listed_by_model(cache, capsys):
    facts = listed(capsys)
    assert facts["folder"] == str(cache)
    assert facts["files"] == 5
    one, two = facts["entries"]
    assert (one["model"], one["layers"], one["files"], one["settings"]) == ("org/one", [0, 1, 2], 3, SETTINGS)
    assert one["bytes"] + two["bytes"] == facts["bytes"] == sum(p.stat().st_size for p in cache.glob("*.safetensors"))
    assert abs(time.time() - 40 * DAY - two["last_used"]) < 60
    assert abs(time.time() - two["created"]) < 60


def test_the_list_in_words(cache, capsys):
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{cache}: 5 files, ")
    assert lines[1] == "org/one"
    assert lines[2] == '  settings: basis head, outlier_channels {"key": 1, "value": 0}, rotate true, dtype bfloat16'
    assert lines[3].startswith("  3 layers in 3 files, ")
    assert lines[4] == "  made: just now; used last: 1 day ago"
    assert "used last: 40 days ago" in lines[-1]


def test_entries_of_an_older_release(cache, capsys):
    store(cache, None, 0, 3)
    assert [entry["model"] for entry in listed(capsys)["entries"]] == ["org/one", None, "/models/two"]
    assert main(["cache", "list"]) == 0
    assert "model not noted" in capsys.readouterr().out


def test_an_empty_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert listed(capsys)["entries"] == []
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.startswith("removed 0 files (0 bytes) of 0 files in ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ((), []),
        (("--older-than", "30d"), ["org/one"]),
        (("--older-than", "2h"), []),
        (("--older-than", "7w"), ["org/one", "/models/two"]),
        (("--model", "org/one"), ["/models/two"]),
        (("--model", "two"), ["org/one"]),
        (("--model", "one", "--older-than", "30d"), ["org/one", "/models/two"]),
    ],
)
def test_what_is_removed(cache, capsys, options, left):
    assert main(["cache", "clear", "--dry-run", *options]) == 0
    would = capsys.readouterr().out
    assert listed(capsys)["files"] == 5
    assert main(["cache", "clear", *options]) == 0
    assert capsys.readouterr().out == would.replace("would remove", "removed")
    assert [entry["model"] for entry in listed(capsys)["entries"]] == left
    assert (cache / "notes.txt").read_text() == "mine"


def test_a_model_that_has_no_entries(cache, capsys):
    assert main(["cache", "clear", "--model", "three"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("removed 0 files")
    assert "has nothing of three; it has entries of /models/two, org/one" in captured.err
    assert listed(capsys)["files"] == 5


@pytest.mark.parametrize("time", ["30", "d", "-1d", "1.5d", "1y", ""])
def test_no_time(cache, capsys, time):
    with pytest.raises(SystemExit):
        main(["cache", "clear", f"--older-than={time}"])
    assert "is no time: set a number and s, m, h, d or w, such as 30d" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["list", "clear"])
def test_a_folder_that_is_none(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "xquant_vllm").write_text("a file")
    assert main(["cache", command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be read (Not a directory); set XDG_CACHE_HOME" in line


def test_a_user_without_a_home(monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert main(["cache", "list"]) == 2
    assert "there is no cache: HOME is not set" in capsys.readouterr().err


def test_what_cannot_be_removed_is_said(cache, monkeypatch, capsys):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert main(["cache", "clear"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("removed 0 files")
    assert "cannot be removed (Permission denied); run the command as the user whose cache it is" in captured.err
