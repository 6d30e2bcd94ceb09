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


def told(row):
    """A row's texts but for the question of qa, as running text."""
    return " ".join(v for k, v in row.items() if k not in ("label", "question", "answer", "summary"))


def test_no_text_of_the_second_stage_is_a_row_of_a_task_or_has_its_form():
    taken = {told(r) for task in make_toy.TASKS for split in ("train", "validation", "test") for r in rows(task, split)}
    assert len(taken) > 20000
    rng, words = random.Random(1), make_toy.all_words()
    kinds = dict.fromkeys(("positive", "entailment", "equivalent", "asked", "in short"), 0)
    for _ in range(6000):
        first, rest = make_toy.second_document(rng, words)
        assert first not in taken and re.sub(r" \w+ asked: .*", "", first) not in taken, first
        if re.fullmatch(r"again: (.+)\.", rest):  # a list of single words, said twice
            continue
        assert not any(word in f"{first} {rest}".split() for word in make_toy.FIELD_WORDS), (first, rest)
        assert rest.split()[0].strip(".") not in make_toy.LABEL_WORDS and not any(w in first for w in make_toy.LABEL_WORDS)
        for kind in kinds:
            kinds[kind] += kind in rest or kind in first
    assert min(kinds.values()) > 200, kinds


def test_verdicts_in_running_text_are_true():
    """Of single clauses: an even or odd number of words that turn them around; of events: who did what to whom, or not."""
    rng, words, clauses, events = random.Random(2), make_toy.all_words(), 0, 0
    synonyms = {"aided": "helped", "phoned": "called", "spotted": "noticed", "struck": "hit"}

    def fact(sentence):
        turned = "never" in sentence or "false" in sentence
        a, verb, b = re.search(r"(\w+) (?:was )?(?:never )?(?:was )?(?:never )?(\w+) (?:by )?(\w+)\.$", sentence).groups()
        return ((b, verb, a) if " by " in sentence else (a, verb, b)), turned

    for _ in range(6000):
        first, rest = make_toy.second_document(rng, words)
        label = re.findall(r"\w+", rest)[-1]
        sentences = first.removesuffix(".").split(". ")
        one_clause = len(sentences) == 1 and not re.search(r" and |,|although", first)
        if label in ("positive", "negative") and one_clause:
            flips = sum(first.replace(".", "").split().count(w) for w in ("not", "never", "nobody", "false"))
            good = any(w in first for w in make_toy.GOOD)
            assert (label == "positive") == (good == (flips % 2 == 0)), (first, rest)
            clauses += 1
        verbs = [w for pair in make_toy.VERBS for w in pair]
        two_events = len(sentences) == 2 and all(any(v in s.split() for v in verbs) for s in sentences)
        if label in ("entailment", "neutral", "contradiction", "equivalent", "not_equivalent") and two_events:
            (one, no1), (two, no2) = (fact(s + ".") for s in sentences)
            one, two = ((a, synonyms.get(v, v), b) for a, v, b in (one, two))
            same, swapped = one == two, one == two[::-1]
            assert same or swapped
            if "equivalent" in label:
                assert (label == "equivalent") == (same and no1 == no2), (first, rest)
            else:
                assert label == ("neutral" if swapped else "entailment" if no1 == no2 else "contradiction"), (first, rest)
            events += 1
    assert clauses > 50 and events > 400


@pytest.mark.parametrize("saves", [2, 6])
def test_pretraining_that_was_interrupted_goes_on_to_the_same_bits(tmp_path, monkeypatch, saves):
    """Stopped in the first stage, after its second save, and in the second stage's first round."""
    replace, seen = make_toy.os.replace, []

    def stop(source, target):
        replace(source, target)
        seen.append(target)
        if sum(str(t).endswith(".state") for t in seen) == saves:
            raise KeyboardInterrupt

    make_toy.pretrain("tiny", 80, tmp_path / "whole", every=0)
    with monkeypatch.context() as patch:
        patch.setattr(make_toy.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            make_toy.pretrain("tiny", 80, tmp_path / "parts", every=0)
    assert not (tmp_path / "parts").exists()
    make_toy.pretrain("tiny", 80, tmp_path / "parts", every=1e9)
    for file in ("model.safetensors", "curve.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    curve = [json.loads(line) for line in (tmp_path / "parts/curve.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in curve] == [(1, 80), (2, 80), (2, 80)]
    before = (tmp_path / "parts/model.safetensors").stat().st_mtime_ns
    make_toy.pretrain("tiny", 80, tmp_path / "parts")  # done: nothing is made again
    assert (tmp_path / "parts/model.safetensors").stat().st_mtime_ns == before


def test_scales_span_enough_and_are_small_on_disk():
    counts, sizes = [], []
    for scale in SCALES:
        file = TOY / "models" / scale / "model.safetensors"
        counts.append(sum(t.numel() for t in load_file(file).values()))
        sizes.append(file.stat().st_size)
    assert len(counts) >= 4 and all(b >= 3 * a for a, b in itertools.pairwise(counts)) and counts[-1] > 10**1.6 * counts[0]
    assert sum(sizes) <= 12e6 and sum(size > 6e6 for size in sizes) < 2


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
