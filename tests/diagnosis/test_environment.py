"""Variables are told by name, and none that may hold a secret."""

import json

from xquant_vllm.diagnosis.environment import NAMED, environment_facts


def test_variables_are_told_by_name():
    environment = {
        "XQUANT_ATTENTION_KERNELS": "avx2",
        "XQUANT_BITS": "hunter2",
        "HF_TOKEN": "hunter2",
        "CXX": "clang++",
    }
    found = environment_facts(environment)
    assert found == {"variables": {"XQUANT_ATTENTION_KERNELS": "avx2", "CXX": "clang++"}, "unread": ["XQUANT_BITS"]}
    assert "hunter2" not in json.dumps(found)


def test_no_variable_that_may_hold_a_secret_is_named():
    assert not [
        name for name in NAMED if any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASS", "AUTH", "URL"))
    ]
