"""How tools/prepare_model.py builds a folder: whole or not at all. With a recipe that needs no weights."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from model_prep import manifest, wheels
from model_prep.prepare import prepare
from model_prep.recipe import PrepareError, Recipe, Wheel


def _recipe(build, revision: int = 1) -> Recipe:
    return Recipe("small", "small-folder", "a test model", wheels=(), revision=revision, build=build)


def _write(text: str):
    def build(_wheels, target: Path) -> None:
        (target / "weights.txt").write_text(text)

    return build


def test_builds_once(tmp_path):
    folder = prepare(_recipe(_write("one")), tmp_path)
    assert folder == tmp_path / "small-folder"
    assert prepare(_recipe(_write("two")), tmp_path) == folder
    assert (folder / "weights.txt").read_text() == "one", "a whole folder is left as it is"


def test_builds_anew_when_damaged_or_out_of_date_or_forced(tmp_path, capsys):
    folder = prepare(_recipe(_write("one")), tmp_path)
    (folder / "weights.txt").write_text("tampered with")
    prepare(_recipe(_write("two")), tmp_path)
    assert (folder / "weights.txt").read_text() == "two"
    assert "weights.txt has 13 bytes instead of 3; building it anew" in capsys.readouterr().err
    prepare(_recipe(_write("three"), revision=2), tmp_path)
    assert (folder / "weights.txt").read_text() == "three"
    prepare(_recipe(_write("four"), revision=2), tmp_path, force=True)
    assert (folder / "weights.txt").read_text() == "four"


def test_failed_build_leaves_no_folder_and_keeps_an_old_one(tmp_path):
    def fail(_wheels, target: Path) -> None:
        (target / "weights.txt").write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        prepare(_recipe(fail), tmp_path)
    assert not (tmp_path / "small-folder").exists()
    folder = prepare(_recipe(_write("one")), tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        prepare(_recipe(fail, revision=2), tmp_path)
    assert (folder / "weights.txt").read_text() == "one"


def _copy_base(sources, target: Path) -> None:
    (target / "weights.txt").write_text((sources["small"] / "weights.txt").read_text() + " twice")


def _derived(base: Recipe) -> Recipe:
    return Recipe("derived", "derived-folder", "made from it", wheels=(), revision=1, build=_copy_base, base=base)


def test_base_is_prepared_first_and_once(tmp_path):
    folder = prepare(_derived(_recipe(_write("one"))), tmp_path)
    assert (folder / "weights.txt").read_text() == "one twice"
    assert (tmp_path / "small-folder" / "weights.txt").read_text() == "one"
    prepare(_derived(_recipe(_write("two"))), tmp_path, force=True)
    assert (folder / "weights.txt").read_text() == "one twice", "a whole base is left as it is"


def test_builds_anew_when_the_base_changed(tmp_path, capsys):
    base = _recipe(_write("one"))
    folder = prepare(_derived(base), tmp_path)
    prepare(_derived(replace(base, build=_write("two"), revision=2)), tmp_path)
    assert (folder / "weights.txt").read_text() == "two twice", "the base's recipe changed"
    assert "from another source or by an older recipe" in capsys.readouterr().err
    base = replace(base, build=_write("three"), revision=2)
    prepare(base, tmp_path, force=True)
    prepare(_derived(base), tmp_path)
    assert (folder / "weights.txt").read_text() == "three twice", "the same recipe made another base"
    assert "small-folder, from which it was made, has changed since; building it anew" in capsys.readouterr().err


def test_same_base_built_anew_or_taken_away_changes_nothing(tmp_path, capsys):
    base = _recipe(_write("one"))
    prepare(_derived(base), tmp_path)
    prepare(base, tmp_path, force=True)
    prepare(_derived(base), tmp_path)
    (tmp_path / "small-folder").rename(tmp_path / "elsewhere")
    prepare(_derived(base), tmp_path)
    assert not (tmp_path / "small-folder").exists()
    assert capsys.readouterr().err.count("derived-folder is there and whole") == 2


def test_file_in_pieces_is_put_together_in_order(tmp_path):
    parts = []
    for number, content in enumerate(["one ", "two ", "three"]):
        path = tmp_path / f"{number}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"data/part{number}", content)
        parts.append((path, f"data/part{number}"))
    with wheels.joined(parts, "whole.txt") as whole:
        assert whole.name == "whole.txt"
        assert whole.read_text() == "one two three"
    assert not whole.exists()


def test_cached_wheel_is_used_only_if_whole(tmp_path, monkeypatch):
    wheel = Wheel("nothing==1.0", "nothing-1.0-py3-none-any.whl", sha256="")
    path = tmp_path / wheel.filename
    path.write_bytes(b"content")
    right = Wheel(wheel.requirement, wheel.filename, sha256=manifest.sha256_of(path))
    assert wheels.fetch(right, tmp_path) == path
    path.write_bytes(b"damaged")
    monkeypatch.setattr(wheels.sys, "executable", "false")  # stands in for pip without a network
    with pytest.raises(PrepareError, match=r"could not download nothing==1\.0"):
        wheels.fetch(right, tmp_path)
    assert not path.exists()
