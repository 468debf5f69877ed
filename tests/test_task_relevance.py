"Relevance: evidence against scipy and by hand, the four labels, and a judge with a rubric."

import math

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from fac_synthesis.data.sources import open_task
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.features.relevance import (
    Grades,
    best_enrichment,
    enrichment,
    llm_relevance,
    n_enriched,
    relevant_latents,
    statistical_relevance,
)
from fac_synthesis.models.prompts import LABELS

P, N = 60, 140
LABEL = np.repeat([1, 0], [P, N])


def written_out(dense) -> FeatureActivations:
    g = sparse.csr_matrix(np.asarray(dense, dtype=np.float32))
    return FeatureActivations(g, g)


def firing(pairs) -> FeatureActivations:
    "Latent i fires (with value 1) in the first a positive and the first b negative texts."
    columns = [np.concatenate([np.arange(P) < a, np.arange(N) < b]) for a, b in pairs]
    return written_out(np.stack(columns, 1))


PAIRS = [(30, 2), (0, 0), (20, 15), (6, 14), (0, 40), (1, 0), (60, 140)]


def test_p_odds_and_q():
    table = enrichment(firing(PAIRS), LABEL)
    assert table.latent.tolist() == [0, 2, 3, 4, 5, 6], "a latent that never fires has no row"
    for r in table.itertuples():
        a, b = PAIRS[r.latent]
        assert (r.positives, r.negatives) == (a, b)
        assert r.p == pytest.approx(stats.fisher_exact([[a, b], [P - a, N - b]], "greater").pvalue)
        assert r.odds == pytest.approx((a + 0.5) * (N - b + 0.5) / ((P - a + 0.5) * (b + 0.5)))
    one = table[table.latent == 5].p.item()
    assert one == pytest.approx(P / (P + N)), "a single firing text is positive with the positives' share"
    ordered = table.sort_values("p")
    steps = ordered.p * len(table) / np.arange(1, len(table) + 1)
    by_hand = np.minimum.accumulate(steps.to_numpy()[::-1])[::-1]
    assert np.allclose(ordered.q, np.minimum(by_hand, 1))


def test_p_is_a_tail_of_the_hypergeometric_distribution():
    table = enrichment(firing([(4, 3)]), LABEL)
    tail = sum(math.comb(P, x) * math.comb(N, 7 - x) for x in range(4, 8)) / math.comb(P + N, 7)
    assert table.p.item() == pytest.approx(tail)


def test_activity_is_a_threshold():
    a = firing([(30, 2), (20, 2)])
    weak = FeatureActivations(a.g.multiply(np.array([1.0, 0.4])).tocsr(), a.peak)
    assert enrichment(weak, LABEL, 0.5).latent.tolist() == [0]


@pytest.fixture(scope="module")
def graded():
    "Latent 0 fires weakly everywhere and strongly in positives; latent 1 is never strong."
    strength = np.where(LABEL == 1, 0.9, 0.3)
    weak = np.where(np.arange(P + N) % 10 < 2, 0.2, 0.0)
    return written_out(np.stack([strength, weak], 1))


def test_the_most_telling_threshold_is_paid_for(graded):
    best = best_enrichment(graded, LABEL, [0.0, 0.5, 0.8]).set_index("latent")
    assert best.activity.tolist() == [0.5, 0.0] and (best.positives[0], best.negatives[0]) == (P, 0)
    alone = {d: enrichment(graded, LABEL, d).set_index("latent").p for d in (0.0, 0.5)}
    assert best.p[0] == pytest.approx(3 * alone[0.5][0])
    assert best.p[1] == pytest.approx(min(1, 3 * alone[0.0][1]))
    unreached = best_enrichment(graded, LABEL, [0.0, 99.0])
    assert unreached.latent.tolist() == [0, 1], "a threshold that nothing reaches tells nothing"


def test_the_count_that_delta_is_chosen_by(graded):
    counts = [n_enriched(graded, LABEL, delta) for delta in (0.0, 0.5, 99.0)]
    assert counts == [0, 1, 0], "latent 0 tells the labels apart only where it fires strongly"
    strict = Grades(maybe_odds=1e9)
    assert n_enriched(graded, LABEL, 0.5, strict) == 0


@pytest.mark.parametrize("label", [np.ones(P + N, int), np.zeros(P + N, int), np.arange(P + N) % 3])
def test_labels_of_one_class_are_refused(label, refused):
    assert "both labels" in refused(lambda: enrichment(firing(PAIRS), label))


def test_labels_rise_with_the_odds_and_need_evidence():
    pairs = [(a, 20) for a in range(0, 60, 3)] + [(2, 0)]
    table = statistical_relevance(firing(pairs), LABEL)
    rank = table.sort_values("odds").relevance.map(LABELS.index)
    many = rank[table.latent.loc[rank.index] != 20]
    assert many.is_monotonic_decreasing and set(many) == {0, 1, 2, 3}
    last = table[table.latent == 20].iloc[0]
    assert last.odds > 4 and last.relevance == "No", "two texts are no evidence"
    assert set(relevant_latents(table)) == set(table.latent[table.relevance != "No"])


def test_grades_move_the_labels():
    a = firing([(30, 20)])
    odds = enrichment(a, LABEL).odds.item()
    assert 4 < odds < 8 and statistical_relevance(a, LABEL).relevance.tolist() == ["Probably"]
    for grades, label in ((Grades(yes_odds=4.0), "Yes"), (Grades(false_discovery=0.0), "No")):
        assert statistical_relevance(a, LABEL, grades=grades).relevance.tolist() == [label]


def test_accidents_stay_rare():
    rng = np.random.default_rng(0)
    relevance = statistical_relevance(written_out(rng.random((P + N, 600)) < 0.1), LABEL)
    assert len(relevant_latents(relevance)) <= 3


def test_the_judge_sees_rubric_explanation_and_spans(scripted):
    features = pd.DataFrame(
        dict(
            latent=[3, 9, 5, 7, 8],
            explanation=["theft of {bikes}", "flour", "", "masks", "tea"],
            spans=[["steal the [bike]"], ["the [yeast]"], ["of"], ["a [mask]"], ["[tea]"]],
            verified=["Yes", "Maybe", "", "", "Probably"],
        )
    )
    rubric = open_task("toxicity").rubric
    answers = {"theft": "Maybe.", "flour": "No", "masks": None, "tea": "Yes or No, who knows"}
    lm = scripted(lambda prompt, j: answers[next(k for k in answers if f"Feature: {k}" in prompt)])
    judged = llm_relevance(features, rubric, lm)
    assert judged.latent.tolist() == [3, 9, 5, 7, 8]
    assert judged.relevance.tolist() == ["Maybe", "No", "No", "No", "No"]
    assert len(lm.asked) == 4, "an unexplained feature is not asked about"
    assert all(said in lm.asked[0] for said in (rubric, "theft of {bikes}", "steal the [bike]"))
    assert relevant_latents(judged).tolist() == [3]
    failed = llm_relevance(features.assign(verified="No"), rubric, lm)
    assert failed.relevance.unique().tolist() == ["No"], "a failed check ends it"
    assert llm_relevance(features[features.explanation == ""], rubric, lm).relevance.tolist() == ["No"]
