"""What the process does that calibrates for a server's first start."""

import dataclasses
import fcntl
import json
import subprocess
import sys
import threading
import time

import pytest

from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline import keep_factors as process
from xquant_vllm.offline import memory
from xquant_vllm.offline.calibration import samples
from xquant_vllm.offline.keep_factors import KeepRequest, keep_factors
from xquant_vllm.scheme.calibration.request import CalibrationRequest, is_whole
from xquant_vllm.scheme.factor_header import read_header


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model") / "model", "llama"))


@pytest.fixture
def asked(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    factors = CalibrationRequest(str(model), str(text), 2, "xquant", "head", "bfloat16")
    return KeepRequest(factors, tmp_path / "kept" / "folder")


def test_a_request_survives_the_command_line(asked):
    assert KeepRequest.from_json(asked.as_json()) == asked


def test_factors_are_calibrated_once(asked, monkeypatch):
    keep_factors(asked)
    assert is_whole(asked.folder)
    header = read_header(asked.folder)
    assert (header.calibration.text, header.settings.bits.key, header.dtype) == ("text.txt", 2, "bfloat16")
    # Nothing but the folder, and the lock.
    assert {path.name for path in asked.folder.parent.iterdir()} == {"folder", ".folder.lock"}
    monkeypatch.setattr(process, "_calibrate", None)
    keep_factors(asked)


def test_what_a_killed_process_left_is_used(asked, monkeypatch, capsys):
    whole, seen = samples._samples, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(samples, "_samples", interrupted)
    monkeypatch.setattr("xquant_vllm.offline.calibration.calibration_tokens._SEQUENCE", 300)
    with pytest.raises(KeyboardInterrupt):
        keep_factors(asked)
    assert not asked.folder.exists()
    keep_factors(asked)
    assert is_whole(asked.folder)
    assert "xquant: 1 sequence of 3 taken from" in capsys.readouterr().err


def test_who_comes_second_waits(asked, monkeypatch, capsys):
    asked.folder.parent.mkdir()
    calibrated = []
    monkeypatch.setattr(process, "_calibrate", lambda request, new, work: calibrated.append(new.mkdir()))
    with (asked.folder.parent / ".folder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=keep_factors, args=(asked,))
        thread.start()
        time.sleep(0.5)
        assert not calibrated
    thread.join(10)
    assert len(calibrated) == 1
    assert "another process is calibrating this model; waiting for it" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_if_that_is_asked_for(asked, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda _: 0)
    with pytest.raises(
        RefusedError, match=r"^xquant: calibrating model in float32 takes about .* but 0.0 GB are free$"
    ):
        keep_factors(asked)


def run(request, **options):
    command = [sys.executable, "-m", "xquant_vllm.offline.keep_factors", request.as_json()]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_the_process_answers_on_standard_output_and_tells_on_standard_error(asked):
    with run(asked) as child:
        said, answer = child.stderr.read(), child.stdout.read()
    assert json.loads(answer) == {}
    assert "xquant: loading model in float32 to calibrate on " in said
    assert "xquant: calibrate: sequence 1 of 1 done after" in said
    assert "xquant: factorize: layer 3 of 3 done after" in said
    missing = dataclasses.replace(asked.factors, model="/no/model")
    with run(KeepRequest(missing, asked.folder.with_name("other"))) as child:
        answer = child.stdout.read()
    assert json.loads(answer)["refused"].startswith("xquant: there is no folder '/no/model'")


def test_the_process_ends_with_its_server(asked):
    asked.folder.parent.mkdir()
    with (asked.folder.parent / ".folder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = run(asked)
        assert "waiting for it" in child.stderr.readline()
        child.stdin.close()
        assert child.wait(10) == 1
        child.stdout.close()
        child.stderr.close()
