"""The offline toy family: reproducible, composed, and worth its scale."""

import itertools
import json
import random
import re
import sys

import pytest
import torch
from conftest import TOY
from safetensors.torch import load_file

import apet

sys.path.insert(0, str(TOY))
import make_toy

SCALES = [s for s in ("tiny", "small", "base", "large") if (TOY / "models" / s).is_dir()]


def rows(task, split):
    return [json.loads(line) for line in (TOY / "tasks" / task / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["sentiment", "inference", "paraphrase", "qa", "summary"])
def test_tasks_are_made_again_to_the_same_bytes_without_an_example_in_two_splits(task):
    made = make_toy.make_task(task)
    texts = []
    for split in ("train", "validation", "test"):
        assert "".join(json.dumps(r) + "\n" for r in made[split]).encode() == (TOY / "tasks" / task / f"{split}.jsonl").read_bytes()
        texts.append({tuple(v for k, v in r.items() if k not in ("label", "answer", "summary")) for r in made[split]})
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    if "label" in made["test"][0]:
        counts = [sum(r["label"] == label for r in made["test"]) for label in {r["label"] for r in made["test"]}]
        assert max(counts) - min(counts) <= 0.1 * len(made["test"])


@pytest.mark.parametrize(("task", "chance"), [("sentiment", 1 / 2), ("inference", 1 / 3), ("paraphrase", 1 / 2)])
def test_a_bag_of_words_does_badly_so_composition_decides(task, chance):
    assert make_toy.bag_of_words(task, bigrams=False) < chance + 0.1
    assert make_toy.bag_of_words(task, bigrams=True) < 0.65


def test_pretraining_text_holds_no_task_format_and_no_label():
    """But for lists of single words, said twice, which make every token known."""
    rng, words = random.Random(0), make_toy.all_words()
    texts = [" ".join(make_toy.document(rng, words, ease=0.0)) for _ in range(3000)]
    running = [t for t in texts if not re.fullmatch(r"(.+)\. again: \1\.", t)]
    assert len(running) > 2500
    for word in (*make_toy.LABEL_WORDS, "Input:", "Output:", "premise:", "hypothesis:", "sentence1:", "question:"):
        assert not any(word in t.split() for t in running), word


def test_scales_are_at_least_three_times_apart_and_small_on_disk():
    counts, size = [], 0
    for scale in SCALES:
        file = TOY / "models" / scale / "model.safetensors"
        counts.append(sum(t.numel() for t in load_file(file).values()))
        size += file.stat().st_size
    assert len(counts) >= 3 and all(b >= 3 * a for a, b in itertools.pairwise(counts)) and size < 20e6


def test_the_tokenizer_is_the_same_for_all_and_gives_any_ascii_text_back():
    import transformers as hf

    tokenizers = [hf.AutoTokenizer.from_pretrained(TOY / "models" / scale) for scale in SCALES]
    printable = "".join(chr(c) for c in range(33, 127))
    for text in ("the food was not bad, but ana was sad.", "A pangram: the Quick brown Fox (jumps) over 12 dogs!", printable):
        ids = tokenizers[0](text).input_ids
        assert tokenizers[0].decode(ids, skip_special_tokens=True) == text and ids[-1] == tokenizers[0].eos_token_id
        assert all(t(text).input_ids == ids for t in tokenizers)
        assert tokenizers[0].unk_token_id not in ids
    assert len(tokenizers[0]("the food was good").input_ids) == 5  # words of the language are single tokens


def test_apet_learns_on_pretrained_weights_what_it_does_not_on_random_ones(tmp_path):
    """A shorter run than the default's; README.md has the figures of the whole one."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.AutoConfig.from_pretrained(TOY / "models/base")
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "random")
    hf.AutoTokenizer.from_pretrained(TOY / "models/base").save_pretrained(tmp_path / "random")
    scores = {}
    for name, model in (("pretrained", "toy-base"), ("random", str(tmp_path / "random"))):
        out = tmp_path / "out" / name
        argv = f"--model {model} --steps 200 --eval-size 300 --budget 1e4 --dropout 0 --out {out}".split()
        assert apet.main(argv) == 0
        (file,) = out.glob("*.json")
        scores[name] = json.loads(file.read_text())["score"]
    assert scores["pretrained"] > 0.8 and scores["random"] < 0.65
