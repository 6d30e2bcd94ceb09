"""tests/bench.py: what was interrupted goes on, and --gpu gets through its plan; no timing is checked."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bench
import pytest
from conftest import ROOT, forked

import apet

TINY = ["--shape", "t5-tiny", "--layers", "1", "--batch", "2", "--source", "8", "--device", "cpu", "--pairs", "2"]


def test_an_interrupted_table_goes_on_with_the_method_it_stopped_at(tmp_path, monkeypatch, capsys):
    argv = [*TINY, "--rounds", "2", "--budgets", "1e2,1e4", "--peers", "bitfit", "--name", str(tmp_path / "a")]
    original, done = bench.alternate, []

    def until(bound, row, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(row.tuned)
        return original(bound, row, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "alternate", until)
        with pytest.raises(KeyboardInterrupt):
            bench.main(argv)
    part = json.loads((tmp_path / "a.json").read_text())
    assert not part["complete"] and [row["tuned"] for row in part["rows"]] == [0, *done]
    bench.main(argv)
    whole = json.loads((tmp_path / "a.json").read_text())
    assert whole["complete"] and [r["pairs"] for r in whole["rows"]] == [12, 4, 4, 4]
    assert [r["write_ms"] for r in whole["rows"][1:3]] == [r["write_ms"] for r in part["rows"][1:3]]  # not measured again
    assert [r["method"] for r in whole["rows"]] == ["frozen bound", "APET 1e2 auto", "APET 1e4 auto", "BitFit"]
    said = capsys.readouterr().out.splitlines()
    assert (
        len(said) == 7
        and said[3].startswith("frozen bound")
        and said[-1].split()[:2] == ["BitFit", f"{whole['rows'][3]['tuned']:,}"]
    )


def test_what_does_not_fit_is_a_row_that_says_so_and_the_others_follow(tmp_path, monkeypatch, capsys):
    def full(model, k):
        raise bench.torch.OutOfMemoryError

    monkeypatch.setattr(bench, "mask_row", full)
    bench.main([*TINY, "--rounds", "1", "--budgets", "1e2", "--peers", "mask", "--name", str(tmp_path / "a")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows[2] == {"method": "dense mask 1e4", "tuned": 0, "error": "does not fit"} and rows[1]["pairs"] == 2
    assert "dense mask 1e4 does not fit" in capsys.readouterr().out


def test_gpu_goes_on_where_it_was_killed_and_leaves_nothing_running(tmp_path):
    line = [sys.executable, str(ROOT / "tests" / "bench.py"), "--gpu", str(tmp_path), "--only", "^t5-(large|base)$", *TINY]
    line += ["--budgets", "1e2", "--peers", "none"]
    fork, file = forked(line, {**os.environ, "OMP_NUM_THREADS": "1"}), tmp_path / "gpu.json"
    first = subprocess.Popen(line, preexec_fn=fork)
    while first.poll() is None and not file.exists():
        time.sleep(0.02)
    first.kill()
    first.wait()
    done = json.loads(file.read_text())
    assert list(done) == ["t5-large"] and done["t5-large"]["status"] == 0, done
    assert [row["tuned"] for row in done["t5-large"]["record"]["rows"]] == [0, 100] and done["t5-large"]["record"]["complete"]
    time.sleep(0.1)
    running = [f.read_bytes() for f in Path("/proc").glob("[0-9]*/cmdline") if os.access(f, os.R_OK)]
    assert not [r for r in running if str(tmp_path).encode() in r and b"--name" in r]
    assert subprocess.run(line, preexec_fn=fork, timeout=300).returncode == 0
    again = json.loads(file.read_text())
    assert list(again) == ["t5-large", "t5-base"] and again["t5-large"] == done["t5-large"] and again["t5-base"]["status"] == 0
    before = file.stat().st_mtime_ns
    assert subprocess.run(line, preexec_fn=fork, timeout=300).returncode == 0 and file.stat().st_mtime_ns == before
    assert [f.name for f in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_command_of_the_plan_is_valid(tmp_path, monkeypatch, device):
    plans, read = [], []
    monkeypatch.setattr(bench, "gpu", lambda args: plans.extend(bench.plan(args, tmp_path)))
    bench.main(["--gpu", str(tmp_path), "--device", device])
    monkeypatch.setattr(bench, "run", read.append)
    monkeypatch.setattr(bench, "paths_table", lambda *args: read.append(args))
    assert len({name for name, _, _ in plans}) == len(plans) > 10
    for name, seconds, command in plans:
        words = " ".join(map(str, command)).split()
        if str(bench.__file__) in words:
            bench.main(words[words.index(str(bench.__file__)) + 1 :])
            assert read.pop(), name
        elif str(ROOT / "apet.py") in words:
            argv = words[words.index(str(ROOT / "apet.py")) + 1 :]
            assert isinstance(apet.parser().parse_args(argv), argparse.Namespace) and ("cpu" in argv) == (device == "cpu")
        else:
            assert "pytest" in words and all((ROOT / w).exists() for w in words if w.endswith(".py"))
        assert 30 < seconds <= 200
