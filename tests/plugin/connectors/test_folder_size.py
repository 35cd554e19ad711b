"""The limit of a folder."""

import os
import time

from xquant_vllm.plugin.connectors.folder_size import FolderSize
from xquant_vllm.plugin.connectors.page_files import HEADER_BYTES, PART_SUFFIX, PageFolder

PAGES = bytes(900)
FILE = HEADER_BYTES + len(PAGES)  # 1,000 bytes


def write(folder, number, age):
    key = number.to_bytes(32, "big")
    folder.write(0, key, memoryview(PAGES))
    used = time.time() - age
    os.utime(folder.path(0, key), (used, used))
    return folder.path(0, key)


def test_what_was_used_longest_ago_goes_first_of_whichever_engine(tmp_path):
    ours, others = (PageFolder(tmp_path, bytes([name]) * 16, [len(PAGES)]) for name in (1, 2))
    kept = [write(ours, 1, 10), write(others, 2, 20)]
    gone = [write(ours, 3, 40), write(others, 4, 30)]
    size = FolderSize(tmp_path, 3 * FILE)
    size.add(FILE)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    # From now on it counts.
    write(ours, 5, 0)
    size.add(FILE)
    assert kept[1].exists()
    write(ours, 6, 0)
    size.add(FILE)
    assert [path.exists() for path in kept] == [False, False]


def test_without_a_limit_nobody_looks(tmp_path):
    folder = PageFolder(tmp_path, bytes(16), [len(PAGES)])
    paths = [write(folder, number, number) for number in range(5)]
    FolderSize(tmp_path, 0).add(10**12)
    assert all(path.exists() for path in paths)


def test_what_is_not_ours_stays_and_what_was_abandoned_goes(tmp_path):
    folder = PageFolder(tmp_path, bytes(16), [len(PAGES)])
    path = write(folder, 1, 0)
    old = time.time() - 7200
    foreign = [tmp_path / "notes.txt", tmp_path / "photos" / "ab" / "x.pages", path.parent / "notes.txt"]
    abandoned, fresh = path.parent / f"1-a{PART_SUFFIX}", path.parent / f"1-b{PART_SUFFIX}"
    for file in (*foreign, abandoned, fresh):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(5000))
    for file in (*foreign, abandoned):
        os.utime(file, (old, old))
    (tmp_path / ("f" * 32)).symlink_to(tmp_path / "photos")
    FolderSize(tmp_path, 10).add(FILE)
    assert all(file.exists() for file in (*foreign[:1], *foreign[2:], fresh))
    assert not abandoned.exists()
    assert not path.exists()
