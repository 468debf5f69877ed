"Explanations: statistics by hand, planted peak words found again, and a judge that follows a script."

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.features.interpretation import (
    COLUMNS,
    enriched,
    llm_features,
    peak_terms,
    statistical_features,
    word_at,
    words_of,
)
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer


def test_enriched_by_hand():
    # spray: c 6 of n 10, b 20 of m 100, prior 10 -> a = 2
    z = (np.log((6 + 2) / (10 + 10 - 6 - 2)) - np.log(20 / 80)) / np.sqrt(1 / (6 + 2) + 1 / 20)
    found = enriched(Counter(spray=6, the=4), Counter(spray=20, the=80), prior=10.0, at_least=0.0)
    assert found == [("spray", pytest.approx(z))] and z == pytest.approx(2.3446, abs=1e-3)
    assert enriched(Counter(spray=6, the=4), Counter(spray=20, the=80), at_least=2.4) == []


def test_one_accidental_peak_explains_nothing():
    background = Counter(the=500, lock=20, spray=2, wall=400)
    terms = [t for t, _ in enriched(Counter(lock=8, spray=1, the=5), background)]
    assert terms[0] == "lock" and "the" not in terms


def test_ties_are_in_alphabetical_order():
    assert [t for t, _ in enriched(Counter(b=5, a=5), Counter(a=10, b=10, rest=900))] == ["a", "b"]


def test_words_and_the_words_at_tokens():
    text = "Don't spray-paint the café's wall, señor x!"
    words = words_of(text)
    assert [word.word for word in words] == "don't spray-paint the café's wall señor x".split()
    assert all(text[start:end].lower() == word for word, start, end in words)
    paint, comma = text.index("paint"), text.index(",")
    assert word_at(words, (paint, paint + 2)) == 1
    assert word_at(words, (comma, comma + 1)) is None
    assert peak_terms(words, 0, 2) == ["don't"] and peak_terms(words, 2, 0) == ["the"]
    assert peak_terms(words, None, 2) == []


TARGETS = ("spray", "lock", ".")
CORPUS = [
    f"{start} the {w} near the {other} ."
    for w in ("spray", "lock", "flour")
    for other in ("wall", "door")
    for start in ("first", "take", "see")
] * 2


@pytest.fixture(scope="module")
def planted():
    "Latent j fires at word TARGETS[j] and nowhere else; latent 3 never."
    tokens = [text.split() for text in CORPUS]
    place = np.array([[t.index(w) + 1 if w in t else 0 for w in TARGETS] + [0] for t in tokens])
    value = (place > 0) * np.linspace(1, 2, len(CORPUS))[:, None]
    g = sparse.csr_matrix(value.astype(np.float32))
    tokenizer = word_tokenizer(CORPUS)
    backbone = Backbone(tiny_model("llama", len(tokenizer), 16, 2), tokenizer, 1)
    return backbone, FeatureActivations(g, sparse.csr_matrix(place))


def test_the_statistical_annotator_finds_the_planted_words(planted):
    table = statistical_features(planted[0], CORPUS, planted[1], n_spans=4, before=2, after=1, n_keywords=3)
    assert table.columns.tolist() == COLUMNS
    assert table.latent.tolist() == [0, 1, 2], "a latent that never fires is no feature"
    for i in (0, 1):
        assert table.keywords[i][0] == TARGETS[i]
        assert TARGETS[i] in table.explanation[i] and "flour" not in table.explanation[i]
        assert len(table.spans[i]) == 4 and all(f"[{TARGETS[i]}]" in s for s in table.spans[i])
        assert table.scores[i] == sorted(table.scores[i], reverse=True) and table.n_texts[i] == 12
    assert all(" " not in k for ks in table.keywords for k in ks)
    assert table.explanation[2] == "", "punctuation explains nothing"


def test_context_0_counts_the_peak_word_only(planted):
    table = statistical_features(planted[0], CORPUS, planted[1], n_spans=4, context=0)
    assert table.explanation[0] == "spray"


TABLE = pd.DataFrame(
    dict(
        latent=[4, 5, 6, 7],
        explanation="",
        keywords=[[]] * 4,
        spans=[["the [spray] {x}"], ["the [lock]"], ["of"], ["a [wall]"]],
        scores=[[1.0]] * 4,
        n_texts=3,
        verified="",
        annotator="statistical",
    )
)


def test_the_llm_annotator(scripted):
    said = {"spray": "  About\nspray cans. ", "lock": "Cannot tell.", "wall": "Walls."}

    def reply(prompt, j):
        if prompt.startswith("Somebody claims"):
            return "Probably" if "spray" in prompt else None
        return next((said[word] for word in said if word in prompt), None)

    lm = scripted(reply)
    judged = llm_features(TABLE, lm)
    assert judged.explanation.tolist() == ["About spray cans.", "", "", "Walls."]
    assert judged.verified.tolist() == ["Probably", "", "", ""], "no answer is no verdict"
    assert len(lm.asked) == 4 + 2, "what has no explanation is not judged"
    assert "the [spray] {x}" in lm.asked[0] and "About spray cans." in lm.asked[4]
    assert set(judged.annotator) == {"scripted"} and TABLE.explanation.tolist() == [""] * 4


def test_a_judge_that_never_answers(scripted):
    judged = llm_features(TABLE, scripted(lambda prompt, j: None))
    assert (judged.explanation == "").all() and (judged.verified == "").all() and len(judged) == 4
