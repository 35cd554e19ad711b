"""Registration: in this process, spawned, forked, twice, and with a vLLM that does not fit."""

import multiprocessing
import pickle
import subprocess
import sys

import pytest
from packaging.version import Version

from xquant_vllm.plugin.compat import SUPPORTED_VLLM, unsupported_reason
from xquant_vllm.plugin.entry_point import register
from xquant_vllm.plugin.registration import get_member


def _python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_registering_twice_changes_nothing():
    from vllm.platforms import current_platform

    register()
    check = type(current_platform).check_and_update_config
    member = get_member()
    register()
    assert get_member() is member
    assert type(current_platform).check_and_update_config == check


def test_the_entry_point_is_installed():
    from importlib.metadata import entry_points

    values = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "xquant"]
    assert values == ["xquant_vllm.plugin.entry_point:register"]


def test_the_package_and_the_plugin_import_neither_torch_nor_vllm():
    code = (
        "import sys, xquant_vllm, xquant_vllm.plugin.entry_point; print({'torch', 'vllm', 'triton'} & set(sys.modules))"
    )
    assert _python(code).strip() == "set()"


def test_registering_imports_no_triton_kernels_and_initializes_no_cuda():
    code = """
import sys, vllm, vllm.platforms
vllm.platforms.current_platform.device_type
before = set(sys.modules)
from xquant_vllm.plugin.entry_point import register
register()
import torch
assert not torch.cuda.is_initialized()
print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in ('triton', 'torch', 'xquant_vllm')))
"""
    loaded = _python(code).strip().splitlines()[-1]
    assert "triton" not in loaded
    assert "xquant_vllm.attention" not in loaded


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_the_member_survives_into_another_process(method):
    data = pickle.dumps({"backend": get_member()})
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_unpickled_backend, args=(data, queue))
    process.start()
    assert queue.get(timeout=120) == "XQUANT"
    process.join(timeout=60)


def _unpickled_backend(data: bytes, queue) -> None:
    queue.put(pickle.loads(data)["backend"].name)


def test_a_fresh_interpreter_unpickles_the_member_before_any_plugin():
    data = pickle.dumps(get_member())
    assert _python(f"import pickle; print(pickle.loads({data!r}).get_path())").strip().endswith("XQuantBackend")


def test_vllm_lists_the_backend_when_a_name_is_unknown():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    with pytest.raises(ValueError, match=r"Unknown attention backend: 'XQUANTT'.*XQUANT\b"):
        AttentionBackendEnum["XQUANTT"]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0rc1"])
def test_supported_versions(version):
    assert unsupported_reason(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_other_versions_are_refused_in_one_line(version):
    reason = unsupported_reason(version)
    assert reason is not None
    assert version in reason
    assert SUPPORTED_VLLM in reason
    assert "\n" not in reason


def test_an_unsupported_vllm_gets_no_backend_and_one_line():
    code = """
import logging, vllm
vllm.__version__ = "0.99.0"
from xquant_vllm.plugin import entry_point as plugin
records = []
plugin.logger.addHandler(logging.Handler()); plugin.logger.handle = lambda record: records.append(record.getMessage())
plugin.register()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print(len(records), "XQUANT" in AttentionBackendEnum.__members__, records[0])
"""
    line = _python(code).strip().splitlines()[-1]
    assert line.startswith("1 False xquant: not registered, because vLLM 0.99.0")


def test_the_installed_vllm_is_supported():
    import vllm

    assert unsupported_reason(vllm.__version__) is None, Version(vllm.__version__)
