"Every metric against hand-made numbers or another implementation; budgets, order, taggers, and notebook 33."

import json
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pandas as pd
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy import sparse
from sklearn.metrics.pairwise import cosine_distances
from stage_cells import run_cells

from fac_synthesis.features.activations import FeatureActivations, FeatureReader
from fac_synthesis.run.artifacts import digest_of, remember_digest
from fac_synthesis.run.parameters import LeftOut, published
from fac_synthesis.run.stages import stage_output, stage_record
from fac_synthesis.synthesis.diversity import (
    DIVERSITY_COLUMNS,
    METRICS,
    DiversitySettings,
    backbone_embeddings,
    bag,
    closest_other,
    cluster_entropy,
    coarse,
    cosine_distance,
    count_entropy,
    count_texts,
    cut_to_budget,
    distinct,
    diversity,
    diversity_table,
    encoder_embeddings,
    fit_clusters,
    fitting,
    linked_grammar,
    matched_elsewhere,
    open_grammar,
    perceptron_tagger,
    read_diversity,
    rule_tags,
    self_bleu,
    sentence_words,
    tag_links,
    text_metrics,
    token_counts,
    trace_of_covariance,
    unit_rows,
    vendi_score,
)

RULES = open_grammar("rules")
THINGS = "lamp door bridge violin garden engine letter window".split()
VERBS = "paint repair sell describe".split()
SETS = {
    "narrow": [f"how do i {v} the lamp , number {i} ?" for v in VERBS for i in range(8)],
    "broad": [f"how do i {v} the {t} ?" for v in VERBS for t in THINGS],
    "long": [
        f"please {v} the {t} , and then the {u} , because my friends like it ."
        for v in VERBS
        for t in THINGS
        for u in THINGS[:2]
    ],
}
TARGETS = {"Ours (FAC)": set(range(len(THINGS)))}


def vector(word):
    "Drawn from the word."
    return np.random.default_rng(list(word.encode())).normal(0, 1, 24)


def embed(texts):
    "The mean of word vectors."
    return np.stack([np.mean([vector(word) for word in text.split()], axis=0) for text in texts])


def fires(texts):
    "A feature per thing."
    g = np.array([[float(thing in text.split()) for thing in THINGS] for text in texts], dtype=np.float32)
    return FeatureActivations(sparse.csr_matrix(g), sparse.csr_matrix(g))


def words_of(text):
    return [word.lower() for sentence in sentence_words(text) for word in sentence]


def self_bleu_by_nltk(texts):
    "The loop that everyone writes."
    words = [words_of(text) for text in texts]
    smoothing = SmoothingFunction().method1
    scores = [
        sentence_bleu(words[:i] + words[i + 1 :], own, smoothing_function=smoothing)
        for i, own in enumerate(words)
    ]
    return np.mean(scores)


# ---- words


def test_sentences_and_words():
    lengths = [len(s) for s in sentence_words("Dr. Smith can't wait, e.g. for rain. Is it late?\nYes")]
    assert lengths == [10, 4, 1]
    assert sentence_words("tell me about the lock .") == [["tell", "me", "about", "the", "lock", "."]]
    assert token_counts(["a b .", "one two"]).tolist() == [3, 2]


def test_distinct_and_entropy_by_hand():
    counts = count_texts(["a b a b", "a c"], RULES)
    assert distinct(counts.words[0]) == 3 / 6
    assert distinct(counts.words[1]) == 3 / 4, "ab ba ab | ac: bigrams stay within their text"
    expected = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))
    assert count_entropy(counts.words[1]) == pytest.approx(expected)
    assert count_texts(["The the", "THE x"], RULES).words[0].sum(0).tolist() == [[3, 1]], "case is ignored"
    assert np.isnan(distinct(count_texts(["a", "b"], RULES).words[1])), "no bigram at all"
    assert bag([["x", "y", "x"], [], ["y"]]).toarray().tolist() == [[2, 1], [0, 0], [0, 1]]
    assert bag([[], []]).shape == (2, 1)


def test_mean_sentence_length_and_tag_pairs():
    values = text_metrics(count_texts(["the dog sees it . why ?", "the dog ."], RULES))
    assert values["MLS"] == pytest.approx((5 + 2 + 3) / 3)
    assert values["POS tag Distinct-2"] == 7 / 8, "DET NOUN VERB PRON . ADV . | DET NOUN . share one pair"


@pytest.mark.parametrize(
    "texts",
    [
        ["the dog sees the cat .", "the dog sees a bird .", "why does rain fall ?"],
        ["a a a a b", "a a c", "b a a a a a", "x y z q", "x y z q"],
        ["a", "b"],
        ["a", "a"],
        ["a b", "c d e f g", "a b c"],
    ],
)
def test_self_bleu_is_nltks_loop(texts):
    assert self_bleu(count_texts(texts, RULES)) == pytest.approx(self_bleu_by_nltk(texts), rel=1e-12)


def test_self_bleu_is_nltks_loop_on_random_texts_and_on_rows():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefg"), rng.integers(1, 12))) for _ in range(40)]
    counts, some = count_texts(texts, RULES), np.array([3, 5, 8, 13, 21, 34])
    loop = self_bleu_by_nltk([texts[i] for i in some])
    assert self_bleu(counts.rows(some)) == pytest.approx(loop, rel=1e-12)
    assert self_bleu(count_texts(["x y z w v"] * 3, RULES)) == pytest.approx(1)


def test_clipping_and_closest_length():
    matched, total = matched_elsewhere(sparse.csr_matrix(np.array([[3, 0], [1, 1], [2, 0]])))
    assert matched.tolist() == [2, 1, 2] and total.tolist() == [3, 2, 2]
    matched, total = matched_elsewhere(bag([[], []]))
    assert matched.tolist() == total.tolist() == [0, 0]
    assert closest_other(np.array([5, 7, 9, 9, 20])).tolist() == [7, 5, 9, 9, 9]


# ---- tags


def test_rules_and_links():
    tags = rule_tags("The dog barked loudly at 3 dangerous cats .".split())
    assert tags == "DET NOUN VERB ADV ADP NUM ADJ NOUN .".split()
    penn = ("NNS", "VBZ", "MD", "PRP$", "WRB", "IN", ",", "``", "UH", "DET", "PRON")
    assert [coarse(t) for t in penn] == "NOUN VERB VERB PRON ADV ADP . . X DET PRON".split()
    links = [("DET", "NOUN"), ("NOUN", "VERB"), ("VERB", "ADV")]
    assert tag_links(["DT", "NN", "VBZ", "RB"]) == links == tag_links(["DET", "NOUN", "VERB", "ADV"])
    assert tag_links(["."]) == []


def weights_folder(tmp_path, content: bytes, zipped: bool):
    folder = tmp_path / "nltk_data" / "taggers"
    folder.mkdir(parents=True)
    name = "averaged_perceptron_tagger"
    if zipped:
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as z:
            z.writestr(f"{name}/{name}.pickle", content)
    else:
        (folder / name).mkdir()
        (folder / name / f"{name}.pickle").write_bytes(content)
    return tmp_path


WEIGHTS = ({"i word dog": {"NN": 1.0}, "bias": {"VB": 0.5}}, {"the": "DT"}, {"NN", "VB", "DT"})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_pickled_weights_are_read(tmp_path, zipped, protocol):
    tagger = perceptron_tagger(weights_folder(tmp_path, pickle.dumps(WEIGHTS, protocol), zipped))
    assert tagger.tag(["the", "dog", "runs"]) == [("the", "DT"), ("dog", "NN"), ("runs", "VB")]
    grammar = open_grammar("auto", tmp_path)
    assert grammar.tagger == "nltk averaged perceptron"
    read = grammar.read([[["the", "dog"], ["the"]]])
    assert read == [(["DT", "NN", "DT"], [("DET", "NOUN")])], "no pair across sentences"


def test_json_weights_come_first(tmp_path):
    folder = weights_folder(tmp_path, b"not read", True) / "nltk_data" / "taggers"
    name = "averaged_perceptron_tagger_eng"
    weights, tagdict, classes = WEIGHTS
    parts = dict(weights=weights, tagdict=tagdict, classes=sorted(classes))
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as z:
        for part, value in parts.items():
            z.writestr(f"{name}/{name}.{part}.json", json.dumps(value))
    assert perceptron_tagger(tmp_path).tag(["the", "dog"]) == [("the", "DT"), ("dog", "NN")]


def test_a_stored_table_notices_other_weights(tmp_path):
    digests = set()
    for i, weight in enumerate((1.0, 2.0)):
        (tmp_path / str(i)).mkdir()
        weights = ({"i word dog": {"NN": weight}}, *WEIGHTS[1:])
        folder = weights_folder(tmp_path / str(i), pickle.dumps(weights), True)
        digests |= {digest_of(open_grammar("perceptron", folder)) for _ in range(2)}
    assert len(digests | {digest_of(RULES)}) == 3
    assert digest_of(RULES) == digest_of(open_grammar("rules"))
    assert digest_of(linked_grammar("mine", str.split, "1")) != digest_of(linked_grammar("mine", str.split))


class Call:
    "What a pickle could run."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "content",
    [
        lambda made: pickle.dumps(Call(made)),
        lambda made: pickle.dumps((Call(made), {}, set())),
        lambda made: b"cos\nsystem\n(S'true'\ntR.",
        lambda made: b"\x80\x04junk",
        lambda made: pickle.dumps(({"f": 3}, {}, {"NN"})),
        lambda made: pickle.dumps(([], {})),
        lambda made: pickle.dumps(({}, {}, set())),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_is_refused(content, zipped, tmp_path, refused):
    made = tmp_path / "made"
    folder = weights_folder(tmp_path, content(str(made)), zipped)
    assert "cannot be read" in refused(lambda: perceptron_tagger(folder)) and not made.exists()


def test_a_damaged_zip_is_refused(tmp_path, refused):
    (tmp_path / "nltk_data" / "taggers").mkdir(parents=True)
    (tmp_path / "nltk_data" / "taggers" / "averaged_perceptron_tagger.zip").write_bytes(b"no zip")
    assert "cannot be read" in refused(lambda: perceptron_tagger(tmp_path))


def test_grammar_by_name(tmp_path, monkeypatch, refused):
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)
    assert open_grammar("auto").tagger == open_grammar("rules").tagger == "word lists and endings"
    assert open_grammar("auto", tmp_path).fallback
    assert "no weights" in refused(lambda: open_grammar("perceptron", tmp_path))
    assert "unknown" in refused(lambda: open_grammar("brill"))
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert "not installed" in refused(lambda: open_grammar(spacy_model="en_core_web_sm"))


class Doc(list):
    "spaCy's document of our words and sentence starts."

    def __init__(self, vocab, words, sent_starts):
        for word, starts in zip(words, sent_starts):
            tag, relation = "" if word == "." else "T", "ROOT" if starts else "dep"
            self.append(types.SimpleNamespace(tag_=tag, pos_="PUNCT", dep_=relation))


def test_spacy_by_option(monkeypatch, refused):
    "A stand-in with spaCy's interface: one document per text."
    nlp = types.SimpleNamespace(
        vocab=None, pipe_names=["tagger", "parser"], pipe=iter, meta={"version": "3.8"}
    )

    def load(name):
        if name == "missing":
            raise OSError("[E050] Can't find model 'missing'.\nmore")
        return nlp

    tokens = types.SimpleNamespace(Doc=Doc)
    spacy = types.SimpleNamespace(load=load, tokens=tokens, __version__="3.8.1")
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    grammar = open_grammar(spacy_model="some/folder/en_core_web_sm")
    assert grammar.tagger == grammar.parser == "spaCy en_core_web_sm" and not grammar.fallback
    read = grammar.read([[["a", "b", "."], ["c"]]])
    assert read == [(["T", "T", "PUNCT", "T"], ["ROOT", "dep", "dep", "ROOT"])]
    once = DiversitySettings(draws=1)
    table = diversity_table({"broad": SETS["broad"]}, embed, grammar=grammar, settings=once)
    row = table.set_index("metric").loc["Dependency relation entropy"]
    assert row.label == "Dependency relation entropy" and row.parser == "spaCy en_core_web_sm"
    assert "E050" in refused(lambda: open_grammar(spacy_model="missing"))
    before = digest_of(grammar)
    nlp.meta = {"version": "3.9"}
    assert digest_of(open_grammar(spacy_model="some/folder/en_core_web_sm")) != before
    nlp.pipe_names = ["tagger"]
    assert "no dependency parser" in refused(lambda: open_grammar(spacy_model="blank"))


@pytest.mark.skipif(
    not os.environ.get("FAC_DATA_DIR"), reason="FAC_DATA_DIR is not set: nltk's published weights are needed"
)
def test_the_published_tagger():
    grammar = open_grammar("perceptron")
    tags, _ = grammar.read([["The quick brown fox jumps over the lazy dog".split()]])[0]
    assert tags == ["DT", "JJ", "NN", "NN", "VBZ", "IN", "DT", "JJ", "NN"]


# ---- embeddings


def test_spread_against_other_implementations():
    x_ND = np.random.default_rng(0).normal(0.3, 1, (30, 7))
    u_ND, pairs = unit_rows(x_ND, 30), np.triu_indices(30, 1)
    assert cosine_distance(u_ND) == pytest.approx(cosine_distances(x_ND)[pairs].mean())
    assert trace_of_covariance(x_ND) == pytest.approx(np.trace(np.cov(x_ND.T)))
    eigenvalues = np.linalg.eigvalsh(u_ND @ u_ND.T / 30)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi_score(u_ND) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))
    wider = np.pad(u_ND[:5], ((0, 0), (0, 3)))
    assert vendi_score(u_ND[:5]) == pytest.approx(vendi_score(wider)), "either Gram matrix gives the same"


@pytest.mark.parametrize("n, d", [(2, 9), (6, 6), (9, 12)])
def test_vendi_counts_different_texts(n, d):
    assert vendi_score(np.eye(n, d)) == pytest.approx(n)
    assert vendi_score(np.tile(np.eye(1, d), (n, 1))) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(n, d), 3, axis=0)) == pytest.approx(n)


def test_cluster_entropy():
    x_ND = np.repeat(np.eye(4) * 10, [1, 2, 3, 2], axis=0)
    shares = np.array([1, 2, 3, 2]) / 8
    found = cluster_entropy(x_ND, fit_clusters(x_ND, 20, 0))
    assert found == pytest.approx(-(shares * np.log(shares)).sum()), "no more clusters than different rows"
    assert cluster_entropy(x_ND[:1].repeat(3, 0), fit_clusters(x_ND, 4, 0)) == 0


def test_embeddings_of_backbone_and_encoder(backbone, texts, tmp_path, refused):
    x_ND = backbone_embeddings(backbone, texts)
    one = next(iter(backbone.residuals(texts[:1])))
    assert np.allclose(x_ND[0], one.x_ND.mean(0).numpy(), atol=1e-6)
    assert x_ND.shape == (len(texts), backbone.d_model)
    assert np.allclose(x_ND, backbone_embeddings(backbone, texts, batch_tokens=10), atol=1e-5)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    whole = encoder_embeddings(str(tmp_path), texts)
    apart = encoder_embeddings(str(tmp_path), texts, batch_tokens=1)
    assert whole.shape == x_ND.shape and np.allclose(whole, apart, atol=1e-5)
    ids = backbone.tokenizer(texts[0], return_tensors="pt", return_token_type_ids=False)
    state = backbone.model.base_model(**ids).last_hidden_state[0]
    assert np.allclose(whole[0], state.mean(0).detach().numpy(), atol=1e-5)
    assert "could not be opened" in refused(lambda: encoder_embeddings(str(tmp_path / "none"), texts))


# ---- a set


def test_all_metrics_of_figure_9_under_its_names():
    values = diversity(SETS["broad"], embed(SETS["broad"]), fires(SETS["broad"]), TARGETS)
    paper = published("figure09")
    assert list(values) == list(METRICS) and set(METRICS) == {*paper.metric, "Vendi score"}
    assert all(METRICS[m] == level for m, level in zip(paper.metric, paper.level))
    assert all(np.isfinite(v) for v in values.values()) and values["Ours (FAC)"] == 1.0
    assert "Ours (FAC)" not in diversity(SETS["broad"], embed(SETS["broad"]))
    targets = {"a": {0, 1}, "b": {5}, "c": set()}
    shares = diversity(SETS["narrow"], embed(SETS["narrow"]), fires(SETS["narrow"]), targets)
    assert (shares["a"], shares["b"]) == (0.5, 0.0) and np.isnan(shares["c"])


def test_order_of_the_texts_does_not_matter():
    texts = SETS["narrow"] + SETS["broad"][:9]
    shuffled = [texts[i] for i in np.random.default_rng(1).permutation(len(texts))]
    one = diversity(texts, embed(texts), fires(texts), TARGETS)
    assert one == diversity(shuffled, embed(shuffled), fires(shuffled), TARGETS)

    def table(sets, seed):
        return diversity_table(sets, embed, fires, TARGETS, settings=DiversitySettings(seed=seed))

    turned = {name: some[::-1] for name, some in SETS.items()}
    pd.testing.assert_frame_equal(table(SETS, 3), table(turned, 3))
    assert not table(SETS, 4).value.equals(table(SETS, 3).value)


@pytest.mark.parametrize(
    "texts, said",
    [
        ([], "holds no texts"),
        (["one"], "holds 1 text,"),
        (["one", "  "], "number 2 is empty"),
        (["one", None], "number 2 is empty"),
        ("one", "is one text"),
    ],
)
def test_unusable_sets_are_refused(texts, said, refused):
    assert said in refused(lambda: diversity(texts, np.ones((len(texts), 3))))
    message = refused(lambda: diversity_table({"Magpie": texts, "broad": SETS["broad"]}, embed))
    assert said in message and "Magpie" in message


def test_unusable_embeddings_and_settings_are_refused(refused):
    texts = ["one two", "three four"]
    zero, not_finite = np.array([[1.0, 0], [0, 0]]), np.array([[np.nan, 0], [0, 1]])
    assert "shape (3, 2)" in refused(lambda: diversity(texts, np.ones((3, 2))))
    assert "number 2 is zero or not finite" in refused(lambda: diversity(texts, zero))
    assert "number 1 is zero or not finite" in refused(lambda: diversity(texts, not_finite))
    assert "n_clusters" in refused(lambda: diversity(texts, np.eye(2), clusters=0))
    assert "no set" in refused(lambda: diversity_table({}, embed))
    assert "draws" in refused(lambda: diversity_table(SETS, embed, settings=DiversitySettings(draws=0)))


# ---- equal footing


def test_budget_is_the_smallest_sets_and_equal_for_all():
    tokens = {name: token_counts(some) for name, some in SETS.items()}
    kept, report = cut_to_budget(tokens, seed=5)
    smallest = min(int(t.sum()) for t in tokens.values())
    assert set(report.budget) == {smallest} and report.kept_tokens.max() == smallest
    for row in report.itertuples():
        own = tokens[row.set]
        assert own[kept[row.set]].sum() == row.kept_tokens
        assert len(set(kept[row.set])) == row.kept_texts <= row.texts
        assert row.kept_tokens == row.tokens or smallest - row.kept_tokens < own.max(), (
            "no text is left out that fits"
        )
    again, _ = cut_to_budget(tokens, seed=5)
    other, _ = cut_to_budget(tokens, seed=6)
    assert all(np.array_equal(kept[name], again[name]) for name in kept)
    assert not np.array_equal(kept["long"], other["long"])


def test_budget_too_small_for_two_texts(refused):
    sets = {"long": np.array([50, 60]), "short": np.array([20, 20])}
    assert "long" in refused(lambda: cut_to_budget(sets))
    kept, report = cut_to_budget({"mixed": np.array([500, 20, 20, 500])}, budget=40)
    assert kept["mixed"].tolist() == [1, 2] and report.kept_tokens.tolist() == [40], (
        "a text that can never fit does not stop the others"
    )
    assert fitting(np.array([5, 5]), 4, seed=0) == []


def test_table_has_a_row_per_set_and_metric_and_says_what_was_used():
    table = diversity_table(SETS, embed, fires, TARGETS, settings=DiversitySettings(draws=4))
    assert len(table) == len(SETS) * (len(METRICS) + 1) and not table.isna().any().any()
    assert set(table.draws) == {4} and list(DIVERSITY_COLUMNS) == [*table, "task"]
    wide = table.pivot(index="metric", columns="set", values="value")
    of_all = table[table.metric == "Ours (FAC), all texts"].set_index("set")
    assert of_all.value.to_dict() == {"narrow": 0.125, "broad": 1.0, "long": 1.0}
    assert of_all.n_texts.to_dict() == {name: len(some) for name, some in SETS.items()}
    table = table[table.metric.isin(METRICS)]
    fac = wide.loc["Ours (FAC)"]
    assert fac["narrow"] == 0.125 and fac["broad"] == 1.0 and 0.125 < fac["long"] < 1, (
        "on the cut texts: all texts of `long` would cover everything"
    )
    assert wide.loc["Semantic entropy", "narrow"] < wide.loc["Semantic entropy", "broad"]
    assert wide.loc["Self-BLEU", "narrow"] > wide.loc["Self-BLEU", "broad"]
    smallest = table.n_tokens.max()
    whole = table[table.n_texts == table.set.map({name: len(some) for name, some in SETS.items()})]
    assert set(whole.set) == {"broad"} and (whole.sd < 1e-12).all()
    assert (table.n_tokens > smallest - 20).all()
    syntax = table[table.tagger != ""]
    assert set(syntax.metric) == {"POS tag Distinct-2", "Dependency relation entropy"}
    assert set(syntax.tagger) == {"word lists and endings"}
    labels = table.label[table.metric == "Dependency relation entropy"]
    assert set(labels) == {"Dependency relation entropy (fallback: neighbouring tags)"}
    assert set(table.parser) == {"", "fallback: neighbouring tags"}


def test_each_text_is_read_once():
    asked = []

    def counting(texts):
        asked.append(list(texts))
        return embed(texts)

    sets = {"a": SETS["broad"], "b": SETS["broad"] + SETS["narrow"]}
    diversity_table(sets, counting, settings=DiversitySettings(draws=2))
    assert len(asked) == 1 and sorted(asked[0]) == sorted(set(SETS["broad"] + SETS["narrow"]))


# ---- the notebook


def samples_of(**sizes):
    "Samples of every method, `two-step` among them."
    parts = []
    for method, n in sizes.items():
        texts = [f"how do i {VERBS[i % 4]} the {THINGS[i // 4]} , {method} ?" for i in range(n)]
        parts.append(pd.DataFrame(dict(method=method, text=texts, latent=range(n), rank=0)))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def diversity_of(backbone, sae, tmp_path, monkeypatch):
    "diversity_of(samples by task, **parameters): notebook 33 on these samples."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("FAC_RESOLVED", "1")
    remember_digest(backbone, "the backbone of the tests")  # as if it was loaded
    reader = FeatureReader(sae, backbone)

    def call(samples, **given):
        stand_ins = dict(
            read_task_names=lambda run: list(samples),
            read_samples=lambda run, task: samples[task],
            read_sets=lambda run, task: dict(anchor=list(range(20)), missing=[3, 5]),
            read_delta=lambda run: 0.0,
            open_reader=lambda run: reader,
        )
        return run_cells("33_diversity_metrics", stand_ins, **{**dict(draws=2, n_clusters=3), **given})

    return call


def test_the_notebook_measures_what_each_method_brings(diversity_of, capsys):
    samples = {
        "toxicity": samples_of(**{"two-step": 12, "SAO": 15, "Magpie": 4}),
        "reward": samples_of(SAO=9),
    }
    run = diversity_of(samples)
    said = capsys.readouterr().out
    assert "toxicity: Magpie is left out, its 4 samples are fewer than 10" in said
    assert "reward is left out: two-step synthesis left no sample" in said
    table = stage_output("33_diversity_metrics", "diversity")
    assert list(table) == list(DIVERSITY_COLUMNS) and set(table.task) == {"toxicity"}
    assert set(table.set) == {"two-step", "SAO"} and set(table.n_texts[table.metric.str.contains(",")]) == {
        12
    }
    assert (run.folder / "figures/diversity_metrics.png").exists()
    printed = pd.read_csv(run.folder / "tables/diversity.csv")
    assert list(printed) == ["task", "metric", "SAO", "two-step"]
    metrics = stage_record("33_diversity_metrics", "mini")["metrics"]
    assert metrics["tasks"] == 1 and metrics["toxicity_budget_tokens"] > 50


def test_a_task_is_measured_by_itself(diversity_of):
    both = {task: samples_of(**{"two-step": 12, "SAO": 12}) for task in ("toxicity", "reward")}
    first = diversity_of(both).outputs
    more = both | {"reward": samples_of(**{"two-step": 11, "SAO": 12})}
    second = diversity_of(more).outputs
    assert first["diversity_toxicity"] == second["diversity_toxicity"]
    assert first["diversity_reward"] != second["diversity_reward"]


@pytest.mark.parametrize("sizes", [{"SAO": 12}, {"two-step": 3, "SAO": 3}, {"two-step": 12}])
def test_nothing_to_compare_is_one_sentence(diversity_of, sizes, capsys):
    with pytest.raises(LeftOut):
        diversity_of({"toxicity": samples_of(**sizes)})
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "left out: no task has two sets of at least 10 samples that could be compared"

    class Later:
        "A run of a later stage."

        def frame(self, stage, name, columns):
            assert name not in stage_record(stage, "mini")["outputs"]
            return pd.DataFrame(columns=list(columns))

    assert list(read_diversity(Later())) == list(DIVERSITY_COLUMNS)
