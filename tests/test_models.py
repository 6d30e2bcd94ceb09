"""Every family that transformers loads, through a folder: what is trained, scored and written, and what is refused."""

import builtins
import json
import math
import shutil
import time
import traceback

import pytest
import standin
import torch
import transformers as hf
from conftest import TOY, build
from tokenizers import processors
from torch.utils._python_dispatch import TorchDispatchMode

import apet

TOKENS = len(standin.bpe_tokenizer(pad="<pad>"))
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SMALL = {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 300}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 300,
        "decoder_start_token_id": 2, "dropout": 0.0, "init_std": 0.2}  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, **IDS),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, **IDS),
    "gemma3": lambda: hf.Gemma3TextConfig(**GROUPED, **IDS),
    "mistral": lambda: hf.MistralConfig(**GROUPED, **IDS),
    "gpt2": lambda: hf.GPT2Config(vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=300, **IDS),
    "opt": lambda: hf.OPTConfig(
        vocab_size=TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=300,
        word_embed_proj_dim=32, **IDS,
    ),
    "bart": lambda: hf.BartConfig(**BART, **IDS),
    "mt5": lambda: hf.MT5Config(vocab_size=TOKENS, decoder_start_token_id=3, **T5, **IDS),
    "byt5": lambda: hf.T5Config(vocab_size=384, decoder_start_token_id=0, **T5),
    "bert": lambda: hf.BertConfig(**SMALL, pad_token_id=3),
    "roberta": lambda: hf.RobertaConfig(**SMALL | {"max_position_embeddings": 304}, type_vocab_size=1, **IDS),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=TOKENS, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=300, pad_token_id=3
    ),
    "albert": lambda: hf.AlbertConfig(**SMALL, embedding_size=16, **IDS),
    "electra": lambda: hf.ElectraConfig(**SMALL, embedding_size=16, pad_token_id=3),
    "modernbert": lambda: hf.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2, **IDS),
    "deberta-v2": lambda: hf.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, pad_token_id=3
    ),
}  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "albert", "electra", "modernbert", "deberta-v2")
WRITERS = tuple(n for n in CONFIGS if n not in ENCODERS)
WORDS = ("no", "yes it is")
TEXTS = ("a movie", "who wrote the book and where did they say it", "no")


def save(name, folder, **config_json):
    """A tiny random model and a tokenizer of its family; then other entries into its config.json."""
    kind = hf.AutoModelForSeq2SeqLM if name in ("bart", "mt5", "byt5") else hf.AutoModelForCausalLM
    torch.manual_seed(0)
    model = (hf.AutoModelForSequenceClassification if name in ENCODERS else kind).from_config(CONFIGS[name]())
    if name == "bart":
        model.generation_config.forced_bos_token_id = 1
    model.save_pretrained(folder)
    tokenizer = hf.ByT5Tokenizer() if name == "byt5" else standin.bpe_tokenizer(pad="<pad>")
    if name in (*ENCODERS, "bart", "mt5"):
        first = "" if name == "mt5" else "<s> "
        tokenizer.sep_token, tokenizer.cls_token = "</s>", "<s>"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}$A </s>", pair=f"{first}$A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer.save_pretrained(folder)
    if name in ENCODERS:  # whether the model knows segments or not, as many tokenizers do
        names = ["input_ids", "token_type_ids", "attention_mask"]
        change(folder / "tokenizer_config.json", model_input_names=names)
    change(folder / "config.json", **config_json)
    return folder


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def load(folder, *argv, words=WORDS):
    """(model without dropout, coder)"""
    args = apet.check_args(apet.parser().parse_args(["--model", str(folder), "--method", "none", "--dtype", "fp32", *argv]))
    model, tokenizer, facts = apet.load_model(args, words)
    apet.set_dropout(model, 0.0)
    return model, apet.Coder(tokenizer, facts["family"], 64, 8)


def examples(*texts):
    return [apet.Example((t,), t, WORDS[i % 2], i % 2, (WORDS[i % 2],)) for i, t in enumerate(texts)]


def encoded(coder, chosen):
    return [coder.source(e) for e in chosen], [coder.target(e) for e in chosen]


def nll(model, coder, batch):
    return -apet.token_logp(model, coder, batch).sum()


def by_hand(model, coder, source, target):
    """Log-probability of a target's tokens from one forward without padding, in float64."""
    if coder.family == "encoder":
        return model(torch.tensor([source])).logits[0].double().log_softmax(-1)[target[0]]
    if coder.family == "causal":
        logits = model(torch.tensor([source + target])).logits[0, len(source) - 1 : -1]
    else:
        before = [model.config.decoder_start_token_id, *target[:-1]]
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([before])).logits[0]
    return logits.double().log_softmax(-1)[range(len(target)), target].sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_scores_and_text_of_a_batch_are_those_of_its_rows_alone(tmp_path, name):
    model, coder = load(save(name, tmp_path))
    chosen = examples(*TEXTS)
    sources, targets = encoded(coder, chosen)
    for p in model.parameters():
        p.requires_grad_(True)
    loss = nll(model, coder, coder.batch(sources, targets, "cpu"))
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = -sum(by_hand(model, coder, s, t) for s, t in zip(sources, targets, strict=True))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-3)
    for n, p in model.named_parameters():
        assert p.grad is None or torch.allclose(got[n], p.grad, atol=1e-3 * max(1, p.grad.abs().max().item())), n
    model.eval()
    scores = apet.label_scores(model, coder, sources, WORDS, "cpu")
    if name in ENCODERS:
        scores = scores.log_softmax(1)
    labels = [[i] if name in ENCODERS else coder.written(w) for i, w in enumerate(WORDS)]
    with torch.no_grad():
        wanted = [[by_hand(model, coder, s, t).item() for t in labels] for s in sources]
    assert torch.allclose(scores, torch.tensor(wanted), atol=1e-3)
    if name not in ENCODERS:
        data = apet.Data("t", (), "squad", chosen, [], chosen, {})
        assert apet.predict(model, coder, data, chosen, 3, "cpu") == apet.predict(model, coder, data, chosen, 1, "cpu")


class Waits(TorchDispatchMode):
    """Collects where apet.py itself asks a tensor for its number, for which a GPU would be waited."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            if frames[-1].filename == apet.__file__:
                self.places.append(frames[-1].line)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "byt5", "bart", "bert"])
def test_nothing_waits_for_the_device_between_a_batch_and_its_loss(tmp_path, name):
    model, coder = load(save(name, tmp_path))
    sources, targets = encoded(coder, examples(*TEXTS))
    with Waits() as waits:
        assert apet.token_logp(model, coder, coder.batch(sources, targets, "cpu")).shape[0] == len(TEXTS)
        nll(model, coder, coder.batch(sources, targets, "cpu")).backward()
        apet.label_scores(model, coder, sources, WORDS, "cpu")
    assert waits.places == []
    with Waits() as waits:  # it would be seen
        eval(compile("bool(x)", apet.__file__, "eval"), {"x": torch.ones(())})
    assert len(waits.places) == 1


@pytest.mark.parametrize("name", ["llama", "byt5", "bert", "deberta-v2"])
def test_the_model_computes_no_loss_of_its_own(tmp_path, name):
    model, coder = load(save(name, tmp_path))
    outputs = []
    model.register_forward_hook(lambda module, args, kwargs, output: outputs.append((output, kwargs)), with_kwargs=True)
    nll(model, coder, coder.batch(*encoded(coder, examples(*TEXTS)), "cpu"))
    ((output, kwargs),) = outputs
    assert output.get("loss") is None and output.get("past_key_values") is None and "labels" not in kwargs


def test_a_batch_for_a_gpu_is_built_on_the_cpu_and_sent_without_waiting(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: sent.append((self.device.type, args, options)) or self)
    coder = apet.Coder(standin.bpe_tokenizer(), "causal", 64, 8)
    coder.batch([[5, 6], [7]], [[8, 2], [9, 2]], "cuda:1")
    assert sent == [("cpu", ("cuda:1",), {"non_blocking": True})] * 3


# Texts and targets ----------------------------------------------------------------------------------------------------


def test_bart_is_trained_to_write_what_it_then_writes(tmp_path):
    """Its configuration forces <s> as the first token of what is generated."""
    assert hf.GenerationConfig.from_pretrained(save("bart", tmp_path)).forced_bos_token_id == 1
    model, coder = load(tmp_path)
    assert coder.written("yes it is") == coder.tokenizer("yes it is").input_ids and coder.written("no")[0] == 1
    chosen = examples(*TEXTS)
    batch = coder.batch(*encoded(coder, chosen), "cpu")
    optimizer = torch.optim.Adam(model.requires_grad_(True).parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nll(model, coder, batch).backward()
        optimizer.step()
    data = apet.Data("t", (), "squad", chosen, [], chosen, {})
    assert apet.predict(model, coder, data, chosen, 2, "cpu") == [e.target for e in chosen]
    exported = tmp_path / "exported"
    model.save_pretrained(exported)
    plain = hf.AutoModelForSeq2SeqLM.from_pretrained(exported)  # its own generate() does the same
    ids = plain.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8)
    assert coder.tokenizer.batch_decode(ids, skip_special_tokens=True) == [e.target for e in chosen]


def test_targets_of_t5_are_its_tokens_and_the_end_of_sequence():
    _, coder = load("toy-tiny")
    tokens = coder.tokenizer("not_equivalent", add_special_tokens=False).input_ids
    assert coder.written("not_equivalent") == [*tokens, 1]
    long = "the food was good " * 9
    assert coder.written(long) == [*coder.tokenizer(long, add_special_tokens=False).input_ids[:7], 1]


@pytest.mark.parametrize("name", ["gpt2", "bart", "bert"])
def test_a_very_long_text_costs_no_more_than_what_is_read_of_it(tmp_path, name):
    _, coder = load(save(name, tmp_path))
    words = " ".join(standin.texts(300, 1))
    long = words * (5_000_000 // len(words))
    start = time.perf_counter()
    ids, target = coder.source(examples(long)[0]), coder.written(long)
    pair = coder.source(apet.Example((long, long), long, "", 0, ())) if name == "bert" else ids
    assert time.perf_counter() - start < 2
    assert ids == coder.source(examples(words)[0]) and len(ids) == len(pair) == 64 and len(target) == 8


@pytest.mark.parametrize("name", ENCODERS)
def test_two_texts_are_two_segments_where_a_model_knows_segments(tmp_path, name):
    model, coder = load(save(name, tmp_path))
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2])]
    batch = coder.batch([coder.source(apet.Example(p, "", "", 0, ())) for p in pairs], None, "cpu")
    assert ("token_type_ids" in batch) == (name in ("bert", "albert", "electra"))
    assert model(**batch).logits.shape == (2, 2)
    if "token_type_ids" in batch:
        wanted = coder.tokenizer(
            *map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt", return_token_type_ids=True
        )
        assert torch.equal(batch["token_type_ids"], wanted["token_type_ids"] * batch["attention_mask"])


# What a folder may hold -----------------------------------------------------------------------------------------------


def refused(capsys, *argv):
    assert apet.main([*map(str, argv), "--method", "none", "--eval-size", "8"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "shards" not in line and not line.startswith("loading ")]
    assert len(lines) == 1 and lines[0].startswith("apet: error: "), lines
    return lines[0]


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(tmp_path, capsys, monkeypatch, part):
    folder = tmp_path / "model"
    shutil.copytree(TOY / "models/tiny", folder)
    file = folder / ("config.json" if part == "model" else "tokenizer_config.json")
    content = json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Own", None]}}
    content |= {"model_type": "own"} if part == "model" else {"tokenizer_class": "Own"}
    file.write_text(json.dumps(content))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: pass\nclass Own: pass\n")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *args: asked.append(args) or "y")
    status = apet.main(["--model", str(folder), "--method", "none", "--eval-size", "8", "--out", str(tmp_path / "out")])
    assert not asked and not (tmp_path / "ran").exists()
    error = capsys.readouterr().err
    if part == "model":
        assert status == 2 and "code of its own (auto_map" in error.splitlines()[-1] and str(folder) in error


@pytest.mark.parametrize("name", ["toy", "gpt2", "llama", "bert", "bart", "modernbert"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys, name):
    if name == "toy":
        shutil.copytree(TOY / "models/tiny", tmp_path / "model")
    else:
        save(name, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(capsys, "--model", tmp_path / "model", "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ENCODERS)
def test_a_checkpoint_whose_head_has_other_labels_loads_with_a_new_head(tmp_path, name):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_labels = 5
    save(name, tmp_path)
    whole = hf.AutoModelForSequenceClassification.from_config(config)
    whole.save_pretrained(tmp_path)
    model, coder = load(tmp_path)
    assert apet.label_scores(model, coder, [coder.source(e) for e in examples(*TEXTS)], WORDS, "cpu").shape == (3, 2)
    wanted = whole.base_model.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in model.base_model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_body_of_another_shape_than_config_json_says_is_refused(tmp_path, capsys, name):
    save(name, tmp_path / "model", intermediate_size=40)
    line = refused(capsys, "--model", tmp_path / "model", "--out", tmp_path / "out", "--max-source-length", "64")
    assert "shape" in line or "size" in line


def test_what_config_json_leaves_null_is_taken_from_the_tokenizer(tmp_path):
    shutil.copytree(TOY / "models/tiny", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"pad_token_id": None, "decoder_start_token_id": None}))
    (tmp_path / "model/generation_config.json").unlink()
    calls = []
    for name in ("toy-tiny", tmp_path / "model"):
        model, coder = load(name)
        chosen = examples(*TEXTS)
        data = apet.Data("t", (), "squad", chosen, [], chosen, {})
        loss = nll(model, coder, coder.batch(*encoded(coder, chosen), "cpu")).item()
        calls.append((loss, apet.predict(model, coder, data, chosen, 2, "cpu")))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("missing", ["pad_token", "eos_token"])
def test_a_tokenizer_without_padding_works_and_one_without_an_end_is_refused(tmp_path, missing):
    save("llama", tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    setattr(tokenizer, missing, None)
    tokenizer.save_pretrained(tmp_path)
    if missing == "eos_token":
        with pytest.raises(apet.UserError, match=r"no tokenizer that .* has an end-of-sequence token"):
            load(tmp_path)
    else:
        model, coder = load(tmp_path)
        assert math.isfinite(nll(model, coder, coder.batch(*encoded(coder, examples(*TEXTS)), "cpu")).item())


def test_tokens_beyond_the_embedding_are_no_trouble_until_a_text_holds_one(tmp_path):
    save("llama", tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as many do, and forget to resize the model
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(tmp_path)
    model, coder = load(tmp_path)
    assert len(coder.tokenizer) == TOKENS + 2
    chosen = examples(*TEXTS)
    assert math.isfinite(nll(model, coder, coder.batch(*encoded(coder, chosen), "cpu")).item())
    apet.predict(model, coder, apet.Data("t", (), "squad", chosen, [], chosen, {}), chosen, 3, "cpu")
    source, target = coder.source(examples("a brandnew movie")[0]), coder.written("brandnew")
    for sources, targets in (([source], None), ([source], [[5]]), ([[5]], [target])):
        with pytest.raises(apet.UserError, match=f"'brandnew' .* is beyond the model's {TOKENS} embeddings"):
            coder.batch(sources, targets, "cpu")


ROOM = {"bert": 300, "roberta": 300, "distilbert": 300, "gpt2": 172, "opt": 172, "bart": 300}


@pytest.mark.parametrize("name", ROOM)
def test_a_model_says_how_many_tokens_fit_and_they_do(tmp_path, name):
    """RoBERTa counts its places from pad_token_id + 1 on: of these 304, 300 can be read; of a decoder's, 128 are the target's."""
    room = ROOM[name]
    save(name, tmp_path)
    for method, fits in (("none", room), ("prompt", room - 100)):
        with pytest.raises(apet.UserError, match=f"has room for {fits} tokens"):
            load(tmp_path, "--max-source-length", str(fits + 1), "--method", method)
        model, coder = load(tmp_path, "--max-source-length", str(fits), "--method", method)
        coder.max_source = fits
        if method == "prompt":
            apet.insert(apet.base_of(model), ["prompt"])
        source = coder.source(examples("a movie " * 200)[0])
        assert len(source) == fits and apet.label_scores(model, coder, [source], WORDS, "cpu").isfinite().all()
    hf.BertForMaskedLM(hf.BertConfig(**SMALL | {"max_position_embeddings": 64})).save_pretrained(tmp_path)
    with pytest.raises(apet.UserError, match=r"has room for 0 tokens .prompt: 100"):
        load(tmp_path, "--method", "prompt", "--max-source-length", "8")


@pytest.mark.parametrize("name", ["opt", "bart", "gpt2"])
def test_dropout_is_set_and_whole_layers_are_never_dropped(tmp_path, name):
    model = build("opt") if name == "opt" else hf.AutoModel.from_config(CONFIGS[name]())
    apet.set_dropout(model, 0.3)
    rates = {n: v for m in model.modules() for n, v in vars(m).items() if "layerdrop" in n}
    assert set(rates.values()) <= {0.0} and (name == "gpt2") == (rates == {})
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.3}
    assert name == "gpt2" or {m.dropout for m in model.modules() if hasattr(m, "dropout") and not callable(m.dropout)} == {0.3}


def test_a_dropout_rate_that_is_a_whole_number_is_set_too():
    model = hf.BartModel(hf.BartConfig(**BART | {"dropout": 0}))
    apet.set_dropout(model, 0.2)
    assert {layer.dropout for layer in model.encoder.layers} == {0.2}
