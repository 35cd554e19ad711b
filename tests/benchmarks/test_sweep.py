"""The sweep: what is left to do, and who does it."""

import sys
import threading

import pytest

from benchmarks import sweep
from benchmarks.files import read_json
from benchmarks.serving.points import PointError, missing, points

METHODS = ["16bit", "xquant"]


def test_only_what_is_missing_is_measured_again(tmp_path, capsys) -> None:
    chosen = points(["a/m1", "a/m2"], ["pressure"], METHODS, ["--quick"])
    assert missing(chosen, tmp_path) == chosen

    def machine(point: sweep.Point) -> dict:
        if point.model == "a/m2":
            raise RuntimeError("no memory")
        return {"rows": []}

    assert sweep.spread(chosen, [machine], tmp_path) == 1
    assert "m2 under pressure failed: no memory" in capsys.readouterr().err
    assert missing(chosen, tmp_path) == chosen[1:]
    assert [path.name for path in tmp_path.iterdir()] == ["m1--pressure--16bit+xquant.json"]
    assert read_json(chosen[0].file(tmp_path))["rows"] == []
    # The same folder on another machine.
    assert missing(points(["/elsewhere/m1"], ["pressure"], METHODS, ["--quick"]), tmp_path) == []
    with pytest.raises(PointError, match=r"other options \(--quick; now: none\); give another folder with --out"):
        missing(points(["a/m1"], ["pressure"], METHODS, []), tmp_path)


def test_models_with_one_name_are_refused() -> None:
    with pytest.raises(PointError, match="--models a/m and b/m have the same name"):
        points(["a/m", "b/m"], ["pressure"], METHODS, [])


def test_every_machine_takes_one_point_at_a_time(tmp_path) -> None:
    chosen = points([f"m{index}" for index in range(8)], ["pressure", "arrivals"], METHODS, [])
    together = threading.Barrier(2)
    most: dict[str, int] = {}

    def machine(name: str) -> sweep.Machine:
        lock = threading.Lock()

        def measure(point: sweep.Point) -> dict:
            assert lock.acquire(blocking=False), "two points at once"
            most[name] = most.get(name, 0) + 1
            together.wait(30)  # both machines are at work
            lock.release()
            return {"machine": name}

        return measure

    assert sweep.spread(chosen, [machine("a"), machine("b")], tmp_path) == 0
    assert most == {"a": 8, "b": 8}
    assert missing(chosen, tmp_path) == []


def test_without_ray_it_says_how_to_install_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # Python's way to say that a module is not there
    assert sweep.main(["--out", str(tmp_path)]) == 2
    assert "Ray is not installed; install it with: pip install 'xquant-vllm[bench]'" in capsys.readouterr().err


def test_a_wrong_option_ends_it_before_anything_runs(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--out", str(tmp_path), "--cache-mebibytes", "96"])
    assert "--cache-mebibytes" in capsys.readouterr().err
