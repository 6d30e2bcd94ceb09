#!/usr/bin/env python3
"""What a training step costs, against the frozen bound and beside other methods, in one process and in alternation.

    python tests/bench.py                                        # T5-base shapes, fp32, 8 x 128 tokens, 1e2 ... 1e7
    python tests/bench.py --shape t5-large --dtype bf16 --batch 32 --device cuda
    python tests/bench.py --gpu OUT                              # all that a GPU can tell, in 9 minutes; again: goes on
    python tests/bench.py --memory                               # what fits on which GPU, by arithmetic
    python tests/bench.py --paths                                # what COST in apet.py comes from
    python tests/bench.py --host                                 # operator calls and host time beside LoRA
    python tests/bench.py --shape t5-tiny --compile              # compiled models against the compiled frozen bound
    python tests/bench.py --figure                               # of all in results/bench: tables.txt and growth.png

The frozen bound is forward plus backward to the inputs of the same model, all weights frozen: what any method that
tunes weights throughout the model has to pay. In each round every method is set up, warmed up, and timed in alternation
with the bound (method, bound, bound, method, ...); ratios are medians over all pairs, so that they hold on a machine whose
speed drifts. On a CPU the ratio is taken of wall time and of the process's CPU time (which others on the machine disturb
less). Random weights: speed does not depend on them.

Writes results/bench/NAME.json after each method, prints a table; what was interrupted goes on. peft is needed for LoRA and SHiRA.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gc
import importlib.util
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
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

    tuned, optimizer, apet = 0, None, None

    def __init__(self, model: torch.nn.Module, norms: bool = False):
        self.model, self.forward, self.params = model.requires_grad_(False), model, []
        for stack in (model.encoder, model.decoder):
            if norms:  # for compiled models, whose graph the hook would break: two vectors at the bottom are tuned
                stack.block[0].layer[0].layer_norm.requires_grad_(True)
            else:
                stack.embed_tokens.register_forward_hook(lambda m, a, out: out.requires_grad_(True))

    def step(self, batch: dict) -> None:
        self.forward(**batch).loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Tuned(Frozen):
    """Parameters of the model, or added to it, with AdamW."""

    def __init__(self, model: torch.nn.Module, params: list, close: Callable[[], object] = lambda: None):
        self.model, self.forward, self.params, self.closing = model, model, params, close
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
    row = Tuned(model, [tuned.values], tuned.remove)
    row.setup_s, row.apet = time.perf_counter() - start, tuned
    tuned.attach(row.optimizer)
    return row


def mask_row(model: torch.nn.Module, k: int) -> Tuned:
    """A dense 0/1 mask on dense gradients and dense AdamW moments, as FISH and LT-SFT do."""
    positions, named = apet.select_positions(model, k), dict(model.named_parameters())
    masks = {n: torch.zeros_like(named[n]) for n in positions}
    model.requires_grad_(False)
    hooks = []
    for name, mask in masks.items():
        mask.view(-1)[positions[name].to(mask.device)] = 1
        hooks.append(named[name].requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask))
    row = Tuned(model, [named[n] for n in positions], lambda: [h.remove() for h in hooks])
    row.tuned = k
    return row


def bitfit_row(model: torch.nn.Module) -> Tuned:
    """A new zero bias in every linear layer (T5 has none)."""
    model.requires_grad_(False)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for m in linears:
        m.bias = torch.nn.Parameter(m.weight.new_zeros(m.out_features))

    def close() -> None:
        for m in linears:
            m.bias = None

    return Tuned(model, [m.bias for m in linears], close)


def peft_row(model: torch.nn.Module, kind: str, **options: object) -> Tuned:
    import peft

    model.requires_grad_(False)
    wrapped = peft.get_peft_model(model, getattr(peft, kind)(**options))
    return Tuned(model, [p for p in wrapped.parameters() if p.requires_grad], wrapped.unload)


def methods(model: torch.nn.Module, budgets: str, backends: str, peers: list[str]) -> dict[str, Callable[[], Tuned]]:
    """What is measured: {name of the method: what sets it up}."""
    made = {}
    for k, backend in itertools.product([int(float(k)) for k in budgets.split(",")], backends.split(",")):
        made[f"APET {k:.0e} {backend}".replace("e+0", "e")] = lambda k=k, b=backend: apet_row(model, k, b)
    lora, few, linear = dict(r=8, lora_alpha=16), ["q", "v"], ["q", "k", "v", "o", "wi", "wo"]
    known = {
        "lora": ("LoRA r=8 on q, v (peft)", lambda: peft_row(model, "LoraConfig", target_modules=few, **lora)),
        "full": ("full fine-tuning", lambda: Tuned(model, list(model.requires_grad_(True).parameters()))),
        "bitfit": ("BitFit", lambda: bitfit_row(model)),
        "shira": ("SHiRA r=1 on q, v (peft)", lambda: peft_row(model, "ShiraConfig", r=1, target_modules=few)),
        "shira-all": ("SHiRA r=1 on all linear (peft)", lambda: peft_row(model, "ShiraConfig", r=1, target_modules=linear)),
        "mask": ("dense mask 1e4", lambda: mask_row(model, 10_000)),
    }
    made |= {label: make for name, (label, make) in known.items() if name in peers}
    if importlib.util.find_spec("peft") is None and any("peft" in label for label in made):
        print("peft is not installed: no rows for LoRA and SHiRA")
        made = {label: make for label, make in made.items() if "peft" not in label}
    return made


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
    """Bytes, kernels and the one-off costs of a method, after a step of it."""
    fact = dict(tuned=row.tuned)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        row.step(batch)
        sync(device)
        fact["peak_bytes"] = torch.cuda.max_memory_allocated()
        start = time.perf_counter()
        row.step(batch)
        fact["host_ms"] = 1e3 * (time.perf_counter() - start)  # until the last kernel is launched
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            row.step(batch)
            sync(device)
        kernels = [e.time_range.elapsed_us() for e in profile.events() if e.device_type is torch.autograd.DeviceType.CUDA]
        fact |= dict(kernels=len(kernels), kernel_ms=sum(kernels) / 1e3)
    fact["saved_bytes"] = saved_bytes(row, batch)
    fact["gradient_bytes"] = sum(p.grad.nbytes for p in row.params if p.grad is not None)
    states = row.optimizer.state.values() if row.optimizer else []
    fact["optimizer_bytes"] = sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))
    weights = {s._cdata: s.nbytes() for s in (p.untyped_storage() for p in row.model.parameters())}
    kept = sum(weights.values()) + sum(fact[f"{part}_bytes"] for part in ("saved", "gradient", "optimizer"))
    fact["arithmetic_bytes"] = kept + 2 * logit_bytes(*batch["labels"].shape, row.model.dtype.itemsize)  # as --memory counts
    if row.apet:
        start = time.perf_counter()
        row.apet.write()
        sync(device)
        fact |= dict(write_ms=1e3 * (time.perf_counter() - start), setup_s=row.setup_s)
        with tempfile.TemporaryDirectory() as folder:
            row.apet.save(f"{folder}/delta")
            fact["file_bytes"] = os.path.getsize(f"{folder}/delta")
    return fact


def logit_bytes(batch: int, target: int, size: int = 2) -> int:
    """What is saved for backward holds the logits once; the loss's gradient takes as much again twice, see memory_table."""
    return batch * target * 32128 * size


def memory_table(batch: int, source: int, target: int) -> None:
    """Bytes by shape in bf16, on the meta device: weights, what backward needs, and the GPU on which training fits.

    The logits are there three times: saved for backward, and, while their gradient is formed, it and a copy. APET adds at most 64
    bytes a scalar to the frozen model's; full fine-tuning 16 a parameter: an fp32 copy of the weights, its gradient and two
    moments. With checkpointing, one block's activations exist at a time. A GPU fits if a tenth of what is needed and 1 GB are left.
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
                need = (2 * count + extra + 2 * logit_bytes(batch, target)) / 1e9 + activations
                card = next((f"{c} GB" for c in (16, 24, 40, 80) if 1.1 * need + 1 < c), "more")
                cells.append(f"{need:.1f} ({card})")
        print(f"{shape:10}{2 * count / 1e9:9.2f}{saved:8.2f}{kept:8.2f}   {', '.join(cells[:2]):28}{', '.join(cells[2:])}")


def paths_table(device: str, dtype: torch.dtype) -> None:
    """What COST in apet.py comes from: a linear layer's forward and backward beyond the frozen one's, by each path, in entries of
    the dense product over the same tokens, for a layer and for each chosen entry."""
    cuda = device == "cuda"
    print(f"{facts_of_machine(device)['machine']}, {dtype}; in entries of the dense product; (for each chosen entry)")
    junk, steps = torch.empty(12_000_000), 10 if cuda else 1  # on a GPU many in a row, as in a model: host and device overlap

    def clock(step: Callable[[], object]) -> float:
        times = []
        for _ in range(8):
            if not cuda:
                junk.fill_(1.0)  # in a step, too, other work has taken the caches
            sync(device)
            start = time.perf_counter()
            for _ in range(steps):
                step()
            sync(device)
            times.append((time.perf_counter() - start) / steps)
        return statistics.median(times[1:])

    ways = {"one by one": dict(entry=1, dot=1e9, line=0, call=0), "sampled": dict(entry=1e9, dot=1, line=0, call=0)}
    widths = ((1024, 1024), (1024, 4096), (4096, 1024), (16384, 1024)) if cuda else itertools.product((768, 3072), (768, 3072))
    for tokens, (rows, cols) in itertools.product((4096, 256) if cuda else (1024, 64), list(widths)):
        layer = torch.nn.Linear(cols, rows, bias=False).to(device, dtype)
        x, dy = torch.randn(tokens, cols, device=device, dtype=dtype), torch.randn(tokens, rows, device=device, dtype=dtype)
        dense = clock(lambda x=x, dy=dy: dy.t() @ x)
        step = lambda layer=layer, x=x, dy=dy: layer(x).backward(dy)  # noqa: E731
        x.requires_grad_(True)
        layer.requires_grad_(False)
        frozen, unit = clock(step), dense / layer.weight.numel()
        print(f"{tokens} tokens, {rows} x {cols}: dense {1e6 * dense:.0f} us, frozen layer {1e6 * frozen:.0f} us")
        for density in (4.5e-5, 4.5e-4, 4.5e-3, 4.5e-2):
            m, found, old = int(density * layer.weight.numel()), [], apet.COST[device]
            for path in ("hook", *ways):
                apet.COST[device] = ways.get(path, old)
                tuned = APET(layer, m, backend="hook" if path == "hook" else "gather")
                cost = (clock(step) - frozen) / unit
                found.append(f"{path} {cost:10,.0f} ({cost / m:7.1f})")
                tuned.remove()
                apet.COST[device] = old
            print(f"  {m:7,} entries: {'   '.join(found)}", flush=True)


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
        rows.append(peft_row(model(), "LoraConfig", r=8, target_modules=["q", "v"]))
        tensors = [0, len(rows[1].apet.positions), len(rows[2].apet.positions), 72]
        labels = ("frozen bound", "gather", "hook", "LoRA r=8 on q, v (peft)")
        for row in rows * 2:
            row.step(batch)
        if width > 32:
            print(f"operator calls beyond the frozen bound, width {width}")
            calls = []
            for label, row, n in zip(labels, rows, tensors, strict=True):
                with Count() as count:
                    row.step(batch)
                calls.append(sum(count.calls.values()))
                print(f"{label:26}{calls[-1] - calls[0]:7,} over {n} tensors")
            continue
        times = [[] for _ in rows]
        for _, (row, mine) in itertools.product(range(rounds), list(zip(rows, times, strict=True))):
            start = time.process_time()
            row.step(batch)
            mine.append(time.process_time() - start)
        medians = [statistics.median(t) for t in times]
        print(f"host time of a step, width {width}, {rounds} steps each; beyond the frozen bound")
        for label, n, ms in zip(labels, tensors, medians, strict=True):
            excess = ms - medians[0]
            share = f"{1e6 * excess / n:.0f} us a tensor, {excess / (medians[-1] - medians[0]):.2f} of LoRA's" if n else ""
            print(f"{label:26}{1e3 * ms:7.1f} ms{1e3 * excess:7.1f} ms over {n:3} tensors  {share}")


COLUMNS = (  # of a table: heading, key, format, unit
    ("tuned", "tuned", ",.0f", 1), ("step ms", "ms", ".1f", 1), ("ratio", "ratio", ".3f", 1), ("quartiles", "quartiles", "", 1),
    ("CPU", "cpu_ratio", ".3f", 1), ("tokens/s", "speed", ",.0f", 1), ("host ms", "host_ms", ".1f", 1),
    ("kernels", "kernels", ",.0f", 1), ("their ms", "kernel_ms", ".1f", 1), ("saved MB", "saved_bytes", ".1f", 1e6),
    ("of bound", "saved", ".3f", 1), ("grad MB", "gradient_bytes", ".2f", 1e6), ("opt MB", "optimizer_bytes", ".2f", 1e6),
    ("peak MB", "peak_bytes", ".0f", 1e6), ("arithmetic", "arithmetic_bytes", ".0f", 1e6), ("file kB", "file_bytes", ".1f", 1e3),
    ("write ms", "write_ms", ".2f", 1), ("set up s", "setup_s", ".2f", 1),
)  # fmt: skip


def table(record: dict) -> list[str]:
    """The lines of a record's table; the first says what was measured, and where."""
    a, bound = record["arguments"], record["rows"][0]
    lines = [["method", *(heading for heading, *_ in COLUMNS)]]
    for r in (bound, *sorted(record["rows"][1:], key=lambda r: (not r["method"].startswith("APET"), r["tuned"]))):
        if "error" not in r:
            r = r | dict(saved=r["saved_bytes"] / bound["saved_bytes"])
        if "ratio" in r:
            r |= dict(speed=1e3 * a["batch"] * (a["source"] + a["target"]) / r["ms"])
            r |= dict(quartiles=f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}")
        cells = [format(r[key] / unit if form else r[key], form) if key in r else "-" for _, key, form, unit in COLUMNS]
        lines.append([f"{r['method']} {r.get('error', '')}".strip(), *cells])
    columns = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    title = f"{a['shape']} {a['dtype']}, {a['batch']} x {a['source']} source and {a['target']} target tokens, {record['machine']}"
    return [
        title,
        *("  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
          for line in zip(*columns, strict=True)),
    ]  # fmt: skip


def plan(args: argparse.Namespace, out: Path) -> Iterator[tuple[str, int, list]]:
    """What --gpu measures, the most important first: (name, seconds it may take, command)."""
    cuda, python = args.device == "cuda", sys.executable
    device = [] if cuda else ["--device", args.device]
    command = [ROOT / "apet.py", *device, "--out", out / "runs"]
    short = [*command, "--steps", 60, "--eval-every", 30, "--train-size", 2000, "--eval-size", 200]

    def steps(name: str, seconds: int, shape: str, *more: object) -> tuple[str, int, list]:
        line = [python, __file__, "--name", out / name, "--shape", args.shape or shape]
        for option in ("dtype", "device", "batch", "source", "target", "budgets", "peers", "rounds", "pairs", "layers"):
            line += [f"--{option}", value] if (value := getattr(args, option)) is not None else []
        return name, seconds, [*line, *more]

    workers = ["-n", 8] if cuda and importlib.util.find_spec("xdist") else []
    apart = "not device_map and not two_devices"  # they make devices of their own
    yield "tests", 140, [python, "-m", "pytest", "-q", *workers, "tests/test_gradient.py", "tests/test_apet.py", "-k", apart]
    yield "first-command", 90, [python, *command]
    yield steps("t5-large", 110, "t5-large")
    yield "paths", 60, [python, __file__, "--paths", "--device", args.device, "--dtype", args.dtype]
    yield "bf16-checkpointing", 60, [python, *short, "--dtype", "bf16", "--gradient-checkpointing", "--method", "apet,full"]
    both = "NCCL_HOSTID=$RANK LOCAL_RANK=0 exec " + " ".join(map(str, [python, *short]))  # else nccl refuses to share a GPU
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--no-python"]
    yield "two-processes", 60, [*torchrun, "sh", "-c", both]
    yield steps("t5-base", 70, "t5-base")
    yield steps("t5-3b", 110, "t5-3b")
    yield steps("t5-large-128-targets", 50, "t5-large", "--target", 128, "--budgets", "1e4", "--peers", "full")
    yield steps("t5-large-backends", 70, "t5-large", "--budgets", "1e4,1e6", "--backends", "hook,gather", "--peers", "none")
    yield steps("t5-base-compiled", 120, "t5-base", "--compile", "--budgets", "1e4", "--peers", "lora,full")
    yield steps("t5-11b-checkpointing", 130, "t5-11b", "--checkpointing")
    yield steps("t5-large-compiled", 200, "t5-large", "--compile", "--budgets", "1e4", "--peers", "lora,full")


def gpu(args: argparse.Namespace) -> None:
    """All of `plan`, each in a process of its own; OUT/gpu.json is written after each. What is in it is not measured again."""
    out, end = Path(args.gpu).resolve(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    done = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}
    for name, seconds, command in plan(args, out):
        if name in done or not re.search(args.only, name):
            continue
        seconds *= 1 if args.device == "cuda" else 4
        left, command = end - time.monotonic(), [str(part) for part in command]
        if left < min(seconds, 20):
            print(f"{name}: no time left; the same command goes on", flush=True)
            continue
        start, status = time.monotonic(), "too long"
        with log.open("w") as said:
            child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "APET_TEST_DEVICE": args.device}, stdout=said,
                                     stderr=said, start_new_session=True, preexec_fn=end_with_parent)  # fmt: skip
            try:
                status = child.wait(min(seconds, left))
            except subprocess.TimeoutExpired:
                if left < seconds:
                    print(f"{name}: no time left; the same command goes on", flush=True)
                    continue
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        tail = log.read_text(errors="replace")[-6000:]
        done[name] = dict(command=" ".join(command), status=status, seconds=round(time.monotonic() - start, 1), said=tail)
        done[name] |= facts_of_machine(args.device)
        if (part := out / f"{name}.json").exists():
            done[name]["record"] = json.loads(part.read_text())
        if (out / "runs").exists():
            done[name]["results"] = [json.loads(f.read_text()) for f in sorted((out / "runs").glob("*.json"))]
        write_json(out / "gpu.json", done)
        part.unlink(missing_ok=True)
        shutil.rmtree(out / "runs", ignore_errors=True)
        print(f"{name}: status {status}, {done[name]['seconds']} s", tail if "record" in done[name] else "", sep="\n", flush=True)
    log.unlink(missing_ok=True)


def end_with_parent() -> None:
    """A process that is started ends when the one that started it does, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def facts_of_machine(device: str) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} cores"
    return dict(commit=commit, date=time.strftime("%Y-%m-%d"), machine=machine, torch=torch.__version__,
                transformers=transformers.__version__)  # fmt: skip


def write_json(file: Path, content: dict) -> None:
    """Under a temporary name first: what is there is whole."""
    file.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n")
    file.with_suffix(".tmp").replace(file)


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
            if "ratio" in row and re.fullmatch("APET .* auto|full fine-tuning", row["method"]):
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


def run(args: argparse.Namespace) -> None:
    """The table: each method in alternation with the bound."""
    torch.manual_seed(0)
    model = build(args.shape, DTYPES[args.dtype], args.device, args.layers, args.one_memory)
    if args.checkpointing:
        checkpointing(model)
    draw = lambda length: torch.randint(3, 32000, (args.batch, length), device=args.device)  # noqa: E731
    batch = {"input_ids": draw(args.source), "labels": draw(args.target)}
    makers = methods(model, args.budgets, args.backends, args.peers.split(","))
    bound = Frozen(twin(model), norms=args.compile)
    if args.checkpointing:
        checkpointing(bound.model)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64
        bound.forward = torch.compile(bound.model)

    file = RESULTS / f"{args.name or f'{args.shape}-{args.dtype}-{args.batch}x{args.source}-{args.device}'}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = facts_of_machine(args.device) | dict(
        command="python tests/bench.py " + " ".join(sys.argv[1:]), total=sum(p.numel() for p in model.parameters()),
        arguments=vars(args), complete=False, facts={}, pairs={},
    )  # fmt: skip
    if file.exists():  # does it hold a part of the same?
        old = json.loads(file.read_text())
        same = all(old[key] == record[key] for key in ("arguments", "commit", "machine", "torch", "transformers"))
        record = old if same and old.get("complete") is False else record
    facts, pairs = record["facts"], record["pairs"]  # {method: ...}; a pair: (bound's ms, its ms, ratio of CPU time)
    bound.step(batch)
    if "frozen bound" not in facts:
        facts["frozen bound"] = measure(bound, batch, args.device)
    for round_ in range(args.rounds):
        order = list(makers)
        if round_:
            random.Random(round_).shuffle(order)
        for label in order:
            mine = pairs.setdefault(label, [])
            if len(mine) >= (round_ + 1) * args.pairs or "error" in facts.get(label, {}):
                continue
            row = None
            try:
                row = makers[label]()
                row.forward = torch.compile(row.model) if args.compile else row.model
                start = time.perf_counter()
                row.step(batch)  # warm-up: moments are made, memory is fetched
                sync(args.device)
                first = time.perf_counter() - start
                mine += alternate(bound, row, batch, args)
                if label not in facts:
                    facts[label] = dict(first_step_s=first, **measure(row, batch, args.device))
            except torch.OutOfMemoryError:
                facts[label] = dict(tuned=row.tuned if row else 0, error="does not fit")
            if row:
                row.close()
                del row
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            record["rows"] = [dict(method=name, **summary(name, pairs), **fact) for name, fact in facts.items()]
            write_json(file, record)
    record["complete"] = True
    write_json(file, {key: value for key, value in record.items() if key not in ("facts", "pairs")})
    print("\n".join(("", *table(record))))


def alternate(bound: Frozen, row: Frozen, batch: dict, args: argparse.Namespace) -> list[tuple[float, float, float]]:
    pairs = []
    for pair in range(args.pairs):
        times = {}
        for part in (bound, row) if pair % 2 else (row, bound):  # who comes second may find memory warm
            sync(args.device)
            start = time.perf_counter(), time.process_time()
            part.step(batch)
            sync(args.device)
            times[part] = (1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1]))
        (a, a_cpu), (b, b_cpu) = times[bound], times[row]
        pairs.append((a, b, b_cpu / a_cpu))
    return pairs


def summary(name: str, pairs: dict[str, list]) -> dict:
    """Medians over a method's pairs; the bound's, over all."""
    mine = [(a, a, 1.0) for p in pairs.values() for a, _, _ in p] if name == "frozen bound" else pairs[name]
    if not mine:
        return {}
    ratios, quarter = sorted(b / a for a, b, _ in mine), len(mine) // 4
    return dict(ms=statistics.median(b for _, b, _ in mine), ratio=statistics.median(ratios), ratio_low=ratios[quarter],
                ratio_high=ratios[-1 - quarter], cpu_ratio=statistics.median(c for _, _, c in mine), pairs=len(mine))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=T5, help="default: t5-base; of --gpu: four, from t5-base to t5-11b")
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
    parser.add_argument("--compile", action="store_true", help="by torch.compile, the bound too")
    parser.add_argument("--one-memory", action="store_true", help="parameters of equal shape share memory: speed alone is real")
    parser.add_argument("--memory", action="store_true", help="no timing: what fits on which GPU, by arithmetic")
    parser.add_argument("--paths", action="store_true", help="only what COST in apet.py comes from")
    parser.add_argument("--host", action="store_true", help="only operator calls and host time, beside LoRA")
    parser.add_argument("--figure", action="store_true", help="only the figure and the tables, from the JSON files that are there")
    parser.add_argument("--gpu", metavar="OUT", help="all that a GPU can tell, into OUT/gpu.json; again: goes on")
    parser.add_argument("--minutes", type=float, default=8.5, help="for --gpu; what is not done then is said")
    parser.add_argument("--only", default="", help="for --gpu: measurements whose name matches this")
    parser.add_argument("--name", help="of the JSON file; default: from the shape")
    if parser.parse_args(argv).gpu:
        budgets, peers = "1e4,1e6,1e2,1e5,1e3", "lora,full,bitfit,shira,mask"
        parser.set_defaults(device="cuda", dtype="bf16", batch=32, budgets=budgets, peers=peers, rounds=1, pairs=8)
    if parser.parse_args(argv).memory:  # as the command reads and writes
        parser.set_defaults(batch=32, target=128)
    args = parser.parse_args(argv)
    if args.gpu:
        gpu(args)
    elif args.memory:
        memory_table(args.batch, args.source, args.target)
    elif args.paths:
        paths_table(args.device, DTYPES[args.dtype])
    elif args.host:
        calls_and_host_time(10_000, 30)
    elif args.figure:
        figure()
    else:
        args.shape = args.shape or "t5-base"
        run(args)


if __name__ == "__main__":
    main()
