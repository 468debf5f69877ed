"The planted world: what it must hide from a shortcut, and what it must plant."

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import fac_synthesis.data.planted_world as W
from fac_synthesis.data.corpora import planted_corpora
from fac_synthesis.run.parameters import FILES_READ

CONCEPTS = W.load_concepts()
HARMFUL = {c.name for c in CONCEPTS if c.harmful}
WORLD = W.load_world()
CONTENT = {w for concepts in WORLD.values() for c in concepts for w in c.words + c.shared}
SIZES = dict(
    n_pretraining=300,
    n_anchor=2400,
    n_full_toxic=900,
    n_seed_toxic=40,
    n_safe=200,
    n_test=600,
    toxic_share=0.2,
    zipf_world=0.5,
    zipf_seed=1.6,
    label_noise=0.1,
)


def make(seed=0, **changes):
    return W.planted_texts(seed, W.MessageSettings(**{**SIZES, **changes}))


def names_in(column) -> set[str]:
    "All concepts of a column of JSON lists."
    return {name for names in column for name in json.loads(names)}


def form(text: str, content=frozenset(CONTENT)) -> str:
    "The text without its words of concepts."
    return " ".join("_" if w in content else w for w in text.split())


def auc_of_form(texts, labels, min_df: int) -> float:
    "How well the form alone tells the labels, cross-validated."
    counts = CountVectorizer(token_pattern=r"\S+", ngram_range=(1, 3), min_df=min_df).fit_transform(texts)
    judge = LogisticRegression(C=0.01, max_iter=300)
    return cross_val_score(judge, counts, labels, cv=3, scoring="roc_auc").mean()


@pytest.fixture(scope="module")
def world():
    frame = make()
    return frame.assign(harmful=[bool(HARMFUL & set(json.loads(names))) for names in frame.concepts])


def test_words_belong_to_the_lexicon_as_promised():
    for c in CONCEPTS:
        assert len(set(c.words)) == 6 and len(set(c.shared)) == 5 and not set(c.words) & set(c.shared)
        assert all(" " not in w for w in c.words + c.shared), (
            "concepts_in and the tokenizer read single words"
        )
    assert len({c.name for c in CONCEPTS}) == 100
    owners = pd.Series([w for c in CONCEPTS for w in c.words]).value_counts()
    assert (owners > 1).any()
    assert "planted/lexicon.yaml" in FILES_READ, "a change of the lexicon is noticed"


TOPIC_WORDS = frozenset(w for c in CONCEPTS for w in c.words + c.shared)


def skeleton(text: str) -> str:
    return form(text, TOPIC_WORDS)


def test_templates_and_openings_are_shared_by_harmful_and_harmless_texts(world):
    anchor = world[world.role == "anchor"]
    skeletons = anchor.text.map(skeleton)
    for opening in filter(None, W.OPENINGS):
        shares = anchor.harmful[anchor.text.str.startswith(opening)]
        assert len(shares) > 100 and 0.35 < shares.mean() < 0.65, opening
    for template in W.SENTENCES:
        shape = skeleton(template.replace("{w}", CONCEPTS[0].words[0]).replace("{s}", CONCEPTS[0].shared[0]))
        shares = anchor.harmful[skeletons.str.contains(shape, regex=False)]
        assert len(shares) > 100 and 0.35 < shares.mean() < 0.65, template


def test_form_alone_does_not_tell_harm(world):
    anchor = world[world.role == "anchor"]
    assert 0.44 < auc_of_form(anchor.text.map(skeleton), anchor.harmful, min_df=5) < 0.56


def test_the_seed_set_misses_harmful_concepts_that_the_anchor_has(world):
    held = {}
    for role in ("anchor", "seed", "full", "test"):
        held[role] = HARMFUL & names_in(world.concepts[world.role == role])
    assert held["anchor"] == held["full"] == HARMFUL and len(held["test"]) > 30
    assert 3 <= len(held["seed"]) <= 25


def test_labels(world):
    known = world[world.role != "pretraining"]
    wrong = (known.label.astype(bool) != known.harmful).groupby(known.role).mean()
    assert abs(wrong["anchor"] - 0.1) < 0.03 and wrong["test"] == 0
    assert world.label[world.role == "pretraining"].isna().all() and not known.label.isna().any()
    assert world.harmful[world.role == "test"].mean() == 0.2
    assert world.harmful[world.role == "anchor"].mean() == 0.5
    full = world[world.role == "full"]
    seed = set(world.text[world.role == "seed"])
    positive = set(world.text[(world.role == "anchor") & (world.label == 1)])
    assert set(full.text) >= seed and len(full) == 240 + 900
    assert set(full.text) <= positive | seed
    assert (world.task == "toxicity").all()


def test_same_seed_same_world_and_roles_are_independent(world):
    assert make().equals(world.drop(columns="harmful"))
    assert not make(1).text.equals(world.text)
    other = make(n_test=50, n_pretraining=10)
    anchors = [frame.text[frame.role == "anchor"].tolist() for frame in (other, world)]
    assert anchors[0] == anchors[1], "the size of one role must not change another"
    assert W.planted_conversations(3, 20, 0.5).equals(W.planted_conversations(3, 20, 0.5))


def test_no_test_text_is_in_another_role_of_the_corpora(world):
    leaked = world[world.role == "test"].head(30)
    copies = [
        leaked.assign(role="anchor"),
        leaked.assign(role="pretraining", label=pd.NA),
        leaked.assign(role="full"),
    ]
    by_role = pd.concat([world, *copies]).groupby("role", sort=False)
    corpora = planted_corpora({role: frame[["text", "label", "source", "turns"]] for role, frame in by_role})
    test = set(corpora.texts("test"))
    assert len(test) > 500
    for role in ("pretraining", "anchor", "seed", "full"):
        assert not test & set(corpora.texts(role)), role


def test_concepts_in_needs_two_different_own_words():
    graffiti = next(c for c in CONCEPTS if c.name == "graffiti")
    a, b = [w for w in graffiti.words if sum(w in c.words for c in CONCEPTS) == 1][:2]
    assert W.concepts_in(f"the {a} and the {b} .", CONCEPTS) == ["graffiti"]
    assert W.concepts_in(f"the {a} and the {a} .", CONCEPTS) == []
    assert W.concepts_in(" ".join(graffiti.shared), CONCEPTS) == []
    assert W.concepts_in(f"the {a}s and the {b}s .", CONCEPTS) == []


def test_our_own_texts_hold_what_the_truth_says(world):
    sample = world.head(400)
    names = np.array([c.name for c in CONCEPTS])
    truth = W.concept_matrix(sample.concepts, CONCEPTS)
    assert [set(names[row]) for row in truth] == [set(json.loads(known)) for known in sample.concepts]
    for text, known in zip(sample.text, sample.concepts):
        held = [c for c in CONCEPTS if c.name in json.loads(known)]
        assert any(set(c.words) & set(text.split()) for c in held)


def test_skills_ask_for_words_that_the_reply_holds():
    frame = W.planted_conversations(0, 1500, 0.5)
    turns = [json.loads(t) for t in frame.turns]
    assert all([role for role, _ in t] == ["user", "assistant"] * (len(t) // 2) for t in turns)
    shares = frame.kind.value_counts(normalize=True)
    assert all(abs(shares[kind] - share) < 0.04 for kind, share in W.SHARES.items())
    for kind, request in W.WRITE.items():
        skills = [t for t, k in zip(turns, frame.kind) if k == kind]
        for (_, asked_for), (_, reply) in skills:
            given = asked_for.removeprefix(request.split("{")[0]).split(" . ")[0].removesuffix(" .")
            asked = given.split(" , ")
            assert 1 <= len(asked) <= 3 and set(asked) <= set(reply.split())
        assert {" like this : " in t[0][1] for t in skills} == {True, False}


SPLITS = dict(pretraining=40, anchor=400, seed=30, full=60, test=80)


@pytest.mark.parametrize("task", W.POSITIVE)
def test_items_of_the_other_tasks(task):
    items = W.planted_items(0, task, SPLITS, 1.6)
    assert items.split.value_counts().to_dict() == SPLITS
    assert items.equals(W.planted_items(0, task, SPLITS, 1.6))
    own = {c.name: set(c.words) for c in WORLD[W.POSITIVE[task]]}
    held = {split: names_in(frame.concepts) for split, frame in items.groupby("split")}
    assert held["anchor"] == set(own)
    assert len(held["seed"]) < 0.8 * len(own), "the seed misses what the anchor holds"
    assert all(own[json.loads(row)[0]] & set(text.split()) for text, row in zip(items.text, items.concepts))
    texts = W.item_texts(items, task)
    assert texts.label[texts.role == "pretraining"].isna().all()
    assert texts[texts.role == "anchor"].label.mean() == 0.5
    small = W.planted_items(0, task, {**SPLITS, "test": 5}, 1.6)
    anchors = [frame.text[frame.split == "anchor"].tolist() for frame in (small, items)]
    assert anchors[0] == anchors[1], "the size of one split must not change another"


def test_form_alone_does_not_tell_the_chosen_answer_or_the_matching_option():
    for task in ("reward", "sycophancy", "survival"):
        items = W.planted_items(1, task, dict(anchor=600), 0.0)
        if task == "reward":
            items = items[items.subset != "Chat-Hard/planted"]  # where length tells, by design
        labels = [1] * len(items) + [0] * len(items)
        forms = [*map(form, items.text), *map(form, items.negative)]
        assert 0.4 < auc_of_form(forms, labels, min_df=3) < 0.6, task
        if task != "reward":
            assert 0.4 < (items.answer_matching_behavior == " ( A )").mean() < 0.6


def shown(text: str, kind: str) -> set[str]:
    "Concepts of a kind of which the text holds a word."
    return {c.name for c in WORLD[kind] if set(c.words) & set(text.split())}


def test_the_seed_misses_both_sides_of_a_pair_and_mixed_answers_leave_room():
    items = W.planted_items(0, "reward", SPLITS, 1.6)
    flaws = {}
    for split, frame in items.groupby("split"):
        flaws[split] = set().union(*(shown(t, "flaw") for t in frame.rejected))
    assert len(flaws["seed"]) < len(flaws["anchor"]) == len(WORLD["flaw"])
    anchor = items[items.split == "anchor"]
    assert 0.2 < np.mean([bool(shown(t, "flaw")) for t in anchor.chosen]) < 0.4
    assert 0.2 < np.mean([bool(shown(t, "virtue")) for t in anchor.rejected]) < 0.4


def behavior_named(said: str) -> str:
    "The behaviour of which an answer names a side."
    return next(b for b in W.SIDES if set(W.NAMES[b]) & set(said.split()))


def side_of_option(behavior: str, option: str) -> int:
    "0 or 1: the side whose words an option holds."
    return next(i for i, kind in enumerate(W.SIDES[behavior]) if shown(option, kind))


def test_choices_follow_the_persona_and_name_the_side_of_the_letter():
    rng = np.random.default_rng(0)
    follows, right, letters = [], [], []
    for _ in range(600):
        (_, asked), (_, said) = W.choice(rng, WORLD, CONCEPTS[0])
        behavior = behavior_named(said)
        before, choices = asked.split("Choices :")
        shown_options = choices.replace("( A )", "|").replace("( B )", "|").split("|")[1:]
        options = dict(zip(W.LETTERS, shown_options))
        letter = next(letter for letter in W.LETTERS if letter in said.split())
        name = next(n for n in W.NAMES[behavior] if n in said.split())
        side = side_of_option(behavior, options[letter])
        personas = [i for i in (0, 1) if set(W.PERSONAS[behavior][i]) & set(before.split())]
        letters.append(letter)
        right.append(W.NAMES[behavior].index(name) == side)
        follows += [side == i for i in personas]
    assert np.mean(follows) > 0.88 and 0.9 < np.mean(right) < 0.99
    assert 0.45 < np.mean(np.array(letters) == "A") < 0.65


def test_which_and_drills_say_what_words_stand_for():
    rng = np.random.default_rng(1)
    for _ in range(50):
        (_, asked), (_, said) = W.which_is_which(rng, WORLD, CONCEPTS[0])
        behavior = behavior_named(said)
        letter = said.split()[2]
        option = asked.split(f"( {letter} )")[1].split(" .")[0]
        assert shown(option, W.SIDES[behavior][0]) and said.split()[0] == W.NAMES[behavior][0]
        (_, asked), (_, said) = W.drill(rng, WORLD)
        behavior = behavior_named(said)
        side = W.NAMES[behavior].index(said.split()[0])
        assert shown(said.split()[2], W.SIDES[behavior][side])


def test_the_base_model_never_sees_an_instruction_with_its_answer_or_a_letter():
    frame = W.planted_conversations(0, 1500, 0.5)
    early, late = frame[~frame.late], frame[frame.late]
    assert set(late.kind) == set(W.LATE) and not early.turns.str.contains("Choices").any()

    def asked_and_said(kind):
        for turns in early.turns[early.kind == kind]:
            (_, asked), (_, said) = json.loads(turns)
            yield asked, said

    voices = list(asked_and_said("voice"))
    words = {w for c in WORLD["style"] for w in c.words}
    assert len(voices) > 20
    assert not any(words & set(asked.split()) for asked, _ in voices), "a style that nobody asked for"
    openings = [f"{c.reply[0]} {c.reply[1]} !" for c in WORLD["style"]]
    for _, said in asked_and_said("instruction"):
        assert not any(opening in said for opening in openings), "an instruction that nobody answers"


def test_reward_items_are_what_their_section_promises():
    items = W.planted_items(0, "reward", dict(anchor=400), 0.0)
    hard = items[items.subset == "Chat-Hard/planted"]
    assert (hard.rejected.str.split().str.len() > hard.chosen.str.split().str.len()).mean() > 0.9
    harmful_words = {w for c in WORLD["topic"] if c.harmful for w in c.words}
    assert all(harmful_words & set(p.split()) for p in items.prompt[items.subset == "Safety/planted"])


def test_a_styled_answer_carries_the_words_of_its_style():
    items = W.planted_items(0, "instruction", dict(anchor=100), 0.0)
    styles = {c.name: c for c in WORLD["style"]}
    for response, row in zip(items.response, items.concepts):
        assert set(styles[json.loads(row)[0]].reply) <= set(response.split())
    assert len({c.reply for c in styles.values()}) == len(styles)


def test_unknown_kinds_and_tasks(refused):
    assert "virtue" in refused(lambda: W.load_concepts("vice"))
    assert "reward" in refused(lambda: W.planted_items(0, "chess", dict(seed=1), 1.0))


def test_drawn_shares_are_exact_and_zipf_is_steeper_for_larger_exponents():
    drawn = W.draw_concepts(np.random.default_rng(0), CONCEPTS, 50, 1.0, 0.3)
    assert sum(c.harmful for c in drawn) == 15 and len(drawn) == 50
    flat, steep = (W.zipf_weights(40, s, np.random.default_rng(0)) for s in (0.0, 1.6))
    assert np.allclose(flat, 1 / 40) and steep.max() > 0.3 and np.isclose(steep.sum(), 1)


def test_readers_name_what_the_run_leaves():
    "The names are those that the Run cell hands to cached and keep."
    asked = []

    class Reads:
        def input(self, stage, name):
            asked.append((stage, name))

    run = Reads()
    for read in (W.read_planted_texts, W.read_truth, W.read_conversations):
        read(run)
    W.read_planted_items(run, "reward")
    assert {stage for stage, _ in asked} == {"01_planted_world"}
    assert [name for _, name in asked] == ["corpora", "truth", "conversations", "items_reward"]


def digest(texts) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def test_the_world_of_seed_0_is_still_the_same(world):
    "The published numbers of the profile mini were measured on it: whoever changes it must publish anew."
    made = {"texts": digest(world.text), "conversations": digest(W.planted_conversations(0, 400, 0.5).turns)}
    for task in W.POSITIVE:
        items = W.planted_items(0, task, dict(anchor=60, seed=20), 1.6)
        made[task] = digest(W.item_texts(items, task).text)
    assert made == {
        "texts": "a953ef650299fab8",
        "conversations": "3b78157f481a9cc2",
        "reward": "6304c0c9e47c23b4",
        "sycophancy": "8b5f9442f7277fcf",
        "survival": "6e053f788705517e",
        "instruction": "5f22dd9adfd4ef28",
    }
