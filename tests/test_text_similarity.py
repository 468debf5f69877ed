"ROUGE-L against the textbook; words of content told from words of form."

import numpy as np
from baseline_writers import WORDS

from fac_synthesis.synthesis.text_similarity import BLOCK, Block, Novelty, Vocabulary, plain, word_list


def textbook(a, b):
    "ROUGE-L F by the table of the longest common subsequence."
    a, b = word_list(a), word_list(b)
    row = [0] * (len(b) + 1)
    for x in a:
        last, row = row, [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(row[-1], last[j + 1]))
    return 2 * row[-1] / max(len(a) + len(b), 1)


def test_rouge_l_is_the_textbooks():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(0, 30, 300)]
    texts += ["", "?!", "x" * 9, " ".join("abc" * 90), "Über DEN Wolken, 茶 茶", "über den wolken 茶"]
    there = Novelty(texts)
    assert len(there.blocks) == 2 and len(there.blocks[0].lengths) == BLOCK
    for text in [*texts[:4], *texts[-6:]]:
        assert np.allclose(there.similarities(text), [textbook(text, t) for t in texts])
    assert Novelty().closest("a") == (0.0, "") and there.closest("Über den Wolken 茶 茶")[0] == 1.0


def test_a_block_of_texts_without_words():
    block = Block()
    for words in ([], ["a"], []):
        block.add(words)
    assert block.common(["a", "a"]).tolist() == [0, 1, 0] and block.common([]).tolist() == [0, 0, 0]


def test_plain_text():
    assert plain("A lock, and a WALL!") == "a lock and a wall" and plain("…") == "…" and plain("") == ""


def test_content_words_are_told_by_frequency():
    words = Vocabulary([f"the {w} is here" for w in WORDS], common=0.1)
    assert words.content("The badan is HERE , badan") == ["badan"]
    assert words.content("the is") == ["the", "is"] and words.content("…") == ["…"]
    rng = np.random.default_rng(0)
    for _ in range(2):
        picked = words.pick(rng, ["the badan", "the defer and kukin"], 3)
        assert len(set(picked)) == 3
    assert "badan" not in words.rare(rng, 200, avoid=["badan"]) and len(set(words.rare(rng, 50))) == 50
    assert Vocabulary([]).rare(rng, 2) == []


def test_rare_words_are_drawn_more_often():
    words = Vocabulary(["often x"] * 30 + ["seldom y"] + ["z"] * 900, common=0.5)

    def share_of_seldom(**more):
        rngs = [np.random.default_rng(i) for i in range(200)]
        drawn = [words.rare(rng, 1, avoid=["x", "y", "z"], **more)[0] for rng in rngs]
        return drawn.count("seldom")

    assert share_of_seldom() > 150 and 60 < share_of_seldom(power=0.0) < 140
