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
calls = []

def label_scores(*args):
    out = apet_label_scores(*args)
    calls[-1]["scores"] += out.flatten().tolist()
    return out

def predict(*args):
    calls.append({"scores": [], "predicted": []})
    calls[-1]["predicted"] = apet_predict(*args)
    return calls[-1]["predicted"]

def clock():  # seconds, but for those in which this process wanted a core and others had it
    with open("/proc/self/schedstat") as f:
        return time.perf_counter() - int(f.read().split()[1]) / 1e9

def run(argv):
    calls.clear()
    start = clock()
    try:
        status = apet.main(argv)
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
        status = 1
    return {"status": status, "seconds": clock() - start, "calls": list(calls)}

def read(argv):
    data = apet.load_task(apet.check_args(apet.parser().parse_args(argv)))
    return {"about": data.about, **{part: [e._asdict() for e in getattr(data, part)] for part in ("train", "select", "report")}}

apet.predict, apet.label_scores = predict, label_scores
def child(job, files, runs):
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(files + kind, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    outcomes = []
    for argv in runs:
        at = os.fstat(2).st_size
        outcomes.append((read if job["read"] else run)(argv))
        sys.stderr.flush()
        with open(files + "err") as f:
            f.seek(at)
            outcomes[-1]["error"] = f.read()
    with open(files + "json", "w") as f:
        json.dump(outcomes, f)
    os._exit(0)

for line in sys.stdin:
    job = json.loads(line)
    statuses, running = [], 0
    for i, runs in enumerate(job["groups"]):
        if running == 2:  # at once: for two cores
            statuses.append(os.wait()[1])
            running -= 1
        running += 1
        if os.fork() == 0:
            child(job, job["files"] + f"{i}.", runs)
    statuses += [os.wait()[1] for _ in range(running)]
    print(max(statuses), flush=True)
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
    "multi_news": "Awesome075/multi_news_parquet",
    "nq_open": "google-research-datasets/nq_open",
}
SMALL = ["--steps", "2", "--eval-every", "2", "--train-size", "8", "--eval-size", "6", "--batch-size", "4",
         "--max-source-length", "48", "--max-target-length", "6", "--budget", "200"]  # fmt: skip


class Outcome(NamedTuple):
    status: int
    seconds: float  # after imports, on a core of its own
    error: str
    calls: list[dict]  # of each evaluation: `predicted`, and `scores`, the log-likelihoods of all labels
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

    def ask(self, *groups: list[list], read: bool = False) -> list[dict]:
        """What the driver says of these runs; those of a group share a process."""
        files = str(self.made / f"{time.monotonic_ns()}.")
        groups = [[[str(a) for a in argv] for argv in group] for group in groups]
        self.driver.stdin.write(json.dumps({"groups": groups, "read": read, "files": files}) + "\n")
        self.driver.stdin.flush()
        status = self.driver.stdout.readline().strip()
        assert status == "0", [f.read_text() for f in self.made.glob(f"{Path(files).name}*err")]
        return [said for i in range(len(groups)) for said in json.loads(Path(f"{files}{i}.json").read_text())]

    def run(self, *runs: list, apart: bool = False) -> list[Outcome]:
        """`python apet.py`, each with a folder of its own for the results; all in one process, or each in its own."""
        folders = [self.made / f"{time.monotonic_ns()}" for _ in runs]
        runs = [[*r, "--out", folder] for r, folder in zip(runs, folders, strict=True)]
        said = self.ask(*([r] for r in runs)) if apart else self.ask(runs)
        keys = ("status", "seconds", "error", "calls")
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
    assert outcome.status == 2, outcome.error[-800:]
    assert len(lines) == 1 and lines[0].startswith("apet: error: ") and not outcome.results, outcome.error[-800:]
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
    (outcome,) = world.run(["--model", T5, "--task", "alexfabbri/multi_news", *SMALL])
    refused(outcome, "the data set alexfabbri/multi_news", "scripts are no longer supported")
    assert cells[T5, "multi_news"].status == 0 and not Path(world.environment["STANDIN_TRACE"]).exists()


def test_what_is_read_is_what_the_hub_holds_and_nothing_is_in_two_parts(world):
    parts = {t: p for t, p in zip(SPLITS, world.ask([["--task", t] for t in SPLITS], read=True), strict=True)}
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


def test_a_data_set_that_is_in_no_table_is_read_by_its_id_and_its_label_names_are_the_words(world):
    long, short = world.run(
        ["--model", T5, "--task", "someone/reviews:long", "--text-fields", "body", "--label-field", "stars", *SMALL],
        ["--model", BERT, "--task", "someone/reviews:short", "--text-fields", "body", "--label-field", "stars", *SMALL],
    )
    assert long.status == short.status == 0, long.error + short.error
    assert long.result["labels"] == ["awful", "fine"] and short.result["labels"] == ["dull", "fun"]
    assert (long.result["data"]["select"], long.result["data"]["report"]) == ("validation", "test")
    assert (short.result["data"]["select"], short.result["data"]["report"]) == (HELD_OUT, "test")
    assert long.result["metric"] == "accuracy" and long.result["data"]["revision"] == revision(world, "datasets", "someone/reviews")
    (plain,) = world.ask([["--task", "cornell-movie-review-data/rotten_tomatoes"]], read=True)
    assert len(plain["report"]) == standin.TEST and {e["target"] for e in plain["train"]} == {"neg", "pos"}


# Every method on every family -----------------------------------------------------------------------------------------

METHODS = ("full", "lora", "adapter", "prompt", "bitfit", "apet", "none")
TUNE = ["--steps", "16", "--eval-every", "8", "--batch-size", "4", "--budget", "3000", "--max-target-length", "6"]


def numbers(result: dict) -> dict:
    """What must not depend on what was run before."""
    return {k: result[k] for k in ("score", "metrics", "loss_curve", "eval_curve", "best", "tuned_params")}


def one_sided(folder: Path, column: str, often: object, seldom: object) -> Path:
    """A task that a few steps learn, so that not step 0 is kept: nine answers of ten are the same."""
    folder.mkdir()
    for seed, (split, n) in enumerate((("train", 40), ("validation", 10), ("test", 10)), 200):
        rows = [{"text": t, column: seldom if i % 10 == 4 else often} for i, t in enumerate(standin.texts(n, seed))]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def mostly(world: World, answer: str) -> Path:
    """The label that the untuned models seldom choose."""
    folder = world.made / f"mostly-{answer}"
    return folder if folder.exists() else one_sided(folder, "label", answer, {"movie": "film", "film": "movie"}[answer])


@pytest.mark.parametrize("model, dtype, lr", [(T5, "fp32", 0.1), (BLOOM, "bf16", 0.05), (BERT, "fp32", 0.05)])
def test_each_method_gives_alone_what_it_gives_in_a_sweep_and_its_delta_gives_its_score(world, model, dtype, lr):
    base = ["--model", model, "--dtype", dtype, "--task", mostly(world, "movie"), *TUNE, "--lr", lr]
    (sweep,) = world.run([*base, "--method", ",".join(METHODS)])
    assert sweep.status == 0, sweep.error
    more = {m: ["--method", m] for m in METHODS}
    more |= {"lora,adapter": ["--insert", "lora,adapter"], "prompt of apet": ["--insert", "prompt", "--where", "inserted"]}
    delta = {m: world.made / f"{model}-{m}.safetensors" for m in more}
    own = {m: ["--save", delta[m]] if m != "none" or model == BERT else [] for m in more}  # a head is trained whatever the method
    alone = dict(zip(more, world.run(*([*base, *argv, *own[m]] for m, argv in more.items()), apart=True), strict=True))
    for method, outcome in alone.items():
        assert outcome.status == 0, f"{method}: {outcome.error}"
        assert method == "none" or outcome.result["best"]["step"] > 0, method  # what is reported is tuned
    for method in METHODS:
        (name,) = alone[method].results
        assert numbers(alone[method].result) == numbers(sweep.results[name]), method
    assert sweep.calls == [call for m in METHODS for call in alone[m].calls]  # every log-likelihood, to the last bit
    reported = {m: outcome.calls[-1]["scores"] for m, outcome in alone.items()}
    assert len({json.dumps(s) for s in reported.values()}) == len(reported)  # each did something, and something else
    assert {alone[m].result["tuned_params"] for m in ("apet", "lora,adapter", "prompt of apet")} == {3000}

    saved = [m for m in alone if delta[m].exists()]
    assert set(alone) - set(saved) == ({"none"} if model != BERT else set())
    for method, outcome in zip(saved, world.run(*([*base, "--load", delta[m]] for m in saved)), strict=True):
        assert outcome.status == 0, f"{method}: {outcome.error}"
        assert outcome.result["metrics"] == alone[method].result["metrics"], method
        assert [c["scores"] for c in outcome.calls] == [reported[method]], method


@pytest.mark.parametrize("model, methods, lr", [(T5, "lora,adapter,apet", 0.1), (BLOOM, "prompt,adapter,apet", 0.05)])
def test_a_tuned_model_writes_text_and_its_delta_writes_the_same(world, model, methods, lr):
    task = one_sided(world.made / f"{model}-write", "answer", ["movie", "film"], ["book"])
    base = ["--model", model, "--task", task, "--label-field", "answer", *TUNE, "--lr", lr, "--dropout", "0"]
    (sweep,) = world.run([*base, "--method", methods])
    assert sweep.status == 0, sweep.error
    methods = methods.split(",")
    results = {r["arguments"]["method"]: r for r in sweep.results.values()}
    loaded = dict(zip(methods, world.run(*([*base, "--load", results[m]["delta"]] for m in methods)), strict=True))
    for i, (method, outcome) in enumerate(loaded.items(), 1):
        assert results[method]["metric"] == "f1" and results[method]["best"]["step"] > 0 and results[method]["score"] > 0.5, method
        assert outcome.result["metrics"] == results[method]["metrics"] and outcome.result["labels"] == []
        assert outcome.calls == [sweep.calls[4 * i - 1]]  # steps 0, 8, 16 and the report
        assert "movie" in outcome.calls[0]["predicted"][0]


def test_the_head_of_t5_v1_1_stays_untied_through_loading_tuning_and_export(world):
    folder, exported = folder_of(world, T5_V1_1), world.made / "exported"
    original = torch.load(folder / "pytorch_model.bin")
    base = ["--task", mostly(world, "movie"), *TUNE, "--lr", "0.05"]
    tuned, none = world.run(
        ["--model", T5_V1_1, *base, "--budget", "100%", "--export", exported], ["--model", T5_V1_1, *base, "--method", "none"]
    )
    assert tuned.status == none.status == 0, tuned.error + none.error
    assert tuned.result["model"]["path"] == REPOSITORY[T5_V1_1] and tuned.result["best"]["step"] > 0
    whole = {n: t for n, t in original.items() if "embed_tokens" not in n}  # the two are `shared`
    assert tuned.result["tuned_params"] == tuned.result["total_params"] == sum(t.numel() for t in whole.values())
    written = load_file(exported / "model.safetensors")
    assert set(whole) <= set(written)
    for name in ("lm_head.weight", "shared.weight"):
        assert (written[name] - original[name]).abs().max() > 0.01
    assert (written["lm_head.weight"] - written["shared.weight"]).abs().max() > 0.2

    for source, expected in ((folder, original), (exported, written)):
        model, tokenizer, _ = apet.load_model(apet.check_args(apet.parser().parse_args(["--model", str(source)])), ("a", "b"))
        assert model.lm_head.weight is not model.shared.weight
        assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
        assert torch.equal(model.shared.weight, expected["shared.weight"])
        assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
        assert tokenizer.decode(tokenizer("anna wrote the book").input_ids) == "anna wrote the book</s>"
    again, loaded = world.run(
        ["--model", exported, *base, "--method", "none"], ["--model", T5_V1_1, *base, "--load", tuned.result["delta"]]
    )
    assert again.status == loaded.status == 0, again.error + loaded.error
    assert again.calls[-1] == loaded.calls[-1] == tuned.calls[-1] != none.calls[-1]


# Scores and texts of a batch, against one unpadded forward each -------------------------------------------------------

CAUSAL = ("bigscience/bloom-560m", "someone/gpt2", "someone/llama")
QUESTIONS = [
    "who wrote the book",
    "no",
    "the plot was long but the actor is never boring and very good in it",
    "anna say hello ben",
]


def local(world: World, name: str, words: tuple[str, ...] = ("negative", "positive")) -> tuple:
    """(model, tokenizer, coder) of a folder of the stand-in"""
    args = apet.check_args(apet.parser().parse_args(["--model", str(folder_of(world, name)), "--dtype", "fp32"]))
    model, tokenizer, facts = apet.load_model(args, words)
    return model.eval(), tokenizer, apet.Coder(tokenizer, facts["family"], 64, 8)


def example(text: str, target: str = "") -> apet.Example:
    return apet.Example((text,), text, target, -1, (target,))


@torch.no_grad()
def by_hand(model: torch.nn.Module, tokenizer: object, text: str, target: str) -> float:
    """Log-probability of the target's tokens and of the end, in one forward without padding."""
    source = tokenizer(f"Input: {text} Output:").input_ids
    written = [*tokenizer(f" {target}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    logp = model(torch.tensor([source + written])).logits[0].log_softmax(-1)
    return sum(logp[len(source) - 1 + i, token].item() for i, token in enumerate(written))


@pytest.mark.parametrize("name", CAUSAL)
def test_label_scores_and_loss_of_a_causal_model_are_those_of_the_target_alone_whatever_the_padding(world, name):
    model, tokenizer, coder = local(world, name)
    words = ("negative", "not_equivalent", "no")
    sources = [coder.source(example(q)) for q in QUESTIONS]
    assert len({len(s) for s in sources}) == len(sources)  # else nothing would be padded
    expected = torch.tensor([[by_hand(model, tokenizer, q, w) for w in words] for q in QUESTIONS])
    batched = apet.label_scores(model, coder, sources, words, "cpu")
    single = torch.cat([apet.label_scores(model, coder, [s], words, "cpu") for s in sources])
    assert torch.allclose(batched, expected, atol=2e-4) and torch.allclose(single, expected, atol=2e-4)
    assert expected.std() > 1  # it matters

    targets = ["the book", "boring", "no", "a very long story of the movie"]  # of different lengths, one is cut
    batch = coder.batch(sources, [coder.written(t) for t in targets], "cpu")
    with torch.no_grad():
        loss = -apet.token_logp(model, coder, batch).sum().item()
    cut = [tokenizer.decode(coder.written(t)[:-1]).strip() for t in targets]
    assert loss == pytest.approx(-sum(by_hand(model, tokenizer, q, t) for q, t in zip(QUESTIONS, cut, strict=True)), abs=1e-3)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_text_of_a_causal_model_is_the_same_in_a_batch_one_by_one_and_by_hand(world, name):
    model, tokenizer, coder = local(world, name)
    examples = [example(q) for q in QUESTIONS]
    data = apet.Data("t", (), "squad", examples, [], examples, {})
    expected = []
    for question in QUESTIONS:
        ids = tokenizer(f"Input: {question} Output:").input_ids
        start = len(ids)
        while len(ids) < start + coder.max_target and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    for size in (4, 3, 1):
        assert apet.predict(model, coder, data, examples, size, "cpu") == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", [*CAUSAL, T5, BERT])
def test_with_a_soft_prompt_a_batch_gives_what_its_rows_give_alone(world, name):
    model, _, coder = local(world, name)
    coder.max_source = 32
    if name == "someone/gpt2":  # 96 places: not enough for 100 more tokens
        model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight.repeat(3, 1))
    examples, words = [example(q) for q in QUESTIONS], ("negative", "positive")
    sources = [coder.source(e) for e in examples]
    torch.manual_seed(0)
    before = apet.label_scores(model, coder, sources, words, "cpu")
    apet.insert(apet.base_of(model), ["prompt"])
    batched = apet.label_scores(model, coder, sources, words, "cpu")
    single = torch.cat([apet.label_scores(model, coder, [s], words, "cpu") for s in sources])
    assert torch.allclose(batched, single, atol=2e-4) and not torch.allclose(batched, before, atol=0.01)
    if name != BERT:
        data = apet.Data("t", (), "squad", examples, [], examples, {})
        assert apet.predict(model, coder, data, examples, 4, "cpu") == apet.predict(model, coder, data, examples, 1, "cpu")
        model.eval()  # predict leaves it in training mode
    apet.base_of(model).inserted.undo()
    assert torch.equal(apet.label_scores(model, coder, sources, words, "cpu"), before)


def test_bert_reads_two_texts_as_two_segments_whatever_the_padding(world):
    model, tokenizer, coder = local(world, BERT)
    pairs = [(QUESTIONS[0], "no"), (QUESTIONS[1], QUESTIONS[2])]
    batched = apet.label_scores(model, coder, [coder.source(apet.Example(p, "", "", 0, ())) for p in pairs], ("a", "b"), "cpu")
    with torch.no_grad():
        expected = torch.cat([model(**tokenizer(*p, return_tensors="pt")).logits for p in pairs])
    assert torch.allclose(batched, expected, atol=1e-5)


# A hub that is not as it should be ------------------------------------------------------------------------------------

OF_MODEL = ["--model", "t5-large", *SMALL]
OF_DATA = ["--model", T5, "--task", "someone/reviews:long", "--text-fields", "body", "--label-field", "stars", *SMALL]


@pytest.mark.parametrize("mode, seconds", [("down", 5), ("silent", 5), ("deaf", 5), ("error", 5), ("cut", 20)])
def test_a_hub_that_fails_is_one_line_within_seconds_and_the_same_command_works_afterwards(world, mode, seconds):
    with world.cold():
        with world.hub.behaves(mode):
            model, data = world.run(OF_MODEL, OF_DATA, apart=True)
        known = "work offline" if mode in ("down", "silent", "deaf") else "can't"
        refused(model, "the model google-t5/t5-large", known)
        refused(data, "the data set someone/reviews", known)
        assert model.seconds < seconds and data.seconds < seconds
        if mode == "cut":
            for outcome in world.run(OF_MODEL, OF_DATA):
                assert outcome.status == 0, outcome.error


UNKNOWN = {
    "model": (["--model", "nobody/nothing"], "the model nobody/nothing"),
    "data set": (["--model", T5, "--task", "nobody/nothing"], "the data set nobody/nothing"),
    "file": (["--model", T5, "--task", "someone/broken"], "the data set someone/broken"),
    "configuration": (["--model", T5, "--task", "someone/reviews:medium"], "someone/reviews"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_the_hub_does_not_have_or_holds_broken_is_one_line(world, case):
    argv, said = UNKNOWN[case]
    (outcome,) = world.run([*argv, *SMALL])
    line = refused(outcome, said)
    if case == "configuration":
        assert "medium" in line and "long" in line and "short" in line  # what would be right
    assert "offline" not in line and outcome.seconds < 10


def test_with_a_complete_cache_a_hub_that_is_down_is_not_missed(world, cells):
    chosen = [
        (T5, "sst2"),
        (T5, "imdb"),
        (T5, "rotten_tomatoes"),
        (T5, "samsum"),
        (T5, "multi_news"),
        (BLOOM, "nq_open"),
        (BERT, "mnli"),
    ]
    with world.hub.behaves("down"):
        again = world.run(*(["--model", m, "--task", t, *SMALL] for m, t in chosen))
    for key, outcome in zip(chosen, again, strict=True):
        assert outcome.status == 0, f"{key}: {outcome.error}"
        assert numbers(outcome.result) == numbers(cells[key].result) and outcome.calls == cells[key].calls
        for part in ("data", "model"):
            assert outcome.result[part] == cells[key].result[part]  # the commits, too


def test_the_script_itself_says_so_and_exits_with_status_2_or_0(world, cells, tmp_path):
    """Not the driver: `python apet.py`, with a hub that is down and nothing in the cache, and offline with all in it."""
    script = [sys.executable, str(ROOT / "apet.py"), "--model", T5, "--task", "sst2", *SMALL]
    with world.hub.behaves("down"):
        start = time.perf_counter()
        dead = subprocess.Popen(
            [*script, "--out", tmp_path / "a"], env=world.environment | {"HF_HOME": str(tmp_path / "home")}, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        error = dead.communicate(timeout=60)[1].strip()
        assert dead.returncode == 2 and error.startswith("apet: error: ") and "\n" not in error, error
        assert time.perf_counter() - start < 30  # imports on a busy machine included
    offline = world.environment | {"HF_HUB_OFFLINE": "1"}
    alive = subprocess.run([*script, "--out", tmp_path / "b"], env=offline, stderr=subprocess.PIPE, text=True)
    assert alive.returncode == 0, alive.stderr
    (file,) = (tmp_path / "b").glob("*.json")
    assert numbers(json.loads(file.read_text())) == numbers(cells[T5, "sst2"].result)
