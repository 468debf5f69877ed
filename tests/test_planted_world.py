"The planted world: what it must hide from a shortcut, and what it must plant."

import json

import numpy as np
import pandas as pd
import pytest
from fac_synthesis.data.corpora import planted_corpora
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from fac_synthesis import planted_world as W

CONCEPTS = W.load_concepts()
HARMFUL = {c.name for c in CONCEPTS if c.harmful}
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
    return W.planted_texts(seed, **{**SIZES, **changes})


@pytest.fixture(scope="module")
def world():
    frame = make()
    return frame.assign(harmful=[bool(HARMFUL & set(json.loads(names))) for names in frame.concepts])


def test_words_belong_to_the_lexicon_as_promised():
    assert all(
        len(set(c.words)) == 6 and len(set(c.shared)) == 5 and not set(c.words) & set(c.shared)
        for c in CONCEPTS
    )
    assert all(" " not in w for c in CONCEPTS for w in c.words + c.shared), (
        "concepts_in and the word tokenizer read single words"
    )
    assert len({c.name for c in CONCEPTS}) == 100
    owners = pd.Series([w for c in CONCEPTS for w in c.words]).value_counts()
    assert (owners > 1).any()


def skeleton(text: str) -> str:
    content = {w for c in CONCEPTS for w in c.words + c.shared}
    return " ".join("_" if w in content else w for w in text.split())


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
    counts = CountVectorizer(token_pattern=r"\S+", ngram_range=(1, 3), min_df=5).fit_transform(
        anchor.text.map(skeleton)
    )
    auc = cross_val_score(
        LogisticRegression(C=0.01, max_iter=300), counts, anchor.harmful, cv=3, scoring="roc_auc"
    ).mean()
    assert 0.44 < auc < 0.56


def test_the_seed_set_misses_harmful_concepts_that_the_anchor_has(world):
    held = {
        role: HARMFUL & {n for names in world.concepts[world.role == role] for n in json.loads(names)}
        for role in ("anchor", "seed", "full", "test")
    }
    assert held["anchor"] == held["full"] == HARMFUL and len(held["test"]) > 30
    assert 3 <= len(held["seed"]) <= 25


def test_labels(world):
    wrong = (
        world[world.role != "pretraining"]
        .assign(wrong=lambda f: f.label.astype(bool) != f.harmful)
        .groupby("role")
        .wrong.mean()
    )
    assert abs(wrong["anchor"] - 0.1) < 0.03 and wrong["test"] == 0
    assert (
        world.label[world.role == "pretraining"].isna().all()
        and not world.label[world.role != "pretraining"].isna().any()
    )
    assert (
        world.harmful[world.role == "test"].mean() == 0.2
        and world.harmful[world.role == "anchor"].mean() == 0.5
    )
    full, positive = world[world.role == "full"], world.text[(world.role == "anchor") & (world.label == 1)]
    assert (
        set(full.text) >= set(world.text[world.role == "seed"])
        and len(full) == 240 + 900
        and set(full.text) <= set(positive) | set(world.text[world.role == "seed"])
    )


def test_same_seed_same_world_and_roles_are_independent(world):
    assert make().equals(world.drop(columns="harmful"))
    assert not make(1).text.equals(world.text)
    other = make(n_test=50, n_pretraining=10)
    assert other.text[other.role == "anchor"].tolist() == world.text[world.role == "anchor"].tolist(), (
        "the size of one role must not change another"
    )
    assert W.planted_conversations(3, 20, 0.5).equals(W.planted_conversations(3, 20, 0.5))


def test_no_test_text_is_in_another_role_of_the_corpora(world):
    leaked = world[world.role == "test"].head(30)
    rows = pd.concat(
        [
            world,
            leaked.assign(role="anchor"),
            leaked.assign(role="pretraining", label=pd.NA),
            leaked.assign(role="full"),
        ]
    )
    corpora = planted_corpora(
        {
            role: frame[["text", "label", "source", "turns"]]
            for role, frame in rows.groupby("role", sort=False)
        }
    )
    test = set(corpora.texts("test"))
    assert len(test) > 500
    for role in ("pretraining", "anchor", "seed", "full"):
        assert not test & set(corpora.texts(role)), role


def test_concepts_in_needs_two_different_own_words():
    graffiti = next(c for c in CONCEPTS if c.name == "graffiti")
    a, b = [w for w in graffiti.words if sum(w in c.words for c in CONCEPTS) == 1][:2]
    assert W.concepts_in(f"the {a} and the {b} .", CONCEPTS) == ["graffiti"]
    assert (
        W.concepts_in(f"the {a} and the {a} .", CONCEPTS)
        == []
        == W.concepts_in(" ".join(graffiti.shared), CONCEPTS)
    )
    assert W.concepts_in(f"the {a}s and the {b}s .", CONCEPTS) == []


def test_our_own_texts_hold_what_the_truth_says(world):
    sample = world.head(400)
    truth = W.concept_matrix(sample.concepts, CONCEPTS)
    assert [set(np.array([c.name for c in CONCEPTS])[row]) for row in truth] == [
        set(json.loads(names)) for names in sample.concepts
    ]
    own = [
        any(set(c.words) & set(text.split()) for c in CONCEPTS if c.name in names)
        for text, names in zip(sample.text, sample.concepts)
    ]
    assert all(own)


def test_skills_ask_for_words_that_the_reply_holds():
    frame = W.planted_conversations(0, 1500, 0.5)
    turns = [json.loads(t) for t in frame.turns]
    assert all([role for role, _ in t] == ["user", "assistant"] * (len(t) // 2) for t in turns)
    shares = frame.kind.value_counts(normalize=True)
    assert all(abs(shares[kind] - share) < 0.04 for kind, share in W.SHARES.items())
    for kind, request in W.WRITE.items():
        skills = [t for t, k in zip(turns, frame.kind) if k == kind]
        for (_, asked_for), (_, reply) in skills:
            asked = (
                asked_for.removeprefix(request.split("{")[0]).split(" . ")[0].removesuffix(" .").split(" , ")
            )
            assert 1 <= len(asked) <= 3 and set(asked) <= set(reply.split())
        assert {" like this : " in t[0][1] for t in skills} == {True, False}


WORLD = {kind: W.load_concepts(kind) for kind in W.KINDS}
SPLITS = dict(pretraining=40, anchor=400, seed=30, full=60, test=80)


@pytest.mark.parametrize("task", W.POSITIVE)
def test_items_of_the_other_tasks(task):
    items = W.planted_items(0, task, SPLITS, 1.6)
    assert items.split.value_counts().to_dict() == SPLITS and items.equals(
        W.planted_items(0, task, SPLITS, 1.6)
    )
    names = {c.name for c in WORLD[W.POSITIVE[task]]}
    of = {
        split: {n for row in frame.concepts for n in json.loads(row)}
        for split, frame in items.groupby("split")
    }
    assert of["anchor"] == names and len(of["seed"]) < 0.8 * len(names), (
        "the seed misses what the anchor holds"
    )
    own = {c.name: set(c.words) for c in WORLD[W.POSITIVE[task]]}
    assert all(own[json.loads(row)[0]] & set(text.split()) for text, row in zip(items.text, items.concepts))
    texts = W.item_texts(items, task)
    assert (
        texts.label[texts.role == "pretraining"].isna().all()
        and texts[texts.role == "anchor"].label.mean() == 0.5
    )
    small = W.planted_items(0, task, {**SPLITS, "test": 5}, 1.6)
    assert small[small.split == "anchor"].text.tolist() == items[items.split == "anchor"].text.tolist(), (
        "the size of one split must not change another"
    )


def test_form_alone_does_not_tell_the_chosen_answer_or_the_matching_option():
    for task in ("reward", "sycophancy", "survival"):
        items = W.planted_items(1, task, dict(anchor=600), 0.0)
        if task == "reward":
            items = items[items.subset != "Chat-Hard/planted"]  # where length tells, by design
        content = {w for concepts in WORLD.values() for c in concepts for w in c.words + c.shared}
        form = lambda text: " ".join("_" if w in content else w for w in text.split())
        labels = [1] * len(items) + [0] * len(items)
        counts = CountVectorizer(token_pattern=r"\S+", ngram_range=(1, 3), min_df=3).fit_transform(
            [*map(form, items.text), *map(form, items.negative)]
        )
        auc = cross_val_score(
            LogisticRegression(C=0.01, max_iter=300), counts, labels, cv=3, scoring="roc_auc"
        ).mean()
        assert 0.4 < auc < 0.6, task
        if task != "reward":
            assert 0.4 < (items.answer_matching_behavior == " ( A )").mean() < 0.6


def test_the_seed_misses_both_sides_of_a_pair_and_mixed_answers_leave_room():
    items = W.planted_items(0, "reward", SPLITS, 1.6)
    shown = lambda text, kind: {c.name for c in WORLD[kind] if set(c.words) & set(text.split())}
    flaws = {
        split: set().union(*(shown(t, "flaw") for t in frame.rejected))
        for split, frame in items.groupby("split")
    }
    assert len(flaws["seed"]) < len(flaws["anchor"]) == len(WORLD["flaw"])
    both = items[items.split == "anchor"]
    assert (
        0.2 < both.chosen.map(lambda t: bool(shown(t, "flaw"))).mean() < 0.4
        and 0.2 < both.rejected.map(lambda t: bool(shown(t, "virtue"))).mean() < 0.4
    )


def test_choices_follow_the_persona_and_name_the_side_of_the_letter():
    rng, follows, right, letters = np.random.default_rng(0), [], [], []
    for _ in range(600):
        asked, said = (text for _, text in W.choice(rng, WORLD, CONCEPTS[0], which=False))
        behavior = next(b for b in W.SIDES if set(W.NAMES[b]) & set(said.split()))
        options = dict(
            zip(
                W.LETTERS,
                asked.split("Choices :")[1].replace("( A )", "|").replace("( B )", "|").split("|")[1:],
            )
        )
        letter, name = (
            next(l for l in W.LETTERS if l in said.split()),
            next(n for n in W.NAMES[behavior] if n in said.split()),
        )
        side = next(
            i
            for i, kind in enumerate(W.SIDES[behavior])
            if any(set(c.words) & set(options[letter].split()) for c in WORLD[kind])
        )
        personas = [
            i for i in (0, 1) if set(W.PERSONAS[behavior][i]) & set(asked.split("Choices")[0].split())
        ]
        letters.append(letter)
        right.append(W.NAMES[behavior].index(name) == side)
        follows += [side == i for i in personas]
    assert (
        np.mean(follows) > 0.88
        and 0.9 < np.mean(right) < 0.99
        and 0.45 < np.mean(np.array(letters) == "A") < 0.65
    )


def test_which_and_drills_say_what_words_stand_for():
    rng = np.random.default_rng(1)
    for _ in range(50):
        asked, said = (text for _, text in W.choice(rng, WORLD, CONCEPTS[0], which=True))
        behavior = next(b for b in W.SIDES if set(W.NAMES[b]) & set(said.split()))
        letter = said.split()[2]
        option = asked.split(f"( {letter} )")[1].split(" .")[0]
        assert (
            any(set(c.words) & set(option.split()) for c in WORLD[W.SIDES[behavior][0]])
            and said.split()[0] == W.NAMES[behavior][0]
        )
        (_, asked), (_, said) = W.drill(rng, WORLD)
        behavior, side = next((b, i) for b in W.SIDES for i in (0, 1) if W.NAMES[b][i] == said.split()[0])
        assert any(said.split()[2] in c.words for c in WORLD[W.SIDES[behavior][side]])


def test_the_base_model_never_sees_an_instruction_with_its_answer_or_a_letter():
    frame = W.planted_conversations(0, 1500, 0.5)
    early, late = frame[~frame.late], frame[frame.late]
    assert set(late.kind) == set(W.LATE) and not early.turns.str.contains("Choices").any()
    words = {w for c in WORLD["style"] for w in c.words}
    asks = lambda kind: [json.loads(turns) for turns in early.turns[early.kind == kind]]
    assert len(asks("voice")) > 20 and not any(words & set(t[0][1].split()) for t in asks("voice")), (
        "a style that nobody asked for"
    )
    assert not any(
        f"{c.reply[0]} {c.reply[1]} !" in t[1][1] for t in asks("instruction") for c in WORLD["style"]
    ), "an instruction that nobody answers"


def test_reward_items_are_what_their_section_promises():
    items = W.planted_items(0, "reward", dict(anchor=400), 0.0)
    longer = items[items.subset == "Chat-Hard/planted"]
    assert (longer.rejected.str.split().str.len() > longer.chosen.str.split().str.len()).mean() > 0.9
    harmful_words = {w for c in WORLD["topic"] if c.harmful for w in c.words}
    assert all(harmful_words & set(p.split()) for p in items.prompt[items.subset == "Safety/planted"])


def test_a_styled_answer_carries_the_words_of_its_style():
    items, styles = (
        W.planted_items(0, "instruction", dict(anchor=100), 0.0),
        {c.name: c for c in WORLD["style"]},
    )
    assert all(
        set(styles[json.loads(row)[0]].reply) <= set(response.split())
        for response, row in zip(items.response, items.concepts)
    )
    assert len({c.reply for c in styles.values()}) == len(styles)


def test_unknown_kinds_and_tasks(refused):
    assert "virtue" in refused(lambda: W.load_concepts("vice")) and "reward" in refused(
        lambda: W.planted_items(0, "chess", dict(seed=1), 1.0)
    )


def test_drawn_shares_are_exact_and_zipf_is_steeper_for_larger_exponents():
    drawn = W.draw_concepts(np.random.default_rng(0), CONCEPTS, 50, 1.0, 0.3)
    assert sum(c.harmful for c in drawn) == 15 and len(drawn) == 50
    flat, steep = (W.zipf_weights(40, s, np.random.default_rng(0)) for s in (0.0, 1.6))
    assert np.allclose(flat, 1 / 40) and steep.max() > 0.3 and np.isclose(steep.sum(), 1)
