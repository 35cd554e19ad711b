"""What `xquant serve` makes of the arguments for vLLM."""

import json

import pytest

from xquant_vllm.cli.serve_config import vllm_arguments
from xquant_vllm.errors import RefusedError

BACKEND = ["--attention-backend", "xquant"]


def test_unknown_options_are_passed_on_as_they_are():
    rest = [
        "--port",
        "8000",
        "-tp",
        "2",
        "--max-model-len=4096",
        "--no-enable-prefix-caching",
        "-O3",
        "--x",
        "--a.b",
        "1",
    ]
    assert vllm_arguments({}, rest) == ({}, [*BACKEND, *rest])


def test_settings_are_merged_into_the_users():
    mine = json.dumps({"mine": 1, "xquant": {"rotate": False}})
    settings, arguments = vllm_arguments({"bits": 2}, ["--port", "1", "--additional-config", mine, "-O0"])
    assert settings == {"rotate": False, "bits": 2}
    assert arguments[:3] == [*BACKEND, "--additional-config"]
    assert json.loads(arguments[3]) == {"mine": 1, "xquant": settings}
    assert arguments[4:] == ["--port", "1", "-O0"]


@pytest.mark.parametrize("form", [["--additional_config", "{}"], ["--additional-config={}"]])
def test_every_way_to_write_the_option_is_found(form):
    assert vllm_arguments({"bits": 4}, form)[1] == [*BACKEND, "--additional-config", '{"xquant": {"bits": 4}}']


def test_the_same_said_twice_is_no_conflict():
    mine = ["--additional-config", '{"xquant": {"bits": 2}}', "--attention-backend", "XQUANT"]
    assert vllm_arguments({"bits": 2}, mine)[0] == {"bits": 2}


@pytest.mark.parametrize(
    ("rest", "named"),
    [
        (["--additional-config", '{"xquant": {"bits": 4}}'], r"--bits says 2, but --additional-config has 'bits': 4;"),
        (["--additional-config", "{"], "--additional-config '{' is not JSON"),
        (["--additional-config", "[1]"], r"--additional-config '\[1\]' is not a table"),
        (["--additional-config", '{"xquant": 3}'], "has 'xquant': 3, which is not a table of settings"),
        (["--additional-config.xquant.rotate", "false"], "by parts cannot be merged.*give it as JSON"),
        (["--additional-config"], "--additional-config has no value"),
        (["--attention-backend", "FLASH_ATTN"], "--attention-backend FLASH_ATTN cannot work with xquant serve"),
    ],
)
def test_a_conflict_is_one_clear_line(rest, named):
    with pytest.raises(RefusedError, match=f"^xquant: .*{named}") as error:
        vllm_arguments({"bits": 2}, rest)
    assert "\n" not in str(error.value)
