"""The command with the models and data sets of the hub: names, layouts, families, methods and failures, through tests/standin.py.

One process has imported everything and forks for each run: its environment is one that points at the stand-in (these
variables are read when huggingface_hub is imported), and every run starts without what another one remembers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import standin
import torch
from conftest import ROOT
from safetensors.torch import load_file

import apet

DRIVER = """
import json, os, sys, time, traceback
import apet, datasets, peft, rouge_score.rouge_scorer, torch, transformers
import transformers.models.t5.modeling_t5, transformers.models.bloom.modeling_bloom, transformers.models.bert.modeling_bert
import transformers.generation.utils

apet_predict, apet_label_scores = apet.predict, apet.label_scores
predicted, scores = [], []

def label_scores(*args):
    out = apet_label_scores(*args)
    scores.extend(round(x, 4) for x in out.flatten().tolist())
    return out

def predict(*args):
    scores.clear()
    out = apet_predict(*args)
    predicted[:] = [list(out), list(scores)]
    return out

def run(argv):
    predicted[:], start = [[], []], time.perf_counter()
    try:
        status = apet.main(argv)
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
        status = 1
    return {"status": status, "seconds": time.perf_counter() - start, "predicted": predicted[0], "scores": predicted[1]}

def read(argv):
    data = apet.load_task(apet.settle(apet.parser().parse_args(argv)))
    return {"about": data.about, **{part: [e._asdict() for e in getattr(data, part)] for part in ("train", "select", "report")}}

apet.predict, apet.label_scores = predict, label_scores
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(job["files"] + kind, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        outcomes = []
        for argv in job["runs"]:
            at = os.fstat(2).st_size
            outcomes.append((read if job["read"] else run)(argv))
            sys.stderr.flush()
            with open(job["files"] + "err") as f:
                f.seek(at)
                outcomes[-1]["error"] = f.read()
        with open(job["files"] + "json", "w") as f:
            json.dump(outcomes, f)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""

T5, T5_V1_1, BLOOM, BERT = "t5-small", "t5-v1_1-small", "bloom-560m", "bert-tiny"
REPOSITORY = {
    T5: "google-t5/t5-small",
    T5_V1_1: "google/t5-v1_1-small",
    BLOOM: "bigscience/bloom-560m",
    BERT: "google/bert_uncased_L-2_H-128_A-2",
}
HELD_OUT = "held out of train"
SPLITS = {  # select, report: what picks the best step is never what is reported
    "sst2": (HELD_OUT, "validation"),
    "imdb": (HELD_OUT, "test"),
    "rotten_tomatoes": ("validation", "test"),
    "mnli": (HELD_OUT, "validation_matched"),
    "qnli": (HELD_OUT, "validation"),
    "rte": (HELD_OUT, "validation"),
    "mrpc": ("validation", "test"),
    "qqp": (HELD_OUT, "validation"),
    "samsum": ("validation", "test"),
    "multi_news": ("validation", "test"),
    "nq_open": (HELD_OUT, "validation"),
}
TEXTS = ("samsum", "multi_news", "nq_open")
DATA = {
    **dict.fromkeys(standin.GLUE, "nyu-mll/glue"),
    "imdb": "stanfordnlp/imdb",
    "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
    "samsum": "knkarthick/samsum",
    "multi_news": "alexfabbri/multi_news",
    "nq_open": "google-research-datasets/nq_open",
}
SMALL = ["--steps", "2", "--eval-every", "2", "--train-size", "8", "--eval-size", "6", "--batch-size", "4",
         "--max-source-length", "48", "--max-target-length", "6", "--budget", "200"]  # fmt: skip


class Outcome(NamedTuple):
    status: int
    seconds: float  # after imports
    error: str
    predicted: list  # of the last evaluation, which is the one that is reported
    scores: list[float]  # log-likelihoods of all labels in it
    results: dict[str, dict]  # name of the file: result

    @property
    def result(self) -> dict:
        (result,) = self.results.values()
        return result


class World(NamedTuple):
    hub: standin.Standin
    home: Path  # the cache
    environment: dict[str, str]
    driver: subprocess.Popen
    made: Path

    def ask(self, *runs: list[str], read: bool = False) -> list[dict]:
        """What the driver says of these runs, all in one process."""
        files = str(self.made / f"{time.monotonic_ns()}.")
        self.driver.stdin.write(json.dumps({"runs": [list(map(str, r)) for r in runs], "read": read, "files": files}) + "\n")
        self.driver.stdin.flush()
        status = self.driver.stdout.readline().strip()
        assert status == "0", Path(files + "err").read_text()
        return json.loads(Path(files + "json").read_text())

    def run(self, *runs: list[str], out: Path | None = None) -> list[Outcome]:
        """`python apet.py`, each with a folder of its own for the results (or with `out`), all in one process."""
        folders = [out or self.made / f"{time.monotonic_ns()}" for _ in runs]
        said = self.ask(*([*r, "--out", folder] for r, folder in zip(runs, folders, strict=True)))
        keys = ("status", "seconds", "error", "predicted", "scores")
        found = [{f.stem: json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))} for folder in folders]
        return [Outcome(*(s[k] for k in keys), results) for s, results in zip(said, found, strict=True)]

    @contextmanager
    def cold(self) -> Iterator[None]:
        """With an empty cache for a while."""
        aside = self.home.with_suffix(".aside")
        self.home.rename(aside)
        try:
            yield
        finally:
            shutil.rmtree(self.home, ignore_errors=True)
            aside.rename(self.home)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = tmp_path_factory.mktemp("hub")
    (made / "home").mkdir()
    root = made / "root"
    root.mkdir()
    with standin.Standin(root) as hub:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(made / "home"), "OMP_NUM_THREADS": "1"}
        environment |= {"STANDIN_TRACE": str(made / "trace"), "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        driver = subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, stdin=pipe, stdout=pipe, text=True)
        try:
            standin.fill(root)  # while the driver imports
            yield World(hub, made / "home", environment, driver, made)
        finally:
            driver.stdin.close()
            driver.wait(60)


def folder_of(world: World, model: str) -> Path:
    return world.hub.root / "models" / REPOSITORY.get(model, model)


def revision(world: World, kind: str, name: str) -> str:
    return standin.commit_of(world.hub.root / kind / name)


def refused(outcome: Outcome, *said: str) -> str:
    """One line that says what is wrong, status 2, nothing left behind."""
    lines = [line for line in outcome.error.splitlines() if not line.startswith("loading ")]
    assert outcome.status == 2, outcome.error
    assert len(lines) == 1 and lines[0].startswith("apet: error: ") and not outcome.results, outcome.error
    for part in said:
        assert part in lines[0], lines[0]
    return lines[0]


# Every task on every family -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(world: World) -> dict[tuple[str, str], Outcome]:
    """Each task on each family, tuned for two steps; one process a family."""
    out = {}
    for model in (T5, BLOOM, BERT):
        for task, outcome in zip(SPLITS, world.run(*(["--model", model, "--task", t, *SMALL] for t in SPLITS)), strict=True):
            out[model, task] = outcome
    return out


@pytest.mark.parametrize("task", SPLITS)
@pytest.mark.parametrize("model", [T5, BLOOM, BERT])
def test_each_task_runs_on_each_family_and_the_result_says_where_everything_came_from(world, cells, model, task):
    outcome = cells[model, task]
    if model == BERT and task in TEXTS:
        refused(outcome, "bert-tiny is an encoder", "classify", task)
        return
    assert outcome.status == 0, outcome.error
    result, select_report = outcome.result, SPLITS[task]
    assert (result["data"]["select"], result["data"]["report"]) == select_report
    assert result["data"]["sizes"] == {"train": 8, "select": 6, "report": 6}
    assert result["data"].get("rows without text or label, dropped") == ({"train": 1} if task == "samsum" else None)
    assert result["model"]["path"] == REPOSITORY[model]
    assert result["model"]["family"] == {T5: "seq2seq", BLOOM: "causal", BERT: "encoder"}[model]
    assert result["tuned_params"] == 200 and len(result["loss_curve"]) == 2 and len(result["eval_curve"]) == 2
    assert (result["head_params"] > 0) == (model == BERT)
    words = standin.SENTIMENT if task in ("imdb", "rotten_tomatoes") else standin.GLUE[task][1] if task in standin.GLUE else ()
    assert result["labels"] == list(words)
    wanted = ["accuracy", "f1"] if task in ("mrpc", "qqp") else ["accuracy"]
    wanted = {"samsum": ["rougeL", "rouge1", "rouge2"], "nq_open": ["f1", "exact"]}.get(
        task.replace("multi_news", "samsum"), wanted
    )
    assert list(result["metrics"]) == wanted and 0 <= result["score"] <= 1


@pytest.mark.parametrize("model", [T5, BLOOM, BERT])
def test_the_result_records_the_commits_of_the_model_and_of_the_data(world, cells, model):
    done = {task: cells[model, task].result for task in SPLITS if cells[model, task].status == 0}
    assert {t: r["data"]["revision"] for t, r in done.items()} == {t: revision(world, "datasets", DATA[t]) for t in done}
    assert {r["model"]["revision"] for r in done.values()} == {revision(world, "models", REPOSITORY[model])}


def test_no_loading_script_was_run(world, cells):
    assert cells[T5, "multi_news"].status == 0 and not Path(world.environment["STANDIN_TRACE"]).exists()
    assert not any(path.endswith("multi_news.py") for _, path in world.hub.asked)


def test_what_is_read_is_what_the_hub_holds_and_nothing_is_in_two_parts(world):
    parts = {t: p for t, p in zip(SPLITS, world.ask(*(["--task", t] for t in SPLITS), read=True), strict=True)}
    for task, part in parts.items():
        sources = {name: [e["source"] for e in part[name]] for name in ("train", "select", "report")}
        assert all(len(set(s)) == len(s) for s in sources.values())
        assert not set(sources["select"]) & set(sources["train"]) and not set(sources["report"]) & set(sources["train"]), task
        held = SPLITS[task][0] == HELD_OUT
        assert {n: len(s) for n, s in sources.items()} == {
            "train": standin.TRAIN * (9 if held else 10) // 10,
            "select": standin.TRAIN // 10 if held else standin.EVALUATION,
            "report": standin.EVALUATION if held else standin.TEST,
        }
    labels = {t: [(e["label"], e["target"]) for e in part["report"]] for t, part in parts.items()}
    assert labels["mnli"][:4] == [(0, "entailment"), (1, "neutral"), (2, "contradiction"), (0, "entailment")]
    assert labels["mrpc"][:2] == [(0, "not_equivalent"), (1, "equivalent")]
    assert labels["imdb"][0] == (0, "negative") and labels["imdb"][-1] == (1, "positive")  # sorted, as on the hub
    first = standin.texts(standin.EVALUATION, seed=1110)[0], standin.texts(standin.EVALUATION, seed=1111)[0]
    assert parts["mnli"]["report"][0]["texts"] == list(first)
    assert parts["mnli"]["report"][0]["source"] == f"premise: {first[0]} hypothesis: {first[1]}"
    answers = standin.texts(standin.EVALUATION, seed=36)
    assert parts["nq_open"]["report"][1]["answers"] == [answers[1]] * 2 and parts["nq_open"]["report"][0]["target"] == answers[0]
    news = parts["multi_news"]["report"][0]
    assert (
        re.fullmatch(r"[\w ]+ \n [\w ]+ \|{5} [\w ]+", news["source"]) and news["target"] == standin.texts(standin.TEST, seed=82)[0]
    )
    chat = parts["samsum"]["report"][0]["source"]
    assert chat.startswith("Anna: ") and '\nBen: hello, "' in chat


def test_without_a_validation_split_the_reported_one_does_not_pick_the_best_step(world):
    """Of a data set that is in no table, by name and by name:configuration; its label names are the words to be written."""
    long, short = world.run(
        ["--model", T5, "--task", "someone/reviews:long", "--text-fields", "body", "--label-field", "stars", *SMALL],
        ["--model", BERT, "--task", "someone/reviews:short", "--text-fields", "body", "--label-field", "stars", *SMALL],
    )
    assert long.status == short.status == 0, long.error + short.error
    assert long.result["labels"] == ["awful", "fine"] and short.result["labels"] == ["dull", "fun"]
    assert (long.result["data"]["select"], long.result["data"]["report"]) == ("validation", "test")
    assert (short.result["data"]["select"], short.result["data"]["report"]) == (HELD_OUT, "test")
    assert long.result["metric"] == "accuracy" and long.result["data"]["revision"] == revision(world, "datasets", "someone/reviews")
    (plain,) = world.ask(["--task", "cornell-movie-review-data/rotten_tomatoes"], read=True)
    assert len(plain["report"]) == standin.TEST and {e["target"] for e in plain["train"]} == {"neg", "pos"}
