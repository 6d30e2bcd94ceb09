"""A second device on a machine that has one: its tensors wrap CPU tensors, and no operation takes those of both devices.

    python tests/second_device.py models     # APET on models whose layers lie there, against autograd in one place
    python tests/second_device.py command    # the whole command, the encoder there, against the command in one place

test_gradient.py runs it in a process of its own, as torch takes such a device for the machine's accelerator from then on. The
registration is torch's experimental one for backends written in Python (torch 2.13).
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import batch_for, build
from torch import Tensor, library, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import apet
from apet import APET

_setup_privateuseone_for_python_backend("second")
SECOND = torch.device("second:0")


class Second(Tensor):
    """A tensor on the second device; `raw` holds its numbers."""

    @staticmethod
    def __new__(cls, raw: Tensor):
        layout = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=SECOND)
        tensor = Tensor._make_wrapper_subclass(cls, raw.size(), **layout)
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return on_second(op, *args, **(kwargs or {}))


def on_second(op, *args, **kwargs):
    """Run an operation on the wrapped tensors; what comes out lies on the second device, unless it was moved."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    if "copy" not in op._schema.name and any(t.dim() and not isinstance(t, Second) for t in tensors):
        raise RuntimeError(f"{op} wants its tensors on one device")
    device = torch.device(kwargs.get("device") or (SECOND if any(isinstance(t, Second) for t in tensors) else "cpu"))
    kwargs = kwargs | ({"device": "cpu"} if kwargs.get("device") else {})
    args, kwargs = tree_map(lambda t: t.raw if isinstance(t, Second) else t, (args, kwargs))
    known = {id(t.raw if isinstance(t, Second) else t): t for t in tensors}

    def wrap(t):
        if not isinstance(t, Tensor) or id(t) in known:
            return known.get(id(t), t)
        return Second(t) if device.type == "second" else t

    return tree_map(wrap, op(*args, **kwargs))


factories = library.Library("_", "IMPL")
factories.fallback(on_second, "PrivateUse1")


def split(model: nn.Module) -> nn.Module:
    """The layers (T5: the encoder's) on the second device, with accelerate's hooks, as a device map leaves a model."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    layers.to(SECOND)
    for module in model.modules():
        if own := {p.device for p in module._parameters.values() if p is not None}:
            add_hook_to_module(module, AlignDevicesHook(execution_device=own.pop()))
    for layer in layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device=SECOND, io_same_device=True))
    add_hook_to_module(model, AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True))
    assert {p.device.type for p in model.parameters()} == {"cpu", "second"}
    return model


def check_gradients_and_weights(name: str, backend: str) -> None:
    model, batch = build(name), batch_for(name)
    model.config.use_cache = False
    reference, pretrained = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    grads = {}
    for n, p in reference.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, n=n: grads.update({n: p.grad}))
    reference(**batch).loss.backward()
    tuned = APET(split(model), "10%", backend=backend)
    optimizer = torch.optim.SGD([tuned.values], lr=0.1)
    tuned.attach(optimizer)
    model(**batch).loss.backward()
    wanted = torch.cat([grads[n].flatten()[i] for n, i in tuned.positions.items()])
    torch.testing.assert_close(tuned.values.grad.cpu(), wanted, rtol=1e-4, atol=1e-6)
    start = tuned.values.detach().cpu().clone()
    optimizer.step()
    now = {n: p.detach().cpu() for n, p in model.named_parameters()}
    for n, index in tuned.positions.items():
        pretrained[n].view(-1)[index] -= 0.1 * grads[n].flatten()[index]
        torch.testing.assert_close(now[n], pretrained[n])
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(f"{folder}/delta")
        tuned.restore()
        tuned.remove()
        again = APET.load(model, f"{folder}/delta", backend=backend)
        assert all(torch.equal(p.detach().cpu(), now[n]) for n, p in model.named_parameters())
        again.restore()
    assert not torch.equal(again.values.detach().cpu(), start)


def check_command() -> None:
    load, results = apet.load_model, []
    for split_it in (False, True):
        if split_it:
            apet.load_model = lambda *args: (lambda model, *rest: (split(model), *rest))(*load(*args))
        with tempfile.TemporaryDirectory() as out:
            small = "--model toy-tiny --steps 6 --train-size 64 --eval-size 32 --eval-every 3 --method apet,full,lora --budget 1e3"
            for task in ("toy-inference", "toy-qa"):
                assert apet.main([*small.split(), "--task", task, "--out", out]) == 0
            results.append({f.name: json.loads(f.read_text()) for f in Path(out).glob("*.json")})
    assert len(results[0]) == 6 and results[0].keys() == results[1].keys()
    for name, one in results[0].items():
        torch.testing.assert_close(
            torch.tensor(results[1][name]["loss_curve"]), torch.tensor(one["loss_curve"]), rtol=1e-3, atol=1e-4
        )
        assert abs(results[1][name]["score"] - one["score"]) < 0.05


if __name__ == "__main__":
    if sys.argv[1] == "command":
        check_command()
    for name in ("t5", "t5-untied", "bert", "bloom") if sys.argv[1] == "models" else ():
        for backend in ("auto", "hook", "gather"):
            check_gradients_and_weights(name, backend)
