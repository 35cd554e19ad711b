"""A virtual environment that has vLLM, and all that came with it, but not this package."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# The environment variables less those that would let this checkout in.
OUTSIDE = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "XQUANT"))}
_OURS = ("xquant", "__editable__", "__pycache__")


def make(environment: Path) -> Path:
    """Make the environment; returns its Python.

    What the tests' own environment has is linked into a folder on the new one's path, so nothing is installed twice.
    """
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    installed = Path(sysconfig.get_path("purelib"))
    site_packages = environment / installed.relative_to(sys.prefix)
    linked = environment / "linked-packages"
    linked.mkdir()
    own = {path.name for path in site_packages.iterdir()}
    for path in installed.iterdir():
        # Start-up files would bring this package's sources; pip and setuptools may come with the new environment.
        if path.suffix != ".pth" and not path.name.startswith(_OURS) and path.name not in own:
            (linked / path.name).symlink_to(path)
    (site_packages / "linked.pth").write_text(f"{linked}\n")
    for libnuma in installed.glob("xquant_libnuma.pth"):
        shutil.copy(libnuma, site_packages)
    command = environment / "bin" / "vllm"
    lines = (Path(sys.executable).parent / "vllm").read_text().splitlines(keepends=True)
    command.write_text("".join([f"#!{python}\n", *lines[1:]]))
    command.chmod(0o755)
    return python
