"""tools/release.py: what it refuses, and where the version is."""

import re
import zipfile
from pathlib import Path

import pytest
import release
import tomllib
from release import KERNELS, ReleaseError, check_tag, check_wheel, version

import xquant_vllm

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_in_one_place():
    assert version() == xquant_vllm.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "xquant_vllm.__version__"}


def test_the_tag_of_this_version_is_taken():
    check_tag(f"v{version()}")


@pytest.mark.parametrize("tag", ["0.0.1", "v0.0.1", f"{xquant_vllm.__version__}", f"v{xquant_vllm.__version__}.1"])
def test_another_tag_is_refused(tag):
    with pytest.raises(
        ReleaseError, match=rf"the tag {re.escape(tag)} is not v{re.escape(version())}.*make them agree"
    ):
        check_tag(tag)


def test_a_version_without_a_heading_in_the_changelog_is_refused(tmp_path):
    (tmp_path / "xquant_vllm").mkdir()
    (tmp_path / "xquant_vllm" / "__init__.py").write_text('__version__ = "7.8.9"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [7.8.8] - 2026-01-01\n")
    with pytest.raises(ReleaseError, match=r"no line '## \[7\.8\.9\] - YYYY-MM-DD'"):
        check_tag("v7.8.9", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [7.8.9] - 2026-01-02\n")
    check_tag("v7.8.9", tmp_path)


def _wheel(folder: Path, tag: str, *names: str) -> Path:
    path = folder / f"xquant_vllm-{version()}-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


def test_a_wheel_with_the_kernels_is_taken(tmp_path):
    check_wheel(_wheel(tmp_path, "manylinux_2_24_x86_64", "xquant_vllm/__init__.py", KERNELS))


@pytest.mark.parametrize(
    ("tag", "names", "problem"),
    [
        ("linux_x86_64", [KERNELS], "is no manylinux wheel"),
        ("any", [], "is no manylinux wheel"),
        ("manylinux_2_24_x86_64", ["xquant_vllm/__init__.py"], "but holds none"),
        # What auditwheel bundles is a second OpenMP runtime in the process.
        ("manylinux_2_24_x86_64", [KERNELS, "xquant_vllm.libs/libgomp-1.so.1.0.0"], "and no other library"),
    ],
)
def test_a_wheel_that_should_not_be_published_is_refused(tmp_path, tag, names, problem):
    with pytest.raises(ReleaseError, match=problem):
        check_wheel(_wheel(tmp_path, tag, *names))


def test_nothing_is_left_of_a_release_whose_step_fails(tmp_path, monkeypatch):
    def fail(*command: object, **_: str) -> None:
        raise ReleaseError("no")

    (tmp_path / "xquant_vllm-0.0.1.tar.gz").touch()
    monkeypatch.setattr(release, "run", fail)
    with pytest.raises(ReleaseError):
        release.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["xquant_vllm-0.0.1.tar.gz"]


def test_a_step_that_fails_is_named():
    with pytest.raises(ReleaseError, match="false failed with exit code 1"):
        release.run("false")
