"""values.grad is autograd's dense gradient at the chosen entries, whatever the model, the budget and the path."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODELS, VOCAB, batch_for, build, dense_gradient
from torch import nn
from torch.utils import backend_registration

import apet as apet_module
from apet import APET


def expected(grads, apet):
    return torch.cat([grads[name].flatten()[index] for name, index in apet.positions.items()]).float()


def close(actual, wanted, rtol=1e-4):
    """To rtol of each entry, with an absolute floor for entries that are sums of cancelling terms."""
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item() + 1e-12)


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize("backend", ["auto", "hook", "gather"])
@pytest.mark.parametrize("budget", [1, 37, "10%", "100%"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_dense_gradient_over_two_accumulated_batches(name, budget, backend):
    model = build(name)
    batches = [batch_for(name, seed) for seed in (1, 2)]
    grads = dense_gradient(copy.deepcopy(model), batches)
    apet = APET(model, budget, seed=3, backend=backend)
    for batch in batches:
        model(**batch).loss.backward()
    close(apet.values.grad, expected(grads, apet))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["auto", "hook", "gather"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "conv"])
def test_equals_dense_gradient_under_checkpointing(name, backend):
    model = build(name)
    batch = batch_for(name)
    grads = dense_gradient(copy.deepcopy(model), [batch])
    apet = APET(checkpointed(model), "10%", backend=backend)
    for _ in range(2):
        model(**batch).loss.backward()
    close(apet.values.grad / 2, expected(grads, apet))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["hook", "gather"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_dense_gradient_in_bfloat16(name, backend):
    model = build(name, dtype=torch.bfloat16)
    batch = batch_for(name, dtype=torch.bfloat16)
    grads = dense_gradient(copy.deepcopy(model), [batch])
    apet = APET(model, "10%", backend=backend)
    model(**batch).loss.backward()
    assert apet.values.dtype == apet.values.grad.dtype == torch.float32
    close(apet.values.grad, expected(grads, apet), rtol=2e-2)  # bfloat16 has 8 bits: one rounding is 4e-3


@pytest.mark.parametrize("mask", ["row", "column", "block", "tensor"])
@pytest.mark.parametrize("name", ["t5", "gpt2", "conv"])
def test_equals_dense_gradient_for_structured_masks(name, mask):
    model = build(name)
    batch = batch_for(name)
    grads = dense_gradient(copy.deepcopy(model), [batch])
    apet = APET(model, 999, mask=mask, backend="gather")
    model(**batch).loss.backward()
    close(apet.values.grad, expected(grads, apet))


def test_gather_path_forms_no_weight_gradient_and_saves_only_chosen_columns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 16, bias=False))
    apet = APET(model, mask={"0.weight": [3, 5, 64 + 3], "1.weight": [0]}, budget=None, backend="gather")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(torch.randn(10, 64)).square().sum()
    weights = {p.data_ptr() for p in model.parameters()}
    activations = [t for t in saved if t.data_ptr() not in weights and t.shape != (10, 16)]  # the last: square's own
    assert sorted(t.numel() for t in activations) == [10 * 1, 10 * 2]  # tokens x distinct chosen columns
    model[0].weight.register_hook(lambda grad: pytest.fail("a weight gradient was formed"))
    loss.backward()
    assert apet.values.grad.shape == (4,)


class Unusual(nn.Module):
    """Weights that are used without calling the layer that holds them, or by layers with options."""

    def __init__(self, **embedding):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16, **embedding)
        self.tied = not self.embed.sparse  # autograd itself can't always add a sparse and a dense gradient
        self.called, self.functional = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)  # its out_proj is used functionally
        self.scaled = Scaled(16, 16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))

    def block(self, x):
        x = x + nn.functional.linear(x, self.functional.weight, self.functional.bias)
        x = x + self.called(input=x) + nn.functional.linear(x, self.called.weight)  # both ways
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.normed(self.scaled(x).tanh())

    def forward(self, input_ids, checkpoint=False):
        x = self.embed(input_ids)
        x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False) if checkpoint else self.block(x)
        logits = nn.functional.linear(x, self.embed.weight) if self.tied else x  # a tied head that is no module
        loss = logits.log_softmax(-1).square().mean()
        return type("Output", (), {"loss": loss})()


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_weights_used_outside_their_layer_get_their_whole_gradient(options, training, checkpoint):
    torch.manual_seed(0)
    model = Unusual(**options).train(training)
    ids = torch.randint(0, 8, (2, 9))  # tokens repeat, the padding index is among them
    grads = {n: g.to_dense() for n, g in dense_gradient(copy.deepcopy(model), [{"input_ids": ids}]).items()}
    for backend in ("gather", "auto"):
        apet = APET(model, "100%", backend=backend)
        for _ in range(2):
            model(input_ids=ids, checkpoint=checkpoint).loss.backward()
        close(apet.values.grad / 2, expected(grads, apet))
        apet.remove()


@pytest.mark.parametrize("backend", ["gather", "auto", "hook"])
def test_any_entry_and_a_second_backward_give_the_whole_gradient(backend):
    torch.manual_seed(0)
    model, ids = Unusual(), torch.randint(0, 8, (2, 9))
    grads = dense_gradient(copy.deepcopy(model), [{"input_ids": ids}])
    apet = APET(model, "100%", backend=backend)
    model.forward(ids).loss.backward()  # by a method: the model's own hooks are not run
    losses = model.forward(ids).loss, model(ids).loss
    losses[0].backward(retain_graph=True)
    losses[0].backward()
    losses[1].backward()
    close(apet.values.grad / 4, expected(grads, apet))


def test_tensors_of_no_tokens_and_frozen_inputs_are_no_error():
    model = nn.Linear(4, 4)
    apet = APET(model, 5, backend="gather")
    model(torch.zeros(0, 4)).sum().backward()
    model(torch.ones(4)).sum().backward()
    assert apet.values.grad.shape == (5,)


def test_the_gradient_is_added_to_whatever_tensor_values_grad_is():
    torch.manual_seed(0)
    model = build("conv")
    batch = batch_for("conv")
    grads = dense_gradient(copy.deepcopy(model), [batch])
    apet = APET(model, "10%", backend="gather")
    wanted = expected(grads, apet)
    for start in (0.0, 1.0, None, 2.0):
        apet.values.grad = None if start is None else torch.full_like(apet.values, start)
        for times in (1, 2):
            model(**batch).loss.backward()
            close(apet.values.grad - (start or 0.0), times * wanted)
    apet.values.grad.zero_()  # in place, as zero_grad(set_to_none=False) does
    model(**batch).loss.backward()
    close(apet.values.grad, wanted)


def test_autocast_gives_autograds_gradient():
    model = build("bert")
    batch = batch_for("bert")
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reference(**batch).loss
    loss.backward()
    apet = APET(model, "10%", backend="gather")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet), rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dot", [0.0, 1e9])  # sampled dot products; entry by entry
def test_each_way_to_a_linear_layers_gradient_gives_autograds(monkeypatch, dot, dtype):
    monkeypatch.setitem(apet_module.COST, "cpu", dict(entry=1e6, dot=dot, line=0, call=0))
    torch.manual_seed(0)
    layer, x = (
        nn.Linear(300, 200).to(dtype),
        torch.randn(9, 130, 300, dtype=dtype),
    )  # 1,170 tokens: more than are taken at once
    reference = copy.deepcopy(layer).double()
    for part in (x, x[0], x[0, 0]):  # many tokens, few, and a vector
        reference(part.double()).square().sum().backward()
    for budget in ("0.1%", 5_000):
        tuned = APET(layer, budget, where="weight", backend="gather")
        assert type(layer) is apet_module.TunedLinear and layer.tuned.sampled == (dot == 0 and dtype != torch.float64)
        for part in (x, x[0], x[0, 0]):
            layer(part).square().sum().backward()
        close(tuned.values.grad, expected({"weight": reference.weight.grad}, tuned), rtol=5e-2 if dtype == torch.bfloat16 else 1e-4)
        tuned.remove()


def test_device_map_moves_between_devices_as_accelerate_does():
    """accelerate wraps each module's forward; the layer's own hooks see inputs from before its move."""
    accelerate = pytest.importorskip("accelerate")
    model = build("t5")
    batch = batch_for("t5")
    grads = dense_gradient(copy.deepcopy(model), [batch])
    for p in model.parameters():
        p.requires_grad_(False)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"), append=True)
    apet = APET(model, "10%", backend="gather")
    model(**batch).loss.backward()
    close(apet.values.grad, expected(grads, apet))
    assert apet_module.TunedLinear.forward is model.encoder.block[0].layer[0].SelfAttention.q._old_forward.__func__  # gather


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs torch 2.13")
@pytest.mark.parametrize("what", ["models", "command"])
def test_a_model_over_two_devices_trains_as_on_one(what):
    pytest.importorskip("accelerate")
    line = [sys.executable, str(Path(__file__).parent / "second_device.py"), what]
    done = subprocess.run(line, capture_output=True, text=True)  # autograd knows no device that comes after a fork
    assert done.returncode == 0, done.stderr
