#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "datasets==5.2.0",
#     "numpy==2.4.6",
#     "tqdm==4.70.1",
#     "safetensors==0.8.0",
#     "rouge-score==0.1.2",
#     "sentencepiece==0.2.3",
#     "protobuf==7.36.2",
# ]
# ///
"""APET: tune exactly k scalars of a pretrained model, at any positions (arbitrary parameter-efficient tuning).

After Su et al., "Exploring the Impact of Model Scaling on Parameter-Efficient Tuning", EMNLP 2023.

    python apet.py                                                  offline default: a toy T5, 10,000 scalars, a CPU minute
    python apet.py --model t5-large --task sst2 --budget 1e4        a model and a task of the hub; bf16 on a GPU
    python apet.py --budget 1e2,1e3,1e4 --mask-seed 0,1,2 --method apet,full    a sweep: one process, one JSON a cell
    torchrun --nproc_per_node 4 apet.py --model t5-3b --task mnli   data-parallel

The file reads from top to bottom: positions (where) - the APET class (how) - files - the other methods - tasks - models -
batches and scores - training - the command line. Whoever wants the method alone copies the first third, down to "The other
methods". What was measured: README.md.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import difflib
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import signal
import string
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class UserError(ValueError):
    """Something the person who called can put right; the message is one line that says what is wrong and what is right."""


def one_of(word: object, known: Iterable[str], what: str) -> str:
    """`word` if it is known; else a UserError that names the closest."""
    known = list(known)
    if word in known:
        return word
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    raise UserError(f"unknown {what} {word!r}: " + (f"did you mean {close[0]!r}?" if close else "one of " + ", ".join(known)))


# ----------------------------------------------------------------------------------------------------------------------
# Positions: where the tuned scalars are
# ----------------------------------------------------------------------------------------------------------------------

MASKS = ("random", "row", "column", "block", "tensor", "magnitude", "gradient")
WHERE = ("all", "attention", "mlp", "embedding", "norm", "bias", "encoder", "decoder")  # and layers:0-3, or a regex
COUNTED = ("lora", "adapter", "prompt", "bitfit")  # methods whose size is a budget
BLOCK = 16  # side of a tile of mask "block"

ATTENTION = r"attention|attn|query_key_value|(^|\.)[qkvo](_proj|_lin)?\.|(^|\.)out_proj\."
MLP = r"mlp|ffn|feed_?forward|dense\w*dense|experts|intermediate|(?<!attention\.)output\.dense|(^|\.)(fc_?\w*|w[io](_\d)?)\."
LAYER = r"(?:^|\.)(?:block|blocks|layer|layers|h)\.(\d+)\."


def select_positions(
    model: nn.Module,
    budget: int | float | str | None,
    mask: str | Mapping[str, Iterable[int]] = "random",
    seed: int = 0,
    where: str = "all",
    batches: Iterable[Mapping[str, Tensor] | Callable[[], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Choose exactly `budget` scalars of `model`: {parameter name: sorted int64 flat indices, on the CPU}.

    A flat index counts the entries of one parameter in row-major order. Names and order are those of
    `model.named_parameters()`, so a shared (tied) parameter is counted once, by identity. The choice depends on the
    model's shapes and on the arguments alone ("magnitude" and "gradient": on the weights, too): it is the same on every
    machine and device.

    budget: a number of scalars; "1e4", "10_000"; "0.1%" of all the model's scalars; or a method's name ("lora",
        "adapter", "prompt", "bitfit"): as many as that method trains on this model.
    mask: "random" scalars; whole "row"s, "column"s or 16 x 16 "block"s in random order, the last one cut to the exact
        count (a matrix is (shape[0], rest); a vector is one row and one column); whole "tensor"s in random order as long
        as they fit, the next one cut; the largest by "magnitude" |w|, or by squared "gradient" summed over `batches`
        (equal scores: the first); or the caller's own {name: flat indices}, when `budget` may be None.
    where: "all", "attention", "mlp", "embedding", "norm", "bias", "encoder", "decoder", "layers:0-3", or a regular
        expression searched for in the parameter names.
    batches: for "gradient": keyword arguments of the model, labels included, so that its output has a loss; or functions
        that return a loss.

    Memory is O(budget), so that a model on the meta device will do, but for "magnitude" (a copy of one tensor at a time)
    and "gradient" (a squared gradient of all candidates). Raises ValueError for what can't be chosen.
    """
    if isinstance(mask, Mapping):
        return _own_positions(model, budget, mask)
    one_of(mask, MASKS, "mask")
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"the position seed must be a whole number from 0 on, not {seed!r}")
    chosen_from = candidates(model, where)
    shapes = [tuple(p.shape) for p in chosen_from.values()]
    total = sum(p.numel() for p in chosen_from.values())
    k = parse_budget(budget, model)
    if k > total:
        raise UserError(f"a budget of {k:,} is above the {total:,} scalars of where={where!r}")
    bits = np.random.PCG64(np.random.SeedSequence(int(seed)))  # numpy keeps this raw stream fixed over its versions
    if mask == "random":
        ends = np.cumsum([p.numel() for p in chosen_from.values()])
        flat = _draw(total, k, bits)
        parts = np.split(flat, np.searchsorted(flat, ends[:-1]))
        indices = [part - (end - p.numel()) for part, end, p in zip(parts, ends, chosen_from.values(), strict=True)]
    elif mask == "magnitude":
        indices = _largest(list(chosen_from.values()), k)
    elif mask == "gradient":
        indices = _largest(_squared_gradients(model, chosen_from, batches), k)
    else:
        indices = _draw_units(mask, shapes, k, bits)
    return {n: torch.from_numpy(np.ascontiguousarray(i)) for n, i in zip(chosen_from, indices, strict=True) if len(i)}


def candidates(model: nn.Module, where: str = "all") -> dict[str, nn.Parameter]:
    """The floating-point parameters that `where` names, in the model's order, a tied one once."""
    params = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    if not params:
        raise UserError(f"{type(model).__name__} has no floating-point parameters to tune")
    owners: dict[int, str] = {}  # the classes of the modules that hold it
    for m in model.modules():
        for p in m._parameters.values():
            owners[id(p)] = owners.get(id(p), "") + type(m).__name__.lower()

    def is_norm(n: str) -> bool:
        return "norm" in owners[id(params[n])]

    def is_embedding(n: str) -> bool:
        return "embed" in owners[id(params[n])] + n.lower() and not is_norm(n) and not re.search(ATTENTION, n, re.I)

    layers = re.fullmatch(r"layers:(\d+)(?:-(\d+))?", str(where))
    if not where:
        raise UserError(f"where is empty; one of {', '.join(WHERE)}, layers:0-3 or a regular expression")
    if where == "all":
        found = list(params)
    elif where == "norm":
        found = [n for n in params if is_norm(n)]
    elif where == "embedding":
        found = [n for n in params if is_embedding(n)]
    elif where == "bias":
        found = [n for n in params if re.search(r"(^|[._])bias$", n)]
    elif where in ("attention", "mlp"):
        found = [n for n in params if re.search(ATTENTION if where == "attention" else MLP, n, re.I) and not is_norm(n)]
    elif where in ("encoder", "decoder"):
        found = [n for n in params if re.search(rf"(^|\.){where}\.", n)]
    elif layers:
        low, high = int(layers[1]), int(layers[2] or layers[1])
        found = [n for n in params if (m := re.search(LAYER, n)) and low <= int(m[1]) <= high]
    else:
        try:
            found = [n for n in params if re.search(where, n)]
        except (re.error, TypeError) as e:
            raise UserError(f"where={where!r} is none of {', '.join(WHERE)}, layers:0-3 and no regular expression ({e})") from None
    if not found:
        some = list(params)[:: max(1, len(params) // 8)]
        raise UserError(f"where={where!r} names no parameter; there are {len(params)}, such as {', '.join(some)}")
    return {n: params[n] for n in found}


def parse_count(text: int | float | str, what: str) -> int:
    """A whole number from 1 on, also as "1e4" or "10_000"."""
    try:
        number = Decimal(text if isinstance(text, (int, str)) and not isinstance(text, bool) else repr(text))
    except (InvalidOperation, ValueError):
        raise UserError(f"{what} must be a number such as 10000, 1e4 or 10_000, not {text!r}") from None
    if not number.is_finite() or number < 1 or number > 10**15 or number != number.to_integral_value():
        raise UserError(f"{what} must be a whole number from 1 on, not {text!r}")
    return int(number)


def parse_budget(budget: int | float | str | None, model: nn.Module) -> int:
    """The number of scalars that `budget` means on this model (see `select_positions`)."""
    total = sum(p.numel() for p in candidates(model).values())
    if isinstance(budget, str) and budget.strip().lower() in COUNTED:
        return method_parameters(model, budget.strip().lower())
    if isinstance(budget, str) and budget.strip().endswith("%"):
        try:
            share = Decimal(budget.strip()[:-1])
            share = share if 0 < share <= 100 else None
        except InvalidOperation:
            share = None
        if share is None:
            raise UserError(f"the budget {budget!r} must be above 0% and at most 100%")
        return parse_count(int((share * total / 100).to_integral_value()) or "0", f"the budget {budget} of {total:,} scalars")
    try:
        k = parse_count(budget, "the budget")
    except UserError as e:
        raise UserError(f"{e}; a share such as 0.1% or a method ({', '.join(COUNTED)}) will do, too") from None
    if k > total:
        raise UserError(f"a budget of {k:,} is above the {total:,} scalars of this model")
    return k


def _draw(n: int, k: int, bits: np.random.PCG64, ordered: bool = False) -> np.ndarray:
    """`k` of range(n), each subset equally likely (the modulus is off by n / 2**64): sorted, or in random order."""
    if ordered and 4 * k > n:
        return np.argsort(bits.random_raw(n), kind="stable")[:k]
    if not ordered and 2 * k > n:  # few are left out: draw those
        keep = np.ones(n, dtype=bool)
        keep[_draw(n, n - k, bits)] = False
        return np.flatnonzero(keep)

    def draw(count: int) -> np.ndarray:
        return (bits.random_raw(count) % np.uint64(n)).view(np.int64)

    # What was drawn before is drawn again; never more than k, so nothing has to be thrown away.
    if not ordered and 32 * k > n:  # many: a mark for each is faster than sorting
        keep = np.zeros(n, dtype=bool)
        while missing := k - np.count_nonzero(keep):
            keep[draw(missing)] = True
        return np.flatnonzero(keep)
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < k:
        drawn = np.concatenate([drawn, draw(k - len(drawn))])
        first = np.unique(drawn, return_index=True)[1]
        drawn = drawn[np.sort(first) if ordered else first]
    return drawn


def _draw_units(mask: str, shapes: list[tuple[int, ...]], k: int, bits: np.random.PCG64) -> list[np.ndarray]:
    """Sorted flat indices for each shape: whole rows, columns, blocks or tensors in random order, k scalars in all."""
    sizes = np.array([int(np.prod(s, dtype=np.int64)) for s in shapes])
    if mask == "tensor":  # as the authors' code does: those that still fit; then, for the exact count, part of the next
        order, taken, left = np.argsort(bits.random_raw(len(shapes)), kind="stable"), np.zeros(len(shapes), int), k
        for i in order:
            if sizes[i] <= left:
                taken[i], left = sizes[i], left - sizes[i]
        for i in order:
            if left and not taken[i]:
                taken[i], left = left, 0
        return [np.arange(t) for t in taken]
    tile = {"row": lambda r, c: (1, c), "column": lambda r, c: (r, 1), "block": lambda r, c: (BLOCK, BLOCK)}[mask]
    grid = []  # per tensor: rows, columns, rows of a unit, columns of a unit
    for size, shape in zip(sizes, shapes, strict=True):
        vector = (size, 1) if mask == "column" else (1, size)
        r, c = (shape[0], size // shape[0]) if len(shape) > 1 else vector
        grid.append((r, c, *tile(r, c)))
    R, C, h, w = (np.array(x, dtype=np.int64) for x in zip(*grid, strict=True))
    across = -(-C // w)
    ends = np.cumsum(-(-R // h) * across)
    n = min(int(ends[-1]), int(1.1 * k / (sizes.sum() / ends[-1])) + 16)
    state = bits.state
    while True:
        bits.state = state
        unit = _draw(int(ends[-1]), n, bits, ordered=True)
        which = np.searchsorted(ends, unit, side="right")
        local = unit - (ends - -(-R // h) * across)[which]
        top, left = local // across[which] * h[which], local % across[which] * w[which]
        bottom, right = np.minimum(top + h[which], R[which]), np.minimum(left + w[which], C[which])
        filled = np.cumsum((bottom - top) * (right - left))
        if filled[-1] >= k or n == ends[-1]:
            break
        n = min(int(ends[-1]), 2 * n)
    last = int(np.searchsorted(filled, k))  # the unit in which the count is reached
    out: list[list[np.ndarray]] = [[] for _ in shapes]
    for u in range(last + 1):
        i = which[u]
        cells = np.arange(top[u], bottom[u])[:, None] * C[i] + np.arange(left[u], right[u])
        out[i].append(cells.ravel() if u < last else cells.ravel()[: len(cells.ravel()) - int(filled[last] - k)])
    return [np.sort(np.concatenate(o)) if o else np.empty(0, np.int64) for o in out]


def _largest(tensors: list[Tensor], k: int) -> list[np.ndarray]:
    """Flat indices of the k entries of largest magnitude over all tensors; of equal ones the first in order."""
    if any(t.is_meta for t in tensors):
        raise UserError("this mask reads the weights, and the model is on the meta device: load it first")

    def scores(t: Tensor) -> Tensor:
        return t.detach().abs().flatten().to(torch.promote_types(t.dtype, torch.float32))

    top = torch.empty(0, dtype=torch.float64)
    for t in tensors:
        s = scores(t)
        top = torch.cat([top, s.topk(min(k, len(s))).values.double().cpu()])
        top = top.topk(min(k, len(top))).values
    threshold = top[-1].item()
    above = [(scores(t) > threshold).nonzero().flatten().cpu() for t in tensors]
    spare, out = k - sum(map(len, above)), []
    for t, a in zip(tensors, above, strict=True):
        ties = (scores(t) == threshold).nonzero().flatten()[:spare].cpu() if spare else a[:0]
        spare -= len(ties)
        out.append(torch.cat([a, ties]).sort().values.numpy())
    return out


def _squared_gradients(model: nn.Module, params: dict[str, nn.Parameter], batches: Iterable | None) -> list[Tensor]:
    """Sum over the batches of each entry's squared gradient, fp32 (the empirical Fisher information of FISH masks)."""
    batches = list(batches or ())
    if not batches:
        raise UserError('mask="gradient" needs batches=[...]: a few keyword arguments of the model, labels included')
    sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in params.values()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def add(p: nn.Parameter) -> None:
        sums[p] += p.grad.float().square()
        p.grad = None

    for p, _, _ in before:
        p.requires_grad_(p in sums)
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(add) for p in sums]
    try:
        for batch in batches:
            (batch() if callable(batch) else model(**batch).loss).backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
    return list(sums.values())


def _own_positions(model: nn.Module, budget: int | float | str | None, mask: Mapping) -> dict[str, Tensor]:
    """The caller's {name: flat indices}, checked, sorted and in the model's order."""
    params = candidates(model)
    for name in mask:
        one_of(name, params, "parameter")
    out = {}
    for name, p in params.items():
        if name not in mask:
            continue
        index = torch.as_tensor(mask[name] if isinstance(mask[name], (Tensor, np.ndarray)) else list(mask[name]))
        whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if index.numel() and not (whole and index.dim() == 1):
            raise UserError(f"the positions of {name} must be a flat list of whole numbers")
        index = index.to("cpu", torch.int64).sort().values
        if len(index) and not 0 <= index[0] <= index[-1] < p.numel():
            raise UserError(
                f"the positions of {name} must lie in 0 to {p.numel() - 1:,}; they reach from {index[0]} to {index[-1]}"
            )
        if (index[1:] == index[:-1]).any():
            raise UserError(f"the positions of {name} hold an index twice")
        if len(index):
            out[name] = index
    k = sum(map(len, out.values()))
    if not k:
        raise UserError("the positions are empty: name at least one scalar")
    if budget is not None and parse_budget(budget, model) != k:
        raise UserError(f"a budget of {budget} does not agree with the {k:,} positions given (it may be left None)")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# APET: how they are tuned
# ----------------------------------------------------------------------------------------------------------------------

# Cost of the ways to a layer's gradient, in entries of a dense product over the same tokens; see `cheapest_way`.
# CPU: measured by tests/bench.py --ways (results/README.md). CUDA: bandwidth against bf16 FLOPs of an H100; not yet measured.
COST = {
    "cpu": dict(single=80, dot=4, line=100, call=4_000),
    "cuda": dict(single=2_000, dot=math.inf, line=500, call=200_000),
}


def cheapest_way(rows: int, cols: int, entries: int, device: str) -> tuple[float, str]:
    """(cost, way) to the gradient of `entries` of a linear layer that lie in so many of its rows and columns.

    product: the dense product over these rows and columns (best for whole rows, columns, blocks). single: one column of
    the output's gradient and one of the input for each entry (best for few). sampled: each row and column is laid out once,
    then a dot product for each entry (best for many; torch has it on a CPU).
    """
    cost = COST["cpu" if device == "cpu" else "cuda"]
    sampled = cost["dot"] * entries + cost["line"] * (rows + cols)
    return min((rows * cols, "product"), (cost["single"] * entries, "single"), (sampled, "sampled"))


def columns(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index]. On a CPU, gather runs on all cores from 2**15 numbers on; index_select runs on one, but starts faster."""
    if x.device.type == "cpu" and len(x) * len(index) > 1 << 15:
        return x.gather(1, index.expand(len(x), -1))
    return x.index_select(1, index)


TUNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the models that have an APET


class APET:
    """Tunes exactly `budget` scalars of `model`, in place: `values` holds them in fp32, `write()` copies them back.

        apet = APET(model, budget=10_000, mask="random", seed=0)
        optimizer = torch.optim.AdamW([apet.values], lr=3e-3, weight_decay=0)
        model(**batch).loss.backward(); optimizer.step(); apet.write(); optimizer.zero_grad()

    The model is frozen but keeps its modules, forward, dtype and device; move it to its device first. Every entry outside
    `positions` stays bit-identical. `values.grad` accumulates over backward passes as any parameter's.

    model, budget, mask, seed, where, batches: see `select_positions`; without a budget, 10,000 scalars or all of an own mask.
    backend: how gradients are taken. "hook": autograd's dense gradient of each touched parameter, one at a time, gathered
        and dropped; works for all parameters. "gather": for nn.Linear and nn.Embedding only the chosen entries are ever
        computed, from tokens x chosen columns saved in the forward; the rest as "hook". "auto": the cheaper one for each.

    values: fp32 nn.Parameter of shape (budget,), in the order of `positions`; on the first touched parameter's device.
    positions: {parameter name: sorted int64 flat indices}.
    Raises ValueError for wrong arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int | float | str | None = None,
        mask: str | Mapping[str, Iterable[int]] = "random",
        seed: int = 0,
        *,
        where: str = "all",
        backend: str = "auto",
        batches: Iterable[Mapping[str, Tensor] | Callable[[], Tensor]] | None = None,
    ):
        one_of(backend, ("auto", "hook", "gather"), "backend")
        budget = 10_000 if budget is None and isinstance(mask, str) else budget
        self.positions = select_positions(model, budget, mask, seed, where, batches)
        self.about = dict(mask=mask if isinstance(mask, str) else "own", seed=str(seed), where=str(where))
        named = dict(model.named_parameters())
        if any(named[n].is_meta for n in self.positions):
            raise UserError("the model is on the meta device (or offloaded): load its weights before tuning them")
        if model in TUNED:
            raise UserError("this model has an APET already: remove() that one first")
        TUNED.add(model)
        self._model = weakref.ref(model)
        self._flags = [(p, p.requires_grad) for p in named.values()]
        for p in named.values():
            p.requires_grad_(False)
            p.grad = None
        users: dict[int, list[nn.Module]] = {}  # the layers whose own forward is the only thing that reads `weight`
        for m in model.modules():
            plain = "forward" not in vars(m) or hasattr(m, "_hf_hook")  # accelerate wraps forward, and calls the old one
            if plain and (type(m) is nn.Linear or (type(m) is nn.Embedding and m.max_norm is None and not m.scale_grad_by_freq)):
                users.setdefault(id(m.weight), []).append(m)
        self._slots: list[_Slot] = []
        self._handles = []
        self._lock = threading.Lock()  # autograd runs a thread for each device
        self._grad, self._pieces = None, ()  # values.grad, and each slot's part of it
        self._sizes = [len(index) for index in self.positions.values()]
        for name, index in self.positions.items():
            slot = _Slot(self, named[name], index, len(self._slots))
            self._slots.append(slot)
            modules = users.get(id(slot.weight), [])
            slot.weight.requires_grad_(True)
            self._handles.append(slot.weight.register_post_accumulate_grad_hook(slot.take_dense))
            if modules and backend != "hook" and (backend == "gather" or slot.gather_is_cheaper(modules)):
                for m in modules:
                    use = _Linear(slot, m) if type(m) is nn.Linear else _Embedding(slot, m)
                    self._handles.append(m.register_forward_pre_hook(use.before))
                    self._handles.append(m.register_forward_hook(use.after, prepend=True, with_kwargs=True))
        device = self._slots[0].weight.device
        self.values = nn.Parameter(torch.cat([s.original.to(device, torch.float32) for s in self._slots]))

    def _accumulate(self, slot: _Slot, grad: Tensor) -> None:
        """values.grad[slot] += grad"""
        if self.values.grad is None or self.values.grad is not self._grad:
            with self._lock:
                if self.values.grad is None:
                    self._grad = self._pieces = None  # the last step's: its memory is free for this one's
                    self.values.grad = torch.zeros_like(self.values)
                self._pieces = self.values.grad.split(self._sizes)
                self._grad = self.values.grad
        self._pieces[slot.number].add_(grad if grad.device == self._grad.device else grad.to(self._grad.device))

    @torch.no_grad()
    def write(self) -> None:
        """values -> the model's weights, in their dtype. Call it after each optimizer step, or `attach` the optimizer."""
        parts: dict[tuple, tuple] = {}  # cast once, not once a tensor: 387 kernel launches fewer for T5-large in bf16
        for slot in self._slots:
            kind = slot.weight.device, slot.weight.dtype
            if kind not in parts:
                parts[kind] = self.values.to(*kind).split(self._sizes)
            slot.put(parts[kind][slot.number])

    @torch.no_grad()
    def restore(self) -> None:
        """The pretrained numbers -> the model's weights, bit for bit. `values` stays, so write() brings it back."""
        for slot in self._slots:
            slot.put(slot.original.to(slot.weight.device, slot.weight.dtype))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """write() after each optimizer.step(), until remove(); and values.grad = None, which Trainer's model.zero_grad() leaves."""

        def after_step(*_: object) -> None:
            self.write()
            self.values.grad = None

        self._handles.append(optimizer.register_step_post_hook(after_step))

    def remove(self) -> None:
        """Take all hooks off the model; its weights stay as they are, and require gradients as before APET."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for p, flag in self._flags:
            p.requires_grad_(flag)
        if (model := self._model()) is not None:
            TUNED.discard(model)

    def save(self, file: str | os.PathLike, more: Mapping[str, Tensor] | None = None, **about: str) -> None:
        """Write positions and values as safetensors: 8 bytes a scalar (12 if a tensor has 2**31 entries or more).

        `values` float32 (budget,); `indices` int32 or int64 (budget,), flat in each parameter; `more` tensors under their
        names; in the metadata the mask, seed and where, `about`, and `layout`: base64 of zlib of a JSON list of
        [name, shape, number of positions].
        """
        layout = [[n, list(s.weight.shape), len(s.index)] for n, s in zip(self.positions, self._slots, strict=True)]
        wide = max(s.weight.numel() for s in self._slots) > 2**31 - 1
        indices = torch.cat(list(self.positions.values())).to(torch.int64 if wide else torch.int32)
        packed = base64.b64encode(zlib.compress(json.dumps(layout).encode(), 9)).decode()
        tensors = {**(more or {}), "values": self.values.detach(), "indices": indices}
        save_tensors(tensors, file, {"format": "apet 1", "layout": packed, **self.about, **about})

    @classmethod
    def load(cls, model: nn.Module, file: str | os.PathLike, *, backend: str = "auto") -> APET:
        """The APET that `save` wrote, its values written into `model`. ValueError if the file is for another model."""
        tensors, about = load_tensors(file)
        try:
            if about["format"] != "apet 1":
                raise KeyError
            layout = json.loads(zlib.decompress(base64.b64decode(about["layout"], validate=True)))
            values, indices = tensors["values"], tensors["indices"].long()
            counts = [int(count) for _, _, count in layout]
            if not (values.shape == indices.shape == (sum(counts),) and min(counts) > 0 and values.dtype == torch.float32):
                raise KeyError
            parts = dict(zip([str(n) for n, _, _ in layout], indices.split(counts), strict=True))
            shapes = {str(n): tuple(shape) for n, shape, _ in layout}
        except (KeyError, ValueError, TypeError, zlib.error):
            raise UserError(f"{file} is no delta of APET (or a broken one)") from None
        own = candidates(model)
        for name, shape in shapes.items():
            if name not in own:
                raise UserError(f"{file} was made for another model: this one has no parameter {name}")
            if tuple(own[name].shape) != shape:
                raise UserError(f"{file} was made for another model: {name} is {shape} there and {tuple(own[name].shape)} here")
        apet = cls(model, None, mask=parts, backend=backend)
        if list(apet.positions) != list(parts) or any(not torch.equal(apet.positions[n], i) for n, i in parts.items()):
            apet.remove()
            raise UserError(f"{file} was made for another model: its parameters come in another order")
        apet.about = {key: about.get(key, "") for key in apet.about}
        with torch.no_grad():
            apet.values.copy_(values)
        apet.write()
        return apet


class _Slot:
    """The chosen entries of one parameter: the part of `values` with this number."""

    def __init__(self, apet: APET, weight: nn.Parameter, index: Tensor, number: int):
        self.apet, self.weight, self.number = apet, weight, number
        self.index = index.to(weight.device)
        self.original = weight.detach().take(self.index)

    def here(self) -> Tensor:
        """The flat indices, on the weight's device (the model may have moved)."""
        if self.index.device != self.weight.device:
            self.index = self.index.to(self.weight.device)
        return self.index

    def put(self, numbers: Tensor) -> None:
        self.weight.put_(self.here(), numbers)

    def take_dense(self, weight: nn.Parameter) -> None:
        """The hook path: gather the chosen entries of the dense gradient, and drop it."""
        grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
        self.apet._accumulate(self, grad.take(self.here()))
        weight.grad = None

    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Of each chosen entry of a matrix, int64."""
        return self.index // self.weight.shape[1], self.index % self.weight.shape[1]

    def gather_is_cheaper(self, modules: list[nn.Module]) -> bool:
        """Than a dense gradient; in multiply-adds per token, see COST."""
        device, dense, m = self.weight.device.type, self.weight.numel(), len(self.index)
        if any(type(module) is nn.Linear for module in modules):
            rows, cols = (int(x.bincount().count_nonzero()) for x in self.rows_and_columns())
            cost = COST["cpu" if device == "cpu" else "cuda"]
            return cheapest_way(rows, cols, m, device)[0] + cost["line"] * cols + cost["call"] < dense
        return self.weight.shape[0] >= 512 and m < dense // 4  # an embedding: the dense gradient costs its own size


class _Linear:
    """One nn.Linear of the gather path: dL/dW[i, j] = sum over tokens of dY[t, i] X[t, j], at the chosen (i, j) alone."""

    slot: _Slot | None = None

    def __init__(self, slot: _Slot, module: nn.Linear):
        self.slot = slot
        row, col = slot.rows_and_columns()
        self.rows, self.row = self.distinct(row, module.out_features)
        self.cols, self.col = self.distinct(col, module.in_features)
        height = module.out_features if self.rows is None else len(self.rows)
        width = module.in_features if self.cols is None else len(self.cols)
        self.way, self.device = cheapest_way(height, width, len(row), row.device.type)[1], row.device
        if self.way == "single":
            self.rows, self.row = None, row
        elif self.way == "product":
            self.at = self.row * width + self.col
            del self.row, self.col
        else:
            ends = nn.functional.pad(torch.bincount(self.row, minlength=height).cumsum(0), (1, 0))
            with warnings.catch_warnings():  # "sparse CSR support is in beta"; the one function used here is tested
                warnings.simplefilter("ignore")
                self.csr = torch.sparse_csr_tensor(ends, self.col, torch.zeros(len(row)), size=(height, width))

    def __reduce__(self) -> tuple:  # in a copy of the model (deepcopy, pickle) the hooks do nothing
        return object.__new__, (type(self),)

    @staticmethod
    def distinct(index: Tensor, size: int) -> tuple[Tensor | None, Tensor]:
        """(the distinct ones, the place of each among them); (None, index) if they are nearly all: no need to copy them."""
        touched = torch.bincount(index, minlength=size) > 0
        lines = touched.nonzero().squeeze(1)
        return (lines, touched.cumsum(0)[index] - 1) if len(lines) < 0.9 * size else (None, index)

    # Inside its own layer the weight is frozen, so that autograd forms no dense gradient of it. Wherever else the model may
    # use it (F.linear(h, self.embed.weight)), it requires one, which takes the hook path.
    def before(self, *_: object) -> None:
        if self.slot and torch.is_grad_enabled():
            self.slot.weight.requires_grad_(False)

    def after(self, module: nn.Linear, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not self.slot or not torch.is_grad_enabled():
            return None
        self.slot.weight.requires_grad_(True)
        return _Tap.apply(output, self.slot.apet.values, self, (args[0] if args else kwargs["input"],))

    def keep(self, x: Tensor, output: Tensor) -> Tensor:
        """What backward needs: the chosen columns of x, (tokens, columns); x itself if most are chosen."""
        if self.device != output.device:
            self.move(output.device)
        if x.dtype != output.dtype or x.device != output.device:
            x = x.to(output.device, output.dtype)
        x = x.reshape(-1, x.shape[-1])
        return x.detach() if self.cols is None else columns(x, self.cols)

    def move(self, device: torch.device) -> None:
        """The indices follow a model that went to another device."""
        self.device = device
        for name in ("rows", "row", "cols", "col", "at"):
            if getattr(self, name, None) is not None:
                setattr(self, name, getattr(self, name).to(device))

    def entries(self, kept: Tensor, grad: Tensor) -> Tensor:
        """The gradient at the chosen entries, from kept (tokens, columns) and the output's gradient (..., out)."""
        dy = grad.reshape(-1, grad.shape[-1])
        if self.rows is not None:
            dy = columns(dy, self.rows)
        if self.way == "single" or (self.way == "sampled" and (dy.device.type != "cpu" or dy.dtype == torch.float64)):
            return self.one_by_one(kept, dy)
        if self.way == "product":
            return (dy.t() @ kept).view(-1).index_select(0, self.at)
        kept = kept.t().contiguous().float()  # dot products over neighbouring numbers
        return torch.sparse.sampled_addmm(self.csr, dy.t().float(), kept.t(), beta=0.0).values()

    def one_by_one(self, kept: Tensor, dy: Tensor) -> Tensor:
        """Of each entry, the product of its two columns, summed over tokens, in fp32 or wider."""
        step = max(1, (1 << (20 if dy.device.type == "cpu" else 24)) // len(self.row))  # tokens; bounds the temporaries
        if len(dy) > step:
            return sum(map(self.one_by_one, kept.split(step), dy.split(step)))
        part = columns(dy, self.row)
        if part.element_size() < 4:
            part = part.float()
        return part.mul_(columns(kept, self.col)).sum(0)


class _Embedding:
    """One nn.Embedding of the gather path: the output's gradient, summed over equal tokens of the batch, then gathered."""

    slot: _Slot | None = None
    before, __reduce__ = _Linear.before, _Linear.__reduce__

    def __init__(self, slot: _Slot, module: nn.Embedding):
        self.slot = slot
        row, self.col = slot.rows_and_columns()
        self.rows, self.row_of = row.unique(return_inverse=True)
        self.padding = module.padding_idx

    def after(self, module: nn.Embedding, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not self.slot or not torch.is_grad_enabled():
            return None
        self.slot.weight.requires_grad_(True)
        ids = args[0] if args else kwargs["input"]
        return _Tap.apply(output, self.slot.apet.values, self, (ids,))

    def keep(self, ids: Tensor, output: Tensor) -> Tensor:
        """What backward needs: the token ids, (tokens,)."""
        return ids.reshape(-1).to(output.device)

    def entries(self, ids: Tensor, grad: Tensor) -> Tensor:
        """The gradient at the chosen entries, from the token ids (tokens,) and the output's gradient (..., width)."""
        if self.rows.device != ids.device:
            self.rows, self.row_of, self.col = (i.to(ids.device) for i in (self.rows, self.row_of, self.col))
        grad = grad.reshape(len(ids), -1)
        ids, order = ids.sort()
        group = nn.functional.pad((ids[1:] != ids[:-1]).cumsum(0), (1, 0))  # equal ids form a group
        sums = grad.new_zeros(len(ids) + 1, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
        sums.index_add_(0, group, grad.index_select(0, order).to(sums.dtype))
        first = torch.searchsorted(ids, self.rows).clamp_(max=len(ids) - 1)
        found = ids[first] == self.rows
        if self.padding is not None:
            found &= self.rows != self.padding
        at = torch.where(found, group[first], len(ids))  # the last row of `sums` is zero: for ids not in the batch
        return sums.view(-1).take(at[self.row_of] * grad.shape[1] + self.col)


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; in backward it takes the gradient of the layer's chosen entries."""

    @staticmethod
    def forward(ctx, output: Tensor, values: Tensor, use: _Linear | _Embedding, inputs: tuple[Tensor]) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(use.keep(inputs[0], output))  # in a tuple, as they need no gradient from here
        return output.detach()  # not `output`: an in-place activation may follow

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        slot = ctx.use.slot
        (kept,) = ctx.saved_tensors
        if grad.numel():
            slot.apet._accumulate(slot, ctx.use.entries(kept, grad))
        return grad, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, Tensor], file: str | os.PathLike, about: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it: whoever reads sees all of it or nothing."""
    from safetensors.torch import save

    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    write_file(file, save(tensors, metadata={key: str(value) for key, value in about.items()}))


def load_tensors(file: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a UserError if it is none."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(file):
        raise UserError(f"there is no file {file}")
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is not a safetensors file: {e}") from None


def write_file(file: str | os.PathLike, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename; what a process that was killed here left is removed."""
    folder, name = os.path.split(os.path.abspath(file))
    mine = f".{name}.{platform.node()}-"
    temporary = os.path.join(folder, f"{mine}{os.getpid()}.tmp")
    try:
        for other in os.listdir(folder):
            number = other.removeprefix(mine).removesuffix(".tmp")
            if other.startswith(mine) and number.isdecimal() and not is_running(int(number)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, other))
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except OSError as e:
        raise UserError(f"can't write {file}: {e.strerror}") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


# ----------------------------------------------------------------------------------------------------------------------
# The other methods of the paper
# ----------------------------------------------------------------------------------------------------------------------

METHODS = ("apet", "full", *COUNTED, "none")
LORA_RANK, LORA_ALPHA, ADAPTER_WIDTH, PROMPT_TOKENS = 8, 16, 24, 100  # the authors'
QUERY_VALUE = r"(SelfAttention\.[qv]|(attention|self)\.(query|value)|query_key_value|c_attn|[qv]_(proj|lin))$"
SUBLAYER_END = (  # the linear layer that ends self-attention or feed-forward, before the residual is added
    r"(SelfAttention\.o|DenseReluDense\.wo|self_attention\.dense|dense_4h_to_h|output\.dense|(attn|mlp)\.c_proj"
    r"|self_attn\.(out_proj|o_proj)|(^|\.)fc2|down_proj|attention\.out_lin|ffn\.lin2)$"
)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of nn.Linear and of GPT-2's Conv1D, whose weight is transposed; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if type(module).__name__ == "Conv1D" else None


def linear_layers(model: nn.Module, pattern: str, what: str) -> dict[str, nn.Module]:
    """The linear layers whose names match."""
    found = {n: m for n, m in model.named_modules() if re.search(pattern, n) and linear_shape(m)}
    if not found:
        raise UserError(f"{what}: {type(model).__name__} has none of the layers it goes to ({pattern})")
    return found


def method_parameters(model: nn.Module, method: str) -> int:
    """How many scalars a method trains on this model at the authors' settings, computed from the model's shapes."""
    one_of(method, COUNTED, "method")
    if method == "lora":  # two factors of rank 8
        return sum(LORA_RANK * sum(linear_shape(m)) for m in linear_layers(model, QUERY_VALUE, "lora").values())
    if method == "adapter":  # down and up with biases, width 24
        widths = [linear_shape(m)[1] for m in linear_layers(model, SUBLAYER_END, "adapter").values()]
        return sum(2 * ADAPTER_WIDTH * width + ADAPTER_WIDTH + width for width in widths)
    if method == "prompt":
        if not hasattr(model, "get_input_embeddings"):
            raise UserError(f"prompt: {type(model).__name__} has no input embeddings")
        return PROMPT_TOKENS * model.get_input_embeddings().embedding_dim
    if biases := own_biases(model):
        return sum(p.numel() for p in biases.values())
    return sum(linear_shape(m)[1] for m in linear_layers(model, "", "bitfit").values())  # a new bias for each (T5)


def own_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The biases that the pretrained model has."""
    return {n: p for n, p in model.named_parameters() if re.search(r"(^|[._])bias$", n) and not n.startswith("inserted.")}


class Inserted(nn.Module):
    """The new fp32 weights of a method inside `model.inserted`, and the hooks that apply them; no module is replaced.

    lora: x @ A' @ B' * alpha / rank is added to the output of q and v (Hu et al., 2022); B starts at zero.
    adapter: h + up(gelu(down(h))) at the end of self-attention and of feed-forward (Houlsby et al., 2019); up starts at zero.
    bitfit: a bias, zero at first, for each linear layer of a model that has none (T5).
    prompt: 100 embeddings before the text (Lester et al., 2021), at first those of random tokens. See `prompted`.
    """

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.method, self.handles, self.dropout = method, [], nn.Dropout(0.0)  # `set_dropout` sets its rate
        if method == "prompt":
            table = model.get_input_embeddings().weight
            self.prompt = nn.Parameter(table[torch.randint(len(table), (PROMPT_TOKENS,)).to(table.device)].detach().float())
            return
        pattern = {"lora": QUERY_VALUE, "adapter": SUBLAYER_END, "bitfit": ""}[method]
        for name, module in linear_layers(model, pattern, method).items():
            n_in, n_out = linear_shape(module)
            if method == "lora":  # A as nn.Linear's own weight
                a = nn.init.kaiming_uniform_(torch.empty(LORA_RANK, n_in), a=math.sqrt(5))
                new = {"A": a, "B": torch.zeros(n_out, LORA_RANK)}
            elif method == "adapter":
                new = {"down": torch.randn(ADAPTER_WIDTH, n_out) * 0.01, "down_bias": torch.zeros(ADAPTER_WIDTH)}
                new |= {"up": torch.zeros(n_out, ADAPTER_WIDTH), "up_bias": torch.zeros(n_out)}
            else:
                new = {"bias": torch.zeros(n_out)}
            part = nn.ParameterDict({key: nn.Parameter(value.to(module.weight.device)) for key, value in new.items()})
            self.add_module(name.replace(".", "_"), part)
            self.handles.append(module.register_forward_hook(functools.partial(self.apply_part, part)))

    def apply_part(self, part: nn.Module, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        def cast(weight: Tensor) -> Tensor:
            return weight.to(output.dtype)

        linear = nn.functional.linear
        if self.method == "lora":
            x = self.dropout(args[0])
            return output + linear(linear(x, cast(part.A)), cast(part.B)) * (LORA_ALPHA / LORA_RANK)
        if self.method == "adapter":
            inner = nn.functional.gelu(linear(output, cast(part.down), cast(part.down_bias)), approximate="tanh")
            return output + self.dropout(linear(inner, cast(part.up), cast(part.up_bias)))
        return output + cast(part.bias)


def insert(model: nn.Module, methods: Iterable[str]) -> nn.ModuleDict:
    """Put the new weights of the methods into `model.inserted`, where named_parameters() finds them."""
    model.inserted = nn.ModuleDict({method: Inserted(model, method) for method in methods})
    return model.inserted


def take_out(model: nn.Module) -> None:
    """Undo `insert`."""
    for new in model.inserted.values():
        for handle in new.handles:
            handle.remove()
    del model.inserted


def prompted(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the soft prompt of `insert(model, ["prompt"])`, if there is one, put before the text.

    An encoder's comes after its first token, [CLS], from whose place the head reads.
    """
    core = base_of(model)
    if "prompt" not in getattr(core, "inserted", {}):
        return batch
    batch, first = dict(batch), int(core is not model)
    ids = batch.pop("input_ids")
    embedded = core.get_input_embeddings()(ids)
    prompt = core.inserted["prompt"].prompt.to(embedded.device, embedded.dtype).expand(len(ids), -1, -1)
    batch["inputs_embeds"] = torch.cat([embedded[:, :first], prompt, embedded[:, first:]], dim=1)
    for key, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if key in batch:
            new = batch[key].new_full((len(ids), prompt.shape[1]), value)
            batch[key] = torch.cat([batch[key][:, :first], new, batch[key][:, first:]], dim=1)
    return batch


def base_of(model: nn.Module) -> nn.Module:
    """The pretrained part: the model without its classification head, if it has one."""
    return model.base_model if type(model).__name__.endswith("ForSequenceClassification") else model


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: what is tuned for
# ----------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A row of the table. Text columns and label words that are None are found in the data."""

    source: str  # a hub id, or a local file or folder
    config: str | None
    fields: tuple[str, ...] | None
    label: str | None
    words: tuple[str, ...] | None  # the labels in words, by label number; () for a text as target
    metric: str  # accuracy, f1 (accuracy and F1 of label 1), rouge or squad
    splits: tuple[str, str | None, str]  # train; picks the best step (None: a fixed part of train); is reported


TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "toy")
GLUE, TVT = "nyu-mll/glue", ("train", "validation", "test")
SENTIMENT, NLI, QNLI = ("negative", "positive"), ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")
PAIR, EQUIVALENT, DUPLICATE = ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("not_duplicate", "duplicate")
TASKS = {
    "sst2": Task(GLUE, "sst2", ("sentence",), "label", SENTIMENT, "accuracy", ("train", None, "validation")),
    "imdb": Task("stanfordnlp/imdb", "plain_text", ("text",), "label", SENTIMENT, "accuracy", ("train", None, "test")),
    "rotten_tomatoes": Task("cornell-movie-review-data/rotten_tomatoes", None, ("text",), "label", SENTIMENT, "accuracy", TVT),
    "mnli": Task(GLUE, "mnli", ("premise", "hypothesis"), "label", NLI, "accuracy", ("train", None, "validation_matched")),
    "qnli": Task(GLUE, "qnli", ("question", "sentence"), "label", QNLI, "accuracy", ("train", None, "validation")),
    "rte": Task(GLUE, "rte", PAIR, "label", QNLI, "accuracy", ("train", None, "validation")),
    "mrpc": Task(GLUE, "mrpc", PAIR, "label", EQUIVALENT, "f1", TVT),
    "qqp": Task(GLUE, "qqp", ("question1", "question2"), "label", DUPLICATE, "f1", ("train", None, "validation")),
    "samsum": Task("knkarthick/samsum", None, ("dialogue",), "summary", (), "rouge", TVT),
    "multi_news": Task("alexfabbri/multi_news", None, ("document",), "summary", (), "rouge", TVT),
    "nq_open": Task(
        "google-research-datasets/nq_open", "nq_open", ("question",), "answer", (), "squad", ("train", None, "validation")
    ),
    "toy-sentiment": Task(f"{TOY}/tasks/sentiment", None, ("text",), "label", SENTIMENT, "accuracy", TVT),
    "toy-inference": Task(f"{TOY}/tasks/inference", None, ("premise", "hypothesis"), "label", NLI, "accuracy", TVT),
    "toy-paraphrase": Task(f"{TOY}/tasks/paraphrase", None, PAIR, "label", EQUIVALENT, "f1", TVT),
    "toy-qa": Task(f"{TOY}/tasks/qa", None, ("context", "question"), "answer", (), "squad", TVT),
    "toy-summary": Task(f"{TOY}/tasks/summary", None, ("document",), "summary", (), "rouge", TVT),
}
HOLD_OUT = 1_000  # examples at most that pick the best step: a standard error of 1.6 points at most, at little cost
NO_LABEL = (None, "", [], -1, "-1")  # -1 is how the hub says that a row has none
FOUND_LABELS = ("label", "labels", "answer", "answers", "summary", "target", "output")  # tried in this order


class Example(NamedTuple):
    texts: tuple[str, ...]  # of each field
    source: str  # the same as one text
    target: str  # what training learns to write: the label's word, the summary, the first answer
    label: int  # number of the label; -1 for texts
    answers: tuple[str, ...]  # what scoring accepts


class Data(NamedTuple):
    task: str
    words: tuple[str, ...]
    metric: str
    train: list[Example]
    select: list[Example]  # picks the best step
    report: list[Example]  # is reported
    about: dict  # where each split comes from, for the result


def load_task(args: argparse.Namespace) -> Data:
    """The three splits of a task as text. UserError for what is missing or does not fit."""
    task = TASKS.get(args.task)
    if task is None:
        name, _, config = args.task.partition(":")
        if not os.path.exists(args.task) and not HUB_ID.fullmatch(name):
            close = difflib.get_close_matches(args.task, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(TASKS)}, a local file or folder, or namespace/name"
            raise UserError(f"unknown task {args.task!r}: {hint}")
        task = Task(args.task, None, None, None, None, "", TVT)
        if not os.path.exists(args.task):
            task = task._replace(source=name, config=config or None)
    if args.text_fields:
        task = task._replace(fields=tuple(args.text_fields.split(",")))
    if args.label_field:
        task = task._replace(label=args.label_field, words=None, metric="")
    local = os.path.exists(task.source) or task.source.startswith(TOY)
    splits, hub_words, about = read_local(task.source) if local else read_hub(task)
    first = next(iter(splits.values()))[0]
    label = task.label or next((name for name in FOUND_LABELS if name in first), None)
    if label is None:
        raise UserError(f"{task.source}: which column is the label? --label-field NAME; there are {', '.join(first)}")
    fields = task.fields or tuple(n for n, v in first.items() if isinstance(v, str) and n not in (label, "id", "idx"))
    for name in (*fields, label):
        if name not in first:
            raise UserError(f"{task.source} has no column {name!r}; there are {', '.join(first)}")
    if not fields:
        raise UserError(f"{task.source}: which columns are the text? --text-fields A,B; there are {', '.join(first)}")
    named = task.words if task.words is not None else hub_words.get(label) or None
    words = find_words(splits, label) if named is None else named
    metric = task.metric or ("accuracy" if words else "squad" if isinstance(first[label], list) else "rouge")
    made = {name: to_examples(rows, fields, label, words, bool(named), f"{task.source} ({name})") for name, rows in splits.items()}
    made = {name: examples for name, examples in made.items() if examples}
    dropped = {name: len(rows) - len(made.get(name, ())) for name, rows in splits.items()}
    if any(dropped.values()):
        about["rows without text or label, dropped"] = {name: n for name, n in dropped.items() if n}

    def some(rows: list, size: int | None) -> tuple[list, list]:
        """A fixed random choice of that many, and the others."""
        if size is None or size >= len(rows):
            return rows, []
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return [rows[i] for i in sorted(order[:size])], [rows[i] for i in sorted(order[size:])]

    def hold_out(rows: list) -> tuple[list, list]:
        if len(rows) < 10:
            raise UserError(f"{task.source}: {len(rows)} training examples are too few to hold some out; add a validation split")
        return some(rows, min(HOLD_OUT, len(rows) // 10))

    train, select_from = made.get("train", []), task.splits[1]
    report_from = next((n for n in (task.splits[2], "test", "validation") if n in made), None)
    select_from = select_from if select_from in made and select_from != report_from else None
    report = made[report_from] if report_from else None
    if report is None:
        report, train = hold_out(train)
    select = made[select_from] if select_from else []
    if not select and train:
        select, train = hold_out(train)
    if not train and args.load is None and args.method != ["none"]:
        raise UserError(f"{task.source} has no training split with usable rows (it has {', '.join(splits)})")
    about |= {"report": report_from or "held out of train", "select": select_from or "held out of train"}
    train, select, report = (
        some(train, args.train_size)[0],
        some(select, args.eval_size or HOLD_OUT)[0],
        some(report, args.eval_size)[0],
    )
    about["sizes"] = {"train": len(train), "select": len(select), "report": len(report)}
    return Data(args.task, words, metric, train, select, report, about)


def find_words(splits: dict[str, list[dict]], label: str) -> tuple[str, ...]:
    """Few distinct values are labels, in alphabetical order (numbers: in theirs); else (): a text is to be written."""
    values = [row[label] for row in splits.get("train", next(iter(splits.values()))) if row.get(label) not in NO_LABEL]
    if not values or isinstance(values[0], list):
        return ()
    kinds = sorted({str(v) for v in values}, key=lambda v: (not v.isdecimal(), len(v) * v.isdecimal(), v))
    if len(kinds) == 1:
        raise UserError(
            f"the column {label!r} holds one value only ({kinds[0][:50]!r}): there is nothing to learn; --label-field NAME"
        )
    return tuple(kinds) if 2 <= len(kinds) <= min(20, max(2, len(values) // 4)) else ()


def read_hub(task: Task) -> tuple[dict[str, list[dict]], dict[str, tuple[str, ...]], dict]:
    """({split: rows}, {column: label words}, facts) of a data set of the hub; read from the cache if the hub is down."""
    online = hub_answers()
    try:
        import datasets
    except ImportError:
        raise UserError("data sets of the hub need the package datasets: pip install datasets; a local file needs none") from None
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = not online  # read once, when datasets was imported
    try:
        if task.source == "alexfabbri/multi_news":
            return read_multi_news(online)
        builder = datasets.load_dataset_builder(task.source, task.config)
        wanted = [s for s in dict.fromkeys((*task.splits, *TVT)) if s and s in (builder.info.splits or task.splits)]
        if task.source in {t.source for t in TASKS.values()}:
            wanted = [s for s in task.splits if s]
        parts = {s: datasets.load_dataset(task.source, task.config, split=s) for s in wanted}
    except Exception as e:  # of httpx, pyarrow and datasets, which share no class
        raise UserError(hub_trouble("the data set", task.source, online, e)) from None
    words = {n: tuple(f.names) for n, f in next(iter(parts.values())).features.items() if isinstance(f, datasets.ClassLabel)}
    return {s: d.to_list() for s, d in parts.items()}, words, {"revision": builder.hash}


def read_multi_news(online: bool) -> tuple[dict[str, list[dict]], dict, dict]:
    """Its own text files: the hub's copy holds a loading script, which datasets runs no more."""
    from huggingface_hub import hf_hub_download

    splits, revision = {}, "cache"
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = []
        for ending in ("src.cleaned", "tgt"):
            file = hf_hub_download(
                "alexfabbri/multi_news", f"data/{name}.{ending}", repo_type="dataset", local_files_only=not online
            )
            revision = re.search(r"snapshots.([0-9a-f]{40})", file)[1]
            with open(file, encoding="utf-8") as f:
                lines.append([line.strip().replace("NEWLINE_CHAR", "\n") for line in f])
        splits[split] = [{"document": d, "summary": s.removeprefix("-").strip()} for d, s in zip(*lines, strict=True)]
    return splits, {}, {"revision": revision}


def read_local(path: str) -> tuple[dict[str, list[dict]], dict, dict]:
    """({split: rows}, {}, facts) of a jsonl, csv, tsv or parquet file (it is `train`), or of a folder with one for each split."""
    if path.startswith(TOY) and not os.path.isdir(path):
        raise UserError("the toy tasks lie in tests/toy beside apet.py, which is not there; name another --task")
    if os.path.isdir(path):
        files = {}
        for split, names in (("train", ("train",)), ("validation", ("validation", "valid", "dev", "val")), ("test", ("test",))):
            for name in names:
                found = [f"{path}/{name}{e}" for e in READERS if os.path.isfile(f"{path}/{name}{e}")]
                if found:
                    files[split] = found[0]
                    break
        if not files:
            raise UserError(f"{path} holds no train, validation or test file ({', '.join(READERS)})")
    else:
        if os.path.splitext(path)[1] not in READERS:
            raise UserError(f"{path} must be a folder or a file of type {', '.join(READERS)}")
        files = {"train": path}
    splits = {}
    for split, file in files.items():
        try:
            rows = READERS[os.path.splitext(file)[1]](file)
        except (ValueError, RecursionError, csv.Error, OSError) as e:
            raise UserError(f"can't read {file}: {e}") from None
        if not rows:
            raise UserError(f"{file} is empty: the split {split} has no rows")
        if not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file}: each row must hold named columns")
        splits[split] = rows
    digest = hashlib.sha256()
    for file in files.values():
        with open(file, "rb") as f:
            digest.update(f.read())
    return splits, {}, {"revision": f"sha256:{digest.hexdigest()[:16]}"}


def read_jsonl(file: str) -> list[dict]:
    with open(file, encoding="utf-8-sig") as f:
        return [json.loads(line) for line in f if line.strip()]


def read_table(file: str) -> list[dict]:
    with open(file, encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t" if file.endswith(".tsv") else ","))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            what = "more" if None in row else "fewer"
            raise ValueError(f"row {number} has {what} cells than the header; quote a text that holds the separator")
    return rows


def read_parquet(file: str) -> list[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"reading {file} needs the package pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_table(file).to_pylist()
    except ArrowException as e:
        raise UserError(f"can't read {file}: {e}") from None


READERS = {".jsonl": read_jsonl, ".csv": read_table, ".tsv": read_table, ".parquet": read_parquet}


def to_examples(
    rows: list[dict], fields: tuple[str, ...], label: str, words: tuple[str, ...], numbered: bool, where: str
) -> list[Example]:
    """Rows as text, in the authors' format; rows in which a field is missing or empty are left out.

    numbered: a label may be its word's place among `words`, as in the hub's class labels; else it is a word.
    """
    out = []
    for number, row in enumerate(rows, 1):
        values = [row.get(name) for name in fields]
        target = row.get(label)
        if any(v is None or not str(v).strip() for v in values) or target in NO_LABEL:
            continue
        texts = tuple(map(str, values))
        source = " ".join(f"{n}: {t}" for n, t in zip(fields, texts, strict=True)) if len(texts) > 1 else texts[0]
        if not words:
            answers = tuple(map(str, target)) if isinstance(target, (list, tuple)) else (str(target),)
            out.append(Example(texts, source, answers[0], -1, answers))
            continue
        try:
            place = numbered and (isinstance(target, int) or str(target) not in words)
            index = float(target) if place else words.index(str(target))
            if index not in range(len(words)):
                raise ValueError
        except (ValueError, TypeError):
            raise UserError(f"{where}, row {number}: the label {target!r} is none of {', '.join(words)}") from None
        index = int(index)
        out.append(Example(texts, source, words[index], index, (words[index],)))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


def measure(metric: str, predictions: list, examples: list[Example]) -> dict[str, float]:
    """Scores in 0 to 1; the first is the one that is reported. Predictions: label numbers, or texts."""
    if metric in ("accuracy", "f1"):
        truth = [e.label for e in examples]
        scores = {"accuracy": sum(p == t for p, t in zip(predictions, truth, strict=True)) / len(truth)}
        if metric == "f1":
            hits = sum(p == t == 1 for p, t in zip(predictions, truth, strict=True))
            scores["f1"] = 2 * hits / max(1, sum(p == 1 for p in predictions) + sum(t == 1 for t in truth))
        return scores
    if metric == "squad":
        pairs = list(zip(predictions, examples, strict=True))
        return {
            "f1": sum(max(squad_f1(p, a) for a in e.answers) for p, e in pairs) / len(pairs),
            "exact": sum(any(squad_words(p) == squad_words(a) for a in e.answers) for p, e in pairs) / len(pairs),
        }
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE needs the package rouge-score: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL", "rouge1", "rouge2"], use_stemmer=True)
    scores = [scorer.score(e.answers[0], p) for p, e in zip(predictions, examples, strict=True)]
    return {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in ("rougeL", "rouge1", "rouge2")}


def squad_words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(prediction: str, answer: str) -> float:
    """SQuAD's F1 of the words of two texts."""
    p, a = squad_words(prediction), squad_words(answer)
    if not p or not a:
        return float(p == a)
    common = sum((Counter(p) & Counter(a)).values())
    return 2 * common / (len(p) + len(a))


def baselines(data: Data) -> dict[str, float]:
    """The score without reading the input: a random guess, and training's most frequent target, always."""
    most = Counter(e.target for e in data.train or data.report).most_common(1)[0][0]
    if data.words:
        majority = measure(data.metric, [data.words.index(most)] * len(data.report), data.report)
        return {"random_guess": 1 / len(data.words), "majority": next(iter(majority.values()))}
    pool, pick = data.train or data.report, random.Random(0)
    guess = measure(data.metric, [pick.choice(pool).target for _ in data.report], data.report)
    majority = measure(data.metric, [most] * len(data.report), data.report)
    return {"random_guess": next(iter(guess.values())), "majority": next(iter(majority.values()))}


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------

TOY_MODELS = ("toy-tiny", "toy-small", "toy-base", "toy-large")
HUB_ID = re.compile(r"\w[\w-]*(\.[\w-]+)*/\w[\w-]*(\.[\w-]+)*")
SHORT = {f"t5-{size}": f"google-t5/t5-{size}" for size in ("small", "base", "large", "3b", "11b")}
SHORT |= {f"t5-v1_1-{size}": f"google/t5-v1_1-{size}" for size in ("small", "base", "large", "xl", "xxl")}
SHORT |= {f"t5-{size}-lm-adapt": f"google/t5-{size}-lm-adapt" for size in ("small", "base", "large", "xl", "xxl")}
SHORT |= {f"bloom-{size}": f"bigscience/bloom-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1")}
SHORT |= {f"bert-{size}": f"google-bert/bert-{size}-uncased" for size in ("base", "large")}
SHORT |= {f"bert-{size}-{case}": f"google-bert/bert-{size}-{case}" for size in ("base", "large") for case in ("cased", "uncased")}
SHORT |= {  # Turc et al., 2019
    f"bert-{size}": f"google/bert_uncased_L-{layers}_H-{width}_A-{width // 64}"
    for size, layers, width in (("tiny", 2, 128), ("mini", 4, 256), ("small", 4, 512), ("medium", 8, 512))
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def find_model(name: str) -> str:
    """The folder or hub id that a name stands for."""
    if name in TOY_MODELS:
        path = os.path.join(TOY, "models", name.removeprefix("toy-"))
        if not os.path.isdir(path):
            raise UserError(f"{name} lies in tests/toy beside apet.py, which is not there; name another --model")
        return path
    if name in SHORT or os.path.isdir(name) or HUB_ID.fullmatch(name):
        return SHORT.get(name, name)
    close = difflib.get_close_matches(name, [*TOY_MODELS, *SHORT], n=1)
    hint = f"did you mean {close[0]}?" if close else "a local folder, namespace/name on the hub, or one of " + ", ".join(SHORT)
    raise UserError(f"unknown model {name!r}: {hint}")


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached, asked once, for 3 seconds; if not, its libraries are told to read their cache alone."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=3).close()  # what is needed, not the front page
    except urllib.error.HTTPError as e:
        constants.HF_HUB_OFFLINE = e.code >= 500  # which would be asked again for minutes; 404 and the like are answers
    except (OSError, ValueError, http.client.HTTPException):
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def hub_trouble(what: str, name: str, online: bool, error: Exception) -> str:
    """One line for what went wrong between us and the hub."""
    if not online:
        return f"{what} {name} is not in the cache, and the hub can't be reached; work offline with local files or --model toy-base"
    if "trust_remote_code" in str(error):
        return f"{what} {name} brings code of its own (auto_map in its config.json), which is never run; take one that needs none"
    hidden = any(text in str(error) for text in ("Can't load the", "while generating"))  # what is wrong then stands in its cause
    cause = (error.__cause__ or error.__context__) if hidden else None
    return f"can't load {what} {name}: {' '.join(str(cause or error).split())[:300]}"


def folder_revision(folder: str) -> str:
    """Of a local model: from the sizes and the ends of its files, as reading all of a large one takes minutes."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name.endswith((".json", ".safetensors", ".bin", ".model", ".txt")):
            with open(os.path.join(folder, name), "rb") as f:
                size = f.seek(0, os.SEEK_END)
                digest.update(f"{name} {size} ".encode())
                for start in (0, max(0, size - (1 << 20))):
                    f.seek(start)
                    digest.update(f.read(1 << 20))
    return f"sha256:{digest.hexdigest()[:16]}"


def family_of(config: object) -> str:
    """seq2seq (T5), encoder (BERT: a classification head is added) or causal (BLOOM)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if config.is_encoder_decoder:
        return "seq2seq"
    return "encoder" if config.model_type in ENCODERS else "causal"


def load_model(args: argparse.Namespace, words: tuple[str, ...]) -> tuple[nn.Module, object, dict]:
    """(model in training mode, tokenizer, facts for the result). UserError if it can't be had."""
    path = find_model(args.model)
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else loading a .bin contacts a service in the background
    local = os.path.isdir(path)
    online = local or hub_answers()
    import transformers as hf
    from huggingface_hub import try_to_load_from_cache

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    try:
        config = hf.AutoConfig.from_pretrained(path, trust_remote_code=False)  # the default asks on stdin
        family = family_of(config)
        if family == "encoder" and not words:
            raise UserError(f"{args.model} is an encoder: it can classify, but not write the text that {args.task} asks for")
        tokenizer = hf.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        check_tokenizer(args.model, tokenizer, family)
        more = {"dtype": DTYPES[args.dtype], "device_map": args.device_map, "trust_remote_code": False}
        if family == "encoder":  # its head is made anew, for these labels
            more |= {"num_labels": len(words), "ignore_mismatched_sizes": True}
        kind = {"seq2seq": "Seq2SeqLM", "encoder": "SequenceClassification", "causal": "CausalLM"}[family]
        torch.manual_seed(0)  # for weights that the checkpoint lacks
        model, loaded = getattr(hf, f"AutoModelFor{kind}").from_pretrained(path, output_loading_info=True, **more)
    except UserError:
        raise
    except Exception as e:  # of httpx, safetensors, tokenizers and transformers, which share no class
        raise UserError(hub_trouble("the model", path, online, e)) from None
    inside = {id(p) for p in base_of(model).parameters()}
    base = {n for n, p in model.named_parameters() if id(p) in inside}
    if wrong := base & {entry[0] for entry in loaded["mismatched_keys"]}:
        raise UserError(f"{args.model}: {min(wrong)} has another shape in the checkpoint than by config.json")
    if made := sorted(base & set(loaded["missing_keys"])):
        say(f"{args.model} lacks {', '.join(made[:4])}{', ...' * (len(made) > 4)}: randomly initialized, always the same")
    tokenizer.rows = len(model.get_input_embeddings().weight)  # for Coder, which refuses tokens beyond
    if getattr(config, "type_vocab_size", 0) < 2:  # RoBERTa, DistilBERT: one kind of segment
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
    if family == "encoder":
        check_length(args, base_of(model))
    else:  # greedy, with nothing forced (BART's first token) or forbidden that training knows nothing of
        own = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos")}
        given = [model.generation_config.decoder_start_token_id, model.generation_config.bos_token_id, *own.values()]
        model.generation_config = hf.GenerationConfig(**own)
        if family == "seq2seq":
            model.generation_config.decoder_start_token_id = next(i for i in given if i is not None)
    if args.export and "bitfit" in args.method and not own_biases(base_of(model)):
        raise UserError("--export: a plain checkpoint has no place for the new biases; the delta (--save) holds them")
    if not args.device_map:
        model.to(args.device)
    found = re.search(r"snapshots.([0-9a-f]{40})", "" if local else str(try_to_load_from_cache(path, "config.json")))
    revision = folder_revision(path) if local else found[1] if found else "?"
    facts = {"path": args.model if local else path, "revision": revision, "family": family}
    return model.train(), tokenizer, facts | {"randomly initialized, as the checkpoint lacks them": made}


def check_tokenizer(name: str, tokenizer: object, family: str) -> None:
    """UserError for a tokenizer that knows no words (what transformers makes up where there is none) or ends no text."""
    if not re.search(r"\w", tokenizer.decode(tokenizer("Input: a text Output:").input_ids, skip_special_tokens=True)):
        raise UserError(f"{name} has no tokenizer, or one that knows no words: tokenizer.json belongs beside config.json")
    if family != "encoder" and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token (eos_token), which ends every text to be written")


def check_length(args: argparse.Namespace, base: nn.Module) -> None:
    """UserError if an encoder has fewer places than --max-source-length and a soft prompt ask for."""
    longest = getattr(base.config, "max_position_embeddings", None) or math.inf
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest -= module.padding_idx + 1  # RoBERTa's first place has number 2
    prompt = "prompt" in (*args.method, *args.insert)
    taken, room = f", of which the prompt takes {PROMPT_TOKENS}" * prompt, longest - prompt * PROMPT_TOKENS
    if args.max_source_length > room:
        right = f"--max-source-length {room}" if room >= 8 else "another method than prompt"
        raise UserError(f"{args.model} reads {longest} tokens at most{taken}: {right}")


def set_dropout(model: nn.Module, rate: float) -> None:
    """Every dropout rate of a model, those kept as plain numbers for functional calls included (but not OPT's `layerdrop`)."""
    for module in model.modules():
        for name, value in vars(module).items():
            functional = re.search("dropout|pdrop", name) and type(value) in (int, float)
            if functional or (isinstance(module, nn.Dropout) and name == "p"):
                setattr(module, name, rate)


# ----------------------------------------------------------------------------------------------------------------------
# Batches and scores
# ----------------------------------------------------------------------------------------------------------------------

CHARACTERS = 100  # of a token at most: what is beyond is cut before the tokenizer, which is slow on long texts, sees it
LOGITS = 1 << 26  # at a time, of which the loss makes copies in fp32 (256 MB each)
signature = functools.cache(inspect.signature)  # which takes as long as ten layers


class Coder:
    """Text -> token ids, in the authors' format `Input: ... Output: `; what was encoded once is remembered.

    seq2seq: source and target apart. causal: both in one sequence, padded on the left, the loss on the target alone.
    encoder: the texts alone, two as a pair of segments; the target is the number of the label.
    """

    def __init__(self, tokenizer: object, family: str, max_source: int, max_target: int):
        self.tokenizer, self.family, self.max_source, self.max_target = tokenizer, family, max_source, max_target
        self.rows = getattr(tokenizer, "rows", math.inf)  # of the model's embedding, as load_model found them
        self.pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None and i < self.rows)
        self.source, self.written = functools.cache(self.source), functools.cache(self.written)

    def encode(self, *texts: str, **options: object) -> list[int]:
        """Token ids; UserError for one that the model has no embedding for."""
        ids = self.tokenizer(*texts, **options).input_ids
        if beyond := [i for i in ids if i >= self.rows]:
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise UserError(f"the tokenizer's {token!r} (number {beyond[0]}) is beyond the model's {self.rows:,} embeddings")
        return ids

    def source(self, example: Example) -> list[int]:
        """Too long a text is cut at its end, not the closing `Output:`."""
        longest = self.max_source * CHARACTERS
        if self.family == "encoder":
            texts = example.texts if len(example.texts) == 2 else (example.source,)
            return self.encode(*(t[:longest] for t in texts), truncation=True, max_length=self.max_source)
        special = self.family == "seq2seq" or self.tokenizer.bos_token_id is not None
        text = f"Input: {example.source[:longest]}"
        ids = self.encode(f"{text} Output:", add_special_tokens=special)
        if len(ids) > self.max_source:
            ending = "Output:" if self.family == "seq2seq" else " Output:"
            end = self.encode(ending, add_special_tokens=False) + ids[-1:] * (self.family == "seq2seq")
            ids = self.encode(text, add_special_tokens=special)[: self.max_source - len(end)] + end
        return ids

    def target(self, example: Example) -> list[int]:
        return [example.label] if self.family == "encoder" else self.written(example.target)

    def written(self, text: str) -> list[int]:
        """What the tokenizer makes of a text to be written (BART: <s> first); it ends in the end of sequence, when cut, too."""
        special, end = self.family == "seq2seq", self.tokenizer.eos_token_id
        cut = (text if special else f" {text}")[: self.max_target * CHARACTERS]
        ids = self.encode(text_target=cut, add_special_tokens=special)
        ids = ids[:-1] if special and ids[-1] == end else ids
        return [*ids[: self.max_target - 1], end]

    def batch(self, sources: list[list[int]], targets: list[list[int]] | None, device: object) -> dict[str, Tensor]:
        """input_ids and attention_mask (batch, longest); with targets, labels (batch, longest): -100 where nothing is to be learnt.

        causal: the labels belong to the last places. The last token of a target, which predicts nothing, is not among the inputs.
        """

        def pad(rows: list[list[int]], value: int) -> Tensor:
            width = max(map(len, rows))
            fill = [[value] * (width - len(row)) for row in rows]
            left = self.family == "causal"
            return to_device(torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)]), device)

        rows = sources
        if self.family == "causal" and targets is not None:
            rows = [s + t[:-1] for s, t in zip(sources, targets, strict=True)]
        out = {"input_ids": pad(rows, self.pad), "attention_mask": pad([[1] * len(row) for row in rows], 0)}
        if self.family == "encoder" and "token_type_ids" in self.tokenizer.model_input_names:
            sep = self.tokenizer.sep_token_id  # the second segment comes after it
            first = [s.index(sep) + 1 if sep in s else len(s) for s in sources]
            out["token_type_ids"] = pad([[0] * n + [1] * (len(s) - n) for n, s in zip(first, sources, strict=True)], 0)
        if targets is not None:
            out["labels"] = pad(targets, -100)
        return out


def to_device(tensor: Tensor, device: object) -> Tensor:
    """From the CPU, without waiting for a GPU to be done with what it does."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def token_logp(model: nn.Module, coder: Coder, batch: dict[str, Tensor], **encoded: object) -> Tensor:
    """(batch, places): log-probability, in fp32, of each label of the batch; 0 where it is -100."""
    batch, accepted = dict(batch), signature(type(model).forward).parameters
    labels = batch.pop("labels")  # not the model's business: it would compute a loss of its own
    places = labels.shape[1]
    if "use_cache" in accepted:
        batch["use_cache"] = False  # it would copy keys and values
    if coder.family == "seq2seq":
        before = torch.full_like(labels, model.generation_config.decoder_start_token_id)
        before[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, coder.pad)
        batch["decoder_input_ids"] = before
    elif coder.family == "causal":
        if "position_ids" in accepted:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_(min=0)
        if "logits_to_keep" in accepted:
            batch["logits_to_keep"] = places  # a vocabulary of 250,000 at every source token would not fit
    logits = model(**batch, **encoded).logits
    logits = logits[:, None] if coder.family == "encoder" else logits[:, -places:]
    return _rows_logp(logits.flatten(0, 1), labels.flatten().to(logits.device)).view(labels.shape)


def _rows_logp(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each row's label. Many logits are taken in parts, so that none but a part is ever copied in fp32."""
    rows = max(1, LOGITS // logits.shape[1])
    if len(logits) <= rows:
        return -nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
    from torch.utils.checkpoint import checkpoint as recomputed  # in backward

    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([recomputed(_rows_logp, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def loss_sum(model: nn.Module, coder: Coder, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy summed over the targets' tokens (a sum, so that micro-batches and ranks add up exactly)."""
    return -token_logp(model, coder, prompted(model, batch)).sum()


@torch.no_grad()
def label_scores(model: nn.Module, coder: Coder, sources: list[list[int]], words: tuple[str, ...], device: object) -> Tensor:
    """(batch, labels): log-likelihood of each label's tokens, end of sequence included, given the source."""
    if coder.family == "encoder":
        return model(**prompted(model, coder.batch(sources, None, device))).logits.float()
    scores, encoded = [], {}
    if coder.family == "seq2seq":  # the source is encoded once for all labels
        source = prompted(model, coder.batch(sources, None, device))
        encoded = {"encoder_outputs": model.get_encoder()(**source)}
    for target in map(coder.written, words):
        if encoded:
            labels = to_device(torch.tensor([target]), device).expand(len(sources), -1)
            batch = {"attention_mask": source["attention_mask"], "labels": labels}
        else:
            batch = prompted(model, coder.batch(sources, [target] * len(sources), device))
        scores.append(token_logp(model, coder, batch, **encoded).sum(1))
    return torch.stack(scores, dim=1)


@torch.no_grad()
def predict(model: nn.Module, coder: Coder, data: Data, examples: list[Example], batch_size: int, device: object) -> list:
    """Label numbers, or texts by greedy decoding, in the order of `examples`; batches hold sources of like length."""
    rank, world = ranks()
    order = sorted(range(len(examples)), key=lambda i: (len(coder.source(examples[i])), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world]
    out = torch.zeros(len(examples), 1 if data.words else coder.max_target, dtype=torch.int64, device=device)
    found = []  # stays on the device until all is computed
    model.eval()
    try:
        for chosen in batches:
            sources = [coder.source(examples[i]) for i in chosen]
            if data.words:
                found.append(label_scores(model, coder, sources, data.words, device).argmax(1, keepdim=True).to(device))
                continue
            batch = prompted(model, coder.batch(sources, None, device))
            tokens = model.generate(**batch, max_new_tokens=coder.max_target, pad_token_id=coder.pad)
            skip = 1 if coder.family == "seq2seq" else batch["input_ids"].shape[1] if "input_ids" in batch else 0
            tokens = tokens[:, skip:].to(device)
            found.append(nn.functional.pad(tokens, (0, coder.max_target - tokens.shape[1]), value=coder.pad))
    finally:
        model.train()
    if found:
        out[list(itertools.chain(*batches))] = torch.cat(found)
    if world > 1:
        torch.distributed.all_reduce(out)  # what another rank fills is zero here
    if data.words:
        return out[:, 0].tolist()
    return [text.strip() for text in coder.tokenizer.batch_decode(out, skip_special_tokens=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """What a method trains: fp32 parameters, how they get into the model, and how the model gets back to before."""

    params: dict[str, nn.Parameter]
    write: Callable[[], None]
    undo: Callable[[], None]
    apet: APET | None
    inserted: dict[str, nn.Parameter]  # the new weights of the method, or among which APET chose
    head: dict[str, nn.Parameter]  # the classification head, trained (then in `params`, too) or not


def prepare(model: nn.Module, args: argparse.Namespace, batches: list | None = None) -> Tuned:
    """Put `args.method` on the pretrained model; make its classification head, if it has one, anew. See `select_positions`."""
    model.requires_grad_(False)
    base, params, writes, apet, inserted = base_of(model), {}, [], None, {}
    saved = load_tensors(args.load)[0] if args.load else {}
    inside = {id(p) for p in base.parameters()}
    head = {f"head.{n}": p for n, p in model.named_parameters() if id(p) not in inside}
    for module in model.modules():
        if any(p is not None and id(p) not in inside for p in module._parameters.values()):
            model._init_weights(module)  # from args.seed

    def fill(targets: dict[str, nn.Parameter]) -> None:
        """From the file of --load."""
        with torch.no_grad():
            for name, p in targets.items():
                if name not in saved or saved[name].shape != p.shape:
                    raise UserError(f"{args.load} was made for another model or head: it holds no {name} {tuple(p.shape)}")
                p.copy_(saved[name])

    with contextlib.ExitStack() as stack:  # what is done here is undone in reverse
        methods = args.insert if args.method == "apet" else [args.method]
        methods = [m for m in methods if m in COUNTED and not (m == "bitfit" and own_biases(base))]
        if methods:
            inserted = {f"inserted.{n}": p for n, p in insert(base, methods).named_parameters()}
            stack.callback(take_out, base)
        set_dropout(model, args.dropout if args.dropout is not None else 0.0 if args.method == "apet" else 0.1)
        if args.load:
            fill(head | inserted)
        whole = {} if args.freeze_head else dict(head)
        if args.method == "apet":
            options = dict(where=args.where, batches=batches)
            apet = APET.load(base, args.load) if args.load else APET(base, args.budget, args.mask, args.mask_seed, **options)
            stack.callback(apet.remove)
            stack.callback(apet.restore)
            params["values"] = apet.values
            writes.append(apet.write)
        elif inserted:
            params |= {n: p.requires_grad_(True) for n, p in inserted.items()}
        elif args.method in ("full", "bitfit"):
            whole |= dict(base.named_parameters()) if args.method == "full" else own_biases(base)
        masters, write, undo = tune_whole(whole)
        stack.callback(undo)
        if args.load and args.method != "apet":
            fill(masters)
            write()
        return Tuned(params | masters, lambda: [w() for w in (*writes, write)], stack.pop_all().close, apet, inserted, head)


def tune_whole(params: dict[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], Callable[[], None], Callable[[], None]]:
    """(fp32 parameters to train, write, undo) for whole tensors: in half precision their own small steps would vanish."""
    original = {n: p.detach().to("cpu", copy=True) for n, p in params.items()}
    masters, handles = {}, []
    for name, p in params.items():
        p.requires_grad_(True)
        masters[name] = p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
        if masters[name] is not p:

            def move(p: nn.Parameter, master: nn.Parameter = masters[name]) -> None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

            handles.append(p.register_post_accumulate_grad_hook(move))

    @torch.no_grad()
    def write() -> None:
        for name, p in params.items():
            if masters[name] is not p:
                p.copy_(masters[name])

    @torch.no_grad()
    def undo() -> None:
        for handle in handles:
            handle.remove()
        for name, p in params.items():
            p.copy_(original[name])
            p.requires_grad_(False)
            p.grad = None

    return masters, write, undo


def auto_lr(method: str, budget: int, family: str) -> float:
    """AdamW's rate, after sweeps on the toy family and a real model (results/README.md).

    APET: 1.5e-2 at 10,000 scalars, and much more for fewer (Xu & Zhang, ICML 2024, use 1e-2 at 0.01 % of a model), between
    0.1 and full fine-tuning's rate, which is what a budget of everything needs. Full fine-tuning and prompts: the authors'
    rates. Other new modules: 1e-3; the authors' 3e-4 (T5) and 1e-4 need more steps.
    """
    full = 3e-4 if family == "seq2seq" else 1e-4
    if method == "apet":
        return min(1e-1, max(full, 1.5e-2 * (1e4 / budget) ** 0.75))
    return {"full": full, "prompt": 3e-2}.get(method, 1e-3)


HEAD_LR = 1e-3  # a new layer of a few hundred weights


def ranks() -> tuple[int, int]:
    """(rank, number of processes)"""
    d = torch.distributed
    return (d.get_rank(), d.get_world_size()) if d.is_available() and d.is_initialized() else (0, 1)


def batch_at(step: int, size: int, n: int, seed: int) -> list[int]:
    """The examples of a step: every epoch is a new permutation; a function of its arguments, so nothing has to be saved."""
    out = []
    for at in range(step * size, (step + 1) * size):
        out.append(_permutation(n, seed, at // n)[at % n])
    return out


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed << 20) + epoch)).tolist()


def train(
    model: nn.Module, tuned: Tuned, coder: Coder, data: Data, args: argparse.Namespace, lr: float, state_file: str, revision: str
) -> dict:
    """Train, keep the parameters that score best on data.select, and leave them in the model. Returns the run's record.

    state_file: where an interrupted run goes on, if it was one on the same `revision` of model and data.
    The record: loss (mean per target token) and evaluation curves, best step, seconds, milliseconds a step, tokens a second.
    Raises UserError when the loss is not finite, Interrupted (state saved) on SIGINT or SIGTERM.
    """
    rank, world = ranks()
    groups = [{"params": [p for n, p in tuned.params.items() if n not in tuned.head], "lr": lr}]
    groups += [{"params": [p for n, p in tuned.params.items() if n in tuned.head], "lr": HEAD_LR}]
    groups = [g for g in groups if g["params"]]
    fused = {p.device.type for group in groups for p in group["params"]} <= {"cpu", "cuda"}  # a CPU steps 2e8 in 0.1 s, not 1.2
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)  # decay would pull to 0, not to the pretrained weights
    record = {"loss": [], "eval": [], "train_s": 0.0, "eval_s": 0.0, "tokens": 0, "step": 0, "best": None}
    best: dict[str, Tensor] = {}

    def evaluate() -> None:
        start = time.perf_counter()
        scores = measure(data.metric, predict(model, coder, data, data.select, args.eval_batch_size, args.device), data.select)
        score = next(iter(scores.values()))
        record["eval"].append({"step": record["step"], **scores})
        if record["best"] is None or score > record["best"]["score"]:
            record["best"] = {"step": record["step"], "score": score}
            best.update({n: p.detach().to("cpu", copy=True) for n, p in tuned.params.items()})
        record["eval_s"] += time.perf_counter() - start

    def save_state() -> None:
        if rank == 0:
            tensors = {f"p.{n}": p.detach() for n, p in tuned.params.items()} | {f"b.{n}": t for n, t in best.items()}
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"o.{i}.{n}": t for n, t in state.items()}
            save_tensors(tensors, state_file, {"record": json.dumps(record), "revision": revision})

    tensors, about = load_tensors(state_file) if args.resume and os.path.exists(state_file) else ({}, {})
    if about.get("revision") == revision:
        record = json.loads(about["record"])
        with torch.no_grad():
            for name, p in tuned.params.items():
                p.copy_(tensors[f"p.{name}"])
                best[name] = tensors[f"b.{name}"]
        blank = optimizer.state_dict()
        for key, t in tensors.items():
            if key.startswith("o."):
                _, i, name = key.split(".")
                blank["state"].setdefault(int(i), {})[name] = t
        optimizer.load_state_dict(blank)
        tuned.write()
        say(f"continuing at step {record['step']}")
    else:
        evaluate()

    stop = []
    old = (
        {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        if in_main_thread()
        else {}
    )
    from tqdm import tqdm

    bar = tqdm(
        total=args.steps, initial=record["step"], disable=rank > 0, unit="step", desc=args.label, mininterval=0.5, leave=False
    )
    try:
        while record["step"] < args.steps:
            start = time.perf_counter()
            torch.manual_seed((args.seed * 1_000_003 + record["step"]) * 1_009 + rank)  # dropout, too, depends on its place alone
            chosen = [data.train[i] for i in batch_at(record["step"], args.batch_size, len(data.train), args.seed)]
            chosen.sort(key=lambda e: len(coder.source(e)))  # micro-batches of like length: less padding
            count = sum(len(coder.target(e)) for e in chosen)
            loss = torch.zeros((), device=args.device)
            for i in range(args.grad_accum):
                part, parts = i * world + rank, args.grad_accum * world
                mine = chosen[part * len(chosen) // parts : (part + 1) * len(chosen) // parts]
                if mine:
                    batch = coder.batch([coder.source(e) for e in mine], [coder.target(e) for e in mine], args.device)
                    part_loss = loss_sum(model, coder, batch) / count
                    part_loss.backward()
                    loss += part_loss.detach().to(loss.device)
            if world > 1:
                for p in tuned.params.values():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    torch.distributed.all_reduce(p.grad)
                agreed = torch.stack([loss, loss.new_tensor(float(bool(stop)))])  # a signal may have come to one process alone
                torch.distributed.all_reduce(agreed)
                loss, stopping = agreed[0], agreed[1].item() > 0
            loss = loss.item()
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {record['step'] + 1}; a smaller --lr (now {lr:g}) may help")
            optimizer.step()
            optimizer.zero_grad()
            tuned.write()
            record["step"] += 1
            record["loss"].append(round(loss, 5))
            record["tokens"] += count + sum(len(coder.source(e)) for e in chosen)
            record["train_s"] += time.perf_counter() - start
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if record["step"] % args.eval_every == 0 or record["step"] == args.steps:
                evaluate()
                if record["step"] < args.steps:
                    save_state()
            if stopping if world > 1 else stop:
                save_state()
                if world > 1:
                    torch.distributed.barrier()  # torchrun ends all processes once one has ended
                raise Interrupted(stop[0] if stop else signal.SIGTERM, record["step"])
    finally:
        bar.close()
        for s, handler in old.items():
            signal.signal(s, handler)
    with torch.no_grad():
        for name, p in tuned.params.items():
            p.copy_(best[name])
    tuned.write()
    return record


class Interrupted(Exception):
    """A signal came; the state is saved."""


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


DATA_FLAGS = ("text_fields", "label_field", "max_source_length", "max_target_length")  # a delta says which it was made with


def parser() -> argparse.ArgumentParser:
    """Every flag, with its default's reason. None stands for a default that depends on the others; see `settle`."""
    about, raw = __doc__.split("\n\nThe file")[0], argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="apet.py", description=about, formatter_class=raw, allow_abbrev=False)
    add = p.add_argument
    add(
        "--model",
        help="a local folder, a hub id, or a short name such as t5-large (default: toy-base, offline; with --load, its own)",
    )
    add(
        "--task",
        help="a name of the table, a hub id, a local file or folder (default: toy-sentiment, offline; with --load, its own)",
    )
    add("--method", default="apet", help=f"{', '.join(METHODS)}; a list sweeps")
    add("--budget", default="1e4", help="scalars to tune: 1e4, 0.1%%, or as many as lora, adapter, prompt or bitfit; a list sweeps")
    add("--mask", default="random", help=f"how positions are chosen: {', '.join(MASKS)}; a list sweeps")
    add("--where", default="all", help=f"candidates: {', '.join(WHERE)}, layers:0-3 or a regular expression on names")
    add("--insert", default="", help="lora, adapter, prompt: APET chooses among these new weights, too, as in the authors' code")
    add("--freeze-head", action="store_true", help="leave the classification head of an encoder as it was made")
    pool = "what the head of an encoder reads: the pooler's view of [CLS] (as BERT), or the mean of the text's last hidden states"
    add("--pool", choices=("cls", "mean"), default="cls", help=f"{pool} (default: %(default)s)")
    add("--mask-seed", default="0", help="seed of the positions; a list sweeps")
    add("--seed", default="0", help="seed of training: data order, dropout; a list sweeps")
    add("--lr", default="auto", help="AdamW's constant rate; auto: by method and budget (results/README.md); a list sweeps")
    add("--steps", help="optimizer steps (default: the authors' 20,000; 600 for the toy tasks, under a CPU minute)")
    add("--batch-size", default="32", help="examples a step, over all micro-batches and processes (default: 32, the authors')")
    add("--grad-accum", default="1", help="micro-batches a step, each of examples of like length")
    add("--max-source-length", help="tokens (default: 128, the authors')")
    add("--max-target-length", help="tokens, end of sequence included (default: 128, the authors')")
    add("--eval-every", help="steps between evaluations (default: a twentieth of all, the authors'; a quarter for the toy tasks)")
    add("--eval-batch-size", default="64", help="examples a batch in evaluation")
    add("--train-size", help="use that many training examples (fixed choice)")
    add("--eval-size", help="evaluate on that many examples (fixed choice; default: all, at most 1,000 to pick the best step)")
    add("--dropout", help="rate (default: the authors' 0 for apet and 0.1 for the others; 0 on the toy models)")
    add("--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, fp32 on a CPU); what is tuned is fp32")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--device-map", help="spread the model over several devices: auto (needs accelerate)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations (without it: only once memory has run out)")
    add("--text-fields", help="text columns, comma-separated")
    add("--label-field", help="column of the label or target text")
    add("--out", default="results/runs", help="folder of the results (default: %(default)s)")
    add("--save", help="file for the delta (default: beside the result)")
    add("--export", help="folder for a plain Hugging Face checkpoint of the tuned model")
    add("--load", help="a saved delta: evaluate it, without training")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="skip finished cells, continue an interrupted one")
    return p


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Check the arguments, fill in those that depend on others, and split the lists. Raises UserError."""

    def split(text: str, what: str, read: Callable[[str], object]) -> list:
        parts = [part.strip() for part in str(text).split(",")]
        if not all(parts):
            raise UserError(f"--{what}: empty entry in {text!r}")
        return list(dict.fromkeys(read(part) for part in parts))

    def seed(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text):
            raise UserError(f"a seed must be a whole number from 0 to 999999999, not {text!r}")
        return int(text)

    def rate(text: str) -> float | str:
        try:
            if text == "auto" or 0 < float(text) < math.inf:
                return text if text == "auto" else float(text)
        except ValueError:
            pass
        raise UserError(f"--lr must be a number above 0, or auto, not {text!r}")

    about = {}
    if args.load:  # it says itself how it was made
        about = load_tensors(args.load)[1]
        if about.get("format") != "apet 1" or about.get("method", "apet") not in METHODS:
            raise UserError(f"{args.load} is no delta of apet.py")
        args.method, args.insert = about.get("method", "apet"), about.get("insert", "")
        args.pool = about.get("pool", "cls")
        other = args.task not in (None, about.get("task"))  # its columns have other names
        for name in DATA_FLAGS[2:] if other else DATA_FLAGS:
            setattr(args, name, getattr(args, name) or about.get(name))
    args.model = about.get("model", "toy-base") if args.model is None else args.model
    args.task = about.get("task", "toy-sentiment") if args.task is None else args.task
    toy = args.task.startswith("toy-")
    args.method = split(args.method, "method", lambda m: one_of(m, METHODS, "method"))
    args.mask = split(args.mask, "mask", lambda m: one_of(m, MASKS, "mask"))
    args.insert = (
        split(args.insert, "insert", lambda m: one_of(m, ("lora", "adapter", "prompt"), "method to insert")) if args.insert else []
    )
    args.budget = split(args.budget, "budget", str)
    args.mask_seed, args.seed = split(args.mask_seed, "mask-seed", seed), split(args.seed, "seed", seed)
    args.lr = split(args.lr, "lr", rate)
    args.max_source_length, args.max_target_length = args.max_source_length or "128", args.max_target_length or "128"
    args.steps = parse_count(args.steps or (600 if toy else 20_000), "--steps")
    args.eval_every = parse_count(args.eval_every or max(1, args.steps // (4 if toy else 20)), "--eval-every")
    for name in (
        "batch_size",
        "grad_accum",
        "max_source_length",
        "max_target_length",
        "eval_batch_size",
        "train_size",
        "eval_size",
    ):
        value = getattr(args, name)
        setattr(args, name, None if value is None else parse_count(value, "--" + name.replace("_", "-")))
    if args.max_source_length < 8 or args.max_target_length < 2:
        raise UserError("--max-source-length must be at least 8 and --max-target-length at least 2")
    if args.grad_accum > args.batch_size:
        raise UserError(f"--grad-accum {args.grad_accum} is above --batch-size {args.batch_size}")
    if args.dropout is None:
        args.dropout = 0.0 if args.model in TOY_MODELS else None
    else:
        try:
            args.dropout = float(args.dropout)
        except ValueError:
            args.dropout = -1.0
        if not 0 <= args.dropout < 1:
            raise UserError("--dropout must be a number from 0 to below 1")
    local = int(os.environ.get("LOCAL_RANK", 0))
    args.device = args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("cpu and cuda can")
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        args.device = "cpu" if device.type == "cpu" else args.device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {args.device} can't be used: {str(e).splitlines()[0]}") from None
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    if args.save and (os.path.isdir(args.save) or not os.path.isdir(os.path.dirname(args.save) or ".")):
        raise UserError(f"--save {args.save}: a file in a folder that is there, please")
    there = args.export or "."
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there or "."):
        raise UserError(f"--export {args.export}: {there} is a file, where a folder should be")
    if args.export and (odd := {"adapter", "prompt"} & {*args.method, *args.insert}):
        raise UserError(f"--export: a plain checkpoint has no place for {', '.join(odd)}; the delta (--save) holds it")
    if args.export and args.pool == "mean":
        raise UserError("--export: a plain checkpoint can't say that the head reads the mean; the delta (--save) does")
    return args


def cells(args: argparse.Namespace) -> list[argparse.Namespace]:
    """One set of arguments for each run of the sweep; what a method does not read does not multiply it."""
    out = []
    for method in args.method:
        apet, trains = method == "apet" and not args.load, not args.load
        for budget, mask, mask_seed, seed, lr in itertools.product(
            args.budget if apet else [None], args.mask if apet else [None], args.mask_seed if apet else [None],
            args.seed if trains else [None], args.lr if trains and method != "none" else [None],
        ):  # fmt: skip
            if mask == "magnitude" and mask_seed != args.mask_seed[0]:
                continue
            cell = argparse.Namespace(
                **vars(args) | dict(method=method, budget=budget, mask=mask, mask_seed=mask_seed, seed=seed, lr=lr)
            )
            if method != "apet":
                cell.where, cell.insert = None, []
            kept = {
                k: v
                for k, v in sorted(vars(cell).items())
                if k not in ("out", "save", "export", "resume", "device", "eval_batch_size") and (k, v) != ("pool", "cls")
            }
            if not trains:
                kept = {k: v for k, v in kept.items() if k not in ("steps", "eval_every", "batch_size", "grad_accum", "dropout")}
            if args.load:  # another delta under the same name is another cell
                with open(args.load, "rb") as f:
                    kept["load"] = hashlib.sha256(f.read()).hexdigest()
            parts = [args.model, args.task, "loaded" if args.load else method]
            parts += [f"{mask}-{budget}-p{mask_seed}"] if apet else []
            parts += [f"s{seed}"] if trains and method != "none" else []
            parts.append(hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8])
            cell.name = "-".join(re.sub(r"[^\w.-]+", "_", part).strip(".")[-60:] for part in parts)
            cell.label = " ".join(str(x) for x in (cell.method, budget, mask, mask_seed) if x is not None)
            out.append(cell)
    return out


def run_cell(model: nn.Module, facts: dict, coder: Coder, data: Data, args: argparse.Namespace) -> dict:
    """Train and evaluate one cell, write its files, and leave the model as it was. Returns the result."""
    start = time.perf_counter()
    file = os.path.join(args.out, args.name)
    total = sum(p.numel() for p in base_of(model).parameters())
    reset_peak_memory()
    torch.manual_seed(args.seed or 0)
    batches = None
    if args.mask == "gradient":
        rows = [data.train[i] for i in batch_at(0, 8 * args.batch_size, len(data.train), args.mask_seed)]
        batches = [
            functools.partial(
                loss_sum, model, coder, coder.batch([coder.source(e) for e in part], [coder.target(e) for e in part], args.device)
            )
            for part in (rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size))
        ]
    tuned = prepare(model, args, batches)
    try:
        count = sum(p.numel() for n, p in tuned.params.items() if n not in tuned.head)
        head = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base_of(model).parameters())
        lr = auto_lr(args.method, count, facts["family"]) if args.lr == "auto" else args.lr
        record = {}
        if tuned.params and not args.load:
            record = train(model, tuned, coder, data, args, lr, f"{file}.state", f"{facts['revision']} {data.about['revision']}")
        began = time.perf_counter()
        scores = measure(data.metric, predict(model, coder, data, data.report, args.eval_batch_size, args.device), data.report)
        record["eval_s"] = record.get("eval_s", 0.0) + time.perf_counter() - began
        losses = record.get("loss", [])
        every = max(1, math.ceil(len(losses) / 500))
        chunks = [losses[i : i + every] for i in range(0, len(losses), every)]
        with open(__file__, "rb") as f:
            source = hashlib.sha256(f.read()).hexdigest()
        name, score = next(iter(scores.items()))
        result = {
            "score": score,
            "metric": name,
            "metrics": scores,
            "baselines": baselines(data),
            "tuned_params": count,
            "head_params": head,
            "head_trained": any(n in tuned.params for n in tuned.head),
            "total_params": total,
            "density": count / total,
            "lr": lr,
            "best": record.get("best"),
            "loss_curve": [sum(part) / len(part) for part in chunks],
            "loss_every": every,  # steps that an entry of loss_curve is the mean of
            "eval_curve": record.get("eval", []),
            "seconds": {"train": record.get("train_s", 0.0), "eval": record["eval_s"], "all": time.perf_counter() - start},
            "step_ms": 1e3 * record["train_s"] / record["step"] if record.get("step") else None,
            "tokens_per_s": record["tokens"] / record["train_s"] if record.get("train_s") else None,
            "peak_memory_bytes": peak_memory(args.device),
            "labels": list(data.words),
            "data": data.about,
            "model": facts,
            "arguments": {k: v for k, v in vars(args).items() if k not in ("name", "label")},
            "versions": {"python": platform.python_version()} | {m: version(m) for m in ("torch", "transformers", "numpy")},
            "device": machine(args.device),
            "processes": ranks()[1],
            "apet_sha256": source,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }  # fmt: skip
        if ranks()[0] == 0:
            about = {"model": args.model, "task": args.task, "method": args.method, "insert": ",".join(args.insert)}
            about |= {"pool": args.pool} if args.pool != "cls" else {}
            about |= {n: getattr(args, n) for n in DATA_FLAGS if getattr(args, n) is not None}
            if tuned.apet and not args.load:
                result["delta"] = args.save or f"{file}.safetensors"
                tuned.apet.save(result["delta"], tuned.inserted | tuned.head, **about)
            elif tuned.params and not args.load and (args.save or args.method != "full"):
                result["delta"] = args.save or f"{file}.safetensors"
                save_tensors(tuned.head | tuned.params, result["delta"], {"format": "apet 1", **about})
            write_file(f"{file}.json", (json.dumps(result, indent=1) + "\n").encode())
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{file}.state")
            if args.export:
                export(model, coder, args.export)
        return result
    finally:
        tuned.undo()


def export(model: nn.Module, coder: Coder, folder: str) -> None:
    """A plain Hugging Face checkpoint: LoRA is merged into the weights, other inserted weights have no place in one."""
    base = base_of(model)
    inserted = base._modules.pop("inserted", {})
    before = {}
    try:
        if any(method != "lora" for method in inserted):
            raise UserError(f"--export: a plain checkpoint has no place for {', '.join(inserted)}; the delta (--save) holds it")
        for method in inserted.values():
            for name, module in linear_layers(base, QUERY_VALUE, "lora").items():
                part = method.get_submodule(name.replace(".", "_"))
                change = part["B"] @ part["A"] * (LORA_ALPHA / LORA_RANK)
                before[module.weight] = module.weight.detach().clone()
                change = change if isinstance(module, nn.Linear) else change.t()
                with torch.no_grad():
                    module.weight.copy_(module.weight.float() + change)
        try:
            model.save_pretrained(folder)
            coder.tokenizer.save_pretrained(folder)
        except OSError as e:
            raise UserError(f"--export {folder}: {e.strerror}") from None
    finally:
        with torch.no_grad():
            for weight, old in before.items():
                weight.copy_(old)
        if inserted:
            base.inserted = inserted


def table(results: list[tuple[argparse.Namespace, dict]], data: Data) -> str:
    """What a person wants to know, a line a cell."""
    first, base = results[0][1], results[0][1]["baselines"]
    lines = [
        f"\n{results[0][0].model} on {data.task} ({data.about['report']}, {len(data.report):,} examples): {first['metric']}; "
        f"random guess {base['random_guess']:.3f}, majority {base['majority']:.3f}"
    ]
    head = (
        "method",
        "tuned",
        "of all",
        "positions",
        "lr",
        "best step",
        first["metric"],
        "seconds",
        "ms/step",
        "tokens/s",
        "peak MB",
    )
    rows = [head]
    for cell, r in results:
        rows.append(
            (
                "loaded" if cell.load else cell.method,
                f"{r['tuned_params']:,}",
                f"{r['density']:.3%}",
                f"{cell.mask} {cell.mask_seed}" if cell.mask else "",
                f"{r['lr']:.2g}" if r["lr"] else "",
                f"{r['best']['step']}" if r["best"] else "",
                f"{r['score']:.3f}",
                f"{r['seconds']['all']:.1f}",
                f"{r['step_ms']:.1f}" if r["step_ms"] else "",
                f"{r['tokens_per_s']:,.0f}" if r["tokens_per_s"] else "",
                f"{r['peak_memory_bytes'] / 1e6:,.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += [
        "  ".join(x.ljust(w) if i in (0, 3) else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    ]
    cell, last = results[-1]
    lines.append(f"result  {os.path.join(cell.out, cell.name)}.json")
    if "delta" in last:
        lines.append(f"delta   {last['delta']}")
    return "\n".join(lines)


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:  # Linux: the process's own peak starts anew
        f.write("5")


def peak_memory(device: str) -> int:
    """Bytes since `reset_peak_memory`; on a CPU without it (not Linux), since the process began."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", f.read())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: str) -> str:
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()


def say(text: str) -> None:
    if ranks()[0] == 0:
        print(text, file=sys.stderr, flush=True)


def read_done(todo: list[argparse.Namespace], data: Data) -> dict[str, dict]:
    """The results that are there already, by cell; not those of other data or weights under the same name."""
    done, path = {}, find_model(todo[0].model)
    for cell in todo:
        file = os.path.join(cell.out, f"{cell.name}.json")
        if not cell.resume or not os.path.exists(file) or (cell.save and not os.path.exists(cell.save)):
            continue
        try:
            with open(file, encoding="utf-8") as f:
                result = json.load(f)
            made_of, result["score"] = (result["model"]["revision"], result["data"]["revision"]), result["score"] + 0.0
        except (ValueError, KeyError, TypeError, OSError):
            raise UserError(
                f"{file} is no result of apet.py, or a broken one: delete it, or run it anew with --no-resume"
            ) from None
        model = folder_revision(path) if os.path.isdir(path) else made_of[0]
        if made_of == (model, data.about["revision"]):
            done[cell.name] = result
        else:
            say(f"{cell.label}: the data or the model is not that of {file}; it runs anew")
    return done


def check_shared(args: argparse.Namespace, todo: list[argparse.Namespace]) -> None:
    """All processes must see the same results and states: what one skips, the others would wait in for ever."""
    there = [os.path.exists(os.path.join(args.out, f"{cell.name}.{kind}")) for cell in todo for kind in ("json", "state")]
    number = zlib.crc32(repr(there).encode())
    seen = torch.tensor([number, -number], device=args.device)
    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
    if seen[0] != -seen[1]:
        raise UserError(f"the processes do not see the same files in {args.out}: --out must be a folder that all nodes share")


def run(argv: list[str] | None = None) -> None:
    """The whole command. Raises UserError, Interrupted."""
    args = settle(parser().parse_args(argv))
    todo = cells(args)
    if (args.save or args.export) and len(todo) > 1:
        raise UserError(f"--save and --export want one run, not a sweep of {len(todo)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo" if args.device == "cpu" else "nccl")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't make the folder {args.out}: {e.strerror}") from None
    for folder in (args.out, *([os.path.dirname(args.save) or "."] if args.save else ())):
        try:
            tempfile.TemporaryFile(dir=folder).close()  # better known now than after hours of training
        except OSError as e:
            raise UserError(f"can't write in the folder {folder}: {e.strerror}") from None
    if ranks()[1] > 1:
        check_shared(args, todo)
    data = load_task(args)
    done = {} if args.export else read_done(todo, data)
    if len(done) < len(todo):
        say(f"loading {args.model}")
        model, tokenizer, facts = load_model(args, data.words)
        for name, n in data.about.get("rows without text or label, dropped", {}).items():
            say(f"{args.task}: {n:,} rows of {name} have no text or no label (-1 means none) and are left out")
        coder = Coder(tokenizer, facts["family"], args.max_source_length, args.max_target_length)
        for budget in [b for b in args.budget if "apet" in args.method and not args.load]:
            parse_budget(budget, base_of(model))  # a wrong one is known before the first cell has run
        if args.gradient_checkpointing:
            checkpoint(model)
    results, failed = [], []
    for i, cell in enumerate(todo, 1):
        if cell.name not in done:
            if len(todo) > 1:
                say(f"[{i}/{len(todo)}] {cell.label}")
            try:
                done[cell.name] = run_in_memory(model, facts, coder, data, cell, args)
            except UserError as e:
                if len(todo) == 1 or ranks()[1] > 1:  # the other processes may know nothing of it
                    raise
                say(f"[{i}/{len(todo)}] {cell.label} failed: {e}")
                failed.append(cell.label)
                continue
        results.append((cell, done[cell.name]))
    if results and ranks()[0] == 0:
        print(table(results, data))
    if failed:
        raise UserError(f"{len(failed)} of {len(todo)} runs failed, for the reasons above: {', '.join(failed)}")


def run_in_memory(
    model: nn.Module, facts: dict, coder: Coder, data: Data, cell: argparse.Namespace, args: argparse.Namespace
) -> dict:
    """`run_cell`; once GPU memory has run out, again with gradient checkpointing, which then stays on."""
    cell.gradient_checkpointing = args.gradient_checkpointing
    try:
        return run_cell(model, facts, coder, data, cell)
    except torch.OutOfMemoryError:
        if args.gradient_checkpointing:
            raise UserError("out of GPU memory, even with checkpointing: lower --batch-size or raise --grad-accum") from None
        if ranks()[1] > 1:  # the other processes go on, where this one would begin again
            raise UserError("out of GPU memory: add --gradient-checkpointing") from None
    say("out of GPU memory: once more with gradient checkpointing")
    args.gradient_checkpointing = True
    checkpoint(model)
    return run_in_memory(model, facts, coder, data, cell, args)


def checkpoint(model: nn.Module) -> None:
    """Non-reentrant: the reentrant kind gives no gradient when a segment's inputs are frozen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # renamed in transformers 5.23; the old name works in all of 5
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def main(argv: list[str] | None = None) -> int:
    try:
        run(argv)
    except UserError as e:
        print(f"apet: error: {e}", file=sys.stderr)
        return 2
    except Interrupted as e:
        number, step = e.args
        print(f"apet: interrupted after step {step}; the same command continues there", file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
