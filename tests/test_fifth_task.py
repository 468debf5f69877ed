"A fifth task is one notebook-sized module above all that exists, and its line in the list of tables."

import importlib.util

import pandas as pd
import pytest
import torch
from conftest import Scripted

from fac_synthesis.features.activations import FeatureReader
from fac_synthesis.features.coverage import fac_missing
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.questions.what_predicts_performance import (
    Resampling,
    correlation_table,
    fac_table,
    main_scores,
)
from fac_synthesis.results.claims import Evidence, best_method, fac_predicts_elsewhere
from fac_synthesis.results.tables import comparison, wide_table
from fac_synthesis.run.parameters import published
from fac_synthesis.sae.core import SAE, SAEConfig
from fac_synthesis.tasks.scores import COLUMNS, FLOOR_COLUMNS, SCORE_COLUMNS, Column, table_scores

METRIC = "FAC of missing features"
METHODS = ["Alpaca", "Evol-Instruct", "SAO", "Ours"]

MODULE = '''"""Politeness: is a request polite? A task of one's own."""
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from fac_synthesis.data.tasks import Task
from fac_synthesis.features.coverage import measure_coverage
from fac_synthesis.features.interpretation import statistical_features
from fac_synthesis.models.prompts import asking
from fac_synthesis.synthesis.covered_samples import Filling, chosen_samples, fill_missing, sample_budget

POLITE = "please thanks kindly sorry pardon grateful welcome dear honoured gladly humbly cheers".split()
BLUNT = "now just quickly already instead again alone properly fast once finally somehow".split()
THINGS = "door lamp cup roof lawn stair pond shelf gate wall boat tent sink desk plant tower".split()
TASK = Task(
    name="politeness",
    goal="tell polite requests from blunt ones",
    rubric="Does the feature stand for courtesy?",
    prompts=asking("Write one polite request."),
)


def requests(n_polite, things):
    "Requests for things with one of the first n polite words (label 1) or with a blunt one (0)."
    rows = []
    for label, words in ((1, POLITE[:n_polite]), (0, BLUNT)):
        for word in words:
            rows += [(f"could you {word} mind the {thing} today", label) for thing in things]
    return pd.DataFrame(rows, columns=["text", "label"])


CORPORA = {
    "anchor": requests(12, THINGS[:10]),
    "seed": requests(2, THINGS[:4]),  # knows two of the twelve polite words
    "full": requests(12, THINGS[:8]),
    "test": requests(12, THINGS[10:]),
}


def missing(reader):
    "The table of the features that the seed set lacks."
    anchor, seed = CORPORA["anchor"], CORPORA["seed"]
    coverage = measure_coverage(reader, anchor.text.tolist(), anchor.label, seed.text.tolist())
    features = statistical_features(reader.backbone, anchor.text.tolist(), coverage.anchor)
    return coverage.table(features)


def synthesize(features, reader, lm, work):
    "One sample for every feature that a generator can be brought to write about."
    settings = Filling(n_first=3, n_second=3, keep_per_feature=1)
    return fill_missing(TASK, features, reader, lm, CORPORA["seed"].text, settings, work)


def accuracy(train):
    "Of a word count, on the test."
    test = CORPORA["test"]
    words = TfidfVectorizer().fit(train.text)
    head = LogisticRegression(C=10, class_weight="balanced").fit(words.transform(train.text), train.label)
    return (head.predict(words.transform(test.text)) == test.label).mean()


def scores(samples, methods, seeds=(42, 43, 44)):
    "One row per method and seed: accuracy, trained on the seed set and the method's samples."
    rows = []
    for method in ["Baseline", "Full Dataset", *methods]:
        human = CORPORA["full" if method == "Full Dataset" else "seed"]
        added = chosen_samples(samples, method, sample_budget(samples)) if method in methods else None
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(len(human))[2:]
            train = pd.concat([human.iloc[order], added])
            row = dict(method=method, training="LoRA", seed=seed)
            rows.append(row | dict(accuracy=accuracy(train), n_texts=len(train)))
    return pd.DataFrame(rows)
'''


@pytest.fixture(scope="module")
def politeness(tmp_path_factory):
    path = tmp_path_factory.mktemp("fifth") / "politeness.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("politeness", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader(politeness):
    texts = [text for corpus in politeness.CORPORA.values() for text in corpus.text]
    words = word_tokenizer(texts)
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=32, n_latents=256, k=6))
    return FeatureReader(sae, Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1))


@pytest.fixture(scope="module")
def filled(politeness, reader, tmp_path_factory):
    "The missing features, and what filling them gave."

    def reply(prompt, j):
        "A model that uses the polite words it was shown, with another thing each time."
        shown = [w for w in prompt.replace(".", " ").split() if w in politeness.POLITE] or ["please"]
        thing = politeness.THINGS[(len(prompt) + j) % 10]
        return f"could you {shown[j % len(shown)]} {shown[-1]} mind the {thing} today"

    features = politeness.missing(reader)
    work = tmp_path_factory.mktemp("work")
    return features, politeness.synthesize(features, reader, Scripted(reply), work)


@pytest.fixture(scope="module")
def made(politeness, filled):
    "Samples of Ours, and of three stand-ins for baselines that say courtesies of the seed set only."
    own = filled[1].samples
    parts = [own]
    for i, method in enumerate(METHODS[:-1]):
        words = politeness.POLITE[: i + 1]
        texts = [f"could you {words[n % len(words)]} mind the {t}" for n, t in enumerate(politeness.THINGS)]
        texts = (texts * len(own))[: len(own)]
        parts.append(pd.DataFrame(dict(method=method, label=1, latent=-1, rank=0, text=texts)))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def scores(politeness, made):
    return politeness.scores(made, METHODS)


@pytest.fixture(scope="module")
def coverage_of_methods(filled, made, reader):
    "The one metric of the diversity table that the questions need here."
    latents = filled[0].latent.tolist()
    rows = []
    for method, samples in made.groupby("method", sort=False):
        value = fac_missing(reader(samples.text.tolist()), latents)
        rows.append(dict(task="politeness", set=method, level="feature", metric=METRIC, value=value))
    return pd.DataFrame(rows).assign(label=METRIC)


def read_politeness_scores(run):
    "The reader that stands beside the module's results."
    columns = dict(method=str, training=str, seed=int, accuracy=float, n_texts=int)
    return run.frame("44_politeness", "scores", columns)


@pytest.fixture
def listed(monkeypatch):
    "The one edit outside the module."
    column = Column(
        name="politeness_accuracy",
        label="politeness accuracy",
        task="politeness",
        read=read_politeness_scores,
        value="accuracy",
        size="n_texts",
    )
    monkeypatch.setitem(COLUMNS, "politeness_accuracy", column)


def test_features_and_synthesis_take_the_task_as_it_is(politeness, filled, scores):
    corpora, (features, result) = politeness.CORPORA, filled
    assert not set(corpora["test"].text) & set(corpora["anchor"].text) and len(features) >= 3
    own = result.samples
    assert len(own) >= 3 and (own.score > 0).all() and (own.item_fault == "").all()
    assert set(own.latent) <= set(features.latent)
    assert set(own.latent) | set(result.uncovered.latent) == set(features.latent)
    known = set(politeness.POLITE[:2])
    new = [text for text in own.text if not known & set(text.split())]
    assert len(new) > len(own) / 2, "they speak of courtesies that the seed set lacks"
    mean = scores.groupby("method").accuracy.mean()
    assert mean["Ours"] > mean["Baseline"] and mean["Full Dataset"] == 1.0


def test_tables_have_its_column(scores, listed):
    long = table_scores({"politeness": scores})
    no_floors = pd.DataFrame(columns=FLOOR_COLUMNS)
    wide = wide_table(comparison(long, no_floors, "table01")).set_index("row")["politeness accuracy"]
    ours = 100 * scores[scores.method == "Ours"].accuracy.mean()
    assert wide["Ours"].startswith(f"{ours:.2f}") and wide["Magpie"] == "none"


def test_a_run_without_it_has_an_empty_column(listed):
    class Without:
        "A run that left no results of the task."

        def frame(self, stage, name, columns):
            return pd.DataFrame({column: pd.Series(dtype=kind) for column, kind in columns.items()})

    found = COLUMNS["politeness_accuracy"].read(Without())
    assert list(found) == ["method", "training", "seed", "accuracy", "n_texts"]
    long = table_scores({"politeness": found})
    assert long.empty and list(long) == SCORE_COLUMNS


def test_questions_and_claims_speak_of_it(scores, coverage_of_methods, listed):
    long = table_scores({"politeness": scores})
    main = main_scores(long)
    assert main.score.max() <= 100 and set(main.task) == {"politeness"}
    found = correlation_table(main, coverage_of_methods, METHODS, METRIC, Resampling(200))
    row = found[found.metric == METRIC].iloc[0]
    assert row.task == "politeness" and row.n == 4 and row.main
    assert fac_table(found, METRIC, published("table08")).task.tolist() == ["politeness"]
    evidence = Evidence(scores=long, correlations=found.replace({"metric": {METRIC: "FAC"}}))
    assert "politeness accuracy: Ours" in best_method(evidence, ["politeness_accuracy"]).evidence
    assert "politeness r" in fac_predicts_elsewhere(evidence).evidence


def test_nothing_speaks_of_it_unlisted(scores):
    assert table_scores({"politeness": scores}).empty
