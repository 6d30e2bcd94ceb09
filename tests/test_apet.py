"""The class: what is tuned, what stays bit-identical, what is saved, and how it fits into other people's loops."""

import copy
import gc
import io
import json
import re
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import MODELS, ROOT, batch_for, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from apet import APET


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


def tune(model, batch, steps=5, lr=1e-2, optimizer=torch.optim.AdamW, **keywords):
    apet = APET(model, **keywords)
    steps_of = optimizer([apet.values], lr=lr)
    apet.attach(steps_of)
    for _ in range(steps):
        model(**batch).loss.backward()
        steps_of.step()
        steps_of.zero_grad()
    return apet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "hook", "gather"])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_positions_change_and_restore_is_bit_exact(name, backend, dtype):
    model = build(name, dtype=dtype)
    before = bits(model)
    apet = tune(model, batch_for(name, dtype=dtype), budget=300, backend=backend, lr=0.1)  # with AdamW's weight decay
    after = bits(model)
    changed = 0
    for n in before:
        chosen = torch.zeros(before[n].numel(), dtype=torch.bool)
        chosen[apet.positions.get(n, torch.empty(0, dtype=torch.int64))] = True
        differs = before[n].flatten() != after[n].flatten()
        assert not differs[~chosen].any()
        changed += int(differs[chosen].sum())
    assert changed > 250
    values = torch.cat([after[n].flatten()[i] for n, i in apet.positions.items()])
    assert torch.equal(values, apet.values.detach().to(dtype))  # written through, in the weights' dtype
    apet.restore()
    assert same(before, bits(model))
    apet.write()
    assert same(after, bits(model))


def test_values_start_at_the_pretrained_numbers_in_the_order_of_positions():
    model = build("t5")
    apet = APET(model, 200, seed=1)
    named = dict(model.named_parameters())
    assert torch.equal(apet.values.detach(), torch.cat([named[n].flatten()[i] for n, i in apet.positions.items()]))
    assert apet.values.shape == (200,) and apet.values.dtype == torch.float32 and apet.values.is_leaf


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_a_budget_of_everything_is_full_fine_tuning(name):
    full, model = build(name), build(name)
    batches = [batch_for(name, s) for s in range(6)]
    optimizer = torch.optim.AdamW(full.parameters(), lr=1e-3, weight_decay=0.1)
    apet = APET(model, "100%")
    ours = torch.optim.AdamW([apet.values], lr=1e-3, weight_decay=0.1)
    apet.attach(ours)
    for batch in batches:
        losses = [m(**batch).loss for m in (full, model)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        for o in (optimizer, ours):
            o.step()
            o.zero_grad()
    for a, b in zip(full.parameters(), model.parameters(), strict=True):
        # Adam divides by a gradient's own size: entries whose gradient is rounding noise may step either way
        assert (a - b).abs().gt(1e-4).float().mean() < 0.01


def test_bfloat16_steps_too_small_for_the_weight_add_up_in_the_fp32_copy():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    apet = APET(model, 1)
    optimizer = torch.optim.SGD([apet.values], lr=1e-4)
    for _ in range(100):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()  # gradient 1: in all 100 x 1e-4
        optimizer.step()
        apet.write()
        optimizer.zero_grad()
    assert apet.values.item() == pytest.approx(0.99, abs=1e-5)
    assert model.weight.item() == torch.tensor(0.99).to(torch.bfloat16).item() != 1.0


def test_gradients_accumulate_clip_and_reset_as_any_parameters():
    model, batch = build("t5"), batch_for("t5")
    apet = APET(model, 500)
    model(**batch).loss.backward()
    once = apet.values.grad.clone()
    model(**batch).loss.backward()
    torch.testing.assert_close(apet.values.grad, 2 * once, rtol=1e-4, atol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_([apet.values], 1e-3)
    assert norm == pytest.approx(2 * once.norm().item(), rel=1e-4) and apet.values.grad.norm() <= 1.001e-3
    torch.optim.SGD([apet.values], lr=1).zero_grad(set_to_none=True)
    assert apet.values.grad is None
    model(**batch).loss.backward()
    torch.testing.assert_close(apet.values.grad, once, rtol=1e-4, atol=1e-6)


def test_evaluation_without_gradients_leaves_no_trace():
    model, batch = build("t5").eval(), batch_for("t5")
    apet = APET(model, 500, backend="gather")
    with torch.no_grad():
        loss = model(**batch).loss
    assert not loss.requires_grad and apet.values.grad is None and not any(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        model.generate(batch["input_ids"], max_new_tokens=3)
    model(**batch).loss.backward()  # in eval mode
    assert apet.values.grad.abs().sum() > 0


def test_remove_leaves_nothing_behind_and_the_weights_as_they_are():
    model, batch = build("t5"), batch_for("t5")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.shared.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    apet = APET(model, 500, backend="gather")
    optimizer = torch.optim.AdamW([apet.values])
    apet.attach(optimizer)
    model(**batch).loss.backward()
    optimizer.step()
    tuned = bits(model)
    alive = weakref.ref(apet), weakref.ref(apet.values)
    apet.remove()
    assert same(tuned, bits(model))
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    del apet, optimizer
    gc.collect()
    assert [r() for r in alive] == [None, None]
    model(**batch).loss.backward()
    assert model.lm_head.weight.grad is None and model.encoder.block[0].layer[0].SelfAttention.q.weight.grad is not None


def test_the_model_saves_and_generates_as_its_own(tmp_path):
    model, batch = build("t5"), batch_for("t5")
    keys = list(model.state_dict())
    tune(model, batch, budget=2000, lr=0.1)
    assert list(model.state_dict()) == keys
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert same(bits(model), bits(again))
    assert torch.equal(*(m.generate(batch["input_ids"], max_new_tokens=5) for m in (model, again)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_saved_under_one_seed_loaded_under_another_gives_the_same_outputs(tmp_path, name, dtype):
    model, batch = build(name, dtype=dtype), batch_for(name, dtype=dtype)
    fresh = copy.deepcopy(model)
    apet = tune(model, batch, budget=400, seed=3, lr=0.1)
    apet.save(tmp_path / "d.safetensors")
    torch.manual_seed(1234)
    loaded = APET.load(fresh, tmp_path / "d.safetensors")
    assert torch.equal(loaded.values, apet.values) and same(bits(model), bits(fresh))
    assert all(torch.equal(loaded.positions[n], i) for n, i in apet.positions.items())
    assert loaded.about == {"mask": "random", "seed": "3", "where": "all"}
    if name != "conv":  # whose BatchNorm has seen more batches
        assert torch.equal(model(**batch).loss, fresh(**batch).loss)
    fresh(**batch).loss.backward()  # and it can be tuned on
    assert loaded.values.grad.abs().sum() > 0


def test_a_delta_is_small(tmp_path):
    with torch.device("meta"):
        import transformers as hf

        model = hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=32128, num_layers=24, num_heads=16, d_model=64, d_ff=128, d_kv=8)
        )
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.detach().zero_()  # memory that nobody has written may hold NaN
    for k in (1, 1000, 10_000, 100_000):
        apet = APET(model, k)
        apet.save(tmp_path / "d.safetensors")
        apet.remove()
        assert (tmp_path / "d.safetensors").stat().st_size <= 8 * k + 80 * len(apet.positions) + 500  # names and shapes


def test_a_delta_can_be_read_without_apet(tmp_path):
    model = build("bloom")
    apet = APET(model, 100)
    apet.save(tmp_path / "d.safetensors", task="sst2")
    with safe_open(tmp_path / "d.safetensors", "pt") as f:
        about, values, indices = json.loads(f.metadata()["apet"]), f.get_tensor("values"), f.get_tensor("indices")
    assert about["task"] == "sst2"
    layout = about["layout"]
    assert [n for n, _, _ in layout] == list(apet.positions) and values.shape == indices.shape == (100,)
    named = dict(model.named_parameters())
    parts = zip(layout, indices.split([c for _, _, c in layout]), strict=True)
    assert torch.equal(values, torch.cat([named[n].flatten()[i.long()] for (n, _, _), i in parts]))


def test_a_delta_for_another_model_is_a_clear_error(tmp_path):
    file = tmp_path / "d.safetensors"
    APET(build("t5-untied"), 5000).save(file)
    with pytest.raises(ValueError, match=r"made for another model: .* there and not in this one"):
        APET.load(build("t5"), file)
    APET(torch.nn.Linear(4, 5), 3).save(file)
    other = torch.nn.Linear(5, 4)
    before = bits(other)
    with pytest.raises(ValueError, match=r"'weight' is \(5, 4\) there and \(4, 5\) here"):
        APET.load(other, file)
    assert same(before, bits(other)) and all(p.requires_grad for p in other.parameters())


DAMAGE = ("missing", "empty", "text", "cut", "other", "pickle", "layout", "unsorted", "far")
DAMAGE += ("float", "bfloat16", "complex64", "uint8", "nan", "inf", "twice", "bomb", "no list", "no shape", "no name")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_delta_is_one_line(tmp_path, damage):
    file, model = tmp_path / "d.safetensors", torch.nn.Linear(4, 5)
    apet = APET(model, 3)
    apet.save(file)
    apet.remove()
    with safe_open(file, "pt") as f:
        tensors, about = {n: f.get_tensor(n) for n in ("values", "indices")}, f.metadata()

    def with_layout(layout):
        return {"apet": json.dumps({**json.loads(about["apet"]), "layout": layout})}

    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("{}" * 50)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "other":
        save_file({"lora_A": torch.zeros(3)}, file)
    elif damage == "pickle":
        torch.save({"values": torch.zeros(3)}, file)
    elif damage == "layout":
        save_file(tensors, file, with_layout("bm90IHppcHBlZA=="))
    elif damage == "unsorted":
        save_file({**tensors, "indices": torch.tensor([2, 2, 1], dtype=torch.int32)}, file, about)
    elif damage == "far":
        save_file({**tensors, "indices": tensors["indices"] + 1000}, file, about)
    elif damage in ("float", "bfloat16", "complex64", "uint8"):
        save_file({**tensors, "indices": tensors["indices"].to(getattr(torch, damage))}, file, about)
    elif damage in ("nan", "inf"):
        save_file({**tensors, "values": torch.tensor([0.0, float(damage), 0.0])}, file, about)
    elif damage == "twice":
        layout = with_layout([["weight", [5, 4], 1], ["weight", [5, 4], 2]])
        save_file({**tensors, "indices": torch.tensor([1, 2, 3], dtype=torch.int32)}, file, layout)
    elif damage == "bomb":
        save_file(tensors, file, {"apet": "[" * 100_000})
    elif damage == "no list":
        save_file(tensors, file, with_layout({"weight": 3}))
    elif damage == "no shape":
        save_file(tensors, file, with_layout([["weight", None, 3]]))
    elif damage == "no name":
        save_file(tensors, file, with_layout([[5, [2], 3]]))
    with pytest.raises(ValueError) as e:
        APET.load(model, file)
    assert "\n" not in str(e.value)
    APET(model, 3).remove()  # nothing of the attempt is left


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_bytes_a_delta_holds_it_loads_or_is_a_value_error(tmp_path_factory, data):
    file, model = tmp_path_factory.getbasetemp() / "fuzzed.safetensors", torch.nn.Linear(4, 5)
    apet = APET(model, 3)
    apet.save(file)
    apet.remove()
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    before = bits(model)
    try:
        loaded = APET.load(model, file)
    except ValueError as e:
        assert "\n" not in str(e) and same(before, bits(model)) and all(p.requires_grad for p in model.parameters())
    else:
        assert loaded.values.isfinite().all() and len(loaded.values) == 3


def test_two_saves_of_the_same_numbers_are_the_same_bytes(tmp_path):
    model = build("t5")
    apet = APET(model, 300)
    facts = {f"key {i}": f"text {i} ü" for i in range(20)}
    for name in "abc":
        apet.save(tmp_path / name, {"more": torch.ones(3)}, **facts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    with safe_open(tmp_path / "a", "pt") as f:
        assert json.loads(f.metadata()["apet"])["key 7"] == "text 7 ü" and torch.equal(f.get_tensor("values"), apet.values)


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    apet = APET(torch.nn.Linear(3, 3), 4)
    with torch.no_grad():
        apet.values[1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        apet.save(tmp_path / "delta")
    assert not list(tmp_path.iterdir())


def test_a_delta_has_the_rights_of_any_new_file_and_a_full_disk_is_one_line(tmp_path):
    apet = APET(torch.nn.Linear(30, 30), 500)
    apet.save(tmp_path / "delta")
    (tmp_path / "other").touch()
    assert (tmp_path / "delta").stat().st_mode == (tmp_path / "other").stat().st_mode
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError, match=r"^can't write [^\n]*$"):
            apet.save(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "other"]


def test_values_follow_a_checkpoint_that_was_loaded_into_the_model():
    model, batch = build("t5"), batch_for("t5")
    apet = APET(model, 500)
    saved = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([apet.values], lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    apet.write()
    assert not same(saved, bits(model))
    model.load_state_dict(saved)
    apet.read()
    apet.write()
    named = dict(model.named_parameters())
    assert all(torch.equal(named[n], saved[n]) for n in named)


def test_of_a_compiled_model_the_names_are_the_models_own():
    model = torch.nn.Sequential(torch.nn.Linear(30, 20))
    assert list(APET(torch.compile(model), 50, backend="gather").positions) == ["0.weight", "0.bias"]


def test_a_model_without_weights_is_an_error():
    with pytest.raises(ValueError, match="not dict"):
        APET({}, 2)
    with torch.device("meta"):
        model = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="meta device"):
        APET(model, 2)


def test_what_is_kept_stays_under_64_bytes_a_scalar():
    """Indices, originals, values, gradient and AdamW's moments, on a layer where the gather path keeps its own tables."""
    model = torch.nn.Sequential(torch.nn.Linear(2000, 2000, bias=False), torch.nn.Embedding(4000, 500))
    k = 100_000
    known = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    ids = {id(o) for o in known}
    apet = APET(model, k, backend="gather")
    model[0](torch.ones(1, 2000)).sum().backward()
    new = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and id(o) not in ids]
    flat = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in new if o.layout == torch.strided}
    sparse = sum(t.nbytes for o in new if o.layout == torch.sparse_csr for t in (o.crow_indices(), o.values()))
    assert sparse and apet.values.data_ptr() in flat  # the tables are among what was found
    gradient, moments = apet.values.grad.nbytes, 2 * apet.values.nbytes
    assert sum(flat.values()) + sparse + gradient + moments <= 64 * k


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop]
)
def test_every_torch_optimizer_lowers_the_loss(optimizer):
    model, batch = build("bert"), batch_for("bert")
    before = model(**batch).loss.item()
    tune(model, batch, steps=20, budget=3000, optimizer=optimizer, lr=1e-2)
    assert model(**batch).loss.item() < before


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face_trainer_takes_the_steps_of_a_loop_by_hand(tmp_path, accumulate):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, by_hand = build("t5"), build("t5")
    batch = {k: v[:1].repeat_interleave(8, 0) for k, v in batch_for("t5").items()}  # any order, any split gives the same mean
    rows = [{k: v[i] for k, v in batch.items()} for i in range(8)]
    before = bits(model)
    apet, other = APET(model, 2000), APET(by_hand, 2000)
    optimizer, others = torch.optim.SGD([apet.values], lr=0.1), torch.optim.SGD([other.values], lr=0.1)
    apet.attach(optimizer)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=8 // accumulate, report_to=[], save_strategy="no",
        gradient_accumulation_steps=accumulate, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    parts = accumulate if trainer.model_accepts_loss_kwargs else 1  # Trainer then leaves it to the model to divide by them
    start = other.values.detach().clone()
    for _ in range(5):
        others.zero_grad()
        (parts * by_hand(**batch).loss).backward()
        others.step()
        other.write()
    assert torch.allclose(apet.values - start, other.values - start, rtol=1e-3, atol=1e-6) and not torch.equal(start, apet.values)
    apet.restore()
    assert same(before, bits(model))


def test_lbfgs_moves_if_its_closure_writes():
    model, batch = build("bert"), batch_for("bert")
    apet = APET(model, 3000)
    optimizer = torch.optim.LBFGS([apet.values], lr=0.1)
    losses = []

    def closure():
        apet.write()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert losses[-1] < losses[0]


def test_one_apet_a_model_and_copies_are_plain():
    model, batch = build("t5"), batch_for("t5")
    apet = APET(model, 2000, backend="gather")
    for part in (model, model.encoder, torch.nn.Sequential(model)):  # else one would take the other's gradients
        with pytest.raises(ValueError, match="has an APET already"):
            APET(part, 10)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        other(**batch).loss.backward()  # a copy is a plain model: its gradients are autograd's, the APET sees none of them
        assert other.shared.weight.grad is not None and apet.values.grad is None and same(bits(model), bits(other))
        APET(other, 10).remove()
    apet.remove()
    APET(model, mask={"shared.weight": [1, 2]})


def test_the_first_part_of_the_file_trains_alone(tmp_path):
    source = (ROOT / "apet.py").read_text()
    (tmp_path / "part.py").write_text(source[: source.index("# The other methods")])
    use = """
import sys, torch, part
torch.manual_seed(0)
model, x, y = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 2)), torch.randn(64, 30), torch.randint(0, 2, (64,))
apet = part.APET(model, "20%", backend="gather")
optimizer = torch.optim.AdamW([apet.values], lr=1e-2, weight_decay=0)
apet.attach(optimizer)
losses = []
for _ in range(300):
    losses.append(torch.nn.functional.cross_entropy(model(x), y))
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < 0.8 * losses[0], (losses[0], losses[-1])
apet.save("delta")
apet.remove()
assert part.APET.load(model, "delta").values.equal(apet.values)
for mask in part.MASKS[:-1]:
    assert sum(map(len, part.select_positions(model, 100, mask).values())) == 100
try:
    part.APET(torch.nn.Linear(3, 2), 0)
except ValueError:
    pass
else:
    raise AssertionError("a budget of 0 was taken")
assert not {"transformers", "datasets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_the_fast_path_and_its_one_call_the_gradients_are_the_same(tmp_path):
    source = (ROOT / "apet.py").read_text()
    rule = "# " + "-" * 118 + "\n"
    start, end = (source.index(f"{rule}# {title}") for title in ("The fast path", "Positions"))
    plain = source[:start] + source[end:]
    assert plain.count("add_fast_path(") == 1 and source.index("class APET") < start
    plain = plain.replace("        add_fast_path(self, model, backend)\n", "")
    assert "add_fast_path" not in plain
    (tmp_path / "tests").mkdir()
    (tmp_path / "apet.py").write_text(plain)
    for name in ("conftest.py", "test_gradient.py"):
        (tmp_path / "tests" / name).write_text((ROOT / "tests" / name).read_text())
    chosen = "dense_gradient or outside_their_layer or any_entry or autocast"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, "tests/test_gradient.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) > 150, done.stdout


USE = """
import os
from typing import assert_type

import torch

from apet import APET, UserError, auto_lr, select_positions


def use(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, torch.Tensor]]) -> None:
    positions = select_positions(model, "0.1%", mask="gradient", seed=1, where="layers:0-3", batches=batches)
    assert_type(positions, dict[str, torch.Tensor])
    for apet in (APET(model, budget=10_000), APET(model, None, mask=positions, backend="hook"), APET.load(model, "x.safetensors")):
        assert_type(apet, APET)
        assert_type(apet.values, torch.nn.Parameter)
        assert_type(apet.positions, dict[str, torch.Tensor])
        torch.optim.AdamW([apet.values], lr=auto_lr("apet", apet.values.numel(), "seq2seq"))
        apet.attach(optimizer)
        assert_type(apet.write(), None)
        apet.save("x.safetensors")
        apet.restore()
        apet.remove()
    assert issubclass(UserError, ValueError)
"""
MISUSE = ("APET(model, budget=[1])", "APET('t5-small', 10)", "APET(model, 10).save(3)", "select_positions(model, 10, sead=1)")


def test_a_type_checker_knows_the_public_surface(tmp_path):
    def check(source):
        (tmp_path / "use.py").write_text(source)
        ty = [Path(sys.executable).parent / "ty", "check", "--python", sys.prefix, "--extra-search-path", ROOT, tmp_path / "use.py"]
        return subprocess.run(ty, capture_output=True, text=True, cwd=tmp_path)

    fine = check(USE)
    assert fine.returncode == 0, fine.stdout + fine.stderr
    for line in MISUSE:
        assert check(f"{USE}\n\ndef misuse(model: torch.nn.Module) -> None:\n    {line}\n").returncode == 1, line


def test_import_needs_no_module_that_windows_lacks(tmp_path):
    code = (
        "import sys, torch; sys.modules |= dict.fromkeys(('resource', 'fcntl')); sys.path.insert(0, sys.argv[1]); import apet; "
        "a = apet.APET(torch.nn.Linear(4, 3), 2); a.save('delta'); assert apet.peak_memory('cpu') >= 0"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "os.kill(" not in (ROOT / "apet.py").read_text()  # which would end the process on Windows


def test_an_optimizer_without_values_is_an_error_and_restore_follows_a_change_of_type():
    model = torch.nn.Linear(4, 3)
    apet = APET(model, 5)
    with pytest.raises(ValueError, match=r"does not hold apet\.values"):
        apet.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    before = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
    model.bfloat16()
    with torch.no_grad():
        apet.values += 1
    apet.write()
    assert not same(before, bits(model))
    apet.restore()
    assert same(before, bits(model))
