"""Tables, figures and the statistics of the paper's three findings, from results of apet.py.

    python results/report.py PATH ... [--out DIR]        the comparison of methods, budgets and scales (default: results/toy)
    python results/report.py PATH ... --rates            sweeps over the learning rate instead
    python results/report.py PATH ... --power            how often a study would decide finding 1, from the runs as a pilot
    python results/report.py PATH ... --pack runs.jsonl  the runs themselves, a line each, in place of many files

A PATH is a folder, of which every *.json (one run, as apet.py writes it) and *.jsonl (one run a line) is read, or such a file.
DIR (default: beside the data, where the first PATH lies) gets report.md, report.csv, budget.png and, with several scales, scale.png
and positions.png. With several families of models there is one figure of each kind per family, as in budget-t5.png.
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
    "steps", "batch_size", "grad_accum", "train_size", "eval_size", "eval_every", "dropout", "max_source_length",
    "max_target_length", "dtype", "freeze_head", "text_fields", "label_field",
)  # fmt: skip
SHARE = 0.9  # high threshold: this share of what full fine-tuning gains over chance
REACH = 0.5  # finding 1: where APET gets this share of it or more
DENSITY = (1e-3, 1e-1)  # finding 1: thousandths to hundredths of the model
ALIKE = 10  # finding 3: low thresholds within this factor are similar
FLOOR = 1e-3  # a smaller standard deviation, less than a row of 1,000, counts as this one: its logarithm is needed
KINDS = ("low", "high", "level with full")
BOOTSTRAP, STUDIES = 1_000, 4_000
T95 = (math.nan, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)  # Student's t; more degrees count as 10
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # Okabe & Ito, without the yellow
FULL = {"color": "#000000", "marker": "o", "markersize": 5, "linewidth": 2}  # full fine-tuning
MARKERS, LINES = "os^DvPX<>*h", ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))

TEXT = f"""
# Report

Made by results/report.py; do not edit.

## The three findings of the paper (Su et al. 2023)

{{findings}}
- Effect: mean over the cases [90 % t-interval, mean ± t·sd/√n]. **For** the paper: the whole interval lies below the border;
  **against**: above it; else undecided. The border is a slope of 0, for finding 3 a factor of {ALIKE}. "Beside" is not judged.
- Slope: least squares of log10(y) on log10(parameters of the model): -0.30 is half with each tenfold model, 0 the same at every
  scale; for a threshold +1 is the same share of the model. The budgets of a task share one slope, each at a level of its own.
- Chance c: a random guess or the majority class, the better; for written answers a random answer of the training rows or the
  most frequent one. It is what is scored without reading the input, for classes and text alike.
- Finding 1: y is the sd over positions (at least {FLOOR}), where there are 3 position seeds, the budget is a method's own or
  {100 * DENSITY[0]:g} to {100 * DENSITY[1]:g} % of the model, and APET's mean gets {100 * REACH:g} % or more of what full
  fine-tuning gains over chance.
- Low threshold: the smallest budget whose mean over positions is above chance at p < 0.01, one-sided: c + 2.326·√(c(1-c)/n), n the
  rows of the reported split; c(1-c) bounds the variance of any score in [0, 1].
- High threshold: the smallest budget whose mean gets {100 * SHARE:g} % of what full fine-tuning gains over chance. Level
  with full: f less the sd over training seeds or √(h(1-h)/n), the larger; f is full fine-tuning's mean, h = (nf+2)/(n+4).
- The mean is linear in log10(budget), from the untuned model (an encoder: its trained head alone), which stands at 1 scalar, to
  full fine-tuning. Means of APET that fall are pooled (isotonic regression): else noise lets small models pass early. `<=`: the
  smallest budget passes, and counts as the threshold if none smaller was measured on the model. `>` (the largest does not) and
  "at chance" are left out.

{{figures}}

## Thresholds

[a, b]: 90 % percentile bootstrap over position seeds and full's training seeds, where each budget has two or more.

{{thresholds}}
## Methods

Mean ± standard deviation (number of seeds): position seeds of APET, training seeds of the others. APET stands beside them at a
method's number of scalars or, without such runs, at the budget measured most.

{{methods}}## APET by budget

{{budgets}}## Structure of the positions

{{structure}}
## What was read

{{read}}"""


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
    def unit(self) -> tuple[str, str]:
        return family(self.model), self.task

    @property
    def x(self) -> float:
        """Where it stands on the axis of budgets: no tuned scalar (untuned, or the head alone) at 1."""
        return math.log10(max(self.budget, 1))

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    @property
    def sd(self) -> float:
        """sqrt(sum (x - mean)^2 / (n - 1)); NaN for fewer than two."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else math.nan

    @property
    def chance(self) -> float:
        return max(self.guess, self.majority)

    @property
    def above(self) -> float:
        """What answers at chance exceed on these rows with a probability of 1 % at most."""
        return self.chance + 2.326 * math.sqrt(self.chance * (1 - self.chance) / self.rows)

    @property
    def column(self) -> str:
        """The group's name in the tables and figures of methods."""
        return {"apet": f"APET, {self.label}", "none": self.label}.get(self.method, self.method)


class Threshold(NamedTuple):
    """A budget; mark: '' found, '<=' the smallest measured one passes, '>' the largest does not, or why there is none."""

    value: float
    mark: str
    low: float = math.nan  # the ends of its interval, within the measured budgets
    high: float = math.nan

    def text(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{number(self.low)}, {number(self.high)}]"
        return self.mark if math.isnan(self.value) else f"{self.mark} {number(self.value)}".strip() + interval


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
        several, bad, whole = file.suffix == ".jsonl", defaultdict(list), file.read_bytes()
        for n, text in enumerate(whole.splitlines() if several else [whole], 1):
            run = parse(text) if text.strip() or not several else None
            if isinstance(run, str):
                bad[run].append(n)
            elif run:
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


def flat(r: dict) -> dict:
    """A result on one level: its arguments, with defaults for what older ones lack, and of the rest what is needed here."""
    old = {"grad_accum": 1, "freeze_head": False}
    rest = {"rows": r["data"]["sizes"]["report"], "machine": r["device"], "rate": r.get("lr")}
    run = {**r, **r["baselines"], **old, **r["arguments"], **rest}
    untuned = run["method"] == "none" and not run.get("head_trained")  # shown where it has no head, which would be random
    return run | {"untuned": untuned, "usable": not (run.get("load") or (untuned and run.get("head_params")))}


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

    runs = keep(results, lambda r: r["usable"], "nothing was trained")
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
        label = label if key[3] != "none" else "untuned" if rs[0]["untuned"] else "head alone"
        about = [rs[0][x] for x in ("random_guess", "majority", "metric")]
        groups.append(Group(*key, label, scores, len(rs), min(r["rows"] for r in rs), *about))
    return sorted(groups, key=lambda g: (family(g.model), g.total, g.model, g.task, g.method, str(g.mask), g.budget))


# --- Statistics ---


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 90 % t-interval; infinite where there are fewer than two values."""
    n = len(values)
    if n < 2:
        return (values[0] if n else math.nan), -math.inf, math.inf
    mean, half = float(np.mean(values)), T95[min(n - 1, 10)] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def slope(lines: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Least squares of y on x with one slope and a level for each line: sum (x - mean x) y / sum (x - mean x)^2 over all."""
    centred = [(x - x.mean(), y) for x, y in lines]
    return float(sum(x @ y for x, y in centred) / sum(x @ x for x, _ in centred))


def by_unit(points: Iterable[tuple[object, object, float, float]]) -> dict[object, list[tuple[np.ndarray, np.ndarray]]]:
    """From (unit, line, parameters, y): the lines of each unit that have two scales, as logarithms."""
    found, out = defaultdict(list), defaultdict(list)
    for unit, line, total, y in points:
        found[unit, line].append((math.log10(total), math.log10(max(y, FLOOR))))
    for (unit, _), ps in found.items():
        if len({x for x, _ in ps}) > 1:
            out[unit].append(np.array(ps).T)
    return out


def rising(means: Iterable[float]) -> list[float]:
    """Least squares among curves that never fall (isotonic regression): neighbours that fall are replaced by their mean."""
    blocks = []
    for mean in means:
        blocks.append((float(mean), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append(((a * n + b * m) / (n + m), n + m))
    return [mean for mean, n in blocks for _ in range(n)]


def crossing(x: np.ndarray, means: list[float], level: float) -> float:
    """The first x at which means, joined by lines, reach level; -inf if the first does, inf if none does."""
    i = next((i for i, m in enumerate(means) if m >= level - 1e-12), None)
    if not i:
        return math.inf if i is None else -math.inf
    return x[i - 1] + (x[i] - x[i - 1]) * (level - means[i - 1]) / (means[i] - means[i - 1])


def level(kind: str, first: Group, full: np.ndarray) -> float:
    """The score that counts for a kind of threshold."""
    if kind == "low":
        return first.above
    f, n = float(full.mean()), first.rows
    if kind == "high":
        return first.chance + SHARE * (f - first.chance)
    h = (n * f + 2) / (n + 4)  # so that a perfect score has a spread, too (Agresti & Coull, 1998)
    return f - max(float(full.std(ddof=1)) if len(full) > 1 else 0, math.sqrt(h * (1 - h) / n))


def threshold(line: list[Group], full: Group | None, kind: str) -> Threshold:
    """Where the rising curve of mean scores over log10(budget) crosses the level of its kind; full fine-tuning is the last point.

    The first crossing of the means themselves comes the earlier, the noisier they are: on small models.
    """
    if kind != "low" and (full is None or full.mean < full.above):
        return Threshold(math.nan, "no full run" if full is None else "full at chance")
    curve = [*line, *[full] * (full is not None)]
    x = np.array([g.x for g in curve])

    def cross(means: np.ndarray, last: np.ndarray) -> float:
        return crossing(x, rising(means[: len(line)]) + list(means[len(line) :]), level(kind, curve[0], last))

    at, ends = cross(np.array([g.mean for g in curve]), curve[-1].scores), (math.nan, math.nan)
    if all(len(g.scores) > 1 for g in line if g.method == "apet"):
        rng = np.random.default_rng(0)
        redrawn = [g.scores[rng.integers(0, len(g.scores), (BOOTSTRAP, len(g.scores)))] for g in curve]
        draws = sorted(map(cross, np.stack([r.mean(1) for r in redrawn], 1), redrawn[-1]))
        ends = (float(10 ** np.clip(d, x[0], x[-1])) for d in (draws[BOOTSTRAP // 20], draws[-1 - BOOTSTRAP // 20]))
    mark = "" if math.isfinite(at) else ">" if at > 0 else "<="
    return Threshold(float(10 ** np.clip(at, x[0], x[-1])), mark, *ends)


def thresholds(main: list[Group]) -> dict[tuple, Threshold]:
    """By model, its parameters, task and kind; where APET was measured."""
    full, lines = {g.case: g for g in main if g.method == "full"}, defaultdict(list)
    for g in sorted(main, key=lambda g: g.budget):
        if g.method in ("none", "apet"):
            lines[g.case].append(g)
    measured = [c for c in unique(g.case for g in main) if any(g.method == "apet" for g in lines[c])]
    return {(*c, kind): threshold(lines[c], full.get(c), kind) for c in measured for kind in KINDS}


def spreads(main: list[Group]) -> list[Group]:
    """Where the spread over positions is known well enough."""
    return [g for g in main if g.method == "apet" and len(g.scores) >= 3]


def within_reach(main: list[Group]) -> list[Group]:
    """The spreads that count in finding 1."""
    full = {g.case: g for g in main if g.method == "full" and g.mean >= g.above}
    near = [g for g in spreads(main) if g.label in METHODS or DENSITY[0] <= g.budget / g.total <= DENSITY[1]]
    return [g for g in near if g.case in full and g.mean >= g.chance + REACH * (full[g.case].mean - g.chance)]


def findings(main: list[Group], found: dict[tuple, Threshold]) -> list[tuple[str, str, str, str]]:
    """Rows of the table of findings: what, effect with its interval, cases, verdict."""
    at, methods = defaultdict(list), defaultdict(list)
    least = {m: min(10**g.x for g in main if g.model == m and g.method in ("none", "apet")) for m, *_ in found}
    for (model, total, task, kind), t in found.items():
        if t.mark == "" or (t.mark == "<=" and t.value <= least[model]):
            at[kind].append(((family(model), task), "", total, t.value))
            at[model, kind].append(t.value)
    for g in main:
        if g.method in METHODS[1:]:
            methods[g.unit, "", g.total].append(g.mean)
    differ = [(*key, float(np.std(x, ddof=1))) for key, x in methods.items() if len(x) == 4]
    near, every = ([(g.unit, g.label, g.total, g.sd) for g in gs] for gs in (within_reach(main), spreads(main)))
    factors = [math.log10(max(at[m, "low"]) / min(at[m, "low"])) for m in least if len(at[m, "low"]) > 1]

    def row(what: str, cases: dict | list, judged: bool = False, border: float = 0) -> tuple[str, str, str, str]:
        effects = list(map(slope, cases.values())) if isinstance(cases, dict) else cases
        mean, low, high = interval(effects)
        shown = [f"{10**x:.3g}" if border else f"{x:+.2f}" for x in (mean, low, high)]
        text = ("factor " * (border > 0) + shown[0] + f" [{shown[1]}, {shown[2]}]" * (len(effects) > 1)) * bool(effects)
        passes = f"{sum(x < border for x in effects)} of {len(effects)} "
        of = passes + (f"models within {ALIKE}" if border else "tasks fall") if effects else "none"
        verdict = "**for**" if high < border else "**against**" if low > border else "undecided"
        return what, text, of, verdict if judged else "beside"

    return [
        row("1. larger models: less spread over random positions", by_unit(near), True),
        row("the same at every budget and score", by_unit(every)),
        row(f"2. larger models: a lower high threshold ({100 * SHARE:g} % of full's gain)", by_unit(at["high"]), True),
        row("the same, level with full", by_unit(at["level with full"])),
        row("3. a model's tasks: similar low thresholds, the largest / the smallest", factors, True, math.log10(ALIKE)),
        row("low threshold against scale", by_unit(at["low"])),
        row("where the paper starts: larger models, less spread among the four methods", by_unit(differ)),
    ]


def power(main: list[Group]) -> str:
    """How often finding 1 comes out for the paper, in studies simulated from a pilot's spreads.

    log10(sd) is a line in log10(parameters) for each task, whose slope scatters over tasks as in the pilot, plus a scatter of each
    budget and scale as in the pilot, plus what the sd of so few seeds is off by (chi-square), which the pilot's scatters are less.
    """
    rng, used = np.random.default_rng(0), within_reach(main)
    lines = by_unit((g.unit, g.label, g.total, g.sd) for g in used)
    if len(lines) < 2:
        raise ValueError("a pilot needs two tasks with 3 position seeds at two scales where full fine-tuning is within reach")

    def noise(seeds: int, *shape: int) -> np.ndarray:
        return np.log10(rng.chisquare(seeds - 1, shape) / (seeds - 1)) / 2

    fits, flat = {task: slope(ls) for task, ls in lines.items()}, [(task, x, y) for task, ls in lines.items() for x, y in ls]
    rest = [y - y.mean() - fits[task] * (x - x.mean()) for task, x, y in flat]
    by_seeds = noise(round(np.mean([len(g.scores) for g in used])), 100_000).var()
    variance = sum(r @ r for r in rest) / max(1, sum(map(len, rest)) - len(rest) - len(fits))
    scatter, off = math.sqrt(max(0, variance - by_seeds)), [sum(x.var() * len(x) for x, _ in ls) for ls in lines.values()]
    tasks = math.sqrt(max(0, np.var(list(fits.values()), ddof=1) - np.mean(variance / np.array(off))))
    scales = np.log10(sorted({g.total for g in used}))
    x = scales - scales.mean()

    def decided(true: float, n: int, budgets: int, seeds: int) -> str:
        b = true + tasks * rng.standard_normal((STUDIES, n, 1, 1))
        y = b * x + scatter * rng.standard_normal((STUDIES, n, budgets, len(x))) + noise(seeds, STUDIES, n, budgets, len(x))
        b = (y @ x).mean(2) / (x @ x)
        return f"{(b.mean(1) + T95[min(n - 1, 10)] * b.std(1, ddof=1) / math.sqrt(n) < 0).mean():.2f}"

    designs = [(n, *design) for n in (5, 8, 11) for design in ((1, 3), (2, 3), (2, 5), (4, 3), (4, 10))]
    rows = [[*map(str, d), *(decided(true, *d) for true in (0, -0.15, -0.3, -0.45, -0.6))] for d in designs]
    head = ["tasks", "budgets", "position seeds", "slope 0", "-0.15", "-0.30", "-0.45", "-0.60"]
    return (
        f"pilot: {len(flat)} lines of {len(lines)} tasks, {sum(map(len, rest))} spreads; slopes of the tasks "
        f"{', '.join(f'{b:+.2f}' for b in fits.values())}\n"
        f"sd of the slope over tasks {tasks:.2f}, of a spread around its line {scatter:.2f}\n"
        f"share of {STUDIES:,} studies on {len(x)} scales that decide for the paper, by the true slope:\n\n{table(head, rows)}"
    )


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
    columns = ["full", "untuned", "head alone"]
    columns += [c for m in METHODS[1:] for c in (m, f"APET, {m}")] + [f"APET, {x}" for x in compared(main) if x not in METHODS]
    by_mask = defaultdict(dict)
    for g in groups:
        if g.method == "apet":
            by_mask[g.model, g.task, g.budget][g.mask] = g
    masks = unique(["random", *sorted({g.mask for g in groups if g.method == "apet"})])
    structure = [[m, t, f"{k:,}", *(cell(gs.get(x)) for x in masks)] for (m, t, k), gs in by_mask.items() if len(gs) > 1]
    cases = unique(key[:3] for key in found)
    limits = [[m, f"{n:,}", task, *(found[m, n, task, kind].text() for kind in KINDS)] for m, n, task in cases]
    return TEXT.format(
        findings=table(["finding", "effect [90 % interval]", "cases", "verdict"], findings(main, found)),
        figures="\n".join(f"![{Path(f).stem}]({f})" for f in figures),
        thresholds=table(["model", "parameters", "task", *KINDS], limits),
        methods=by_task(main, lambda g: g.column, columns),
        budgets=by_task(apet, lambda g: g.label, [x for x in ordered(g.label for g in apet) if x not in METHODS]),
        structure=table(["model", "task", "budget", *masks], structure),
        read=bullets(about(runs, notes)),
    ).lstrip()


def rates(runs: list[dict]) -> str:
    """A table of the scores at several learning rates, whatever else but the seeds stayed the same."""
    swept, auto = defaultdict(lambda: defaultdict(dict)), {}  # {what stayed the same: {rate: {seeds: scores}}}; auto's rate there
    fixed = ("model", "task", "steps", "method", "tuned_params", "mask")
    for r in sorted(runs, key=lambda r: r["date"]):
        if r["usable"] and r["rate"] is not None:
            key = setting(r, (*fixed, "where", "insert", "batch_size"))
            best = r["best"].get("score") if isinstance(r.get("best"), dict) else None
            swept[key][r["rate"]][setting(r, ("mask_seed", "seed"))] = (r["score"], math.nan if best is None else best)
            if r["lr"] == "auto":
                auto[key] = r["rate"]
    rows, lost = [], []
    for key, by_rate in sorted(swept.items()):
        if len(by_rate) == 1 and key in auto:
            continue
        seeds = set.intersection(*map(set, by_rate.values())) or set.union(*map(set, by_rate.values()))
        means = {rate: np.mean([x[s] for s in seeds if s in x], axis=0) for rate, x in sorted(by_rate.items())}
        shown = (f"{rate:.2g}: {score:.3f}{' (auto)' * (rate == auto.get(key))}" for rate, (score, _) in means.items())
        loss = ""
        if key in auto and all(best == best for _, best in means.values()):
            lost.append(100 * float(max(means.values(), key=lambda x: x[1])[0] - means[auto[key]][0]))
            loss = f"{lost[-1]:.1f}"
        rows.append([x.replace("None", "") for x in key[: len(fixed)]] + [str(len(seeds)), " · ".join(shown), loss])
    said = f"; {np.mean(lost):.1f} on average over {len(lost)} rows, {max(lost):.1f} at most" if lost else ""
    return (
        "# Learning rates\n\nMade by results/report.py --rates; do not edit. Scores: means over the seeds that all rates of a row\n"
        f"have, else over all. auto loses: points, against the rate that is best on the validation rows{said}.\n\n"
        + table([*fixed, "seeds", "rate: score", "auto loses"], rows)
    )


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
            rows.writerow([*g[:4], g.mask or "", g.budget, g.runs, len(g.scores) if g.method == "apet" else 0, *shown])


# --- Figures ---


def style(i: int) -> dict:
    """The i-th colour, marker and line style: 7, 11 and 5 of them, so no two of 385 lines share all three."""
    return {"color": COLOURS[i % 7], "marker": MARKERS[i % 11], "linestyle": LINES[i % 5], "markersize": 5, "linewidth": 1.4}


def panel_a_task(main: list[Group], x: str, y: str, xs: list[int]) -> tuple[plt.Figure, list[tuple[plt.Axes, list[Group]]]]:
    """At most three panels a row, with the same limits of x; each with its task's groups."""
    tasks = [[g for g in main if g.task == t] for t in sorted({g.task for g in main})]
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    size = (max(4.6, 2.9 * columns), 2.4 * rows + 1)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(tasks) :]:
        ax.remove()
    for ax, here in zip(axes.flat, tasks, strict=False):
        ax.set_title(f"{here[0].task} ({here[0].metric})", fontsize=9)
        ax.set_xscale("log")
        ax.set_xlim(min(xs) / 2, max(xs) * 2)
        ax.tick_params(which="both", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure, list(zip(axes.flat, tasks, strict=False))


def line(ax: plt.Axes, points: list[tuple[float, float]], **look) -> None:
    ax.plot([x for x, _ in points], [y for _, y in points], **look)


def plot_scale(main: list[Group], found: dict) -> plt.Figure:
    """Score against the model's size: each method, filled, and APET at its number of scalars, hollow and dashed."""
    figure, axes = panel_a_task(main, "parameters of the model", "score", [g.total for g in main])
    looks = {m: style(i) | {"color": COLOURS[i - 1], "linestyle": "-"} for i, m in enumerate(METHODS)} | {"full": FULL}
    for ax, here in axes:
        for name in (*METHODS, *(x for x in compared(main) if x not in METHODS)):
            look = looks.get(name, style(5))
            for column, more in ((name, {}), (f"APET, {name}", {"linestyle": "--", "markerfacecolor": "white"})):
                points = [(g.total, g.mean) for g in here if g.column == column]
                if points:
                    line(ax, points, label=column, **look | more)
        line(ax, [(g.total, g.chance) for g in here], linestyle=":", color="0.4", label="chance")
    return figure


def plot_positions(main: list[Group], found: dict) -> plt.Figure | None:
    """Standard deviation over positions against the model's size: each budget; filled where finding 1 looks."""
    known, near = spreads(main), {g[:7] for g in within_reach(main)}
    if not known:
        return None
    y = f"sd over random positions (at least {FLOOR})"
    figure, axes = panel_a_task(main, "parameters of the model", y, [g.total for g in main])
    for ax, here in axes:
        ax.set_yscale("log")
        if ax is not axes[0][0]:
            ax.sharey(axes[0][0])
        for i, label in enumerate(ordered(g.label for g in known)):
            points = {(g.total, max(g.sd, FLOOR)): g for g in spreads(here) if g.label == label}
            line(ax, list(points), label=f"APET, {label}", **style(i) | {"markerfacecolor": "white"})
            line(ax, [p for p, g in points.items() if g[:7] in near], **style(i) | {"linestyle": "none"})
        line(ax, [], color="0.4", marker="s", markersize=5, linestyle="none", label="filled: counts in finding 1")
    return figure


def plot_budget(main: list[Group], found: dict) -> plt.Figure | None:
    """Score against APET's budget: each model, with both thresholds, from untuned (at 1) to full; of one model the methods, too."""
    budgets, models = [g.budget for g in main if g.method == "apet"], unique(g[:2] for g in main)
    if not budgets:
        return None
    xs = [10**g.x for g in main if g.method in ("none", "apet", "full")]
    figure, axes = panel_a_task(main, "budget (tuned scalars; none: at 1)", "score", xs)
    hollow = {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
    marks = {"low": {"marker": "o", "markersize": 8, **hollow}, "high": {"marker": "*", "markersize": 11, **hollow}}
    square = {"marker": "s", "markersize": 6, "linestyle": "none"}
    for ax, here in axes:
        for i, model in enumerate(models):
            mine = sorted((g for g in here if g[:2] == model and g.method in ("none", "apet", "full")), key=lambda g: g.budget)
            x, y, colour = [10**g.x for g in mine], [g.mean for g in mine], {"color": COLOURS[i % 7]}
            pooled = [*rising(g.mean for g in mine if g.method != "full"), *(g.mean for g in mine if g.method == "full")]
            if mine:
                ax.errorbar(x, y, [np.nan_to_num(g.sd) for g in mine], elinewidth=1, **style(i) | {"marker": "."}, label=model[0])
            line(ax, [(g.budget, g.mean) for g in mine if g.method == "full"], **colour, **square)
            for kind, mark in marks.items():
                t = found.get((*model, here[0].task, kind))
                if t and t.mark in ("", "<="):
                    line(ax, [(t.value, np.interp(math.log10(t.value), np.log10(x), pooled))], **colour, **mark)
        for g in (g for g in here if len(models) == 1 and g.method in METHODS[1:]):
            line(ax, [(g.budget, g.mean)], label=g.method, **style(METHODS.index(g.method)) | {"linestyle": "none"})
        for kind, mark in marks.items():
            line(ax, [], color="0.4", label=f"{kind} threshold", **mark)
        line(ax, [], color="0.4", label="full fine-tuning", **square)
        ax.axhline(here[0].chance, linestyle=":", color="0.4", label="chance")
    return figure


def draw(main: list[Group], found: dict, out: Path, suffix: str) -> list[str]:
    """The names of one family's figures; those without data are left out."""
    plots = {"scale": plot_scale, "positions": plot_positions} if len({g.total for g in main}) > 1 else {}
    plots["budget"] = plot_budget
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
    kind.add_argument("--power", action="store_true", help="simulate how often a study would decide finding 1; nothing is written")
    kind.add_argument("--pack", type=Path, metavar="FILE", help="write the runs to FILE, a line each, and no report")
    args = parser.parse_args(argv)
    out = args.out or (args.paths[0].parent if args.paths[0].is_file() else args.paths[0])
    try:
        results, notes = read(args.paths)
        for note in notes:
            print(f"report: {note}", file=sys.stderr)
        if not results:
            raise ValueError("no result of apet.py")
        if args.pack and notes:
            raise ValueError(f"{args.pack} is not written: it would lack what was skipped")
        if args.pack:
            for r in results:  # where it lay is a path of one machine
                r.pop("delta", None)
                r["arguments"].pop("out", None)
            lines = sorted({json.dumps(r) + "\n" for r in results})  # each run once; the name comes first
            new = args.pack.with_name(args.pack.name + ".new")
            new.write_text("".join(lines), encoding="utf-8")
            os.replace(new, args.pack)
            print(f"{len(lines)} runs: {args.pack}")
        elif args.rates:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.md").write_text(rates([flat(r) for r in results]), encoding="utf-8")
            print(f"{len(results)} runs: report.md in {out}")
        elif args.power:
            print(power([g for g in collect(choose([flat(r) for r in results])[0]) if g.mask in (None, "random")]))
        else:
            print(compare(results, notes, out))
    except (OSError, ValueError) as e:
        print(f"report: {', '.join(map(str, args.paths))}: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
