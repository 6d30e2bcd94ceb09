#!/usr/bin/env python3
"""What a training step costs, against the frozen bound and beside other methods, in one process and in alternation.

    python tests/bench.py                                        # T5-base shapes, fp32, 8 x 128 tokens, 1e2 ... 1e7
    python tests/bench.py --shape t5-large --dtype bf16 --batch 32 --device cuda
    python tests/bench.py --every t5-large,t5-3b,t5-11b --dtype bf16 --device cuda --budgets 1e4,1e6 --peers lora  # 9 min
    python tests/bench.py --paths                                # what COST in apet.py comes from
    python tests/bench.py --host                                 # operator calls and host time beside LoRA (also --launches)
    python tests/bench.py --compile                              # compiled models against the compiled frozen bound
    python tests/bench.py --figure                               # of all in results/bench: tables.txt and growth.png

The frozen bound is forward plus backward to the inputs of the same model, all weights frozen: what any method that
tunes weights throughout the model has to pay. In each round every method is set up, warmed up, and timed in alternation
with the bound (method, bound, bound, method, ...); ratios are medians over all pairs, so that they hold on a machine whose
speed drifts. On a CPU the ratio is taken of wall time and of the process's CPU time (which others on the machine disturb
less). Random weights: speed does not depend on them.

Writes results/bench/NAME.json and prints a table. peft is needed for the rows LoRA and SHiRA, and left out without it.
"""

from __future__ import annotations

import argparse
import collections
import gc
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "bench"
sys.path.insert(0, str(ROOT))
import apet
from apet import APET

T5 = {  # d_model, d_ff, layers, heads, d_kv, as published
    "t5-tiny": (256, 1024, 4, 4, 64),  # not published
    "t5-small": (512, 2048, 6, 8, 64),
    "t5-base": (768, 3072, 12, 12, 64),
    "t5-large": (1024, 4096, 24, 16, 64),
    "t5-3b": (1024, 16384, 24, 32, 128),
    "t5-11b": (1024, 65536, 24, 128, 128),
}
warnings.filterwarnings("ignore", category=FutureWarning)  # a name that peft still uses
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(shape: str, dtype: torch.dtype, device: str, layers: int | None, one_memory: bool = False) -> torch.nn.Module:
    """one_memory: parameters of equal shape lie in the same memory, for models that are larger than it."""
    d_model, d_ff, depth, heads, d_kv = T5[shape]
    layers = layers or depth
    config = transformers.T5Config(
        vocab_size=32128, d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads, d_kv=d_kv, dropout_rate=0.0,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    with torch.device("meta" if one_memory else device):
        model = transformers.T5ForConditionalGeneration(config)
    if one_memory:
        stock = {p.shape: torch.randn(p.shape, device=device) / p.shape[-1] ** 0.5 for p in model.parameters()}
        model.load_state_dict({name: stock[p.shape] for name, p in model.state_dict().items()}, assign=True)
        model.tie_weights()
    torch.set_default_dtype(torch.float32)
    return model.train()


def checkpointing(model: torch.nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """Another model on the same weights, which a method's hooks and wrappers do not reach."""
    with torch.device("meta"):
        other = transformers.T5ForConditionalGeneration(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.train()


class Frozen:
    """The bound: backward reaches the inputs, nothing is tuned."""

    label, tuned, optimizer = "frozen bound", 0, None

    def __init__(self, model: torch.nn.Module):
        self.model, self.params = model.requires_grad_(False), []
        for embedding in (model.encoder.embed_tokens, model.decoder.embed_tokens):
            embedding.register_forward_hook(lambda m, a, out: out.requires_grad_(True))

    def step(self, batch: dict) -> None:
        self.model(**batch).loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Tuned(Frozen):
    """Parameters of the model, or added to it, with AdamW."""

    def __init__(self, model: torch.nn.Module, label: str, params: list, close=lambda: None):
        self.model, self.label, self.params, self.closing = model, label, params, close
        self.tuned = sum(p.numel() for p in params)
        self.optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)  # for every method: by far the fastest, on a CPU too

    def close(self) -> None:
        self.optimizer = None
        self.closing()
        for p in self.model.parameters():
            p.grad = None
        self.model.requires_grad_(True)


def apet_row(model: torch.nn.Module, k: int, backend: str) -> Tuned:
    start = time.perf_counter()
    tuned = APET(model, k, backend=backend)
    row = Tuned(model, f"APET {k:.0e} {backend}".replace("e+0", "e"), [tuned.values], tuned.remove)
    row.setup_s, row.apet = time.perf_counter() - start, tuned
    tuned.attach(row.optimizer)
    return row


def mask_row(model: torch.nn.Module, k: int) -> Tuned:
    """A dense 0/1 mask on dense gradients and dense AdamW moments, as FISH and LT-SFT do."""
    positions = apet.select_positions(model, k)
    named, hooks = dict(model.named_parameters()), []
    for name, p in named.items():
        p.requires_grad_(name in positions)
        if name in positions:
            mask = torch.zeros_like(p).view(-1).index_fill_(0, positions[name].to(p.device), 1).view_as(p)
            hooks.append(p.register_hook(lambda grad, mask=mask: grad * mask))
    row = Tuned(
        model, f"dense mask {k:.0e}".replace("e+0", "e"), [named[n] for n in positions], lambda: [h.remove() for h in hooks]
    )
    row.tuned = k
    return row


def bitfit_row(model: torch.nn.Module) -> Tuned:
    """A new zero bias in every linear layer (T5 has none)."""
    model.requires_grad_(False)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for m in linears:
        m.bias = torch.nn.Parameter(m.weight.new_zeros(m.out_features))
    params = [m.bias for m in linears]

    def close() -> None:
        for m in linears:
            m.bias = None

    return Tuned(model, "BitFit", params, close)


def peft_row(model: torch.nn.Module, label: str, config: object) -> Tuned:
    import peft

    model.requires_grad_(False)
    wrapped = peft.get_peft_model(model, config)

    def close() -> None:
        wrapped.unload()

    return Tuned(model, label, [p for p in wrapped.parameters() if p.requires_grad], close)


def saved_bytes(row: Frozen, batch: dict) -> int:
    """Bytes that autograd keeps for backward, each storage once, weights left out."""
    weights = {p.untyped_storage()._cdata for p in row.model.parameters()}  # an address that meta tensors have, too
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.layout != torch.strided:  # SHiRA's: indices and values, made anew in every forward
            seen[id(t)] = sum(x.untyped_storage().nbytes() for x in (t._indices(), t._values()))
            return t
        s = t.untyped_storage()
        if s._cdata not in weights:
            seen[s._cdata] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = row.model(**batch).loss
    total = sum(seen.values())
    loss.backward()
    return total


def measure(row: Frozen, batch: dict, device: str) -> dict:
    """Bytes and the one-off costs of a method, after a step of it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        row.step(batch)
    fact = dict(tuned=row.tuned, saved_bytes=saved_bytes(row, batch))
    fact["gradient_bytes"] = sum(p.grad.nbytes for p in row.params if p.grad is not None)
    states = row.optimizer.state.values() if row.optimizer else []
    fact["optimizer_bytes"] = sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))
    if device == "cuda":
        fact["peak_bytes"] = torch.cuda.max_memory_allocated()
    if hasattr(row, "apet"):
        start = time.perf_counter()
        row.apet.write()
        sync(device)
        fact |= dict(write_ms=1e3 * (time.perf_counter() - start), setup_s=row.setup_s)
        with tempfile.TemporaryDirectory() as folder:
            row.apet.save(f"{folder}/delta")
            fact["file_bytes"] = os.path.getsize(f"{folder}/delta")
    return fact


def memory_table(batch: int, source: int, target: int) -> None:
    """Bytes by shape in bf16, on the meta device: weights, what backward needs, and the GPU on which training fits.

    APET adds at most 64 bytes a scalar to the frozen model's; full fine-tuning 16 a parameter: an fp32 copy of the weights, its
    gradient and two moments. With checkpointing, one block's activations exist at a time. A GPU fits if a tenth of what is
    needed and 1 GB are left.
    """
    print(f"bf16, {batch} x {source} source and {target} target tokens; GB")
    print(f"{'shape':10}{'weights':>9}{'saved':>8}{'ckpt.':>8}   {'APET 1e4, and with ckpt.':28}full, and with ckpt.")
    for shape, (_, _, layers, _, _) in T5.items():
        model = build(shape, torch.bfloat16, "meta", None)
        rows = [Frozen(model), Frozen(twin(model))]
        checkpointing(rows[1].model)
        data = {n: torch.zeros(batch, k, dtype=torch.long, device="meta") for n, k in (("input_ids", source), ("labels", target))}
        saved, kept = (saved_bytes(row, data) / 1e9 for row in rows)
        count = sum(p.numel() for p in model.parameters())
        cells = []
        for extra in (10_000 * 64, count * 16):
            for activations in (saved, kept + saved / (2 * layers)):
                need = (2 * count + extra) / 1e9 + activations
                card = next((f"{c} GB" for c in (16, 24, 40, 80) if 1.1 * need + 1 < c), "more")
                cells.append(f"{need:.1f} ({card})")
        print(f"{shape:10}{2 * count / 1e9:9.2f}{saved:8.2f}{kept:8.2f}   {', '.join(cells[:2]):28}{', '.join(cells[2:])}")


def paths_table() -> None:
    """What COST in apet.py comes from: a linear layer's forward and backward beyond the frozen one's, by each path, in entries of
    the dense product over the same tokens, for a layer and for each chosen entry."""
    print(f"{torch.get_num_threads()} cores; in entries of the dense product; (for each chosen entry)")

    def clock(step: object) -> float:
        times, junk = [], torch.empty(12_000_000)
        for _ in range(8):
            junk.fill_(1.0)  # in a step, too, other work has taken the caches
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    costs = {"one by one": dict(entry=1, dot=1e9, line=0, call=0), "sampled": dict(entry=1e9, dot=1, line=0, call=0)}
    for tokens, rows, cols in itertools.product((1024, 64), (768, 3072), (768, 3072)):
        layer, x = torch.nn.Linear(cols, rows, bias=False), torch.randn(tokens, cols, requires_grad=True)
        dy = torch.randn(tokens, rows)
        step = lambda layer=layer, x=x, dy=dy: layer(x).backward(dy)  # noqa: E731
        unit = clock(lambda x=x, dy=dy: dy.t() @ x) / layer.weight.numel()
        layer.requires_grad_(False)
        frozen = clock(step)
        print(f"{tokens} tokens, {rows} x {cols}: dense {1e3 * unit * layer.weight.numel():.2f} ms")
        for density in (4.5e-5, 4.5e-4, 4.5e-3, 4.5e-2):
            m, found = int(density * layer.weight.numel()), []
            for path in ("hook", *costs):
                old = apet.COST["cpu"]
                apet.COST["cpu"] = costs.get(path, old)
                tuned = APET(layer, m, backend="hook" if path == "hook" else "gather")
                cost = (clock(step) - frozen) / unit
                found.append(f"{path} {cost:10,.0f} ({cost / m:7.1f})")
                tuned.remove()
                apet.COST["cpu"] = old
            print(f"  {m:7,} entries: {'   '.join(found)}")


class Count(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[op._schema.name] += 1
        return op(*args, **(kwargs or {}))


def calls_and_host_time(budget: int, rounds: int) -> None:
    """Operator calls of a step, and its host time where arithmetic is negligible, beyond the frozen bound; beside LoRA.

    T5 of 12 + 12 layers; widths of 256 for the calls, of 32 for the time (one thread, CPU time, medians over alternating steps).
    """
    import peft

    torch.set_num_threads(1)
    for width, vocabulary, length in ((256, 32128, 64), (32, 512, 8)):
        config = transformers.T5Config(
            vocab_size=vocabulary, d_model=width, d_ff=2 * width, d_kv=width // (8 if width > 32 else 4), num_layers=12,
            num_heads=8 if width > 32 else 4, dropout_rate=0.0, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        torch.manual_seed(0)
        draw = lambda n, m: torch.randint(5, config.vocab_size, (n, m))  # noqa: B023, E731
        batch = dict(input_ids=draw(8 if width > 32 else 2, length), labels=draw(8 if width > 32 else 2, 4))
        model = lambda: transformers.T5ForConditionalGeneration(config).train()  # noqa: B023, E731
        k = budget if width > 32 else budget // 5
        rows = [Frozen(model()), apet_row(model(), k, "gather"), apet_row(model(), k, "hook")]
        lora = peft.LoraConfig(r=8, target_modules=["q", "v"])
        rows.append(peft_row(model(), "LoRA r=8 on q, v (peft)", lora))
        tensors = [0, len(rows[1].apet.positions), len(rows[2].apet.positions), 72]
        for row in rows * 2:
            row.step(batch)
        if width > 32:
            print(f"operator calls beyond the frozen bound, width {width}")
            for row, n in zip(rows, tensors, strict=True):
                with Count() as count:
                    row.step(batch)
                bound = bound if row is not rows[0] else sum(count.calls.values())  # noqa: F821
                beyond = sum(count.calls.values()) - bound
                print(f"{row.label:26}{beyond:7,} over {n} tensors")
            continue
        times: dict[str, list[float]] = {row.label: [] for row in rows}
        for _, row in itertools.product(range(rounds), rows):
            start = time.process_time()
            row.step(batch)
            times[row.label].append(time.process_time() - start)
        medians = [statistics.median(t) for t in times.values()]
        print(f"host time of a step, width {width}, {rounds} steps each; beyond the frozen bound")
        for row, n, ms in zip(rows, tensors, medians, strict=True):
            excess = ms - medians[0]
            share = f"{1e6 * excess / n:.0f} us a tensor, {excess / (medians[-1] - medians[0]):.2f} of LoRA's" if n else ""
            print(f"{row.label:26}{1e3 * ms:7.1f} ms{1e3 * excess:7.1f} ms over {n:3} tensors  {share}")


def compiled(budget: int, rounds: int) -> None:
    """A step of a compiled model (inductor, one graph) against the compiled frozen bound: T5 of 2 + 2 layers, 8 x 128 tokens."""
    config = transformers.T5Config(
        vocab_size=512, d_model=256, d_ff=1024, d_kv=32, num_layers=2, num_heads=8, dropout_rate=0.0, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = dict(input_ids=torch.randint(5, 500, (8, 128)), labels=torch.randint(5, 500, (8, 8)))
    steps = {}
    for name in ("frozen bound", "gather", "hook"):
        model = transformers.T5ForConditionalGeneration(config).train()
        if name == "frozen bound":  # two norms at the bottom let backward reach the inputs
            for n, p in model.named_parameters():
                p.requires_grad_(n.endswith("block.0.layer.0.layer_norm.weight"))
        else:
            model.apet = [APET(model, budget, backend=name)]
        whole = torch.compile(model, fullgraph=True)
        for kind, forward in (("eager", model), ("compiled", whole)):
            start = time.perf_counter()
            forward(**batch).loss.backward()
            print(f"{name}, {kind}: first step {time.perf_counter() - start:.1f} s", flush=True)
            steps[name, kind] = lambda forward=forward: forward(**batch).loss.backward()
    times = {key: [] for key in steps}
    for _, (key, step) in itertools.product(range(rounds), steps.items()):
        start = time.perf_counter()
        step()
        times[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(t) for key, t in times.items()}
    for name, kind in medians:
        ratio = medians[name, kind] / medians["frozen bound", kind]
        print(f"{name:14}{kind:10}{1e3 * medians[name, kind]:8.1f} ms  {ratio:.3f} of the {kind} frozen bound")


def table(record: dict) -> list[str]:
    """The lines of a record's table; the first says what was measured, and where."""

    def number(row: dict, key: str, form: str, unit: float = 1.0) -> str:
        return format(row[key] / unit, form) if key in row else "-"

    a, bound = record["arguments"], record["rows"][0]
    rows = [bound, *sorted(record["rows"][1:], key=lambda r: (not r["method"].startswith("APET"), r["tuned"]))]
    cells = [
        {
            "method": r["method"],
            "tuned": f"{r['tuned']:,}",
            "step ms": f"{r['ms']:.0f}",
            "ratio": f"{r['ratio']:.3f}",
            "quartiles": f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}",
            "CPU": f"{r['cpu_ratio']:.3f}",
            "saved MB": number(r, "saved_bytes", ".1f", 1e6),
            "of bound": f"{r['saved_bytes'] / bound['saved_bytes']:.3f}",
            "grad MB": number(r, "gradient_bytes", ".2f", 1e6),
            "opt MB": number(r, "optimizer_bytes", ".2f", 1e6),
            "peak MB": number(r, "peak_bytes", ".0f", 1e6),
            "file kB": number(r, "file_bytes", ".1f", 1e3),
            "write ms": number(r, "write_ms", ".2f"),
            "set up s": number(r, "setup_s", ".2f"),
        }
        for r in rows
    ]
    lines = [list(cells[0]), *(list(row.values()) for row in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = f"{a['shape']} {a['dtype']}, {a['batch']} x {a['source']} source and {a['target']} target tokens, {record['machine']}"
    return [
        title,
        *("  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))) for line in lines),
    ]


def every(args: argparse.Namespace) -> None:
    """Each shape, 8 and 32 examples, without and with checkpointing: a process each, as one may not fit; then one table."""
    end, lines = time.monotonic() + 60 * args.minutes, []
    for shape, batch, saving in itertools.product(args.every.split(","), (8, 32), (False, True)):
        name = f"{shape}-{args.dtype}-{batch}x{args.source}-{args.device}{'-ckpt' if saving else ''}"
        command = [sys.executable, __file__, "--name", name, "--shape", shape, "--batch", str(batch)]
        command += ["--checkpointing"] if saving else []
        for option in ("dtype", "device", "source", "target", "budgets", "peers", "rounds", "pairs", "layers"):
            if getattr(args, option) is not None:
                command += [f"--{option}", str(getattr(args, option))]
        head, left = f"{shape:9}{batch:4}{'  yes' if saving else '   no'}", end - time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 0.1))
        except subprocess.TimeoutExpired:
            lines.append(f"{head}   not measured: {args.minutes} minutes were over")
            continue
        print(done.stdout, flush=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            lines.append(f"{head}   {'does not fit' if 'memory' in error else 'failed: ' + error[-300:]}")
            continue
        record = json.loads((RESULTS / f"{name}.json").read_text())
        for row in record["rows"]:
            speed = 1e3 * batch * (args.source + args.target) / row["ms"]
            peak = f"{row['peak_bytes'] / 1e9:8.2f}" if "peak_bytes" in row else "       -"
            lines.append(f"{head}   {row['method']:26}{row['ms']:10.1f}{row['ratio']:8.3f}{speed:11,.0f}{peak}")
    print(f"{'shape':9}{'size':>4} ckpt   {'method':26}{'step ms':>10}{'ratio':>8}{'tokens/s':>11}{'peak GB':>8}", *lines, sep="\n")


def figure() -> None:
    """Of all JSON files in results/bench: tables.txt; growth.png, ratios to the frozen bound against budget and model size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines: dict[str, dict[int, tuple[int, float]]] = {}  # label: {scalars: (pairs, ratio)}; of several runs the one of most pairs
    sizes: dict[str, int] = {}
    tables = []
    for file in sorted(RESULTS.glob("*.json")):
        record = json.loads(file.read_text())
        tables += [f"{file.name}: {record['command'].strip()} (commit {record['commit']}, {record['date']})", *table(record), ""]
        arguments = record["arguments"]
        label = f"{arguments['shape']} ({record['total']:.2g}), {arguments['dtype']}, {arguments['batch']} x {arguments['source']}"
        label = f"{label}, {record['machine'] if arguments['device'] == 'cuda' else 'CPU'}".replace("e+0", "e")
        label += ", checkpointing" if arguments["checkpointing"] else ""
        sizes[label] = record["total"]
        line = lines.setdefault(label, {})
        for row in record["rows"]:
            if (row["method"].startswith("APET") and row["method"].endswith("auto")) or row["method"] == "full fine-tuning":
                line[row["tuned"]] = max(line.get(row["tuned"], (0, 0.0)), (row["pairs"], row["ratio"]))
    (RESULTS / "tables.txt").write_text("\n".join(tables))
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for marker, label in zip("os^vDP*X", sorted(lines, key=sizes.get), strict=False):
        points = sorted((k, ratio) for k, (_, ratio) in lines[label].items())
        left.plot(*zip(*points, strict=True), marker=marker, label=label)
    for marker, k in zip("os^v", (100, 10_000, 100_000, 1_000_000), strict=True):
        points = sorted((sizes[label], line[k][1]) for label, line in lines.items() if k in line and k < sizes[label])
        if points:
            right.plot(*zip(*points, strict=True), marker=marker, label=f"{k:,} scalars")
    for axes, what in ((left, "tuned scalars (the last point: full fine-tuning)"), (right, "scalars of the model")):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel=what, ylabel="step / frozen bound")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    right.set_xlim(1e7, 10 ** max(9, *(len(str(size)) for size in sizes.values())))
    plt.savefig(RESULTS / "growth.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=T5, default="t5-base")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="examples")
    parser.add_argument("--source", type=int, default=128, help="source tokens of each")
    parser.add_argument("--target", type=int, default=8, help="target tokens of each (labels are words)")
    parser.add_argument("--budgets", default="1e2,1e4,1e5,1e6,1e7")
    parser.add_argument("--backends", default="auto", help="of auto,hook,gather")
    parser.add_argument("--peers", default="full,lora,shira,shira-all,mask,bitfit", help="of these, or 'none'")
    parser.add_argument("--layers", type=int, help="instead of the shape's own, for a quick look")
    parser.add_argument("--rounds", type=int, default=3, help="each method is set up anew in each")
    parser.add_argument("--pairs", type=int, default=4, help="timed steps of the bound and of the method, in a round")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--one-memory", action="store_true", help="parameters of equal shape share memory: speed alone is real")
    parser.add_argument("--memory", action="store_true", help="no timing: what fits on which GPU, by arithmetic")
    parser.add_argument("--paths", action="store_true", help="only what COST in apet.py comes from")
    parser.add_argument("--host", "--launches", action="store_true", help="only operator calls and host time, beside LoRA")
    parser.add_argument("--compile", action="store_true", help="only compiled models, against the compiled frozen bound")
    parser.add_argument("--figure", action="store_true", help="only the figure and the tables, from the JSON files that are there")
    parser.add_argument("--every", metavar="SHAPES", help="these shapes, 8 and 32 examples, without and with checkpointing")
    parser.add_argument("--minutes", type=float, default=8.5, help="for --every; what is not done then is said")
    parser.add_argument("--name", help="of the JSON file; default: from the shape")
    args = parser.parse_args()
    if args.memory:
        return memory_table(args.batch, args.source, args.target)
    if args.paths or args.figure:
        return paths_table() if args.paths else figure()
    if args.host or args.compile:
        return (calls_and_host_time if args.host else compiled)(10_000 if args.host else 2_000, 30)
    if args.every:
        return every(args)
    torch.manual_seed(0)
    model = build(args.shape, DTYPES[args.dtype], args.device, args.layers, args.one_memory)
    if args.checkpointing:
        checkpointing(model)
    total = sum(p.numel() for p in model.parameters())
    draw = lambda length: torch.randint(3, 32000, (args.batch, length), device=args.device)  # noqa: E731
    batch = {"input_ids": draw(args.source), "labels": draw(args.target)}
    budgets = [int(float(k)) for k in args.budgets.split(",")]
    peers = args.peers.split(",")

    makers = [lambda k=k, b=b: apet_row(model, k, b) for k in budgets for b in args.backends.split(",")]
    if "full" in peers:
        makers.append(lambda: Tuned(model, "full fine-tuning", list(model.parameters())))
    if "mask" in peers:
        makers.append(lambda: mask_row(model, 10_000))
    if "bitfit" in peers:
        makers.append(lambda: bitfit_row(model))
    try:
        import peft

        linear = ["q", "k", "v", "o", "wi", "wo"]
        if "lora" in peers:
            makers.append(
                lambda: peft_row(model, "LoRA r=8 on q, v (peft)", peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"]))
            )
        if "shira" in peers:
            makers.append(lambda: peft_row(model, "SHiRA r=1 on q, v (peft)", peft.ShiraConfig(r=1, target_modules=["q", "v"])))
        if "shira-all" in peers:
            makers.append(lambda: peft_row(model, "SHiRA r=1 on all linear (peft)", peft.ShiraConfig(r=1, target_modules=linear)))
    except ImportError:
        print("peft is not installed: no rows for LoRA and SHiRA")

    bound = Frozen(twin(model))
    if args.checkpointing:
        checkpointing(bound.model)
    facts = {bound.label: measure(bound, batch, args.device)}
    pairs: dict[str, list[tuple[float, float, float]]] = {}  # method: (bound's ms, its ms, ratio of CPU time)
    for round_ in range(args.rounds):
        random.Random(round_).shuffle(makers)
        for make in makers:
            row = make()
            row.step(batch)  # warm-up: moments are made, memory is fetched
            for pair in range(args.pairs):
                times = {}
                for part in (bound, row) if pair % 2 else (row, bound):  # who comes second may find memory warm
                    sync(args.device)
                    start = time.perf_counter(), time.process_time()
                    part.step(batch)
                    sync(args.device)
                    times[part] = (1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1]))
                (a, a_cpu), (b, b_cpu) = times[bound], times[row]
                pairs.setdefault(row.label, []).append((a, b, b_cpu / a_cpu))
            if round_ == 0:
                facts[row.label] = measure(row, batch, args.device)
            row.close()
            del row
            gc.collect()
    rows = []
    for label, fact in facts.items():
        mine = pairs.get(label) or [(a, a, 1.0) for p in pairs.values() for a, _, _ in p]
        ratios = sorted(b / a for a, b, _ in mine)
        quarter = len(ratios) // 4
        rows.append(dict(method=label, ms=statistics.median(b for _, b, _ in mine), ratio=statistics.median(ratios),
                         ratio_low=ratios[quarter], ratio_high=ratios[-1 - quarter],
                         cpu_ratio=statistics.median(c for _, _, c in mine), pairs=len(mine), **fact))  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = dict(
        command="python tests/bench.py " + " ".join(sys.argv[1:]), commit=commit, date=time.strftime("%Y-%m-%d"), total=total,
        machine=torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} cores",
        torch=torch.__version__, transformers=transformers.__version__, arguments=vars(args), rows=rows,
    )  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = args.name or f"{args.shape}-{args.dtype}-{args.batch}x{args.source}-{args.device}"
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(("", *table(record))))


if __name__ == "__main__":
    main()
