"""Every metric against hand-made numbers or another implementation; budgets, order of the texts, taggers and refusals."""

import json
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pandas as pd
import pytest
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.run.parameters import published
from fac_synthesis.synthesis.diversity import (
    METRICS,
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
    matched_elsewhere,
    open_grammar,
    perceptron_tagger,
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
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy import sparse
from sklearn.metrics.pairwise import cosine_distances

RULES = open_grammar("rules")
THINGS, VERBS = (
    "lamp door bridge violin garden engine letter window".split(),
    "paint repair sell describe".split(),
)
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


def embed(texts):
    "A sum of word vectors, each drawn from its word."
    vector = lambda w: np.random.default_rng(list(w.encode())).normal(0, 1, 24)
    return np.stack([np.mean([vector(w) for w in t.split()], axis=0) for t in texts])


def fires(texts):
    g = sparse.csr_matrix(
        np.array([[float(t in x.split()) for t in THINGS] for x in texts], dtype=np.float32)
    )
    return FeatureActivations(g, g)


def words_of(text):
    return [w.lower() for s in sentence_words(text) for w in s]


# ---- words


def test_sentences_and_words():
    assert [len(s) for s in sentence_words("Dr. Smith can't wait, e.g. for rain. Is it late?\nYes")] == [
        10,
        4,
        1,
    ]
    assert sentence_words("tell me about the lock .") == [["tell", "me", "about", "the", "lock", "."]]
    assert token_counts(["a b .", "one two"]).tolist() == [3, 2]


def test_distinct_and_entropy_by_hand():
    counts = count_texts(["a b a b", "a c"], RULES)
    assert distinct(counts.words[0]) == 3 / 6 and distinct(counts.words[1]) == 3 / 4, (
        "ab ba ab | ac: bigrams stay within their text"
    )
    assert count_entropy(counts.words[1]) == pytest.approx(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25)))
    assert count_texts(["The the", "THE x"], RULES).words[0].sum(0).tolist() == [[3, 1]], "case is ignored"
    assert np.isnan(distinct(count_texts(["a", "b"], RULES).words[1])), "no bigram at all"
    assert bag([["x", "y", "x"], [], ["y"]]).toarray().tolist() == [[2, 1], [0, 0], [0, 1]] and bag(
        [[], []]
    ).shape == (2, 1)


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
    words = [words_of(t) for t in texts]
    loop = [
        sentence_bleu(words[:i] + words[i + 1 :], w, smoothing_function=SmoothingFunction().method1)
        for i, w in enumerate(words)
    ]
    assert self_bleu(count_texts(texts, RULES)) == pytest.approx(np.mean(loop), rel=1e-12)


def test_self_bleu_is_nltks_loop_on_random_texts_and_on_rows():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefg"), rng.integers(1, 12))) for _ in range(40)]
    counts, some = count_texts(texts, RULES), np.array([3, 5, 8, 13, 21, 34])
    words = [words_of(texts[i]) for i in some]
    loop = [
        sentence_bleu(words[:i] + words[i + 1 :], w, smoothing_function=SmoothingFunction().method1)
        for i, w in enumerate(words)
    ]
    assert self_bleu(counts.rows(some)) == pytest.approx(np.mean(loop), rel=1e-12)
    assert self_bleu(count_texts(["x y z w v"] * 3, RULES)) == pytest.approx(1)


def test_clipping_and_closest_length():
    matched, total = matched_elsewhere(sparse.csr_matrix(np.array([[3, 0], [1, 1], [2, 0]])))
    assert matched.tolist() == [2, 1, 2] and total.tolist() == [3, 2, 2]
    assert closest_other(np.array([5, 7, 9, 9, 20])).tolist() == [7, 5, 9, 9, 9]


# ---- tags


def test_rules_and_links():
    assert rule_tags("The dog barked loudly at 3 dangerous cats .".split()) == [
        "DET",
        "NOUN",
        "VERB",
        "ADV",
        "ADP",
        "NUM",
        "ADJ",
        "NOUN",
        ".",
    ]
    assert [coarse(t) for t in ("NNS", "VBZ", "MD", "PRP$", "WRB", "IN", ",", "``", "UH", "DET", "PRON")] == [
        "NOUN",
        "VERB",
        "VERB",
        "PRON",
        "ADV",
        "ADP",
        ".",
        ".",
        "X",
        "DET",
        "PRON",
    ]
    assert (
        tag_links(["DT", "NN", "VBZ", "RB"])
        == [("DET", "NOUN"), ("NOUN", "VERB"), ("VERB", "ADV")]
        == tag_links(["DET", "NOUN", "VERB", "ADV"])
    )
    assert tag_links(["."]) == []


def weights_folder(tmp_path, content: bytes, zipped: bool):
    folder = tmp_path / "nltk_data" / "taggers"
    folder.mkdir(parents=True)
    if zipped:
        with zipfile.ZipFile(folder / "averaged_perceptron_tagger.zip", "w") as z:
            z.writestr("averaged_perceptron_tagger/averaged_perceptron_tagger.pickle", content)
    else:
        (folder / "averaged_perceptron_tagger").mkdir()
        (folder / "averaged_perceptron_tagger" / "averaged_perceptron_tagger.pickle").write_bytes(content)
    return tmp_path


WEIGHTS = ({"i word dog": {"NN": 1.0}, "bias": {"VB": 0.5}}, {"the": "DT"}, {"NN", "VB", "DT"})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_pickled_weights_are_read(tmp_path, zipped, protocol):
    tagger = perceptron_tagger(weights_folder(tmp_path, pickle.dumps(WEIGHTS, protocol), zipped))
    assert tagger.tag(["the", "dog", "runs"]) == [("the", "DT"), ("dog", "NN"), ("runs", "VB")]
    grammar = open_grammar("auto", tmp_path)
    assert grammar.tagger == "nltk averaged perceptron" and grammar.read([[["the", "dog"], ["the"]]]) == [
        (["DT", "NN", "DT"], [("DET", "NOUN")])
    ], "no pair across sentences"


def test_json_weights_come_first(tmp_path):
    folder = weights_folder(tmp_path, b"not read", True) / "nltk_data" / "taggers"
    name = "averaged_perceptron_tagger_eng"
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as z:
        for part, value in zip(("weights", "tagdict", "classes"), (*WEIGHTS[:2], sorted(WEIGHTS[2]))):
            z.writestr(f"{name}/{name}.{part}.json", json.dumps(value))
    assert perceptron_tagger(tmp_path).tag(["the", "dog"]) == [("the", "DT"), ("dog", "NN")]


class _Call:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, refused):
    for i, content in enumerate(
        [
            pickle.dumps(_Call(str(tmp_path / "made"))),
            pickle.dumps((_Call(str(tmp_path / "made")), {}, set())),
            b"cos\nsystem\n(S'true'\ntR.",
            b"\x80\x04junk",
            pickle.dumps(({"f": 3}, {}, {"NN"})),
            pickle.dumps(([], {})),
            pickle.dumps(({}, {}, set())),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert "cannot be read" in refused(
            lambda: perceptron_tagger(weights_folder(folder, content, bool(i % 2)))
        )
    assert not (tmp_path / "made").exists()
    (tmp_path / "z" / "nltk_data" / "taggers").mkdir(parents=True)
    (tmp_path / "z" / "nltk_data" / "taggers" / "averaged_perceptron_tagger.zip").write_bytes(b"no zip")
    assert "cannot be read" in refused(lambda: perceptron_tagger(tmp_path / "z"))


def test_grammar_by_name(tmp_path, monkeypatch, refused):
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)
    assert (
        open_grammar("auto").tagger == open_grammar("rules").tagger == "word lists and endings"
        and open_grammar("auto", tmp_path).fallback
    )
    assert "no weights" in refused(lambda: open_grammar("perceptron", tmp_path))
    assert "unknown" in refused(lambda: open_grammar("brill"))
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert "not installed" in refused(lambda: open_grammar(spacy_model="en_core_web_sm"))


def test_spacy_by_option(monkeypatch, refused):
    "A stand-in with spaCy's interface: one document per text, with our words and sentence starts."
    token = types.SimpleNamespace

    class Doc(list):
        def __init__(self, vocab, words, sent_starts):
            super().__init__(
                token(tag_="" if w == "." else "T", pos_="PUNCT", dep_="ROOT" if s else "dep")
                for w, s in zip(words, sent_starts)
            )

    nlp = token(vocab=None, pipe_names=["tagger", "parser"], pipe=iter)

    def load(name):
        if name == "missing":
            raise OSError("[E050] Can't find model 'missing'.\nmore")
        return nlp

    monkeypatch.setitem(sys.modules, "spacy", token(load=load, tokens=token(Doc=Doc)))
    grammar = open_grammar(spacy_model="some/folder/en_core_web_sm")
    assert grammar.tagger == grammar.parser == "spaCy en_core_web_sm" and not grammar.fallback
    assert grammar.read([[["a", "b", "."], ["c"]]]) == [
        (["T", "T", "PUNCT", "T"], ["ROOT", "dep", "dep", "ROOT"])
    ]
    table = diversity_table({"broad": SETS["broad"]}, embed, grammar=grammar, draws=1).set_index("metric")
    assert (
        table.label["Dependency relation entropy"] == "Dependency relation entropy"
        and table.parser["Dependency relation entropy"] == "spaCy en_core_web_sm"
    )
    assert "E050" in refused(lambda: open_grammar(spacy_model="missing"))
    nlp.pipe_names = ["tagger"]
    assert "no dependency parser" in refused(lambda: open_grammar(spacy_model="blank"))


@pytest.mark.skipif(
    not os.environ.get("FAC_DATA_DIR"), reason="FAC_DATA_DIR is not set: nltk's published weights are needed"
)
def test_the_published_tagger():
    grammar = open_grammar("perceptron")
    assert grammar.read([[["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]]])[0][
        0
    ] == ["DT", "JJ", "NN", "NN", "VBZ", "IN", "DT", "JJ", "NN"]


# ---- embeddings


def test_spread_against_other_implementations():
    x_ND = np.random.default_rng(0).normal(0.3, 1, (30, 7))
    u_ND, pairs = unit_rows(x_ND, 30), np.triu_indices(30, 1)
    assert cosine_distance(u_ND) == pytest.approx(cosine_distances(x_ND)[pairs].mean())
    assert trace_of_covariance(x_ND) == pytest.approx(np.trace(np.cov(x_ND.T)))
    eigenvalues = np.linalg.eigvalsh(u_ND @ u_ND.T / 30)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi_score(u_ND) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))
    assert vendi_score(u_ND[:5]) == pytest.approx(vendi_score(np.pad(u_ND[:5], ((0, 0), (0, 3))))), (
        "either Gram matrix gives the same"
    )


@pytest.mark.parametrize("n, d", [(2, 9), (6, 6), (9, 12)])
def test_vendi_counts_different_texts(n, d):
    assert vendi_score(np.eye(n, d)) == pytest.approx(n)
    assert vendi_score(np.tile(np.eye(1, d), (n, 1))) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(n, d), 3, axis=0)) == pytest.approx(n)


def test_cluster_entropy():
    x_ND = np.repeat(np.eye(4) * 10, [1, 2, 3, 2], axis=0)
    shares = np.array([1, 2, 3, 2]) / 8
    assert cluster_entropy(x_ND, fit_clusters(x_ND, 20, 0)) == pytest.approx(
        -(shares * np.log(shares)).sum()
    ), "no more clusters than different rows"
    assert cluster_entropy(x_ND[:1].repeat(3, 0), fit_clusters(x_ND, 4, 0)) == 0


def test_embeddings_of_backbone_and_encoder(backbone, texts, tmp_path, refused):
    x_ND = backbone_embeddings(backbone, texts)
    one = next(iter(backbone.residuals(texts[:1])))
    assert np.allclose(x_ND[0], one.x_ND.mean(0).numpy(), atol=1e-6) and x_ND.shape == (
        len(texts),
        backbone.d_model,
    )
    assert np.allclose(x_ND, backbone_embeddings(backbone, texts, batch_tokens=10), atol=1e-5)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    whole, apart = (
        encoder_embeddings(str(tmp_path), texts),
        encoder_embeddings(str(tmp_path), texts, batch_tokens=1),
    )
    assert whole.shape == x_ND.shape and np.allclose(whole, apart, atol=1e-5)
    ids = backbone.tokenizer(texts[0], return_tensors="pt", return_token_type_ids=False)
    assert np.allclose(
        whole[0], backbone.model.base_model(**ids).last_hidden_state[0].mean(0).detach().numpy(), atol=1e-5
    )
    assert "could not be opened" in refused(lambda: encoder_embeddings(str(tmp_path / "none"), texts))


# ---- a set


def test_all_metrics_of_figure_9_under_its_names():
    values = diversity(SETS["broad"], embed(SETS["broad"]), fires(SETS["broad"]), TARGETS)
    paper = published("figure09")
    assert (
        list(values) == list(METRICS)
        and set(METRICS) == {*paper.metric, "Vendi score"}
        and all(METRICS[m] == level for m, level in zip(paper.metric, paper.level))
    )
    assert all(np.isfinite(v) for v in values.values()) and values["Ours (FAC)"] == 1.0
    assert "Ours (FAC)" not in diversity(SETS["broad"], embed(SETS["broad"]))
    shares = diversity(
        SETS["narrow"], embed(SETS["narrow"]), fires(SETS["narrow"]), {"a": {0, 1}, "b": {5}, "c": set()}
    )
    assert (shares["a"], shares["b"]) == (0.5, 0.0) and np.isnan(shares["c"])


def test_order_of_the_texts_does_not_matter():
    texts = SETS["narrow"] + SETS["broad"][:9]
    shuffled = [texts[i] for i in np.random.default_rng(1).permutation(len(texts))]
    assert diversity(texts, embed(texts), fires(texts), TARGETS) == diversity(
        shuffled, embed(shuffled), fires(shuffled), TARGETS
    )
    one, other = (
        diversity_table(sets, embed, fires, TARGETS, seed=3)
        for sets in (SETS, {name: some[::-1] for name, some in SETS.items()})
    )
    pd.testing.assert_frame_equal(one, other)
    assert not diversity_table(SETS, embed, seed=4).value.equals(diversity_table(SETS, embed, seed=3).value)


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
    assert "shape (3, 2)" in refused(lambda: diversity(texts, np.ones((3, 2))))
    assert "number 2 is zero or not finite" in refused(lambda: diversity(texts, np.array([[1.0, 0], [0, 0]])))
    assert "number 1 is zero or not finite" in refused(
        lambda: diversity(texts, np.array([[np.nan, 0], [0, 1]]))
    )
    assert "n_clusters" in refused(lambda: diversity(texts, np.eye(2), clusters=0))
    assert "no set" in refused(lambda: diversity_table({}, embed))
    assert "draws" in refused(lambda: diversity_table(SETS, embed, draws=0))


# ---- equal footing


def test_budget_is_the_smallest_sets_and_equal_for_all():
    tokens = {name: token_counts(some) for name, some in SETS.items()}
    kept, report = cut_to_budget(tokens, seed=5)
    smallest = min(int(t.sum()) for t in tokens.values())
    assert set(report.budget) == {smallest} and report.kept_tokens.max() == smallest
    for row in report.itertuples():
        assert (
            tokens[row.set][kept[row.set]].sum() == row.kept_tokens
            and len(set(kept[row.set])) == row.kept_texts <= row.texts
        )
        assert row.kept_tokens == row.tokens or smallest - row.kept_tokens < tokens[row.set].max(), (
            "no text is left out that fits"
        )
    assert all(np.array_equal(kept[name], cut_to_budget(tokens, seed=5)[0][name]) for name in kept)
    assert not np.array_equal(kept["long"], cut_to_budget(tokens, seed=6)[0]["long"])


def test_budget_too_small_for_two_texts(refused):
    assert "long" in refused(lambda: cut_to_budget({"long": np.array([50, 60]), "short": np.array([20, 20])}))
    kept, report = cut_to_budget({"mixed": np.array([500, 20, 20, 500])}, budget=40)
    assert kept["mixed"].tolist() == [1, 2] and report.kept_tokens.tolist() == [40], (
        "a text that can never fit does not stop the others"
    )


def test_table_has_a_row_per_set_and_metric_and_says_what_was_used():
    table = diversity_table(SETS, embed, fires, TARGETS, draws=4)
    assert (
        len(table) == len(SETS) * (len(METRICS) + 1)
        and not table.isna().any().any()
        and set(table.draws) == {4}
    )
    wide = table.pivot(index="metric", columns="set", values="value")
    fac, of_all = wide.loc["Ours (FAC)"], table[table.metric == "Ours (FAC), all texts"].set_index("set")
    assert of_all.value.to_dict() == {
        "narrow": 0.125,
        "broad": 1.0,
        "long": 1.0,
    } and of_all.n_texts.to_dict() == {name: len(some) for name, some in SETS.items()}
    table = table[table.metric.isin(METRICS)]
    assert fac["narrow"] == 0.125 and fac["broad"] == 1.0 and 0.125 < fac["long"] < 1, (
        "on the cut texts: all texts of `long` would cover everything"
    )
    assert (
        wide.loc["Semantic entropy", "narrow"] < wide.loc["Semantic entropy", "broad"]
        and wide.loc["Self-BLEU", "narrow"] > wide.loc["Self-BLEU", "broad"]
    )
    smallest = table.n_tokens.max()
    whole = table[table.n_texts == table.set.map({name: len(some) for name, some in SETS.items()})]
    assert set(whole.set) == {"broad"} and (whole.sd < 1e-12).all() and (table.n_tokens > smallest - 20).all()
    syntax = table[table.tagger != ""]
    assert set(syntax.metric) == {"POS tag Distinct-2", "Dependency relation entropy"} and set(
        syntax.tagger
    ) == {"word lists and endings"}
    assert set(table.label[table.metric == "Dependency relation entropy"]) == {
        "Dependency relation entropy (fallback: neighbouring tags)"
    }
    assert set(table.parser) == {"", "fallback: neighbouring tags"}


def test_each_text_is_read_once():
    asked = []

    def counting(texts):
        asked.append(list(texts))
        return embed(texts)

    diversity_table({"a": SETS["broad"], "b": SETS["broad"] + SETS["narrow"]}, counting, draws=2)
    assert len(asked) == 1 and sorted(asked[0]) == sorted(set(SETS["broad"] + SETS["narrow"]))
