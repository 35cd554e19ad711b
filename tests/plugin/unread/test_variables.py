"""Environment variables of this package: which are read, and what is said of others."""

import ast
import re

import pytest

from tests.docs.pages import ROOT
from xquant_vllm.attention import dispatch
from xquant_vllm.plugin.unread.variables import (
    READ,
    READ_ELSEWHERE,
    about_unread,
    about_variable,
    asked_by_variable,
    unread_variables,
)


def test_a_server_reads_what_is_listed():
    assert set(READ) == {dispatch.OVERRIDE_VARIABLE}


def test_every_variable_of_the_repository_is_listed():
    files = [
        ROOT / "setup.py",
        *(p for name in ("xquant_vllm", "tools", "examples", "benchmarks") for p in (ROOT / name).rglob("*.py")),
    ]
    files += [ROOT / "tests" / "conftest.py"]
    constants = {
        node.value
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {word for word in constants if re.fullmatch("XQUANT_[A-Z_]+[A-Z]", word)}
    assert named - {*READ, *READ_ELSEWHERE} == set()
    makefile = set(re.findall(r"\b(XQUANT_[A-Z_]+)=", (ROOT / "Makefile").read_text()))
    assert makefile - {*READ, *READ_ELSEWHERE} == set()


def test_others_are_named_and_their_values_are_not_told():
    environment = {"XQUANT_BITS": "secret", "VLLM_XQUANT_BITS": "2", "XQUANT_ATTENTION_KERNELS": "avx2", "PATH": "x"}
    assert unread_variables(environment) == ["VLLM_XQUANT_BITS", "XQUANT_BITS"]
    assert about_unread("XQUANT_BITS") == (
        "the environment variable XQUANT_BITS has no effect, because nothing reads it: settings are given by "
        "--additional-config; unset it"
    )
    assert "did you mean XQUANT_ATTENTION_KERNELS?" in about_unread("XQUANT_ATTENTION_KERNEL")


def test_what_the_installation_reads_is_passed_over():
    assert unread_variables(dict.fromkeys(READ_ELSEWHERE, "1")) == []


@pytest.mark.parametrize(("value", "asked"), [("XQUANT", "xquant"), ("xquant ", "xquant"), ("Kivi", "kivi")])
def test_the_variable_that_vllm_does_not_read(value, asked):
    assert asked_by_variable({"VLLM_ATTENTION_BACKEND": value}, ("XQUANT", "KIVI")) == asked
    assert about_variable(asked).endswith(f"set --attention-backend {asked}")


def test_the_variable_with_others_backends_is_not_ours_to_tell():
    assert asked_by_variable({"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}, ("XQUANT", "KIVI")) is None
    assert asked_by_variable({}, ("XQUANT", "KIVI")) is None


def test_vllm_does_not_read_it():
    from vllm import envs

    assert "VLLM_ATTENTION_BACKEND" not in envs.environment_variables
