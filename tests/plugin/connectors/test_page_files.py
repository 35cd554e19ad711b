"""Files of pages: whole, or not there."""

import os
import signal
import subprocess
import sys
import time

import pytest

from xquant_vllm.plugin.connectors.page_files import HEADER_BYTES, PART_SUFFIX, PageFileError, PageFolder

FINGERPRINT, OTHER = bytes(range(16)), bytes(16)
KEY, OTHER_KEY = bytes(range(32)), bytes(32)
PAGES = bytes(range(256)) * 5


@pytest.fixture
def folder(tmp_path):
    return PageFolder(tmp_path, FINGERPRINT, [len(PAGES), 64])


@pytest.fixture
def path(folder):
    folder.write(0, KEY, memoryview(PAGES))
    return folder.path(0, KEY)


def test_what_was_written_is_read(folder):
    assert not folder.holds(0, KEY)
    assert folder.write(0, KEY, memoryview(PAGES)) == HEADER_BYTES + len(PAGES)
    assert folder.holds(0, KEY)
    assert folder.read(0, KEY) == PAGES
    assert not folder.holds(1, KEY)
    assert not folder.holds(0, OTHER_KEY)
    assert folder.path(0, KEY).stat().st_size == HEADER_BYTES + len(PAGES)
    assert not list(folder.folder.rglob(f"*{PART_SUFFIX}"))


def test_engines_of_other_fingerprints_have_other_folders(tmp_path, folder, path):
    other = PageFolder(tmp_path, OTHER, [len(PAGES), 64])
    assert not other.holds(0, KEY)
    with pytest.raises(PageFileError, match="No such file"):
        other.read(0, KEY)


def test_a_changed_byte_is_noticed_wherever_it_is(folder, path):
    content = path.read_bytes()
    for place in [*range(HEADER_BYTES), HEADER_BYTES, len(content) // 2, len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert folder.holds(0, KEY)
        with pytest.raises(PageFileError):
            folder.read(0, KEY)
    path.write_bytes(content)
    assert folder.read(0, KEY) == PAGES


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + len(PAGES) - 1])
def test_half_of_a_file_is_none(folder, path, size):
    path.write_bytes(path.read_bytes()[:size])
    assert not folder.holds(0, KEY)
    with pytest.raises(PageFileError, match=f"has {size:,} bytes instead of 1,380"):
        folder.read(0, KEY)


def test_a_longer_file_is_none(folder, path):
    path.write_bytes(path.read_bytes() + b"x")
    assert not folder.holds(0, KEY)
    with pytest.raises(PageFileError, match="has 1,381 bytes"):
        folder.read(0, KEY)


def test_a_file_under_another_name_is_refused(tmp_path, folder, path):
    os.renames(path, folder.path(0, OTHER_KEY))
    with pytest.raises(PageFileError, match="has the pages of other tokens"):
        folder.read(0, OTHER_KEY)
    other = PageFolder(tmp_path, OTHER, [len(PAGES), 64])
    os.renames(folder.path(0, OTHER_KEY), other.path(0, KEY))
    with pytest.raises(PageFileError, match="has pages of other factors or settings"):
        other.read(0, KEY)


def test_a_foreign_file_is_refused(folder, path):
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(PageFileError, match="is no file of pages"):
        folder.read(0, KEY)


def put_folder(path):
    path.mkdir()


def put_pipe(path):
    os.mkfifo(path)


def put_link(path):
    target = path.with_suffix(".elsewhere")
    target.write_bytes(b"x" * (HEADER_BYTES + len(PAGES)))
    path.symlink_to(target)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [put_folder, put_pipe, put_link])
def test_what_is_no_file_is_none(folder, path, put):
    path.unlink()
    put(path)
    assert not folder.holds(0, KEY)
    with pytest.raises(PageFileError):
        folder.read(0, KEY)


def test_a_file_that_cannot_be_written_leaves_nothing(folder, path):
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        folder.write(0, KEY, memoryview(PAGES))
    assert not list(folder.folder.rglob(f"*{PART_SUFFIX}"))


WRITER = """
import sys, itertools
from pathlib import Path
from xquant_vllm.plugin.connectors.page_files import PageFolder
folder = PageFolder(Path(sys.argv[1]), bytes(range(16)), [1 << 20])
pages = bytes(range(256)) * 4096
for number in itertools.count():
    folder.write(0, (number % 7).to_bytes(32, "big"), memoryview(pages))
"""


def test_a_writer_that_is_killed_leaves_whole_files_only(tmp_path):
    folder = PageFolder(tmp_path, FINGERPRINT, [1 << 20])
    pages = bytes(range(256)) * 4096
    read = 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        end = time.monotonic() + 30
        while not folder.holds(0, (6).to_bytes(32, "big")):
            assert time.monotonic() < end
        for key in (number.to_bytes(32, "big") for number in range(7)):
            assert folder.read(0, key) == pages  # while it writes
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        for key in (number.to_bytes(32, "big") for number in range(7)):
            assert folder.read(0, key) == pages
            folder.path(0, key).unlink()
            read += 1
    assert read == 21
