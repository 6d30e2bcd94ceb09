"""Tables, figures and the statistics of the paper's three findings, from results of apet.py.

    python results/report.py PATH ... [--out DIR]        the comparison of methods, budgets and scales (default: results/toy)
    python results/report.py PATH ... --rates            sweeps over the learning rate instead
    python results/report.py PATH ... --pack runs.jsonl  the runs themselves, a line each, in place of many files

A PATH is a folder, of which every *.json (one run, as apet.py writes it) and *.jsonl (one run a line) is read, or such a file.
DIR (default: beside the data, where the first PATH lies) gets report.md, report.csv, and scale, positions, budget and
thresholds.png. With several families of models there is one figure of each kind per family, as in budget-t5.png.
"""

import argparse
import csv
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

METHODS = ("full", "adapter", "lora", "bitfit", "prompt")
SETTING = (  # what runs of one task must share to be compared
    "steps", "batch_size", "grad_accum", "train_size", "eval_size", "eval_every", "pool", "dropout", "max_source_length",
    "max_target_length", "dtype", "freeze_head", "text_fields", "label_field",
)  # fmt: skip
BOOTSTRAP, PERMUTATIONS = 1_000, 10_000
FLOOR = 1e-3  # a smaller standard deviation counts as this one: its logarithm is needed
ALIKE = 10  # low thresholds within this factor count as similar
VERDICTS = ("**Contradicts the paper:**", "Agrees with the paper:", "Undecided:", "Beside it, no claim of the paper:")
CONTRADICTS, AGREES, UNDECIDED, NO_CLAIM = range(4)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # Okabe & Ito, without the yellow
MARKERS, LINES = "os^DvPX<>*h", ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
HOLLOW = {"markerfacecolor": "white"}

TEXT = """
# Report

Made by results/report.py; do not edit. Scores are mean ± standard deviation (number of seeds): position seeds of APET, training
seeds of the others.

## What was read

{read}
Missing:

{missing}
## Methods

APET stands beside them at a method's number of scalars or, without such runs, at the budget measured most.

{methods}## APET by budget

{budgets}## Structure of the positions

{structure}
## Thresholds

{thresholds}
- Low threshold: the smallest budget at which the mean over positions is above random guess g at p < 0.01, one-sided: at least
  g + 2.326·sqrt(g(1-g)/n), n the rows of the reported split, which all seeds share; g(1-g) bounds the variance of any score in
  [0, 1].
- High threshold: the smallest budget at which the mean is at least f - max(sd of full over training seeds, sqrt(h(1-h)/n)), f the
  mean of full fine-tuning, h = (nf+2)/(n+4).
- Between measured budgets the mean is linear in log10(budget). `<=`: the smallest budget passes; `>`: the largest does not.
- [a, b]: 90 % percentile bootstrap over position seeds and full's training seeds, 1,000 draws; none where a budget beside the
  threshold has fewer than 2 position seeds.

## The three findings of the paper (Su et al. 2023)

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
    runs: int
    rows: int
    guess: float
    majority: float
    metric: str

    @property
    def case(self) -> tuple[str, int, str]:
        return self[:3]  # model, its parameters, task

    @property
    def positions(self) -> int:
        return len(self.scores) if self.method == "apet" else 0

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    @property
    def sd(self) -> float:
        return spread(self.scores)

    @property
    def column(self) -> str:
        """The group's name in the tables and figures of methods."""
        return {"apet": f"APET, {self.label}", "none": "head alone"}.get(self.method, self.method)


class Threshold(NamedTuple):
    """A budget; mark: '' found, '<=' the smallest measured one passes, '>' the largest does not, or why there is none."""

    value: float
    mark: str
    low: float  # the ends of its interval: -inf and inf where it is open, NaN where there is none
    high: float
    smallest: float  # and largest: the budgets that were measured
    largest: float

    def text(self) -> str:
        if self.mark not in ("", "<=", ">"):
            return self.mark
        interval = "" if math.isnan(self.low) else f" [{self.end(self.low)}, {self.end(self.high)}]"
        return f"{self.mark} {number(self.value)}".strip() + interval

    def end(self, x: float) -> str:
        return number(x) if math.isfinite(x) else f"> {number(self.largest)}" if x > 0 else f"<= {number(self.smallest)}"

    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest budget that it may be; NaN where too few seeds were measured to say."""
        low, high = self.low, self.high
        if math.isnan(low) and self.mark:
            low = high = -math.inf if self.mark == "<=" else math.inf
        return float(np.clip(low, 0, self.largest)), float(np.maximum(high, self.smallest))


def number(x: float) -> str:
    return f"{float(f'{x:.3g}'):,.0f}" if x >= 10 else f"{x:.3g}"


def family(model: str) -> str:
    """t5, bert, bloom or toy, where the name says so; else the name."""
    found = re.search(r"(?<![a-z])(toy|t5|bert|bloom)(?![a-z])", model.rsplit("/", 1)[-1].lower())
    return found[1] if found else model


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))


# --- Reading ---


def read(paths: list[Path]) -> tuple[list[dict], list[str]]:
    """The runs in files and below folders, each with the name of its file, and a line for all else that is there."""
    found = {f for p in paths for f in ([p] if p.is_file() else [*p.rglob("*.json"), *p.rglob("*.jsonl")]) if f.is_file()}
    runs, notes = [], []
    for file in sorted(found):
        try:
            whole = file.read_bytes()
        except OSError as e:
            notes.append(f"skipped {file.name}: {e.strerror}")
            continue
        several, bad = file.suffix == ".jsonl", defaultdict(list)
        for n, text in enumerate(whole.splitlines() if several else [whole], 1):
            if several and not text.strip():
                continue
            run = parse(text)
            if isinstance(run, str):
                bad[run].append(n)
            else:
                runs.append({"name": file.stem, **run})
        for why, at in bad.items():
            where = f", line {at[0]}" + f" and {len(at) - 1:,} more" * (len(at) > 1)
            notes.append(f"skipped {file.name}{where * several}: {why}")
    return runs, notes


def parse(text: bytes) -> dict | str:
    """A result of apet.py, its loss curve to four digits, or in a few words what else the text is."""
    try:
        r = json.loads(text)
    except (ValueError, RecursionError):
        return "broken JSON"
    try:
        a = r["arguments"]
        words = [a["model"], a["task"], a["method"], r["device"], r["date"], r["apet_sha256"], r["metric"], *r["versions"].values()]
        words += [a["mask"]] if a["method"] == "apet" else []
        plain = [a["lr"], a["budget"], a["mask_seed"], a["seed"], r.get("lr"), r.get("head_trained")]
        counts = [r["total_params"], r["data"]["sizes"]["report"], r["tuned_params"] + (a["method"] == "none")]
        scores = [r["score"], r["baselines"]["random_guess"], r["baselines"]["majority"]]
        good = all(isinstance(x, str) for x in words) and all(x is None or isinstance(x, str | int | float) for x in plain)
        good = good and all(isinstance(x, int) and 0 < x < 1e15 for x in counts) and all(0 <= x <= 1 for x in scores)
        r["loss_curve"] = [float(f"{x:.4g}") for x in r.get("loss_curve", [])]
        return r if good else "no result of apet.py"
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError):
        return "no result of apet.py"


def pack(runs: list[dict], file: Path) -> int:
    """Write each run once, as a line of file; returns how many."""
    lines = sorted({json.dumps(r) + "\n" for r in runs})  # the name comes first
    new = file.with_name(file.name + ".new")
    new.write_text("".join(lines), encoding="utf-8")
    os.replace(new, file)
    return len(lines)


def flat(r: dict) -> dict:
    """A result on one level: its arguments, with defaults for what older ones lack, and of the rest what is needed here."""
    old = {"pool": "cls", "grad_accum": 1, "freeze_head": False}
    rest = {"rows": r["data"]["sizes"]["report"], "machine": r["device"], "rate": r.get("lr")}
    run = {**r, **r["baselines"], **old, **r["arguments"], **rest}
    return run | {"trained": not run.get("load") and (run["method"] != "none" or run.get("head_trained"))}


def setting(run: dict, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(run.get(name)) for name in names)


def choose(results: list[dict]) -> tuple[list[dict], list[str]]:
    """The runs that may be compared, and a line for each reason why others may not."""
    notes = []

    def keep(runs: list[dict], good: Callable[[dict], bool], why: str) -> list[dict]:
        out = [r for r in runs if good(r)]
        if len(out) < len(runs):
            notes.append(f"{len(runs) - len(out)} left out: {why}")
        return out

    def usual(runs: list[dict], names: tuple[str, ...]) -> list[dict]:
        """Those with the setting that most runs of their task have."""
        counts, most = Counter((r["task"], setting(r, names)) for r in runs), {}
        for (task, values), _ in counts.most_common():
            most.setdefault(task, values)
        odd = {f"{t} {n} {x}" for t, values in counts for n, x, y in zip(names, values, most[t], strict=True) if x != y}
        why = f"not the task's usual setting ({', '.join(sorted(odd))})"
        return keep(runs, lambda r: setting(r, names) == most[r["task"]], why)

    runs = keep(results, lambda r: r["trained"], "nothing was trained")
    runs = usual(keep(runs, lambda r: r["lr"] in ("auto", None), "an explicit learning rate"), SETTING)
    apet = usual([r for r in runs if r["method"] == "apet"], ("where", "insert"))
    runs = [r for r in runs if r["method"] != "apet"] + apet
    same = ("model", "task", "method", "mask", "tuned_params", "mask_seed", "seed")
    newest = {tuple(r[x] for x in same): id(r) for r in sorted(runs, key=lambda r: r["date"])}
    again = "run again later with the same arguments, or read twice"
    return keep(runs, lambda r: id(r) in newest.values(), again), notes


def collect(runs: list[dict]) -> list[Group]:
    """Groups by family, scale, task, method, mask and number of tuned scalars."""
    found, groups = defaultdict(list), []
    for r in runs:
        found[r["model"], r["total_params"], r["task"], r["method"], r["mask"], r["tuned_params"]].append(r)
    for key, rs in found.items():
        apet, seeds = key[3] == "apet", defaultdict(list)
        for r in rs:
            seeds[str(r["mask_seed" if apet else "seed"])].append(r["score"])
        scores = np.array([np.mean(seeds[s]) for s in sorted(seeds)])
        names = [str(r["budget"]) for r in rs]
        plain = not apet or any(re.fullmatch(r"[\d_.]+(e\+?\d+)?", x.lower()) for x in names)
        label = f"{key[-1]:,}" if plain else names[0]
        about = [rs[0][x] for x in ("random_guess", "majority", "metric")]
        groups.append(Group(*key, label, scores, len(rs), min(r["rows"] for r in rs), *about))
    return sorted(groups, key=lambda g: (family(g.model), g.total, g.model, g.task, g.method, str(g.mask), g.budget))


# --- Statistics ---


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


def in_between(g: Group, main: list[Group]) -> bool:
    """Whether the mean lies strictly between the levels of the low and the high threshold."""
    high = [high_level(f.scores, f.rows) for f in main if f.method == "full" and f.case == g.case]
    return bool(high) and low_level(g.guess, g.rows) < g.mean < high[0]


def crossing(x: np.ndarray, means: np.ndarray, level: float) -> float:
    """The first x at which means, joined by lines, reach level; -inf if the first does, inf if none does."""
    i = next((i for i, m in enumerate(means) if m >= level - 1e-12), None)
    if not i:
        return math.inf if i is None else -math.inf
    return x[i - 1] + (x[i] - x[i - 1]) * (level - means[i - 1]) / (means[i] - means[i - 1])


def threshold(apet: list[Group], full: Group | None, kind: str) -> Threshold:
    """Where the mean score, linear in log10(budget), crosses low_level or high_level, with a 90 % bootstrap interval.

    Each draw takes as many position seeds of each budget (and training seeds of full) as there are, with replacement.
    """
    smallest, largest = float(apet[0].budget), float(apet[-1].budget)
    level = low_level(apet[0].guess, apet[0].rows)
    if kind == "high":
        if full is None or full.mean < level:
            why = "no full run" if full is None else "full at random guess"
            return Threshold(math.nan, why, math.nan, math.nan, smallest, largest)
        level = high_level(full.scores, full.rows)
    x = np.log10([g.budget for g in apet])
    cross = crossing(x, np.array([g.mean for g in apet]), level)
    i = len(apet) - 1 if cross == math.inf else int((x >= cross).argmax())
    beside = apet[i - math.isfinite(cross) : i + 1]
    ends = (math.nan, math.nan)
    if min(len(g.scores) for g in beside) >= 2:
        rng = np.random.default_rng(0)

        def redraw(scores: np.ndarray) -> np.ndarray:
            return scores[rng.integers(0, len(scores), (BOOTSTRAP, len(scores)))]

        means = np.stack([redraw(g.scores).mean(1) for g in apet], 1)
        levels = [high_level(f, full.rows) for f in redraw(full.scores)] if kind == "high" else [level] * BOOTSTRAP
        draws = sorted(crossing(x, m, v) for m, v in zip(means, levels, strict=True))
        ends = tuple(10**d if math.isfinite(d) else d for d in (draws[BOOTSTRAP // 20], draws[-1 - BOOTSTRAP // 20]))
    value, mark = (10**cross, "") if math.isfinite(cross) else (largest, ">") if cross > 0 else (smallest, "<=")
    return Threshold(value, mark, *ends, smallest, largest)


def thresholds(main: list[Group]) -> dict[tuple, Threshold]:
    """By model, its parameters, task and kind ('low', 'high')."""
    apet, full = defaultdict(list), {g.case: g for g in main if g.method == "full"}
    for g in main:
        if g.method == "apet":
            apet[g.case].append(g)
    return {(*case, kind): threshold(line, full.get(case), kind) for case, line in apet.items() for kind in ("low", "high")}


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares: sum (x - mean x) y / sum (x - mean x)^2, for each row of y."""
    d = x - x.mean()
    return (y * d).sum(-1) / (d * d).sum()


def permutation(lines: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """Mean slope of the lines, and p for falling and two-sided: the part of shuffles of y over x whose mean slope is as extreme."""
    rng = np.random.default_rng(0)
    seen = float(np.mean([slope(x, y) for x, y in lines]))
    draws = sum(slope(x, rng.permuted(np.tile(y, (PERMUTATIONS, 1)), axis=1)) for x, y in lines) / len(lines)
    one, two = (draws <= seen + 1e-12).sum(), (abs(draws) >= abs(seen) - 1e-12).sum()
    return seen, float(1 + one) / (PERMUTATIONS + 1), float(1 + two) / (PERMUTATIONS + 1)


def trend(what: str, points: dict[object, list[tuple[int, float]]], lines_are: str) -> tuple[int, str]:
    """Verdict and sentence on whether y falls with scale within the lines."""
    lines = [(np.log10([p[0] for p in ps]), np.log10([p[1] for p in ps])) for ps in points.values() if len({p[0] for p in ps}) > 1]
    if not lines:
        return UNDECIDED, f"{what}: no {lines_are} has what it takes at two scales."
    seen, one, two = permutation(lines)
    least = 1 / math.prod(math.factorial(len(x)) for x, _ in lines)
    verdict = CONTRADICTS if seen > 0 and two < 0.05 else AGREES if seen < 0 and one < 0.05 else UNDECIDED
    return verdict, (
        f"{what}: mean slope {seen:+.3f} decades per decade of parameters over {len(lines)} ({lines_are}), "
        f"{sum(slope(x, y) < 0 for x, y in lines)} of {len(lines)} falling; p = {one:.4f} one-sided (falling), {two:.4f} two-sided"
        + (f"; these few points allow no one-sided p below {least:.2g}." if least > 0.05 else ".")
    )


def similar(found: dict[tuple, Threshold]) -> tuple[int, str]:
    """Finding 3: are the low thresholds of a model's tasks within a factor of 10, by the ends of their intervals?"""
    by_model = defaultdict(list)
    for (model, _, _, kind), t in found.items():
        if kind == "low":
            by_model[model].append(t.bounds())
    apart, together, n = [], 0, 0
    for model, bounds in by_model.items():
        lows, highs = np.array(bounds).T
        if len(bounds) > 1:
            n += 1
            together += bool(highs.max() <= ALIKE * lows.min())  # false where one is NaN
            if np.nanmax(lows, initial=0) > ALIKE * np.nanmin(highs, initial=math.inf):
                apart.append(model)
    verdict = CONTRADICTS if apart else AGREES if n and together == n else UNDECIDED
    return verdict, (
        f"3, low thresholds of a model's tasks (Su et al. 2023 give no number for similar; here: 90 % intervals within a factor of "
        f"{ALIKE}): of {n} models with two tasks or more, {together} have them within it, {len(apart)} apart by more "
        f"{'(' + ', '.join(apart) + ') ' if apart else ''}and {n - together - len(apart)} can't be decided."
    )


def findings(main: list[Group], found: dict[tuple, Threshold]) -> list[tuple[int, str]]:
    """Verdict and sentence for each finding; 1 twice, with and without the scales at random guess or at the ceiling."""
    every, between = defaultdict(list), defaultdict(list)
    for g in main:
        if g.method == "apet" and g.positions >= 3:
            line, point = (family(g.model), g.task, g.budget), (g.total, max(g.sd, FLOOR))
            every[line].append(point)
            if in_between(g, main):
                between[line].append(point)

    def thresholds_fall(kind: str, name: str) -> tuple[int, str]:
        points, beyond = defaultdict(list), 0
        for (model, total, task, what), t in found.items():
            if what == kind and t.mark == "":
                points[family(model), task].append((total, t.value))
            beyond += what == kind and t.mark != ""
        verdict, text = trend(name, points, "task of a family")
        left = f" {beyond} thresholds beyond the measured budgets or without a usable full run are left out."
        return verdict, text + left * (beyond > 0)

    return [
        trend("1, sd over positions against scale", every, "budget of a task and family with 3 position seeds or more"),
        trend("1, the same where the mean lies between random guess and full", between, "budget of a task and family"),
        thresholds_fall("high", "2, high threshold against scale"),
        similar(found),
        (NO_CLAIM, thresholds_fall("low", "3, low threshold against scale")[1]),
    ]


# --- Text ---


def cell(group: Group | None) -> str:
    if group is None:
        return ""
    sd = f" ± {group.sd:.3f}" if len(group.scores) > 1 else ""
    return f"{group.mean:.3f}{sd} ({len(group.scores)})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |\n" for row in (head, *rows)]
    return "".join([lines[0], "|" + "---|" * len(head) + "\n", *lines[1:]]) if rows else "Nothing to show.\n"


def bullets(items: Iterable[str]) -> str:
    wrapper = textwrap.TextWrapper(132, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "".join(wrapper.fill(f"- {x}") + "\n" for x in items)


def ordered(labels: Iterable[str]) -> list[str]:
    """Numbers by size, then names."""
    return sorted(set(labels), key=lambda s: (0, int(s.replace(",", "")), s) if s.replace(",", "").isdigit() else (1, 0, s))


def by_task(groups: list[Group], column: Callable[[Group], str], columns: list[str]) -> str:
    """A table for each task: a row per model, by scale."""
    text = ""
    for task in sorted({g.task for g in groups}):
        here = [g for g in groups if g.task == task]
        cells = {(g.model, g.total, column(g)): g for g in here}
        shown = [c for c in columns if any(key[2] == c for key in cells)]
        rows = [[m, f"{n:,}", *(cell(cells.get((m, n, c))) for c in shown)] for m, n in unique(g[:2] for g in here)]
        text += f"{task} ({here[0].metric}; random guess {here[0].guess:.3f}, majority {here[0].majority:.3f})\n\n"
        text += table(["model", "parameters", *shown], rows) + "\n"
    return text or "Nothing to show.\n\n"


def compared(main: list[Group]) -> list[str]:
    """APET's budgets to set beside other methods: those named after one; else the one most often measured (the largest of them)."""
    count = Counter(g.label for g in main if g.method == "apet")
    named = [label for label in METHODS if label in count]
    return named or sorted(count, key=lambda label: (-count[label], -ordered(count).index(label)))[:1]


def missing(main: list[Group]) -> list[str]:
    """A line for each set of models and tasks that lacks the same runs."""
    apet = [g for g in main if g.method == "apet"]
    seeds = Counter(g.positions for g in apet)
    usual = max(seeds, key=lambda n: (seeds[n], n), default=0)
    tasks = defaultdict(set)
    for g in main:
        tasks[family(g.model)].add(g.task)
    gaps = defaultdict(list)
    for model, total in unique(g[:2] for g in main):
        for task in sorted(tasks[family(model)]):
            here = [g for g in main if g.case == (model, total, task)]
            mine = [g for g in here if g.method == "apet"]
            elsewhere = {g.label for g in apet if g.task == task and (not g.label[0].isdigit() or g.budget <= total)}
            methods = [m for m in METHODS if all(g.method != m for g in here)]
            budgets = ordered(elsewhere - {g.label for g in mine})
            lacks = [f"no {', '.join(methods)}"] * bool(methods) + [f"no APET at {' · '.join(budgets)}"] * bool(budgets)
            for n in sorted({g.positions for g in mine if g.positions < usual}):
                few = " · ".join(g.label for g in mine if g.positions == n)
                lacks.append(f"{n} of {usual} position seeds at {few}")
            for lack in lacks if here else ["no run"]:
                gaps[lack, task].append(model)
    same = defaultdict(list)
    for (lack, task), models in gaps.items():
        same[", ".join(models), lack].append(task)
    lines = [f"{models} on {', '.join(names)}: {lack}" for (models, lack), names in same.items()]
    return lines[:20] + [f"and {len(lines) - 20} more"] * (len(lines) > 20)


def about(runs: list[dict], notes: list[str]) -> list[str]:
    """What was read: models, dates, machines, versions, settings."""

    def each(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    tasks = defaultdict(list)
    for r in runs:
        tasks[", ".join(f"{n} {x}" for n, x in zip(SETTING, setting(r, SETTING), strict=True) if x != "None")].append(r["task"])
    return [
        f"{len(runs)} runs: {each(r['model'] for r in runs)}; tasks {each(r['task'] for r in runs)}",
        f"{min(r['date'] for r in runs)} to {max(r['date'] for r in runs)}; machine: {each(r['machine'] for r in runs)}",
        f"versions: {each(' '.join(f'{k} {v}' for k, v in r['versions'].items()) for r in runs)}",
        f"apet.py (SHA-256): {each(r['apet_sha256'][:8] for r in runs)}",
        *notes,
        *(f"setting of {each(names)}: {values}" for values, names in tasks.items()),
    ]


def report(runs: list[dict], groups: list[Group], found: dict, notes: list[str], figures: list[str]) -> str:
    main = [g for g in groups if g.mask in (None, "random")]
    apet = [g for g in main if g.method == "apet"]
    columns = [*METHODS, "head alone", *(f"APET, {label}" for label in compared(main))]
    by_mask = defaultdict(dict)
    for g in groups:
        if g.method == "apet":
            by_mask[g.model, g.task, g.budget][g.mask] = g
    masks = unique(["random", *sorted({g.mask for g in groups if g.method == "apet"})])
    structure = [[m, t, f"{k:,}", *(cell(gs.get(x)) for x in masks)] for (m, t, k), gs in by_mask.items() if len(gs) > 1]
    limits, spreads = [], []
    for model, total, task in unique(key[:3] for key in found):
        limits.append([model, f"{total:,}", task, *(found[model, total, task, kind].text() for kind in ("low", "high"))])
    for model, total in unique(key[:2] for key in found):
        row = [model, f"{total:,}"]
        for kind in ("low", "high"):
            x = [t.value for key, t in found.items() if (*key[:2], key[3], t.mark) == (model, total, kind, "")]
            row += [str(len(x)), *((f"{max(x) / min(x):.2f}", f"{spread(np.log10(x)):.2f}") if len(x) > 1 else ("", ""))]
        spreads.append(row)
    sentences = sorted(findings(main, found), key=lambda s: s[0])
    return TEXT.format(
        read=bullets(about(runs, notes)),
        missing=bullets(missing(main) or ["nothing"]),
        methods=by_task(main, lambda g: g.column, columns),
        budgets=by_task(apet, lambda g: g.label, ordered(g.label for g in apet)),
        structure=table(["model", "task", "budget", *masks], structure),
        thresholds=table(["model", "parameters", "task", "low", "high"], limits),
        findings=bullets(f"{VERDICTS[v]} {text}" for v, text in sentences),
        spreads=table(["model", "parameters", "low: tasks", "max/min", "sd", "high: tasks", "max/min", "sd"], spreads),
        figures="\n".join(f"![{Path(f).stem}]({f})" for f in figures),
    ).lstrip()


def rates(runs: list[dict]) -> str:
    """A table of the scores at several learning rates, whatever else stayed the same."""
    swept, auto = defaultdict(dict), {}  # {what stayed the same: {rate: score}}, and the rate that --lr auto chose there
    fixed = ("model", "task", "steps", "method", "tuned_params", "mask", "mask_seed", "seed")
    for r in sorted(runs, key=lambda r: r["date"]):
        if r["trained"] and r["rate"] is not None:
            key = setting(r, (*fixed, "where", "insert", "batch_size", "pool"))
            swept[key][r["rate"]] = r["score"]
            if r["lr"] == "auto":
                auto[key] = r["rate"]
    rows = []
    for key, scores in sorted(swept.items()):
        if len(scores) > 1 or key not in auto:
            shown = (f"{rate:.2g}: {score:.3f}{' (auto)' * (rate == auto.get(key))}" for rate, score in sorted(scores.items()))
            rows.append([x.replace("None", "") for x in key[: len(fixed)]] + [" · ".join(shown)])
    return f"# Learning rates\n\nMade by results/report.py --rates; do not edit.\n\n{table([*fixed, 'rate: score'], rows)}"


def write_csv(groups: list[Group], file: Path) -> None:
    """One row a group; empty where a number does not exist."""
    full = {g.case: g.mean for g in groups if g.method == "full"}
    head = "model total_params task method mask budget runs position_seeds mean sd min max random_guess majority full_mean"
    with open(file, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(head.split())
        for g in groups:
            numbers = [g.mean, g.sd, g.scores.min(), g.scores.max(), g.guess, g.majority, full.get(g.case, math.nan)]
            shown = ["" if math.isnan(x) else round(float(x), 6) for x in numbers]
            rows.writerow([*g[:4], g.mask or "", g.budget, g.runs, g.positions, *shown])


# --- Figures ---


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


def panel_a_task(main: list[Group], x: str, y: str, xs: list[int]) -> tuple[plt.Figure, list[tuple[plt.Axes, list[Group]]]]:
    """A panel for each task, with its groups."""
    tasks = [[g for g in main if g.task == t] for t in sorted({g.task for g in main})]
    figure, axes = panels([f"{groups[0].task} ({groups[0].metric})" for groups in tasks], x, y, xs)
    return figure, list(zip(axes, tasks, strict=True))


def line(ax: plt.Axes, points: list[tuple[float, float]], **look) -> None:
    ax.plot([x for x, _ in points], [y for _, y in points], **look)


def explain(ax: plt.Axes, label: str, **look) -> None:
    """A grey entry of the legend."""
    line(ax, [], color="0.4", label=label, **look)


def plot_scale(main: list[Group], found: dict) -> plt.Figure:
    """Score against the model's size: each method, and APET beside them."""
    figure, axes = panel_a_task(main, "parameters of the model", "score", [g.total for g in main])
    lines = [(m, style(i)) for i, m in enumerate(METHODS)]
    lines += [(f"APET, {x}", style(METHODS.index(x) if x in METHODS else 5) | HOLLOW) for x in compared(main)]
    for ax, here in axes:
        for name, look in lines:
            points = [(g.total, g.mean) for g in here if g.column == name]
            if points:
                line(ax, points, label=name, **look)
        ax.axhline(here[0].guess, linestyle=":", color="0.4", label="random guess")
    return figure


def plot_positions(main: list[Group], found: dict) -> plt.Figure | None:
    """Standard deviation over positions against the model's size: each budget."""
    several = [g for g in main if g.positions > 1]
    if not several:
        return None
    y = f"standard deviation over random positions (at least {FLOOR})"
    figure, axes = panel_a_task(main, "parameters of the model", y, [g.total for g in main])
    for ax, here in axes:
        ax.set_yscale("log")
        if ax is not axes[0][0]:
            ax.sharey(axes[0][0])
        for i, label in enumerate(ordered(g.label for g in several)):
            points = {(g.total, max(g.sd, FLOOR)): g for g in here if g.label == label and g.positions > 1}
            line(ax, list(points), label=f"budget {label}", **style(i) | HOLLOW)
            line(ax, [p for p, g in points.items() if in_between(g, main)], **style(i) | {"linestyle": "none"})
        explain(ax, "filled: between guess and full", marker="s", markersize=5, linestyle="none")
    return figure


def plot_budget(main: list[Group], found: dict) -> plt.Figure | None:
    """Score against APET's budget: each model."""
    budgets, models = [g.budget for g in main if g.method == "apet"], unique(g[:2] for g in main)
    if not budgets:
        return None
    figure, axes = panel_a_task(main, "budget (tuned scalars)", "score", budgets)
    for ax, here in axes:
        for i, model in enumerate(models):
            for g in [g for g in here if g[:2] == model]:
                if g.method == "full":
                    ax.axhline(g.mean, color=COLOURS[i % 7], linestyle=LINES[i % 5], linewidth=0.8)
                if g.method == "none":
                    ax.axhline(g.mean, linestyle="-.", color="0.4", linewidth=0.8, label="head alone")
            points = [(g.budget, g.mean, np.nan_to_num(g.sd)) for g in here if g[:2] == model and g.method == "apet"]
            if points:
                line(ax, [p[:2] for p in points], label=model[0], **style(i))
                ax.errorbar(*zip(*points, strict=True), fmt="none", ecolor=COLOURS[i % 7], elinewidth=1.4, capsize=2)
        if any(g.method == "full" for g in main):
            explain(ax, "thin: full fine-tuning", linewidth=0.8)
        ax.axhline(here[0].guess, linestyle=":", color="0.4", label="random guess")
    return figure


def plot_thresholds(main: list[Group], found: dict) -> plt.Figure | None:
    """Low and high threshold against the model's size: each task."""
    models, tasks = {g[:2] for g in main}, sorted({g.task for g in main})
    usable = {key: t for key, t in found.items() if key[:2] in models and t.mark in ("", "<=", ">")}
    if not usable:
        return None
    titles, totals = ["low threshold", "high threshold"], [g.total for g in main]
    figure, axes = panels(titles, "parameters of the model", "budget (tuned scalars)", totals)
    for ax, kind in zip(axes, ("low", "high"), strict=True):
        ax.set_yscale("log")
        for i, task in enumerate(tasks):
            aside = 1.06 ** (i - len(tasks) / 2)  # so that intervals don't cover each other
            points = [(key[1] * aside, t) for key, t in usable.items() if key[2:] == (task, kind)]
            line(ax, [(x, t.value) for x, t in points if t.mark == ""], label=task, **style(i))
            for x, t in points:
                if not math.isnan(t.low):
                    ax.plot([x, x], np.clip([t.low, t.high], t.smallest, t.largest), color=COLOURS[i % 7], linewidth=1)
                if t.mark:
                    ax.plot(x, t.value, **style(i) | HOLLOW | {"linestyle": "none"})
                    sign = "≤" if t.mark == "<=" else ">"
                    ax.annotate(sign, (x, t.value), (4, 0), textcoords="offset points", fontsize=8, va="center")
        explain(ax, "90 % interval", linewidth=1)
        explain(ax, "outside the budgets", marker="s", markersize=5, linestyle="none", **HOLLOW)
    return figure


def draw(main: list[Group], found: dict, out: Path, suffix: str) -> list[str]:
    """The names of one family's figures; those without data are left out."""
    plots = {"scale": plot_scale, "positions": plot_positions, "budget": plot_budget, "thresholds": plot_thresholds}
    figures = {f"{kind}{suffix}.png": plot(main, found) for kind, plot in plots.items()}
    figures = {name: figure for name, figure in figures.items() if figure}
    for name, figure in figures.items():
        handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        rows = math.ceil(len(handles) / (figure.get_figwidth() // 1.7))
        look = {"ncols": math.ceil(len(handles) / rows), "fontsize": 8, "frameon": False, "handlelength": 3.2}
        figure.legend(handles.values(), handles, loc="outside upper center", **look)
        figure.savefig(out / name, dpi=150)
        Image.open(out / name).convert("RGB").quantize(256).save(out / name, optimize=True)  # a third of the bytes
        plt.close(figure)
    return list(figures)


# --- The command ---


def compare(results: list[dict], notes: list[str], out: Path) -> str:
    """Writes report.md, report.csv and the figures; returns what was written, in a line."""
    runs, why = choose([flat(r) for r in results])
    if not runs:
        raise ValueError(f"no run to compare: {'; '.join(why)}")
    groups = collect(runs)
    main = [g for g in groups if g.mask in (None, "random")]
    found, figures, families = thresholds(main), [], unique(family(g.model) for g in main)
    out.mkdir(parents=True, exist_ok=True)
    for name in families:
        suffix = "-" + re.sub(r"[^\w.-]+", "_", name) if len(families) > 1 else ""
        figures += draw([g for g in main if family(g.model) == name], found, out, suffix)
    write_csv(groups, out / "report.csv")
    (out / "report.md").write_text(report(runs, groups, found, why + notes, figures), encoding="utf-8")
    return f"{len(runs)} runs: {', '.join(['report.md', 'report.csv', *figures])} in {out}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    toy = Path(__file__).resolve().parent / "toy"
    parser.add_argument("paths", nargs="*", type=Path, default=[toy], metavar="PATH", help="default: results/toy")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for what is made; default: where the first PATH lies")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--rates", action="store_true", help="report.md is about sweeps over the learning rate")
    kind.add_argument("--pack", type=Path, metavar="FILE", help="write the runs to FILE, a line each, and no report")
    args = parser.parse_args(argv)
    out = args.out or (args.paths[0].parent if args.paths[0].is_file() else args.paths[0])
    results, notes = read(args.paths)
    for note in notes:
        print(f"report: {note}", file=sys.stderr)
    try:
        if not results:
            raise ValueError("no result of apet.py")
        if args.pack and notes:
            raise ValueError(f"{args.pack} is not written: it would lack what was skipped")
        if args.pack:
            print(f"{pack(results, args.pack)} runs: {args.pack}")
        elif args.rates:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.md").write_text(rates([flat(r) for r in results]), encoding="utf-8")
            print(f"{len(results)} runs: report.md in {out}")
        else:
            print(compare(results, notes, out))
    except (OSError, ValueError) as e:
        print(f"report: {', '.join(map(str, args.paths))}: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
