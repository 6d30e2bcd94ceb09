"""LoRA, Adapter, Prompt and BitFit: against peft where it has the method, against hand-made models where not."""

import contextlib
import copy
import re
from collections import Counter

import pytest
import torch
import transformers as hf
from conftest import batch_for, build
from torch import nn

import apet
from apet import (
    APET,
    COUNTED,
    LORA_ALPHA,
    LORA_RANK,
    PROMPT_TOKENS,
    UserError,
    add_prompt,
    base_of,
    insert,
    method_layers,
    method_parameters,
    own_biases,
    set_dropout,
)

TEXT = ("t5", "t5-untied", "bert", "bloom", "gpt2", "opt", "llama")


def new_parameters(model, method):
    model.requires_grad_(False)
    return {n: p.requires_grad_(True) for n, p in insert(model, [method]).named_parameters()}


def perturb(params):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in params.values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit"])
@pytest.mark.parametrize("name", TEXT)
def test_new_weights_have_no_effect_at_first_and_all_get_a_gradient(name, method):
    model, batch = build(name), batch_for(name)
    if method == "bitfit" and own_biases(model):
        return
    with torch.no_grad():
        before = model(**batch).loss
    params = new_parameters(model, method)
    loss = model(**batch).loss
    assert torch.equal(before, loss.detach())
    perturb(params)
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in params.items() if "key" not in n)
    model.inserted.undo()
    with torch.no_grad():
        assert torch.equal(before, model(**batch).loss)
    assert not any("inserted" in n for n in model.state_dict())


@pytest.mark.parametrize("method", COUNTED)
@pytest.mark.parametrize("name", TEXT)
def test_as_many_weights_are_inserted_as_are_counted(name, method):
    model = base_of(build(name))
    expected = method_parameters(model, method)
    if method == "bitfit" and own_biases(model):
        assert expected == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    else:
        assert sum(p.numel() for p in new_parameters(model, method).values()) == expected
        assert method_parameters(model, method) == expected  # what is inserted is not counted as the model's own


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = SMALL | {"intermediate_size": 48, "pad_token_id": 0}
GROUPED = NARROW | {"num_key_value_heads": 2, "head_dim": 8}
PAIRS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
MT5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
FAMILIES = {  # kind of model, its configuration, and what each of its blocks holds: q and v; the ends of its sub-layers
    "llama": ("CausalLM", GROUPED, "self_attn.q_proj self_attn.v_proj", "self_attn.o_proj mlp.down_proj"),
    "qwen3": ("CausalLM", GROUPED, "self_attn.q_proj self_attn.v_proj", "self_attn.o_proj mlp.down_proj"),
    "gemma3_text": ("CausalLM", GROUPED, "self_attn.q_proj self_attn.v_proj", "self_attn.o_proj mlp.down_proj"),
    "mistral": ("CausalLM", GROUPED, "self_attn.q_proj self_attn.v_proj", "self_attn.o_proj mlp.down_proj"),
    "gpt2": ("CausalLM", SMALL, "attn.c_attn", "attn.c_proj mlp.c_proj"),
    "gptj": ("CausalLM", SMALL | {"rotary_dim": 4}, "attn.q_proj attn.v_proj", "attn.out_proj mlp.fc_out"),
    "gpt_neox": ("CausalLM", NARROW, "attention.query_key_value", "attention.dense mlp.dense_4h_to_h"),
    "phi3": ("CausalLM", NARROW, "self_attn.qkv_proj", "self_attn.o_proj mlp.down_proj"),
    "opt": ("CausalLM", SMALL | {"ffn_dim": 48}, "self_attn.q_proj self_attn.v_proj", "self_attn.out_proj fc2"),
    "roberta": ("SequenceClassification", NARROW, "attention.self.query attention.self.value",
                "attention.output.dense output.dense"),
    "distilbert": ("SequenceClassification", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
                   "attention.q_lin attention.v_lin", "attention.out_lin ffn.lin2"),
    "albert": ("SequenceClassification", NARROW | {"embedding_size": 16, "num_hidden_groups": 2}, "attention.query attention.value",
               "attention.dense ffn_output"),
    "electra": ("SequenceClassification", NARROW | {"embedding_size": 16}, "attention.self.query attention.self.value",
                "attention.output.dense output.dense"),
    "modernbert": ("SequenceClassification", NARROW, "attn.Wqkv", "attn.Wo mlp.Wo"),
    "deberta": ("SequenceClassification", NARROW | PAIRS, "attention.self.in_proj", "attention.output.dense output.dense"),
    "deberta-v2": ("SequenceClassification", NARROW | PAIRS, "attention.self.query_proj attention.self.value_proj",
                   "attention.output.dense output.dense"),
    "bart": ("Seq2SeqLM", {"vocab_size": 64} | BART, "self_attn.q_proj self_attn.v_proj", "self_attn.out_proj fc2"),
    "mt5": ("Seq2SeqLM", {"vocab_size": 64} | MT5, "SelfAttention.q SelfAttention.v", "SelfAttention.o DenseReluDense.wo"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_and_adapter_find_the_layers_of_each_family_and_those_alone(name):
    kind, options, query_value, ends = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(hf, f"AutoModelFor{kind}").from_config(hf.AutoConfig.for_model(name, **options)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1]) if kind == "SequenceClassification" else ids}
    core, blocks = base_of(model), 4 if kind == "Seq2SeqLM" else 2
    for method, expected in (("lora", query_value.split()), ("adapter", ends.split())):
        with torch.no_grad():
            before = model(**batch).loss
        count = method_parameters(core, method)
        params = new_parameters(core, method)
        ends_of = [re.sub(r".*\.\d+\.", "", layer) for layer in method_layers(core, method)]
        assert Counter(ends_of) == dict.fromkeys(expected, blocks)
        assert sum(p.numel() for p in params.values()) == count
        loss = model(**batch).loss
        torch.testing.assert_close(loss, before)
        perturb(params)
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in params.values()) and loss != before
        core.inserted.undo()
    params = new_parameters(core, "prompt")
    if kind == "CausalLM":
        del batch["labels"]  # one for each token of the longer text would be wanted
    model(**add_prompt(model, batch)).logits.logsumexp(-1).sum().backward()
    assert params["prompt.prompt"].grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_model_of_no_known_family_is_told_which_are(method):
    with pytest.raises(UserError, match=f"{method} does not know the layers of Linear; it knows those of T5, BART, BERT"):
        method_parameters(nn.Linear(3, 3), method)


def test_a_prompt_is_for_models_that_read_tokens():
    with pytest.raises(UserError, match="prompt: ViTForImageClassification reads no tokens"):
        method_parameters(build("vit"), "prompt")


def test_a_prompt_starts_as_what_the_model_itself_makes_of_tokens():
    """Gemma multiplies what it looks up; its prompt must be of that size, too."""
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model("gemma3_text", **GROUPED))
    vectors = model.get_input_embeddings()(torch.arange(64))
    prompt = insert(model, ["prompt"])["prompt"].prompt
    assert all((row == vectors).all(1).any() for row in prompt)


def test_counting_draws_none_of_the_callers_random_numbers():
    model = build("bloom")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for method in COUNTED:
        method_parameters(model, method)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["t5", "bert", "bloom"])
def test_lora_equals_peft_from_the_same_numbers(name):
    peft = pytest.importorskip("peft")
    model, batch = build(name), batch_for(name)
    reference = copy.deepcopy(model)
    targets = {"t5": r".*SelfAttention\.[qv]", "bert": r".*attention\.self\.(query|value)", "bloom": ".*query_key_value"}[name]
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets, lora_dropout=0.0)
    wrapped = peft.get_peft_model(reference, config)
    ours = new_parameters(model, "lora")
    theirs = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    assert len(ours) == len(theirs)
    pairs = []
    for layer in method_layers(model, "lora"):
        for part, tail in (("A", "lora_A.default.weight"), ("B", "lora_B.default.weight")):
            pairs.append((ours[f"lora.{layer.replace('.', '_')}.{part}"], theirs[f"base_model.model.{layer}.{tail}"]))
    perturb(ours)
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    losses = [m(**batch).loss for m in (model, wrapped)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["t5", "bloom"])
def test_prompt_equals_peft_from_the_same_numbers(name):
    peft = pytest.importorskip("peft")
    model, batch = build(name), batch_for(name)
    reference = copy.deepcopy(model)
    kind = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=PROMPT_TOKENS)
    if name == "t5":
        config.num_transformer_submodules = 1  # the encoder's input alone
    wrapped = peft.get_peft_model(reference, config)
    theirs = next(p for p in wrapped.parameters() if p.requires_grad)
    ours = new_parameters(model, "prompt")["prompt.prompt"]
    with torch.no_grad():
        theirs.copy_(ours)
    extended = add_prompt(model, batch)
    if name == "bloom":  # peft adds the labels of the prompt itself; ours are aligned to the end of the rows
        extended["labels"] = torch.cat([torch.full((3, PROMPT_TOKENS), -100), batch["labels"]], dim=1)
    losses = [model(**extended).loss, wrapped(**batch).loss]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_prompt_comes_after_the_first_token_of_an_encoder_from_which_the_head_reads():
    model, batch = build("bert"), batch_for("bert")
    core = base_of(model)
    core.config.max_position_embeddings = 200
    core.embeddings.position_embeddings = nn.Embedding(200, 32)
    core.embeddings.register_buffer("position_ids", torch.arange(200)[None])
    core.embeddings.register_buffer("token_type_ids", torch.zeros(1, 200, dtype=torch.long))
    params = new_parameters(core, "prompt")
    extended = add_prompt(model, batch)
    embedded = core.get_input_embeddings()(batch["input_ids"])
    assert extended["inputs_embeds"].shape[1] == extended["attention_mask"].shape[1] == PROMPT_TOKENS + 7
    assert torch.equal(extended["inputs_embeds"][:, 0], embedded[:, 0])
    assert torch.equal(extended["inputs_embeds"][1, 1 : 1 + PROMPT_TOKENS], params["prompt.prompt"])
    model(**extended).loss.backward()
    assert params["prompt.prompt"].grad.abs().sum() > 0


def test_adapter_equals_a_model_with_adapters_in_its_forward():
    """A T5 whose sub-layers call a plain adapter module after their last linear layer."""
    model, batch = build("t5"), batch_for("t5")
    reference = copy.deepcopy(model)
    ours = new_parameters(model, "adapter")
    perturb(ours)

    class WithAdapter(nn.Module):
        def __init__(self, linear, name):
            super().__init__()
            self.linear, self.down, self.up = linear, nn.Linear(32, 24), nn.Linear(24, 32)
            for key in ("down", "up"):
                getattr(self, key).weight = nn.Parameter(ours[f"adapter.{name}.{key}"].detach().clone())
                getattr(self, key).bias = nn.Parameter(ours[f"adapter.{name}.{key}_bias"].detach().clone())
            self.weight = linear.weight

        def forward(self, x):
            h = self.linear(x)
            return h + self.up(nn.functional.gelu(self.down(h), approximate="tanh"))

    count = 0
    for n, m in list(reference.named_modules()):
        if n.endswith(("SelfAttention.o", "DenseReluDense.wo")):
            parent, _, child = n.rpartition(".")
            setattr(reference.get_submodule(parent), child, WithAdapter(m, n.replace(".", "_")))
            count += 1
    assert count == 2 * (2 + 2)  # self-attention and feed-forward, two layers of encoder and decoder
    losses = [m(**batch).loss for m in (model, reference)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for n, m in reference.named_modules():
        if isinstance(m, WithAdapter):
            torch.testing.assert_close(m.up.weight.grad, ours[f"adapter.{n.replace('.', '_')}.up"].grad)
            torch.testing.assert_close(m.down.bias.grad, ours[f"adapter.{n.replace('.', '_')}.down_bias"].grad)


def test_bitfit_of_a_model_without_biases_equals_real_biases():
    model, batch = build("t5"), batch_for("t5")
    reference = copy.deepcopy(model)
    ours = new_parameters(model, "bitfit")
    perturb(ours)
    real = {}
    for n, m in reference.named_modules():
        if isinstance(m, nn.Linear):
            m.bias = real[n] = nn.Parameter(ours[f"bitfit.{n.replace('.', '_')}.bias"].detach().clone())
    losses = [m(**batch).loss for m in (model, reference)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for n, bias in real.items():
        torch.testing.assert_close(ours[f"bitfit.{n.replace('.', '_')}.bias"].grad, bias.grad)


@pytest.mark.parametrize("name", ["t5", "bloom"])
def test_apet_chooses_among_inserted_weights_too(name):
    model = build(name)
    total = sum(p.numel() for p in model.parameters())
    new = sum(p.numel() for p in insert(model, ["lora", "adapter"]).parameters())
    apet = APET(model, "100%")
    assert len(apet.values) == total + new
    apet.remove()
    apet = APET(model, 300, where=r"^inserted\.")
    batch = batch_for(name)
    model(**batch).loss.backward()
    assert apet.values.grad.abs().sum() > 0 and all(n.startswith("inserted.") for n in apet.positions)


@pytest.mark.parametrize("name", ["t5", "bert", "bloom", "opt", "vit"])
def test_dropout_is_set_everywhere_functional_calls_included(name):
    model, batch = build(name), batch_for(name)
    set_dropout(model, 0.5)
    noisy = {model(**batch).loss.item() for _ in range(3)}
    set_dropout(model, 0.0)
    still = {model(**batch).loss.item() for _ in range(3)}
    assert len(noisy) == 3 and len(still) == 1


def test_each_method_gets_its_dropout_the_new_weights_too():
    model = build("t5")
    for method, expected in (("lora", 0.1), ("adapter", 0.1), ("full", 0.1), ("apet", 0.0)):
        args = apet.check_args(apet.parser().parse_args(["--model", "some/where", "--method", method, "--budget", "10"]))
        args.budget, args.mask, args.mask_seed, args.method = "10", "random", 0, method
        with contextlib.ExitStack() as undo:
            apet.prepare(model, args, undo)
            rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)} | {
                model.encoder.block[0].layer[0].SelfAttention.dropout
            }
            assert rates == {expected}


def test_by_gradient_every_process_tunes_what_rank_0_chose(monkeypatch):
    """Two GPUs may differ in the last bit of a gradient, and so in the order of all scalars that follow."""
    model, chosen = build("t5"), {"shared.weight": torch.tensor([3, 5]), "lm_head.weight": torch.tensor([1])}
    chosen = {n: i for n, i in chosen.items() if n in dict(model.named_parameters())}
    argv = ["--mask", "gradient", "--budget", str(sum(map(len, chosen.values()))), "--method", "apet"]
    args = apet.runs(apet.check_args(apet.parser().parse_args(argv)))[0]
    monkeypatch.setattr(apet, "from_rank_0", lambda read: chosen)
    with contextlib.ExitStack() as undo:
        tuned = apet.prepare(model, args, undo)
        assert list(tuned.apet.positions) == list(chosen) and tuned.apet.about["mask"] == "gradient"
        assert all(torch.equal(tuned.apet.positions[n], chosen[n]) for n in chosen)
