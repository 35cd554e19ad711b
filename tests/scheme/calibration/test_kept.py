"""Folders of kept factors: what they say of themselves, and when they are removed."""

import fcntl
import os
import time

import pytest

from xquant_vllm.scheme.calibration.kept import KEPT_ROOM, READ_BY_THEN, touch, write_about
from xquant_vllm.scheme.factor_cache_entries import ABANDONED, cache_entries, remove

NAME = "0123456789abcdef" * 2


@pytest.fixture
def folder(tmp_path):
    """A folder that was used an hour ago and more, beside one that is somebody else's."""
    folder = tmp_path / KEPT_ROOM / NAME
    folder.mkdir(parents=True)
    (folder / "factors").write_bytes(b"0" * 100)
    write_about(folder, "/models/one", {"bits": 2})
    (tmp_path / KEPT_ROOM / "mine").mkdir()
    (tmp_path / KEPT_ROOM / "link").symlink_to(folder)
    age(folder, 2 * ABANDONED)
    return folder


def age(folder, seconds):
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def test_it_is_listed_with_what_it_is_of(folder, tmp_path):
    (entry,) = cache_entries(tmp_path)
    assert (entry.path, entry.calibrated, entry.part) == (folder, True, False)
    assert entry.is_of("one")
    assert entry.about["settings"] == {"bits": 2}
    assert entry.size == sum(path.stat().st_size for path in folder.iterdir())


def test_it_goes_as_a_whole(folder, tmp_path):
    (entry,) = cache_entries(tmp_path)
    assert remove(entry)
    assert {path.name for path in folder.parent.iterdir()} == {"mine", "link", f".{NAME}.lock"}
    assert not remove(entry)
    assert cache_entries(tmp_path) == []


def test_it_stays_while_a_server_reads_it(folder, tmp_path):
    (entry,) = cache_entries(tmp_path)
    touch(folder)
    assert not remove(entry)
    (entry,) = cache_entries(tmp_path)
    assert not remove(entry)
    age(folder, READ_BY_THEN + 1)
    (entry,) = cache_entries(tmp_path)
    assert remove(entry)


def test_it_stays_while_it_is_made(folder, tmp_path):
    (entry,) = cache_entries(tmp_path)
    with (folder.parent / f".{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not remove(entry)
    assert remove(entry)


def test_what_a_killed_process_left_is_a_part(folder, tmp_path):
    work = folder.with_name(f".{NAME}.work")
    folder.rename(work)
    (entry,) = cache_entries(tmp_path)
    assert (entry.path, entry.part, entry.model) == (work, True, None)
    assert remove(entry)
    work.mkdir()
    assert cache_entries(tmp_path) == []  # somebody may be at it


def test_a_folder_of_which_nothing_is_known(folder, tmp_path):
    (folder / "about.json").write_text("{")
    age(folder, ABANDONED)
    (entry,) = cache_entries(tmp_path)
    assert (entry.model, entry.about) == (None, {})
