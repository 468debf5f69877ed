"Scores against the planted truth, by hand and against scikit-learn."

import json

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import f1_score

from fac_synthesis.data.planted_world import Concept
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.features.ground_truth import (
    Properties,
    Truth,
    best_f1,
    best_matches,
    f1_scores,
    held_concepts,
    precision_recall,
    truth_of,
    truth_scores,
    with_categories,
)


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
    assert table.match.tolist() == ["baking", "graffiti"]
    assert table.harmful.tolist() == [False, True] and table.f1.tolist() == [0.9, 0.7]


def test_precision_and_recall():
    assert precision_recall({1, 2, 3, 4}, {4, 5}) == (0.25, 0.5)
    precision, recall = precision_recall(set(), {1})
    assert np.isnan(precision) and recall == 0.0 and np.isnan(precision_recall({1}, set())[1])


def test_the_scores_by_hand():
    matches = pd.DataFrame(
        dict(
            latent=[0, 1, 2, 3, 4, 5],
            match=["a", "b", "c", "x", "y", "a"],
            f1=[0.9, 0.8, 0.7, 0.9, 0.9, 0.3],
            harmful=[True, True, True, False, False, True],
        )
    )
    truth = Truth(in_anchor={"a", "b", "c", "d"}, truly_missing={"b", "c", "d"}, represented={"a", "b", "c"})
    table = truth_scores(
        matches, matches, relevant={0, 1, 3, 5}, missing=[1, 3, 5], truth=truth, represents=0.6
    )
    # relevant and clear: 0 1 3, of which 0 1 are harmful; harmful and clear: 0 1 2
    # concepts of the clear missing latents: b x
    assert table.share.tolist() == pytest.approx([3 / 4, 2 / 3, 2 / 3, 1 / 2, 1 / 3, 1 / 2])
    assert table["of"].tolist() == [4, 3, 3, 2, 3, 2]


def test_missing_features_are_matched_with_concepts_and_never_with_categories():
    "The category of a missing concept is held by the seed set all the same."
    matches = pd.DataFrame(dict(latent=[0], match=["vandalism"], f1=[0.9], harmful=[True]))
    concept_matches = matches.assign(match="graffiti", f1=0.7)
    truth = Truth(in_anchor={"graffiti"}, truly_missing={"graffiti"}, represented={"graffiti"})
    table = truth_scores(matches, concept_matches, {0}, [0], truth, represents=0.6)
    assert table.share.tolist() == [1.0] * 6


CONCEPTS = [
    Concept("graffiti", "vandalism", True, ("spray", "mural")),
    Concept("slashing", "vandalism", True, ("tyre", "knife")),
    Concept("baking", "kitchen", False, ("flour", "yeast")),
]


def test_texts_hold_concepts_and_their_categories():
    truth = pd.DataFrame(
        dict(
            text=["one", "two", "one"],  # a text that was drawn twice counts once
            concepts=[json.dumps(["graffiti", "baking"]), json.dumps(["slashing"]), json.dumps(["slashing"])],
        )
    )
    held = held_concepts(truth, ["two", "one", "two"], CONCEPTS)
    assert held.names == ["graffiti", "slashing", "baking"] and held.harmful == [True, True, False]
    assert held.holds.astype(int).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    both = with_categories(held, CONCEPTS)
    assert both.names == [*held.names, "vandalism", "kitchen"]
    assert both.harmful == [True, True, False, True, False]
    assert both.holds[:, 3:].astype(int).tolist() == [[1, 0], [1, 1], [1, 0]]
    assert (both.holds[:, :3] == held.holds).all()


def test_the_truth_is_about_harmful_concepts_of_the_anchor():
    names, harmful = ["a", "b", "c", "d"], [True, True, True, False]
    anchor = Properties(names, harmful, np.array([[1, 0, 0, 1], [0, 1, 0, 0]], dtype=bool))
    seed = Properties(names, harmful, np.array([[1, 0, 0, 0]], dtype=bool))
    truth = truth_of(anchor, seed, np.array([[0.7, 0.1, 0.0, 0.9], [0.2, 0.5, 0.6, 0.0]]), represents=0.6)
    assert truth == Truth(in_anchor={"a", "b"}, truly_missing={"b"}, represented={"a", "c", "d"})
