"""Make the offline toy family: a small generated language, its tokenizer, five tasks, and T5 models of several scales.

    python tests/toy/make_toy.py data                    # tokenizer.json and tasks/*/{train,validation,test}.jsonl
    python tests/toy/make_toy.py check                   # what a bag of words gets on the classification tasks
    python tests/toy/make_toy.py show                    # a few pretraining documents and one example of each task
    python tests/toy/make_toy.py pretrain --scale base   # one model, both stages; goes on where it stopped
    python tests/toy/make_toy.py all                     # everything; goes on where it stopped

Pretraining has two stages. The first is T5's span corruption of running text in which no label of a task occurs. The
second is prefix language modelling, as Lester et al. (2021) adapted T5: a text's first part is read, its second written.
There the words of labels occur with their meaning ("that is entailment."), never first and never in a task's own
"Input: ... Output: ". Half of all texts are reserved for the tasks, and the second stage tells none of them.

Single words decide nothing in the tasks; how they are put together does. See README.md beside this file.

Data files are the same bytes on every machine (only random.Random with string seeds); weights are the same on one
machine with one thread and one version of torch.
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import shutil
import time
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 2023
SENTINELS = 16
SIZES = {"train": 4000, "validation": 500, "test": 1000}
VOCABULARY = 560

# ------------------------------------------------------------------------------------------------ the words

WOMEN, MEN = ["ana", "cara", "eva"], ["ben", "dan", "hugo"]
PEOPLE = WOMEN + MEN
THINGS = ["food", "room", "staff", "music", "bed", "pool"]
GOOD, BAD = ["good", "nice", "lovely"], ["bad", "poor", "awful"]
NEGATION = 0.5  # the share of negated clauses
OUTCOMES = {  # what a guest does after a stay that was good or bad for them
    True: ["came back", "was happy", "told all to go"],
    False: ["went away", "was sad", "told nobody to go"],
}
VERBS = [("helped", "aided"), ("called", "phoned"), ("noticed", "spotted"), ("hit", "struck")]  # pairs of synonyms
CONVERSES = [("sold", "bought"), ("gave", "got"), ("lent", "borrowed")]  # a sold it to b = b bought it from a
MORE_LESS = [("taller", "shorter"), ("older", "younger"), ("faster", "slower")]
OBJECTS = ["key", "ball", "book", "lamp"]
PLACES = ["garden", "park", "shop", "school"]
ANIMALS, KINDS, DOINGS = ["cats", "dogs", "birds", "cows"], ["young", "old", "black", "white"], ["sing", "sleep", "run", "swim"]
ARRIVALS = ["came", "left", "slept", "sang"]
ASIDES = ["it rained all day", "the sun was out", "the bus was late", "it was cold", "the birds sang"]
LABEL_WORDS = ["positive", "negative", "entailment", "neutral", "contradiction", "equivalent", "not_equivalent"]
FIELD_WORDS = [
    "Input:",
    "Output:",
    "text:",
    "premise:",
    "hypothesis:",
    "sentence1:",
    "sentence2:",
    "context:",
    "question:",
    "document:",
]


def subject(name: str) -> str:
    return "she" if name in WOMEN else "he"


def object_form(name: str) -> str:
    return "her" if name in WOMEN else "him"


# ------------------------------------------------------------------------------------------------ reviews: polarity


FLIPS = {"was": 0, "was not": 1, "was never": 1, "all": 0, "all not": 1, "nobody": 1, "nobody not": 2}


def clause(rng: random.Random, thing: str, positive: bool, negation: float, form: str = "") -> str:
    """A clause about one thing whose meaning is `positive`; a share `negation` of them is turned around, or twice."""
    turned = rng.random() < negation
    form = form or rng.choice([f for f in FLIPS if f != "was" and f != "all"] if turned else ["was", "all"])
    adjective = rng.choice(GOOD if positive == (FLIPS[form] % 2 == 0) else BAD)
    who, _, no = form.partition(" ")
    no = no + " " if no else ""
    return f"the {thing} was {no}{adjective}" if who == "was" else f"{who} found the {thing} {no}{adjective}"


def doubted(rng: random.Random, thing: str, positive: bool, negation: float, form: str = "") -> str:
    """A clause that one time in four is turned around once more, from its front."""
    if rng.random() < 0.25:
        return f"it is false that {clause(rng, thing, not positive, negation, form)}"
    return clause(rng, thing, positive, negation, form)


KINDS_OF_REVIEW = ("but", "although", "although", "only")


def review(rng: random.Random, negation: float = NEGATION, agree: float = 0.0, kinds: tuple = KINDS_OF_REVIEW, say=clause) -> dict:
    """Two clauses of opposite polarity (but for a share `agree`) and something that says which one counts."""
    name = rng.choice(PEOPLE)
    winner, loser = rng.sample(THINGS, 2)
    positive = rng.random() < 0.5
    other = positive if rng.random() < agree else not positive
    won, lost = say(rng, winner, positive, negation), say(rng, loser, other, negation)
    kind = rng.choice(kinds)
    winner_first = rng.random() < 0.5
    first, second = (won, lost) if winner_first else (lost, won)
    if kind == "but":  # the clause after "but" counts
        text = f"{lost}, but {won}."
    elif kind == "although":  # the clause after "although" does not
        text = f"{won}, although {lost}." if winner_first else f"although {lost}, {won}."
    else:  # what the guest cares about counts
        text = f"{first} and {second}. {name} only cares about the {winner}."
    return {"text": text, "positive": positive, "name": name, "facts": [(winner, positive), (loser, other)]}


def review_document(rng: random.Random, ease: float) -> tuple[str, str]:
    """One clause, or two, or a review; what they come down to in other words, and what the guest did."""
    negation, name = NEGATION * (1 - ease), rng.choice(PEOPLE)
    hard = min(1.0, 2 * (1 - ease))
    kind = rng.choices(["one", "two", "review"], [80 - 50 * hard, 10, 10 + 50 * hard])[0]
    if kind == "review":
        r = review(rng, negation, agree=0.3 + 0.4 * ease)
        text, name, facts = r["text"], r["name"], r["facts"]
    else:
        facts = [(thing, rng.random() < 0.5) for thing in rng.sample(THINGS, 1 if kind == "one" else 2)]
        text = " and ".join(clause(rng, thing, good, negation) for thing, good in facts) + "."
    if rng.random() < 0.3:
        text = f"{arrival(rng)} {text}"
    parts = [restated(rng, facts)] if kind == "two" or rng.random() < 0.3 else []
    parts += [f"what counted was the {facts[0][0]}."] if kind == "review" and rng.random() < 0.3 else []
    a, b = rng.sample(OUTCOMES[facts[0][1]], 2)
    how = rng.choice(["so", "gladly" if facts[0][1] else "sadly"])
    parts += [f"{how} {name} {a} and {b}."] if kind != "two" else []
    return text, " ".join(parts)


def arrival(rng: random.Random) -> str:
    one, two = rng.sample(PEOPLE, 2)
    return f"{one} and {two} came."


def restated(rng: random.Random, facts: list[tuple[str, bool]]) -> str:
    facts = rng.sample(facts, len(facts))
    return "in other words, " + " and ".join(f"the {t} was {rng.choice(GOOD if p else BAD)}" for t, p in facts) + "."


# ------------------------------------------------------------------------------------------------ facts: roles, synonyms


def event(rng: random.Random, a: str, b: str, pair: tuple[str, str], negated: bool) -> str:
    """`a` did `pair` to `b` (or never did), in one of several ways of saying it."""
    verb, form = rng.choice(pair), rng.choice(["active", "passive", "passive", "false active" if negated else "active"])
    if form == "false active":
        return f"it is false that {a} {verb} {b}"
    never = "never " if negated else ""
    return f"{a} {never}{verb} {b}" if form == "active" else f"{b} was {never}{verb} by {a}"


def transfer(rng: random.Random, a: str, b: str, pair: tuple[str, str], thing: str, negated: bool) -> str:
    """`thing` went from `a` to `b` (or never did)."""
    away, back = pair
    never = "never " if negated else ""
    return rng.choice([f"{a} {never}{away} the {thing} to {b}", f"{b} {never}{back} the {thing} from {a}"])


def comparison(rng: random.Random, a: str, b: str, pair: tuple[str, str]) -> str:
    """`a` has more of it than `b`."""
    more, less = pair
    return rng.choice([f"{a} is {more} than {b}", f"{b} is {less} than {a}"])


def order(rng: random.Random, a: str, first: str, b: str, second: str) -> str:
    """`a` did `first` before `b` did `second`."""
    return rng.choice(
        [
            f"{a} {first} before {b} {second}",
            f"{b} {second} after {a} {first}",
            f"after {a} {first}, {b} {second}",
            f"before {b} {second}, {a} {first}",
        ]
    )


def quantified(quantifier: str, narrow: bool, kind: str, animal: str, doing: str) -> str:
    return f"{quantifier} {kind + ' ' if narrow else ''}{animal} {doing}"


# (quantifier and narrow in the premise, then in the hypothesis) -> what follows; there are young cats if there are cats
MONOTONE = {
    ("all", 0, "all", 1): "entailment",
    ("all", 0, "some", 1): "entailment",
    ("all", 1, "some", 1): "entailment",
    ("all", 1, "some", 0): "entailment",
    ("some", 1, "some", 0): "entailment",
    ("no", 0, "no", 1): "entailment",
    ("all", 1, "all", 0): "neutral",
    ("some", 0, "all", 1): "neutral",
    ("some", 0, "some", 1): "neutral",
    ("some", 1, "all", 1): "neutral",
    ("some", 0, "no", 1): "neutral",
    ("no", 1, "no", 0): "neutral",
    ("no", 1, "some", 0): "neutral",
    ("some", 1, "all", 0): "neutral",
    ("all", 0, "no", 1): "contradiction",
    ("all", 1, "no", 0): "contradiction",
    ("some", 1, "no", 0): "contradiction",
    ("some", 1, "no", 1): "contradiction",
    ("no", 0, "some", 1): "contradiction",
    ("no", 0, "all", 1): "contradiction",
    ("no", 1, "all", 1): "contradiction",
    ("no", 1, "some", 1): "contradiction",
}


FACTS = {"event": 2, "transfer": 2, "comparison": 1, "quantifier": 1}  # how often each kind of fact comes, in running text
HARD_FACTS = {"event": 3, "transfer": 2, "comparison": 2, "quantifier": 1}  # and in the task


def situation(rng: random.Random, negation: float = 0.5, facts: dict = FACTS):
    """A premise, and a function that makes a hypothesis for a label (None where the premise allows none)."""
    a, b, c = rng.sample(PEOPLE, 3)
    kind = rng.choice([kind for kind, share in facts.items() for _ in range(share)])
    if kind in ("event", "transfer"):  # the same event, its denial, or an event with the roles swapped
        negated = rng.random() < negation
        pair, thing = rng.choice(VERBS if kind == "event" else CONVERSES), rng.choice(OBJECTS)

        def say(x: str, y: str, no: bool) -> str:
            return event(rng, x, y, pair, no) if kind == "event" else transfer(rng, x, y, pair, thing, no)

        def hypothesis(label: str) -> str:
            if label == "neutral":
                return say(b, a, rng.random() < negation)
            return say(a, b, negated != (label == "contradiction"))

        return say(a, b, negated), hypothesis
    if kind == "comparison":  # a > b > c in any wording and order, or b above both, or b below both: a and c are not compared
        pair = rng.choice(MORE_LESS)[:: rng.choice([1, -1])]
        shape = rng.choice(["chain", "top", "bottom"])
        above = {"chain": [(a, b), (b, c)], "top": [(b, a), (b, c)], "bottom": [(a, b), (c, b)]}[shape]
        facts = [comparison(rng, x, y, pair) for x, y in above]
        rng.shuffle(facts)

        def hypothesis(label: str) -> str | None:
            if label == "neutral":
                return comparison(rng, *rng.sample([a, c], 2), pair) if shape != "chain" else None
            x, y = rng.choice([(a, c), *above] if shape == "chain" else above)
            return comparison(rng, x, y, pair) if label == "entailment" else comparison(rng, y, x, pair)

        return " and ".join(facts), hypothesis
    quantifier, narrow = rng.choice(["all", "some", "no"]), rng.choice([0, 1])
    words = rng.choice(KINDS), rng.choice(ANIMALS), rng.choice(DOINGS)

    def hypothesis(label: str) -> str | None:
        cases = [case[2:] for case, relation in MONOTONE.items() if relation == label and case[:2] == (quantifier, narrow)]
        return quantified(*rng.choice(cases), *words) if cases else None

    return quantified(quantifier, narrow, *words), hypothesis


def follows(rng: random.Random, label: str, facts: dict) -> tuple[str, str]:
    """A premise and a hypothesis, other than it, that stands in the relation `label`."""
    while True:
        premise, hypothesis = situation(rng, facts=facts)
        text = hypothesis(label)
        if text and text != premise:
            return premise, text


SAYS = {"entailment": "so", "contradiction": "it is wrong that", "neutral": "who knows if"}


def follows_document(rng: random.Random, ease: float) -> tuple[str, str]:
    """A premise, and what follows from it, what cannot be, and what nobody knows."""
    premise, hypothesis = situation(rng, 0.5 * (1 - ease))
    said = []
    while len(said) < 3:
        label = rng.choice(list(SAYS))
        text = hypothesis(label)
        if text and text != premise:
            said.append(f"{SAYS[label]} {text}.")
    return premise + ".", " ".join(said)


def same(rng: random.Random, equivalent: bool, kinds: tuple = ("event", "transfer", "order", "comparison")) -> tuple[str, str]:
    """Two sentences that say the same, or the same words with other roles, order or polarity."""
    a, b = rng.sample(PEOPLE, 2)
    kind = rng.choice(kinds)
    negated, pair, thing = rng.random() < 0.5, rng.choice(VERBS), rng.choice(OBJECTS)
    swap, deny = (False, False) if equivalent else rng.choice([(True, False), (True, False), (False, True)])
    if kind == "transfer":
        pair = rng.choice(CONVERSES)
    first, second = rng.sample(ARRIVALS, 2)
    more = rng.choice(MORE_LESS)

    def say(x: str, y: str, no: bool) -> str:
        if kind == "event":
            return event(rng, x, y, pair, no)
        if kind == "transfer":
            return transfer(rng, x, y, pair, thing, no)
        if kind == "comparison":
            return comparison(rng, x, y, more)
        return order(rng, x, first, y, second)

    x, y = (b, a) if swap or (deny and kind in ("order", "comparison")) else (a, b)
    one, two = say(a, b, negated), say(x, y, negated != deny)
    while one == two:
        two = say(x, y, negated != deny)
    return one, two


def same_document(rng: random.Random, ease: float) -> tuple[str, str]:
    equivalent = rng.random() < 0.6
    one, two = same(rng, equivalent)
    return one + ".", f"{'that is,' if equivalent else 'on another day,'} {two}."


# ------------------------------------------------------------------------------------------------ places and owners


def walk(rng: random.Random) -> tuple[str, list[tuple[str, list[str]]]]:
    """Who has what, who gave it to whom, who went where; questions that follow a thing, with the accepted answers."""
    a, b = rng.sample(PEOPLE, 2)
    things, places = rng.sample(OBJECTS, 2), rng.sample(PLACES, 2)
    where = dict(zip((a, b), places, strict=False))
    owner = {thing: rng.choice([a, b]) for thing in things}
    text = [f"{owner[thing]} had the {thing}" for thing in things]
    for thing in rng.sample(things, rng.choice([0, 1, 1, 2])):
        giver, taker = (a, b) if owner[thing] == a else (b, a)
        text.append(transfer(rng, giver, taker, rng.choice(CONVERSES[:2]), thing, False))
        owner[thing] = taker
    moves = [f"{name} went to the {place}" for name, place in where.items()]
    rng.shuffle(moves)
    text = text + moves if rng.random() < 0.5 else moves + text
    questions = [(f"who has the {thing}?", [name]) for thing, name in owner.items()]
    questions += [
        (f"where is the {thing}?", [f"in the {where[name]}", f"the {where[name]}", where[name]]) for thing, name in owner.items()
    ]
    rng.shuffle(questions)
    return " ".join(s + "." for s in text), questions


def walk_document(rng: random.Random, ease: float) -> tuple[str, str]:
    context, questions = walk(rng)
    speaker, other = rng.sample(PEOPLE, 2)
    return context, " ".join(f"{speaker} asked: {question} {other} said: {answers[0]}." for question, answers in questions[:2])


# ------------------------------------------------------------------------------------------------ stories


def story(rng: random.Random) -> tuple[str, str]:
    """Somebody wants a thing; what became of it is told with pronouns, between things that do not matter."""
    a, b = rng.choice(WOMEN), rng.choice(MEN)
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    c = rng.choice([name for name in PEOPLE if name not in (a, b)])
    thing = rng.choice(OBJECTS)
    away, back = rng.choice(CONVERSES)
    opening = f"{a} wanted the {thing} of {b}." if rng.random() < 0.5 else f"{b} had the {thing} that {a} wanted."
    middle = rng.choice([f"at first {subject(b)} said no.", f"{c} came by.", f"{subject(a)} asked twice."])
    kind = rng.choice(["success", "success", "third", "kept"])
    if kind == "success":
        end = rng.choice(
            [f"then {subject(b)} {away} it to {object_form(a)}.", f"then {subject(a)} {back} it from {object_form(b)}."]
        )
        summary = f"{a} {back} the {thing} from {b}."
    elif kind == "third":
        end = f"then {subject(b)} {away} it to {c}."
        summary = f"{c} {back} the {thing} from {b}."
    else:
        end = f"but {subject(b)} never {away} it to {object_form(a)}."
        summary = f"{b} kept the {thing}."
    asides = [s + "." for s in rng.sample(ASIDES, 2)]
    parts = [opening, middle, end, asides[0]]
    if rng.random() < 0.5:
        parts.insert(rng.randrange(3), asides[1])
    return " ".join(parts), summary


def story_document(rng: random.Random, ease: float) -> tuple[str, str]:
    text, summary = story(rng)
    return text, f"in short, {summary}"


def long_story(rng: random.Random, longer: bool = False) -> dict:
    """The thing changes hands, or does not, up to twice: who has it at last, and from whom; and what `a` did then.
    A `longer` one goes on, one to three hands further."""
    a, b = rng.choice(WOMEN), rng.choice(MEN)
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    c = rng.choice([name for name in PEOPLE if name not in (a, b)])
    thing = rng.choice(OBJECTS)

    def hand(x: str, y: str, sign: str) -> str:  # c goes by name, the others by what nobody can mistake for each other
        away, back = rng.choice(CONVERSES)
        x_subject, y_subject = (n if n == c else subject(n) for n in (x, y))
        x_object, y_object = (n if n == c else object_form(n) for n in (x, y))
        return rng.choice([f"{x_subject} {sign}{away} it to {y_object}", f"{y_subject} {sign}{back} it from {x_object}"])

    parts = [rng.choice([f"{a} wanted the {thing} of {b}.", f"{b} had the {thing} that {a} wanted."])]
    if rng.random() < 0.5:
        parts.append(rng.choice([f"at first {subject(b)} said no.", f"{c} came by.", f"{subject(a)} asked twice."]))
    path = rng.choice([(b, a), (b, c), (b, c, a), (b, c, b), (b, a, c), (b, a, b), (b,)])
    for _ in range(rng.choice([1, 2, 3]) if longer else 0):
        path += (rng.choice([n for n in (a, b, c) if n != path[-1]]),)
    parts += [f"then {hand(x, y, '')}." for x, y in itertools.pairwise(path)]
    owner = path[-1]
    if (len(path) < 3 or longer) and (len(path) == 1 or rng.random() < 0.4 if longer else owner == b or rng.random() < 0.5):
        parts.append(f"but {hand(owner, rng.choice([n for n in (a, b, c) if n != owner]), 'never ')}.")
        summary = f"{owner} kept the {thing}."
    else:
        summary = f"{owner} got the {thing} from {path[-2]}."
    for aside in rng.sample(ASIDES, 2)[: rng.choice([1, 1, 2])]:
        parts.insert(rng.randrange(1, len(parts) + 1), aside + ".")
    outcome = f"so {a} {rng.choice(OUTCOMES[owner == a])}."
    questions = {f"who has the {thing}?": owner, f"who wanted the {thing}?": a, f"who had the {thing} at first?": b}
    return {"text": " ".join(parts), "summary": summary, "outcome": outcome, "questions": questions}


# ------------------------------------------------------------------------------------------------ pretraining text


def word_list(rng: random.Random, words: list[str]) -> tuple[str, str]:
    """A few words, said twice: every word has been seen, whatever it means."""
    chosen = " ".join(rng.sample(words, rng.randint(3, 6)))
    return f"{chosen}.", f"again: {chosen}."


def all_words() -> list[str]:
    """Every word of the language and of the prompts, sorted."""
    rng = random.Random(f"{SEED} words")
    words = set(LABEL_WORDS + FIELD_WORDS)
    for make in (review_document, follows_document, same_document, walk_document, story_document):
        for _ in range(2000):
            words.update("".join(ch for ch in w if ch not in ".,?") for w in " ".join(make(rng, 0.0)).split())
    return sorted(words)


GENRES = {  # percent of the documents, at first and in the late round, when reviews are known; the rest are lists of words
    review_document: (48, 16),
    follows_document: (20, 30),
    same_document: (11, 26),
    walk_document: (9, 18),
    story_document: (8, 6),
}


def document(rng: random.Random, words: list[str], ease: float = 0.0, late: bool = False) -> tuple[str, str]:
    """A short text in two parts: something told, and what follows from it. `ease` thins out negation, down to none at 1:
    what turns a meaning around is learned once there is a meaning."""
    draw = rng.randrange(100)
    for make, shares in GENRES.items():
        if draw < shares[late]:
            return make(rng, ease)
        draw -= shares[late]
    return word_list(rng, words)


# ------------------------------------------------------------------------------------------------ tasks


def sentiment_example(rng: random.Random, kinds: tuple = ("but", "although")) -> dict:
    """One clause, or two that agree, with none, one or two negations each, far from each other; or a review."""
    positive, forms = rng.random() < 0.5, ["all", "all not", "nobody", "nobody not"]
    kind = rng.choice(["one", "two", "review", "review"])
    if kind == "review":
        r = review(rng, kinds=kinds, say=doubted)
        return {"text": r["text"], "label": "positive" if r["positive"] else "negative"}
    things = rng.sample(THINGS, 1 if kind == "one" else 2)
    text = " and ".join(doubted(rng, thing, positive, 0, rng.choice(forms)) for thing in things) + "."
    text = f"{arrival(rng)} {text}" if rng.random() < 0.5 else text
    return {"text": text, "label": "positive" if positive else "negative"}


def inference_example(rng: random.Random, facts: dict = HARD_FACTS) -> dict:
    label = rng.choice(list(SAYS))
    premise, hypothesis = follows(rng, label, facts)
    return {"premise": premise + ".", "hypothesis": hypothesis + ".", "label": label}


FACTS_OF_SAME = ("event",) * 4 + ("transfer",) * 4 + ("order",) * 3 + ("comparison",)


def paraphrase_example(rng: random.Random, twice: float = 0.3) -> dict:
    """Two sentences, or, in a share `twice`, two of two facts each, told in any order."""
    equivalent = rng.random() < 0.5
    one, two = same(rng, equivalent, FACTS_OF_SAME)
    if twice and rng.random() < twice:  # another fact, said in other words
        pairs = [(one, two), same(rng, True, FACTS_OF_SAME)]
        one, two = (" and ".join(rng.sample(said, 2)) for said in zip(*pairs, strict=True))
    return {"sentence1": one + ".", "sentence2": two + ".", "label": "equivalent" if equivalent else "not_equivalent"}


def qa_example(rng: random.Random, longer: bool = True) -> dict:
    story = long_story(rng, longer)
    now, wanted, first = story["questions"].items()
    question, answer = rng.choice([now, now, wanted, first])
    return {"context": story["text"], "question": question, "answer": [answer]}


def summary_example(rng: random.Random) -> dict:
    story = long_story(rng, longer=True)
    return {"document": story["text"], "summary": story["summary"]}


TASKS = {
    "sentiment": sentiment_example,
    "inference": inference_example,
    "paraphrase": paraphrase_example,
    "qa": qa_example,
    "summary": summary_example,
}
CLASSIFICATION = {
    "sentiment": ["positive", "negative"],
    "inference": ["entailment", "neutral", "contradiction"],
    "paraphrase": ["equivalent", "not_equivalent"],
}


def told(row: dict) -> str:
    """What a row tells, as running text; the question of qa apart."""
    return " ".join(value for field, value in row.items() if field not in ("label", "question", "answer", "summary"))


def reserved(text: str) -> bool:
    """Half of all texts are for the tasks; the second stage of pretraining never tells one of them."""
    return zlib.crc32(text.encode()) % 2 == 0


def make_task(name: str) -> dict[str, list[dict]]:
    """All splits of one task: no text twice, the labels of each split as equal in number as they can be."""
    rng = random.Random(f"{SEED} task {name}")
    labels = CLASSIFICATION.get(name)
    seen, splits = set(), {}
    for split in ("test", "validation", "train"):
        size, rows, counts = SIZES[split], [], {}
        if split == "train" and name in ("qa", "summary"):
            size = 2000  # longer rows; all tasks together stay below 3 MB
        while len(rows) < size:
            row = TASKS[name](rng)
            key = json.dumps([value for field, value in row.items() if field not in ("label", "answer", "summary")])
            quota = math.ceil(size / len(labels)) if labels else size
            if not reserved(told(row)) or key in seen or counts.get(row.get("label"), 0) >= quota:
                continue
            seen.add(key)
            counts[row.get("label")] = counts.get(row.get("label"), 0) + 1
            rows.append(row)
        rng.shuffle(rows)
        splits[split] = rows
    return splits


# ------------------------------------------------------------------------------------------------ text of the second stage

VERDICTS = {  # how running text says what a task's label means; the label is never the first word
    "sentiment": [
        "all in all, {}.",
        "in short, it was {}.",
        "so it was {}.",
        "in other words, {}.",
        "it was {}.",
        "{name} said: {}.",
    ],
    "inference": [
        "that is {}.",
        "so that is {}.",
        "in short, that is {}.",
        "it is {}.",
        "{name} said that is {}.",
        "who knows? {}.",
    ],
    "paraphrase": [
        "they are {}.",
        "so they are {}.",
        "in short, they are {}.",
        "in other words, they are {}.",
        "{name} said they are {}.",
    ],
}
EASIER = {  # what running text holds is more varied than the tasks, or easier
    "sentiment": lambda rng: sentiment_example(rng, KINDS_OF_REVIEW),
    "inference": lambda rng: inference_example(rng, FACTS),
    "paraphrase": lambda rng: paraphrase_example(rng, 0),
}
REPLIES = ["in other words, it is {}.", "all said that it is {}.", "it was said that it is {}."]
SECOND_GENRES = {  # percent, at first and in the late round: who has what is learned last; the rest is stage 1's
    "sentiment": (14, 12),
    "inference": (32, 28),
    "paraphrase": (22, 14),
    "qa": (16, 24),
    "summary": (10, 18),
}


def second_document(rng: random.Random, words: list[str], late: bool = False) -> tuple[str, str]:
    """A text in two parts, whose second part says in running words what the first comes down to; no text of a task's row."""
    shares = [pair[late] for pair in SECOND_GENRES.values()]
    genre = rng.choices([*SECOND_GENRES, ""], [*shares, 100 - sum(shares)])[0]
    name, other = rng.sample(PEOPLE, 2)
    while True:
        if not genre:
            first, rest = document(rng, words, late=rng.random() < 0.8)
        elif genre == "summary":
            story = long_story(rng)
            first, rest = story["text"], f"in short, {story['summary']}" if rng.random() < 0.6 else story["outcome"]
        elif genre == "qa" and late:
            row = qa_example(rng, longer=False)
            first, rest = row["context"], rng.choice(REPLIES).format(row["answer"][0])
        elif genre == "qa":  # two steps from a thing to its place: no scale learns it, so the late round asks what the task asks
            first, questions = walk(rng)
            sentences = first.split(". ")
            sentences.insert(rng.randrange(len(sentences)), rng.choice(ASIDES))
            first, question, reply = ". ".join(sentences), questions[0][0], f"{other} said: {questions[0][1][0]}."
        else:
            row = EASIER[genre](rng)
            first, rest = told(row), ""
        if reserved(first):
            continue
        if genre == "qa" and late:
            first = f"{first} {name} asked: {row['question']}"
        elif genre == "qa":
            asked = f"{name} asked: {question}"
            first, rest = (first, f"{asked} {reply}") if rng.random() < 0.3 else (f"{first} {asked}", reply)
        elif genre in VERDICTS:
            rest = rng.choice(VERDICTS[genre]).format(row["label"], name=name)
        return first, rest


# ------------------------------------------------------------------------------------------------ files


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place, so that a reader never sees half of it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def fresh_folder(final: Path) -> Path:
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def make_tokenizer():
    """BPE over words that carry their leading space; printable ASCII in the vocabulary, </s> at the end, as T5 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rng, words = random.Random(f"{SEED} tokenizer"), all_words()
    corpus = [" ".join(document(rng, words)) for _ in range(8000)] + [" ".join(words)] * 1000
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[.,?!;]"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<pad>", "</s>", "<unk>"] + [f"<extra_id_{i}>" for i in range(SENTINELS)]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=[chr(i) for i in range(33, 127)] + ["\u2581", "\n", "\t"],
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """The two files that AutoTokenizer reads, in words that transformers 4 and 5 both know."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_data() -> None:
    began = time.time()
    tokenizer = make_tokenizer()
    tokenizer.save(str(HERE / "tokenizer.json.tmp"))
    os.replace(HERE / "tokenizer.json.tmp", HERE / "tokenizer.json")
    for name in TASKS:
        folder = fresh_folder(HERE / "tasks" / name)
        for split, rows in make_task(name).items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_bytes(lines.encode("ascii"))
        replace_folder(folder, HERE / "tasks" / name)
    total = sum(p.stat().st_size for p in (HERE / "tasks").rglob("*.jsonl"))
    split = [w for w in all_words() if len(tokenizer.encode(w, add_special_tokens=False)) > 1]
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens; words of more than one token: {', '.join(split) or 'none'}")
    print(f"tasks: {total / 1e6:.2f} MB in {time.time() - began:.1f} s")


def read_task(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / "tasks" / name / f"{split}.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ bag of words


def bag_of_words(name: str, bigrams: bool) -> float:
    """Test accuracy of a logistic regression on counts of words (and pairs of neighbours), each field counted apart;
    the weight decay and the step are those that the validation split likes best."""
    import torch

    def features(row: dict) -> list[str]:
        found = []
        for field, value in row.items():
            if field != "label":
                words = value.replace(".", " .").replace(",", " ,").split()
                found += [f"{field} {w}" for w in words]
                found += [f"{field} {a} {b}" for a, b in itertools.pairwise(words)] if bigrams else []
        return found

    rows = {split: read_task(name, split) for split in SIZES}
    columns = {f: i for i, f in enumerate(sorted({f for row in rows["train"] for f in features(row)}))}
    x, y = {}, {}
    for split, some in rows.items():
        x[split] = torch.zeros(len(some), len(columns))
        for i, row in enumerate(some):
            for f in features(row):
                if f in columns:
                    x[split][i, columns[f]] += 1
        y[split] = torch.tensor([CLASSIFICATION[name].index(row["label"]) for row in some])
    best = (0.0, 0.0)
    for decay in (1e-4, 1e-3, 1e-2):
        weight = torch.zeros(len(columns), len(CLASSIFICATION[name]), requires_grad=True)
        bias = torch.zeros(len(CLASSIFICATION[name]), requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=0.03)
        for step in range(1, 201):
            loss = torch.nn.functional.cross_entropy(x["train"] @ weight + bias, y["train"]) + decay * weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                with torch.no_grad():
                    right = {s: ((x[s] @ weight + bias).argmax(1) == y[s]).float().mean().item() for s in ("validation", "test")}
                best = max(best, (right["validation"], right["test"]))
    return best[1]


def check() -> None:
    print("| task | chance | words | words and pairs |\n|---|---|---|---|")
    for name, labels in CLASSIFICATION.items():
        print(f"| {name} | {1 / len(labels):.2f} | {bag_of_words(name, False):.2f} | {bag_of_words(name, True):.2f} |")


# ------------------------------------------------------------------------------------------------ pretraining

SCALES = {  # shape (layers: in encoder and in decoder), rate, steps of the rounds of both stages; a stage's last is its late one
    "tiny": dict(d_model=32, d_ff=64, num_heads=2, d_kv=16, num_layers=2, lr=1.5e-3, first=(2000, 1000), second=(2500, 1000)),
    "small": dict(d_model=64, d_ff=192, num_heads=2, d_kv=32, num_layers=2, lr=1e-3, first=(7000, 3500), second=(4500, 1500)),
    "base": dict(d_model=96, d_ff=384, num_heads=4, d_kv=24, num_layers=3, lr=1.2e-3, first=(8000, 4000), second=(7000, 1500)),
    "large": dict(
        d_model=160, d_ff=480, num_heads=5, d_kv=32, num_layers=4, lr=1e-3, first=(3200, 3200, 6400), second=(6528, 4000)
    ),
}
POOL = {1: 16, 2: 64}  # batches drawn at a time, so that each has texts of similar length
LOOK = 512  # steps from one look at the held-out loss to the next
BATCH = 32


def corrupt(told: list[int], rest: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """T5's span corruption: spans leave the source, a sentinel in the place of each; the target lists them.
    Two times in three one span, from somewhere in the second part of the text to its end; else short spans anywhere."""
    ids = told + rest
    if rng.random() < 2 / 3:
        spans = [(len(told) + (rng.randrange(len(rest)) if rng.random() < 0.5 else 0), len(ids))]
    else:
        spans, taken = [], [False] * (len(ids) + 1)
        for _ in range(max(1, round(len(ids) * 0.2 / 2))):  # about 15 % of the tokens, after collisions
            length = rng.choice([1, 2, 3])
            begin = rng.randrange(max(1, len(ids) - length))
            if not any(taken[max(0, begin - 1) : begin + length + 1]):
                taken[begin : begin + length] = [True] * length
                spans.append((begin, begin + length))
        spans.sort()
    source, target, at = [], [], 0
    for i, (begin, stop) in enumerate(spans):
        source += [*ids[at:begin], 3 + i]
        target += [3 + i, *ids[begin:stop]]
        at = stop
    return source + ids[at:] + [1], [*target, 3 + len(spans), 1]


def cut(first: list[int], rest: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Prefix language modelling: the first part is read, the second written; now and then the cut is anywhere."""
    if rng.random() < 0.1:
        ids, at = first + rest, rng.randrange(1, len(first) + 1)
        first, rest = ids[:at], ids[at:]
    return [*first, 1], [*rest, 1]


def batches(tokenizer, rng: random.Random, texts: list[tuple[str, str]], stage: int) -> list[dict]:
    """Texts as batches of similar length, in any order."""
    import torch

    def padded(rows: list[list[int]], fill: int):
        longest = max(map(len, rows))
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    encoded = [tokenizer.encode_batch(list(part), add_special_tokens=False) for part in zip(*texts, strict=True)]
    arrange = corrupt if stage == 1 else cut
    pairs = [arrange(first.ids, rest.ids, rng) for first, rest in zip(*encoded, strict=True)]
    if stage == 1:
        pairs.sort(key=lambda pair: (len(pair[0]), len(pair[1])))
    else:  # targets of four lengths at most: a third less to compute than above
        pairs.sort(key=lambda pair: (len(pair[1]) // 4, len(pair[0])))
    groups = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    rng.shuffle(groups)
    made = []
    for group in groups:
        source = padded([s for s, _ in group], 0)
        made.append(dict(input_ids=source, attention_mask=(source != 0).long(), labels=padded([t for _, t in group], -100)))
    return made


def new_model(scale: str, vocabulary: int, seed: int = SEED):
    """A T5 of this scale with new weights."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {key: value for key, value in SCALES[scale].items() if key not in ("lr", "first", "second")}
    config = T5Config(
        vocab_size=vocabulary,
        **shape,
        num_decoder_layers=shape["num_layers"],
        relative_attention_num_buckets=16,
        relative_attention_max_distance=48,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def plan(scale: str, steps: int | None = None) -> list[dict]:
    """The rounds of both stages, each from the weights that the one before would have saved. Only the first begins easy."""
    first, second = (SCALES[scale]["first"], SCALES[scale]["second"]) if steps is None else ((steps,), (steps, steps))
    made = []
    for stage, name, rounds in ((1, "pretrain", first), (2, "second stage", second)):
        for i, n in enumerate(rounds):
            seed = f"{SEED} {name}" + (f" {i}" if i else "")
            made.append(dict(stage=stage, steps=n, seed=seed, easy=stage == 1 and i == 0, late=0 < i == len(rounds) - 1))
    return made


def rate(stage: int, step: int, steps: int) -> float:
    """Share of the peak: 100 steps of warm-up; then a cosine in stage 1; in stage 2 all of it, and down over the last 30 %."""
    warm = min(1.0, step / 100)
    if stage == 1:
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    return warm * min(1.0, 0.02 + (steps - step) / (0.3 * steps))


def held_out_loss(model, held_out: list[dict]) -> float:
    """Mean loss of a token of documents that pretraining does not draw."""
    import torch

    model.eval()
    with torch.no_grad():
        counts = [int((batch["labels"] >= 0).sum()) for batch in held_out]
        losses = [model(**batch).loss.item() for batch in held_out]
    model.train()
    return sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


def train_round(model, tokenizer, scale: str, turn: dict, begun: dict, keep, every: float) -> list[dict]:
    """AdamW over one round, from where `begun` stopped; `keep` saves what goes on from here. Returns the held-out curve."""
    import torch

    words, stage, steps, peak = all_words(), turn["stage"], turn["steps"], SCALES[scale]["lr"]

    def draw(rng: random.Random, step: int, pool: int) -> list[dict]:
        ease = max(0.0, 1 - step / (0.3 * steps)) if turn["easy"] else 0.0
        if stage == 1:
            return batches(tokenizer, rng, [document(rng, words, ease, turn["late"]) for _ in range(BATCH * pool)], stage)
        return batches(tokenizer, rng, [second_document(rng, words, turn["late"]) for _ in range(BATCH * pool)], stage)

    held_out = draw(random.Random(f"{turn['seed']}, held out"), steps, 16)
    # T5 does not divide attention scores by the root of the width, so its queries and keys want a smaller rate
    sharp = [p for name, p in model.named_parameters() if name.endswith((".q.weight", ".k.weight"))]
    rest = [p for name, p in model.named_parameters() if not name.endswith((".q.weight", ".k.weight"))]
    groups = [dict(params=rest, part=1.0), dict(params=sharp, part=0.3)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=stage == 2)
    rng, step, curve, losses = random.Random(turn["seed"]), 0, [], []
    if begun:
        optimizer.load_state_dict(begun["optimizer"])
        rng.setstate(begun["random"])
        step, curve, losses = begun["step"], begun["curve"], begun["losses"]
    model.train()
    began = kept = time.time()
    while step < steps:
        for batch in draw(rng, step, POOL[stage])[: steps - step]:
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = group["part"] * peak * rate(stage, step, steps)
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        if step % LOOK == 0 or step == steps:
            loss, seen = held_out_loss(model, held_out), sum(losses) / len(losses)
            curve.append(dict(stage=stage, step=step, training=round(seen, 4), held_out=round(loss, 4)))
            print(f"{scale}, stage {stage}, step {step}/{steps}: held-out {loss:.3f}, {time.time() - began:.0f} s", flush=True)
            losses = []
        if step < steps and time.time() - kept > every:  # between pools, where the random state says all that comes
            keep(dict(optimizer=optimizer.state_dict(), random=rng.getstate(), step=step, curve=curve, losses=losses))
            kept = time.time()
    return curve


def pretrain(scale: str, steps: int | None = None, out: Path | None = None, start: Path | None = None, every: float = 60) -> None:
    """Both stages, from what a stopped run left beside the model; from the weights in `start`, the second stage alone."""
    import torch
    from tokenizers import Tokenizer
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(1)  # so that the same command gives the same weights
    began = time.process_time()
    final = out or HERE / "models" / scale
    state_file, rounds = final.with_name(final.name + ".state"), plan(scale, steps)
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    model = new_model(scale, tokenizer.get_vocab_size())
    state = dict(turn=len(rounds) - 2 if start else 0, curves=[], seconds=0.0)
    if start:
        model = T5ForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    if state_file.exists():
        state = torch.load(state_file)
        if state["turn"] == len(rounds):
            return print(f"{final.name} is done; to make it again, remove {state_file.name} first")
        model.load_state_dict(state["model"])
    spent = state["seconds"]

    def keep(turn: int, curves: list[dict], begun: dict) -> None:
        weights = model.state_dict() if turn < len(rounds) else None
        seconds = spent + time.process_time() - began
        torch.save(dict(turn=turn, curves=curves, model=weights, begun=begun, seconds=seconds), f"{state_file}.tmp")
        os.replace(f"{state_file}.tmp", state_file)

    curves, begun = list(state["curves"]), state.get("begun")
    final.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(state["turn"], len(rounds)):
        if turn and not begun:  # through float16, as if saved and loaded
            model = model.half().float()
        keep_here = functools.partial(keep, turn, curves)
        curves = curves + train_round(model, tokenizer, scale, rounds[turn], begun, keep_here, every)
        begun = None
        if turn + 1 < len(rounds):
            keep(turn + 1, curves, None)
    folder = fresh_folder(final)
    model.half().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curves))
    replace_folder(folder, final)
    keep(len(rounds), curves, None)
    count = sum(p.numel() for p in model.parameters())
    seconds = spent + time.process_time() - began
    print(f"{final.name}: {count:,} parameters, {seconds:.0f} s of one core, held-out loss {curves[-1]['held_out']}")


# ------------------------------------------------------------------------------------------------ command line


def show() -> None:
    rng, words = random.Random(f"{SEED} show"), all_words()
    for _ in range(20):
        print(" ".join(document(rng, words)))
    for _ in range(20):
        print(" | ".join(second_document(rng, words)))
    for name in TASKS:
        print(name, json.dumps(TASKS[name](rng)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "check", "show", "pretrain", "all"])
    parser.add_argument("--scale", choices=list(SCALES), help="the model that `pretrain` makes; all of them by default")
    parser.add_argument("--steps", type=int, help="steps of each round, one of stage 1 and two of stage 2")
    parser.add_argument("--out", type=Path, help="where the model goes, in place of models/SCALE; with --scale")
    parser.add_argument("--start", type=Path, help="a model of the first stage to begin the second stage from; with --scale")
    args = parser.parse_args()
    if (args.out or args.start) and not args.scale:
        parser.error("--out and --start need --scale")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.what in ("data", "all"):
        make_data()
    if args.what in ("check", "all"):
        check()
    if args.what == "show":
        show()
    if args.what in ("pretrain", "all"):
        for scale in [args.scale] if args.scale else SCALES:
            pretrain(scale, args.steps, args.out, args.start)


if __name__ == "__main__":
    main()
