"Coverage: covered, missing and the two FACs by hand; what a threshold and more texts can do to them."

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fac_synthesis.data.tasks import PAPER_TASKS
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.features.coverage import (
    TaskCoverage,
    coverage_curve,
    coverage_report,
    covered,
    fac,
    fac_missing,
    measure_coverage,
    missing_features,
    missing_table,
    open_coverage,
    read_min_texts,
    read_missing,
    read_sets,
    share,
)
from fac_synthesis.run.artifacts import digest_of


def texts(rows):
    g = sparse.csr_matrix(np.array(rows, dtype=np.float32))
    return FeatureActivations(g, g)


ANCHOR = texts([[1, 2, 0, 3, 0], [0, 1, 2, 0, 0], [0, 2, 0, 0, 0]])
SEED = texts([[0, 1.5, 0, 0, 9]])
F = np.array([0, 1, 2, 4])


def test_by_hand():
    assert covered(ANCHOR, F) == {0, 1, 2} and covered(SEED, F) == {1, 4}, "latent 3 is not relevant"
    assert covered(ANCHOR, F, 1.0) == {1, 2}, "exactly delta is not above delta"
    assert covered(ANCHOR, F, 0.0, min_texts=2) == {1} == covered(ANCHOR, F, 1.0, min_texts=2)
    assert missing_features(covered(ANCHOR, F), covered(SEED, F)) == [0, 2]
    assert fac(SEED, ANCHOR, F) == 1 / 3, "what the anchor does not have does not count"
    assert fac(SEED, ANCHOR, F, 1.5) == 0 and fac(ANCHOR, ANCHOR, F) == 1
    made = texts([[2, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    assert [fac_missing(made, [0, 2], d) for d in (0.0, 1.0, 2.0)] == [1.0, 0.5, 0.0]


def test_nothing_to_cover_is_no_number():
    assert np.isnan(share({1}, set()))
    assert np.isnan(fac_missing(SEED, [])) and np.isnan(fac(SEED, ANCHOR, F, 99.0))


@pytest.fixture(scope="module")
def random():
    rng = np.random.default_rng(0)

    def draw(n, often):
        return texts(np.where(rng.random((n, 80)) < often, rng.gamma(2, 1, (n, 80)), 0))

    return draw(300, 0.03), draw(60, 0.02), np.arange(0, 80, 2)


def test_thresholds_only_take_away(random):
    anchor, seed, relevant = random
    missing = missing_features(covered(anchor, relevant), covered(seed, relevant))
    deltas = np.linspace(0, 6, 13)
    sets = [covered(anchor, relevant, delta) for delta in deltas]
    assert all(lower >= higher for lower, higher in zip(sets, sets[1:]))
    shares = [fac_missing(anchor, missing, d) for d in deltas]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 and 0 < len(missing) < 40


@pytest.mark.parametrize("min_texts", [1, 4])
def test_a_curve_rises_to_fac(random, min_texts):
    anchor, seed, relevant = random
    for seeded in (0, 1):
        curve = coverage_curve(seed, anchor, relevant, 0.5, min_texts, points=8, seed=seeded)
        assert curve.fac.is_monotonic_increasing and curve.texts.iloc[[0, -1]].tolist() == [1, 60]
        assert curve.fac.iloc[-1] == fac(seed, anchor, relevant, 0.5, min_texts)
    one, again = (coverage_curve(seed, anchor, relevant, seed=1) for _ in range(2))
    assert one.equals(again)


def test_the_report_counts_what_fac_divides(random):
    anchor, seed, relevant = random
    missing = missing_features(covered(anchor, relevant, 0.0, 3), covered(seed, relevant, 0.0, 3))
    report = coverage_report({"seed": seed, "anchor": anchor}, anchor, relevant, missing, [0.0, 2.0], 3)
    assert np.allclose(report.covered / report.in_anchor, report.fac)
    assert report.in_anchor[0] == len(covered(anchor, relevant, 0.0, 3))
    assert report.fac[0] == fac(seed, anchor, relevant, 0.0, 3) and report.fac[2:].tolist() == [1.0, 1.0]


FEATURES = pd.DataFrame(dict(latent=[2, 0, 1], explanation=["c", "a", "b"]))
RELEVANCE = pd.DataFrame(
    dict(
        latent=[0, 1, 2],
        relevance=["Yes", "Yes", "Maybe"],
        odds=[9.0, 9, 3],
        positives=[5, 9, 7],
        negatives=0,
        q=0.0,
    )
)


def test_the_table_of_missing_features_is_readable():
    table = missing_table([0, 2], FEATURES, RELEVANCE)
    assert table.latent.tolist() == [2, 0] and table.explanation.tolist() == ["c", "a"]
    assert table.relevance.tolist() == ["Maybe", "Yes"]


# ---- a task


@pytest.fixture(scope="module")
def task_coverage(random):
    anchor, seed, relevant = random
    relevance = pd.DataFrame(dict(latent=np.arange(80), relevance="No", odds=1.0, positives=1, negatives=0))
    relevance.loc[relevant, "relevance"] = "Probably"
    return TaskCoverage(anchor, seed, relevance, delta=0.5, min_texts=2)


def test_a_task_says_what_its_parts_say(random, task_coverage):
    anchor, seed, relevant = random
    assert task_coverage.relevant.tolist() == relevant.tolist()
    for delta in (0.5, 2.0):
        in_anchor, at_hand = (covered(a, relevant, delta, 2) for a in (anchor, seed))
        assert task_coverage.covered(anchor, delta) == in_anchor
        assert task_coverage.missing(delta) == missing_features(in_anchor, at_hand)
    assert task_coverage.missing() == task_coverage.missing(0.5) != task_coverage.missing(2.0)
    assert task_coverage.fac(seed) == fac(seed, anchor, relevant, 0.5, 2)
    assert task_coverage.curve(seed, 3).equals(coverage_curve(seed, anchor, relevant, 0.5, 2, seed=3))
    missing = task_coverage.missing()
    report = coverage_report({"seed": seed, "anchor": anchor}, anchor, relevant, missing, [0.5, 1.0], 2)
    assert task_coverage.report(missing, [0.5, 1.0]).equals(report)


def test_a_threshold_of_0_is_a_threshold(task_coverage):
    "And not the absence of one."
    assert task_coverage.covered(task_coverage.seed, 0.0) > task_coverage.covered(task_coverage.seed)


def test_missing_is_a_set_of_activations():
    "A feature that the seed set activates is not missing, whatever else is said of it."
    relevance = RELEVANCE.assign(relevance=["Yes", "No", "Yes"])
    seed = texts([[0, 0, 2, 0, 0]])
    coverage = TaskCoverage(ANCHOR, seed, relevance)
    assert coverage.missing() == [0] and list(coverage.sets) == ["seed", "anchor"]
    with_full = TaskCoverage(ANCHOR, seed, relevance, full=ANCHOR)
    assert list(with_full.sets) == ["seed", "full", "anchor"] and with_full.missing() == [0]


def test_the_table_of_a_task_is_cut_at_the_most_frequent():
    coverage = TaskCoverage(ANCHOR, texts([[0, 0, 0, 0, 0]]), RELEVANCE)
    assert coverage.table(FEATURES).latent.tolist() == [1, 2, 0]
    assert coverage.table(FEATURES, most=2).latent.tolist() == [1, 2]


def test_a_task_can_be_an_argument_of_a_cached_function(task_coverage):
    same = TaskCoverage(task_coverage.anchor, task_coverage.seed, task_coverage.relevance.copy(), 0.5, 2)
    other = TaskCoverage(task_coverage.anchor, task_coverage.seed, task_coverage.relevance, 0.5, 1)
    assert digest_of(task_coverage) == digest_of(same) != digest_of(other)


WORDS = "kindly please quickly door lamp".split()


def words_in(some):
    return texts([[float(word in text.split()) for word in WORDS] for text in some])


def test_coverage_is_measured_from_texts():
    polite = [f"{word} mind the {thing}" for word in ("kindly", "please") for thing in ("door", "lamp")] * 5
    blunt = [f"quickly mind the {thing}" for thing in ("door", "lamp")] * 10
    labels = np.repeat([1, 0], 20)
    coverage = measure_coverage(words_in, polite + blunt, labels, ["kindly mind the door"])
    assert [WORDS[i] for i in coverage.relevant] == ["kindly", "please"]
    assert [WORDS[i] for i in coverage.missing()] == ["please"] and coverage.fac(coverage.seed) == 0.5
    strict = measure_coverage(words_in, polite + blunt, labels, ["kindly mind the door"], min_texts=2)
    assert [WORDS[i] for i in strict.missing()] == ["kindly", "please"], "one odd text proves nothing"


def test_the_readers_of_this_notebook():
    class Left:
        "A run whose earlier stages left what they are asked for, by name."

        def input(self, stage, name, cls=None):
            return name

        def setting(self, stage, name):
            return {"min_texts": 2, "delta": 1.6}[name]

    run, task = Left(), PAPER_TASKS[0]
    assert (read_missing(run, "reward"), read_sets(run, "reward")) == ("missing_reward", "sets_reward")
    assert read_min_texts(run) == 2
    opened = open_coverage(run, task, min_texts=3)
    assert (opened.anchor, opened.seed, opened.full) == ("anchor_toxicity", "seed_toxicity", "full_toxicity")
    assert (opened.relevance, opened.delta, opened.min_texts) == ("relevance_toxicity", 1.6, 3)
