"Synthesis: pairs that demonstrate, generation that survives kills and bad replies, samples that the SAE confirmed."

import numpy as np
import pandas as pd
import pytest
from fac_synthesis.data.sources import open_task
from fac_synthesis.features.activations import FeatureReader
from fac_synthesis.features.coverage import fac_missing
from fac_synthesis.synthesis.contrastive_pairs import (
    candidate_table,
    contrastive_pair,
    contrastive_pairs,
    describe,
    generate_candidates,
    score,
)
from fac_synthesis.synthesis.covered_samples import (
    chosen_samples,
    coverage_by_delta,
    keep_verified,
    needs_task,
    random_asks,
    sample_budget,
    second_step_asks,
)

TASK = open_task("toxicity", planted=True)
KNOWN = dict(
    latent=3,
    explanation="spray, wall",
    keywords=["spray", "wall", "lock", "key"],
    spans=["first the [spray] [x]", "b", "c", "d"],
    scores=[9.5, 1.0],
)
FEATURE = pd.Series(KNOWN)


def table(rows, latent=3):
    return pd.DataFrame(
        [dict(latent=latent, attempt=i, text=t, fault=f, score=s) for i, (t, f, s) in enumerate(rows)]
    )


@pytest.fixture(scope="module")
def reader(sae, backbone):
    return FeatureReader(sae, backbone)


def ask(n):
    return [(i % 5, [{"role": "user", "content": f"write number {i}"}]) for i in range(n)]


# --- scoring ---------------------------------------------------------------------------------------------------------------------------------


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
    assert made.fault.tolist() == [
        "",
        "no answer",
        "empty",
        "1 words",
        "",
        "repeats itself",
        "repeats the request",
        "",
    ]
    assert (made.score.isna() == (made.fault != "")).all() and made.text[4] == "the wall , the lock ."


# --- generating ------------------------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    "Stands for the end of the process."


def test_finished_chunks_are_not_asked_again(reader, texts, scripted, tmp_path):
    reply = lambda prompt, j: texts[(len(prompt) + int(prompt.split()[-1]) + j) % len(texts)].strip()

    def until(prompt, j):
        if prompt.endswith(" 5"):
            raise Killed
        return reply(prompt, j)

    run = lambda lm, folder, **more: generate_candidates(
        lm, TASK, ask(9), reader, folder, "first step", **{**dict(n=2, seed=0, chunk=2), **more}
    )
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken, again = scripted(reply), scripted(until), scripted(reply)
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(Killed):
        run(broken, tmp_path / "broken")
    pd.testing.assert_frame_equal(run(again, tmp_path / "broken"), expected)
    assert [p.split()[-1] for p in again.asked] == ["4", "5", "6", "7", "8"], (
        "the unfinished chunk and those after it"
    )
    run(again, tmp_path / "broken")
    assert len(again.asked) == 5
    run(again, tmp_path / "broken", seed=1)
    assert len(again.asked) == 5 + 9, "another seed is another answer"
    run(again, tmp_path / "broken", temperature=0.1)
    assert len(again.asked) == 5 + 18, "and so is another temperature"


def test_a_generator_that_often_fails(reader, texts, scripted, tmp_path):
    count, bad = (
        iter(range(10**6)),
        [
            None,
            "",
            "ok",
            "no no no no no no no",
            "Sure, write a message about : lock .",
            "word " * 200,
            "\ufffd\x00 ∎∎ 茶 ⟂",
        ],
    )

    def reply(prompt, j):
        i = next(count)
        return bad[i // 10 % len(bad)] if i % 10 == 9 else texts[i % 2]

    made = generate_candidates(
        scripted(reply), TASK, ask(40), reader, tmp_path, "first step", n=7, seed=0, chunk=6
    )
    assert len(made) == 280 and made.groupby("latent").size().eq(56).all()
    faults = made.fault[made.fault != ""].value_counts()
    assert dict(faults) == {
        "no answer": 4,
        "empty": 4,
        "1 words": 4,
        "repeats itself": 4,
        "repeats the request": 4,
        "200 words": 4,
    }
    assert made.score[made.fault == ""].notna().all() and made.score[made.fault != ""].isna().all()


def test_a_generator_that_always_fails_leaves_nothing_and_breaks_nothing(reader, scripted, tmp_path):
    first = generate_candidates(
        scripted(lambda p, j: None), TASK, ask(5), reader, tmp_path, "first step", n=2, seed=0
    )
    features = pd.DataFrame([KNOWN])
    pairs = contrastive_pairs(first, features, 0.0)
    asks = second_step_asks(TASK, features, pairs, 3, 3)
    assert first.fault.eq("no answer").all() and pairs.empty and asks == []
    second = generate_candidates(
        scripted(lambda p, j: "never asked"), TASK, asks, reader, tmp_path, "second step", n=2, seed=0
    )
    assert second.empty and second.columns.tolist() == first.columns.tolist()
    assert keep_verified(second, 0.0, set(), 5, "two-step", 1).empty


# --- pairs -----------------------------------------------------------------------------------------------------------------------------------


def test_the_pair_is_the_strongest_and_the_weakest_usable_candidate():
    pair = contrastive_pair(
        table(
            [
                ("b", "", 2.0),
                ("refused", "1 words", 99.0),
                ("a", "", 5.0),
                ("none", "no answer", np.nan),
                ("c", "", 0.0),
                ("a", "", 5.0),
            ]
        ),
        FEATURE,
        1.0,
    )
    assert (pair["positive"], pair["positive_score"], pair["positive_source"]) == ("a", 5.0, "generated")
    assert (pair["negative"], pair["negative_score"], pair["latent"]) == ("c", 0.0, 3)


def test_the_anchor_span_stands_in_with_its_measured_score():
    for candidates, delta in (
        ([("a", "", 5.0), ("c", "", 1.0)], 5.0),
        ([("a", "", 0.0), ("c", "", 0.0)], 0.0),
    ):
        pair = contrastive_pair(table(candidates), FEATURE, delta)
        assert (pair["positive"], pair["positive_score"], pair["positive_source"]) == (
            "first the spray x",
            9.5,
            "anchor span",
        )
        assert pair["negative_score"] == candidates[-1][2]


def test_refused_candidates_never_win():
    assert contrastive_pair(table([("a", "2 words", 9.0), ("b", "empty", np.nan)]), FEATURE, 0.0) is None
    pairs = contrastive_pairs(
        pd.concat([table([("a", "2 words", 9.0)]), table([("b", "", 1.0), ("c", "", 2.0)], 4)]),
        pd.DataFrame([KNOWN, {**KNOWN, "latent": 4}, {**KNOWN, "latent": 5}]),
        0.0,
    )
    assert pairs.latent.tolist() == [4], "no candidates, or none usable: no pair"


def test_the_generator_is_told_no_brackets():
    told = describe(FEATURE, 2, 2)
    assert told["keywords"] == ["spray", "wall"] and told["spans"] == ["first the spray x", "b"]
    stored = pd.Series({**KNOWN, "keywords": np.array(KNOWN["keywords"]), "spans": np.array(KNOWN["spans"])})
    assert describe(stored, 2, 2) == told, "a table read back from disk holds arrays"


def test_second_step_asks_only_where_there_is_a_pair():
    features = pd.DataFrame([KNOWN, {**KNOWN, "latent": 4}])
    pairs = pd.DataFrame([dict(latent=4, positive="the spray .", negative="the lock .")])
    ((latent, conversation),) = second_step_asks(TASK, features, pairs, 2, 2)
    assert (
        latent == 4
        and conversation[0]["content"]
        == "write a message about : spray , wall . like this : the spray . not like this : the lock ."
    )


# --- samples ---------------------------------------------------------------------------------------------------------------------------------


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
    assert (
        len(kept)
        and (kept.score > 1.0).all()
        and (kept.fault == "").all()
        and not kept.text.isin(known).any()
        and kept.text.is_unique
    )
    assert (
        kept.groupby("latent").size().max() <= 4
        and set(kept.label) == {1}
        and set(kept.method) == {"two-step"}
    )
    for _, group in kept.groupby("latent"):
        assert group["rank"].tolist() == list(range(len(group))) and group.score.is_monotonic_decreasing
    assert kept.equals(keep_verified(made.sample(frac=1, random_state=0), 1.0, known, 4, "two-step", 1)), (
        "whatever the order of the candidates"
    )


def test_a_text_shared_by_two_features_goes_to_the_one_it_activates_more():
    kept = keep_verified(
        pd.concat([table([("a", "", 2.0)], 1), table([("a", "", 3.0), ("b", "", 2.5)], 2)]),
        0.0,
        set(),
        5,
        "m",
        0,
    )
    assert list(zip(kept.latent, kept.text, kept["rank"])) == [(2, "a", 0), (2, "b", 1)]


def test_random_asks_are_determined_by_the_seed():
    seeds = ["first the spray then the stencil .", "is it ok", "a lock and a wall"]
    make = lambda seed: random_asks(TASK, seeds, list(range(20)), 2, seed)
    assert make(0) == make(0) != make(1) and [latent for latent, _ in make(0)] == list(range(20))
    for _, conversation in make(0):
        asked = (
            conversation[0]["content"]
            .removeprefix("write a message about : ")
            .removesuffix(" .")
            .split(" , ")
        )
        assert len(asked) == 2 and any(set(asked) <= set(text.split()) for text in seeds), (
            "the words of one seed text"
        )


def test_coverage_by_delta(reader, texts):
    a = reader(texts)
    missing = np.flatnonzero(a.latents())[:10].tolist()
    by_delta = coverage_by_delta({"ours": a}, missing, [0.0, 1e9])
    assert by_delta.activated.tolist() == [10, 0] and by_delta.fac_missing.tolist() == [1.0, 0.0] == [
        fac_missing(a, missing, d) for d in (0.0, 1e9)
    ]


# --- tasks and rows that a run cannot have ---------------------------------------------------------------------------------------------------


class HalfARun:
    "A run with some tasks, which remembers that it finished."

    finished = False

    def input(self, stage, name, cls=None):
        return ["toxicity", "survival"]

    def finish(self, metrics):
        self.finished = True


def test_a_notebook_whose_tasks_are_not_in_the_run_ends_well(capsys):
    run = HalfARun()
    assert needs_task(run, ["sycophancy", "survival"]) == ["survival"] and not run.finished
    with pytest.raises(SystemExit) as end:
        needs_task(run, ["reward"])
    assert end.value.code == 0 and run.finished and "no reward items" in capsys.readouterr().out


def test_without_a_two_step_sample_no_row_has_a_budget(refused):
    samples = pd.DataFrame(
        [
            dict(method="one-step", latent=1, rank=0, text="a"),
            dict(method="Alpaca", latent=-1, rank=0, text="b"),
        ]
    )
    assert sample_budget(samples, required=False) == 0 and "no budget" in refused(
        lambda: sample_budget(samples)
    )
    for row in ("Ours", "Alpaca"):
        assert row in refused(lambda: chosen_samples(samples, row, 0))
