"The loop that all baselines share: what is asked, what is refused, what is saved, and in whose words."

import inspect
from collections import Counter
from dataclasses import fields

import pandas as pd
import pytest
from baseline_writers import GARBAGE, SEEDS, TASK, Fixed, Writer, user

from fac_synthesis.data.planted_tasks import planted_wording
from fac_synthesis.models.prompts import Wording, natural_wording
from fac_synthesis.synthesis import (
    baseline_rounds,
    baselines,
    guided_baselines,
    prompted_baselines,
    text_similarity,
)
from fac_synthesis.synthesis.baseline_rounds import (
    SAMPLE_COLUMNS,
    Job,
    Result,
    Rounds,
    candidates_of,
    occurrences,
    refusal,
    sample_frame,
)
from fac_synthesis.synthesis.baselines import discarded_table
from fac_synthesis.synthesis.contrastive_pairs import Decoding
from fac_synthesis.synthesis.prompted_baselines import alpaca


def rounds_of(lm, budget=5, work=None, **more):
    return Rounds(Job(TASK, SEEDS, lm, budget, **more), "x", Decoding(), work)


def questions(turn):
    "As many different requests as the round may make."
    return [({}, user(f"question {turn.number} {i}")) for i in range(turn.n_asks)]


# ---- wordings


def test_the_planted_wording_is_what_the_tiny_model_was_taught():
    wording = planted_wording(TASK)
    values = dict(text="{x}", examples=SEEDS, plan="p", persona="q", attributes="r", operation="o", count="1")
    for name in ("few_shot", "evolve", "broaden", "from_plan", "in_role", "from_attributes"):
        assert wording.ask(name, words=["lock", "wall"], **values) == user(
            "write a message about : lock , wall ."
        )
    assert not any((wording.plan, wording.describe, wording.equal, wording.quality, wording.rank))


@pytest.mark.parametrize(
    "module", [baseline_rounds, baselines, guided_baselines, prompted_baselines, text_similarity]
)
def test_no_baseline_sees_the_ground_truth(module):
    source = inspect.getsource(module)
    assert "planted_world" not in source and "lexicon" not in source


@pytest.mark.parametrize("kind, cautious", [("message", True), ("instruction", False)])
def test_the_natural_wording_speaks_of_the_task(kind, cautious):
    values = dict(
        words=["w"],
        text="{old}",
        examples=["one {x}", "two"],
        plan="the plan",
        persona="a cook",
        attributes="a: b",
        operation="adds {y}",
        count="7",
        old="o",
        new="n",
        first="f",
        second="s",
    )
    wording = natural_wording(kind, "teach patience")
    for f in fields(Wording)[:12]:
        text = wording.ask(f.name, **values)[0]["content"]
        assert kind in text or f.name == "rank", f.name
        assert "None" not in text and "{examples}" not in text
    assert ("intent only" in wording.few_shot) is cautious


def test_long_examples_are_cut():
    wording = natural_wording(TASK.kind, TASK.goal)
    assert len(wording.ask("few_shot", examples=["word " * 900])[0]["content"].split()) < 160


# ---- candidates


def test_texts_are_compared_without_case_and_punctuation():
    discarded, seen = Counter(), {"a lock and a wall"}
    replies = [["A lock, and a wall!", "a lock and a fence", "A lock and a fence ."]]
    found = candidates_of(TASK, [({}, user("p"))], replies, seen, discarded)
    assert [c.text for c in found] == ["a lock and a fence"] and discarded == {"seen before": 2}


def test_a_reply_may_hold_several_texts_with_notes():
    def halves(reply):
        return [(part, dict(n=i)) for i, part in enumerate(reply.split("|"))]

    asks = [(dict(parents=["a"]), user("p")), (dict(parents=["b"]), user("q"))]
    found = candidates_of(TASK, asks, [["one is here|ok"], ["two are here", None]], set(), Counter(), halves)
    assert [(c.text, c.about, c.prompt, c.ask) for c in found] == [
        ("one is here", dict(parents=["a"], n=0), "p", 0),
        ("two are here", dict(parents=["b"], n=0), "q", 1),
    ]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_refused_with_a_reason(text):
    cleaned = None if text is None else TASK.clean(text)
    assert refusal(TASK, cleaned, set()) in {
        "no answer",
        "empty",
        "# words",
        "repeats itself",
        "repeats the request",
        "broken characters",
    }


# ---- asking


def test_a_conversation_that_comes_twice_is_drawn_twice():
    rounds = rounds_of(Writer())
    same = [({}, user("one"))] * 3 + [({}, user("two"))]
    replies = rounds.ask("x", same, 0, 2)
    assert len({text for row in replies for text in row}) == 8
    assert rounds.ask("x", same, 0, 2) == replies and rounds.ask("x", same, 1, 2) != replies
    assert occurrences(list("abaab")) == [[0, 1], [2, 4], [3]] and occurrences([]) == []


def test_verdicts_are_greedy_and_unclear_ones_are_none():
    lm = Fixed(lambda prompt, j: "A" if "first" in prompt else "who knows")
    assert rounds_of(lm).verdicts("judge", [user("first"), user("second")], ("A", "B"), 0) == ["A", None]


def test_the_loop_asks_as_often_as_the_share_kept_suggests():
    asked = []

    def asks_of(turn):
        asked.append(turn.n_asks)
        return questions(turn)

    def every_fourth(turn, found):
        return ["" if i % 4 == 0 else "refused" for i in range(len(found))]

    result = rounds_of(Writer(), budget=10, batch=64).collect(asks_of, every_fourth)
    assert asked[0] == 10 and all(n >= 8 for n in asked) and asked[1] > 10
    assert len(result.samples) == 10 and result.discarded["refused"] > 20


def test_the_tries_are_never_exceeded_and_a_surplus_is_cut_by_choice(capsys):
    lm = Fixed(lambda prompt, j: None)
    result = rounds_of(lm, budget=3, tries=5).collect(questions, n=2)
    assert len(lm.asked) == 7 and result.samples.empty, "two replies each: 14 of 15 tries"
    result = rounds_of(Writer(), budget=3).collect(
        questions, surplus=2.0, choose=lambda kept, n: ([5, 0, 2], "not chosen")
    )
    assert len(result.samples) == 3 and result.discarded["not chosen"] == 3
    assert "x: 3 of 3 samples from 8 candidates in 1 rounds" in capsys.readouterr().out


# ---- what is left


def test_results_are_stored_whole(tmp_path):
    made = alpaca(Job(TASK, SEEDS, Writer(GARBAGE), 20, batch=16))
    made.save(tmp_path)
    back = Result.load(tmp_path)
    pd.testing.assert_frame_equal(back.samples, made.samples)
    assert (back.method, back.discarded) == ("Alpaca", made.discarded)
    table = discarded_table({"Alpaca": made, "none": Result("none", made.samples[:0], Counter())})
    assert table["count"].sum() == made.discarded.total() and table["count"].is_monotonic_decreasing
    assert set(table.method) == {"Alpaca"}


def test_no_samples_have_the_types_of_samples():
    made = alpaca(Job(TASK, SEEDS, Writer(), 3))
    assert list(made.samples) == list(SAMPLE_COLUMNS)
    pd.testing.assert_series_equal(sample_frame([]).dtypes, made.samples.dtypes)


def test_a_job_needs_seeds_and_a_budget(refused):
    assert "seed set" in refused(lambda: Job(TASK, [" "], Writer(), 5))
    assert "budget" in refused(lambda: Job(TASK, SEEDS, Writer(), 0))
