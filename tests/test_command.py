"""The command line, run for real on the toy family: results, sweeps, interruption, wrong input, several processes."""

import contextlib
import csv
import errno
import functools
import importlib.metadata
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY, build, forked, ranks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import apet

SMALL = ["--model", "toy-tiny", "--steps", "6", "--train-size", "64", "--eval-size", "32", "--eval-every", "3", "--batch-size", "8"]


def run(*argv, out):
    assert apet.main([*SMALL, *map(str, argv), "--out", str(out)]) == 0


def results(out):
    return {f.stem: json.loads(f.read_text()) for f in sorted(out.glob("*.json"))}


def only(out):
    (result,) = results(out).values()
    return result


def command(*argv, **environment):
    return [sys.executable, str(ROOT / "apet.py"), *map(str, argv)], {**os.environ, "OMP_NUM_THREADS": "1", **environment}


def numbers(result):
    """What must not depend on when, where and beside what a run was made."""
    return {k: result[k] for k in ("score", "metrics", "loss_curve", "eval_curve", "best", "tuned_params", "lr")}


def test_a_run_writes_a_result_that_can_be_redone_and_a_delta_that_gives_its_score(tmp_path):
    run("--budget", "1e3", out=tmp_path / "a")
    first = only(tmp_path / "a")
    total = sum(t.numel() for t in load_file(TOY / "models/tiny/model.safetensors").values())
    assert first["tuned_params"] == 1000 and first["total_params"] == total and first["head_params"] == 0
    assert first["baselines"]["random_guess"] == 0.5 and 0 <= first["score"] <= 1 and first["metric"] == "accuracy"
    assert len(first["loss_curve"]) == 6 and [e["step"] for e in first["eval_curve"]] == [0, 3, 6]
    assert first["best"]["score"] == max(e["accuracy"] for e in first["eval_curve"])
    assert first["data"]["select"] == "validation" and first["data"]["report"] == "test"
    assert first["apet_sha256"] == __import__("hashlib").sha256((ROOT / "apet.py").read_bytes()).hexdigest()
    assert (
        first["versions"]["torch"] == importlib.metadata.version("torch")
        and first["step_ms"] > 0
        and first["peak_memory_bytes"] > 1e7
    )
    redo = [x for k in ("model", "task", "method", "budget", "mask", "mask_seed", "seed", "lr", "steps", "batch_size", "train_size",
                        "eval_size", "eval_every") for x in (f"--{k.replace('_', '-')}", str(first["arguments"][k]))]  # fmt: skip
    assert apet.main([*redo, "--out", str(tmp_path / "b")]) == 0
    assert numbers(only(tmp_path / "b")) == numbers(first)
    run("--load", first["delta"], out=tmp_path / "c")
    loaded = only(tmp_path / "c")
    assert loaded["score"] == first["score"] and loaded["tuned_params"] == 1000 and loaded["loss_curve"] == []


def test_another_delta_under_the_same_name_is_evaluated_anew(tmp_path):
    file = tmp_path / "my.safetensors"
    for budget, count in (("10", 1), ("20", 2)):
        run("--budget", budget, "--save", file, out=tmp_path / "runs")
        run("--load", file, out=tmp_path / "loaded")
        assert len(results(tmp_path / "loaded")) == count
    assert {r["tuned_params"] for r in results(tmp_path / "loaded").values()} == {10, 20}


def test_a_saved_delta_knows_its_model_and_task(tmp_path):
    run("--budget", "50", "--task", "toy-paraphrase", out=tmp_path / "a")
    assert apet.main(["--load", only(tmp_path / "a")["delta"], "--eval-size", "32", "--out", str(tmp_path / "b")]) == 0
    loaded = only(tmp_path / "b")
    assert loaded["score"] == only(tmp_path / "a")["score"]
    assert (loaded["arguments"]["model"], loaded["arguments"]["task"]) == ("toy-tiny", "toy-paraphrase")


def test_a_saved_delta_knows_its_columns_and_lengths(tmp_path):
    rows = [{"title": f"title {i}", "body": f"body {i}", "stars": i % 2, "label": "xy"[i // 2 % 2]} for i in range(100)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--task", tmp_path / "data.jsonl", "--text-fields", "body", "--label-field", "stars", "--max-source-length", "20"]
    run("--budget", "50", *argv, out=tmp_path / "a")
    trained = only(tmp_path / "a")
    assert apet.main(["--load", trained["delta"], "--eval-size", "32", "--out", str(tmp_path / "b")]) == 0
    loaded = only(tmp_path / "b")
    assert (loaded["labels"], loaded["score"]) == (trained["labels"], trained["score"]) and loaded["labels"] == ["0", "1"]
    names = ("text_fields", "label_field", "max_source_length", "max_target_length")
    assert [loaded["arguments"][n] for n in names] == [trained["arguments"][n] for n in names] == ["body", "stars", 20, 128]


def test_weights_that_a_checkpoint_lacks_are_the_same_in_every_run_and_are_named(tmp_path, capsys):
    whole = build("bert")
    weights = {n: w for n, w in whole.state_dict().items() if "pooler" not in n and "classifier" not in n}
    whole.save_pretrained(tmp_path / "model", state_dict=weights)
    shutil.copy(TOY / "models/tiny/tokenizer.json", tmp_path / "model")
    shutil.copy(TOY / "models/tiny/tokenizer_config.json", tmp_path / "model")
    args = apet.check_args(
        apet.parser().parse_args(["--model", str(tmp_path / "model"), "--method", "none", "--max-source-length", "32"])
    )
    poolers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, _, facts = apet.load_model(args, ("a", "b"))
        poolers.append(model.bert.pooler.dense.weight)
        assert "lacks bert.pooler.dense.bias, bert.pooler.dense.weight" in capsys.readouterr().err
    assert torch.equal(*poolers) and facts["randomly initialized, as the checkpoint lacks them"] == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight",
    ]  # fmt: skip


def test_other_data_or_weights_in_the_same_place_are_another_run(tmp_path):
    shutil.copytree(TOY / "models/tiny", tmp_path / "model")
    argv = ["--model", tmp_path / "model", "--task", tmp_path / "data.csv", "--budget", "10", "--dropout", "0"]
    for number, changed in enumerate(("nothing", "data", "model"), 1):
        if changed != "model":
            rows = [f"word {i} {changed},{('bad', 'good')[i % 2]}\n" for i in range(80)]
            (tmp_path / "data.csv").write_text("text,label\n" + "".join(rows))
        else:
            weights = load_file(tmp_path / "model/model.safetensors")
            save_file({n: w + 0.5 for n, w in weights.items()}, tmp_path / "model/model.safetensors", {"format": "pt"})
        run(*argv, out=tmp_path / "out")
        assert len(results(tmp_path / "out")) == number
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert len({tuple(r["loss_curve"]) for r in results(tmp_path / "out").values()}) == 3
    run(*argv, out=tmp_path / "out")
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("lost", ["deleted", "cut", "another run's"])
def test_a_result_whose_delta_is_lost_is_run_anew(tmp_path, capsys, lost):
    file = tmp_path / "my.safetensors"
    argv = ["--budget", "50", "--save", file]
    run(*argv, out=tmp_path / "a")
    first = file.read_bytes()
    if lost == "deleted":
        file.unlink()
    elif lost == "cut":
        file.write_bytes(first[:100])
    else:
        run("--budget", "60", "--save", file, out=tmp_path / "a")
    capsys.readouterr()
    run(*argv, out=tmp_path / "a")
    assert "is not there; it runs anew" in capsys.readouterr().err and file.read_bytes() == first
    run(*argv, out=tmp_path / "a")
    assert "loading" not in capsys.readouterr().err


def test_results_in_a_folder_that_was_moved_are_done(tmp_path, capsys):
    run("--budget", "50", out=tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    capsys.readouterr()
    run("--budget", "50", out=tmp_path / "b")
    assert "loading" not in capsys.readouterr().err


def test_a_file_asked_for_afterwards_is_written(tmp_path):
    run("--budget", "50", out=tmp_path / "a")
    run("--budget", "50", "--save", tmp_path / "later.safetensors", "--export", tmp_path / "model", out=tmp_path / "a")
    assert (tmp_path / "later.safetensors").exists() and (tmp_path / "model/config.json").exists()


def test_rows_without_a_label_are_no_class(tmp_path):
    rows = [{"text": f"text {i}", "label": (0, 1, -1)[i % 3]} for i in range(90)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.csv").write_text("\ufefftext,label\n" + "".join(f"{r['text']},{('no', 'yes', '')[r['label']]}\n" for r in rows))
    for name, words in (("a.jsonl", ["0", "1"]), ("b.csv", ["no", "yes"])):
        run("--task", tmp_path / name, "--budget", "10", out=tmp_path / name.replace(".", "-"))
        result = only(tmp_path / name.replace(".", "-"))
        assert result["labels"] == words and result["baselines"]["random_guess"] == 0.5
        assert result["data"]["rows without text or label, dropped"] == {"train": 30}


@pytest.mark.parametrize("method", ["apet", "full"])
def test_the_exported_checkpoint_is_a_plain_hugging_face_model_with_the_same_score(tmp_path, method):
    argv = ["--method", method, "--budget", "1e4", "--lr", "0.03", "--eval-size", "200"]
    run(*argv, "--export", tmp_path / "model", "--save", tmp_path / "my.safetensors", out=tmp_path / "a")
    assert (tmp_path / "my.safetensors").exists()
    run("--model", tmp_path / "model", "--method", "none", "--eval-size", "200", out=tmp_path / "b")
    assert only(tmp_path / "b")["score"] == only(tmp_path / "a")["score"]
    assert only(tmp_path / "b")["tuned_params"] == 0
    tensors = [set(load_file(folder / "model.safetensors")) for folder in (tmp_path / "model", TOY / "models/tiny")]
    assert tensors[0] == tensors[1]


def test_a_run_of_a_sweep_has_the_numbers_it_has_alone(tmp_path, capsys):
    sweep = ["--method", "full,apet,none", "--budget", "1e2,1e3", "--mask-seed", "0,1", "--lr", "auto,0.02"]
    run(*sweep, out=tmp_path / "sweep")
    swept = results(tmp_path / "sweep")
    assert len(swept) == 2 + 8 + 1  # lr; budget x seed x lr; nothing
    assert len([line for line in capsys.readouterr().out.splitlines() if re.match(r"(full|apet|none) ", line)]) == 11
    alone = tmp_path / "alone"
    run("--budget", "1e3", "--mask-seed", "1", "--lr", "0.02", out=alone)
    run("--method", "full", out=alone)
    run("--method", "none", out=alone)
    for name, result in results(alone).items():
        assert numbers(result) == numbers(swept[name])
    tuned = load_file(swept[next(n for n in results(alone) if "apet" in n)]["delta"])
    assert all(torch.equal(t, tuned[n]) for n, t in load_file(next(alone.glob("*.safetensors"))).items())


def test_finished_runs_are_not_run_again_unless_asked(tmp_path):
    run("--budget", "100", out=tmp_path)
    (file,) = tmp_path.glob("*.json")
    first = file.stat().st_mtime_ns
    run("--budget", "100,200", out=tmp_path)
    assert file.stat().st_mtime_ns == first and len(list(tmp_path.glob("*.json"))) == 2
    run("--budget", "100", "--no-resume", out=tmp_path)
    assert file.stat().st_mtime_ns > first


@pytest.mark.parametrize(
    "method, how",
    [
        ("apet", signal.SIGTERM),
        ("apet", signal.SIGKILL),
        ("apet", signal.SIGHUP),
        ("full", signal.SIGTERM),
        ("full", signal.SIGKILL),
    ],
)
def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, method, how):
    argv = ["--model", "toy-tiny", "--method", method, "--budget", "1e3", "--steps", "60", "--train-size", "200",
            "--eval-size", "40", "--eval-every", "5", "--batch-size", "8", "--dropout", "0.1"]  # fmt: skip
    line, environment = command(*argv, "--out", tmp_path / "a")
    fork = None if (method, how) == ("apet", signal.SIGTERM) else forked(line, environment)  # one case by new processes
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=fork)
    states = tmp_path / "a"
    while process.poll() is None and not list(states.glob("*.state")):
        time.sleep(0.02)
    process.send_signal(how)
    error = process.communicate()[1]
    assert process.returncode == -how, error
    assert not list(states.glob("*.json")) and len(list(states.glob("*.state"))) == 1
    again = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, preexec_fn=fork)
    assert "continuing at step" in again.stderr
    assert apet.main([*argv, "--out", str(tmp_path / "b")]) == 0
    assert numbers(only(tmp_path / "a")) == numbers(only(tmp_path / "b"))
    if method == "apet":
        a, b = (load_file(next((tmp_path / x).glob("*.safetensors"))) for x in "ab")
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert not list(states.glob("*.state")) and not list(states.glob(".*"))


def test_twenty_kills_at_random_moments_lose_nothing_and_break_nothing(tmp_path):
    """Each attempt is a fork of this process, which has imported everything; writing is slow, so that kills meet it often."""
    sweep = [*SMALL, "--budget", "1e2,1e3", "--mask-seed", "0,1", "--eval-every", "1", "--out"]
    assert apet.main([*sweep, str(tmp_path / "whole")]) == 0
    out, moments, finished, met = tmp_path / "killed", random.Random(0), {}, 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            os.fsync = lambda fd: time.sleep(0.1)
            apet.main([*sweep, str(out)])
            os._exit(0)
        time.sleep(moments.uniform(0.02, 1.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        met += bool(list(out.glob("*.tmp")))
        for file in out.glob("*.json"):
            assert numbers(json.loads(file.read_text())) == numbers(results(tmp_path / "whole")[file.stem])
            assert finished.setdefault(file, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
        assert all(f.exists() for f in finished)
        assert all(load_file(file) for file in out.glob("*.safetensors"))
        assert all(torch.load(file, weights_only=True) for file in out.glob("*.state"))
    assert met > 3, "too few kills met a write"
    assert apet.main([*sweep, str(out)]) == 0
    assert {n: numbers(r) for n, r in results(out).items()} == {n: numbers(r) for n, r in results(tmp_path / "whole").items()}
    for name in results(out):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (out, tmp_path / "whole"))
        assert all(torch.equal(a[n], b[n]) for n in b)
    assert {f.suffix for f in out.iterdir()} - {".tmp"} == {".json", ".safetensors"}  # no state; what a kill cut off can be told


def test_two_processes_in_one_folder_do_not_disturb_each_other(tmp_path):
    sweep = [*SMALL, "--budget", "1e2,1e3", "--mask-seed", "0,1", "--eval-every", "1", "--out"]
    assert apet.main([*sweep, str(tmp_path / "alone")]) == 0
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(apet.main([*sweep, str(tmp_path / "both")]))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert {n: numbers(r) for n, r in results(tmp_path / "both").items()} == {
        n: numbers(r) for n, r in results(tmp_path / "alone").items()
    }
    assert {f.suffix for f in (tmp_path / "both").iterdir()} == {".json", ".safetensors"}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert apet.main([*SMALL, "--budget", "100", "--eval-every", "6", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("No space left on device")
    assert not list(tmp_path.iterdir())


def torchrun(processes, *argv):
    line, environment = command(*argv)
    line[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return line, environment


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_as_one_with_the_same_global_batch(tmp_path, processes):
    argv = [*SMALL, "--budget", "1e3", "--grad-accum", "2", "--batch-size", "7"]  # ragged: 7 over 2 or 3 ranks of 2 micro-batches
    run(*argv, out=tmp_path / "one")
    if processes == 2:
        line, environment = torchrun(processes, *argv, "--out", tmp_path / "two")
        subprocess.run(line, env=environment, capture_output=True, check=True)
    else:  # as torchrun does, but by forks
        line, ranks = command(*argv, "--out", tmp_path / "two")[0], ranks_of(processes)
        children = [subprocess.Popen(line, preexec_fn=forked(line, e), stdout=subprocess.DEVNULL) for e in ranks]
        assert [child.wait(120) for child in children] == [0] * processes
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    assert two["processes"] == processes
    assert two["loss_curve"] == pytest.approx(one["loss_curve"], rel=1e-4) and two["score"] == pytest.approx(one["score"], abs=0.04)
    a, b = (load_file(next((tmp_path / x).glob("*.safetensors"))) for x in ("one", "two"))
    assert torch.equal(a["indices"], b["indices"])
    # Adam divides by a gradient's own size: the few whose gradient is rounding noise may step either way
    assert (a["values"] - b["values"]).abs().gt(1e-4).float().mean() < 0.02


def test_a_signal_to_one_of_several_processes_ends_all_and_they_continue(tmp_path):
    argv = [*SMALL, "--budget", "1e3", "--steps", "40", "--eval-every", "5"]
    run(*argv, out=tmp_path / "one")
    line, environment = torchrun(2, *argv, "--out", tmp_path / "two")
    first = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not list(tmp_path.glob("two/*.state")):
        time.sleep(0.01)
    ranks = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    assert first.wait(60) != 0 and not list(tmp_path.glob("two/*.json"))
    (state,) = tmp_path.glob("two/*.state")
    step = torch.load(state, weights_only=True)["record"]["step"]
    again = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert again.stderr.count(f"continuing at step {step}") == 1
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    assert two["loss_curve"] == pytest.approx(one["loss_curve"], rel=1e-2)  # one process adds in another order
    assert [e["step"] for e in two["eval_curve"]] == [e["step"] for e in one["eval_curve"]]


def interrupt(monkeypatch, step, *argv, out):
    """The command, interrupted before a step."""
    original = apet.train_step

    def until(run, tuned, optimizer, record):
        if record["step"] == step:
            raise KeyboardInterrupt
        return original(run, tuned, optimizer, record)

    with monkeypatch.context() as patch:
        patch.setattr(apet, "train_step", until)
        assert apet.main([*SMALL, *map(str, argv), "--out", str(out)]) == 130
    (state,) = out.glob("*.state")
    return state


def test_the_state_is_saved_between_evaluations_too(tmp_path, monkeypatch):
    """Once a minute: here, a minute is a step."""
    clock = iter(range(0, 100_000, 61))
    monkeypatch.setattr(apet.time, "monotonic", lambda: next(clock))
    file = interrupt(monkeypatch, 1, "--budget", "100", out=tmp_path)
    assert torch.load(file, weights_only=True)["record"]["step"] == 1


def test_processes_need_not_share_a_folder_rank_0_reads_and_writes_for_all(tmp_path, monkeypatch):
    run("--budget", "100", out=tmp_path / "0" / "here")
    interrupt(monkeypatch, 3, "--budget", "200", out=tmp_path / "0" / "here")
    run("--budget", "200", out=tmp_path / "one")
    (tmp_path / "1").mkdir()
    script = tmp_path / "on_its_own_disk.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import apet; os.chdir(os.environ['RANK']); sys.exit(apet.main())"
    )
    line, environment = torchrun(2, *SMALL, "--budget", "100,200", "--out", "here")
    line[line.index(str(ROOT / "apet.py"))] = str(script)
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("continuing at step 3") == 1, done.stderr
    assert "[1/2]" not in done.stderr and not list((tmp_path / "1").iterdir())
    (one,), two = results(tmp_path / "one").values(), results(tmp_path / "0/here")
    assert {r["tuned_params"]: r["processes"] for r in two.values()} == {100: 1, 200: 2}
    again = next(r for r in two.values() if r["processes"] == 2)
    assert again["loss_curve"] == pytest.approx(one["loss_curve"], rel=1e-3)


def test_a_process_that_dies_ends_the_others_with_an_error(tmp_path):
    argv = [
        "--model",
        "toy-tiny",
        "--budget",
        "100",
        "--steps",
        "100000",
        "--eval-every",
        "5",
        "--train-size",
        "64",
        "--eval-size",
        "8",
    ]
    line, environment = torchrun(2, *argv, "--out", tmp_path)
    run = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not list(tmp_path.glob("*.state")):
        time.sleep(0.05)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert run.wait(60) != 0 and "Signal 9 (SIGKILL)" in run.stderr.read()
    assert not list(tmp_path.glob("*.json")) and not any(Path(f"/proc/{r}").exists() for r in ranks)


@pytest.mark.parametrize("task", ["inference", "paraphrase", "qa", "summary"])
def test_every_kind_of_task_trains_and_is_scored(tmp_path, task):
    if task == "summary":
        pytest.importorskip("rouge_score")
    run("--task", f"toy-{task}", "--max-target-length", "24", out=tmp_path)
    result = only(tmp_path)
    wanted = {
        "inference": ["accuracy"],
        "paraphrase": ["accuracy", "f1"],
        "qa": ["f1", "exact"],
        "summary": ["rougeL", "rouge1", "rouge2"],
    }
    assert list(result["metrics"]) == wanted[task] and result["loss_curve"][-1] < result["loss_curve"][0]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_a_local_file_of_each_type_is_read_alike(tmp_path, kind):
    rows = [json.loads(line) for line in (TOY / "tasks/sentiment/train.jsonl").read_text().splitlines()[:80]]
    rows = [{"idx": i, "text": r["text"], "label": r["label"]} for i, r in enumerate(rows)]
    file = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    run("--task", file, "--budget", "100", out=tmp_path / "out")
    result = only(tmp_path / "out")
    assert (
        result["labels"] == ["negative", "positive"] and result["data"]["select"] == result["data"]["report"] == "held out of train"
    )
    # 80 rows: 8 are held out for the report, then 7 of the 72 left to pick the best step
    assert result["data"]["sizes"] == {"train": 64, "select": 7, "report": 8}
    data = apet.load_task(apet.check_args(apet.parser().parse_args(["--task", str(file)])))
    parts = [{e.source for e in part} for part in (data.train, data.select, data.report)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_rows_with_an_empty_field_are_dropped_and_counted(tmp_path):
    lines = [{"a": f"text {i}", "b": "more", "y": i % 2} for i in range(40)]
    lines[3]["a"], lines[4]["y"] = None, None
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    args = apet.parser().parse_args(["--task", str(tmp_path / "d.jsonl"), "--text-fields", "a,b", "--label-field", "y"])
    data = apet.load_task(apet.check_args(args))
    assert data.about["rows without text or label, dropped"] == {"train": 2} and data.words == ("0", "1")
    assert sum(data.about["sizes"].values()) == 38 and data.train[0].source.startswith("a: text ")


def example(text):
    return apet.Example((text,), text, "", -1, ())


def test_label_scores_are_the_sum_of_token_log_likelihoods_whatever_the_padding():
    """Against one forward a label and example, the tokens' log-probabilities picked out by hand."""
    args = apet.check_args(apet.parser().parse_args(["--model", "toy-tiny"]))
    model, tokenizer, _ = apet.load_model(args, ("a", "b"))
    model.eval()
    coder = apet.Coder(tokenizer, "seq2seq", 128, 16)
    texts = ["the food was good.", "ben said that the room was not bad but eva never came back. the end", "no"]
    words = ("negative", "not_equivalent", "a longer label of words")
    sources = [coder.source(example(t)) for t in texts]
    batched = apet.label_scores(model, coder, sources, words, "cpu")
    for i, source in enumerate(sources):
        assert tokenizer.decode(source, skip_special_tokens=True) == f"Input: {texts[i]} Output:"
        for j, word in enumerate(words):
            target = tokenizer(word).input_ids
            assert target[-1] == tokenizer.eos_token_id
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0, *target[:-1]]])).logits[0]
            by_hand = sum(logits[t].log_softmax(-1)[token].item() for t, token in enumerate(target))
            assert batched[i, j].item() == pytest.approx(by_hand, abs=1e-3)


def test_batched_and_single_evaluation_agree():
    args = apet.check_args(apet.parser().parse_args(["--model", "toy-base", "--task", "toy-qa", "--eval-size", "24"]))
    model, tokenizer, _ = apet.load_model(args, ("a", "b"))
    coder = apet.Coder(tokenizer, "seq2seq", 128, 12)
    for task in ("toy-qa", "toy-inference"):
        args.task = task
        data = apet.load_task(args)
        assert apet.predict(model, coder, data, data.report, 16, "cpu") == apet.predict(model, coder, data, data.report, 1, "cpu")


def test_metrics_equal_cases_worked_by_hand():
    examples = [apet.Example((), "", "", label, ()) for label in (1, 1, 0, 0)]
    assert apet.measure("f1", [1, 0, 1, 0], examples) == {"accuracy": 0.5, "f1": 0.5}  # precision and recall are 1/2
    assert apet.measure("f1", [0, 0, 0, 0], examples) == {"accuracy": 0.5, "f1": 0.0}
    answers = [apet.Example((), "", "", -1, ("the Denver Broncos", "Broncos")), apet.Example((), "", "", -1, ("1987",))]
    scores = apet.measure("squad", ["The Carolina Broncos!", "in 1987"], answers)
    assert scores == {"f1": pytest.approx((2 / 3 + 2 / 3) / 2), "exact": 0.0}
    assert apet.measure("squad", ["the broncos", "1987."], answers) == {"f1": 1.0, "exact": 1.0}


def test_rouge_equals_its_packages_documented_example():
    pytest.importorskip("rouge_score")
    # rouge-score's own documentation: 'The quick brown fox jumps over the lazy dog' / 'The quick brown dog jumps on the log.'
    e = [apet.Example((), "", "", -1, ("The quick brown fox jumps over the lazy dog",))]
    scores = apet.measure("rouge", ["The quick brown dog jumps on the log."], e)
    assert scores["rouge1"] == pytest.approx(2 * (6 / 8) * (6 / 9) / (6 / 8 + 6 / 9))
    assert scores["rougeL"] == pytest.approx(2 * (5 / 8) * (5 / 9) / (5 / 8 + 5 / 9))  # the quick brown jumps the


def test_a_long_source_is_cut_in_its_text_not_in_its_ending():
    args = apet.check_args(apet.parser().parse_args(["--model", "toy-tiny"]))
    _, tokenizer, _ = apet.load_model(args, ("a", "b"))
    ids = apet.Coder(tokenizer, "seq2seq", 16, 8).source(example("the food was good. " * 50))
    assert len(ids) <= 16
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith("Input: the food") and text.endswith("Output:") and ids[-1] == tokenizer.eos_token_id


def test_batches_cover_every_example_once_an_epoch():
    seen = [i for step in range(10) for i in apet.batch_at(step, 7, 35, seed=1)]
    assert sorted(seen[:35]) == sorted(seen[35:]) == list(range(35)) and seen[:35] != seen[35:]
    assert apet.batch_at(3, 7, 35, seed=2) != apet.batch_at(3, 7, 35, seed=1)


def test_full_fine_tuning_of_half_precision_weights_keeps_fp32_copies():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    undo = contextlib.ExitStack()
    masters, write = apet.tune_whole(dict(model.named_parameters()), undo)
    optimizer = torch.optim.SGD(masters.values(), lr=1e-4)
    for _ in range(100):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        write()
    assert masters["weight"].item() == pytest.approx(0.99, abs=1e-5) and model.weight.item() < 1
    undo.close()
    assert model.weight.item() == 1.0 and model.weight.grad is None


WRONG = {
    "method": (["--method", "lorra"], "unknown method 'lorra'"),
    "mask": (["--mask", "rnd"], "unknown mask 'rnd': did you mean 'random'"),
    "where": (["--where", "atention"], "names no parameter"),
    "task": (["--task", "toy-sentimant"], "did you mean 'toy-sentiment'"),
    "model": (["--model", "toy-tinny"], "did you mean 'toy-tiny'"),
    "model path": (["--model", "../nothing/here"], "unknown model"),
    "model cache": (["--model", "some-one/some-thing"], "can't be reached (work offline with local files"),
    "budget 0": (["--budget", "0"], "whole number from 1"),
    "budget -1": (["--budget=-1"], "whole number from 1"),
    "budget word": (["--budget", "many"], "must be a number such as"),
    "budget large": (["--budget", "1e9"], "above the"),
    "second budget": (["--budget", "1e2,1e9"], "above the"),
    "budget list": (["--budget", "1e2,,1e3"], "'' is empty"),
    "lr": (["--lr", "0"], "--lr: it must be a number from 1e-12"),
    "lr word": (["--lr", "fast"], "--lr: it must be a number from 1e-12"),
    "seed": (["--seed", "-1"], "it must be a whole number from 0"),
    "seed word": (["--seed", "x"], "it must be a whole number from 0 to 1,000,000,000"),
    "steps": (["--steps", "0"], "--steps: it must be a whole number from 1"),
    "steps half": (["--steps", "1.5"], "--steps: it must be a whole number from 1"),
    "batch": (["--batch-size", "none"], "--batch-size: it must be a whole number from 1"),
    "dropout": (["--dropout", "1.5"], "--dropout: it must be"),
    "device": (["--device", "cuda:77"], "can't be used"),
    "device word": (["--device", "gpu"], "can't be used"),
    "device kind": (["--device", "meta"], "can't be used: cpu, cuda and cuda:1 can"),
    "export nowhere": (["--export", "{tmp}/text.jsonl/model"], "Not a directory: '{tmp}/text.jsonl/model'"),
    "export bitfit": (["--method", "bitfit", "--export", "{tmp}/model"], "no place for bitfit"),
    "flag": (["--bugdet", "3"], "unrecognized arguments: --bugdet 3"),
    "save": (["--budget", "1,2", "--save", "x"], "want one run, not a sweep of 2"),
    "read-only out": (["--out", "/proc/self"], "can't write /proc/self/"),
    "read-only save": (["--save", "/proc/self/delta"], "can't write /proc/self/"),
    "load": (["--load", "{tmp}/none.safetensors"], "there is no file"),
    "load text": (["--load", "{tmp}/text.jsonl"], "is not a safetensors file"),
    "load other": (["--load", str(TOY / "models/tiny/model.safetensors")], "is no delta of apet.py"),
    "column": (["--task", "{tmp}/text.jsonl", "--text-fields", "sentence"], "no column 'sentence'; there are text, label"),
    "label column": (["--task", "{tmp}/text.jsonl", "--label-field", "y"], "no column 'y'"),
    "empty": (["--task", "{tmp}/empty.jsonl"], "it must hold rows"),
    "broken": (["--task", "{tmp}/broken.jsonl"], "can't read"),
    "array": (["--task", "{tmp}/array.jsonl"], "named columns"),
    "encoding": (["--task", "{tmp}/latin.jsonl"], "can't read"),
    "type": (["--task", "{tmp}/text.pdf"], "must be a file of type"),
    "folder": (["--task", "{tmp}/folder"], "or a folder with train, validation and test"),
    "few": (["--task", "{tmp}/few.jsonl"], "too few to hold some out"),
    "foreign label": (["--task", "{tmp}/foreign"], "row 1: the label 'sad' is none of bad, good"),
    "budget empty": (["--budget", ""], "--budget: '' is empty"),
    "budget nan": (["--budget", "nan"], "whole number from 1"),
    "budget infinite": (["--budget", "1e400"], "whole number from 1"),
    "budget fraction": (["--budget", "1e-3"], "whole number from 1"),
    "budget 0%": (["--budget", "0%"], "above 0% and at most 100%"),
    "budget 200%": (["--budget", "200%"], "above 0% and at most 100%"),
    "budget share": (["--budget", "0.000001%"], "whole number from 1"),
    "budget method": (["--budget", "full"], "must be a number such as"),
    "budget space": (["--budget", "1 000"], "must be a number such as"),
    "where regex": (["--where", "("], "no regular expression"),
    "where empty": (["--where", ""], "--where: '' is empty"),
    "where layers": (["--where", "layers:77"], "names no parameter"),
    "insert": (["--insert", "full"], "unknown method to insert 'full'"),
    "lr nan": (["--lr", "nan"], "--lr: it must be a number from 1e-12"),
    "seed list": (["--mask-seed", "0,,1"], "--mask-seed: it must be a whole number from 0 to 1,000,000,000, not ''"),
    "seed large": (["--seed", "1e12"], "it must be a whole number from 0 to 1,000,000,000"),
    "evaluation": (["--eval-every", "0"], "--eval-every: it must be a whole number from 1"),
    "train size": (["--train-size", "0"], "--train-size: it must be a whole number from 1"),
    "eval size": (["--eval-size", "many"], "--eval-size: it must be a whole number from 1"),
    "source length": (["--max-source-length", "4"], "--max-source-length: it must be a whole number from 8"),
    "target length": (["--max-target-length", "1"], "--max-target-length: it must be a whole number from 2"),
    "dtype": (["--dtype", "int8"], "invalid choice: 'int8'"),
    "device map": (["--device-map", "nonsense"], "found nonsense"),
    "argument": (["more"], "unrecognized arguments: more"),
    "task empty": (["--task", ""], "--task: '' is empty"),
    "task gone": (["--task", "{tmp}/gone.jsonl"], "unknown task"),
    "task trick": (["--task", "toy-sentiment/../../x"], "unknown task"),
    "model empty": (["--model", ""], "--model: '' is empty"),
    "model file": (["--model", "{tmp}/text.jsonl"], "unknown model"),
    "model folder": (["--model", "{tmp}/folder"], "can't load the model"),
    "model pickle": (["--model", "{tmp}/pickled"], "can't load the model"),
    "model cut": (["--model", "{tmp}/cut"], "can't load the model"),
    "load folder": (["--load", "{tmp}"], "there is no file"),
    "load pickle": (["--load", "{tmp}/pickled/pytorch_model.bin"], "is not a safetensors file"),
    "nested": (["--task", "{tmp}/nested.jsonl"], "can't read"),
    "digits": (["--task", "{tmp}/digits.jsonl"], "can't read"),
    "zeros": (["--task", "{tmp}/zeros.jsonl"], "can't read"),
    "utf-16": (["--task", "{tmp}/utf16.jsonl"], "can't read"),
    "parquet": (["--task", "{tmp}/text.parquet"], "can't read"),
    "no header": (["--task", "{tmp}/headless.csv"], "has no column 'text'; there are a, good"),
    "blank": (["--task", "{tmp}/blank.jsonl"], "0 training examples are too few"),
    "one label": (["--task", "{tmp}/one.jsonl"], "holds one value only ('bad')"),
    "foreign number": (["--task", "{tmp}/stars"], "row 1: the label '0' is none of 1, 2"),
    "ragged": (["--task", "{tmp}/ragged.csv", "--label-field", "y"], "row 1 has more or fewer cells than the header"),
    "cut off": (["--task", "{tmp}/cut.csv"], "row 3 has more or fewer cells than the header"),
    "label between": (["--task", "{tmp}/between"], "row 1: the label '0.5' is none of bad, good"),
    "save nowhere": (["--save", "{tmp}/text.jsonl/x"], "File exists: '{tmp}/text.jsonl'"),
    "save folder": (["--save", "{tmp}"], "is no file; name a new one"),
    "export file": (["--export", "{tmp}/text.jsonl"], "File exists: '{tmp}/text.jsonl'"),
    "export adapter": (["--method", "adapter", "--export", "{tmp}/model"], "no place for adapter"),
    "broken result": (["--method", "none", "--out", "{tmp}/old"], "is no result of apet.py, or a broken one"),
    "out": (["--out", "{tmp}/text.jsonl/x"], "Not a directory: '{tmp}/text.jsonl/x'"),
    "dtype without a scaler": (["--dtype", "fp16"], "invalid choice: 'fp16'"),
    **{
        f"{flag} empty": ([f"--{flag}", ""], f"--{flag}: ")
        for flag in ("steps", "load", "save", "export", "insert", "out", "device")
    },
    "target length large": (["--max-target-length", "1e15"], "a whole number from 2 to 100,000, not '1e15'"),
    "batch large": (["--batch-size", "1e8"], "a whole number from 1 to 100,000, not '1e8'"),
    "nothing to save": (["--method", "none", "--save", "{tmp}/x"], "nothing is trained here, so there is no delta to save"),
    "inserted by none": (["--insert", "lora", "--method", "full"], "--insert goes with --method apet"),
    "save device": (["--save", "/dev/null"], "--save /dev/null is no file"),
    "save loaded": (["--load", "{tmp}/text.jsonl", "--save", "{tmp}/x"], "is not a safetensors file"),
    "save long": (["--save", "{tmp}/" + "x" * 252], "File name too long"),
    "save long in bytes": (["--save", "{tmp}/" + "ä" * 130], "File name too long"),
    "export long": (["--export", "{tmp}/" + "x" * 256], "File name too long"),
    "export read-only": (["--export", "/proc/self/model"], "No such file or directory: '/proc/self/model'"),
    "not utf-8": (["--task", "{tmp}/\udcff.jsonl"], "is empty or not UTF-8: leave the flag out, or rename it"),
}


class Opened:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2_and_leaves_nothing(tmp_path, capsys, case):
    rows = [{"text": f"text {i}", "label": ("bad", "good")[i % 2]} for i in range(40)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    for name, content in (
        ("text.jsonl", text), ("text.pdf", text), ("empty.jsonl", ""), ("broken.jsonl", text + "{"), ("array.jsonl", "[1]\n"),
        ("few.jsonl", text[: text.index("text 5") - 10]),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.jsonl").write_bytes(text.replace("text 1", "caf\xe9").encode("latin-1"))
    for folder in ("folder", "foreign"):
        (tmp_path / folder).mkdir()
    (tmp_path / "foreign/train.jsonl").write_text(text)
    (tmp_path / "foreign/test.jsonl").write_text(json.dumps({"text": "x", "label": "sad"}) + "\n")
    (tmp_path / "stars").mkdir()
    for split, labels in (("train", (1, 2)), ("test", (0, 1))):
        some = [json.dumps({"text": f"text {i}", "label": labels[i % 2]}) + "\n" for i in range(40)]
        (tmp_path / f"stars/{split}.jsonl").write_text("".join(some))
    (tmp_path / "ragged.csv").write_text("text,label\n" + "one, two,good\nthree, four,bad\n" * 20)
    (tmp_path / "cut.csv").write_text("text,label\none,good\ntwo,bad\nthree\n" * 10)
    (tmp_path / "between").mkdir()
    (tmp_path / "between/train.jsonl").write_text(text)
    (tmp_path / "between/test.jsonl").write_text(json.dumps({"text": "x", "label": 0.5}) + "\n")
    for name, content in (
        ("nested.jsonl", "[" * 100_000), ("digits.jsonl", '{"text": "x", "label": ' + "9" * 5000 + "}"), ("zeros.jsonl", "\0" * 50),
        ("text.parquet", text), ("headless.csv", "a,good\nb,bad\n" * 20), ("blank.jsonl", re.sub("text [0-9]+", " ", text)),
        ("one.jsonl", text.replace("good", "bad")),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
    (tmp_path / "utf16.jsonl").write_bytes(text.encode("utf-16"))
    weights = (TOY / "models/tiny/model.safetensors").read_bytes()
    trap = pickle.dumps(Opened(str(tmp_path / "opened")), protocol=2)
    for name, file, content in (("cut", "model.safetensors", weights[:5000]), ("pickled", "pytorch_model.bin", trap)):
        shutil.copytree(TOY / "models/tiny", tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / file).write_bytes(content)
    argv, message = WRONG[case]
    if case == "broken result":
        run("--method", "none", out=tmp_path / "old")
        next((tmp_path / "old").glob("*.json")).write_text('{"score": ')
        capsys.readouterr()
    argv, message = [a.replace("{tmp}", str(tmp_path)) for a in argv], message.replace("{tmp}", str(tmp_path))
    out = [] if "--out" in argv else ["--out", str(tmp_path / "out")]
    assert apet.main([*SMALL, *argv, *out]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and error[-1].startswith("apet: error: ") and not any("Traceback" in line for line in error)
    assert [line for line in error if not line.startswith("loading ")] == error[-1:]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "opened").exists(), "a pickle was executed"


def test_a_loss_that_is_not_finite_stops_the_run_without_a_result(tmp_path, capsys):
    assert apet.main([*SMALL, "--lr", "1e30", "--method", "full", "--out", str(tmp_path)]) == 2
    assert "the loss is" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.safetensors"))


def test_a_run_that_fails_does_not_stop_the_others_of_its_sweep_and_is_not_hidden(tmp_path, capsys):
    argv = [*SMALL, "--method", "full,none", "--lr", "1e30", "--out", str(tmp_path)]
    assert apet.main(argv) == 2
    said = capsys.readouterr()
    assert "full s0 failed: the loss is" in said.err and "1 of 2 runs failed" in said.err.splitlines()[-1]
    assert only(tmp_path)["arguments"]["method"] == "none" and "none" in said.out


class NoWaiting(TorchDispatchMode):
    """Fails on what waits for a device: a tensor's number that Python reads. transformers' own masks do, once a forward."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            assert any("masking_utils" in frame.filename for frame in traceback.extract_stack()), "a step waits for the device"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["apet", "full", "lora"])
def test_nothing_waits_for_the_device_inside_a_step(tmp_path, monkeypatch, method):
    """From one step's start to the next one's, evaluations apart; a look at the losses comes once, after half a second."""
    mode, original, watched = NoWaiting(), {name: getattr(apet, name) for name in ("train_step", "score")}, []

    def train_step(*args):
        result = original["train_step"](*args)
        if not watched:
            watched.append(mode.__enter__())
        return result

    def score(*args):
        while watched:
            watched.pop().__exit__(None, None, None)
        return original["score"](*args)

    monkeypatch.setattr(apet, "train_step", train_step)
    monkeypatch.setattr(apet, "score", score)
    try:
        run("--method", method, "--budget", "100", "--eval-every", "6", out=tmp_path)
    finally:
        while watched:
            watched.pop().__exit__(None, None, None)
    assert len(only(tmp_path)["loss_curve"]) == 6


def test_a_loss_that_is_not_finite_is_found_at_the_next_look_and_never_saved(tmp_path, monkeypatch, capsys):
    original = apet.train_step

    def step(run, tuned, optimizer, record):
        loss = original(run, tuned, optimizer, record)
        return loss * math.nan if record["step"] == 4 else loss

    monkeypatch.setattr(apet, "train_step", step)
    assert apet.main([*SMALL, "--budget", "100", "--steps", "12", "--eval-every", "6", "--out", str(tmp_path)]) == 2
    assert "the loss is nan at step 4" in capsys.readouterr().err and not list(tmp_path.iterdir())


SPOILT = {
    "other code": lambda s: s | {"key": s["key"][:-1] + "x"},
    "other arguments": lambda s: s | {"key": "x" + s["key"]},
    "a list": lambda s: [s],
}


@pytest.mark.parametrize("how", [*SPOILT, "cut", "flipped", "empty", "trap"])
def test_a_state_that_is_not_whole_or_of_another_run_is_one_line_and_the_run_starts_anew(tmp_path, monkeypatch, capsys, how):
    file = interrupt(monkeypatch, 3, "--budget", "100", out=tmp_path)
    data = file.read_bytes()
    if how in SPOILT:
        torch.save(SPOILT[how](torch.load(file, weights_only=True)), file)
    elif how == "flipped":  # a bit of the values
        place = data.index(torch.load(file, weights_only=True)["tensors"]["values"].numpy().tobytes())
        file.write_bytes(data[: place + 7] + bytes([data[place + 7] ^ 1]) + data[place + 8 :])
    else:
        trap = pickle.dumps(Opened(str(tmp_path / "opened")), protocol=2)
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "trap": trap}[how])
    capsys.readouterr()
    run("--budget", "100", out=tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "state is" in line or "continuing" in line]
    assert len(said) == 1 and said[0].endswith("the run starts anew") and not (tmp_path / "opened").exists()
    assert len(only(tmp_path)["loss_curve"]) == 6 and not file.exists()


def test_a_state_is_written_without_a_copy_of_it_in_memory(tmp_path):
    state = {"tensors": {str(i): torch.ones(5_000_000) for i in range(6)}}  # 120 MB
    Path("/proc/self/clear_refs").write_text("5")  # the process's peak starts anew
    before = apet.peak_memory("cpu")
    apet.write_file(tmp_path / "state", functools.partial(torch.save, state))
    assert apet.peak_memory("cpu") - before < 60e6 and (tmp_path / "state").stat().st_size > 120e6


def a_state():
    tensors = {"values": torch.arange(3.0), "values step": torch.tensor(1.0)}
    return {"key": "k", "record": {"step": 1, "loss": [0.5]}, "best": {"values": torch.ones(3)}, "tensors": tensors}


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), change=st.binary(min_size=1, max_size=8), cut=st.booleans(), junk=st.booleans())
def test_whatever_a_state_file_holds_it_is_taken_whole_or_not_at_all(tmp_path_factory, place, change, cut, junk):
    file = tmp_path_factory.getbasetemp() / "fuzzed.state"
    torch.save(a_state(), file)
    data = file.read_bytes()
    at = int(place * len(data))
    file.write_bytes(change if junk else data[:at] + change + (b"" if cut else data[at + len(change) :]))
    blank = {"key": "k", "record": {"step": 0, "loss": []}, "best": {"values": torch.zeros(3)}}
    blank["tensors"] = {"values": torch.zeros(3), "values step": torch.tensor(0.0)}
    taken, wanted = apet.load_state(str(file), blank), a_state()
    if taken:
        assert blank["record"] == wanted["record"] and torch.equal(blank["best"]["values"], wanted["best"]["values"])
        assert all(torch.equal(t, wanted["tensors"][n]) for n, t in blank["tensors"].items())
    else:
        assert blank["record"]["step"] == 0 and not blank["tensors"]["values"].any()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PARTS = ("score", "metric", "baselines", "tuned_params", "density", "lr", "best", "seconds", "step_ms", "peak_memory_bytes", "data")


@settings(max_examples=150, deadline=None)
@given(part=st.sampled_from(PARTS), value=JSON, junk=st.none() | st.binary(max_size=30) | JSON)
def test_whatever_a_result_file_holds_it_is_used_or_one_line(tmp_path_factory, part, value, junk):
    (args,) = apet.runs(apet.check_args(apet.parser().parse_args([*SMALL, "--out", str(tmp_path_factory.getbasetemp())])))
    whole = {
        "score": 0.5, "metric": "accuracy", "baselines": {"random_guess": 0.5, "majority": 0.5}, "tuned_params": 10, "density": 0.1,
        "lr": 0.1, "best": {"step": 1, "score": 0.5}, "seconds": {"train": 1.0, "eval": 1.0}, "step_ms": 1.0, "tokens_per_s": 1.0,
        "peak_memory_bytes": 10, "data": {"report": "test", "sizes": {"report": 5}},
    }  # fmt: skip
    file = Path(args.out) / f"{args.name}.json"
    file.write_text(json.dumps(whole))
    assert apet.read_result(args) == whole
    file.write_bytes(junk if isinstance(junk, bytes) else json.dumps(whole | {part: value} if junk is None else junk).encode())
    try:
        assert apet.table([(args, apet.read_result(args))])
    except apet.UserError as e:
        assert str(e).startswith(f"{file} is no result")
    file.unlink()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(("method", "insert", "model", *apet.DATA_FLAGS)), st.text(max_size=8)))
def test_whatever_a_delta_says_of_itself_it_is_read_or_one_line(tmp_path_factory, about):
    file = str(tmp_path_factory.getbasetemp() / "about.safetensors")
    about = {k: v.encode(errors="replace").decode() for k, v in about.items()}
    apet.save_tensors({"values": torch.zeros(1)}, file, {"format": "apet 2", **about})
    try:
        args = apet.check_args(apet.parser().parse_args(["--load", file]))
        assert args.method[0] in apet.METHODS and args.max_source_length >= 8
    except apet.UserError as e:
        assert "\n" not in str(e)


def test_an_error_that_nobody_foresaw_is_one_line_that_says_what_failed_and_status_1(tmp_path, monkeypatch, capsys):
    def broken(args):
        return 1 / 0

    monkeypatch.setattr(apet, "load_task", broken)
    assert apet.main([*SMALL, "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "apet: error: ZeroDivisionError: division by zero (APET_DEBUG=1: more)"
    monkeypatch.setenv("APET_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        apet.main([*SMALL, "--out", str(tmp_path)])


def test_memory_that_runs_out_is_met_with_checkpointing_and_the_same_numbers(tmp_path, monkeypatch):
    original, calls = apet.loss_sum, []

    def once(run, examples):
        calls.append(any(getattr(m, "gradient_checkpointing", False) for m in run.model.modules()))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(run, examples)

    run("--budget", "100", out=tmp_path / "a")
    monkeypatch.setattr(apet, "loss_sum", once)
    run("--budget", "100", out=tmp_path / "b")
    assert calls[:2] == [False, False] and all(calls[2:]) and len(calls) == 2 + 5
    a, b = only(tmp_path / "a"), only(tmp_path / "b")
    assert b["loss_curve"] == pytest.approx(a["loss_curve"], rel=1e-4) and b["arguments"]["gradient_checkpointing"]


@pytest.mark.parametrize("where", ["train_step", "predict"])
def test_memory_that_runs_out_is_one_line_that_names_the_flags(tmp_path, monkeypatch, capsys, where):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(apet, where, full)
    assert apet.main([*SMALL, "--budget", "100", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(flag in said for flag in ("--gradient-checkpointing", "--grad-accum", "--eval-batch-size"))


def test_peak_memory_is_that_of_all_devices_and_the_cpu_alone_opens_no_cuda_context(tmp_path, monkeypatch):
    def no_context(*args):
        raise AssertionError("a CUDA context is opened")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", no_context)
    run("--budget", "100", "--device", "cpu", out=tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda i: 10**i)
    assert apet.peak_memory("cuda") == 111


LAUNCHED = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "argv",
    [["--device", "cuda"], ["--device-map", "auto"]],
)
def test_several_processes_do_not_share_a_gpu_unawares(tmp_path, monkeypatch, capsys, argv):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert apet.main([*SMALL, *argv, "--out", str(tmp_path)]) == 2
    assert "leave --device and --device-map out" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["many", "2"])
def test_an_environment_that_is_not_torchrun_s_is_one_process(tmp_path, monkeypatch, value):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, value)  # SLURM sets such
    run("--budget", "10", out=tmp_path)
    assert only(tmp_path)["processes"] == 1


def test_a_terminal_that_is_not_utf_8_shows_what_it_can(tmp_path):
    (tmp_path / "dätä.jsonl").write_text("".join(json.dumps({"text": f"t {i}", "label": "äb"[i % 2]}) + "\n" for i in range(60)))
    line, environment = command(*SMALL, "--budget", "10", "--task", tmp_path / "dätä.jsonl", "--out", tmp_path / "out")
    outcome = subprocess.run(line, env=environment | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert outcome.returncode == 0 and "d\\xe4t\\xe4.jsonl" in outcome.stdout, outcome.stderr


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_table_that_can_t_be_printed_is_one_line_and_the_result_is_kept(tmp_path, kind):
    line, environment = command(*SMALL, "--budget", "10", "--out", tmp_path)
    if kind == "full":
        sink = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, sink = os.pipe()
        os.close(reader)
    outcome = subprocess.run(line, env=environment, stdout=sink, stderr=subprocess.PIPE, text=True)
    os.close(sink)
    assert outcome.returncode == 2 and outcome.stderr.splitlines()[-1].startswith("apet: error: can't print the table")
    assert "Exception ignored" not in outcome.stderr and only(tmp_path)["tuned_params"] == 10


def test_a_delta_of_another_model_is_refused(tmp_path, capsys):
    run("--budget", "100", out=tmp_path)
    (delta,) = tmp_path.glob("*.safetensors")
    assert apet.main(["--model", "toy-base", "--load", str(delta), "--out", str(tmp_path)]) == 2
    assert "was made for another model" in capsys.readouterr().err
    tensors, about = apet.load_tensors(delta)
    apet.save_tensors(tensors | {"inserted.lora.more": torch.ones(2)}, delta, about)  # as of a model with more layers
    assert apet.main(["--load", str(delta), "--out", str(tmp_path)]) == 2
    assert "was made for another model" in capsys.readouterr().err


def test_a_delta_knows_the_order_of_its_labels_and_a_test_file_may_lack_one(tmp_path):
    """Of a table's task, whose labels are not in the order of the alphabet."""
    run("--task", "toy-inference", "--budget", "100", out=tmp_path / "a")
    trained = only(tmp_path / "a")
    assert trained["labels"] == ["entailment", "neutral", "contradiction"]
    rows = [json.loads(line) for line in (TOY / "tasks/inference/test.jsonl").read_text().splitlines()]
    (tmp_path / "test").mkdir()
    (tmp_path / "test/test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["label"] != "contradiction"))
    argv = ["--load", trained["delta"], "--text-fields", "premise,hypothesis", "--eval-size", "60"]
    for task in (TOY / "tasks/inference", tmp_path / "test"):
        assert apet.main([*map(str, argv), "--task", str(task), "--out", str(tmp_path / f"b {task.name}")]) == 0
        loaded = only(tmp_path / f"b {task.name}")
        assert loaded["labels"] == trained["labels"] and loaded["baselines"]["random_guess"] == pytest.approx(1 / 3)


def test_an_export_that_fails_keeps_the_state(tmp_path):
    (tmp_path / "model/model.safetensors").mkdir(parents=True)
    assert apet.main([*SMALL, "--method", "full", "--export", str(tmp_path / "model"), "--out", str(tmp_path)]) != 0
    assert list(tmp_path.glob("*.state"))


def test_memory_that_runs_out_in_one_run_of_a_sweep_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def full(run, tuned, optimizer, record):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(apet, "train_step", full)
    assert apet.main([*SMALL, "--method", "full,none", "--out", str(tmp_path)]) == 2
    assert only(tmp_path)["arguments"]["method"] == "none" and "full s0 failed: CUDA out of memory" in capsys.readouterr().err


def test_an_encoder_without_rows_to_train_its_head_on_is_one_line(tmp_path, capsys):
    model = build("bert")
    model.resize_token_embeddings(1000)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY / "models/tiny" / name, tmp_path / "model")
    (tmp_path / "data").mkdir()
    shutil.copy(TOY / "tasks/sentiment/test.jsonl", tmp_path / "data")
    argv = ["--model", tmp_path / "model", "--task", tmp_path / "data", "--method", "none", "--max-source-length", "32"]
    assert apet.main([*map(str, argv), "--out", str(tmp_path / "out")]) == 2
    assert "no rows to train the classification head on" in capsys.readouterr().err
    assert apet.main([*map(str, argv), "--freeze-head", "--eval-size", "20", "--out", str(tmp_path / "out")]) == 0


def test_a_budget_may_count_the_inserted_weights(tmp_path):
    run("--insert", "adapter", "--budget", "58000", out=tmp_path)
    assert only(tmp_path)["tuned_params"] == 58_000 > only(tmp_path)["total_params"]


def test_importing_apet_is_cheap_and_has_no_side_effects():
    code = (  # Windows has no resource
        "import sys, torch, time; sys.modules['resource'] = None; "
        "start = time.process_time(); import apet; seconds = time.process_time() - start; "
        "print(seconds, [m for m in ('transformers', 'datasets', 'peft', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seconds, modules = out.split(" ", 1)
    assert float(seconds) < 0.5 and modules.strip() == "[]"


def test_what_is_installed_is_what_requirements_names():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in pins if pins["torch"] in torch.__version__}
    assert installed in (pins, {})  # on another torch, the tests run on other versions on purpose
