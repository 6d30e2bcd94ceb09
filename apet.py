#!/usr/bin/env python3
"""APET: tune exactly k scalars of a pretrained model, at any positions (arbitrary parameter-efficient tuning).

After Su et al., "Exploring the Impact of Model Scaling on Parameter-Efficient Tuning", EMNLP 2023.

    python apet.py                                                  offline default: a toy T5, 10,000 scalars, 15 s on a CPU
    python apet.py --model t5-large --task sst2 --budget 1e4        a model and a task of the hub; bf16 on a GPU
    python apet.py --budget 1e2,1e3,1e4 --mask-seed 0,1,2 --method apet,full    a sweep: one process, one JSON a run
    torchrun --nproc_per_node 4 apet.py --model t5-3b --task mnli   data-parallel

From top to bottom: APET - its fast path - positions - save and load - the other methods - tasks - models, batches and scores -
training - the command line. Whoever wants the method alone copies down to "The other methods".
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import json
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

# ----------------------------------------------------------------------------------------------------------------------
# APET: the method
# ----------------------------------------------------------------------------------------------------------------------

Budget = int | float | str | None
Mask = str | Mapping[str, Iterable[int]]
Batches = Iterable[Mapping[str, Tensor] | Callable[[], Tensor]] | None
TUNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # all modules of the models that have an APET
ENGINE = torch.autograd.Variable._execution_engine  # its is_checkpoint_valid(): the running backward pass has no inputs=


class UserError(ValueError, argparse.ArgumentTypeError):
    """Something the person who called can put right; the message is one line that says what is wrong and what is right."""


class APET:
    """Tunes exactly `budget` scalars of `model`, in place: `values` holds them in fp32, `write()` copies them back.

        apet = APET(model, budget=10_000, mask="random", seed=0)
        optimizer = torch.optim.AdamW([apet.values], lr=3e-3, weight_decay=0)
        model(**batch).loss.backward(); optimizer.step(); apet.write(); optimizer.zero_grad()

    The model is frozen but keeps its modules, forward, dtype and device; move it to its device first. Every entry outside
    `positions` stays bit-identical. `values.grad` accumulates over backward passes as any parameter's.
    model, budget, mask, seed, where, batches: see `select_positions`; without a budget, 10,000 scalars or all of an own mask.
    backend: "hook": autograd forms each touched parameter's dense gradient, one at a time; its chosen entries are copied, the rest
        is freed. "gather": of nn.Linear and nn.Embedding only the chosen entries are computed; others by "hook". "auto": the faster
    values: fp32 nn.Parameter of shape (budget,), in the order of `positions`; on the first touched parameter's device.
    positions: {parameter name: sorted int64 flat indices}. Raises ValueError for wrong arguments.
    """

    def __init__(
        self, model: nn.Module, budget: Budget = None, mask: Mask = "random", seed: int = 0, *, where: str = "all",
        backend: str = "auto", batches: Batches = None,
    ):  # fmt: skip
        one_of(backend, ("auto", "hook", "gather"), "backend")
        if not isinstance(model, nn.Module):
            raise UserError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        if isinstance(model, nn.parallel.DistributedDataParallel):  # it would wait for the gradients of what is frozen now
            model.require_backward_grad_sync = False
            model = model.module
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        modules = list(model.modules())
        if not TUNED.isdisjoint(modules):
            raise UserError("this model, or a part of it, has an APET already: remove() that one first")
        budget = 10_000 if budget is None and isinstance(mask, str) else budget
        self.positions = select_positions(model, budget, mask, seed, where, batches)
        self.about = dict(mask=mask if isinstance(mask, str) else "own", seed=str(seed), where=str(where))
        named = dict(model.named_parameters())
        self._weights = [named[name] for name in self.positions]
        if any(w.is_meta for w in self._weights):
            raise UserError("the model is on the meta device (or offloaded): load its weights before tuning them")
        self._indices = [index.to(w.device) for w, index in zip(self._weights, self.positions.values(), strict=True)]
        self._pretrained = [w.detach().take(index) for w, index in zip(self._weights, self._indices, strict=True)]
        self._sizes = [len(index) for index in self._indices]
        self.values = nn.Parameter(torch.cat([p.to(self._weights[0].device, torch.float32) for p in self._pretrained]))
        self._passes: dict[int, dict] = {}  # of each running backward pass: {number of the tensor: gradient of its entries}
        self._attached, self._smallest = False, min(self._weights, key=Tensor.numel)
        self._sentinel: Tensor | None = None  # zeros in _smallest.grad: model.zero_grad(), which can't see values, takes them
        self._sum_rest: Callable[[dict], None] = lambda grads: None  # what the fast path has put off to the end of a pass
        self._undo = contextlib.ExitStack()  # what is done to the model from here on, remove() undoes in reverse
        TUNED.update(modules)
        self._undo.callback(TUNED.difference_update, modules)
        for p in named.values():
            self._undo.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
            p.grad = None
        for number, (weight, index) in enumerate(zip(self._weights, self._indices, strict=True)):
            weight.requires_grad_(True)
            self._undo.callback(weight.register_post_accumulate_grad_hook(functools.partial(self._take, number, index)).remove)
        self._owner = model.get_submodule(next(iter(self.positions)).rpartition(".")[0])
        self._in_group = "WORLD_SIZE" in os.environ or (torch.distributed.is_available() and torch.distributed.is_initialized())
        if self._in_group:  # DDP around the model shall wait for one parameter, which takes the hook path, and see no other
            everything = model.named_parameters(remove_duplicate=False)
            model._ddp_params_and_buffers_to_ignore = [name for name, p in everything if p is not self._smallest]
            self._undo.callback(delattr, model, "_ddp_params_and_buffers_to_ignore")
        add_fast_path(self, model, backend)

    def _take(self, number: int, index: Tensor | None, weight: Tensor) -> None:
        """Autograd has formed a weight's dense gradient: gather the chosen entries (None: all), and drop it."""
        if (grad := weight.grad) is not None and ENGINE.is_checkpoint_valid():  # None where a compiled model calls the hook
            grad = grad.to_dense() if grad.is_sparse else grad
            add_part(self._running_pass(), number, grad if index is None else grad.take(index))
            weight.grad = self._sentinel.zero_() if weight is self._smallest and self._sentinel is not None else None

    def _running_pass(self) -> dict:
        """What the running backward pass has brought so far; `_finish` adds it to values.grad when the pass ends."""
        task = torch._C._current_graph_task_id()
        if task not in self._passes:
            if self._sentinel is not None and self._smallest.grad is not self._sentinel:
                self.values.grad = self._sentinel = None
            self._passes.setdefault(task, {})  # autograd runs a thread for each device: the first one's
            ENGINE.queue_callback(functools.partial(self._finish, task))
        return self._passes[task]

    @torch.no_grad()
    def _finish(self, task: int) -> None:
        if (grads := self._passes.pop(task, None)) is None:  # another thread has finished this pass
            return
        self._sum_rest(grads)
        zero, dist = torch.zeros((), device=self.values.device), torch.distributed
        parts = [grads[i].to(zero.device) if i in grads else zero.expand(n) for i, n in enumerate(self._sizes)]
        grad, new = self.values.grad, torch.cat(parts).float()
        grad = self.values.grad = new if grad is None else grad.add_(new)
        if self._attached and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(grad)  # what earlier passes left is equal on all processes: the mean keeps it
            grad /= dist.get_world_size()
        if self._attached:
            self._smallest.grad = self._sentinel = torch.zeros_like(self._smallest)

    @torch.no_grad()
    def write(self) -> None:
        """values -> the model's weights, in their dtype. Call it after each optimizer step, or `attach` the optimizer."""
        if not any(p is self._weights[0] for p in self._owner._parameters.values()):  # the first stands for all
            raise UserError("the model's parameters were replaced (by FSDP, or by loading with assign=True)")
        self._passes.clear()  # of a backward pass that failed
        kinds = [(w.device, w.dtype) for w in self._weights]
        cast = {kind: self.values.to(*kind).split(self._sizes) for kind in set(kinds)}  # once for each, not for each tensor
        write_entries(self._weights, self._indices, [cast[kind][number] for number, kind in enumerate(kinds)])

    @torch.no_grad()
    def read(self) -> None:
        """The model's weights -> values: after a checkpoint was loaded into the model."""
        self.values.copy_(torch.cat([w.take(index).to(self.values) for w, index in zip(self._weights, self._indices, strict=True)]))

    @torch.no_grad()
    def restore(self) -> None:
        """The pretrained numbers -> the model's weights, bit for bit. `values` stays, so write() brings it back."""
        write_entries(self._weights, self._indices, [p.to(w.dtype) for p, w in zip(self._pretrained, self._weights, strict=True)])

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """After each optimizer.step(): write() and values.grad = None; under a process group, after each backward pass its mean."""

        def after_step(*_: object) -> None:
            self.write()
            self.values.grad = self._smallest.grad = self._sentinel = None

        optimizer = getattr(optimizer, "optimizer", optimizer)  # in accelerate's wrapper
        if not any(p is self.values for group in optimizer.param_groups for p in group["params"]):
            raise UserError("this optimizer does not hold apet.values: make it with [apet.values]")
        self._attached = True
        self._undo.callback(setattr, self._smallest, "grad", None)
        self._undo.callback(optimizer.register_step_post_hook(after_step).remove)

    def remove(self) -> None:
        """Leave the model as it was, but for its weights, which stay as they are; nothing of APET stays alive in it."""
        self._undo.close()

    def save(self, file: str | os.PathLike, more: Mapping[str, Tensor] | None = None, **about: str | list) -> None:
        """Write positions and values, 8 bytes a scalar: see `save_delta`."""
        save_delta(self, file, more or {}, about)

    @classmethod
    def load(cls, model: nn.Module, file: str | os.PathLike, *, backend: str = "auto") -> APET:
        """The APET that `save` wrote, its values written into `model`. ValueError if the file is for another model."""
        return load_delta(model, file, backend)


def add_part(grads: dict, number: int, part: Tensor) -> None:
    grads[number] = grads[number] + part if number in grads else part  # a tied or repeated layer brings several


def write_entries(weights: list[nn.Parameter], indices: list[Tensor], numbers: Iterable[Tensor]) -> None:
    """Of each weight, in place: weight.flatten()[index] = numbers."""
    deterministic = torch.are_deterministic_algorithms_enabled()  # put_ is not, on a GPU
    for weight, index, part in zip(weights, indices, numbers, strict=True):
        if deterministic:
            weight.copy_(weight.flatten().index_copy_(0, index, part).view_as(weight))
        else:
            weight.put_(index, part)


# ----------------------------------------------------------------------------------------------------------------------
# The fast path: without it, and the call of add_fast_path, APET gives the same numbers
# ----------------------------------------------------------------------------------------------------------------------
# Of a linear layer y = x Wᵀ + b, autograd's backward gets dy and forms dL/dW = dyᵀ x, as large as W. We want a few entries of it:
#
#     dL/dW[i, j] = Σ over tokens t of dy[t, i] · x[t, j]        at the chosen (i, j)
#
# So forward keeps the chosen columns of x, backward takes the chosen columns of dy, and no dense gradient is formed. The
# layer's class is changed for one whose forward does so; wherever else its weight may be used, APET._take does its work.

# The cost of a linear layer's gradient, in multiply-adds for each token; the dense product's is rows x columns. entry: one of the
# sum above; dot: the same where rows and columns are laid out first, at `line` for each; call: host time beyond the hook path's.
# CPU: measured by tests/bench.py --paths. CUDA: arithmetic, not measured yet: an H100 at 4,096 tokens makes 70,000 multiply-adds
# for each token in a microsecond (bf16), a layer's host time is 20 microseconds longer (bench.py --host), an entry costs two cache
# lines for each token.
COST = {
    "cpu": dict(entry=80, dot=4, line=100, call=4_000),
    "cuda": dict(entry=2_000, dot=math.inf, line=500, call=1_400_000),
}
FEW = 2048  # entries that are summed at a time: tokens x entries numbers are a layer's largest temporary
PUT_OFF = {"cpu": 1 << 20, "cuda": 1 << 24}  # numbers that wait for their sum: bounds the memory


class Entries(NamedTuple):
    """The k chosen entries of one layer's weight. Indices are int64, on the weight's device."""

    apet: APET
    weight: nn.Parameter
    number: int  # of the tensor among those that are tuned
    row: Tensor  # (k,)
    column: Tensor | None  # (k,): its place in what forward keeps; None: one column for each entry
    keep: Tensor | None = None  # the columns of x that forward keeps; None: x itself
    sampled: bool = False  # whether the sums are sampled dot products
    link: Tensor | None = None  # a zero that requires a gradient, so that the layer's output does
    piece: Tensor | None = None  # (k,) zeros, of which compiled models return the gradient


def running_pass(e: Entries) -> dict | None:
    """Where the running backward pass brings its gradients; None if it asks for those of inputs alone."""
    if torch.is_grad_enabled():
        raise UserError('the fast path has no second derivatives (create_graph=True): make the APET with backend="hook"')
    return e.apet._running_pass() if ENGINE.is_checkpoint_valid() else None


def add_linear(e: Entries, dy: Tensor, x: Tensor) -> None:
    """dy: (..., rows), x: (..., columns kept). Small sums wait in the pass's dict, and are made together: fewer calls."""
    if (grads := running_pass(e)) is None:
        return
    if e.sampled:
        add_part(grads, e.number, sampled_sums(e, dy, x))
    elif len(e.row) > FEW:  # a part of the entries at a time
        column = torch.arange(len(e.row), device=dy.device) if e.column is None else e.column
        parts = zip(e.row.split(FEW), column.split(FEW), strict=True)
        add_part(grads, e.number, torch.cat([sum_products(columns(dy, r), columns(x, c)) for r, c in parts]))
    else:
        key = dy.device, dy.shape[:-1], dy.dtype
        waiting = grads.setdefault(key, [0])  # how many numbers wait, then what they are
        waiting.append((e.number, columns(dy, e.row), x if e.column is None else columns(x, e.column)))
        waiting[0] += waiting[-1][1].numel()
        if waiting[0] > PUT_OFF["cpu" if dy.is_cpu else "cuda"]:
            sum_waiting(grads, [key])


def sum_waiting(grads: dict, keys: list[tuple] | None = None) -> None:
    for key in [key for key in grads if isinstance(key, tuple)] if keys is None else keys:
        numbers, dys, xs = zip(*grads.pop(key)[1:], strict=True)
        sums = sum_products(torch.cat(dys, -1), torch.cat(xs, -1)).split([dy.shape[-1] for dy in dys])
        for number, part in zip(numbers, sums, strict=True):
            add_part(grads, number, part)


def add_embedding(e: Entries, ids: Tensor, padding: int | None, dy: Tensor) -> None:
    """The output's gradient dy (..., columns), summed over equal ids, at the chosen entries."""
    if (grads := running_pass(e)) is None:
        return
    dy, ordered = dy.reshape(len(ids), dy.shape[-1]), ids.sort().values
    sums = torch.zeros(len(ids) + 1, dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    sums.index_add_(0, torch.searchsorted(ordered, ids), dy.to(sums.dtype))  # row: where the first of equal ids is
    place = torch.searchsorted(ordered, e.row.to(ids.dtype))
    found = (pad(ordered, (0, 1), value=-1)[place] == e.row) & (e.row != (-1 if padding is None else padding))
    add_part(grads, e.number, sums[place, e.column].where(found, 0))


def sampled_sums(e: Entries, dy: Tensor, x: Tensor) -> Tensor:
    """(..., rows), (..., columns kept) -> (k,): for many entries, rows and columns are laid out first."""
    dy, x, tables = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), e.apet._tables
    if e.number not in tables:
        ends, zeros = pad(e.row.bincount(minlength=dy.shape[1]).cumsum(0), (1, 0)), torch.zeros(len(e.row), device=dy.device)
        with warnings.catch_warnings(action="ignore"):  # "sparse CSR support is in beta"; the one function used here is tested
            tables[e.number] = torch.sparse_csr_tensor(ends, e.column, zeros, size=(dy.shape[1], x.shape[1]))
    return torch.sparse.sampled_addmm(tables[e.number], dy.t().float(), x.t().contiguous().t().float(), beta=0.0).values()


class LinearEntries(torch.autograd.Function):
    """y = x Wᵀ + b; in backward dx, db, and of dW the chosen entries."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, link: Tensor, entries: Entries) -> Tensor:
        weight, keep = entries.weight, entries.keep
        y = linear(x, weight, bias)
        if x.dtype is not y.dtype:  # under autocast
            x = x.to(y.dtype)
        ctx.entries = entries
        ctx.save_for_backward(weight, x if keep is None else columns(x, keep))
        return y if bias is None else y.detach()  # as it may be a view, which an activation in place could not follow

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        e, needs = ctx.entries, ctx.needs_input_grad
        weight, kept = ctx.saved_tensors
        dx = dy @ (weight if weight.dtype is dy.dtype else weight.to(dy.dtype)) if needs[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if needs[1] else None
        if torch.compiler.is_compiling():
            return dx, db, sum_products(columns(dy, e.row), kept if e.column is None else columns(kept, e.column)), None
        add_linear(e, dy, kept)
        return dx, db, None, None


apply_linear = super(torch.autograd.Function, LinearEntries).apply  # without the Python around it, which serves torch.func


class TunedLinear(nn.Linear):
    """An nn.Linear with tuned entries."""

    def forward(self, input: Tensor) -> Tensor:
        if (e := entries_of(self)) is None:
            return linear(input, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return LinearEntries.apply(input, self.bias, e.piece, e)
        return apply_linear(input, self.bias, e.link, e)

    def __reduce_ex__(self, protocol: int) -> tuple:  # copies are plain layers, by deepcopy and by pickle
        return object.__new__, type(self).__bases__, {name: value for name, value in vars(self).items() if name != "tuned"}


class TunedEmbedding(nn.Embedding):
    """An nn.Embedding with tuned entries; in a compiled model, by the hook path."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or (e := entries_of(self)) is None:
            return embedding(input, self.weight, self.padding_idx, sparse=self.sparse)
        y = embedding(input, self.weight.detach()) + e.link
        ids = input.flatten().clone()  # autograd would notice a change in place, a hook does not
        y.register_hook(functools.partial(add_embedding, e, ids, self.padding_idx))
        return y

    __reduce_ex__ = TunedLinear.__reduce_ex__


def entries_of(layer: nn.Module) -> Entries | None:
    """None where its weight is another's (functional_call, DataParallel), without gradients, and under torch.func."""
    e = getattr(layer, "tuned", None)
    off = e is None or layer._parameters.get("weight") is not e.weight or not torch.is_grad_enabled()
    return None if off or torch._C._are_functorch_transforms_active() else e


def columns(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index]. On a CPU, gather runs on all cores; index_select runs on one, but starts faster."""
    if x.is_cpu and index.numel() > 31:
        return x.gather(-1, index.expand(*x.shape[:-1], -1))
    return x.index_select(-1, index)


def sum_products(dy: Tensor, x: Tensor) -> Tensor:
    """(..., k), (..., k) -> (k,): the sum over tokens, in fp32 or wider. Changes dy."""
    dy = dy.float() if dy.element_size() < 4 else dy
    return dy.mul_(x).reshape(-1, dy.shape[-1]).sum(0)


def set_class(layer: nn.Module, kind: type[nn.Module], entries: Entries | None = None) -> None:
    layer.__class__ = kind
    if entries is None:
        del layer.tuned
    else:
        layer.tuned = entries
    if "_old_forward" in vars(layer):  # accelerate has wrapped it
        layer._old_forward = kind.forward.__get__(layer)


def add_fast_path(apet: APET, model: nn.Module, backend: str) -> None:
    """Change the class of the tuned nn.Linear and nn.Embedding layers; "auto": of those where it is cheaper."""
    layers: dict[int, list[nn.Module]] = {}  # of each weight, those whose own forward can be replaced
    for m in model.modules():
        plain = "forward" not in vars(m) or hasattr(m, "_hf_hook")  # accelerate wraps forward, and calls the old one
        if plain and (type(m) is nn.Linear or (type(m) is nn.Embedding and m.max_norm is None and not m.scale_grad_by_freq)):
            layers.setdefault(id(m.weight), []).append(m)
    links = {w.device: torch.zeros((), device=w.device, requires_grad=True) for w in apet._weights}
    apet._sum_rest, apet._tables = sum_waiting, {}  # number of the tensor: sparse zeros (rows, columns kept), for sampled sums
    for number, (weight, index) in enumerate(zip(apet._weights, apet._indices, strict=True)):
        if id(weight) not in layers or backend == "hook" or (apet._in_group and weight is apet._smallest):
            continue
        piece = weight.new_zeros((), dtype=torch.float32).expand(len(index)).requires_grad_()
        e = Entries(apet, weight, number, index, None, link=links[weight.device], piece=piece)
        made = [choose_entries(m, e) for m in layers[id(weight)]]
        if backend == "gather" or any(cheaper for _, cheaper in made):
            piece.register_post_accumulate_grad_hook(functools.partial(apet._take, number, None))
            for m, (entries, _) in zip(layers[id(weight)], made, strict=True):
                apet._undo.callback(set_class, m, type(m))
                set_class(m, TunedLinear if type(m) is nn.Linear else TunedEmbedding, entries)


def choose_entries(layer: nn.Module, e: Entries) -> tuple[Entries, bool]:
    """`e`, whose rows are flat indices so far, made whole; and whether it is cheaper than the hook path: see COST."""
    (height, width), k = e.weight.shape, len(e.row)
    e = e._replace(row=e.row // width, column=e.row % width)
    if type(layer) is nn.Embedding:  # its dense gradient costs its own size
        return e, height >= 512 and k < e.weight.numel() // 4
    cost = COST["cpu" if e.weight.is_cpu else "cuda"]
    keep, place = e.column.unique(return_inverse=True)
    one_by_one, sampled = cost["entry"] * k, cost["dot"] * k + cost["line"] * (height + len(keep))
    cheaper = min(one_by_one, sampled) + cost["line"] * len(keep) + cost["call"] < e.weight.numel()
    if len(keep) < 0.9 * width:  # else x itself, without a copy
        e = e._replace(column=place, keep=keep)
    if sampled < one_by_one and e.weight.dtype != torch.float64:
        return e._replace(sampled=True), cheaper
    if e.keep is not None and k < min(1.2 * len(keep), len(keep) + 16):  # few columns twice: no second selection in backward
        e = e._replace(column=None, keep=keep[place])
    return e, cheaper


# ----------------------------------------------------------------------------------------------------------------------
# Positions: where the tuned scalars are
# ----------------------------------------------------------------------------------------------------------------------

MASKS = ("random", "row", "column", "block", "tensor", "magnitude", "gradient")
COUNTED = ("lora", "adapter", "prompt", "bitfit")  # methods whose size is a budget
BLOCK = 16  # side of a tile of mask "block"
ATTENTION = r"attention|attn|query_key_value|[./][qkvo](_proj|_lin)?\.|[./]out_proj\."
MLP = r"mlp|ffn|feed_?forward|dense\w*dense|experts|intermediate|(?<!attention\.)output\.dense|[./](fc_?\w*|w[io](_\d)?)\."
WHERE = {  # patterns of "classes of the modules that hold it/name", in lower case
    "all": "",
    "attention": rf"^(?![^/]*norm)[^/]*(?=/).*?({ATTENTION})",
    "mlp": rf"^(?![^/]*norm)[^/]*(?=/).*?({MLP})",
    "embedding": rf"^(?![^/]*norm)(?![^/]*(?=/).*?({ATTENTION})).*embed",
    "norm": r"^[^/]*norm",
    "bias": r"[/._]bias$",
    "encoder": r"[/.]encoder\.",
    "decoder": r"[/.]decoder\.",
}


def select_positions(
    model: nn.Module, budget: Budget, mask: Mask = "random", seed: int = 0, where: str = "all", batches: Batches = None
) -> dict[str, Tensor]:
    """Choose exactly `budget` scalars of `model`: {parameter name: sorted int64 flat (row-major) indices, on the CPU}.

    Names and order are those of `model.named_parameters()`: a shared (tied) parameter counts once, by identity. The choice depends
    on the model's shapes and the arguments ("magnitude", "gradient": on weights, too), on no machine or device. Memory is
    O(budget), but for "magnitude" (copies of one tensor) and "gradient" (gradients and squares of all). Raises ValueError.

    budget: a number of scalars; "1e4", "10_000"; "0.1%" of all the model's scalars, whatever `where` says; or "lora", "adapter",
        "prompt", "bitfit": as many as that method trains on this model.
    mask: "random" scalars; whole "row"s, "column"s or 16 x 16 "block"s in random order, the last one cut to the exact count (a
        matrix is (shape[0], rest); a vector is one row and one column); whole "tensor"s in random order as long as they fit, the
        next one cut; the largest by "magnitude" |w|, or by squared "gradient" summed over `batches` (equal scores: the first);
        or the caller's own {name: flat indices}, when `budget` may be None.
    where: one of WHERE, "layers:0-3", or a regular expression searched for in the parameter names.
    batches: for "gradient": keyword arguments of the model, labels included, or functions that return a loss.
    """
    if isinstance(mask, Mapping):
        return _own_positions(model, budget, mask)
    one_of(mask, MASKS, "mask")
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"the position seed must be a whole number from 0 on, not {seed!r}")
    names, tensors = zip(*candidates(model, where).items(), strict=True)
    sizes = np.array([p.numel() for p in tensors])
    k, ends = parse_budget(budget, model), np.cumsum(sizes)
    if k > ends[-1]:
        raise UserError(f"a budget of {k:,} is above the {ends[-1]:,} scalars of where={where!r}")
    bits = np.random.PCG64(np.random.SeedSequence(int(seed)))  # numpy keeps this raw stream fixed over its versions
    if mask == "random":
        flat = _draw(int(ends[-1]), k, bits)
        parts = np.split(flat, np.searchsorted(flat, ends[:-1]))
        indices = [part - (end - size) for part, end, size in zip(parts, ends, sizes, strict=True)]
    elif mask == "tensor":  # as the authors' code does: those that still fit; then, for the exact count, part of the next
        order, taken = np.argsort(bits.random_raw(len(sizes)), kind="stable"), np.zeros(len(sizes), int)
        for i in order:
            taken[i] = sizes[i] if sizes[i] <= k - taken.sum() else 0
        for i in order:
            taken[i] = taken[i] or min(sizes[i], k - taken.sum())
        indices = [np.arange(t) for t in taken]
    elif mask in ("magnitude", "gradient"):
        indices = _largest(tensors if mask == "magnitude" else _squared_gradients(model, tensors, batches), k)
    else:
        indices = _draw_units(mask, tensors, k, bits)
    return {n: torch.from_numpy(np.ascontiguousarray(i)) for n, i in zip(names, indices, strict=True) if len(i)}


def one_of(word: object, known: Iterable[str], what: str) -> str:
    """`word` if it is known; else a UserError that names the closest."""
    known = list(known)
    if isinstance(word, str) and word in known:
        return word
    close = difflib.get_close_matches(str(word)[:100], known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "one of " + ", ".join(known[:30]) + ", ..." * (len(known) > 30)
    raise UserError(f"unknown {what} {repr(word)[:100]}: {hint}")


def candidates(model: nn.Module, where: str = "all") -> dict[str, nn.Parameter]:
    """The floating-point parameters that `where` names, in the model's order, a tied one once."""
    params = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    if any(hasattr(p, kind) for p in params.values() for kind in ("device_mesh", "ds_id", "_is_flat_param")):
        raise UserError("the model is sharded (FSDP, DeepSpeed): APET needs whole weights; use data parallel or a device map")
    owners: dict[int, str] = {}  # the classes of the modules that hold it
    for m in model.modules():
        for p in m._parameters.values():
            owners[id(p)] = owners.get(id(p), "") + type(m).__name__.lower()
    layers = re.fullmatch(r"layers:(\d{1,9})(?:-(\d{1,9}))?", str(where))
    try:
        if isinstance(where, str) and where in WHERE:
            found = [n for n, p in params.items() if re.search(WHERE[where], f"{owners[id(p)]}/{n}".lower())]
        elif layers:
            numbers = {n: re.search(r"(?:^|\.)(?:blocks?|layers?|h)\.(\d+)\.", n) for n in params}
            found = [n for n, i in numbers.items() if i and int(layers[1]) <= int(i[1]) <= int(layers[2] or layers[1])]
        else:
            found = [n for n in params if re.search(where, n)] if where != "" else []
    except (re.error, TypeError, ValueError, OverflowError, RecursionError, MemoryError) as e:
        known = ", ".join(WHERE)
        raise UserError(f"where={repr(where)[:60]} is no regular expression ({str(e)[:60]}), nor {known} or layers:0-3") from None
    if not found:
        some = ", ".join(list(params)[:: max(1, len(params) // 8)])
        raise UserError(f"where={repr(where)[:60]} names no parameter: use {', '.join(WHERE)} or a part of a name such as {some}")
    return {n: params[n] for n in found}


def parse_count(text: Budget, what: str) -> int:
    """A whole number from 1 to 1e15, also as "1e4" or "10_000"."""
    try:
        number = float("" if text is None or isinstance(text, bool) else text)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{what} must be a number such as 10000, 1e4 or 10_000, not {repr(text)[:60]}") from None
    if not 1 <= number <= 1e15 or number != int(number):
        raise UserError(f"{what} must be a whole number from 1 on, not {repr(text)[:60]}")
    return int(number)


def parse_budget(budget: Budget, model: nn.Module) -> int:
    """The number of scalars that `budget` means on this model (see `select_positions`)."""
    total, text = sum(p.numel() for p in candidates(model).values()), str(budget).strip().lower()
    if text in COUNTED:
        if "method_parameters" not in globals():
            raise UserError(f"a budget of {text!r} needs the whole of apet.py, where that method is")
        return method_parameters(model, text)
    if text.endswith("%"):
        share = float(text[:-1]) if re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?%", text) else 0
        if not 0 < share <= 100:
            raise UserError(f"the budget {text[:60]!r} must be above 0% and at most 100%")
        return parse_count(round(share * total / 100), f"the budget {text[:60]} of {total:,} scalars")
    k = parse_count(budget, f"the budget (a share such as 0.1% or a method, {', '.join(COUNTED)}, will do, too)")
    if k > total:
        raise UserError(f"a budget of {k:,} is above the {total:,} scalars of this model")
    return k


def _draw(n: int, k: int, bits: np.random.PCG64) -> np.ndarray:
    """`k` of range(n), sorted, each subset equally likely (the modulus is off by n / 2**64)."""

    def draw(count: int) -> np.ndarray:
        return (bits.random_raw(count) % np.uint64(n)).view(np.int64)

    # What was drawn before is drawn again; never more than k, so nothing has to be thrown away.
    if 32 * k > n:  # many: a mark for each is faster than sorting
        few = 2 * k > n  # are left out: draw those
        marks = np.zeros(n, dtype=bool)
        while missing := (n - k if few else k) - np.count_nonzero(marks):
            marks[draw(missing)] = True
        return np.flatnonzero(marks != few)
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < k:
        drawn = np.unique(np.concatenate([drawn, draw(k - len(drawn))]))
    return drawn


def _draw_units(mask: str, tensors: Iterable[Tensor], k: int, bits: np.random.PCG64) -> list[np.ndarray]:
    """Sorted flat indices for each tensor: whole rows, columns or blocks in random order, k scalars in all."""
    grid = []  # of each tensor: rows, columns, rows of a unit, columns of a unit
    for t in tensors:
        vector = (t.numel(), 1) if mask == "column" else (1, t.numel())
        r, c = (t.shape[0], t.numel() // t.shape[0]) if t.ndim > 1 else vector
        grid.append((r, c, *{"row": (1, c), "column": (r, 1), "block": (BLOCK, BLOCK)}[mask]))
    R, C, h, w = np.array(grid, dtype=np.int64).T
    across, down = -(-C // w), -(-R // h)
    ends, out = np.cumsum(down * across), [[np.empty(0, np.int64)] for _ in grid]
    units = _draw(int(ends[-1]), min(k, int(ends[-1])), bits)  # k are enough: each holds a scalar
    for unit in units[np.argsort(bits.random_raw(len(units)), kind="stable")]:
        t = np.searchsorted(ends, unit, side="right")
        i, j = divmod(unit - (ends[t] - down[t] * across[t]), across[t])
        rows, cols = np.arange(i * h[t], min((i + 1) * h[t], R[t])), np.arange(j * w[t], min((j + 1) * w[t], C[t]))
        out[t].append((rows[:, None] * C[t] + cols).ravel()[:k])
        k -= len(out[t][-1])
        if not k:
            break
    return [np.sort(np.concatenate(o)) for o in out]


def _largest(tensors: Iterable[Tensor], k: int) -> list[np.ndarray]:
    """Flat indices of the k entries of largest magnitude over all tensors; of equal ones the first in order."""
    if any(t.is_meta for t in tensors):
        raise UserError("this mask reads the weights, and the model is on the meta device: load it first")

    def scores(t: Tensor) -> Tensor:
        return t.detach().abs().flatten().to(torch.promote_types(t.dtype, torch.float32))

    top, out = torch.empty(0), []
    for t in tensors:
        top = torch.cat([top, scores(t).topk(min(k, t.numel())).values.cpu()])
        top = top.topk(min(k, len(top))).values
    if top.isnan().any():
        raise UserError("this mask finds weights or gradients that are not a number (NaN)")
    last, ties = top[-1].item(), int((top == top[-1]).sum())
    for s in map(scores, tensors):
        equal = s == last
        out.append(((s > last) | (equal & (equal.cumsum(0) <= ties))).nonzero().flatten().cpu().numpy())
        ties -= min(ties, int(equal.sum()))
    return out


def _squared_gradients(model: nn.Module, params: Iterable[nn.Parameter], batches: Batches) -> list[Tensor]:
    """Sum over the batches of each entry's squared gradient, fp32 (the empirical Fisher information of FISH masks)."""
    batches = list(batches) if isinstance(batches, Iterable) and not isinstance(batches, (str, Mapping, Tensor)) else []
    if not batches or not all(callable(b) or isinstance(b, Mapping) for b in batches):
        raise UserError('mask="gradient" needs batches=[...]: a few keyword arguments of the model, labels included')
    if model in TUNED:  # autograd forms no gradients of its weights
        raise UserError('mask="gradient" wants the plain model: remove() its APET first')
    sums, frozen = [torch.zeros_like(p, dtype=torch.float32) for p in params], [p for p in params if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        for batch in batches:
            if (loss := batch() if callable(batch) else model(**batch).loss) is None:
                raise UserError('mask="gradient": a batch gives no loss; it must hold labels')
            for total, grad in zip(sums, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
                if grad is not None:
                    total += grad.float().square()
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return sums


def _own_positions(model: nn.Module, budget: Budget, mask: Mapping) -> dict[str, Tensor]:
    """The caller's {name: flat indices}, checked, sorted and in the model's order."""
    params, out = candidates(model), {}
    for name in sorted(mask, key=lambda name: list(params).index(one_of(name, params, "parameter"))):
        own, size = mask[name], params[name].numel()
        try:
            index = np.sort(own.cpu() if isinstance(own, Tensor) else own if isinstance(own, np.ndarray) else list(own))
            whole = index.ndim == 1 and (index.dtype.kind in "iu" or not index.size)
            if not whole or (index.size and not (index[0] >= 0 and index[-1] < size and np.diff(index).all())):
                raise ValueError
            out |= {name: torch.from_numpy(index.astype(np.int64))} if index.size else {}
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"the positions of {name} must be a flat list of different whole numbers, 0 to {size - 1:,}") from None
    k = sum(map(len, out.values()))
    if not k:
        raise UserError("the positions are empty: name at least one scalar")
    if budget is not None and parse_budget(budget, model) != k:
        raise UserError(f"a budget of {budget} does not agree with the {k:,} positions given (it may be left None)")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Save and load
# ----------------------------------------------------------------------------------------------------------------------


def save_delta(apet: APET, file: str | os.PathLike, more: Mapping[str, Tensor], about: Mapping[str, str | list]) -> None:
    """Write positions and values as safetensors: 8 bytes a scalar (12 if a tensor has 2**31 entries or more).

    `values` float32 (budget,); `indices` int32 or int64 (budget,), flat in each parameter; `more` tensors under their names;
    about: mask, seed, where, what was given, and `layout`: a list of [name, shape, number of positions].
    """
    if not apet.values.isfinite().all():
        raise UserError("values are not finite: the training has diverged, and there is nothing to save")
    layout = [[n, list(w.shape), len(i)] for (n, i), w in zip(apet.positions.items(), apet._weights, strict=True)]
    wide = max(w.numel() for w in apet._weights) > 2**31 - 1
    indices = torch.cat(list(apet.positions.values())).to(torch.int64 if wide else torch.int32)
    about = {**apet.about, **about, "format": "apet 2", "layout": layout}
    save_tensors({**more, "values": apet.values, "indices": indices}, file, about)


def load_delta(model: nn.Module, file: str | os.PathLike, backend: str = "auto") -> APET:
    """The APET whose delta `file` holds, its values written into `model`. UserError for a broken or foreign file."""
    tensors, about = load_tensors(file)
    try:
        values, indices, layout = tensors["values"], tensors["indices"], about["layout"]
        shapes, counts = {str(n): tuple(shape) for n, shape, _ in layout}, [count for _, _, count in layout]
        if (values.dtype, about["format"]) != (torch.float32, "apet 2") or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError
        if not values.shape == indices.shape == (sum(counts),) or len(shapes) < len(counts) or not values.isfinite().all():
            raise ValueError
        parts = dict(zip(shapes, indices.long().split(counts), strict=True))
    except (KeyError, ValueError, TypeError, RecursionError, OverflowError, RuntimeError):
        raise UserError(f"{file} is no delta of APET (or a broken one)") from None
    own = {name: tuple(p.shape) for name, p in candidates(model).items()}
    for name, shape in shapes.items():
        if own.get(name) != shape:
            here = f"{own[name]} here" if name in own else "not in this one"
            raise UserError(f"{file} was made for another model: {name[:100]!r} is {shape} there and {here}")
    apet = APET(model, None, mask=parts, backend=backend)
    if list(apet.positions) != list(parts) or any(not torch.equal(apet.positions[n], i) for n, i in parts.items()):
        apet.remove()
        raise UserError(f"{file} was made for another model: its parameters come in another order")
    apet.about = {key: about.get(key, "") for key in apet.about}
    with torch.no_grad():
        apet.values.copy_(values)
    apet.write()
    return apet


def save_tensors(tensors: Mapping[str, Tensor], file: str | os.PathLike, about: Mapping[str, str | list]) -> None:
    """Write a safetensors file; the same numbers and texts give the same bytes: `about` is one entry of its metadata, as JSON."""
    from safetensors.torch import save_file

    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    texts = json.dumps({key: text if isinstance(text, list) else str(text) for key, text in about.items()}, sort_keys=True)
    write_file(file, lambda temporary: save_file(copies, temporary, {"apet": texts}))


def load_tensors(file: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str | list]]:
    """Tensors and texts that `save_tensors` wrote; a UserError for any other file."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(file):
        raise UserError(f"there is no file {file}")
    try:
        with safe_open(file, framework="pt") as f:
            about = dict(json.loads((f.metadata() or {}).get("apet", "{}")))
            return {name: f.get_tensor(name) for name in f.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as e:
        raise UserError(f"{file} is not a safetensors file: {str(e)[:200]}") from None


def write_file(file: str | os.PathLike, write: Callable[[str], object]) -> None:
    """`write` a temporary file in the same folder, then rename it: whoever reads sees all of it or nothing."""
    temporary = f"{os.path.abspath(file)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:  # a folder that can't be written to is known at once
            mode = os.fstat(f.fileno()).st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors has replaced the file by one that the owner alone may read
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except Exception as e:  # of the system, safetensors and torch.save, which share no class
        raise UserError(f"can't write {file}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


# ----------------------------------------------------------------------------------------------------------------------
# The other methods of the paper
# ----------------------------------------------------------------------------------------------------------------------

import csv
import hashlib
import inspect
import itertools
import platform
import random
import string
import sys
import time
import zipfile
from collections import Counter, namedtuple
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

METHODS = ("apet", "full", *COUNTED, "none")
LORA_RANK, LORA_ALPHA, ADAPTER_WIDTH, PROMPT_TOKENS = 8, 16, 24, 100  # the authors'
FAMILIES = "T5, BART, BERT, RoBERTa, ELECTRA, ALBERT, DeBERTa, DistilBERT, ModernBERT, BLOOM, GPT-2, GPT-NeoX, OPT, Llama and kin"
QUERY_VALUE = (  # the linear layers that make the queries and the values (or all three in one) of self-attention
    r"(SelfAttention\.[qv]|(attention|self)\.(query|value)(_proj)?|self\.in_proj|query_key_value|attn\.Wqkv|\.c_attn"
    r"|(?<!encoder_attn)\.([qv]|qkv)_(proj|lin))$"
)
SUBLAYER_END = (  # the linear layer that ends self-attention or feed-forward, before the residual is added
    r"(SelfAttention\.o|DenseReluDense\.wo|(attention|self_attn)\.dense|dense_4h_to_h|(?<!crossattention\.)output\.dense|ffn_output"
    r"|(attn|mlp)\.(c_proj|Wo)|(\.|self_)attn\.(out_proj|o_proj)|(^|\.)fc2|mlp\.fc_out|down_proj|attention\.(out_lin|out_proj|attn\.o)|ffn\.lin2)$"
)


def method_layers(model: nn.Module, method: str) -> dict[str, nn.Module]:
    """The layers beside which the new weights of lora, adapter, bitfit or prompt stand: nn.Linear, and GPT-2's Conv1D."""
    if method == "prompt":
        layer = getattr(model, "get_input_embeddings", lambda: None)()
        if not isinstance(layer, nn.Embedding):
            raise UserError(f"prompt: {type(model).__name__} reads no tokens, before which a prompt could stand")
        return {"": layer}
    pattern = {"lora": QUERY_VALUE, "adapter": SUBLAYER_END, "bitfit": ""}[method]
    named = {n: m for n, m in model.named_modules() if re.search(pattern, n)}
    found = {n: m for n, m in named.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    if not found:
        raise UserError(f"{method} does not know the layers of {type(model).__name__}; it knows those of {FAMILIES}")
    return found


@torch.no_grad()
def new_weights(method: str, layer: nn.Module) -> dict[str, Tensor]:
    """The first values of what a method adds to one of its layers: without effect, but for the prompt's."""
    if method == "prompt":  # those of random tokens; by a call, as Gemma's and BART's embeddings scale what they look up
        return {"prompt": layer(torch.randint(layer.num_embeddings, (PROMPT_TOKENS,)).to(layer.weight.device)).float()}
    n_in, n_out = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape
    if method == "bitfit":
        return {"bias": torch.zeros(n_out)}
    if method == "lora":  # A as nn.Linear's own weight
        return {"A": nn.init.kaiming_uniform_(torch.empty(LORA_RANK, n_in), a=math.sqrt(5)), "B": torch.zeros(n_out, LORA_RANK)}
    down = {"down": torch.randn(ADAPTER_WIDTH, n_out) * 0.01, "down_bias": torch.zeros(ADAPTER_WIDTH)}
    return down | {"up": torch.zeros(n_out, ADAPTER_WIDTH), "up_bias": torch.zeros(n_out)}


def method_parameters(model: nn.Module, method: str) -> int:
    """How many scalars a method trains on this model at the authors' settings."""
    if method == "bitfit" and (biases := own_biases(model)):
        return sum(p.numel() for p in biases.values())
    with torch.random.fork_rng(devices=[]):  # counting draws nothing from the caller's random numbers
        return sum(w.numel() for layer in method_layers(model, method).values() for w in new_weights(method, layer).values())


def own_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The biases that the pretrained model has."""
    return {n: p for n, p in model.named_parameters() if re.search(r"(^|[._])bias$", n) and not n.startswith("inserted.")}


def insert(model: nn.Module, methods: Iterable[str]) -> nn.ModuleDict:
    """Put the methods' new fp32 weights into `model.inserted`, and hooks that apply them on its layers, which stay what they are.

    lora: x @ A' @ B' * alpha / rank is added to the output of q and v (Hu et al., 2022). adapter: h + up(gelu(down(h))) ends
    self-attention and feed-forward (Houlsby et al., 2019). bitfit: a bias for each linear layer, for models without (T5).
    prompt: 100 vectors before the text (Lester et al., 2021), by `add_prompt`. `model.inserted.undo()` takes all away.
    """
    inserted, undo = nn.ModuleDict(), contextlib.ExitStack()
    for method in methods:
        parts = {"dropout": nn.Dropout(0.0)}  # `set_dropout` sets its rate
        for name, layer in method_layers(model, method).items():
            new = nn.ParameterDict({key: w.to(layer.weight.device) for key, w in new_weights(method, layer).items()})
            parts[name.replace(".", "_")] = new
            if method != "prompt":
                hook = functools.partial(apply_new, method, new, parts["dropout"])
                undo.callback(layer.register_forward_hook(hook).remove)
        inserted[method] = parts[""] if method == "prompt" else nn.ModuleDict(parts)
    model.inserted, inserted.undo = inserted, undo.close
    undo.callback(delattr, model, "inserted")
    return inserted


def apply_new(method: str, new: nn.ParameterDict, dropout: nn.Module, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook: a layer's output after lora (made of its input), adapter or bitfit (made of its output)."""
    new = {key: weight.to(output.dtype) for key, weight in new.items()}
    if method == "lora":
        return output + linear(linear(dropout(args[0]), new["A"]), new["B"]) * (LORA_ALPHA / LORA_RANK)
    if method == "adapter":
        inner = nn.functional.gelu(linear(output, new["down"], new["down_bias"]), approximate="tanh")
        return output + dropout(linear(inner, new["up"], new["up_bias"]))
    return output + new["bias"]


def add_prompt(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the inserted prompt, if there is one, before the text; an encoder's after [CLS], from which the head reads."""
    core = base_of(model)
    if "prompt" not in getattr(core, "inserted", {}):
        return batch
    batch, first = dict(batch), int(core is not model)
    embedded = core.get_input_embeddings()(batch.pop("input_ids"))
    prompt = core.inserted["prompt"].prompt.to(embedded).expand(len(embedded), -1, -1)
    for key in {"attention_mask", "token_type_ids"} & {*batch}:
        batch[key] = nn.functional.pad(batch[key], (PROMPT_TOKENS, 0), value=int(key == "attention_mask"))
    return batch | {"inputs_embeds": torch.cat([embedded[:, :first], prompt, embedded[:, first:]], dim=1)}


def base_of(model: nn.Module) -> nn.Module:
    """The pretrained part: the model without its classification head, if it has one."""
    return model.base_model if type(model).__name__.endswith("ForSequenceClassification") else model


# ----------------------------------------------------------------------------------------------------------------------
# Tasks and metrics: what is tuned for
# ----------------------------------------------------------------------------------------------------------------------

SPLITS, TRAIN_ONLY = ("train", "validation", "test"), ("train", None, "validation")


class Task(NamedTuple):
    """A row of the table."""

    source: str  # a hub id, or a local file or folder
    config: str | None = None
    fields: tuple[str, ...] = ("text",)
    label: str = "label"
    words: tuple[str, ...] | None = None  # the labels in words, by number; (): a text is written; None: by what the data hold
    metric: str = ""  # accuracy, f1 (accuracy and F1 of label 1), rouge or squad
    splits: tuple[str, str | None, str] = SPLITS  # train; picks the best step (None: a fixed part of train); is reported


TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "toy")
GLUE, NQ, NEWS = "nyu-mll/glue", "google-research-datasets/nq_open", "Awesome075/multi_news_parquet"
SENTIMENT, NLI, ENTAILED = ("negative", "positive"), ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")
PAIR, EQUIVALENT, DUPLICATE = ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("not_duplicate", "duplicate")
TASKS = {
    "sst2": Task(GLUE, "sst2", ("sentence",), "label", SENTIMENT, "accuracy", TRAIN_ONLY),
    "imdb": Task("stanfordnlp/imdb", "plain_text", ("text",), "label", SENTIMENT, "accuracy", ("train", None, "test")),
    "rotten_tomatoes": Task("cornell-movie-review-data/rotten_tomatoes", None, ("text",), "label", SENTIMENT, "accuracy"),
    "mnli": Task(GLUE, "mnli", ("premise", "hypothesis"), "label", NLI, "accuracy", ("train", None, "validation_matched")),
    "qnli": Task(GLUE, "qnli", ("question", "sentence"), "label", ENTAILED, "accuracy", TRAIN_ONLY),
    "rte": Task(GLUE, "rte", PAIR, "label", ENTAILED, "accuracy", TRAIN_ONLY),
    "mrpc": Task(GLUE, "mrpc", PAIR, "label", EQUIVALENT, "f1"),
    "qqp": Task(GLUE, "qqp", ("question1", "question2"), "label", DUPLICATE, "f1", TRAIN_ONLY),
    "samsum": Task("knkarthick/samsum", None, ("dialogue",), "summary", (), "rouge"),
    "multi_news": Task(NEWS, None, ("document",), "summary", (), "rouge"),  # a user's copy: alexfabbri's own needs a script
    "nq_open": Task(NQ, "nq_open", ("question",), "answer", (), "squad", TRAIN_ONLY),
    "toy-sentiment": Task(f"{TOY}/tasks/sentiment", None, ("text",), "label", SENTIMENT, "accuracy"),
    "toy-inference": Task(f"{TOY}/tasks/inference", None, ("premise", "hypothesis"), "label", NLI, "accuracy"),
    "toy-paraphrase": Task(f"{TOY}/tasks/paraphrase", None, PAIR, "label", EQUIVALENT, "f1"),
    "toy-qa": Task(f"{TOY}/tasks/qa", None, ("context", "question"), "answer", (), "squad"),
    "toy-summary": Task(f"{TOY}/tasks/summary", None, ("document",), "summary", (), "rouge"),
}
HOLD_OUT = 1_000  # examples at most that pick the best step: a standard error of 1.6 points at most, at little cost
NO_LABEL = ("", "nan", "-1")  # -1 is how the hub says that a row has none
FILE_TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FILE_NAMES = {"train": "train", **dict.fromkeys(("val", "dev", "valid", "validation"), "validation"), "test": "test"}  # in a folder

# The text of each field, the same as one text, what training learns to write (the label's word, or the first answer), the label's
# number (-1: a text is written), what scoring accepts. Data: its splits (select picks the best step), where each comes from.
Example = namedtuple("Example", "texts source target label answers")
Data = namedtuple("Data", "task words metric train select report about")


def load_task(args: argparse.Namespace) -> Data:
    """The three splits of a task as text. UserError for what is missing or does not fit."""
    (name, _, config), trains = args.task.partition(":"), not args.load and args.method != ["none"]
    task = TASKS.get(args.task, Task(args.task))
    if args.task not in TASKS and not os.path.exists(args.task):
        task = Task(name, config or None) if HUB_ID.fullmatch(name) else TASKS[one_of(args.task, TASKS, "task, file or hub id")]
    if args.text_fields:
        task = task._replace(fields=tuple(args.text_fields.split(",")))
    if args.label_field:
        task = task._replace(label=args.label_field, words=None, metric="")
    local = os.path.exists(task.source) or task.source.startswith(TOY)
    splits, names, revision = read_local(task.source) if local else read_hub(task)
    columns = dict.fromkeys(name for rows in splits.values() for row in rows for name in row)
    if not columns:
        raise UserError(f"{task.source} holds no split {', '.join(SPLITS)} with rows")
    if missing := [name for name in (*task.fields, task.label) if name not in columns]:
        known = f"there are {', '.join(columns)}: --text-fields A,B --label-field NAME"
        raise UserError(f"{task.source} has no column {missing[0]!r}; {known}")
    cells = {split: [row.get(task.label) for row in rows] for split, rows in splits.items()}
    lists = any(isinstance(cell, list) for some in cells.values() for cell in some)
    words = names.get(task.label) if task.words is None else task.words
    places = {str(i): i for i in range(len(words or ()))}  # a label may be a number, but for those that are found in the data
    if words is None and args.load and "labels" in (about := load_tensors(args.load)[1]):
        words = tuple(about["labels"])  # as the delta was trained
    if words is None:
        words = () if lists else find_words(next(iter(cells.values())), task.label)
    places = {word: i for i, word in enumerate(words)} | places
    made = {s: to_examples(rows, task, words, places, f"{task.source} ({s})") for s, rows in splits.items()}
    report = next((s for s in (task.splits[2], "test", "validation") if made.get(s)), None)
    select = task.splits[1] if made.get(task.splits[1]) and task.splits[1] != report else None
    parts = {"train": made.get("train", []), "report": made.get(report), "select": made.get(select)}
    if (n := len(parts["train"])) < (1 if report and select else 10) and (trains or not report):
        raise UserError(f"{task.source}: {n} training examples are too few to hold some out or to train on; add rows, or a split")
    for part, size in (("report", args.eval_size), ("select", args.eval_size or HOLD_OUT), ("train", args.train_size)):
        if parts[part] is None:
            parts[part], parts["train"] = draw(parts["train"], max(1, min(HOLD_OUT, len(parts["train"]) // 10)))
        parts[part] = draw(parts[part], size)[0]
    about = {"revision": revision, "report": report or "held out of train", "select": select or "held out of train"}
    about["sizes"] = {part: len(examples) for part, examples in parts.items()}
    if dropped := {s: n for s in splits if (n := len(splits[s]) - len(made[s]))}:
        about["rows without text or label, dropped"] = dropped  # empty, null, nan or -1
    metric = task.metric or ("accuracy" if words else "squad" if lists else "rouge")
    return Data(args.task, words, metric, about=about, **parts)


def as_text(cell: object, where: str) -> str:
    """A cell as text: "" for None and NaN. UserError for what is neither text nor number, and for half a surrogate pair."""
    if cell is None or cell != cell:
        return ""
    text = str(int(cell) if isinstance(cell, bool) else cell) if isinstance(cell, (str, int, float)) else None
    if text is None or re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where} must be text that UTF-8 can hold, or a number (its type is {type(cell).__name__})")
    return text


def label_word(text: str) -> str:
    """The same word for 1, 1.0 and " 1 "."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())


def find_words(cells: list, label: str) -> tuple[str, ...]:
    """2 to 20 values, at most a quarter of the rows, are labels, sorted (numbers: by size); else (): a text is to be written."""
    words = [word for cell in cells if (word := label_word(as_text(cell, f"the column {label!r}"))) not in NO_LABEL]
    kinds = sorted(set(words), key=lambda w: (not w.isdecimal(), len(w) * w.isdecimal(), w))
    if len(kinds) == 1:
        raise UserError(f"the column {label!r} holds one value only ({kinds[0][:50]!r}): nothing to learn; --label-field NAME")
    if any("." in word for word in kinds) and all(re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", word) for word in kinds):
        raise UserError(f"the column {label!r} holds real numbers: regression is not a task here; make them classes, in words")
    return tuple(kinds) if 2 <= len(kinds) <= min(20, max(2, len(words) // 4)) else ()


def to_examples(rows: list, task: Task, words: tuple, places: dict[str, int], where: str) -> list[Example]:
    """Rows in the authors' format; those in which a text is empty or no label is there are left out."""
    out, place, empty = [], -1, NO_LABEL if words else ("",)
    for number, row in enumerate(rows, 1):
        here, cells = f"{where}, row {number}", row.get(task.label)
        texts = tuple(as_text(row.get(name), f"{here}: {name}") for name in task.fields)
        answers = [as_text(cell, f"{here}: {task.label}") for cell in (cells if isinstance(cells, list) else [cells])]
        answers = tuple(a for a in answers if label_word(a) not in empty)
        if not answers or not all(text.strip() for text in texts):
            continue
        if words:
            if (place := places.get(label_word(answers[0]), -1)) < 0:
                raise UserError(f"{here}: the label {label_word(answers[0])[:50]!r} is none of {', '.join(words)}")
            answers = (words[place],)
        source = texts[0] if len(texts) == 1 else " ".join(f"{n}: {t}" for n, t in zip(task.fields, texts, strict=True))
        out.append(Example(texts, source, answers[0], place, answers))
    return out


def draw(examples: list, size: int | None) -> tuple[list, list]:
    """A fixed random choice of that many, and the others."""
    if size is None or size >= len(examples):
        return examples, []
    order = shuffled(len(examples), 0)
    return [examples[i] for i in sorted(order[:size])], [examples[i] for i in sorted(order[size:])]


@functools.lru_cache(maxsize=4)
def shuffled(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def read_hub(task: Task) -> tuple[dict[str, list[dict]], dict[str, tuple[str, ...]], str]:
    """({split: rows}, {column: label words}, revision) of a data set of the hub; read from the cache if the hub is down."""
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = not hub_answers()  # read once, when datasets was imported
    with one_line("the data set", task.source):
        builder = datasets.load_dataset_builder(task.source, task.config)
        builder.download_and_prepare()
        parts = builder.as_dataset()
    splits = {name: parts[name].to_list() for name in task.splits if name in parts and len(parts[name])}
    columns = next(iter(parts.values())).features.items()
    return splits, {name: tuple(kind.names) for name, kind in columns if isinstance(kind, datasets.ClassLabel)}, builder.hash


def read_local(path: str) -> tuple[dict[str, list[dict]], dict, str]:
    """({split: rows}, {}, hash) of a file (it is `train`), or of a folder with one for each split."""
    there = [(split, f"{path}/{name}{kind}") for name, split in FILE_NAMES.items() for kind in reversed(FILE_TYPES)]
    there += [("train", path)] * path.endswith(FILE_TYPES)
    files = {split: file for split, file in there if os.path.isfile(file)}  # of several, the last; a pipe might never end
    if not files:
        raise UserError(f"{path} must be a file of type {', '.join(FILE_TYPES)}, or a folder with train, validation and test")
    return {split: read_rows(file) for split, file in files.items()}, {}, hash_files(files.values())


def read_rows(file: str) -> list[dict]:
    """The rows of a file; whatever it holds, nothing but a UserError comes out."""
    try:
        names, uneven = [], []
        if file.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile

            content = ParquetFile(file).read()
            names, rows = content.column_names, content.to_pylist()
        elif file.endswith((".csv", ".tsv")):
            csv.field_size_limit(1 << 30)  # else a cell of more than 131,072 characters is an error
            with open(file, encoding="utf-8-sig", newline="") as f:
                reader = csv.DictReader(f, delimiter=",\t"[file.endswith(".tsv")], strict=True)
                rows, names = list(reader), reader.fieldnames or []
            uneven = [i for i, row in enumerate(rows, 1) if None in (*row, *row.values())]
        else:
            text = Path(file).read_text(encoding="utf-8-sig")
            rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(t) for t in text.split("\n") if t.strip()]
        if names and not 2 <= len(set(names)) == len(names):
            header = ", ".join(names)
            raise ValueError(f"rows belong below names of columns, separated by commas (.tsv: tabs), none twice; not {header}")
        if uneven:
            raise ValueError(f"row {uneven[0]} has more or fewer cells than the header; quote what holds a separator")
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it must hold rows, each with named columns")
        return rows
    except Exception as e:  # of json, csv, pyarrow and the system, which share no class
        hint = "; it must be UTF-8: Excel's 'CSV UTF-8', or iconv -f CP1252 -t UTF-8" if isinstance(e, UnicodeError) else ""
        raise UserError(f"can't read {file}: {' '.join(str(e).split())[:300]}{hint}") from None


def hash_files(files: Iterable[str | Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)  # goes on with the same one
    return f"sha256:{digest.hexdigest()[:16]}"


def measure(metric: str, predictions: list, examples: list[Example]) -> dict[str, float]:
    """Scores in 0 to 1; the first is the one that is reported. Predictions: label numbers, or texts."""
    pairs = list(zip(predictions, examples, strict=True))
    if metric == "rouge":
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL", "rouge1", "rouge2"], use_stemmer=True)
        found = [scorer.score(e.answers[0], p) for p, e in pairs]
        scores = {name: [s[name].fmeasure for s in found] for name in found[0]}
    elif metric == "squad":
        best = [map(max, zip(*(squad(p, a) for a in e.answers), strict=True)) for p, e in pairs]  # of the answers, for each metric
        scores = dict(zip(("f1", "exact"), zip(*best, strict=True), strict=True))
    else:
        scores = {"accuracy": [p == e.label for p, e in pairs]}
    means = {name: sum(values) / len(pairs) for name, values in scores.items()}
    if metric == "f1":
        hits = sum(p == e.label == 1 for p, e in pairs)
        means["f1"] = 2 * hits / max(1, sum((p == 1) + (e.label == 1) for p, e in pairs))
    return means


def squad(prediction: str, answer: str) -> tuple[float, bool]:
    """SQuAD's F1 and exact match of the words of two texts, in lower case, without punctuation and articles."""
    plain = ("".join(c for c in text.lower() if c not in string.punctuation) for text in (prediction, answer))
    p, a = (re.sub(r"\b(a|an|the)\b", " ", text).split() for text in plain)
    common = (Counter(p) & Counter(a)).total()
    return 2 * common / (len(p) + len(a)) if p and a else float(p == a), p == a


def baselines(data: Data) -> dict[str, float]:
    """The score without reading the input: a random guess, and training's most frequent target, always."""
    pool, pick = [e.label if data.words else e.target for e in data.train or data.report], random.Random(0)
    often = [target for target, _ in Counter(pool).most_common(1)]
    said = {"random_guess": [pick.choice(pool) for _ in data.report], "majority": often * len(data.report)}
    scores = {name: next(iter(measure(data.metric, guesses, data.report).values())) for name, guesses in said.items()}
    return scores | ({"random_guess": 1 / len(data.words)} if data.words else {})


# ----------------------------------------------------------------------------------------------------------------------
# Models, batches and scores
# ----------------------------------------------------------------------------------------------------------------------

TOY_MODELS = {f"toy-{size}": os.path.join(TOY, "models", size) for size in ("tiny", "small", "base", "large")}
SHORT = TOY_MODELS | {f"t5-{size}": f"google-t5/t5-{size}" for size in ("small", "base", "large", "3b", "11b")}
SHORT |= {f"t5-{n}": f"google/t5-{n}" for s in ("small", "base", "large", "xl", "xxl") for n in (f"v1_1-{s}", f"{s}-lm-adapt")}
SHORT |= {f"bloom-{size}": f"bigscience/bloom-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1")}
SHORT |= {f"bert-{n}{c}": f"google-bert/bert-{n}{c or '-uncased'}" for n in ("base", "large") for c in ("", "-cased", "-uncased")}
TURC = {"tiny": "L-2_H-128_A-2", "mini": "L-4_H-256_A-4", "small": "L-4_H-512_A-8", "medium": "L-8_H-512_A-8"}  # Turc et al., 2019
SHORT |= {f"bert-{size}": f"google/bert_uncased_{shape}" for size, shape in TURC.items()}
HUB_ID = re.compile(r"\w[\w-]*(\.[\w-]+)*/\w[\w-]*(\.[\w-]+)*")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHARACTERS = 100  # for each token asked for: what is beyond is cut before the tokenizer, which is slow on long texts, sees it
signature = functools.cache(inspect.signature)  # which is slow, and every batch asks


def find_model(name: str) -> str:
    """The folder or hub id that a name stands for."""
    path = name if os.path.isdir(name) else SHORT.get(name, name)
    return path if os.path.isdir(path) or HUB_ID.fullmatch(path) else SHORT[one_of(name, SHORT, "model, folder or hub id")]


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached, asked once, for 3 seconds; if not, its libraries are told to read their cache alone."""
    from huggingface_hub import constants, utils

    utils.logging.set_verbosity_error()
    utils.disable_progress_bars()
    try:  # what is needed, not the front page; 404 and the like are answers, 500 and more would be asked again for minutes
        constants.HF_HUB_OFFLINE = utils.get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=3).status_code >= 500
    except Exception:  # of httpx, or because HF_HUB_OFFLINE is set
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


@contextlib.contextmanager
def one_line(what: str, name: str) -> Iterator[None]:
    """What goes wrong with a folder or with the hub becomes a UserError."""
    online = os.path.isdir(name) or hub_answers()
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # of httpx, pyarrow, datasets, tokenizers and transformers, which share no class
        vague = re.search("Can't load the|while generating", str(e))  # what is wrong then stands in its cause
        words = " ".join(str((vague and (e.__cause__ or e.__context__)) or e).split())[:300]
        if not online:
            words = f"the hub can't be reached (work offline with local files or --model toy-base), and from its cache: {words}"
        elif "trust_remote_code" in str(e):
            words = "it brings code of its own (auto_map in its config.json), which is never run; take one that needs none"
        raise UserError(f"can't load {what} {name}: {words}") from None


def model_revision(name: str) -> str:
    """Of a folder: the hash of its files; of the hub: the commit."""
    path = find_model(name)
    if os.path.isdir(path):
        kinds = (".json", ".safetensors", ".bin", ".model", ".txt")
        return hash_files(sorted(f for f in Path(path).iterdir() if f.suffix in kinds))
    with one_line("the model", path):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(path, "config.json")).parent.name


def load_model(args: argparse.Namespace, words: tuple[str, ...]) -> tuple[nn.Module, object, dict]:
    """(model in training mode, tokenizer, facts for the result). UserError if it can't be had."""
    path = find_model(args.model)
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else loading a .bin contacts a service in the background
    with one_line("the model", path):
        import transformers as hf
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

        hf.utils.logging.set_verbosity_error()
        hf.utils.logging.disable_progress_bar()
        config = hf.AutoConfig.from_pretrained(path, trust_remote_code=False)  # the default asks on stdin
        family = "seq2seq" if config.is_encoder_decoder else "encoder" if config.model_type in ENCODERS else "causal"
        if family == "encoder" and not words:
            raise UserError(f"{args.model} is an encoder: it can classify, but not write the text that {args.task} asks for")
        tokenizer = hf.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        known = tokenizer.decode(tokenizer("Input: a text Output:").input_ids, skip_special_tokens=True)
        if not re.search(r"\w", known) or (family != "encoder" and tokenizer.eos_token_id is None):
            raise UserError(f"{args.model} has no tokenizer that knows words and has an end-of-sequence token (eos_token)")
        more = {"dtype": DTYPES[args.dtype], "device_map": args.device_map, "trust_remote_code": False}
        more |= {"num_labels": len(words), "ignore_mismatched_sizes": True} if family == "encoder" else {}  # its head is made anew
        kind = {"seq2seq": "Seq2SeqLM", "encoder": "SequenceClassification", "causal": "CausalLM"}[family]
        torch.manual_seed(0)  # for weights that the checkpoint lacks
        model, loaded = getattr(hf, f"AutoModelFor{kind}").from_pretrained(path, output_loading_info=True, **more)
    inside = f"{model.base_model_prefix}." if family == "encoder" else ""
    if wrong := [name for name, *shapes in loaded["mismatched_keys"] if name.startswith(inside)]:
        raise UserError(f"{args.model}: {min(wrong)} has another shape in the checkpoint than by config.json")
    if made := sorted(name for name in loaded["missing_keys"] if name.startswith(inside)):
        say(f"{args.model} lacks {', '.join(made[:4])}{', ...' * (len(made) > 4)}: randomly initialized, always the same")
    tokenizer.rows = len(model.get_input_embeddings().weight)  # for Coder, which refuses tokens beyond
    if getattr(config, "type_vocab_size", 0) < 2:  # RoBERTa, DistilBERT: one kind of segment
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n != "token_type_ids"]
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    rooms = [len(m.weight) - (0 if m.padding_idx is None else m.padding_idx + 1) for m in tables]  # RoBERTa's start after it
    room = min(rooms or [getattr(config, "max_position_embeddings", math.inf)]) - args.max_target_length * (family == "causal")
    room -= PROMPT_TOKENS if "prompt" in (*args.method, *args.insert) else 0
    if args.max_source_length > room:
        raise UserError(f"{args.model} has room for {max(0, room)} tokens (prompt: {PROMPT_TOKENS}): --max-source-length")
    if family != "encoder":  # greedy, with nothing forced (BART's first token) or forbidden that training knows nothing of
        own = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos")}
        given = [model.generation_config.decoder_start_token_id, model.generation_config.bos_token_id, *own.values()]
        start = next(i for i in given if i is not None) if family == "seq2seq" else None
        model.generation_config = hf.GenerationConfig(decoder_start_token_id=start, **own)
    if args.gradient_checkpointing:
        use_checkpointing(model)
    model = model if args.device_map else model.to(args.device)
    facts = {"path": args.model if os.path.isdir(path) else path, "family": family}
    return model.train(), tokenizer, facts | {"randomly initialized, as the checkpoint lacks them": made}


def use_checkpointing(model: nn.Module) -> None:
    """Not the reentrant kind, which gives no gradient when a segment's inputs are frozen."""
    with warnings.catch_warnings(action="ignore"):  # renamed in transformers 5.23; the old name works in all of 5
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def set_dropout(model: nn.Module, rate: float) -> None:
    """Every dropout rate of a model, those kept as plain numbers for functional calls included (but not OPT's `layerdrop`)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) in (int, float) and re.search("^p$" if isinstance(module, nn.Dropout) else "dropout|pdrop", name):
                setattr(module, name, rate)


class Coder:
    """Text -> token ids, in the authors' format `Input: ... Output: `; for encoders, the texts alone."""

    def __init__(self, tokenizer: object, family: str, max_source: int, max_target: int):
        self.tokenizer, self.family, self.max_source, self.max_target = tokenizer, family, max_source, max_target
        self.rows = getattr(tokenizer, "rows", math.inf)  # of the model's embedding, as load_model found them
        self.pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None and i < self.rows)
        self.source, self.written = functools.cache(self.source), functools.cache(self.written)  # what was encoded is remembered

    def source(self, example: Example) -> list[int]:
        """Too long a text is cut at its end, before the closing `Output:`."""
        longest, read, seq2seq = self.max_source * CHARACTERS, self.tokenizer, self.family == "seq2seq"
        if self.family == "encoder":
            texts = example.texts if len(example.texts) == 2 else (example.source,)
            return read(*(t[:longest] for t in texts), truncation=True, max_length=self.max_source).input_ids
        special = seq2seq or read.bos_token_id is not None
        ids = read(f"Input: {example.source[:longest]} Output:", add_special_tokens=special).input_ids
        if len(ids) > self.max_source:
            end = len(read(" Output:", add_special_tokens=False).input_ids) + seq2seq
            ids = ids[: self.max_source - end] + ids[-end:]
        return ids

    def target(self, example: Example) -> list[int]:
        return [example.label] if self.family == "encoder" else self.written(example.target)

    def written(self, text: str) -> list[int]:
        """Ids of a text to be written (BART's begin with <s>), closed by the end of sequence even when it is cut."""
        special, end = self.family == "seq2seq", self.tokenizer.eos_token_id
        cut = (text if special else f" {text}")[: self.max_target * CHARACTERS]
        ids = self.tokenizer(text_target=cut, add_special_tokens=special).input_ids
        return [*(ids[:-1] if ids[-1:] == [end] else ids)[: self.max_target - 1], end]

    def batch(self, sources: list[list[int]], targets: list[list[int]] | None, device: object) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (-100: not to be learnt), each (batch, longest); causal: labels of the last places."""
        causal, cuda = self.family == "causal", torch.device(device).type == "cuda"
        if (most := max(itertools.chain(*sources, *(targets or [])))) >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(most)
            raise UserError(f"the tokenizer's {token!r} (number {most}) is beyond the model's {self.rows:,} embeddings")

        def pad(rows: list[list[int]], value: int) -> Tensor:
            made = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value, "left" if causal else "right")
            return (made.pin_memory() if cuda else made).to(device, non_blocking=cuda)  # waits for nothing that a GPU still does

        # causal: source and target in one row, but for the target's last token, which predicts nothing
        rows = [s + t[:-1] for s, t in zip(sources, targets, strict=True)] if causal and targets else sources
        out = {"input_ids": pad(rows, self.pad), "attention_mask": pad([[1] * len(row) for row in rows], 0)}
        if self.family == "encoder" and "token_type_ids" in self.tokenizer.model_input_names:
            sep = self.tokenizer.sep_token_id  # the second segment comes after it
            first = [s.index(sep) + 1 if sep in s else len(s) for s in sources]
            out["token_type_ids"] = pad([[0] * n + [1] * (len(s) - n) for n, s in zip(first, sources, strict=True)], 0)
        return out | ({"labels": pad(targets, -100)} if targets else {})


def token_logp(model: nn.Module, coder: Coder, batch: dict[str, Tensor]) -> Tensor:
    """(batch, places): log-probability, in fp32, of each label of the batch; 0 where it is -100."""
    batch, accepted = dict(add_prompt(model, batch)), signature(type(model).forward).parameters
    labels = batch.pop("labels")  # not the model's business: it would compute a loss of its own
    more = {"use_cache": False, "logits_to_keep": labels.shape[1]}  # no copies of keys; no vocabulary at every source token
    batch |= {name: value for name, value in more.items() if name in accepted}
    if coder.family == "seq2seq":
        before, start = labels[:, :-1], model.generation_config.decoder_start_token_id
        batch["decoder_input_ids"] = nn.functional.pad(before.masked_fill(before == -100, coder.pad), (1, 0), value=start)
    elif coder.family == "causal" and "position_ids" in accepted:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_(min=0)
    logits = model(**batch).logits
    logits = logits[:, None] if coder.family == "encoder" else logits[:, -labels.shape[1] :]
    flat, wanted = logits.flatten(0, 1).float(), labels.flatten().to(logits.device)
    return -nn.functional.cross_entropy(flat, wanted, ignore_index=-100, reduction="none").view(labels.shape)


@torch.no_grad()
def label_scores(model: nn.Module, coder: Coder, sources: list[list[int]], words: tuple[str, ...], device: object) -> Tensor:
    """(batch, labels): log-likelihood of each label's tokens, end of sequence included, given the source."""
    source = add_prompt(model, coder.batch(sources, None, device))
    if coder.family == "encoder":
        return model(**source).logits.float()
    once = {"encoder_outputs": model.get_encoder()(**source)} if coder.family == "seq2seq" else {}  # for all labels
    batches = (coder.batch(sources, [coder.written(word)] * len(sources), device) | once for word in words)
    return torch.stack([token_logp(model, coder, batch).sum(1) for batch in batches], dim=1)


@torch.no_grad()
def predict(model: nn.Module, coder: Coder, data: Data, examples: list[Example], batch_size: int, device: object) -> list:
    """Label numbers, or texts by greedy decoding, in the order of `examples`; batches hold sources of like length."""
    rank, world = ranks()
    order = sorted(range(len(examples)), key=lambda i: len(coder.source(examples[i])))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world]
    out = torch.zeros(len(examples), 1 if data.words else coder.max_target, dtype=torch.int64, device=device)
    model.eval()
    for chosen in batches:
        sources = [coder.source(examples[i]) for i in chosen]
        if data.words:
            tokens = label_scores(model, coder, sources, data.words, device).argmax(1, keepdim=True)
        else:
            batch = add_prompt(model, coder.batch(sources, None, device))
            tokens = model.generate(**batch, max_new_tokens=coder.max_target, pad_token_id=coder.pad)
            skip = 1 if coder.family == "seq2seq" else batch["input_ids"].shape[1] if "input_ids" in batch else 0
            tokens = nn.functional.pad(tokens[:, skip:], (0, coder.max_target + skip - tokens.shape[1]), value=coder.pad)
        out[chosen] = tokens.to(device)
    model.train()
    if world > 1:
        torch.distributed.all_reduce(out)  # what another rank fills is zero here
    if data.words:
        return out[:, 0].tolist()
    return [text.strip() for text in coder.tokenizer.batch_decode(out, skip_special_tokens=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

# What a sweep loads once, facts about the model for the result, the arguments of one of its runs, and this file's SHA-256.
Run = namedtuple("Run", "model coder data facts baselines args code")
# What a method trains: fp32 params, which write() puts into the model; among them or not: new weights, and the classification head.
Tuned = namedtuple("Tuned", "params write apet inserted head")


def prepare(model: nn.Module, args: argparse.Namespace, undo: contextlib.ExitStack, batches: Batches = None) -> Tuned:
    """Put `args.method` on the pretrained model, until undo.close(); make its classification head, if it has one, anew."""
    model.train().requires_grad_(False).zero_grad()
    base, apet, inserted = base_of(model), None, {}
    inside = {id(p) for p in base.parameters()}
    head = {f"head.{n}": p for n, p in model.named_parameters() if id(p) not in inside}
    for module in model.modules():
        if any(p is not None and id(p) not in inside for p in module._parameters.values()):
            model._init_weights(module)  # from args.seed
    methods = [m for m in (*args.insert, args.method) if m in COUNTED and not (m == "bitfit" and own_biases(base))]
    if args.export and methods:
        raise UserError(f"--export: a plain checkpoint has no place for {', '.join(methods)}; the delta (--save) holds it")
    if methods:
        inserted = {f"inserted.{n}": p for n, p in insert(base, methods).named_parameters()}
        undo.callback(base.inserted.undo)
    set_dropout(model, args.dropout if args.dropout is not None else 0.0 if args.method == "apet" else 0.1)
    whole = {} if args.freeze_head else dict(head)
    if args.method == "apet":
        spots = mask = args.mask
        if mask == "gradient":  # two GPUs may differ in the last bit: rank 0 chooses for all
            spots = from_rank_0(lambda: select_positions(base, args.budget, mask, args.mask_seed, args.where, batches))
        apet = APET.load(base, args.load) if args.load else APET(base, args.budget, spots, args.mask_seed, where=args.where)
        apet.about["mask"] = apet.about["mask"] if args.load else mask
        undo.callback(apet.remove)
        undo.callback(apet.restore)
    elif args.method != "none":
        whole |= inserted or (own_biases(base) if args.method == "bitfit" else dict(base.named_parameters()))
    masters, write = tune_whole(whole, undo)
    saved, ours = load_tensors(args.load)[0] if args.load else {}, head | inserted | masters
    shapes = {n: t.shape for n, t in saved.items() if n not in ("values", "indices")}
    if args.load and shapes != {n: p.shape for n, p in ours.items()}:
        raise UserError(f"{args.load} was made for another model, or for other labels")
    for name in saved.keys() & ours:
        ours[name].data.copy_(saved[name])
    write()
    params = {"values": apet.values} if apet else {}
    return Tuned(params | masters, lambda: (apet and apet.write(), write()), apet, inserted, head)


def tune_whole(params: dict[str, nn.Parameter], undo: contextlib.ExitStack) -> tuple[dict[str, nn.Parameter], Callable]:
    """(fp32 parameters to train, write) for whole tensors: in half precision their own small steps would vanish."""
    masters = {n: p.requires_grad_() if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in params.items()}
    copied = [(masters[n], p) for n, p in params.items() if masters[n] is not p]

    def move(master: nn.Parameter, p: nn.Parameter) -> None:
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    @torch.no_grad()
    def write() -> None:
        for master, p in copied:
            p.copy_(master)

    for p in params.values():
        undo.callback(p.copy_, p.detach().to("cpu", copy=True))
        undo.callback(p.requires_grad_, False)
    for master, p in copied:
        undo.callback(p.requires_grad_().register_post_accumulate_grad_hook(functools.partial(move, master)).remove)
    return masters, write


def auto_lr(method: str, budget: int, family: str) -> float:
    """AdamW's rate, by sweeps (results/README.md): for APET, more for fewer scalars (Xu & Zhang, ICML 2024)."""
    if family == "seq2seq":  # swept on the toy T5s; full: the authors'
        rates = {"full": 3e-4, "apet": min(1.0, max(3e-4, 100 / budget)), "bitfit": 1e-2, "prompt": 1e-1}
    else:  # swept on MiniLM, a BERT; full: the authors'. BLOOM and kin were not swept
        rates = {"full": 1e-4, "apet": min(0.3, max(1e-4, 15 * budget**-0.7)), "bitfit": 3e-3, "prompt": 3e-3}
    return rates.get(method, 1e-3)


def ranks() -> tuple[int, int]:
    """(rank, number of processes)"""
    d = torch.distributed
    return (d.get_rank(), d.get_world_size()) if d.is_available() and d.is_initialized() else (0, 1)


def from_rank_0(read: Callable[[], object]) -> object:
    """What rank 0 alone reads (from a disk that the other nodes may not share) or does, while the others wait."""
    found = [read() if ranks()[0] == 0 else None]
    if ranks()[1] > 1:
        torch.distributed.broadcast_object_list(found, 0, device=torch.device("cpu"))
    return found[0]


def batch_at(step: int, size: int, n: int, seed: int) -> list[int]:
    """The examples of a step: every epoch is a new permutation; a function of its arguments, so nothing has to be saved."""
    return [shuffled(n, (seed << 20) + place // n)[place % n] for place in range(step * size, (step + 1) * size)]


def loss_sum(run: Run, examples: list[Example]) -> Tensor:
    """Cross-entropy summed over the targets' tokens (a sum, so that micro-batches and ranks add up exactly)."""
    sources, targets = [run.coder.source(e) for e in examples], [run.coder.target(e) for e in examples]
    return -token_logp(run.model, run.coder, run.coder.batch(sources, targets, run.args.device)).sum()


def score(run: Run, examples: list[Example]) -> dict[str, float]:
    """The metrics of the task on these examples; the first is the one that counts."""
    args = run.args
    return measure(run.data.metric, predict(run.model, run.coder, run.data, examples, args.eval_batch_size, args.device), examples)


def start_training(run: Run, tuned: Tuned, lr: float, record: dict) -> tuple[torch.optim.Optimizer, dict]:
    """AdamW, and the state of the run: all that it needs to go on after an interruption, the tensors being those in use."""
    params, head = tuned.params, tuned.head
    groups = [{"params": [p for n, p in params.items() if n not in head], "lr": lr}]
    groups += [{"params": [p for n, p in params.items() if n in head], "lr": 1e-3}]  # a new layer of a few hundred weights
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)  # decay would pull to 0, not to the pretrained weights
    positions = tuned.apet.positions if tuned.apet else {}  # of mask "gradient", a GPU may choose others
    state = {"key": f"{run.args.name} {run.code} {[int(i.sum()) for i in positions.values()]}", "record": record}
    state["best"] = {n: p.detach().to("cpu", copy=True) for n, p in params.items()}
    state["tensors"] = {n: p.detach() for n, p in params.items()}
    for name, p in params.items():
        optimizer.state[p] = {"step": p.new_zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["tensors"] |= {f"{name} {part}": t for part, t in optimizer.state[p].items()}
    return optimizer, state


def load_state(file: str, state: dict) -> bool:
    """Set `state` to what `train` saved, if that is whole and of the same run; else say so and leave it."""
    found = {}
    if ranks()[0] == 0 and os.path.exists(file):
        with contextlib.suppress(Exception), zipfile.ZipFile(file) as f:  # a file that is no state can fail in any way
            read = torch.load(file, map_location="cpu", weights_only=True)
            if f.testzip() is None and read["key"] == state["key"]:  # torch checks no sums; the same code wrote the same tensors
                found = read
        if not found:
            say(f"{file} is damaged, or of another run, model or version of apet.py: the run starts anew")
    if record := from_rank_0(lambda: found.get("record")):
        state["record"].update(record)
        for part in ("best", "tensors"):
            for name, tensor in state[part].items():
                if found:
                    tensor.copy_(found[part][name])
                if ranks()[1] > 1:
                    torch.distributed.broadcast(tensor, 0)
        say(f"continuing at step {record['step']}")
    return bool(record)


def train_step(run: Run, tuned: Tuned, optimizer: torch.optim.Optimizer, record: dict) -> Tensor:
    """One step of the optimizer, counted in the record. Returns the mean loss per target token, still on the device."""
    args, coder, step, (rank, world) = run.args, run.coder, record["step"], ranks()
    torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + rank)  # dropout, too, depends on its place alone
    chosen = [run.data.train[i] for i in batch_at(step, args.batch_size, len(run.data.train), args.seed)]
    chosen.sort(key=lambda e: len(coder.source(e)))  # micro-batches of like length: less padding
    count = sum(len(coder.target(e)) for e in chosen)
    loss, parts = torch.zeros((), device=args.device), args.grad_accum * world
    for part in range(rank, parts, world):
        if mine := chosen[part * len(chosen) // parts : (part + 1) * len(chosen) // parts]:
            part_loss = loss_sum(run, mine) / count
            part_loss.backward()
            loss += part_loss.detach().to(loss.device)
    if world > 1:
        torch.distributed.all_reduce(loss)
        for p in tuned.params.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)
    optimizer.step()
    optimizer.zero_grad()
    tuned.write()
    record["tokens"] += count + sum(len(coder.source(e)) for e in chosen)
    record["step"] += 1
    return loss


def train(run: Run, tuned: Tuned, lr: float, record: dict, state_file: str) -> None:
    """Train, and leave those parameters in the model that score best on data.select. To the record: curves, seconds, tokens.

    The state is saved after each evaluation, and once a minute: however a run ends, the same command goes on from there.
    """
    from tqdm import tqdm

    args, waiting, saved, pause = run.args, [], time.monotonic(), 60
    optimizer, state = start_training(run, tuned, lr, record)
    resumed = args.resume and load_state(state_file, state)
    started = time.perf_counter() - record["train_s"] - record["eval_s"]

    def look() -> None:
        """Read the losses that wait on the device: between two evaluations, training waits for it nowhere else."""
        for loss in torch.stack(waiting).tolist() if waiting else []:
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {len(record['loss']) + 1}; a smaller --lr (now {lr:g}) may help")
            record["loss"].append(round(loss, 5))
        waiting.clear()
        record["train_s"] = time.perf_counter() - started - record["eval_s"]

    def evaluate() -> None:
        look()
        began, scores = time.perf_counter(), score(run, run.data.select)
        record["eval"].append({"step": record["step"], **scores})
        if record["best"] is None or next(iter(scores.values())) > record["best"]["score"]:
            record["best"] = {"step": record["step"], "score": next(iter(scores.values()))}
            for name, kept in state["best"].items():
                kept.copy_(tuned.params[name].detach())
        record["eval_s"] += time.perf_counter() - began

    tuned.write()
    if not resumed:
        evaluate()
    with tqdm(total=args.steps, initial=record["step"], desc=args.label, mininterval=0.5, leave=False, disable=ranks()[0]) as bar:
        while record["step"] < args.steps:
            try:
                waiting.append(train_step(run, tuned, optimizer, record))
            except torch.OutOfMemoryError:
                if args.gradient_checkpointing or ranks()[1] > 1:
                    raise
                say(f"{args.label}: out of memory; from here on with --gradient-checkpointing")
                args.gradient_checkpointing = True
                use_checkpointing(run.model)
                optimizer.zero_grad()
                continue
            due = record["step"] % args.eval_every == 0 or record["step"] == args.steps
            if due:
                evaluate()
            if ranks()[0] == 0 and record["step"] < args.steps and (due or time.monotonic() - saved > pause):
                look()
                began = time.monotonic()
                write_file(state_file, functools.partial(torch.save, state))
                saved, pause = time.monotonic(), max(60, 20 * (time.monotonic() - began))  # seconds
            if bar.update():  # it is drawn, every half second
                look()
                bar.set_postfix(loss=f"{record['loss'][-1]:.3f}", refresh=False)
    for name, p in tuned.params.items():
        p.data.copy_(state["best"][name])
    tuned.write()


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

DATA_FLAGS = ("text_fields", "label_field", "max_source_length", "max_target_length")  # a delta says which it was made with


def parser() -> argparse.ArgumentParser:
    """Every flag, with its default's reason. None stands for a default that depends on the others; see `check_args`."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(message: str) -> None:  # one line; argparse would print every flag before it
        raise UserError(message.removeprefix("argument "))

    def word(text: str) -> str:  # a name, which results and deltas hold
        if not text.strip() or text.encode(errors="replace").decode() != text:
            raise UserError(f"{text!r} is empty or not UTF-8: leave the flag out, or rename it")
        return text

    def number(read: Callable[[str], float], low: float, high: float, text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := read(text)) <= high:
                return value
        raise UserError(f"it must be a {'' if read is float else 'whole '}number from {low:,} to {high:,}, not {text!r}")

    def each(read: Callable[[str], object], *args: object) -> Callable[[str], list]:  # of a list, which sweeps
        return lambda text: list(dict.fromkeys(read(part.strip(), *args) for part in text.split(",")))

    def add(flag: str, read: Callable[[str], object], help: str, default: str | None = None) -> None:
        p.add_argument(flag, type=read, help=help, default=default)

    p.error, partial = error, functools.partial
    whole = partial(parse_count, what="it")
    count, size = partial(number, whole, 1, 10**9), partial(number, whole, 1, 100_000)
    seed, rate = partial(number, int, 0, 10**9), partial(number, float, 1e-12, math.inf)
    add("--model", word, "a local folder, a hub id, or a short name such as t5-large (default: that of --load, or toy-base)")
    add("--task", word, "of the table, a hub id, a local file or folder (default: that of --load, or toy-sentiment)")
    add("--method", each(one_of, METHODS, "method"), f"{', '.join(METHODS)}; a list sweeps", "apet")
    add("--budget", each(word), "scalars: 1e4, 0.1%%, or as many as lora, adapter, prompt or bitfit; a list sweeps", "1e4")
    add("--mask", each(one_of, MASKS, "mask"), f"which positions: {', '.join(MASKS)}; a list sweeps", "random")
    add("--where", word, f"candidates: {', '.join(WHERE)}, layers:0-3 or a regular expression on names", "all")
    add("--insert", each(one_of, COUNTED[:3], "method to insert"), "lora, adapter, prompt: APET chooses among their weights, too")
    p.add_argument("--freeze-head", action="store_true", help="leave the classification head of an encoder as it was made")
    add("--mask-seed", each(seed), "seed of the positions; a list sweeps", "0")
    add("--seed", each(seed), "seed of training: new weights, data order, dropout; a list sweeps", "0")
    lr = each(lambda text: text if text == "auto" else rate(text))
    add("--lr", lr, "AdamW's constant rate; auto: by method and budget (results/README.md); a list sweeps", "auto")
    add("--steps", count, "optimizer steps (default: the authors' 20,000; 200 for the toy tasks)")
    add("--batch-size", size, "examples a step, over all micro-batches and processes (default: 32, the authors')", "32")
    add("--grad-accum", size, "micro-batches a step, each of examples of like length", "1")
    add("--max-source-length", partial(number, whole, 8, 100_000), "tokens (default: 128, the authors')")
    add("--max-target-length", partial(number, whole, 2, 100_000), "tokens, end of sequence included (default: 128, the authors')")
    add("--eval-every", count, "steps between evaluations (default: a twentieth of all, the authors'; toy tasks: a quarter)")
    add("--eval-batch-size", size, "examples a batch in evaluation", "64")
    add("--train-size", count, "use that many training examples (fixed choice)")
    add("--eval-size", count, "evaluate on that many (fixed choice; default: all, at most 1,000 to pick the best step)")
    add("--dropout", partial(number, float, 0, 0.99), "rate (default: the authors' 0 for apet, 0.1 for others; 0 on toy models)")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, fp32 on a CPU); what is tuned is fp32")
    add("--device", word, "cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--device-map", word, "spread the model over several devices: auto (needs accelerate)")
    p.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--text-fields", word, "text columns, comma-separated (default: those of the table, or text)")
    add("--label-field", word, "column of the labels (2 to 20 values) or target text (default: that of the table, or label)")
    add("--out", word, "folder of the results (default: %(default)s)", "results/runs")
    add("--save", word, "file for the delta (default: beside the result; full: none)")
    add("--export", word, "folder for a plain Hugging Face checkpoint of the tuned model; of a run that is done: with --load DELTA")
    add("--load", word, "a saved delta: evaluate it, without training; it says what method it is of")
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="skip what is done, continue what is not")
    return p


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the arguments that depend on others, and check what goes together. Raises UserError."""
    defaults = {"model": "toy-base", "task": "toy-sentiment", "insert": [], "max_source_length": 128, "max_target_length": 128}
    if args.load:  # the arguments are those that the delta was made with; some of them a person may name anew
        about = load_tensors(args.load)[1]
        other = args.task not in (None, about.get("task"))  # its columns have other names
        names = ("model", "task", "method", "insert", *(DATA_FLAGS[2:] if other else DATA_FLAGS))
        try:
            if about.get("format") != "apet 2":
                raise UserError("not of this version")
            made = parser().parse_args([f"--{name.replace('_', '-')}={about[name]}" for name in names if about.get(name)])
        except UserError as e:
            raise UserError(f"{args.load} is no delta of apet.py: {e}") from None
        args.method, args.insert = made.method, made.insert
        defaults |= {name: getattr(made, name) or defaults.get(name) for name in names}
    for name, default in defaults.items():
        setattr(args, name, getattr(args, name) or default)
    toy = args.task.startswith("toy-")
    args.steps = args.steps or (200 if toy else 20_000)
    args.eval_every = args.eval_every or max(1, args.steps // (4 if toy else 20))
    if args.dropout is None and args.model in TOY_MODELS:
        args.dropout = 0.0
    if args.insert and "apet" not in args.method:
        raise UserError("--insert goes with --method apet, which chooses among the new weights")
    if args.save and os.path.lexists(args.save) and not os.path.isfile(args.save):
        raise UserError(f"--save {args.save} is no file; name a new one, or one to replace")
    if (args.save or args.export) and (n := len(runs(args))) > 1:
        raise UserError(f"--save and --export want one run, not a sweep of {n}")
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # SLURM, too, sets RANK and the like
    local, world = (int(os.environ[name]) if torchrun else i for i, name in enumerate(("LOCAL_RANK", "WORLD_SIZE")))
    if world > 1 and (args.device_map or (args.device or "").startswith("cuda")):
        raise UserError("torchrun gives each process its own GPU: leave --device and --device-map out, or torchrun")
    args.device = args.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
            raise RuntimeError("cpu, cuda and cuda:1 can")
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {args.device} can't be used: {str(e).splitlines()[0]}") from None
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    if world > 1 and not torch.distributed.is_initialized():  # gloo: what hosts tell each other
        torch.distributed.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    return args


def runs(args: argparse.Namespace, *revisions: str) -> list[argparse.Namespace]:
    """The arguments of each run of the sweep, with its name: words, and a hash of all that its numbers depend on."""
    out, unread = [], {"out", "save", "export", "resume", "device", "eval_batch_size", "gradient_checkpointing"}
    more = {"revisions": revisions, "load": args.load and hash_files([args.load])}  # changed files are another run
    for method in args.method:  # what it does not read does not multiply it
        apet, trains = method == "apet" and not args.load, not args.load
        lists = [args.budget, args.mask, args.mask_seed] if apet else [[None]] * 3
        lists += [args.seed if trains else [None], args.lr if trains and method != "none" else [None]]
        for budget, mask, mask_seed, seed, lr in itertools.product(*lists):
            if mask == "magnitude" and mask_seed != args.mask_seed[0]:  # it reads no seed
                continue
            own = dict(method=method, budget=budget, mask=mask, mask_seed=mask_seed, seed=seed, lr=lr)
            own |= {} if method == "apet" else {"where": None, "insert": []}
            own = argparse.Namespace(**vars(args) | own)
            words = [method if trains else "loaded", *([mask, budget, f"p{mask_seed}"] if mask else [])]
            words += [] if seed is None or method == "none" else [f"s{seed}"]
            read = {k: v for k, v in sorted(vars(own).items()) if k not in unread} | more
            ends = hashlib.sha256(json.dumps(read).encode()).hexdigest()[:8]
            names = (re.sub(r"[^\w.-]+", "_", word, flags=re.ASCII).strip(".") for word in (args.model, args.task, *words, ends))
            own.name, own.label = "-".join(name[-40:] for name in names), " ".join(words)
            out.append(own)
    return out


def run_one(run: Run, undo: contextlib.ExitStack) -> dict:
    """Train and evaluate, write the files. Returns the result: all that is known of a run, enough to redo it."""
    args, data = run.args, run.data
    for i in range(torch.cuda.device_count()) if args.device != "cpu" else ():
        torch.cuda.reset_peak_memory_stats(i)
    torch.manual_seed(args.seed or 0)
    chosen = (batch_at(step, args.batch_size, len(data.train), args.mask_seed) for step in range(8))  # for --mask gradient
    tuned = prepare(run.model, args, undo, (functools.partial(loss_sum, run, [data.train[i] for i in batch]) for batch in chosen))
    if args.save and (args.load or not tuned.params):
        raise UserError("--save: nothing is trained here, so there is no delta to save")
    size = sum(p.numel() for n, p in tuned.params.items() if n not in tuned.head)
    lr = auto_lr(args.method, size, run.facts["family"]) if args.lr == "auto" else args.lr
    record = {"step": 0, "tokens": 0, "train_s": 0.0, "eval_s": 0.0, "loss": [], "eval": [], "best": None}
    if tuned.params and not args.load and not data.train:
        raise UserError(f"{args.task} has no rows to train the classification head on: a train split, or --freeze-head")
    if tuned.params and not args.load:
        train(run, tuned, lr, record, os.path.join(args.out, f"{args.name}.state"))
    began, scores = time.perf_counter(), score(run, data.report)
    record["eval_s"] += time.perf_counter() - began
    every = max(1, math.ceil(record["step"] / 500))  # steps that an entry of loss_curve is the mean of
    chunks = [record["loss"][i : i + every] for i in range(0, record["step"], every)]
    total = sum(p.numel() for p in base_of(run.model).parameters()) - sum(p.numel() for p in tuned.inserted.values())
    cpu = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    result = {
        "score": next(iter(scores.values())), "metric": next(iter(scores)), "metrics": scores, "baselines": run.baselines,
        "best": record["best"], "tuned_params": size, "total_params": total, "density": size / total,
        "head_params": sum(p.numel() for p in tuned.head.values()), "head_trained": any(n in tuned.params for n in tuned.head),
        "loss_curve": [sum(chunk) / len(chunk) for chunk in chunks], "loss_every": every, "eval_curve": record["eval"],
        "seconds": {what: record[f"{what}_s"] for what in ("train", "eval")},
        "step_ms": 1e3 * record["train_s"] / record["step"] if record["step"] else None,
        "tokens_per_s": record["tokens"] / record["train_s"] if record["step"] else None,
        "peak_memory_bytes": peak_memory(args.device), "device": cpu if args.device == "cpu" else torch.cuda.get_device_name(),
        "processes": ranks()[1], "labels": list(data.words), "data": data.about, "model": run.facts,
        "arguments": {k: v for k, v in vars(args).items() if k not in ("name", "label")},
        "versions": {"python": platform.python_version()} | {m: version(m) for m in ("torch", "transformers", "numpy")},
        "apet_sha256": run.code, "date": time.strftime("%Y-%m-%dT%H:%M:%S"), "lr": lr,
    }  # fmt: skip
    from_rank_0(lambda: write_result(run, tuned, result))
    return result


def write_result(run: Run, tuned: Tuned, result: dict) -> None:
    """The delta, the result, a plain Hugging Face checkpoint; then the state has served."""
    args, file = run.args, os.path.join(run.args.out, run.args.name)
    about = {n: getattr(args, n) or "" for n in ("model", "task", "method", *DATA_FLAGS)}
    about |= {"format": "apet 2", "run": args.name, "insert": ",".join(args.insert), "labels": list(run.data.words)}
    if tuned.params and not args.load and (args.save or args.method != "full"):
        result["delta"] = args.save or f"{file}.safetensors"
        if tuned.apet:
            tuned.apet.save(result["delta"], tuned.inserted | tuned.head, **about)
        else:
            save_tensors(tuned.head | tuned.params, result["delta"], about)
    write_file(f"{file}.json", lambda temporary: Path(temporary).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    if args.export:
        run.model.save_pretrained(args.export)
        run.coder.tokenizer.save_pretrained(args.export)
    Path(f"{file}.state").unlink(missing_ok=True)


def table(results: list[tuple[argparse.Namespace, dict]]) -> str:
    """What a person wants to know, a line a run."""
    (args, r), row = results[0], "{:28}{:>11}{:>10}{:>8}{:>11}{:>10}{:>9}{:>9}{:>10}{:>9}".format
    guesses = f"random guess {r['baselines']['random_guess']:.3f}, majority {r['baselines']['majority']:.3f}"
    examples = f"{r['data']['report']}, {r['data']['sizes']['report']:,} examples"
    lines = [f"\n{args.model} on {args.task} ({examples}): {r['metric']}; {guesses}"]
    lines.append(row("run", "tuned", "of all", "lr", "best step", r["metric"], "seconds", "ms/step", "tokens/s", "peak MB"))
    for args, r in results:
        best, peak, seconds = r["best"] and r["best"]["step"], r["peak_memory_bytes"], r["seconds"]["train"] + r["seconds"]["eval"]
        numbers = (r["tuned_params"], r["density"], r["lr"], best, r["score"], seconds, r["step_ms"], r["tokens_per_s"])
        forms = (",", ".3%", ".2g", "", ".3f", ".1f", ".1f", ",.0f", ",.0f")
        said = ("" if x is None else format(x, form) for x, form in zip((*numbers, peak and peak / 1e6), forms, strict=True))
        lines.append(row(args.label, *said))
    delta = [f"delta   {r['delta']}"] if "delta" in r else []
    return "\n".join([*lines, f"result  {os.path.join(args.out, args.name)}.json", *delta])


def peak_memory(device: str) -> int | None:
    """Bytes of a run on all GPUs; on a CPU, of the process since it began, where the system is Linux."""
    if device != "cpu":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) if status.exists() else None


def say(text: str, each_rank: bool = False) -> None:
    """To the person, once for all processes; a terminal that is gone or full must not end a run."""
    if each_rank or ranks()[0] == 0:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def read_result(args: argparse.Namespace) -> dict | None:
    """The result of a run that is done, with its delta if it has one; else None."""
    file = Path(args.out, f"{args.name}.json")
    if not args.resume or args.export or not file.exists():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        table([(args, result)])  # it holds all that will be read
    except Exception:  # a file that is no result can fail in any way
        raise UserError(f"{file} is no result of apet.py, or a broken one: delete it, or run it anew with --no-resume") from None
    delta = args.save or file.with_suffix(".safetensors")
    with contextlib.suppress(UserError):
        if not (args.save or "delta" in result) or load_tensors(delta)[1].get("run") == args.name:
            return result
    say(f"{args.label}: its delta {delta} is not there; it runs anew")
    return None


def check_folders(args: argparse.Namespace) -> None:
    """What would fail after hours of training is known now: a folder that can't be made or written, a name too long."""
    first = os.path.join(args.out, f"{runs(args)[0].name}.safetensors")
    for file in filter(None, (first, args.export and os.path.join(args.export, "model.safetensors"), args.save)):
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        write_file(f"{file}.check", lambda temporary: None)
        Path(f"{file}.check").unlink(missing_ok=True)  # another process of the same command may have been faster


def sweep(args: argparse.Namespace) -> None:
    """Every run that the arguments ask for. Raises UserError, KeyboardInterrupt."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # now, as it may be edited while it runs
    from_rank_0(lambda: check_folders(args))
    data, failed = load_task(args), []
    revision = from_rank_0(lambda: model_revision(args.model))
    todo = runs(args, data.about["revision"], revision)
    done = from_rank_0(lambda: [read_result(own) for own in todo])
    if None in done:
        dropped = data.about.get("rows without text or label, dropped")
        say(f"loading {args.model}" + (f"; rows without text or label (or with -1) are left out: {dropped}" if dropped else ""))
        model, tokenizer, facts = load_model(args, data.words)
        facts["revision"] = revision
        coder = Coder(tokenizer, facts["family"], args.max_source_length, args.max_target_length)
        guesses = from_rank_0(lambda: baselines(data))
        for budget in args.budget if "apet" in args.method and not (args.load or args.insert) else ():
            parse_budget(budget, base_of(model))  # a wrong one is known before the first run
    for i in (i for i, result in enumerate(done) if result is None):
        title = f"[{i + 1}/{len(todo)}] {todo[i].label}"
        if len(todo) > 1:
            say(title)
        try:
            with contextlib.ExitStack() as undo:  # leaves the model as it was
                done[i] = run_one(Run(model, coder, data, facts, guesses, todo[i], code), undo)
        except (UserError, torch.OutOfMemoryError) as e:
            if len(todo) == 1 or ranks()[1] > 1:  # the other processes may know nothing of it
                raise
            say(f"{title} failed: {str(e).splitlines()[0]}")
            failed.append(todo[i].label)
    results = [(own, result) for own, result in zip(todo, done, strict=True) if result]
    try:
        if results and ranks()[0] == 0:
            print(table(results), flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries, and complains, once more when it ends
        raise UserError(f"can't print the table ({e}); the results are written, in {args.out}") from None
    if failed:
        raise UserError(f"{len(failed)} of {len(todo)} runs failed, for the reasons above: {', '.join(failed)}")


def main(argv: list[str] | None = None) -> int:
    """The command. 0: all went well; 2: the person can put it right; 130: interrupted; 1: what nobody foresaw."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    try:
        sweep(check_args(parser().parse_args(argv)))
        if ranks()[1] > 1:
            torch.distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        say("apet: interrupted; the same command continues", each_rank=True)
        return 130
    except Exception as e:
        if os.environ.get("APET_DEBUG") == "1":
            raise
        words, known = " ".join(str(e).split())[:500], isinstance(e, (UserError, OSError))  # of a disk, a name, a folder
        if isinstance(e, torch.OutOfMemoryError):
            words, known = "out of GPU memory: --gradient-checkpointing, --grad-accum 4 or --eval-batch-size 16 need less", True
        say(f"apet: error: {words if known else f'{type(e).__name__}: {words} (APET_DEBUG=1: more)'}", each_rank=True)
        return 2 if known else 1


if __name__ == "__main__":
    sys.exit(main())
