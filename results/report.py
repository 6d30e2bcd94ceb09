"""Turns the result JSONs of apet.py into tables, figures and the statistics of the paper's three findings.

    python results/report.py FOLDER [FOLDER ...] [--out DIR]

reads every *.json below the folders (default: results/toy) and writes into DIR (default: the folder of this script) README.md,
where the part between two marker lines is replaced, report.csv, and scale, positions, budget and thresholds.png. With several
families of models there is one figure of each kind per family, as in budget-t5.png.
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image  # comes with matplotlib

BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
METHODS, HEAD = ("full", "adapter", "lora", "bitfit", "prompt"), "head alone"  # the last: method none of an encoder
SETTING = (
    "steps", "batch_size", "grad_accum", "train_size", "eval_size", "eval_every", "pool", "dropout", "max_source_length",
    "max_target_length", "dtype", "freeze_head", "text_fields", "label_field",
)  # fmt: skip
PAPER, BOOTSTRAP, PERMUTATIONS, FLOOR, ALIKE = "Su et al. 2023", 1_000, 10_000, 1e-3, 10
VERDICTS = ("**Contradicts the paper:**", "Agrees with the paper:", "Undecided:", "Beside it, no claim of the paper:")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # Okabe & Ito, without the yellow
MARKERS, LINES = "os^DvPX<>*h", ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))

COLUMNS = (
    "model", "total_params", "task", "method", "mask", "budget", "runs", "position_seeds", "mean", "sd", "min", "max",
    "random_guess", "majority", "full_mean",
)  # fmt: skip
TEXT = """
## Report

Made by results/report.py from the JSON files. Scores are mean ± sd (seeds): position seeds of APET, training seeds of the others.

### What was read

{read}
Missing:

{missing}
### Methods

APET stands beside them at a method's number of scalars or, without such runs, at the budget measured most.

{methods}### APET by budget

{budgets}### Structure of the positions

{structure}
### Thresholds

{thresholds}
- Low threshold: the smallest budget at which the mean over positions is above random guess g at p < 0.01, one-sided: at least
  g + 2.326·sqrt(g(1-g)/n), n the rows of the reported split, which all seeds share; g(1-g) bounds the variance of any score in
  [0, 1].
- High threshold: the smallest budget at which the mean is at least f - max(sd of full over training seeds, sqrt(h(1-h)/n)), f the
  mean of full fine-tuning, h = (nf+2)/(n+4).
- Between measured budgets the mean is linear in log10(budget). `<=`: the smallest budget passes; `>`: the largest does not.
- [a, b]: 90 % percentile bootstrap over position seeds and full's training seeds, 1,000 draws; none where a budget beside the
  threshold has fewer than 2 position seeds.

### The three findings of the paper (Su et al. 2023)

{findings}
Spread of the found thresholds over tasks, largest to smallest and sd in decades:

{spreads}
- Slopes: of log10(y) on log10(parameters) among models of one family, y the sd (below 0.001 it counts as 0.001) or the threshold.
  p: y shuffled over the scales within each line, 10,000 times. Lines count as independent: p is too small where tasks or budgets
  move together. Decided at p < 0.05: falling one-sided, rising two-sided.
- At random guess and at the ceiling the sd is small whatever the scale. Hence the second sentence on it: only scales whose mean
  lies strictly between the levels of the low and the high threshold.

{figures}
"""


class Group(NamedTuple):
    """Runs that differ in seeds alone. scores: APET, a mean per position seed; other methods, a score per training seed."""

    model: str
    total: int
    task: str
    method: str
    mask: str | None
    budget: int
    label: str  # the budget in words: a number, or what it was called ("lora", "0.1%") when the number depends on the model
    scores: np.ndarray
    positions: int
    runs: int
    guess: float
    majority: float
    rows: int
    metric: str


class Threshold(NamedTuple):
    """A budget; mark: '' found, '<=' the smallest measured one passes, '>' the largest does not, or why there is none."""

    value: float
    mark: str
    low: float
    high: float
    smallest: float
    largest: float

    def text(self) -> str:
        if self.mark not in ("", "<=", ">"):
            return self.mark
        interval = "" if math.isnan(self.low) else f" [{self.end(self.low)}, {self.end(self.high)}]"
        return f"{self.mark} {number(self.value)}".strip() + interval

    def end(self, x: float) -> str:
        return number(x) if math.isfinite(x) else f"> {number(self.largest)}" if x > 0 else f"<= {number(self.smallest)}"


def number(x: float) -> str:
    return f"{float(f'{x:.3g}'):,.0f}" if x >= 10 else f"{x:.3g}"


def family(model: str) -> str:
    """t5, bert, bloom or toy, where the name says so; else the name."""
    found = re.search(r"(?<![a-z])(toy|t5|bert|bloom)(?![a-z])", model.rsplit("/", 1)[-1].lower())
    return found[1] if found else model


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read(file: Path) -> dict | str:
    """A result of apet.py, or in a few words what else the file is."""
    try:
        r = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return "broken JSON"
    try:
        a = r["arguments"]
        words = [a["model"], a["task"], a["method"], r["device"], r["date"], r["apet_sha256"], r["metric"], *r["versions"].values()]
        counts = [r["total_params"], r["data"]["sizes"]["report"], r["tuned_params"] + 1]
        scores = [r["score"], r["baselines"]["random_guess"], r["baselines"]["majority"]]
        a["lr"], a["budget"], a["mask"], a["mask_seed"], a["seed"]
        good = all(isinstance(x, str) for x in words) and all(isinstance(x, int) and x > 0 for x in counts)
        return r if good and all(0 <= x <= 1 for x in scores) else "no result of apet.py"
    except (KeyError, TypeError, AttributeError, IndexError):
        return "no result of apet.py"


def choose(results: list[dict]) -> tuple[list[dict], list[str]]:
    """The runs that may be compared, and a line for each reason why others may not."""
    notes = []

    def keep(runs: list[dict], good: Callable[[dict], bool], why: str) -> list[dict]:
        out = [r for r in runs if good(r)]
        notes.extend([f"{len(runs) - len(out)} left out: {why}"] * (len(out) < len(runs)))
        return out

    def trained(r: dict) -> bool:
        return not r["arguments"].get("load") and (r["arguments"]["method"] != "none" or r.get("head_trained", False))

    runs = keep(results, trained, "nothing was trained")
    runs = keep(runs, lambda r: r["arguments"]["lr"] in ("auto", None), "an explicit learning rate")
    for names, wanted in ((SETTING, lambda a: True), (("where", "insert"), lambda a: a["method"] == "apet")):
        counts = Counter((r["arguments"]["task"], setting(r["arguments"], names)) for r in runs if wanted(r["arguments"]))
        most = dict(reversed([key for key, _ in counts.most_common()]))
        odd = {f"{t} {n} {x}" for t, s in counts for n, x, usual in zip(names, s, most[t], strict=True) if x != usual}
        same = {id(r) for r in runs for a in [r["arguments"]] if not wanted(a) or setting(a, names) == most[a["task"]]}
        runs = keep(runs, lambda r, same=same: id(r) in same, f"not the task's usual setting ({', '.join(sorted(odd))})")
    newest = {}
    for r in sorted(runs, key=lambda r: r["date"]):
        a = r["arguments"]
        newest[a["model"], a["task"], a["method"], a["mask"], r["tuned_params"], a["mask_seed"], a["seed"]] = r
    kept = {id(r) for r in newest.values()}
    return keep(runs, lambda r: id(r) in kept, "run again later with the same arguments"), notes


def setting(arguments: dict, names: Iterable[str]) -> tuple[str, ...]:
    defaults = {"pool": "cls", "grad_accum": 1, "freeze_head": False}
    return tuple(str(arguments.get(name, defaults.get(name))) for name in names)


def collect(runs: list[dict]) -> list[Group]:
    """Groups by family, scale, task, method, mask and number of tuned scalars."""
    found = defaultdict(list)
    for r in runs:
        a = r["arguments"]
        found[a["model"], r["total_params"], a["task"], a["method"], a["mask"], r["tuned_params"]].append(r)
    groups = []
    for (model, total, task, method, mask, budget), rs in found.items():
        seeds = defaultdict(list)
        for r in rs:
            seeds[r["arguments"]["mask_seed" if method == "apet" else "seed"]].append(r["score"])
        named = [str(r["arguments"]["budget"]) for r in rs]
        plain = method != "apet" or any(re.fullmatch(r"[\d_.]+(e\+?\d+)?", x.lower()) for x in named)
        scores = np.array([np.mean(seeds[s]) for s in sorted(seeds, key=str)])
        base, rows = rs[0]["baselines"], min(r["data"]["sizes"]["report"] for r in rs)
        groups.append(
            Group(
                model, total, task, method, mask, budget, f"{budget:,}" if plain else named[0], scores,
                len(seeds) if method == "apet" else 0, len(rs), base["random_guess"], base["majority"], rows, rs[0]["metric"],
            )
        )  # fmt: skip
    return sorted(groups, key=lambda g: (family(g.model), g.total, g.model, g.task, g.method, str(g.mask), g.budget))


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def spread(scores: np.ndarray) -> float:
    """Standard deviation, sqrt(sum (x - mean)^2 / (n - 1)); NaN for fewer than two."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan


def low_level(guess: float, rows: int) -> float:
    """g + 2.326 sqrt(g (1 - g) / n): what random guessing exceeds on n rows with a chance of 1 %."""
    return guess + 2.326 * math.sqrt(guess * (1 - guess) / rows)


def high_level(full: np.ndarray, rows: int) -> float:
    """f - max(sd, sqrt(g (1 - g) / n)): full fine-tuning's mean f less its spread over training seeds or n rows.

    g = (n f + 2) / (n + 4), so that a perfect score has a spread, too (Agresti & Coull, 1998).
    """
    f = float(np.mean(full))
    g = (rows * f + 2) / (rows + 4)
    return f - max(np.nan_to_num(spread(full)), math.sqrt(g * (1 - g) / rows))


def crossing(x: np.ndarray, means: np.ndarray, level: float) -> float:
    """The first x at which means, joined by lines, reach level; -inf if the first does, inf if none does."""
    i = next((i for i, m in enumerate(means) if m >= level - 1e-12), None)
    if not i:
        return math.inf if i is None else -math.inf
    return x[i - 1] + (x[i] - x[i - 1]) * (level - means[i - 1]) / (means[i] - means[i - 1])


def threshold(apet: list[Group], full: Group | None, kind: str) -> Threshold:
    """The low or high threshold of one model and task, with a 90 % bootstrap interval.

    Budget 10^x where x is the crossing of the mean score, linear in log10(budget), with low_level or high_level. Each of the
    1,000 draws takes as many position seeds of each budget (and training seeds of full) as there are, with replacement.
    """
    nothing = Threshold(math.nan, "no full run", math.nan, math.nan, math.nan, math.nan)
    if kind == "high" and full is None:
        return nothing
    level = low = low_level(apet[0].guess, apet[0].rows)
    if kind == "high":
        level = high_level(full.scores, full.rows)
        if full.scores.mean() < low:
            return nothing._replace(mark="full at random guess")
    x = np.log10([g.budget for g in apet])
    at = crossing(x, np.array([g.scores.mean() for g in apet]), level)
    i = len(apet) - 1 if at == math.inf else int((x >= at).argmax())
    beside = apet[i - math.isfinite(at) : i + 1]
    ends = (math.nan, math.nan)
    if min(len(g.scores) for g in beside) >= 2:
        rng = np.random.default_rng(0)

        def redraw(scores: np.ndarray) -> np.ndarray:
            return scores[rng.integers(0, len(scores), (BOOTSTRAP, len(scores)))]

        means = np.stack([redraw(g.scores).mean(1) for g in apet], 1)
        levels = [high_level(f, full.rows) for f in redraw(full.scores)] if kind == "high" else [level] * BOOTSTRAP
        draws = sorted(crossing(x, m, v) for m, v in zip(means, levels, strict=True))
        ends = tuple(10**d if math.isfinite(d) else d for d in (draws[BOOTSTRAP // 20], draws[-1 - BOOTSTRAP // 20]))
    smallest, largest = float(apet[0].budget), float(apet[-1].budget)
    mark, value = ("<=", smallest) if at == -math.inf else (">", largest) if at == math.inf else ("", 10**at)
    return Threshold(value, mark, *ends, smallest, largest)


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares: sum (x - mean x) y / sum (x - mean x)^2, for each row of y."""
    d = x - x.mean()
    return (y * d).sum(-1) / (d * d).sum()


def permutation(lines: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Mean slope of the lines, one-sided p (falling) and two-sided p, from shuffling each line's y over its x.

    p = (1 + number of the 10,000 shuffles with a mean slope at most the observed one) / 10,001; two-sided: of absolute values.
    """
    rng = np.random.default_rng(0)
    seen = float(np.mean([slope(x, y) for x, y in lines]))
    draws = sum(slope(x, rng.permuted(np.tile(y, (PERMUTATIONS, 1)), axis=1)) for x, y in lines) / len(lines)
    one, two = (draws <= seen + 1e-12).sum(), (abs(draws) >= abs(seen) - 1e-12).sum()
    return seen, float(1 + one) / (PERMUTATIONS + 1), float(1 + two) / (PERMUTATIONS + 1)


def trend(what: str, points: dict[object, list[tuple[int, float]]], lines_are: str) -> tuple[int, str]:
    """Verdict (index in VERDICTS) and sentence on whether y falls with scale within the lines."""
    lines = [(np.log10([p[0] for p in ps]), np.log10([p[1] for p in ps])) for ps in points.values() if len({p[0] for p in ps}) > 1]
    if not lines:
        return 2, f"{what}: no {lines_are} has what it takes at two scales."
    seen, one, two = permutation(lines)
    least = 1 / math.prod(math.factorial(len(x)) for x, _ in lines)
    verdict = 0 if seen > 0 and two < 0.05 else 1 if seen < 0 and one < 0.05 else 2
    return verdict, (
        f"{what}: mean slope {seen:+.3f} decades per decade of parameters over {len(lines)} ({lines_are}), "
        f"{sum(slope(x, y) < 0 for x, y in lines)} of {len(lines)} falling; p = {one:.4f} one-sided (falling), {two:.4f} two-sided"
        + (f"; these few points allow no one-sided p below {least:.2g}." if least > 0.05 else ".")
    )


def similar(by_model: dict[str, list[Threshold]]) -> tuple[int, str]:
    """Finding 3: are the low thresholds of a model's tasks within a factor of 10, by the ends of their intervals?"""
    apart, together = [], 0
    by_model = {model: found for model, found in by_model.items() if len(found) > 1}
    for model, found in by_model.items():
        lows = [
            {"<=": 0.0, ">": t.largest}.get(t.mark, math.nan) if math.isnan(t.low) else np.clip(t.low, 0, t.largest) for t in found
        ]
        highs = [
            {"<=": t.smallest, ">": math.inf}.get(t.mark, math.nan) if math.isnan(t.high) else max(t.high, t.smallest)
            for t in found
        ]
        if not (np.isnan(lows).all() or np.isnan(highs).all()) and np.nanmax(lows) > ALIKE * np.nanmin(highs):
            apart.append(model)
        together += bool(np.max(highs) <= ALIKE * np.min(lows))
    n = len(by_model)
    verdict = 0 if apart else 1 if n and together == n else 2
    return verdict, (
        f"low thresholds of a model's tasks ({PAPER} give no number for similar; here: 90 % intervals within a factor of {ALIKE}): "
        f"of {n} models with two tasks or more, {together} have them within it, {len(apart)} apart by more "
        f"{'(' + ', '.join(apart) + ') ' if apart else ''}and {n - together - len(apart)} can't be decided."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def cell(group: Group | None) -> str:
    if group is None:
        return ""
    sd = f" ± {spread(group.scores):.3f}" if len(group.scores) > 1 else ""
    return f"{group.scores.mean():.3f}{sd} ({len(group.scores)})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |\n" for row in (head, *rows)]
    return "".join([lines[0], "|" + "---|" * len(head) + "\n", *lines[1:]]) if rows else "Nothing to show.\n"


def bullets(items: Iterable[str]) -> str:
    return "".join(
        textwrap.fill(f"- {x}", 132, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) + "\n" for x in items
    )


def ordered(labels: Iterable[str]) -> list[str]:
    """Numbers by size, then names."""
    return sorted(set(labels), key=lambda s: (0, int(s.replace(",", "")), s) if s.replace(",", "").isdigit() else (1, 0, s))


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))


def by_task(groups: list[Group], column: Callable[[Group], str], columns: list[str]) -> str:
    """A table for each task: a row per model, by scale."""
    text = ""
    for task in sorted({g.task for g in groups}):
        here = [g for g in groups if g.task == task]
        cells = {(g.model, g.total, column(g)): g for g in here}
        used = [c for c in columns if any(key[2] == c for key in cells)]
        rows = [[m, f"{n:,}", *(cell(cells.get((m, n, c))) for c in used)] for m, n in unique(g[:2] for g in here)]
        text += f"{task} ({here[0].metric}; random guess {here[0].guess:.3f}, majority {here[0].majority:.3f})\n\n"
        text += table(["model", "parameters", *used], rows) + "\n"
    return text or "Nothing to show.\n\n"


def compared(main: list[Group]) -> list[str]:
    """APET's budgets to set beside other methods: those named after one; else the one most often measured (the largest of them)."""
    count = Counter(g.label for g in main if g.method == "apet")
    named = [label for label in METHODS if label in count]
    return named or sorted(count, key=lambda label: (-count[label], -ordered(count).index(label)))[:1]


def missing(main: list[Group]) -> list[str]:
    """A line for each set of models and tasks that lacks the same runs."""
    gaps = defaultdict(lambda: defaultdict(list))
    seeds = Counter(g.positions for g in main if g.method == "apet")
    usual = max(seeds, key=lambda n: (seeds[n], n), default=0)
    for kin in sorted({family(g.model) for g in main}):
        mine = [g for g in main if family(g.model) == kin]
        for (model, total), task in itertools.product(unique((g.model, g.total) for g in mine), sorted({g.task for g in mine})):
            here = [g for g in mine if (g.model, g.total, g.task) == (model, total, task)]
            absent = [m for m in METHODS if all(g.method != m for g in here)]
            seen = [g for g in main if g.method == "apet" and g.task == task and (not g.label[0].isdigit() or g.budget <= total)]
            budgets = ordered({g.label for g in seen} - {g.label for g in here if g.method == "apet"})
            few = defaultdict(list)
            for g in here:
                few[g.positions].extend([g.label] * (g.method == "apet" and g.positions < usual))
            lacks = ["no run"] if not here else [f"no {', '.join(absent)}"] * bool(absent)
            lacks += [f"no APET at {' · '.join(budgets)}"] * bool(here and budgets)
            lacks += [f"{n} of {usual} position seeds at {' · '.join(labels)}" for n, labels in sorted(few.items()) if labels]
            for lack in lacks:
                gaps[lack][task].append(model)
    lines = []
    for lack, tasks in gaps.items():
        same = defaultdict(list)
        for task, models in tasks.items():
            same[", ".join(models)].append(task)
        lines += [f"{models} on {', '.join(names)}: {lack}" for models, names in same.items()]
    return lines[:20] + [f"and {len(lines) - 20} more"] * (len(lines) > 20)


def read_lines(runs: list[dict], notes: list[str]) -> list[str]:
    def each(key: Callable[[dict], str], some: Iterable[dict] = runs) -> str:
        return ", ".join(sorted({key(r) for r in some}))

    settings = defaultdict(list)
    for r in runs:
        settings[setting(r["arguments"], SETTING)].append(r)
    return [
        f"{len(runs)} runs: {each(lambda r: r['arguments']['model'])}; tasks {each(lambda r: r['arguments']['task'])}",
        f"{min(r['date'] for r in runs)} to {max(r['date'] for r in runs)}; machine: {each(lambda r: r['device'])}",
        f"versions: {each(lambda r: ' '.join(f'{k} {v}' for k, v in r['versions'].items()))}",
        f"apet.py (SHA-256): {each(lambda r: r['apet_sha256'][:8])}",
        *notes,
        *(
            f"setting of {each(lambda r: r['arguments']['task'], some)}: "
            + ", ".join(f"{n} {x}" for n, x in zip(SETTING, values, strict=True) if x != "None")
            for values, some in settings.items()
        ),
    ]


def report(runs: list[dict], groups: list[Group], found: dict, notes: list[str], figures: list[str]) -> str:
    """The text between the markers."""
    main = [g for g in groups if g.mask in (None, "random")]
    apet = [g for g in main if g.method == "apet"]
    methods = by_task(
        main,
        lambda g: f"APET, {g.label}" if g.method == "apet" else HEAD if g.method == "none" else g.method,
        [*METHODS, HEAD, *(f"APET, {x}" for x in compared(main))],
    )
    cells = {(g.model, g.task, g.budget, g.mask): g for g in groups if g.method == "apet"}
    masks = unique(["random", *sorted({key[3] for key in cells})])
    keys = [k for k in unique(key[:3] for key in cells) if sum(key[:3] == k for key in cells) > 1]
    structure = [[*k[:2], f"{k[2]:,}", *(cell(cells.get((*k, m))) for m in masks)] for k in keys]
    thresholds = [
        [m, f"{n:,}", t, *(found[m, n, t, kind].text() for kind in ("low", "high"))] for m, n, t in unique(k[:3] for k in found)
    ]
    spreads = []
    for model, total in unique(k[:2] for k in found):
        row = [model, f"{total:,}"]
        for kind in ("low", "high"):
            x = [t.value for k, t in found.items() if (*k[:2], k[3]) == (model, total, kind) and t.mark == ""]
            row += [str(len(x)), *((f"{max(x) / min(x):.2f}", f"{spread(np.log10(x)):.2f}") if len(x) > 1 else ("", ""))]
        spreads.append(row)
    sentences = [f"{VERDICTS[v]} {text}" for v, text in sorted(findings(main, found), key=lambda s: s[0])]
    return TEXT.format(
        read=bullets(read_lines(runs, notes)),
        missing=bullets(missing(main) or ["nothing"]),
        methods=methods,
        budgets=by_task(apet, lambda g: g.label, ordered(g.label for g in apet)),
        structure=table(["model", "task", "budget", *masks], structure),
        thresholds=table(["model", "parameters", "task", "low", "high"], thresholds),
        findings=bullets(sentences),
        spreads=table(["model", "parameters", "low: tasks", "max/min", "sd", "high: tasks", "max/min", "sd"], spreads),
        figures="\n".join(f"![{Path(f).stem}]({f})" for f in figures),
    ).strip()


def findings(main: list[Group], found: dict[tuple, Threshold]) -> list[tuple[int, str]]:
    """Verdict and sentence for each finding; 1 twice, with and without the scales at random guess or at the ceiling."""
    every, between = defaultdict(list), defaultdict(list)
    for g in main:
        if g.method == "apet" and g.positions >= 3:
            key, point = (family(g.model), g.task, g.budget), (g.total, max(spread(g.scores), FLOOR))
            every[key].append(point)
            if in_between(g, main):
                between[key].append(point)
    out = [
        trend("1, sd over positions against scale", every, "budget of a task and family with 3 position seeds or more"),
        trend("1, the same where the mean lies between random guess and full", between, "budget of a task and family"),
    ]
    for kind, name in (("high", "2, high threshold against scale"), ("low", "3, low threshold against scale")):
        points, gone = defaultdict(list), 0
        for (model, total, task, what), t in found.items():
            if what == kind and t.mark == "":
                points[family(model), task].append((total, t.value))
            gone += what == kind and t.mark != ""
        verdict, text = trend(name, points, "task of a family")
        text += f" {gone} thresholds beyond the measured budgets or without a usable full run are left out." if gone else ""
        out.append((verdict, text) if kind == "high" else (3, text))
    by_model = defaultdict(list)
    for (model, _, _, what), t in found.items():
        by_model[model].extend([t] * (what == "low"))
    verdict, text = similar(by_model)
    return [*out[:3], (verdict, f"3, {text}"), out[3]]


def in_between(g: Group, main: list[Group]) -> bool:
    """Whether the mean lies strictly between the levels of the low and the high threshold."""
    full = next((f for f in main if f.method == "full" and f[:3] == g[:3]), None)
    return full is not None and low_level(g.guess, g.rows) < g.scores.mean() < high_level(full.scores, full.rows)


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def style(i: int) -> dict:
    """The i-th colour, marker and line style: 7, 11 and 5 of them, so no two of 385 lines share all three."""
    return {"color": COLOURS[i % 7], "marker": MARKERS[i % 11], "linestyle": LINES[i % 5], "markersize": 5, "linewidth": 1.4}


def panels(titles: list[str], x: str, y: str, xs: list[int]) -> tuple[plt.Figure, list[plt.Axes]]:
    """A grid of at most three panels a row, with the same limits of x."""
    columns = min(len(titles), 3)
    rows = math.ceil(len(titles) / columns)
    size = (max(4.6, 2.7 * columns), 2.3 * rows + 1)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(titles) :]:
        ax.remove()
    for ax, title in zip(axes.flat, titles, strict=False):
        ax.set_title(title, fontsize=9)
        ax.set_xscale("log")
        ax.set_xlim(min(xs) / 1.4, max(xs) * 1.4)
        ax.tick_params(which="both", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure, list(axes.flat)[: len(titles)]


def finish(figure: plt.Figure, file: Path) -> str:
    """Write it, the legend above the panels; returns the file's name."""
    handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False, handlelength=3.2)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    Image.open(picture).convert("RGB").quantize(64).save(file, optimize=True)  # a quarter of the bytes
    plt.close(figure)
    return file.name


def draw(main: list[Group], found: dict[tuple, Threshold], out: Path, suffix: str) -> list[str]:
    """The figures of one family; those without data are left out."""
    tasks, models = sorted({g.task for g in main}), unique(g[:2] for g in main)
    apet = [g for g in main if g.method == "apet"]
    scores = ", ".join(unique(g.metric for g in main))
    totals, names = [n for _, n in models], []
    figure, axes = panels(tasks, "parameters of the model", scores, totals)
    lines = [(m, style(i)) for i, m in enumerate(METHODS)]
    lines += [(f"APET, {x}", style(METHODS.index(x) if x in METHODS else 5) | {"markerfacecolor": "white"}) for x in compared(main)]
    for ax, task in zip(axes, tasks, strict=True):
        here = [g for g in main if g.task == task]
        for name, look in lines:
            line = [g for g in here if (f"APET, {g.label}" if g.method == "apet" else g.method) == name]
            ax.plot([g.total for g in line], [g.scores.mean() for g in line], label=name, **look) if line else None
        ax.axhline(here[0].guess, linestyle=":", color="0.4", label="random guess")
    names.append(finish(figure, out / f"scale{suffix}.png"))
    labels = [label for label in ordered(g.label for g in apet) if any(g.label == label and g.positions > 1 for g in apet)]
    if labels:
        figure, axes = panels(tasks, "parameters of the model", "sd over positions (filled: between levels)", totals)
        for ax, task in zip(axes, tasks, strict=True):
            ax.set_yscale("log")
            ax.sharey(axes[0]) if ax is not axes[0] else None
            for i, label in enumerate(labels):
                line = [g for g in apet if (g.task, g.label) == (task, label) and g.positions > 1]
                y = [max(spread(g.scores), FLOOR) for g in line]
                ax.plot([g.total for g in line], y, label=f"budget {label}", **style(i) | {"markerfacecolor": "white"})
                inside = [(g.total, v) for g, v in zip(line, y, strict=True) if in_between(g, main)]
                ax.plot(*zip(*inside, strict=True), **style(i) | {"linestyle": "none"}) if inside else None
        names.append(finish(figure, out / f"positions{suffix}.png"))
    if apet:
        figure, axes = panels(tasks, "budget (tuned scalars)", f"{scores} (thin: full fine-tuning)", [g.budget for g in apet])
        for ax, task in zip(axes, tasks, strict=True):
            for i, model in enumerate(models):
                line = [g for g in apet if (*g[:2], g.task) == (*model, task)]
                full = [g for g in main if g.method == "full" and g[:3] == (*model, task)]
                if line:
                    bars = [np.nan_to_num(spread(g.scores)) for g in line]
                    ax.errorbar(
                        [g.budget for g in line], [g.scores.mean() for g in line], bars, capsize=2, label=model[0], **style(i)
                    )
                if full:
                    ax.axhline(full[0].scores.mean(), color=COLOURS[i % 7], linestyle=LINES[i % 5], linewidth=0.8)
                for head in [g for g in main if g.method == "none" and g[:3] == (*model, task)]:
                    ax.axhline(head.scores.mean(), color="0.4", linestyle="-.", linewidth=0.8, label=HEAD)
            ax.axhline(next(g.guess for g in main if g.task == task), linestyle=":", color="0.4", label="random guess")
        names.append(finish(figure, out / f"budget{suffix}.png"))
    usable = [(k, t) for k, t in found.items() if t.mark in ("", "<=", ">") and k[:2] in models]
    if usable:
        figure, axes = panels(["low threshold", "high threshold"], "parameters of the model", "budget (tuned scalars)", totals)
        for ax, kind in zip(axes, ("low", "high"), strict=True):
            ax.set_yscale("log")
            for i, task in enumerate(tasks):
                line = [(k[1] * 1.06 ** (i - len(tasks) / 2), t) for k, t in usable if k[2:] == (task, kind)]
                inside = [(x, t) for x, t in line if t.mark == ""]
                ax.plot([x for x, _ in inside], [t.value for _, t in inside], label=task, **style(i))
                for x, t in line:
                    if not math.isnan(t.low):
                        ax.plot([x, x], np.clip([t.low, t.high], t.smallest, t.largest), color=COLOURS[i % 7], linewidth=1)
                    if t.mark:
                        ax.plot(x, t.value, **style(i) | {"markerfacecolor": "white", "linestyle": "none"})
                        sign = "≤" if t.mark == "<=" else ">"
                        ax.annotate(sign, (x, t.value), (4, 0), textcoords="offset points", fontsize=8, va="center")
        names.append(finish(figure, out / f"thresholds{suffix}.png"))
    return names


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def with_report(old: bytes, text: str) -> bytes:
    """The README with the text between its marker lines, all else byte for byte; markers are appended when there are none."""
    begins, ends = ([*re.finditer(rb"(?m)^" + mark.encode() + rb"\r?$", old)] for mark in (BEGIN, END))
    new = f"{BEGIN}\n\n{text}\n\n{END}".encode()
    if not begins and not ends:
        return old + b"\n" * ((not old.endswith(b"\n")) + 1 if old else 0) + new + b"\n"
    if len(begins) != 1 or len(ends) != 1 or ends[0].start() < begins[0].end():
        raise ValueError(f"wants one line {BEGIN} and below it one line {END}, or neither")
    return old[: begins[0].start()] + new + old[ends[0].start() + len(END) :]


def to_csv(groups: list[Group]) -> str:
    """One row a group; empty where a number does not exist."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(COLUMNS)
    full = {g[:3]: g.scores.mean() for g in groups if g.method == "full"}
    for g in groups:
        numbers = [
            g.scores.mean(),
            spread(g.scores),
            g.scores.min(),
            g.scores.max(),
            g.guess,
            g.majority,
            full.get(g[:3], math.nan),
        ]
        shown = ["" if math.isnan(x) else round(float(x), 6) for x in numbers]
        rows.writerow([*g[:4], g.mask or "", g.budget, g.runs, g.positions, *shown])
    return file.getvalue()


def main(argv: list[str] | None = None) -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Tables, figures and statistics of apet.py's results.")
    parser.add_argument("folders", nargs="*", type=Path, default=[here / "toy"], metavar="FOLDER", help="default: results/toy")
    parser.add_argument(
        "--out", type=Path, default=here, metavar="DIR", help="for README.md, report.csv and the figures; default: results"
    )
    args = parser.parse_args(argv)
    files = sorted({file for folder in args.folders for file in folder.rglob("*.json")})
    results, skipped = [], []
    for file in files:
        r = read(file)
        results += [r] if isinstance(r, dict) else []
        skipped += [f"skipped {file.name}: {r}"] if isinstance(r, str) else []
    runs, notes = choose(results)
    if not runs:
        where = ", ".join(map(str, args.folders))
        print(f"report: no run of apet.py with --lr auto among the {len(files)} JSON files in {where}", file=sys.stderr)
        return 2
    groups = collect(runs)
    usual = [g for g in groups if g.mask in (None, "random")]
    found = {}
    for key in unique(g[:3] for g in usual if g.method == "apet"):
        line = [g for g in usual if g.method == "apet" and g[:3] == key]
        full = next((g for g in usual if g.method == "full" and g[:3] == key), None)
        found |= {(*key, kind): threshold(line, full, kind) for kind in ("low", "high")}
    readme, figures = args.out / "README.md", []
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        old = readme.read_bytes() if readme.exists() else b""
        with_report(old, "")
        kin = unique(family(g.model) for g in usual)
        for name in kin:
            suffix = "-" + re.sub(r"[^\w.-]+", "_", name) if len(kin) > 1 else ""
            figures += draw([g for g in usual if family(g.model) == name], found, args.out, suffix)
        (args.out / "report.csv").write_text(to_csv(groups), encoding="utf-8")
        new = args.out / "README.md.new"
        new.write_bytes(with_report(old, report(runs, groups, found, notes + skipped, figures)))
        os.replace(new, readme)
    except (OSError, ValueError) as e:
        print(f"report: {readme}: {e}", file=sys.stderr)
        return 2
    print(f"{len(runs)} runs: {readme}, report.csv, {', '.join(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
