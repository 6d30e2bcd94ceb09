"""run_grid.sh: valid commands, each once; a failure stops nothing and is not hidden; an interrupted study continues."""

import collections
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import apet

GRID = str(ROOT / "run_grid.sh")


def environment(**more):
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more}


def grid(*options, **more):
    return subprocess.run([GRID, *map(str, options)], capture_output=True, text=True, env=environment(**more), timeout=300)


def listed(*options):
    return [line.split(" ", 2)[2] for line in grid("--list", *options).stdout.splitlines()]


def cells(line):
    return apet.runs(apet.check_args(apet.parser().parse_args(shlex.split(line))))


@pytest.mark.parametrize("options", [[], ["--offline"], ["--offline", "--quick"]], ids=["paper", "offline", "quick"])
def test_every_command_is_valid_and_no_run_is_in_two_of_them(options):
    lines = listed(*options)
    runs = collections.Counter(cell.name for line in lines for cell in cells(line))
    assert len(set(lines)) == len(lines) > 10 and max(runs.values()) == 1
    said = (ROOT / "README.md").read_text()
    assert f"{len(lines)} commands, {sum(runs.values()):,} runs" in said


def test_the_paper_s_grid_has_its_families_tasks_methods_and_budgets():
    every = [cell for line in listed() for cell in cells(line)]
    assert {c.task for c in every} == {t for t in apet.TASKS if not t.startswith("toy")}
    assert all(c.model in apet.SHORT for c in every)
    assert {c.method for c in every} == {"apet", "full", *apet.COUNTED}
    assert {c.mask for c in every if c.mask} == set(apet.MASKS)
    assert {f"1e{e}" for e in range(1, 8)} | set(apet.COUNTED) == {c.budget for c in every if c.budget}
    written = {"samsum", "multi_news", "nq_open"}
    assert not [c for c in every if c.model.startswith("bert") and c.task in written]
    assert {c.task for c in every if c.model == "bloom-1b1"} >= written


def test_options_choose_and_wrong_ones_are_one_line():
    lines = listed("--models", "bert-base", "--tasks", "rte,sst2", "--experiments", "position", "--seeds", "4", "--out", "a b")
    assert len(lines) == 2 and {c.mask_seed for line in lines for c in cells(line)} == {0, 1, 2, 3}
    assert {c.out for line in lines for c in cells(line)} == {os.path.join(os.getcwd(), "a b")}
    for wrong, said in (
        (["--models", "bert-huge"], "unknown model 'bert-huge'; there are bert-small"),
        (["--tasks", "toy-qa"], "unknown task 'toy-qa'"),
        (["--seeds", "none"], "--seeds must be a whole number from 1"), (["--quick"], "--quick goes with --offline"),
        (["--out"], "--out needs a value"), (["--fast"], "unknown option --fast"),
        (["--models", "bert-base", "--tasks", "samsum"], "no command: an encoder can't write samsum"),
    ):  # fmt: skip
        outcome = grid("--list", *wrong)
        assert outcome.returncode == 2 and outcome.stderr.startswith(f"run_grid: error: {said}"), outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1 and not outcome.stdout


def test_the_offline_study_has_what_the_figures_compare():
    """At each scale and task: the methods, APET at each method's own number of scalars, and position seeds for finding 1."""
    by_case = collections.defaultdict(list)
    for cell in (cell for line in listed("--offline") for cell in cells(line)):
        by_case[cell.model, cell.task].append(cell)
    assert len(by_case) == 4 * 5
    steps = int(re.search(r"STEPS = (\d+)", (ROOT / "results" / "toy" / "PROTOCOL.md").read_text())[1])
    for every in by_case.values():
        assert sorted(c.seed for c in every if c.method == "full") == [0, 1]
        assert {c.method for c in every} == {"none", "apet", "full", *apet.COUNTED}
        seeds = collections.Counter(c.budget for c in every if c.mask == "random")
        assert {*apet.COUNTED, "1e1", "1e2", "1e3"} == set(seeds) and min(seeds.values()) > 1
        assert min(seeds["lora"], seeds["bitfit"]) >= 3
        assert {(c.steps, c.eval_size, c.lr) for c in every if c.method != "none"} == {(steps, None, "auto")}
    assert {c.mask for c in by_case["toy-base", "toy-qa"] if c.mask} == set(apet.MASKS)


def test_the_quick_study_has_a_folder_of_its_own():
    for more, name in ([], "offline"), (["--quick"], "quick"):
        assert {Path(c.out).parts[-2:] for line in listed("--offline", *more) for c in cells(line)} == {("results", name)}


def test_a_list_whose_reader_has_gone_starts_nothing(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*" >>"$NOTES"\n')
    (tmp_path / "python").chmod(0o755)
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
    subprocess.run(f"{GRID} --list --offline --out {tmp_path}/out | true", shell=True, env=environment(**more), timeout=120)
    assert not (tmp_path / "notes").exists() and not (tmp_path / "out").exists()


def test_a_command_that_fails_stops_no_other_and_is_named_with_its_reason(tmp_path):
    """A stand-in for python notes its GPUs and its command, fails for one task and is killed in another."""
    (tmp_path / "python").write_text(
        '#!/bin/sh\n[ "$1" = apet.py ] || exit 0\necho "$CUDA_VISIBLE_DEVICES $*" >>"$NOTES"\n'
        'case "$*" in *mnli*) echo "apet: error: no such luck"; exit 2;; *rte*) kill -9 $$;; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    notes, options = (
        tmp_path / "notes",
        ["--models", "bert-base", "--experiments", "full", "--gpus", "0+1,2", "--out", tmp_path / "out"],
    )
    outcome = grid(*options, PATH=f"{tmp_path}:{os.environ['PATH']}", NOTES=str(notes))
    assert outcome.returncode == 1
    ran = [line.split(" ", 1) for line in notes.read_text().splitlines()]
    assert sorted(argv.replace("apet.py ", "", 1) for _, argv in ran) == sorted(listed(*options)) and len(ran) == 8
    assert {gpus for gpus, _ in ran} <= {"0,1", "2"}
    assert outcome.stderr.count("no such luck") == 1 and "2 commands failed" in outcome.stderr
    assert re.search(r"python apet.py --model bert-base --task mnli .*\n    apet: error: no such luck", outcome.stderr)
    assert re.search(r"python apet.py --model bert-base --task rte .*\n    ended by signal 9", outcome.stderr)


def test_progress_counts_the_runs_of_the_chosen_experiments_alone(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    names = ["full-s0", "full-s1", "lora-s0", "none", "apet-random-lora-p0-s0", "apet-random-1e1-p1-s0", "apet-row-lora-p0-s0"]
    for name in names:
        (tmp_path / f"toy-base-toy-qa-{name}-0123abcd.json").touch()
    options = ["--offline", "--quick", "--models", "toy-base", "--tasks", "toy-qa", "--out", tmp_path]
    for experiment, count in (("full", "2 of 2"), ("methods", "2 of 5"), ("position", "1 of 6"), ("budget", "1 of 10"),
                              ("structure", "1 of 6"), ("full,structure", "3 of 8")):  # fmt: skip
        outcome = grid(*options, "--experiments", experiment, PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert outcome.stderr.splitlines()[-1].startswith(f"{count} runs done, 0 commands failed, "), outcome.stderr


STAND_IN = """#!/bin/sh
# In place of python: a command that lasts $LASTS seconds, and takes one more to save its state when it gets SIGTERM.
[ "$1" = apet.py ] || exec {python} "$@"
trap 'kill $!; sleep 1; echo "saved $$" >>"$NOTES"; exit 143' TERM
echo "begun $$" >>"$NOTES"
sleep "$LASTS" & wait
echo "done $$" >>"$NOTES"
"""


def notes_of(file):
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(condition, seconds=30):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    """Starts four commands, two at a time, whose python is the stand-in; what they note is in tmp_path / "notes"."""
    (tmp_path / "python").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    options = ["--offline", "--quick", "--models", "toy-tiny", "--tasks", "toy-qa", "--jobs", "2", "--out", str(tmp_path / "out")]
    started = []

    def starts(lasts):
        more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes"), "LASTS": str(lasts)}
        started.append(subprocess.Popen([GRID, *options], env=environment(**more), stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield starts
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_start_that_is_killed_leaves_no_commands_beside_the_next_one(start, tmp_path, number):
    notes = tmp_path / "notes"
    first = start(lasts=30)
    wait_for(lambda: len(notes_of(notes)) == 2)
    first.send_signal(number)
    if number == signal.SIGKILL:
        first.wait()  # and the next start comes at once
    else:
        assert first.wait(10) == 130 and "the same command continues" in first.stderr.read()
        assert [word for word, _ in notes_of(notes)] == ["begun", "begun", "saved", "saved"]
    second = start(lasts=0.1)
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 0 and ("waiting for another start" in said) == (number == signal.SIGKILL), said
    words = [word for word, _ in notes_of(notes)]
    assert words[:4] == ["begun", "begun", "saved", "saved"] and words[4:].count("done") == words[4:].count("begun") == 4


def test_commands_of_a_killed_start_end_without_a_next_one(start, tmp_path):
    first = start(lasts=30)
    wait_for(lambda: len(notes_of(tmp_path / "notes")) == 2)
    first.kill()
    wait_for(lambda: len(notes_of(tmp_path / "notes")) == 4, 10)
    assert [word for word, _ in notes_of(tmp_path / "notes")] == ["begun", "begun", "saved", "saved"]
    pids = {pid for _, pid in notes_of(tmp_path / "notes")}
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)


def test_a_second_start_with_the_same_folder_waits_for_the_first(start, tmp_path):
    first = start(lasts=1)
    wait_for(lambda: len(notes_of(tmp_path / "notes")) == 2)
    second = start(lasts=0.1)
    assert "waiting for another start" in second.communicate(timeout=60)[1] and first.wait(60) == second.returncode == 0
    words = [word for word, _ in notes_of(tmp_path / "notes")]
    assert words[:8].count("begun") == words[:8].count("done") == 4 and len(words) == 16


def test_an_interrupted_study_continues_and_redoes_nothing(tmp_path):
    options = [
        "--offline",
        "--quick",
        "--models",
        "toy-tiny",
        "--tasks",
        "toy-sentiment",
        "--experiments",
        "budget",
        "--seeds",
        "1",
        "--out",
        tmp_path,
    ]
    first = subprocess.Popen([GRID, *map(str, options)], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (done := list(tmp_path.glob("*.json"))) and time.time() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130 and "the same command continues" in first.stderr.read()
    done = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.json")}
    expected = {cell.name[:-8] for line in listed(*options) for cell in cells(line)}  # without the hash, which knows the data, too
    assert 0 < len(done) < len(expected)
    again = grid(*options)
    assert again.returncode == 0, again.stderr
    assert {f.stem[:-8] for f in tmp_path.glob("*.json")} == expected
    assert {f: f.stat().st_mtime_ns for f in done} == done
    assert "5 of 5 runs done, 0 commands failed" in again.stderr
    assert all(json.loads(f.read_text())["loss_curve"] for f in tmp_path.glob("*.json"))


def test_shellcheck_finds_nothing():
    outcome = subprocess.run(["shellcheck", GRID], capture_output=True, text=True, env=environment())
    assert outcome.returncode == 0, outcome.stdout
