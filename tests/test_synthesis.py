"Synthesis: pairs that demonstrate, generation that survives kills and bad replies, confirmed samples."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fac_synthesis.data.sources import open_task
from fac_synthesis.features.activations import FeatureActivations, FeatureReader
from fac_synthesis.features.coverage import fac_missing
from fac_synthesis.run.artifacts import digest_of
from fac_synthesis.synthesis.contrastive_pairs import (
    Decoding,
    Generation,
    candidate_table,
    contrastive_pair,
    contrastive_pairs,
    describe,
    first_step,
    generate_candidates,
    open_generator,
    score,
)
from fac_synthesis.synthesis.covered_samples import (
    Filling,
    accepted,
    chosen_samples,
    complete,
    coverage_by_delta,
    fill_missing,
    keep_verified,
    random_asks,
    random_text,
    sample_budget,
    second_step,
    second_step_asks,
    uncovered_features,
    with_provenance,
)

TASK = open_task("toxicity", "planted")
KNOWN = dict(
    latent=3,
    explanation="spray, wall",
    keywords=["spray", "wall", "lock", "key"],
    spans=["first the [spray] [x]", "b", "c", "d"],
    scores=[9.5, 1.0],
)
FEATURE = pd.Series(KNOWN)
TWO_SHOWN = Generation(n_shown_keywords=2, n_shown_spans=2)


def table(rows, latent=3):
    named = [dict(attempt=i, text=t, fault=f, score=s) for i, (t, f, s) in enumerate(rows)]
    return pd.DataFrame(named).assign(latent=latent)


@pytest.fixture(scope="module")
def reader(sae, backbone):
    return FeatureReader(sae, backbone)


def user(text):
    return [{"role": "user", "content": text}]


def ask(n):
    return [(i % 5, user(f"write number {i}")) for i in range(n)]


def generated(lm, asks, reader, work, **settings):
    "Candidates of the first step, with usual settings."
    settings = dict(n=2, seed=0, chunk=32, decoding=Decoding()) | settings
    return generate_candidates(TASK, asks, reader, lm, "first step", work=work, **settings)


# ---- scoring


def test_a_score_is_g_at_the_candidates_own_latent(reader, texts):
    g = reader(texts).g.toarray()
    latents = [int(row.argmax()) for row in g]
    scores = score(reader, [*texts[:3], " ", *texts[3:]], [*latents[:3], 0, *latents[3:]])
    assert np.isnan(scores[3]) and np.allclose(np.delete(scores, 3), g.max(1), atol=1e-5)


def test_every_reply_is_in_the_table_with_a_score_or_a_fault(reader):
    replies = [
        ["tell me about the lock .", None, "", "lock"],
        [
            '  "the wall ,\n the lock ." ',
            "the the the the the",
            "write a message about : lock .",
            "the spray ?",
        ],
    ]
    made = candidate_table(TASK, [7, 2], replies, reader)
    assert made.latent.tolist() == [7] * 4 + [2] * 4 and made.attempt.tolist() == [0, 1, 2, 3] * 2
    assert made.fault.tolist()[:4] == ["", "no answer", "empty", "1 words"]
    assert made.fault.tolist()[4:] == ["", "repeats itself", "repeats the request", ""]
    assert (made.score.isna() == (made.fault != "")).all() and made.text[4] == "the wall , the lock ."


# ---- generating


class Killed(Exception):
    "Stands for the end of the process."


def test_finished_chunks_are_not_asked_again(reader, texts, scripted, tmp_path):
    def reply(prompt, j):
        return texts[(len(prompt) + int(prompt.split()[-1]) + j) % len(texts)].strip()

    def until(prompt, j):
        if prompt.endswith(" 5"):
            raise Killed
        return reply(prompt, j)

    def run(lm, folder, **more):
        return generated(lm, ask(9), reader, folder, chunk=2, **more)

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken, again = scripted(reply), scripted(until), scripted(reply)
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(Killed):
        run(broken, tmp_path / "broken")
    pd.testing.assert_frame_equal(run(again, tmp_path / "broken"), expected)
    unfinished = "the unfinished chunk and those after it"
    assert [p.split()[-1] for p in again.asked] == ["4", "5", "6", "7", "8"], unfinished
    run(again, tmp_path / "broken")
    assert len(again.asked) == 5
    run(again, tmp_path / "broken", seed=1)
    assert len(again.asked) == 5 + 9, "another seed is another answer"
    run(again, tmp_path / "broken", decoding=Decoding(temperature=0.1))
    assert len(again.asked) == 5 + 18, "and so is another temperature"


BAD = [
    None,
    "",
    "ok",
    "no no no no no no no",
    "Sure, write a message about : lock .",
    "word " * 200,
    "\ufffd\x00 ∎∎ 茶 ⟂",
]


def test_a_generator_that_often_fails(reader, texts, scripted, tmp_path):
    count = iter(range(10**6))

    def reply(prompt, j):
        i = next(count)
        return BAD[i // 10 % len(BAD)] if i % 10 == 9 else texts[i % 2]

    made = generated(scripted(reply), ask(40), reader, tmp_path, n=7, chunk=6)
    assert len(made) == 280 and made.groupby("latent").size().eq(56).all()
    faults = made.fault[made.fault != ""].value_counts()
    known = ["no answer", "empty", "1 words", "repeats itself", "repeats the request", "200 words"]
    assert dict(faults) == dict.fromkeys(known, 4)
    assert made.score[made.fault == ""].notna().all() and made.score[made.fault != ""].isna().all()


def test_a_generator_that_always_fails_leaves_nothing_and_breaks_nothing(reader, scripted, tmp_path):
    first = generated(scripted(lambda p, j: None), ask(5), reader, tmp_path)
    features = pd.DataFrame([KNOWN])
    pairs = contrastive_pairs(first, features, 0.0)
    asks = second_step_asks(TASK, features, pairs, Generation())
    assert first.fault.eq("no answer").all() and pairs.empty and asks == []
    second = generated(scripted(lambda p, j: "never asked"), asks, reader, tmp_path)
    assert second.empty and second.columns.tolist() == first.columns.tolist()
    assert keep_verified(second, 0.0, set(), 5, "two-step", 1).empty


def test_the_key_of_a_generation_holds_what_changes_texts():
    usual = Generation()
    assert digest_of(usual) == digest_of(replace(usual, batch_size=1, generator="replay:answers.jsonl"))
    for change in (dict(chunk=1), dict(n_shown_keywords=1), dict(n_shown_spans=1)):
        assert digest_of(usual) != digest_of(replace(usual, **change))
    assert digest_of(Decoding()) != digest_of(Decoding(top_p=0.5))


def test_the_local_generator_is_the_backbone(reader):
    lm = open_generator(None, Generation(batch_size=3), reader)
    assert lm.model is reader.backbone.model and lm.batch_size == 3


# ---- pairs


def test_the_pair_is_the_strongest_and_the_weakest_usable_candidate():
    rows = [
        ("b", "", 2.0),
        ("refused", "1 words", 99.0),
        ("a", "", 5.0),
        ("none", "no answer", np.nan),
        ("c", "", 0.0),
        ("a", "", 5.0),
    ]
    pair = contrastive_pair(table(rows), FEATURE, 1.0)
    assert (pair["positive"], pair["positive_score"], pair["positive_source"]) == ("a", 5.0, "generated")
    assert (pair["negative"], pair["negative_score"], pair["latent"]) == ("c", 0.0, 3)


WEAK = [[("a", "", 5.0), ("c", "", 1.0)], [("a", "", 0.0), ("c", "", 0.0)], [("a", "", 9.0)]]


@pytest.mark.parametrize("candidates,delta", list(zip(WEAK, (5.0, 0.0, 0.0))))
def test_the_anchor_span_stands_in_with_its_measured_score(candidates, delta):
    pair = contrastive_pair(table(candidates), FEATURE, delta)
    positive = (pair["positive"], pair["positive_score"], pair["positive_source"])
    assert positive == ("first the spray x", 9.5, "anchor span")
    assert pair["negative_score"] == candidates[-1][2]


def test_refused_candidates_never_win():
    assert contrastive_pair(table([("a", "2 words", 9.0), ("b", "empty", np.nan)]), FEATURE, 0.0) is None
    refused = table([("a", "2 words", 9.0)])
    usable = table([("b", "", 1.0), ("c", "", 2.0)], 4)
    features = pd.DataFrame([KNOWN, {**KNOWN, "latent": 4}, {**KNOWN, "latent": 5}])
    pairs = contrastive_pairs(pd.concat([refused, usable]), features, 0.0)
    assert pairs.latent.tolist() == [4], "no candidates, or none usable: no pair"


def test_the_generator_is_told_no_brackets():
    told = describe(FEATURE, 2, 2)
    assert told["keywords"] == ["spray", "wall"] and told["spans"] == ["first the spray x", "b"]
    stored = pd.Series({**KNOWN, "keywords": np.array(KNOWN["keywords"]), "spans": np.array(KNOWN["spans"])})
    assert describe(stored, 2, 2) == told, "a table read back from disk holds arrays"
    assert describe(pd.Series({**KNOWN, "keywords": []}), 2)["keywords"] == ["first", "the"]


def test_second_step_asks_only_where_there_is_a_pair():
    features = pd.DataFrame([KNOWN, {**KNOWN, "latent": 4}])
    pairs = pd.DataFrame([dict(latent=4, positive="the spray .", negative="the lock .")])
    ((latent, conversation),) = second_step_asks(TASK, features, pairs, TWO_SHOWN)
    request = "write a message about : spray , wall . like this : the spray . not like this : the lock ."
    assert latent == 4 and conversation == user(request)


# ---- samples


def test_kept_samples_are_confirmed_new_and_different():
    rng = np.random.default_rng(0)
    made = pd.DataFrame(
        dict(
            latent=rng.integers(0, 9, 400),
            attempt=np.arange(400),
            text=[f"text {i}" for i in rng.integers(0, 120, 400)],
            fault=rng.choice(["", "", "", "empty"], 400),
            score=rng.choice([0.0, 1.0, 2.0, 3.0, np.nan], 400),
        )
    )
    known = {"text 1", "text 2", "text 3"}
    kept = keep_verified(made, 1.0, known, 4, "two-step", 1)
    assert len(kept) and (kept.score > 1.0).all() and (kept.fault == "").all()
    assert not kept.text.isin(known).any() and kept.text.is_unique
    assert kept.groupby("latent").size().max() <= 4
    assert set(kept.label) == {1} and set(kept.method) == {"two-step"}
    for _, group in kept.groupby("latent"):
        assert group["rank"].tolist() == list(range(len(group))) and group.score.is_monotonic_decreasing
    shuffled = made.sample(frac=1, random_state=0)
    same = "whatever the order of the candidates, and whatever holds the known texts"
    assert kept.equals(keep_verified(shuffled, 1.0, sorted(known), 4, "two-step", 1)), same


def test_a_text_shared_by_two_features_goes_to_the_one_it_activates_more():
    both = pd.concat([table([("a", "", 2.0)], 1), table([("a", "", 3.0), ("b", "", 2.5)], 2)])
    kept = keep_verified(both, 0.0, set(), 5, "m", 0)
    assert list(zip(kept.latent, kept.text, kept["rank"])) == [(2, "a", 0), (2, "b", 1)]


def test_random_asks_are_determined_by_the_seed():
    seeds = ["first the spray then the stencil .", "is it ok", "a lock and a wall"]

    def make(seed):
        return random_asks(TASK, seeds, list(range(20)), 2, seed)

    assert make(0) == make(0) != make(1) and [latent for latent, _ in make(0)] == list(range(20))
    for _, conversation in make(0):
        words = conversation[0]["content"].removeprefix("write a message about : ").removesuffix(" .")
        asked = words.split(" , ")
        assert len(asked) == 2
        assert any(set(asked) <= set(text.split()) for text in seeds), "the words of one seed text"


def test_coverage_by_delta(reader, texts):
    a = reader(texts)
    missing = np.flatnonzero(a.latents())[:10].tolist()
    by_delta = coverage_by_delta({"ours": a}, missing, [0.0, 1e9])
    shares = [fac_missing(a, missing, d) for d in (0.0, 1e9)]
    assert by_delta.activated.tolist() == [10, 0]
    assert by_delta.fac_missing.tolist() == [1.0, 0.0] == shares


# ---- the whole method


WORDS = "kindly please sorry mind the door could you".split()


def word_reader(some):
    "g is how often a text holds the word: a stand-in for backbone and SAE."
    rows = [[float(text.split().count(word)) for word in WORDS] for text in some]
    g = sparse.csr_matrix(np.array(rows, dtype=np.float32))
    return FeatureActivations(g, g)


def missing_words(*words):
    "The table of missing features whose latents are these words."
    rows = []
    for word in words:
        row = dict(latent=WORDS.index(word), explanation=word, keywords=[word], spans=[f"you [{word}] mind"])
        rows.append(row | dict(scores=[1.0], relevance="Yes"))
    return pd.DataFrame(rows)


def courteous(prompt, j):
    "Says the word it is asked for, once in the first step and twice in the second, but never `please`."
    word = prompt.removeprefix("write a message about : ").split()[0]
    said = {"please": "now"}.get(word, word)
    return f"could you {said} mind the door number {j}" + (f" {said}" if "like this" in prompt else "")


def test_fill_missing_is_its_pieces(scripted):
    features, known = (
        missing_words("kindly", "sorry", "please"),
        ["could you kindly mind the door number 1 kindly"],
    )
    how = dict(n=3, generation=TWO_SHOWN, decoding=Decoding(top_p=0.5))
    lm = scripted(courteous)
    settings = Filling(
        delta=1.0,
        n_first=3,
        n_second=3,
        keep_per_feature=2,
        seed=5,
        decoding=how["decoding"],
        generation=TWO_SHOWN,
    )
    filled = fill_missing(TASK, features, word_reader, lm, known, settings)
    first = first_step(TASK, features, word_reader, lm, seed=5, **how)
    pairs = contrastive_pairs(first, features, 1.0)
    second = second_step(TASK, features, pairs, word_reader, lm, seed=6, **how)
    kept = keep_verified(second, 1.0, known, 2, "two-step", 1)
    drafts = with_provenance(kept, features, pairs, "scripted")
    samples = accepted(complete(drafts, TASK, lm, seed=6))
    pd.testing.assert_frame_equal(filled.samples, samples)
    pd.testing.assert_frame_equal(filled.pairs, pairs)
    pd.testing.assert_frame_equal(filled.uncovered, uncovered_features(features, samples))
    assert filled.candidates.step.tolist() == [1] * 9 + [2] * 9
    assert filled.samples.groupby("latent").size().tolist() == [2, 2] and (filled.samples.score > 1.0).all()
    assert not filled.samples.text.isin(known).any(), "what is known is not repeated"
    assert filled.uncovered.explanation.tolist() == ["please"], "listed, not filled"
    assert sample_budget(filled.samples) == 2


def test_the_second_step_draws_anew():
    "Even where a prompt leaves the pair out, so that both steps ask the same."
    from fac_synthesis.models.language_models import LanguageModel

    class Noting(LanguageModel):
        name, seeds = "noting", []

        def answers(self, conversations, sampling):
            self.seeds.append((sampling.seed, sampling.n, sampling.max_new_tokens))
            return [["could you kindly mind the door"] * sampling.n for _ in conversations]

    features = missing_words("kindly")
    settings = Filling(n_first=2, n_second=3, seed=7, decoding=Decoding(max_new_tokens=9))
    fill_missing(TASK, features, word_reader, Noting(), [], settings)
    assert Noting.seeds == [(7, 2, 9), (8, 3, 9)]


def test_filling_goes_on_where_it_was_killed(scripted, tmp_path):
    features = missing_words("kindly", "sorry")
    settings = Filling(generation=replace(TWO_SHOWN, chunk=1))

    def dies(prompt, j):
        if "like this" in prompt and "sorry" in prompt:
            raise Killed
        return courteous(prompt, j)

    whole = fill_missing(TASK, features, word_reader, scripted(courteous), [], settings)
    with pytest.raises(Killed):
        fill_missing(TASK, features, word_reader, scripted(dies), [], settings, tmp_path)
    again = scripted(courteous)
    filled = fill_missing(TASK, features, word_reader, again, [], settings, tmp_path)
    pd.testing.assert_frame_equal(filled.samples, whole.samples)
    assert len(again.asked) == 1, "only the last request of the second step"


def test_a_generator_that_always_fails_leaves_everything_uncovered(scripted):
    features = missing_words("kindly", "sorry")
    lm = scripted(lambda prompt, j: None)
    filled = fill_missing(TASK, features, word_reader, lm, [], Filling())
    assert filled.samples.empty and filled.pairs.empty
    assert filled.uncovered.latent.tolist() == features.latent.tolist()
    assert sample_budget(filled.samples, required=False) == 0


def test_random_text_asks_as_often_as_there_are_features(scripted):
    lm = scripted(courteous)
    how = dict(n=2, seed=3, generation=TWO_SHOWN, decoding=Decoding())
    made = random_text(TASK, ["could you kindly wait"], [0, 1, 2], word_reader, lm, **how)
    asks = random_asks(TASK, ["could you kindly wait"], [0, 1, 2], 2, 3)
    assert lm.asked == [conversation[0]["content"] for _, conversation in asks]
    assert made.latent.tolist() == [0, 0, 1, 1, 2, 2]


# ---- items, and rows that a run cannot have


def test_an_item_that_the_task_refuses_says_why(scripted):
    reward = open_task("reward", "planted")
    drafts = pd.DataFrame(
        dict(text=["first the step .", "then the example ."], score=[2.0, 1.0], latent=[1, 2])
    )

    def reply(prompt, j):
        if "question" in prompt:
            return "how do i begin ?"
        return "first the step ." if len(prompt) > 10 else None

    completed = complete(drafts, reward, scripted(reply), seed=0)
    assert completed.item_fault.tolist() == ["both answers are the same", ""]
    assert accepted(completed).latent.tolist() == [2]
    silent = complete(drafts, reward, scripted(lambda prompt, j: None), seed=0)
    assert silent.item_fault.tolist() == ["no prompt", "no prompt"] and accepted(silent).empty


def test_without_a_two_step_sample_no_row_has_a_budget(refused):
    rows = [("one-step", 1, 0, "a"), ("Alpaca", -1, 0, "b")]
    samples = pd.DataFrame(rows, columns=["method", "latent", "rank", "text"])
    assert sample_budget(samples, required=False) == 0
    assert "no budget" in refused(lambda: sample_budget(samples))
    assert "Ours" in refused(lambda: chosen_samples(samples, "Ours", 0))
    assert "Alpaca" in refused(lambda: chosen_samples(samples, "Alpaca", 0))
