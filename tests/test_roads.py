"""However a tuned model is run, the gradient is right or there is one error that says so: the README's table "works with"."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, batch_for, build, dense_gradient, forked, ranks_of
from torch import nn

from apet import APET, TunedLinear, UserError

BACKENDS = ("auto", "hook", "gather")


def expected(grads, apet):
    return torch.cat([grads[name].flatten()[index] for name, index in apet.positions.items()]).float()


def close(actual, wanted, rtol=1e-4):
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item() + 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_with_copies_of_the_weights_counts_each_gradient_once(backend):
    model, batch = build("t5"), batch_for("t5")
    grads = dense_gradient(copy.deepcopy(model), [batch])
    apet = APET(model, "10%", backend=backend)
    copies = {n: p * 1.0 for n, p in model.named_parameters()}
    torch.func.functional_call(model, copies, kwargs=batch, tie_weights=True).loss.backward()
    close(apet.values.grad, expected(grads, apet))


@pytest.mark.parametrize("backend", BACKENDS)
def test_replicas_as_data_parallel_makes_them_give_the_whole_gradient(backend):
    """DataParallel's replicas share a layer's __dict__, and their weights are copies that lead back to the parameters."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(8, 30)
    reference = copy.deepcopy(model)
    reference(x).square().sum().backward()
    apet = APET(model, "30%", backend=backend)
    for part in (x[:4], x[4:]):
        replica = model._replicate_for_data_parallel()
        replica._modules = {}
        for name, layer in model._modules.items():
            twin = replica._modules[name] = layer._replicate_for_data_parallel()
            for key, p in layer._parameters.items():
                setattr(twin, key, p * 1.0)
        replica(part).square().sum().backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reentrant_checkpointing_gives_the_whole_gradient(backend):
    model, batch = build("t5"), batch_for("t5")
    grads = dense_gradient(copy.deepcopy(model), [batch])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    apet = APET(model, "10%", backend=backend)
    model.enable_input_require_grads()  # which reentrant checkpointing needs, with or without APET
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            model(**batch).loss.backward()
    close(apet.values.grad / 2, expected(grads, apet))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 5, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x *= 3
        x = self.first(x)
        x /= 3
        y = self.last(nn.functional.relu_(x))
        y += 1
        return y


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_changed_in_place_two_losses_and_a_retained_graph(backend):
    torch.manual_seed(0)
    model, ids = InPlace(), torch.randint(0, 9, (2, 7))
    reference = copy.deepcopy(model)
    apet = APET(model, "50%", backend=backend)
    for m in (reference, model):
        y = m(ids)
        y.square().sum().backward(retain_graph=True)
        (y[0].sum() + m(ids).tanh().sum()).backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet))


@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_token_ids_that_change_in_place_after_the_forward_pass_change_no_gradient(backend):
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(600, 20), nn.Linear(20, 3)), torch.randint(0, 600, (4, 7))
    reference = copy.deepcopy(model)
    reference(ids).square().sum().backward()
    apet = APET(model, 2000, backend=backend)
    loss = model(ids).square().sum()
    ids.zero_()
    loss.backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet))


@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_autograd_grad_of_inputs_leaves_values_alone_and_of_values_is_an_error(backend):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)), torch.randn(8, 30, requires_grad=True)
    reference = copy.deepcopy(model)
    apet = APET(model, 40, mask="random", where="weight", backend=backend)
    (wanted,) = torch.autograd.grad(reference(x).square().sum(), [x])
    (got,) = torch.autograd.grad(model(x).square().sum(), [x])
    torch.testing.assert_close(got, wanted)
    assert apet.values.grad is None
    with pytest.raises(RuntimeError, match="not have been used"):  # torch's own: values are no part of the graph
        torch.autograd.grad(model(x).square().sum(), [apet.values])
    model(x).square().sum().backward()
    reference(x).square().sum().backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet))


def test_a_backward_pass_to_chosen_inputs_leaves_values_alone_and_second_derivatives_are_an_error():
    model, batch = build("t5"), batch_for("t5")
    apet = APET(model, 300, backend="gather")
    model(**batch).loss.backward(inputs=[model.shared.weight])
    assert apet.values.grad is None
    model.shared.weight.grad = None
    with pytest.raises(UserError, match="no second derivatives"):
        model(**batch).loss.backward(create_graph=True)
    assert apet.values.grad is None
    grads = dense_gradient(copy.deepcopy(model), [batch])  # a copy is plain
    model(**batch).loss.backward()  # and what the failed ones left does not count
    close(apet.values.grad, expected(grads, apet))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_to_the_weights_themselves_leaves_values_alone(backend):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)), torch.randn(8, 30)
    apet = APET(model, 100, backend=backend)
    model(x).square().sum().backward(inputs=[p for p in model.parameters() if p.requires_grad])
    assert apet.values.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_failed_backward_pass_and_zero_grad_took_is_in_no_later_gradient(backend):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)), torch.randn(8, 30)
    reference = copy.deepcopy(model)
    apet = APET(model, 100, backend=backend)
    apet.attach(torch.optim.SGD([apet.values]))

    def fail(grad):
        raise RuntimeError("on the way")

    model(x).square().sum().backward()
    h = model[0](x)
    h.register_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        model[1](h).square().sum().backward()
    model.zero_grad()
    for m in (reference, model):
        m(x).square().sum().backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_keep_their_graph_add_up_on_the_hook_path():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)), torch.randn(8, 30)
    reference = copy.deepcopy(model)
    apet = APET(model, 100, backend="hook")
    apet.attach(torch.optim.SGD([apet.values]))
    for part in (x[:4], x[4:]):
        model(part).square().sum().backward(create_graph=True)
    reference(x).square().sum().backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_algorithms_write_the_same_numbers(backend):
    model, batch = build("t5"), batch_for("t5")
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)  # a weight that is not contiguous
    apet, other = APET(model, 200, backend=backend), APET(conv, 30)
    torch.use_deterministic_algorithms(True)
    try:
        model(**batch).loss.backward()
        for a in (apet, other):
            with torch.no_grad():
                a.values += 1
            a.write()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, m in ((apet, model), (other, conv)):
        named = dict(m.named_parameters())
        assert torch.equal(a.values.detach(), torch.cat([named[n].detach().flatten()[i] for n, i in a.positions.items()]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_gradscaler_skips_leaves_nothing_for_the_next_one(accumulate):
    """Under Trainer, whose model.zero_grad() does not know values."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    apet = APET(model, 6)
    optimizer = torch.optim.SGD([apet.values], lr=0.1)
    apet.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    start = apet.values.detach().clone()
    for bad in (True, False):
        for _ in range(accumulate):
            scaler.scale(model(x * (float("inf") if bad else 1)).square().sum()).backward()
            bad = False  # one micro-batch that is not finite spoils the whole step
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        if torch.equal(apet.values.detach(), start):
            assert not apet.values.grad.isfinite().all()
    reference = nn.Linear(4, 3)
    reference.load_state_dict({n: p.detach() for n, p in model.state_dict().items()})
    apet.restore()
    reference.load_state_dict(model.state_dict())
    (accumulate * reference(x).square().sum()).backward()
    wanted = start - 0.1 * expected({n: p.grad for n, p in reference.named_parameters()}, apet)
    torch.testing.assert_close(apet.values.detach(), wanted)


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_compiled_whole_gives_the_same_gradient(name, backend):
    torch._dynamo.reset()
    model, batch = build(name), batch_for(name)
    if name == "t5":
        batch["use_cache"] = False
    grads = dense_gradient(copy.deepcopy(model), [batch])
    apet = APET(model, "10%", backend=backend)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(**batch).loss.backward()
    close(apet.values.grad / 2, expected(grads, apet))


def test_inductor_compiles_tuned_layers_without_a_graph_break():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, ids = InPlace(), torch.randint(0, 9, (2, 7))
    reference = copy.deepcopy(model)
    reference(ids).square().sum().backward()
    apet = APET(model, "50%", backend="gather")
    torch.compile(model, backend="inductor", fullgraph=True)(ids).square().sum().backward()
    close(apet.values.grad, expected({n: p.grad for n, p in reference.named_parameters()}, apet))


def test_a_model_saved_whole_loads_where_apet_is_not(tmp_path):
    model = nn.Sequential(nn.Embedding(600, 8), nn.Linear(8, 50))
    APET(model, 900, backend="gather")
    assert type(model[1]) is TunedLinear
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); assert 'apet' not in sys.modules; "
        "m(torch.arange(3)).sum().backward(); assert type(m[1]) is torch.nn.Linear and m[1].weight.grad is not None"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_that_moved_and_parameters_that_were_replaced_are_errors():
    model = nn.Linear(4, 3)
    apet = APET(model, 5)
    model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)
    with pytest.raises(UserError, match="replaced"):
        apet.write()


SEVERAL = """
import copy, json, os, sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import batch_for, build
from apet import APET
dist.init_process_group("gloo")
rank, facts = dist.get_rank(), {{}}
batch = batch_for("t5", size=4)
batch["attention_mask"][:] = 1
mine = {{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}}
parts = [{{k: v[i : i + 1] for k, v in mine.items()}} for i in range(2)]

def loop(forward, apet, optimizer, backward=lambda loss: loss.backward()):
    apet.attach(optimizer)
    for step in range(3):
        for part in parts:  # gradient accumulation
            backward(forward(**part).loss / 2)
        optimizer.step()
        optimizer.zero_grad()
    return apet.values.detach()

def tuned(backend, wrap=None):
    model = build("t5")
    if wrap == "before":
        model = torch.nn.parallel.DistributedDataParallel(model)
    apet = APET(model, 2000, backend=backend)
    optimizer = torch.optim.SGD([apet.values], lr=0.5)
    if wrap == "after":
        model = torch.nn.parallel.DistributedDataParallel(model)
    if wrap == "accelerate":
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        return loop(model, apet, optimizer, accelerator.backward)
    return loop(model, apet, optimizer)

for backend in ("auto", "hook", "gather"):
    alone = build("t5")
    apet = APET(alone, 2000, backend=backend)
    optimizer = torch.optim.SGD([apet.values], lr=0.5)
    for step in range(3):  # the reference: all rows in one process
        for i in range(4):
            (alone(**{{k: v[i : i + 1] for k, v in batch.items()}}).loss / 4).backward()
        optimizer.step()
        apet.write()
        optimizer.zero_grad()
    for wrap in (None, "before", "after", "accelerate"):
        values = tuned(backend, wrap)
        both = [torch.empty_like(values) for _ in range(2)]
        dist.all_gather(both, values)
        difference, size = (values - apet.values).abs().max().item(), apet.values.abs().max().item()
        facts[f"{{backend}} {{wrap}}"] = [torch.equal(*both), difference, size]

model = torch.nn.Linear(4, 3)  # a loss that is not finite on one rank alone: both skip the step
torch.nn.init.ones_(model.weight)
apet = APET(model, 6)
optimizer = torch.optim.SGD([apet.values], lr=0.1)
apet.attach(optimizer)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
for step in range(2):
    x = torch.ones(5, 4) * (float("inf") if rank == 1 and step == 0 else 1)
    scaler.scale(model(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    model.zero_grad()
    facts[f"scaler {{step}}"] = apet.values.tolist()
if rank == 0:
    print(json.dumps(facts))
dist.destroy_process_group()
"""


def several(tmp_path, code):
    """What rank 0 of two processes says."""
    (tmp_path / "run.py").write_text(code.format(root=str(ROOT)))
    line, pipes = [sys.executable, str(tmp_path / "run.py")], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(line, preexec_fn=forked(line, environment), **pipes) for environment in ranks_of(2)]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return json.loads([line for line in said[0][0].splitlines() if line.startswith("{")][-1])


def test_several_processes_step_as_one_with_all_the_rows(tmp_path):
    """Without a wrapper, with DDP around the model before and after APET, and with accelerate; each with accumulation."""
    pytest.importorskip("accelerate")
    facts = several(tmp_path, SEVERAL)
    finite, skipped = facts.pop("scaler 1"), facts.pop("scaler 0")
    for name, (same, difference, size) in facts.items():
        assert same and difference < 1e-5 * size, (name, same, difference)
    assert len(facts) == 12 and all(abs(v) < 1e9 for v in finite) and finite != skipped


TRAINER = """
import json, sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import batch_for, build
from apet import APET
from transformers import Trainer, TrainingArguments
batch = {{k: v[:1].repeat_interleave(8, 0) for k, v in batch_for("t5").items()}}
rows, facts = [{{k: v[i] for k, v in batch.items()}} for i in range(8)], {{}}

def train(model, optimizer, steps):
    arguments = TrainingArguments(output_dir=OUT, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        max_grad_norm=0.0)
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()

full = build("t5")  # the reference: a step of full fine-tuning, by torch's own DDP
train(full, torch.optim.SGD(full.parameters(), lr=0.1), 1)
named = dict(full.named_parameters())
for backend in ("auto", "hook", "gather"):
    for steps in (1, 4):
        model = build("t5")
        apet = APET(model, 2000, backend=backend)
        start, optimizer = apet.values.detach().clone(), torch.optim.SGD([apet.values], lr=0.1)
        apet.attach(optimizer)
        train(model, optimizer, steps)
        values = apet.values.detach()
        both = [torch.empty_like(values) for _ in range(2)]
        dist.all_gather(both, values)
        wanted = torch.cat([named[n].detach().flatten()[i] for n, i in apet.positions.items()])
        difference, moved = (values - wanted).abs().max().item(), (start - wanted).abs().max().item()
        facts[f"{{backend}} {{steps}}"] = [torch.equal(*both), difference, moved]
if dist.get_rank() == 0:
    print(json.dumps(facts))
dist.destroy_process_group()
"""


def test_trainer_on_two_processes_takes_the_step_of_full_fine_tuning_at_the_positions(tmp_path):
    pytest.importorskip("accelerate")
    facts = several(tmp_path, TRAINER.replace("OUT", repr(str(tmp_path))))
    assert len(facts) == 6
    for name, (same, difference, moved) in facts.items():
        assert same and (difference < 1e-3 * moved or name.endswith("4")), (name, same, difference, moved)


def test_sharded_models_are_an_error_that_says_so(tmp_path):
    facts = several(
        tmp_path,
        """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from apet import APET, UserError
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
facts = {{}}
model = torch.nn.Linear(8, 8)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
apet = APET(model, 5, backend="gather")
fully_shard(model, mesh=mesh)
try:
    apet.write()
except UserError as e:
    facts["sharded afterwards"] = str(e)
model = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)
try:
    APET(model, 5)
except UserError as e:
    facts["sharded before"] = str(e)
if dist.get_rank() == 0:
    print(json.dumps(facts))
dist.destroy_process_group()
""",
    )
    assert "replaced" in facts["sharded afterwards"] and "sharded" in facts["sharded before"]
