"Coverage: covered, missing and the two FACs by hand; what a threshold and more texts can do to them."

import numpy as np
import pandas as pd
import pytest
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.features.coverage import (
    coverage_curve,
    coverage_report,
    covered,
    fac,
    fac_missing,
    missing_features,
    missing_table,
    share,
)
from scipy import sparse


def texts(rows):
    m = sparse.csr_matrix(np.array(rows, dtype=np.float32))
    return FeatureActivations(m, m)


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
    assert (
        np.isnan(share({1}, set()))
        and np.isnan(fac_missing(SEED, []))
        and np.isnan(fac(SEED, ANCHOR, F, 99.0))
    )


@pytest.fixture(scope="module")
def random():
    rng = np.random.default_rng(0)
    draw = lambda n, share: texts(np.where(rng.random((n, 80)) < share, rng.gamma(2, 1, (n, 80)), 0))
    return draw(300, 0.03), draw(60, 0.02), np.arange(0, 80, 2)


def test_thresholds_only_take_away(random):
    anchor, seed, relevant = random
    missing = missing_features(covered(anchor, relevant), covered(seed, relevant))
    deltas = np.linspace(0, 6, 13)
    assert all(
        covered(anchor, relevant, a) >= covered(anchor, relevant, b) for a, b in zip(deltas, deltas[1:])
    )
    shares = [fac_missing(anchor, missing, d) for d in deltas]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 and 0 < len(missing) < 40


@pytest.mark.parametrize("min_texts", [1, 4])
def test_a_curve_rises_to_fac(random, min_texts):
    anchor, seed, relevant = random
    for seeded in (0, 1):
        curve = coverage_curve(seed, anchor, relevant, 0.5, min_texts, points=8, seed=seeded)
        assert curve.fac.is_monotonic_increasing and curve.texts.iloc[[0, -1]].tolist() == [1, 60]
        assert curve.fac.iloc[-1] == fac(seed, anchor, relevant, 0.5, min_texts)
    assert coverage_curve(seed, anchor, relevant, seed=1).equals(
        coverage_curve(seed, anchor, relevant, seed=1)
    )


def test_the_report_counts_what_fac_divides(random):
    anchor, seed, relevant = random
    missing = missing_features(covered(anchor, relevant, 0.0, 3), covered(seed, relevant, 0.0, 3))
    report = coverage_report({"seed": seed, "anchor": anchor}, anchor, relevant, missing, [0.0, 2.0], 3)
    assert np.allclose(report.covered / report.in_anchor, report.fac)
    assert report.in_anchor[0] == len(covered(anchor, relevant, 0.0, 3))
    assert report.fac[0] == fac(seed, anchor, relevant, 0.0, 3) and report.fac[2:].tolist() == [1.0, 1.0]


def test_the_table_of_missing_features_is_readable():
    features = pd.DataFrame(dict(latent=[2, 0, 1], explanation=["c", "a", "b"]))
    relevance = pd.DataFrame(
        dict(
            latent=[0, 1, 2],
            relevance=["Yes", "Yes", "Maybe"],
            odds=[9.0, 9, 3],
            positives=[5, 9, 7],
            negatives=0,
            q=0.0,
        )
    )
    table = missing_table([0, 2], features, relevance)
    assert (
        table.latent.tolist() == [2, 0]
        and table.explanation.tolist() == ["c", "a"]
        and table.relevance.tolist() == ["Maybe", "Yes"]
    )
