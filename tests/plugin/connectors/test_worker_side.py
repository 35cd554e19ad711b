"""Pages between the cache and files."""

import logging
import os

import pytest
import torch

from xquant_vllm.plugin.connectors.folder_size import FolderSize
from xquant_vllm.plugin.connectors.groups import PageGroup
from xquant_vllm.plugin.connectors.page_files import PageFolder
from xquant_vllm.plugin.connectors.transfers import Page
from xquant_vllm.plugin.connectors.worker_side import GroupPages, WorkerSide

GROUPS = (PageGroup(16, None, ("quantized", "plain")), PageGroup(16, 48, ("window",)))
BLOCKS = 12


def caches(seed):
    """Pages of bytes, 16-bit keys and values whose tokens lie apart, and a layer in a block of a larger pool."""
    torch.manual_seed(seed)
    plain = torch.randn(BLOCKS, 16, 2, 8, dtype=torch.bfloat16).transpose(1, 2)
    pool = torch.randint(0, 256, (BLOCKS, 3, 1, 16, 5), dtype=torch.uint8)
    return {
        "quantized": torch.randint(0, 256, (BLOCKS, 1, 16, 7), dtype=torch.uint8),
        "plain": plain,
        "window": pool[:, 1],
    }


@pytest.fixture
def side(tmp_path):
    def side(seed=0, size=0):
        tensors = caches(seed)
        groups = [GroupPages(group, tensors) for group in GROUPS]
        folder = PageFolder(tmp_path / "pages", bytes(16), [group.page_bytes for group in groups])
        return WorkerSide(groups, folder, FolderSize(tmp_path / "pages", size)), tensors, folder

    return side


def key(number):
    return number.to_bytes(32, "big")


PAGES = [Page(0, key(1), 3), Page(0, key(2), 5), Page(1, key(2), 7), Page(1, key(3), 1)]
MOVED = [Page(0, key(1), 9), Page(0, key(2), 2), Page(1, key(2), 4), Page(1, key(3), 11)]


def test_pages_come_back_whatever_their_layout_is(side):
    writer, ours, folder = side()
    assert folder.page_bytes == (16 * 7 + 16 * 2 * 8 * 2, 16 * 5)
    writer.save(PAGES)
    reader, theirs, _ = side(1)
    before = {name: cache.clone() for name, cache in theirs.items()}
    assert reader.load({"request": MOVED}) == set()
    for name, group in (("quantized", 0), ("plain", 0), ("window", 1)):
        moved = {to.block: at.block for at, to in zip(PAGES, MOVED, strict=True) if at.group == group}
        for block in range(BLOCKS):
            expected = ours[name][moved[block]] if block in moved else before[name][block]
            assert torch.equal(theirs[name][block], expected)
    assert (reader.moved.read_files, reader.moved.read_bytes) == (4, 2 * sum(folder.page_bytes))
    assert writer.moved.written_files == 4


def test_what_is_there_is_not_written_again(side):
    writer, _, folder = side()
    writer.save(PAGES)
    written = folder.path(0, key(1)).stat().st_mtime_ns
    writer.save([*PAGES, Page(0, key(9), 1), Page(0, key(9), 2)])
    assert folder.path(0, key(1)).stat().st_mtime_ns == written
    assert writer.moved.written_files == 5


def test_more_blocks_than_are_copied_at_once(side):
    writer, ours, folder = side()
    writer.save([Page(1, key(number), number % BLOCKS) for number in range(70)])
    for number in (0, 31, 32, 69):
        assert folder.read(1, key(number)) == ours["window"][number % BLOCKS].flatten().numpy().tobytes()


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_bad_file_is_named_and_removed_and_nothing_of_its_request_is_taken(side, caplog):
    writer, _, folder = side()
    writer.save(PAGES)
    bad = folder.path(0, key(2))
    damage(bad)
    reader, theirs, _ = side(1)
    before = {name: cache.clone() for name, cache in theirs.items()}
    with caplog.at_level(logging.WARNING, "vllm.xquant_vllm"):
        assert reader.load({"bad": MOVED, "good": [MOVED[2]]}) == {"bad"}
    (line,) = caplog.messages
    assert f"were to come from {bad}, because the file is corrupt: its checksum is wrong" in line
    assert not bad.exists()
    assert torch.equal(theirs["quantized"], before["quantized"])
    assert not torch.equal(theirs["window"][4], before["window"][4])
    assert not torch.equal(theirs["window"][11], theirs["window"][4])
    writer.save(PAGES)
    assert folder.holds(0, key(2))


def test_a_file_that_has_gone_is_no_reason_to_complain(side, caplog):
    reader, _, _ = side()
    with caplog.at_level(logging.WARNING, "vllm.xquant_vllm"):
        assert reader.load({"request": [Page(0, key(1), 3)]}) == {"request"}
    assert not caplog.messages
    assert reader.moved.bad_files == 0


def test_a_folder_that_cannot_be_written_costs_one_warning(side, tmp_path, caplog):
    (tmp_path / "pages").write_text("no folder")
    writer, _, _ = side()
    with caplog.at_level(logging.WARNING, "vllm.xquant_vllm"):
        writer.save(PAGES)
    (line,) = caplog.messages
    assert "pages cannot be written to" in line
    assert writer.moved.written_files == 0


def test_reading_is_use(side):
    writer, _, folder = side()
    writer.save(PAGES)
    path = folder.path(0, key(1))
    os.utime(path, (1, 1))
    side(1)[0].load({"request": MOVED})
    assert path.stat().st_mtime > 1


def test_the_limit_holds(side):
    writer, _, folder = side(size=1000)
    writer.save([Page(1, key(number), number % BLOCKS) for number in range(30)])
    left = list(folder.folder.rglob("*.pages"))
    assert 0 < sum(path.stat().st_size for path in left) <= 1000
    assert folder.holds(1, key(29))


def test_the_log_says_what_was_moved(side, caplog):
    writer, _, _ = side()
    with caplog.at_level(logging.INFO, "vllm.xquant_vllm"):
        writer.say()
        assert not caplog.messages
        writer.save(PAGES)
        writer.say()
    assert caplog.messages[0].startswith("xquant: pages: 4 files (1,808 bytes) written in ")
