"""results/report.py on results made by hand, whose thresholds, spreads and probabilities are known without it."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

image = pytest.importorskip("matplotlib.image")
SCRIPT = Path(__file__).resolve().parent.parent / "results" / "report.py"
spec = importlib.util.spec_from_file_location("report", SCRIPT)
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

NAMED = {"lora": 5_000, "bitfit": 2_000}
SCALES = {"toy-tiny": 100_000, "toy-small": 1_000_000, "toy-base": 10_000_000}


def put(folder, score, model="toy-base", task="t", method="apet", budget="1e3", mask_seed=0, seed=0, mask="random", **other):
    """One result of apet.py, of 1,000 rows and random guess 0.5; other: further arguments, or date, total, majority or rate."""
    apet, total, rate = method == "apet", other.pop("total", SCALES.get(model, 10_000_000)), other.pop("rate", None)
    arguments = {
        "model": model, "task": task, "method": method, "budget": budget if apet else None, "mask": mask if apet else None,
        "mask_seed": mask_seed if apet else None, "seed": seed, "lr": "auto", "steps": 600, "batch_size": 32,
        "where": "all" if apet else None, "insert": [], "dtype": "fp32",
    }  # fmt: skip
    result = {
        "score": score, "metric": "accuracy", "metrics": {"accuracy": score},
        "baselines": {"random_guess": 0.5, "majority": other.pop("majority", 0.5)}, "total_params": total,
        "tuned_params": NAMED.get(budget) or int(float(budget)) if apet else NAMED.get(method, 0 if method == "none" else total),
        "data": {"sizes": {"report": 1000}}, "device": "cpu here", "versions": {"torch": "2.13.0"},
        "apet_sha256": "ab12" * 16, "date": other.pop("date", "2026-11-24T08:00:00"), "lr": rate,
        "best": {"step": 100, "score": other.pop("best", None)}, "arguments": arguments | other,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{len(list(folder.iterdir())):04}.json").write_text(json.dumps(result))


def line(folder, means, offsets=(-0.02, 0.0, 0.02), **which):
    """APET at 100, 1,000, ... scalars with these means; the position seeds lie around them by offsets."""
    for i, mean in enumerate(means):
        for s, offset in enumerate(offsets):
            put(folder, mean + offset, budget=f"1e{i + 2}", mask_seed=s, **which)


def full(folder, *scores, **which):
    for s, score in enumerate(scores):
        put(folder, score, method="full", seed=s, **which)


def made(folder, out):
    assert report.main([str(folder), "--out", str(out)]) == 0
    with open(out / "report.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return " ".join((out / "report.md").read_text().split()), rows


def findings(folder, out):
    """The table of findings, by the first word of each row; what was left out stands under "beside" and the row's words."""
    made(folder, out)
    rows = [line.strip("| ").split(" | ") for line in (out / "report.md").read_text().splitlines() if line.count(" | ") == 3]
    return {row[0][:2] if row[-1] != "beside" else row[0]: row[1:] for row in rows}


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """Drawing takes most of the time; only the tests that look at the files, and those of odd folders, draw."""
    if not re.search("figures|beside|partial", request.node.name):
        monkeypatch.setattr(report, "draw", lambda *_: [])


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_thresholds_and_spreads_by_hand(runs, out):
    """Low: 0.5 + 2.326 sqrt(0.25 / 1000) = 0.536777, reached at 10^(2 + 0.036777 / 0.2) = 152.7. High: 0.5 + 0.9 · 0.3 = 0.77 at
    10^(3 + 0.07 / 0.2) = 2239. Level with full: the sd of 0.79 and 0.81, 0.014142, exceeds sqrt(0.1607 / 1000) = 0.012677;
    0.8 - 0.014142 = 0.785858 is reached at 10^(3 + 0.085858 / 0.2) = 2687."""
    line(runs, (0.5, 0.7, 0.9))
    full(runs, 0.79, 0.81)
    text, rows = made(runs, out)
    ends = r"\[([\d,]+), ([\d,]+)\]"
    found = re.search(rf"\| toy-base \| 10,000,000 \| t \| 153 {ends} \| 2,240 {ends} \| 2,690 {ends} \|", text)
    ends = [int(x.replace(",", "")) for x in found.groups()]
    assert 100 < ends[0] < 153 < ends[1] < 200 and 1000 < ends[2] < 2240 < ends[3] and 1000 < ends[4] < 2690 < ends[5] < 10_000
    (middle,) = [r for r in rows if r["budget"] == "1000"]
    assert middle == {
        "model": "toy-base", "total_params": "10000000", "task": "t", "method": "apet", "mask": "random", "budget": "1000",
        "runs": "3", "position_seeds": "3", "mean": "0.7", "sd": "0.02", "min": "0.68", "max": "0.72", "random_guess": "0.5",
        "majority": "0.5", "full_mean": "0.8",
    }  # fmt: skip
    (whole,) = [r for r in rows if r["method"] == "full"]
    assert (whole["sd"], whole["position_seeds"], whole["budget"]) == ("0.014142", "0", "10000000")
    assert "| toy-base | 10,000,000 | 0.500 ± 0.020 (3) | 0.700 ± 0.020 (3) | 0.900 ± 0.020 (3) |" in text


def test_chance_is_the_better_of_random_guess_and_majority(runs, out):
    """Low: 0.6 + 2.326 sqrt(0.24 / 1000) = 0.636034 at 10^(2 + 0.136034 / 0.2) = 479; high: 0.78 at 10^(3 + 0.08 / 0.2)."""
    line(runs, (0.5, 0.7, 0.9), offsets=(0, 0), majority=0.6)
    full(runs, 0.8, majority=0.6)
    assert "| 479 [479, 479] | 2,510 [2,510, 2,510] | 2,730 [" in made(runs, out)[0]


def test_full_fine_tuning_is_the_last_point(runs, out):
    """0.5 + 0.9 · 0.4 = 0.86, between 0.6 at 1,000 and 0.9 at 10,000,000: 10^(3 + 4 · 0.26 / 0.3)."""
    line(runs, (0.5, 0.6), offsets=(0, 0))
    full(runs, 0.9)
    assert "| 2,930,000 [2,930,000, 2,930,000] |" in made(runs, out)[0]


def test_means_that_fall_are_pooled(runs, out):
    """0.5, 0.8, 0.6, 0.9 at 100 to 100,000, full 0.9: high level 0.86. 0.8 and 0.6 count as 0.7 each: 10^(4 + 0.16 / 0.2); low:
    10^(2 + 0.036777 / 0.2) = 153."""
    line(runs, (0.5, 0.8, 0.6, 0.9), offsets=(0, 0))
    full(runs, 0.9)
    assert "| 153 [153, 153] | 63,100 [63,100, 63,100] |" in made(runs, out)[0]
    assert report.rising([0.1, 0.5, 0.3, 0.3, 0.6, 0.2]) == pytest.approx([0.1, 1.1 / 3, 1.1 / 3, 1.1 / 3, 0.4, 0.4])


def test_the_untuned_model_is_the_first_point(runs, out):
    """At one scalar: 0.5; at 100 0.7: the low level lies at 10^(2 · 0.036777 / 0.2) = 2.33."""
    line(runs, (0.7, 0.9), offsets=(0, 0))
    put(runs, 0.5, method="none", lr=None)
    text, rows = made(runs, out)
    assert "| 2.33 [2.33, 2.33] | no full run |" in text and "untuned" in text
    assert [r["mean"] for r in rows if r["method"] == "none"] == ["0.5"]


def test_one_full_run_leaves_the_sampling_error(runs, out):
    """h = 802 / 1004; 0.8 - sqrt(h (1 - h) / 1000) = 0.787323, reached at 10^(3 + 0.087323 / 0.2) = 2733."""
    line(runs, (0.5, 0.7, 0.9))
    full(runs, 0.8)
    assert "] | 2,730 [" in made(runs, out)[0]


def test_a_perfect_full_score_leaves_a_sampling_error_too(runs, out):
    """h = 1002 / 1004; 1 - sqrt(h (1 - h) / 1000) = 0.998590, reached at 10^(3 + 0.298590 / 0.299) = 9968."""
    line(runs, (0.5, 0.7, 0.999), offsets=(0, 0, 0))
    full(runs, 1.0, 1.0)
    assert "] | 9,970 [" in made(runs, out)[0]


def test_interval_by_hand(runs, out):
    """Only the seeds at 1,000 scalars differ, by -0.02, 0, 0.02. The mean of three draws is off by -0.02 with probability 1/27
    (below 5 %) and by at most -0.01333 with 4/27: the ends are 10^(2 + 0.036777 / (0.2 ∓ 0.01333)) = 157.4 and 148.7."""
    line(runs, (0.5,), offsets=(0, 0, 0))
    for s, score in enumerate((0.68, 0.7, 0.72)):
        put(runs, score, budget="1000", mask_seed=s)
    assert "| 153 [149, 157] | no full run | no full run |" in made(runs, out)[0]


def test_interval_holds_ninety_percent(runs, out):
    """One of eight seeds is 0.08 higher: it is drawn three times or more with probability 6.7 %, never with 34 %; so 5 % and 95 %
    lie at means of 0.72 and 0.69, 10^(2 + 0.036777 / 0.22) = 147 and 10^(2 + 0.036777 / 0.19) = 156."""
    line(runs, (0.5,), offsets=(0,) * 8)
    for s in range(8):
        put(runs, 0.77 if s == 5 else 0.69, budget="1e3", mask_seed=s)
    assert "| 153 [147, 156] |" in made(runs, out)[0]


def test_censored_and_missing_thresholds(runs, out):
    line(runs, (0.6, 0.7), offsets=(0, 0), task="passes at once")
    full(runs, 0.65, task="passes at once")
    line(runs, (0.5, 0.51), offsets=(0, 0), task="never")
    line(runs, (0.5, 0.51), offsets=(0, 0), task="nothing learns")
    full(runs, 0.505, task="nothing learns")
    line(runs, (0.5, 0.7), offsets=(0,), task="one seed")
    text, _ = made(runs, out)
    assert "| passes at once | <= 100 [100, 100] | 224 [224, 224] | 223 [" in text  # 10^(2 + (0.635 - 0.6) / 0.1)
    assert "| never | > 1,000 [1,000, 1,000] | no full run |" in text
    assert "| nothing learns | > 10,000,000 [10,000,000, 10,000,000] | full at chance | full at chance |" in text
    assert "| one seed | 153 | no full run |" in text


def spreads(folder, factor, task, sd=0.01, mean=0.75, tuned_in_full=0.9, **which):
    """At LoRA's number of scalars the sd over positions is sd at 1e5 parameters, and factor times that with each decade."""
    for i, model in enumerate(SCALES):
        for s, offset in enumerate((-1, 0, 1)):
            put(folder, mean + offset * sd * factor**i, model=model, task=task, mask_seed=s, **{"budget": "lora"} | which)
        full(folder, tuned_in_full, model=model, task=task)


def test_a_slope_and_its_interval_by_hand(runs, out):
    """Slopes log10(1/2) = -0.301 twice, log10(1/4) = -0.602: mean -0.401, sd 0.174; half 2.920 · 0.174 / √3 = 0.293."""
    spreads(runs, 0.5, "a")
    assert findings(runs, out)["1."] == ["-0.30", "1 of 1 tasks fall", "undecided"]
    spreads(runs, 0.25, "b", sd=0.02)
    assert findings(runs, out)["1."] == ["-0.45 [-1.40, +0.50]", "2 of 2 tasks fall", "undecided"]  # half 6.314 · 0.2129 / √2
    spreads(runs, 0.5, "c")
    assert findings(runs, out)["1."] == ["-0.40 [-0.69, -0.11]", "3 of 3 tasks fall", "**for**"]


def test_spreads_that_rise_are_against(runs, out):
    for task, factor in (("a", 2), ("b", 2), ("c", 4)):
        spreads(runs, factor, task)
    assert findings(runs, out)["1."] == ["+0.40 [+0.11, +0.69]", "0 of 3 tasks fall", "**against**"]


def test_the_budgets_of_a_task_share_a_slope(runs, out):
    """Against least squares with a column for each budget's level."""
    spreads(runs, 0.5, "a")
    for model, sd in (("toy-tiny", 0.03), ("toy-small", 0.004)):
        for s, offset in enumerate((-1, 0, 1)):
            put(runs, 0.75 + offset * sd, model=model, task="a", mask_seed=s, budget="bitfit")
    x = np.array([[5, 1, 0], [6, 1, 0], [7, 1, 0], [5, 0, 1], [6, 0, 1]])
    slope = np.linalg.lstsq(x, np.log10([0.01, 0.005, 0.0025, 0.03, 0.004]), rcond=None)[0][0]
    assert findings(runs, out)["1."][0] == f"{slope:+.2f}" != "-0.30"


def test_what_counts_in_finding_1(runs, out):
    """Three position seeds, a method's budget or thousandths to hundredths of the model, half of what full fine-tuning gains."""
    spreads(runs, 0.5, "counts")
    spreads(runs, 2, "near chance", mean=0.69)
    spreads(runs, 2, "full at chance", tuned_in_full=0.53)
    spreads(runs, 2, "too few", budget="99")  # below 0.1 % of the first model
    spreads(runs, 2, "too many", budget="11000", mean=0.75)  # 11 % of the first; 1.1 and 0.11 % of the others: rises
    for model in ("toy-tiny", "toy-small"):
        for s in range(2):
            put(runs, 0.75 + s * 0.1, model=model, task="two seeds", mask_seed=s, budget="lora")
        full(runs, 0.9, model=model, task="two seeds")
    found = findings(runs, out)
    assert found["1."] == ["-0.00 [-1.90, +1.90]", "1 of 2 tasks fall", "undecided"]  # "counts" and "too many"
    assert found["the same at every budget and score"][:2] == ["+0.18 [-0.08, +0.44]", "1 of 5 tasks fall"]


def test_a_spread_of_nothing_has_a_floor(runs, out):
    """0.01, 0.0001 (counts as 0.001), 0 (as 0.001): slope of log10: (-2 - -3) · -1 / 2 = -0.5."""
    for model, sd in zip(SCALES, (0.01, 0.0001, 0), strict=True):
        for s, offset in enumerate((-1, 0, 1)):
            put(runs, 0.75 + offset * sd, model=model, mask_seed=s, budget="lora")
        full(runs, 0.9, model=model)
    assert findings(runs, out)["1."][0] == "-0.50"


def test_high_thresholds_that_fall(runs, out):
    """High level 0.5 + 0.9 · 0.3 = 0.77; with the steps 0.2, 0.25 and 0.3 from 0.6 at 100: 10^(2 + 0.17 / step) = 708, 479, 369."""
    for task in ("a", "b"):
        for model, step in zip(SCALES, (0.2, 0.25, 0.3), strict=True):
            line(runs, (0.6, 0.6 + step), offsets=(0, 0), model=model, task=task)
            full(runs, 0.8, model=model, task=task)
    for high in (708, 479, 369):
        assert f"| a | <= 100 [100, 100] | {high} [{high}, {high}] |" in made(runs, out)[0]
    slope = (0.17 / 0.3 - 0.17 / 0.2) / 2
    assert findings(runs, out)["2."] == [f"{slope:+.2f} [{slope:+.2f}, {slope:+.2f}]", "2 of 2 tasks fall", "**for**"]


def test_low_thresholds_of_the_tasks(runs, out):
    """Level 0.536777. A step of 0.2 from 0.5 at 100 gives 152.7, one of 0.05 544.0: a factor of 3.56; from 1,000 on 1,527: 10."""
    for model in ("toy-tiny", "toy-small"):
        line(runs, (0.5, 0.7), offsets=(0, 0), task="early", model=model)
        line(runs, (0.5, 0.55), offsets=(0, 0), task="late", model=model)
    assert findings(runs, out)["3."] == ["factor 3.56 [3.56, 3.56]", "2 of 2 models within 10", "**for**"]
    line(runs, (0.5, 0.5, 0.5, 0.7), offsets=(0, 0), task="later", model="toy-tiny")  # a factor of 100
    assert findings(runs, out)["3."][1:] == ["1 of 2 models within 10", "undecided"]
    line(runs, (0.5, 0.5, 0.5, 0.7), offsets=(0, 0), task="later", model="toy-small")
    assert findings(runs, out)["3."] == ["factor 100 [100, 100]", "0 of 2 models within 10", "**against**"]


def test_a_threshold_below_what_was_measured_of_its_task_alone_is_left_out(runs, out):
    for model in ("toy-tiny", "toy-small"):
        line(runs, (0.6, 0.7), offsets=(0, 0), task="a", model=model)  # <= 100, the smallest
        put(runs, 0.7, budget="1e3", task="b", model=model)  # <= 1,000 says nothing
    assert findings(runs, out)["3."] == ["", "none", "undecided"]


def test_methods_that_differ_less(runs, out):
    for model, step in (("toy-tiny", 0.1), ("toy-small", 0.01)):
        for i, method in enumerate(("adapter", "lora", "bitfit", "prompt")):
            put(runs, 0.5 + i * step, model=model, method=method)
    (row,) = [v for k, v in findings(runs, out).items() if k.startswith("where the paper starts")]
    assert row[:2] == ["-1.00", "1 of 1 tasks fall"]


def test_power_against_studies_played_by_hand(runs, capsys):
    """The pilot's tasks have one slope and no scatter, so that only the seeds' own remains: scores drawn, sds, slopes, t."""
    for task in "abc":
        spreads(runs, 0.5, task)
    assert report.main([str(runs), "--power"]) == 0
    said = capsys.readouterr().out
    assert "sd of the slope over tasks 0.00, of a spread around its line 0.00" in said
    found = {tuple(row[:3]): row[3:] for row in (x.strip("| ").split(" | ") for x in said.splitlines() if x.count("|") == 9)}
    rng, x = np.random.default_rng(7), np.array([-1.0, 0.0, 1.0])
    for true, column in ((0, 0), (-0.15, 1)):
        sd = np.log10((rng.standard_normal((4000, 5, 2, 3, 5)) * 10 ** (true * x[:, None])).std(-1, ddof=1))
        slopes = ((sd[..., 2] - sd[..., 0]) / 2).mean(2)
        share = (slopes.mean(1) + 2.132 * slopes.std(1, ddof=1) / 5**0.5 < 0).mean()
        assert abs(float(found["5", "2", "5"][column]) - share) < 0.035
    assert float(found["11", "4", "10"][4]) == 1


def test_a_head_trained_alone_stands_beside_the_methods(runs, out):
    line(runs, (0.7,))
    put(runs, 0.61, method="none", lr=None)
    file = max(runs.iterdir())
    file.write_text(file.read_text().replace('"score"', '"head_trained": true, "score"'))
    text, rows = made(runs, out)
    assert [r["mean"] for r in rows if r["method"] == "none"] == ["0.61"]
    assert "head alone" in text and "0.610" in text and "nothing was trained" not in text


def test_other_runs_are_left_out_and_said(runs, out):
    line(runs, (0.7,))
    put(runs, 0.1, lr=0.1, budget="100", mask_seed=9)
    put(runs, 0.1, steps=5, budget="100", mask_seed=9)
    put(runs, 0.1, where="attention", budget="100", mask_seed=9)
    put(runs, 0.1, method="none", lr=None)
    file = max(runs.iterdir())
    file.write_text(file.read_text().replace('"score"', '"head_params": 2, "score"'))  # a head drawn at random
    put(runs, 0.1, budget="100", mask_seed=0, date="2026-01-01T00:00:00")
    text, rows = made(runs, out)
    assert [(r["mean"], r["runs"]) for r in rows] == [("0.7", "3")]
    for why in ("an explicit learning rate", "nothing was trained", "run again later with the same arguments"):
        assert f"1 left out: {why}" in text
    assert "(t steps 5)" in text and "(t where attention)" in text


def test_broken_files_are_named(runs, out):
    line(runs, (0.7,))
    (runs / "cut.json").write_text('{"score": 0.')
    (runs / "bench.json").write_text('{"command": 1, "arguments": {}}')
    (runs / "list.json").write_text("[1, 2]")
    (runs / "binary.json").write_bytes(b"\xff\xfe\x00")
    changed = json.loads((runs / "0000.json").read_text())
    for name, score in (("nan", float("nan")), ("words", "high")):
        (runs / f"{name}.json").write_text(json.dumps(changed | {"score": score}))
    text, rows = made(runs, out)
    assert "skipped cut.json: broken JSON" in text and "skipped binary.json: broken JSON" in text
    for name in ("bench", "list", "nan", "words"):
        assert f"skipped {name}.json: no result of apet.py" in text
    assert [r["runs"] for r in rows] == ["3"]


def test_structure(runs, out):
    line(runs, (0.6, 0.7))
    put(runs, 0.65, mask="row", mask_seed=0)
    put(runs, 0.67, mask="row", mask_seed=1)
    text, rows = made(runs, out)
    assert "| model | task | budget | random | row | |---|---|---|---|---| | toy-base" in text
    assert "| toy-base | t | 1,000 | 0.700 ± 0.020 (3) | 0.660 ± 0.014 (2) |" in text
    assert "| t | 100 |" not in text
    assert [r["mean"] for r in rows if r["mask"] == "row"] == ["0.66"]


def test_a_report_lies_beside_its_data_and_is_the_same_again(runs):
    """No page that a person wrote there is touched."""
    line(runs, (0.7,))
    (runs / "README.md").write_bytes(b"mine")
    before, made_twice = {f.name for f in runs.iterdir()}, []
    for _ in range(2):
        assert report.main([str(runs)]) == 0
        made_twice.append((runs / "report.md").read_bytes())
    made_files = {"report.md", "report.csv", "budget.png"}
    assert {f.name for f in runs.iterdir()} == before | made_files and made_twice[0] == made_twice[1]
    assert (runs / "README.md").read_bytes() == b"mine"


def test_packed_runs_give_the_same_report(runs, out, tmp_path):
    line(runs, (0.5, 0.7, 0.9))
    full(runs, 0.79, 0.81)
    first = min(runs.iterdir())
    one = json.loads(first.read_text()) | {"loss_curve": [11.3376251, 2.0], "loss_every": 2}
    there = one | {"arguments": one["arguments"] | {"out": "/some/where"}, "delta": "/some/where/x.safetensors"}
    first.write_text(json.dumps(there))  # a path of one machine, which is not packed
    packed = tmp_path / "packed" / "runs.jsonl"
    packed.parent.mkdir()
    for _ in range(2):  # what was packed before is read as well, and written once
        assert report.main([str(runs), str(packed), "--pack", str(packed)]) == 0
    lines = [json.loads(x) for x in packed.read_text().splitlines()]
    assert lines[0] == {"name": first.stem} | one | {"loss_curve": [11.34, 2.0]}
    assert [x["name"] for x in lines] == sorted(f.stem for f in runs.iterdir())
    assert made(runs, out / "many") == made(packed.parent, out / "folder") == made(packed, out / "file")
    assert report.main([str(packed)]) == 0 and (packed.parent / "report.md").exists()


def test_nothing_is_packed_when_a_file_cannot_be_read(runs, tmp_path, capsys):
    line(runs, (0.7,))
    (runs / "cut.json").write_text('{"score": 0.')
    packed = tmp_path / "runs.jsonl"
    packed.write_text("old")
    assert report.main([str(runs), "--pack", str(packed)]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "report: skipped cut.json: broken JSON"
    assert packed.read_text() == "old"


def test_lines_that_are_no_results_are_named(runs, out, capsys):
    line(runs, (0.7,))
    good = [f.read_text() for f in sorted(runs.iterdir())]
    for file in runs.iterdir():
        file.unlink()
    foreign = '{"text": "a review", "label": 1}'
    (runs / "runs.jsonl").write_text("\n".join([good[0], '{"cut', "", *good[1:], *[foreign] * 5]))
    (runs / "binary.jsonl").write_bytes(b"\xff\xfe\x00\n\x00")
    text, rows = made(runs, out)
    assert [r["runs"] for r in rows] == ["3"]
    assert "skipped runs.jsonl, line 2: broken JSON" in text
    assert "skipped runs.jsonl, line 6 and 4 more: no result of apet.py" in text
    assert "skipped binary.jsonl, line 1 and 1 more: broken JSON" in text
    assert capsys.readouterr().err.count("report: skipped") == 3


def test_rates_that_were_swept(runs, out):
    """The rate is chosen by the validation rows; the scores are means over the seeds that all rates have."""
    for rate, score, best in ((0.01, 0.7, 0.8), (0.003, 0.6, 0.6)):
        put(runs, score, lr=rate, rate=rate, best=best)
        put(runs, score + 0.1, lr=rate, rate=rate, seed=1, best=best)
    put(runs, 0.1, lr=0.01, rate=0.01, seed=2, best=0.1)
    put(runs, 0.68, rate=0.005, best=0.7)
    put(runs, 0.72, rate=0.005, seed=1, best=0.7)
    put(runs, 0.5, lr=0.1, rate=0.1, method="lora")  # one rate, no other
    put(runs, 0.5, rate=0.001, method="full")  # no sweep
    put(runs, 0.9, lr=0.03, rate=0.03, steps=5)  # another setting
    assert report.main([str(runs), "--rates", "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "| toy-base | t | 600 | apet | 1000 | random | 2 | 0.003: 0.650 · 0.005: 0.700 (auto) · 0.01: 0.750 | 5.0 |" in text
    assert "| toy-base | t | 600 | lora | 5000 |  | 1 | 0.1: 0.500 |  |" in text
    assert "| toy-base | t | 5 | apet | 1000 | random | 1 | 0.03: 0.900 |  |" in text
    assert text.count("toy-base") == 3 and "5.0 on average over 1 rows, 5.0 at most" in text


def places(value, path=()):
    """The path of each value in a JSON."""
    yield path
    for key, x in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(x, (*path, key))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([0, 10**400, "\ud800", "none", "apet"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), json_values)
def test_whatever_a_file_holds_the_answer_is_a_report_or_a_line(tmp_path_factory, data, value):
    folder = tmp_path_factory.mktemp("fuzz")
    line(folder, (0.6, 0.7))
    full(folder, 0.8)
    changed = json.loads((folder / "0000.json").read_text()) | {"loss_curve": [1.0], "lr": 0.1}
    *path, last = data.draw(st.sampled_from([p for p in places(changed) if p]))
    inner = changed
    for key in path:
        inner = inner[key]
    inner[last] = value
    (folder / "changed.jsonl").write_text(json.dumps(changed) + "\n" + json.dumps(value))
    for more in ([], ["--rates"], ["--pack", str(folder / "packed")]):
        assert report.main([str(folder), *more]) in (0, 2)


def test_figures_are_pictures(runs, out):
    for model in ("t5-small", "t5-base", "bert-base"):
        line(runs, (0.5, 0.7, 0.9), model=model, total=SCALES["toy-tiny"] * len(model))
        full(runs, 0.85, model=model, total=SCALES["toy-tiny"] * len(model))
    text, _ = made(runs, out)
    names = {"scale-t5.png", "positions-t5.png", "budget-t5.png", "budget-bert.png"}  # bert has one scale
    assert {f.name for f in out.glob("*.png")} == names
    for name in names:
        picture = image.imread(out / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.02 and (out / name).stat().st_size < 150_000
        assert f"]({name})" in text
    pixels = {tuple(p) for p in (image.imread(out / "budget-t5.png")[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= pixels  # the colours of the two models


@pytest.mark.parametrize("what", ["full alone", "lora alone", "other mask alone"])
def test_partial_folders(runs, out, what):
    if what == "other mask alone":
        put(runs, 0.6, mask="row")
    else:
        put(runs, 0.9, method=what.split()[0])
    text, rows = made(runs, out)
    assert len(rows) == 1 and "Nothing to show." in text and text.count("| | none | undecided |") == 3


def test_nothing_to_read(tmp_path, out, capsys):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "rate", 0.6, lr=0.1)
    for name in ("empty", "absent", "rate"):
        assert report.main([str(tmp_path / name), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error
        assert not out.exists()
