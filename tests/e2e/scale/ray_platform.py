"""vLLM's platform of CPUs with devices that Ray can give out: as many as somebody says that there are GPUs.

Without them ``--distributed-executor-backend ray`` cannot be tried on a machine without GPUs. It is a plugin of vLLM,
which every process finds by the metadata that ``install`` writes.
"""

from pathlib import Path

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """Ray counts what it gives out by this name."""

    ray_device_key = "GPU"


def register() -> str:
    """What vLLM asks a platform plugin for."""
    return "ray_platform.RayCpuPlatform"


def install(folder: Path) -> Path:
    """Write the metadata of this plugin.

    Args:
        folder: to be named in ``PYTHONPATH``, beside this file's.

    Returns:
        ``folder``.
    """
    metadata = folder / "ray_platform-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-platform\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\nray = ray_platform:register\n")
    return folder
