"A fifth task is one notebook-sized module above all that exists, and its line in the list of tables."

import importlib.util

import numpy as np
import pytest
import torch
from fac_synthesis.features.activations import FeatureReader
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.questions.what_predicts_performance import correlation_table, fac_table, long_scores
from fac_synthesis.results.claims import Evidence, best_method, fac_predicts_elsewhere
from fac_synthesis.results.tables import comparison, empty_frame, table_scores, wide_table
from fac_synthesis.run.parameters import published
from fac_synthesis.sae.core import SAE, SAEConfig
from fac_synthesis.tasks.scores import COLUMNS, Column

METRIC, METHODS = "FAC of missing features", ["Alpaca", "Evol-Instruct", "SAO", "Ours"]

MODULE = '''"""Politeness: is a request polite? A task of one's own."""
import numpy as np, pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from fac_synthesis.synthesis.baselines import BASELINES
from fac_synthesis.synthesis.contrastive_pairs import contrastive_pairs, describe, generate_candidates
from fac_synthesis.data.corpora import build_corpora
from fac_synthesis.data.records import Record
from fac_synthesis.features.coverage import covered, missing_features, missing_table
from fac_synthesis.synthesis.diversity import diversity_table
from fac_synthesis.synthesis.covered_samples import chosen_samples, complete, keep_verified, sample_budget, second_step_asks
from fac_synthesis.features.interpretation import statistical_features
from fac_synthesis.features.relevance import relevant_latents, statistical_relevance
from fac_synthesis.data.tasks import Task
from fac_synthesis.models.prompts import asking, fill_prompt

POLITE = "please thanks kindly sorry pardon grateful welcome dear honoured gladly humbly cheers".split()
BLUNT = "now just quickly already instead again alone properly fast once finally somehow".split()
THINGS = "door lamp cup roof lawn stair pond shelf gate wall boat tent sink desk plant tower".split()
TASK = Task("politeness", "tell polite requests from blunt ones", "Does the feature stand for courtesy?", asking("Write one polite request."))

def corpora(seed=0):
    "Five roles: requests for a thing with a polite word (1) or with a blunt one (0); the seed set knows two of the twelve polite words."
    ask = lambda word, thing, label: Record(f"could you {word} mind the {thing} today", label, "politeness")
    both = lambda n, things: [ask(w, t, label) for label, words in ((1, POLITE[:n]), (0, BLUNT)) for w in words for t in things]
    roles = dict(anchor=both(12, THINGS[:10]), seed=both(2, THINGS[:4]), full=both(12, THINGS[:8]), test=both(12, THINGS[10:]))
    return build_corpora(roles | dict(pretraining=[Record(r.text) for r in roles["anchor"]]), seed)

def missing(c, reader):
    "(table of the missing features, their latents): parts 20 to 23."
    anchor, seed = (reader(c.texts(role)) for role in ("anchor", "seed"))
    relevance = statistical_relevance(anchor, c.labels("anchor"))
    latents = missing_features(covered(anchor, relevant_latents(relevance)), covered(seed, relevant_latents(relevance)))
    return missing_table(latents, statistical_features(reader.backbone, c.texts("anchor"), anchor), relevance), latents

def synthesize(c, features, reader, lm, work):
    "Kept samples of Ours and of three baselines: parts 30 to 32."
    asks = [(int(f.latent), fill_prompt(TASK.prompts.one_step, describe(f))) for f in features.itertuples()]
    first = generate_candidates(lm, TASK, asks, reader, work, "first", n=3, seed=0)
    asks = second_step_asks(TASK, features, contrastive_pairs(first, features, 0.0), 3, 3)
    second = generate_candidates(lm, TASK, asks, reader, work, "second", n=3, seed=1)
    own = complete(keep_verified(second, 0.0, set(c.texts("seed")), 1, "two-step", 1), TASK, lm, 0)
    seeds = [r.text for r in c["seed"] if r.label]
    made = [BASELINES[m](TASK, seeds, lm, sample_budget(own), 0, background=c.texts("pretraining"), tries=8, **(dict(novelty=1.0) if m == "Alpaca" else {})).samples for m in ("Alpaca", "Evol-Instruct", "SAO")]
    return pd.concat([own, *made], ignore_index=True)

def scores(c, samples, methods, seeds=(42, 43, 44)):
    "One row per method and seed: accuracy of a word count on the test, trained on the seed set and the method's samples."
    n, rows = sample_budget(samples), []
    for method, seed in ((m, s) for m in ["Baseline", "Full Dataset", *methods] for s in seeds):
        role = "full" if method == "Full Dataset" else "seed"
        added = [] if method in ("Baseline", "Full Dataset") else chosen_samples(samples, method, n).text.tolist()
        order = np.random.default_rng(seed).permutation(len(c[role]))[2:]
        texts, labels = [c.texts(role)[i] for i in order] + added, [*c.labels(role)[order], *[1] * len(added)]
        words = TfidfVectorizer().fit(texts)
        right = LogisticRegression(C=10, class_weight="balanced").fit(words.transform(texts), labels).predict(words.transform(c.texts("test"))) == c.labels("test")
        rows.append(dict(method=method, training="LoRA", seed=seed, accuracy=right.mean(), n_texts=len(texts)))
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
def made(politeness, tmp_path_factory):
    "What the task leaves: corpora, missing latents, samples, diversity, scores."
    from conftest import Scripted

    c = politeness.corpora()
    words = word_tokenizer([r.text for rs in c.roles.values() for r in rs])
    torch.manual_seed(0)
    reader = FeatureReader(
        SAE(SAEConfig(d_model=32, n_latents=256, k=6)),
        Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1),
    )

    def reply(prompt, j):
        "A model that uses the polite words it was shown, another thing each time."
        if "Answer with A or B" in prompt:
            return "A"
        if "Equal or Different" in prompt:
            return "Different"
        shown = [w for w in prompt.replace(".", " ").split() if w in politeness.POLITE] or ["please"]
        return f"could you {shown[j % len(shown)]} {shown[-1]} mind the {politeness.THINGS[(len(prompt) + j) % 10]} today"

    features, latents = politeness.missing(c, reader)
    samples = politeness.synthesize(c, features, reader, Scripted(reply), tmp_path_factory.mktemp("work"))
    sets = {m: f.text.tolist() for m, f in samples.groupby("method", sort=False)}
    diversity = politeness.diversity_table(
        sets,
        lambda texts: np.random.default_rng(0).normal(size=(len(texts), 4)),
        reader,
        {METRIC: set(latents)},
        n_clusters=2,
        draws=1,
    ).assign(task="politeness")
    return c, latents, samples, diversity, politeness.scores(c, samples, METHODS)


@pytest.fixture
def listed(monkeypatch):
    "The one edit outside the module."
    monkeypatch.setitem(
        COLUMNS,
        "politeness_accuracy",
        Column(
            "politeness_accuracy", "politeness accuracy", "politeness", "44_politeness", "accuracy", "n_texts"
        ),
    )


def test_features_and_synthesis_take_the_task_as_it_is(politeness, made):
    c, latents, samples, _, scores = made
    assert not set(c.texts("test")) & set(c.texts("anchor")) and len(latents) >= 3
    own = samples[samples.method == "two-step"]
    assert (
        len(own) >= 3
        and (own.score > 0).all()
        and set(own.latent) <= set(latents)
        and (own.item_fault == "").all()
    )
    known = set(politeness.POLITE[:2])
    assert sum(not known & set(t.split()) for t in own.text) > len(own) / 2, (
        "they speak of courtesies that the seed set lacks"
    )
    mean = scores.groupby("method").accuracy.mean()
    assert mean["Ours"] > mean["Baseline"] and mean["Full Dataset"] == 1.0


def test_tables_have_its_column(made, listed):
    scores = made[-1]
    long = table_scores({"44_politeness": scores})
    wide = wide_table(comparison(long, {}, "table01")).set_index("row")["politeness accuracy"]
    ours = 100 * scores[scores.method == "Ours"].accuracy.mean()
    assert wide["Ours"].startswith(f"{ours:.2f}") and wide["Magpie"] == "none"
    assert list(empty_frame("44_politeness", "scores")) == [
        "method",
        "training",
        "seed",
        "accuracy",
        "n_texts",
    ]


def test_questions_and_claims_speak_of_it(made, listed):
    _, _, _, diversity, scores = made
    long = long_scores("44_politeness", scores)
    assert long.score.max() <= 100 and set(long.task) == {"politeness"}
    found = correlation_table(long, diversity, METHODS, METRIC, 200)
    row = found[found.metric == METRIC].iloc[0]
    assert row.task == "politeness" and row.n == 4 and row.main
    assert fac_table(found, METRIC, published("table08")).task.tolist() == ["politeness"]
    evidence = Evidence(
        scores=table_scores({"44_politeness": scores}),
        correlations=found.replace({"metric": {METRIC: "FAC"}}),
    )
    assert "politeness accuracy: Ours" in best_method(evidence, ["politeness_accuracy"]).evidence
    assert "politeness r" in fac_predicts_elsewhere(evidence).evidence


def test_nothing_speaks_of_it_unlisted(made):
    assert table_scores({"44_politeness": made[-1]}).empty
