"Scores against the planted truth, by hand and against scikit-learn."

import numpy as np
import pandas as pd
import pytest
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.features.ground_truth import (
    best_f1,
    best_matches,
    f1_scores,
    precision_recall,
    truth_scores,
)
from scipy import sparse
from sklearn.metrics import f1_score


def test_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    active, holds = rng.random((50, 6)) < 0.4, rng.random((50, 4)) < 0.3
    active[:, 5] = False
    mine = f1_scores(active, holds)
    assert mine.shape == (6, 4)
    for i in range(6):
        for j in range(4):
            assert mine[i, j] == pytest.approx(f1_score(holds[:, j], active[:, i], zero_division=0), abs=1e-6)


def test_each_latent_gets_its_best_threshold_and_a_dead_one_nothing():
    g = sparse.csr_matrix(np.array([[9, 0, 0.1], [8, 0, 0.1], [1, 0, 0.1], [0.5, 0, 0.1]], dtype=np.float32))
    holds = np.array([[1, 0], [1, 0], [0, 0], [0, 0]])
    best = best_f1(FeatureActivations(g, g), holds)
    assert best[0, 0] == 1.0 and f1_scores(g.toarray() > 0, holds)[0, 0] == pytest.approx(2 / 3)
    assert (best[1] == 0).all() and best[2, 0] == pytest.approx(2 / 3) and (best[:, 1] == 0).all()
    assert (best >= f1_scores(g.toarray() > 0, holds) - 1e-6).all(), "threshold zero is one of those tried"


def test_best_matches():
    table = best_matches(np.array([[0.2, 0.9], [0.7, 0.1]]), ["graffiti", "baking"], [True, False])
    assert (
        table.match.tolist() == ["baking", "graffiti"]
        and table.harmful.tolist() == [False, True]
        and table.f1.tolist() == [0.9, 0.7]
    )


def test_precision_and_recall():
    assert precision_recall({1, 2, 3, 4}, {4, 5}) == (0.25, 0.5)
    assert (
        np.isnan(precision_recall(set(), {1})[0])
        and precision_recall(set(), {1})[1] == 0.0
        and np.isnan(precision_recall({1}, set())[1])
    )


def test_the_scores_by_hand():
    matches = pd.DataFrame(
        dict(
            latent=[0, 1, 2, 3, 4, 5],
            match=["a", "b", "c", "x", "y", "a"],
            f1=[0.9, 0.8, 0.7, 0.9, 0.9, 0.3],
            harmful=[True, True, True, False, False, True],
        )
    )
    table = truth_scores(
        matches,
        relevant={0, 1, 3, 5},
        missing=[1, 3, 5],
        truly_missing={"b", "c", "d"},
        in_anchor={"a", "b", "c", "d"},
        represented={"a", "b", "c"},
        least=0.6,
    )
    # relevant and clear: 0 1 3, of which 0 1 are harmful; harmful and clear: 0 1 2; concepts of the clear missing latents: b x
    assert table.share.tolist() == pytest.approx([3 / 4, 2 / 3, 2 / 3, 1 / 2, 1 / 3, 1 / 2])
    assert table["of"].tolist() == [4, 3, 3, 2, 3, 2]
