"""Positions: exact counts, each scalar once and equally likely, the same everywhere, and at no cost of the model's size."""

import copy
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MODELS, ROOT, batch_for, build, dense_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apet import APET, BLOCK, UserError, candidates, method_parameters, parse_budget, select_positions

STRUCTURED = ("row", "column", "block", "tensor")


def count(positions):
    return sum(map(len, positions.values()))


@pytest.mark.parametrize("mask", ["random", *STRUCTURED, "magnitude"])
@pytest.mark.parametrize("name", MODELS)
def test_every_mask_gives_exactly_the_budget_sorted_and_without_repeats(name, mask):
    model = build(name)
    params = dict(model.named_parameters())
    total = sum(p.numel() for p in params.values())
    for budget in (1, 2, 37, 1000, total // 2, total - 1, total):
        positions = select_positions(model, budget, mask, seed=5)
        assert count(positions) == budget
        assert list(positions) == [n for n in params if n in positions]  # the model's order
        for n, index in positions.items():
            assert index.dtype == torch.int64 and len(index) and index[0] >= 0 and index[-1] < params[n].numel()
            assert (index[1:] > index[:-1]).all()


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=5),
    share=st.floats(0.001, 1),
    mask=st.sampled_from(["random", *STRUCTURED, "magnitude"]),
    seed=st.integers(0, 2**31),
)
def test_any_shapes(shapes, share, mask, seed):
    model = nn.ParameterList([nn.Parameter(torch.randn(tuple(s))) for s in shapes])
    total = sum(p.numel() for p in model)
    budget = max(1, int(share * total))
    positions = select_positions(model, budget, mask, seed)
    assert count(positions) == budget
    assert all((i[1:] > i[:-1]).all() for i in positions.values())


def chi_square(observed, expected):
    return ((observed - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("budget", [40, 700])  # sparse: drawn; dense: drawn as the complement
def test_random_is_uniform_over_scalars(budget):
    model = nn.ModuleList([nn.Linear(20, 30, bias=False), nn.Embedding(40, 10), nn.LayerNorm(8)])
    sizes = [p.numel() for p in model.parameters()]
    starts, hits, draws, pairs = np.cumsum([0, *sizes]), np.zeros(sum(sizes)), 400, 0
    for seed in range(draws):
        flat = {n: s for n, s in zip(dict(model.named_parameters()), starts, strict=False)}
        chosen = np.zeros(len(hits))
        for n, index in select_positions(model, budget, seed=seed).items():
            chosen[flat[n] + index.numpy()] = 1
        hits += chosen
        pairs += chosen[:-1] @ chosen[1:]
    p = budget / len(hits)
    assert hits.sum() == draws * budget
    # each count is binomial; (1 - p) makes the sum chi-square with about n - 1 degrees of freedom
    z = (chi_square(hits, draws * p) / (1 - p) - (len(hits) - 1)) / np.sqrt(2 * (len(hits) - 1))
    assert abs(z) < 4
    # neighbours are chosen together as often as any two; their number in a draw is nearly Poisson, so this is 5 deviations
    together = draws * budget * (budget - 1) / len(hits)
    assert abs(pairs - together) < 5 * np.sqrt(together)


@pytest.mark.parametrize("mask", ["row", "column", "block"])
def test_structured_masks_choose_each_scalar_equally_often(mask):
    model = nn.ModuleList([nn.Linear(32, 48, bias=False), nn.Linear(16, 64, bias=False)])
    hits, draws, budget = [np.zeros(p.numel()) for p in model.parameters()], 3000, 256
    names = [n for n, _ in model.named_parameters()]
    for seed in range(draws):
        for n, index in select_positions(model, budget, mask, seed).items():
            hits[names.index(n)][index.numpy()] += 1
    rate = budget / 2560
    assert all(abs(h.mean() / draws - rate) < 0.15 * rate for h in hits)


def test_structured_masks_are_whole_units_but_for_the_last():
    model = nn.Linear(40, 50, bias=False)
    for mask, unit in (
        ("row", lambda i: i // 40),
        ("column", lambda i: i % 40),
        ("block", lambda i: i // 40 // BLOCK * 3 + i % 40 // BLOCK),
    ):
        index = select_positions(model, 777, mask)["weight"].numpy()
        whole = np.bincount(unit(np.arange(2000)))
        chosen = np.bincount(unit(index), minlength=len(whole))
        assert sum((c != 0) and (c != w) for c, w in zip(chosen, whole, strict=True)) <= 1
    model = nn.ModuleList([nn.Linear(10, 10), nn.Linear(7, 3), nn.LayerNorm(5)])
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    positions = select_positions(model, 60, "tensor", seed=2)
    assert sum(len(i) != sizes[n] for n, i in positions.items()) <= 1


def test_scores_that_are_no_numbers_and_a_model_with_an_apet_are_errors():
    model, batch = build("t5"), batch_for("t5")
    apet = APET(model, 10)
    with pytest.raises(UserError, match="remove"):  # autograd forms no gradients of its weights
        select_positions(model, 10, "gradient", batches=[batch])
    apet.remove()
    with torch.no_grad():
        model.shared.weight[3, 2] = float("nan")
    for mask in ("magnitude", "gradient"):
        with pytest.raises(UserError, match="NaN"):
            select_positions(model, 10, mask, batches=[batch])


def test_magnitude_and_gradient_take_the_largest():
    model = build("t5")
    flat = torch.cat([p.detach().abs().flatten() for p in model.parameters()])
    chosen = select_positions(model, 500, "magnitude")
    values = torch.cat([dict(model.named_parameters())[n].detach().abs().flatten()[i] for n, i in chosen.items()])
    assert torch.equal(values.sort().values, flat.topk(500).values.sort().values)
    batches = [batch_for("t5", s) for s in (1, 2)]
    squares = [{n: g.square() for n, g in dense_gradient(copy.deepcopy(model), [b]).items()} for b in batches]
    score = {n: squares[0][n] + squares[1][n] for n in squares[0]}
    for p in model.parameters():
        p.requires_grad_(False)
    chosen = select_positions(model, 500, "gradient", batches=batches)
    values = torch.cat([score[n].flatten()[i] for n, i in chosen.items()])
    torch.testing.assert_close(
        values.sort().values, torch.cat([s.flatten() for s in score.values()]).topk(500).values.sort().values
    )
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_of_equal_magnitudes_the_first_are_taken():
    model = nn.LayerNorm(10)
    assert select_positions(model, 3, "magnitude")["weight"].tolist() == [0, 1, 2]


def test_same_positions_on_every_machine():
    """Drawn from numpy's raw PCG64 stream, which is fixed: the digest was computed once and must never change."""
    with torch.device("meta"):
        model = build("t5")
    digests = {}
    for mask in ("random", *STRUCTURED):
        digest = hashlib.sha256()
        for budget in (100, 15_000):
            for n, i in select_positions(model, budget, mask, seed=7).items():
                digest.update(n.encode() + i.numpy().tobytes())
        digests[mask] = digest.hexdigest()[:8]
    assert digests == dict(random="16ffad00", row="ff471532", column="c6b79b8a", block="21451482", tensor="e6684886")


@pytest.mark.parametrize("k", [5, 31, 32, 400, 501, 990, 1000])  # sorted, marked, and the few that are left out
def test_draws_are_the_raw_stream_by_hand(k):
    bits, by_hand = np.random.PCG64(np.random.SeedSequence(3)), set()
    while len(by_hand) < min(k, 1000 - k):  # one at a time; what was drawn before does not count
        by_hand.add(int(bits.random_raw()) % 1000)
    expected = set(range(1000)) - by_hand if k > 500 else by_hand
    assert select_positions(nn.Linear(1000, 1, bias=False), k, seed=3)["weight"].tolist() == sorted(expected)


ELEVEN_BILLION = """
import resource, sys, time, torch, json
sys.path.insert(0, {root!r})
from apet import select_positions
from torch import nn
with torch.device("meta"):  # T5-11b's matrices
    stack = [nn.ModuleList([nn.Linear(1024, 16384, bias=False) for _ in range(4)] + [nn.Linear(1024, 65536, bias=False),
             nn.Linear(65536, 1024, bias=False), nn.LayerNorm(1024, bias=False)]) for _ in range(55)]
    model = nn.ModuleList([nn.Embedding(32128, 1024), *stack])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start, out = peak(), time.perf_counter(), {{}}
for mask in ("random", "row", "column", "block", "tensor"):
    out[mask] = sum(map(len, select_positions(model, 10_000, mask).values()))
seconds, mb = time.perf_counter() - start, peak() - before
print(json.dumps(dict(total=sum(p.numel() for p in model.parameters()), seconds=seconds, mb=mb, counts=out)))
"""


def test_eleven_billion_parameters_take_neither_time_nor_memory():
    run = subprocess.run([sys.executable, "-c", ELEVEN_BILLION.format(root=str(ROOT))], capture_output=True, text=True, check=True)
    facts = json.loads(run.stdout)
    assert facts["total"] > 11e9
    assert set(facts["counts"].values()) == {10_000}
    assert facts["seconds"] < 2 and facts["mb"] < 100  # all five masks together


def test_position_seed_alone_moves_the_positions():
    model = build("t5")
    torch.manual_seed(99)
    a, b = select_positions(model, 100, seed=1), select_positions(build("t5", seed=4), 100, seed=1)
    assert all(torch.equal(a[n], b[n]) for n in a) and list(a) == list(b)
    assert any(n not in a or not torch.equal(a[n], i) for n, i in select_positions(model, 100, seed=2).items())


def test_tied_parameters_count_once_by_identity_not_by_configuration():
    tied, untied = build("t5"), build("t5-untied")
    assert "lm_head.weight" not in candidates(tied) and "lm_head.weight" in candidates(untied)
    assert untied.config.tie_word_embeddings  # which is why the flag must not be asked
    assert count(select_positions(tied, "100%")) == sum(p.numel() for p in tied.parameters())


@pytest.mark.parametrize(
    ("name", "where", "some", "none"),
    [
        ("t5", "attention", "decoder.block.1.layer.1.EncDecAttention.k.weight", "encoder.block.0.layer.0.layer_norm.weight"),
        ("t5", "mlp", "encoder.block.1.layer.1.DenseReluDense.wo.weight", "encoder.block.0.layer.0.SelfAttention.o.weight"),
        ("t5", "embedding", "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("t5", "norm", "encoder.final_layer_norm.weight", "shared.weight"),
        ("t5", "encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"),
        ("t5", "decoder", "decoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("t5", "layers:1-3", "encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi.weight"),
        ("t5", "layers:0", "decoder.block.0.layer.2.DenseReluDense.wi.weight", "decoder.block.1.layer.0.SelfAttention.q.weight"),
        ("t5", r"SelfAttention\.[qv]\.", "decoder.block.0.layer.0.SelfAttention.v.weight", "shared.weight"),
        ("bert", "attention", "bert.encoder.layer.0.attention.output.dense.weight", "bert.encoder.layer.0.output.dense.weight"),
        ("bert", "mlp", "bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.attention.output.dense.weight"),
        ("bert", "bias", "bert.encoder.layer.0.output.dense.bias", "bert.encoder.layer.0.output.dense.weight"),
        ("bert", "norm", "bert.encoder.layer.0.attention.output.LayerNorm.bias", "bert.encoder.layer.0.output.dense.bias"),
        ("bloom", "attention", "transformer.h.0.self_attention.query_key_value.weight", "transformer.h.0.mlp.dense_h_to_4h.weight"),
        ("bloom", "mlp", "transformer.h.1.mlp.dense_4h_to_h.bias", "transformer.h.0.self_attention.dense.weight"),
        ("bloom", "norm", "transformer.word_embeddings_layernorm.weight", "transformer.word_embeddings.weight"),
        ("gpt2", "attention", "transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"),
        ("opt", "mlp", "model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.self_attn.out_proj.weight"),
        ("opt", "layers:1", "model.decoder.layers.1.fc1.weight", "model.decoder.layers.0.fc1.weight"),
        ("llama", "mlp", "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("vit", "attention", "vit.layers.0.attention.q_proj.weight", "vit.layers.0.mlp.fc1.weight"),
    ],
)
def test_where_names_what_it_says(name, where, some, none):
    model = build(name)
    names = dict(model.named_parameters())
    assert some in names and none in names
    assert some in candidates(model, where) and none not in candidates(model, where)
    assert count(select_positions(model, 5, where=where)) == 5


@pytest.mark.parametrize("name", ["t5", "bert", "bloom", "gpt2", "opt", "llama", "vit"])
def test_attention_mlp_norm_and_embedding_leave_little_out(name):
    model = build(name)
    named = set().union(*(candidates(model, w) for w in ("attention", "mlp", "norm", "embedding")))
    rest = [n for n in candidates(model) if n not in named]
    assert all("classifier" in n or "pooler" in n or "lm_head" in n for n in rest), rest


def test_budgets_are_read_as_people_write_them():
    model = build("bert")
    total = sum(p.numel() for p in model.parameters())
    for text in ("1e3", "1_000", "1000", 1000, 1e3, " 1000 ", "1.0e3"):
        assert parse_budget(text, model) == 1000
    assert parse_budget("0.1%", model) == round(total / 1000) and parse_budget("100%", model) == total
    assert parse_budget("lora", model) == method_parameters(model, "lora") == 2 * 2 * 8 * (32 + 32)
    assert count(select_positions(model, "lora")) == 2048


@pytest.mark.parametrize("kind", [list, tuple, set, iter, np.array, torch.tensor])
def test_own_positions_may_be_any_iterable_of_whole_numbers(kind):
    got = select_positions(build("t5"), None, {"shared.weight": kind([7, 0, 3])})
    assert list(got) == ["shared.weight"] and got["shared.weight"].tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(budget=0), "whole number from 1"),
        (dict(budget=-3), "whole number from 1"),
        (dict(budget=1.5), "whole number from 1"),
        (dict(budget="ten"), "must be a number such as"),
        (dict(budget=""), "must be a number such as"),
        (dict(budget=None), "must be a number such as"),
        (dict(budget=True), "must be a number such as"),
        (dict(budget="nan"), "whole number"),
        (dict(budget="inf"), "whole number"),
        (dict(budget="1e999999999"), "whole number"),
        (dict(budget="0%"), "above 0%"),
        (dict(budget="101%"), "at most 100%"),
        (dict(budget="x%"), "above 0%"),
        (dict(budget="0.0000001%"), "0.0000001%"),
        (dict(budget="1e12"), "above the"),
        (dict(budget=1000, where="norm"), "above the 384 scalars of where='norm'"),
        (dict(budget=1, mask="rows"), "did you mean 'row'"),
        (dict(budget=1, mask=None), "unknown mask None"),
        (dict(budget=1, seed=-1), "position seed"),
        (dict(budget=1, seed="a"), "position seed"),
        (dict(budget=1, where="decoders"), "names no parameter: use all, attention"),
        (dict(budget=1, where="layers:7"), "names no parameter"),
        (dict(budget=1, where="("), "no regular expression"),
        (dict(budget=1, where=3), "no regular expression"),
        (dict(budget=1, where="a{99999999999999999999}"), "no regular expression"),
        (dict(budget=1, where="(" * 5000 + ")" * 5000), "no regular expression"),
        (dict(budget=1, where="layers:" + "9" * 5000), "names no parameter"),
        (dict(budget=1, where="a{" + "9" * 5000 + "}"), "no regular expression"),
        (dict(budget=int("9" * 4000)), "must be a number"),
        (dict(budget=1, mask="gradient", batches=None), "needs batches"),
        (dict(budget=1, mask="gradient", batches="text"), "needs batches"),
        (dict(budget=1, mask="gradient", batches=[None]), "needs batches"),
        (dict(budget=1, mask="gradient", batches=7), "needs batches"),
        (dict(budget=None, mask={"shared.weight": None}), "list of different whole numbers"),
        (dict(budget=None, mask={"shared.weight": "12"}), "list of different whole numbers"),
        (dict(budget=None, mask={"shared.weight": torch.eye(3).to_sparse()}), "list of different whole numbers"),
        (
            dict(budget=None, mask={"shared.weight": torch.ones(3, dtype=torch.int64, device="meta")}),
            "list of different whole numbers",
        ),
        (dict(budget=None, mask={"shared.weight": [[1], [1]]}), "list of different whole numbers"),
        (dict(budget=None, mask={"shared.weight": torch.tensor([[3]])}), "list of different whole numbers"),
        (dict(budget=None, mask={3: [1]}), "unknown parameter"),
        (dict(budget=1, mask="gradient"), "needs batches"),
        (dict(budget=None, mask={}), "positions are empty"),
        (dict(budget=None, mask={"no.weight": [1]}), "unknown parameter"),
        (dict(budget=None, mask={"shared.weight": [1, 1]}), "flat list of different"),
        (dict(budget=None, mask={"shared.weight": [-1]}), "different whole numbers, 0 to 2,047"),
        (dict(budget=None, mask={"shared.weight": [64 * 32]}), "different whole numbers, 0 to 2,047"),
        (dict(budget=None, mask={"shared.weight": [0.5]}), "flat list of different"),
        (dict(budget=3, mask={"shared.weight": [1]}), "does not agree"),
    ],
)
def test_what_cannot_be_chosen_is_a_value_error_of_one_line(keywords, message):
    model = build("t5")
    with pytest.raises(ValueError) as e:
        select_positions(model, **keywords)
    assert message in str(e.value) and "\n" not in str(e.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12))
def test_any_text_as_a_budget_is_a_count_or_a_value_error(text):
    model = nn.Linear(10, 10)
    try:
        assert 1 <= parse_budget(text, model) <= 110
    except ValueError as e:
        assert "\n" not in str(e)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # the authors' table: LoRA, Adapter, Prompt, BitFit (bloom-1b1's adapter as corrected in design)
        ("bloom-560m", (786432, 2409600, 102400, 272384)),
        ("bloom-1b1", (1179648, 3613824, 153600, 408576)),
        ("bloom-7b1", (3932160, 12043680, 409600, 1359872)),
        ("t5-v1_1-small", (229376, 803584, 51200, None)),  # their BitFit counts for T5 can't be re-derived
        ("t5-v1_1-base", (589824, 1807488, 76800, None)),
        ("t5-v1_1-xxl", (6291456, 19269888, 409600, None)),
    ],
)
def test_method_budgets_equal_the_authors_table(shape, expected):
    import transformers as hf

    with torch.device("meta"):
        if shape.startswith("bloom"):
            hidden, layers = {"560m": (1024, 24), "1b1": (1536, 24), "7b1": (4096, 30)}[shape[6:]]
            model = hf.BloomForCausalLM(hf.BloomConfig(hidden_size=hidden, n_layer=layers, n_head=16, vocab_size=250880))
        else:
            width, ff, layers, heads = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "xxl": (4096, 10240, 24, 64)}[
                shape[8:]
            ]
            model = hf.T5ForConditionalGeneration(
                hf.T5Config(
                    vocab_size=32128,
                    d_model=width,
                    d_ff=ff,
                    num_layers=layers,
                    num_heads=heads,
                    d_kv=64,
                    feed_forward_proj="gated-gelu",
                )
            )
    for method, number in zip(("lora", "adapter", "prompt", "bitfit"), expected, strict=True):
        if number is not None:
            assert method_parameters(model, method) == number
