"Prismatic Synthesis and SynAlign: gradients against autograd, choices and weights against the long way."

import numpy as np
import pytest
import torch
from baseline_writers import BACKGROUND, JUDGING, SEEDS, TASK, WORDS, Fixed, Writer, notes

from fac_synthesis.models.backbone import Backbone, pad, tiny_model, tokenize, word_tokenizer
from fac_synthesis.models.language_models import derived_seed
from fac_synthesis.synthesis import guided_baselines
from fac_synthesis.synthesis.baseline_rounds import Job
from fac_synthesis.synthesis.guided_baselines import (
    GradientSpace,
    attributes_of,
    batch_gradients,
    demonstrations,
    embed,
    gradient_projections,
    median_length,
    mmd_weights,
    prismatic_synthesis,
    rbf,
    sparse_clusters,
    synalign,
    text_gradients,
    user_loss,
)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    words = word_tokenizer(BACKGROUND + SEEDS)
    return Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1, max_length=64)


def job_of(lm, budget=20, batch=16):
    "A job on the small seed set."
    return Job(TASK, SEEDS, lm, budget, background=BACKGROUND, batch=batch)


def numbered(odd, even):
    "A hundred different texts, every other one with a word of its own kind."
    return [f"{' '.join(WORDS[i : i + 5])} {odd if i % 2 else even}" for i in range(100)]


# ---- Prismatic Synthesis


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_projected_gradients_are_those_of_autograd(kind, backbone):
    torch.manual_seed(1)
    model = tiny_model(kind, len(backbone.tokenizer), 32, 2)
    b = Backbone(model, backbone.tokenizer, layer=1, max_length=64)
    projected, tokens = gradient_projections(b, 100, 0), tokenize(b.tokenizer, SEEDS[:3], 64)
    found = batch_gradients(b, *pad(tokens, 0, "cpu"), projected)
    for row, t in zip(found, tokens):
        b.model.zero_grad()
        user_loss(b, *pad([t], 0, "cpu")).backward()
        expected = torch.cat([(P.T @ m.weight.grad.T @ Q).flatten() for m, P, Q in projected])
        assert torch.allclose(row, expected, atol=1e-3 * expected.abs().max())


def test_the_loss_is_that_of_the_users_tokens(backbone):
    inputs, keep_BT = pad(tokenize(backbone.tokenizer, SEEDS[:2], 64), 0, "cpu")
    logits = backbone.model(**inputs).logits[:, :-1][keep_BT[:, 1:]]
    targets = inputs["input_ids"][:, 1:][keep_BT[:, 1:]]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert torch.isclose(user_loss(backbone, inputs, keep_BT), expected)


def test_gradients_do_not_need_trainable_weights_and_leave_nothing_behind(backbone):
    before = text_gradients(backbone, SEEDS, 100)
    for p in backbone.model.parameters():
        p.requires_grad_(False)
    try:
        frozen = text_gradients(backbone, SEEDS, 100, batch_tokens=10)
    finally:
        for p in backbone.model.parameters():
            p.requires_grad_(True)
    assert np.allclose(before, frozen, atol=1e-4) and np.allclose(np.linalg.norm(before, axis=1), 1)
    assert all(p.grad is None for p in backbone.model.parameters())
    assert not any(m._forward_hooks for m in backbone.model.modules())


def test_each_text_is_read_once(backbone, monkeypatch):
    asked = []

    def counting(backbone, texts, *rest):
        asked.extend(texts)
        return text_gradients(backbone, texts, *rest)

    monkeypatch.setattr(guided_baselines, "text_gradients", counting)
    space = GradientSpace(backbone, 64, 0)
    first = space(SEEDS[:3] * 2)
    assert np.array_equal(first[:3], first[3:]) and np.array_equal(space(SEEDS[1:4])[0], first[1])
    assert asked == SEEDS[:4]


def test_a_model_without_linear_layers_is_refused(backbone, monkeypatch, refused):
    monkeypatch.setattr(guided_baselines, "decoder_layers", lambda model: [torch.nn.LayerNorm(3)])
    assert "no linear layers" in refused(lambda: gradient_projections(backbone, 100, 0))


def test_prismatic_refuses_the_crowded_cluster_and_keeps_the_sparse_one(backbone, monkeypatch):
    def crowd(text):
        return [1.0, 0.0] if text in SEEDS[:10] or "crowded" in text else [0.0, 1.0]

    def gradients(backbone, texts, *rest):
        return np.array([crowd(text) for text in texts], dtype=np.float32)

    monkeypatch.setattr(guided_baselines, "text_gradients", gradients)
    count = iter(numbered(odd="crowded", even="sparse"))
    made = prismatic_synthesis(job_of(Fixed(lambda prompt, j: next(count)), budget=4), backbone)
    assert made.samples.text.str.contains("sparse").all() and made.discarded["crowded cluster"] > 0
    assert sparse_clusters(np.array([9, 1, 3])).tolist() == [False, True, True]
    assert sparse_clusters(np.array([4, 4])).all()


def test_prismatics_pool_grows(backbone):
    made = prismatic_synthesis(job_of(Writer(), budget=60, batch=8), backbone, dims=64)
    assert any(set(row["parents"]) & set(made.samples.text) for row in notes(made)), (
        "kept texts serve as examples"
    )


@pytest.mark.parametrize("method", [prismatic_synthesis, synalign])
def test_methods_that_read_a_model_say_so(method, refused):
    assert "backbone" in refused(lambda: method(job_of(Writer()), backbone=None))


# ---- SynAlign


def posterior_variance(k, chosen):
    "The Gaussian process from nothing."
    inverse = np.linalg.inv(k[np.ix_(chosen, chosen)] + 1e-2 * np.eye(len(chosen)))
    return 1 - np.einsum("in,nm,im->i", k[:, chosen], inverse, k[:, chosen])


def test_the_most_uncertain_text_comes_next():
    z = np.random.default_rng(0).normal(size=(30, 3))
    length = median_length(z)
    groups = demonstrations(z, 2, np.random.default_rng(1), length)
    chosen, k = list(next(groups)), rbf(z, z, length)
    for _ in range(5):
        expected = posterior_variance(k, chosen).argmax()
        group = next(groups)
        assert group[0] == expected and group[1] == np.argsort(-k[group[0]])[1]
        chosen += group


def test_all_texts_get_their_turn_and_it_never_ends():
    z = np.random.default_rng(0).normal(size=(20, 8))
    groups = demonstrations(z, 3, np.random.default_rng(0), median_length(z))
    shown = [next(groups) for _ in range(60)]
    assert {i for g in shown for i in g} == set(range(20)) and all(len(set(g)) == 3 for g in shown)
    same = np.ones((2, 3))
    group = next(demonstrations(same, 4, np.random.default_rng(0), median_length(same)))
    assert group in ([0, 1], [1, 0])


def test_the_median_heuristic_makes_neighbours_and_a_tenth_makes_none():
    z = np.random.default_rng(0).normal(size=(200, 768))
    off = ~np.eye(200, dtype=bool)
    assert rbf(z, z, 0.1)[off].max() < 1e-30 and 0.5 < np.median(rbf(z, z, median_length(z))[off]) < 0.7


def test_mmd_weights_move_the_sample_to_the_real_texts():
    rng = np.random.default_rng(0)
    real, near, far = rng.normal(size=(40, 2)), rng.normal(size=(20, 2)), rng.normal(size=(60, 2)) + 6
    w = mmd_weights(np.concatenate([near, far]), real, median_length(real))
    assert np.isclose(w.sum(), 1) and (w > 0).all() and w[:20].sum() > 0.95


def test_synalign_resamples_towards_the_seed_set(backbone, monkeypatch):
    def place(text):
        return [5.0, 5.0] if "far" in text else [derived_seed(text) % 1000 / 1000, 0.0]

    monkeypatch.setattr(
        guided_baselines, "embed", lambda backbone, texts: np.array([place(text) for text in texts])
    )
    count = iter(numbered(odd="far", even="near"))
    lm = Fixed(lambda p, j: JUDGING["JSON object"] if "JSON object" in p else next(count))
    made = synalign(job_of(lm, budget=10), backbone)
    assert made.samples.text.str.contains("near").mean() > 0.8 and made.discarded["not resampled"] == 10
    for row in notes(made):
        assert row["attributes"] == "subject: locks; style: short" and len(row["parents"]) == 4
    writing = [p for p in lm.asked if "JSON object" not in p]
    assert writing and not any(seed in p for p in writing for seed in SEEDS), (
        "the second stage sees attributes only"
    )


@pytest.mark.parametrize(
    "reply, attributes",
    [
        (None, ""),
        (" ", ""),
        ('{"a": 1, "b": ["x"]}', "a: 1; b: ['x']"),
        ("Here: {not json}", "Here: {not json}"),
        ("short and angry", "short and angry"),
        ('{"a": ' * 3000, "{" + '"a": ' + '{"a": ' * 39 + "..."),
    ],
)
def test_attributes_of_any_reply(reply, attributes):
    assert attributes_of(reply)[:40] == attributes[:40]


def test_embeddings_are_means_of_residuals(backbone):
    z = embed(backbone, SEEDS)
    batch = next(backbone.residuals(SEEDS[:1]))
    mean = batch.x_ND.mean(0).numpy()
    assert np.allclose(z[0], mean / np.linalg.norm(mean), atol=1e-5)
    assert np.allclose(np.linalg.norm(z, axis=1), 1)
