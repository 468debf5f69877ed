"""Training and scoring of the toxicity classifiers, on a two-layer model and a few dozen sentences."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from fac_synthesis.data.corpora import Corpora
from fac_synthesis.data.records import Record, open_dataset
from fac_synthesis.models.backbone import Backbone, pad, padding_id, tiny_model, tokenize, word_tokenizer
from fac_synthesis.run.parameters import UserError
from fac_synthesis.synthesis.covered_samples import GENERATED, chosen_samples, sample_budget
from fac_synthesis.synthesis.fine_tuning import (
    HeadSettings,
    LoRASettings,
    States,
    classifier,
    fit_head,
    fresh_head,
    pooled_states,
    probabilities,
    projections,
    train_head,
    train_lora,
    with_lora,
)
from fac_synthesis.tasks.toxicity import (
    Bench,
    TrainingSet,
    auprc,
    data_efficiency,
    drawn_rows,
    floor_table,
    score_cell,
    score_sets,
    sets_by_delta,
    sets_by_samples,
    summary,
    tfidf_floor,
    training_set,
)
from sklearn.metrics import average_precision_score

from fac_synthesis import toxicity_detection as module

torch.set_num_threads(1)
MEAN, KIND = "dagger poison swindle stalk".split(), "bread garden piano stamp".split()
FAST = LoRASettings(learning_rate=1e-2, epochs=4, micro_batch=16, dtype="float32")


def records(words, label):
    return [
        Record(f"tell me about the {w} and the {v} .", label)
        for w in words
        for v in words + ["lamp", "door", "cup"]
    ]


@pytest.fixture(scope="module")
def corpora():
    test = [
        Record(
            f"what is a {w} for the {v} , please ?" if v == "box" else f"what is a {w} for the {v} ?",
            int(w in MEAN),
        )
        for w in MEAN + KIND
        for v in ("lamp", "door", "box")
    ]
    return Corpora(
        {
            "seed": records(MEAN[:1], 1) + records(KIND, 0),
            "full": records(MEAN, 1) + records(KIND, 0),
            "test": test,
        }
    )


@pytest.fixture(scope="module")
def samples():
    return pd.DataFrame(
        [
            dict(method=m, latent=i, text=f"{m} : the {w} , number {r} .", label=1, score=1.0, rank=r)
            for m, found in (("two-step", 3), ("one-step", 2), ("random", 3))
            for i, w in enumerate(MEAN[1 : 1 + found])
            for r in range(3)
        ]
    )


def make_backbone(corpora, samples, kind="llama"):
    texts = corpora.texts("full") + corpora.texts("test") + samples.text.tolist()
    words = word_tokenizer(texts)
    torch.manual_seed(0)
    return Backbone(tiny_model(kind, len(words), 32, 2), words, layer=1)


@pytest.fixture(scope="module")
def backbone(corpora, samples):
    return make_backbone(corpora, samples)


@pytest.fixture(scope="module")
def full(corpora, samples):
    return training_set("Full Dataset", corpora, samples, 0)


@pytest.fixture(scope="module")
def bench(backbone, corpora, samples):
    texts = list(dict.fromkeys(corpora.texts("full") + samples.text.tolist() + corpora.texts("test")))
    return Bench(
        backbone,
        States(texts, pooled_states(backbone, texts, "mean")),
        corpora.texts("test"),
        corpora.labels("test"),
        FAST,
        HeadSettings(1e-2, 5),
    )


# ---- the data of a row


@pytest.mark.parametrize(
    "labels, said",
    [
        ([1, 1], "all 2 training rows are toxic"),
        ([0, 0], "are safe"),
        ([0, 2], "label 2 is not 0 or 1"),
        ([0, float("nan")], "is not 0 or 1"),
        ([0, "1"], "is not 0 or 1"),
        ([0, 1, 1], "2 texts but 3 labels"),
    ],
)
def test_unusable_labels_are_refused_by_name(labels, said):
    with pytest.raises(UserError, match=said) as e:
        TrainingSet("Ours", ["a", "b"], labels)
    assert str(e.value).startswith("Ours: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_all_generated_rows_share_budget_and_safe_rows(corpora, samples, k):
    n = sample_budget(samples, k)
    sets = [training_set(m, corpora, samples, n) for m in GENERATED if m != "Ours, one-step" or n <= 6]
    assert n == 3 * k and {s.n_toxic for s in sets} == {int(corpora.labels("seed").sum()) + n}
    safe = lambda s: [t for t, label in zip(s.texts, s.labels) if label == 0]
    assert all(safe(s) == [r.text for r in corpora["seed"] if r.label == 0] for s in sets)
    baseline = training_set("Baseline", corpora, samples, n)
    assert baseline.texts == corpora.texts("seed") and all(
        s.texts[: len(baseline.texts)] == baseline.texts for s in sets
    )


def test_best_samples_of_every_feature_come_first(samples):
    shuffled = samples.sample(frac=1, random_state=3)
    picked = chosen_samples(shuffled, "Ours", 5)
    assert picked["rank"].tolist() == [0, 0, 0, 1, 1] and picked.latent.tolist() == [0, 1, 2, 0, 1]
    assert set(chosen_samples(shuffled, "random", 2).method) == {"random"}, (
        "a name of the samples' own works as well"
    )
    with pytest.raises(UserError, match="no samples of 'magpie'.*one-step, random, two-step"):
        chosen_samples(samples, "magpie", 2)


# ---- the classifier


def test_padding_never_ends_a_text(backbone, corpora, samples):
    assert padding_id(backbone.tokenizer) == 0
    other = make_backbone(corpora, samples).tokenizer
    other.pad_token = other.eos_token  # as many published tokenizers do; <end> closes the user's turn
    assert padding_id(other) == other.bos_token_id
    other.pad_token = other.bos_token = other.unk_token = None
    with pytest.raises(UserError, match="no token to pad with"):
        padding_id(other)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_classifier_starts_from_the_backbone(corpora, samples, kind):
    b = make_backbone(corpora, samples, kind)
    model = classifier(b, 42)
    ours, theirs = dict(model.base_model.named_parameters()), dict(b.model.base_model.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(model.score.weight, fresh_head(b, 42).weight) and not torch.equal(
        model.score.weight, fresh_head(b, 43).weight
    )
    assert projections(model) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    texts = corpora.texts("test")
    logits_NC = pooled_states(b, texts) @ model.score.weight.T.detach()
    assert np.allclose(logits_NC.softmax(-1)[:, 1].numpy(), probabilities(model, b, texts), atol=1e-5)


def test_a_model_without_sequence_head_is_refused(backbone, monkeypatch):
    def unknown(config):
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(module.AutoModelForSequenceClassification, "from_config", unknown)
    with pytest.raises(UserError, match="llama has no sequence classifier"):
        classifier(backbone, 0)


def test_reading_is_independent_of_batches_and_single_bos(backbone, corpora):
    model, texts = classifier(backbone, 42), corpora.texts("test")
    many, few = (probabilities(model, backbone, texts, batch_tokens=n) for n in (8192, 20))
    assert np.allclose(many, few, atol=1e-6)
    ids = tokenize(backbone.tokenizer, texts[:1], 256)[0].ids
    assert ids.count(backbone.tokenizer.bos_token_id) == 1 and ids[0] == backbone.tokenizer.bos_token_id
    assert (
        len(tokenize(backbone.tokenizer, texts[:1], 5)[0].ids) == 5
        and np.isfinite(probabilities(model, backbone, texts, max_length=5)).all()
    )


def test_mean_pooling_is_over_the_users_tokens(backbone):
    text = "tell me about the bread"
    t = tokenize(backbone.tokenizer, [text], 256)[0]
    with torch.no_grad():
        x_TD = backbone.model.base_model(torch.tensor([t.ids])).last_hidden_state[0]
    assert torch.allclose(
        pooled_states(backbone, [text, text + " and the garden ."], "mean")[0],
        x_TD[t.first : t.last].mean(0),
        atol=1e-6,
    )
    with pytest.raises(UserError, match="pooling 'max'"):
        pooled_states(backbone, [text], "max")


# ---- training


def test_lora_trains_adapters_and_head_only(backbone, corpora, samples, full):
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    start = {n: p.clone() for n, p in with_lora(classifier(backbone, 42), FAST, 42).named_parameters()}
    model = train_lora(backbone, full, FAST, 42)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == trainable and all("lora_" in n or "score.modules_to_save" in n for n in trainable)
    assert sum("lora_A" in n for n in trainable) == 7 * 2, "seven projections in each of two layers"
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters()), (
        "the backbone itself is not touched"
    )
    assert auprc(corpora.labels("test"), probabilities(model, backbone, corpora.texts("test"))) > 0.9


def test_lora_is_deterministic_and_depends_on_the_seed(bench, full):
    a, b, c = (module.lora_cell(bench, full, s) for s in (42, 42, 43))
    assert a.tobytes() == b.tobytes() != c.tobytes()


def test_accumulation_and_checkpointing_change_cost_only_grouping_the_order(backbone, full, corpora):
    texts = corpora.texts("test")
    plain = dict(learning_rate=1e-3, epochs=1, dropout=0.0, dtype="float32")
    p = [
        probabilities(train_lora(backbone, full, LoRASettings(**plain, **more), 42), backbone, texts)
        for more in (
            dict(micro_batch=16),
            dict(micro_batch=4),
            dict(micro_batch=4, gradient_checkpointing=True),
        )
    ]
    grouped = probabilities(
        train_lora(backbone, full, LoRASettings(**plain, micro_batch=16, group_by_length=True), 42),
        backbone,
        texts,
    )
    assert (
        np.allclose(p[0], p[1], atol=1e-4)
        and np.allclose(p[1], p[2], atol=1e-5)
        and not np.allclose(grouped, p[0], atol=1e-4)
    )
    with pytest.raises(UserError, match="lora_batch 16 is no multiple of micro_batch 5"):
        train_lora(backbone, full, LoRASettings(micro_batch=5), 42)


def test_half_precision_body_with_float32_head(backbone, full, corpora):
    model = train_lora(
        backbone, full, LoRASettings(learning_rate=1e-3, epochs=1, micro_batch=16), 42
    )  # the defaults: bfloat16
    kinds = {(p.requires_grad, p.dtype) for n, p in model.named_parameters() if "score" not in n} | {
        ("head", model.score.weight.dtype)
    }
    assert kinds == {(False, torch.bfloat16), (True, torch.float32), ("head", torch.float32)}
    assert np.isfinite(probabilities(model, backbone, corpora.texts("test"))).all()


def test_head_on_kept_states_equals_frozen_model(backbone, full):
    settings, labels_N = HeadSettings(1e-2, 3, 4), torch.tensor(full.labels)
    kept = train_head(
        fresh_head(backbone, 42), pooled_states(backbone, full.texts), full.labels, settings, 42
    )
    model, tokens = classifier(backbone, 42), tokenize(backbone.tokenizer, full.texts, 256)
    for p in model.base_model.parameters():
        p.requires_grad_(False)
    fit_head(
        model.score,
        lambda rows: model(**pad([tokens[i] for i in rows.tolist()], 0, "cpu")[0]).logits,
        labels_N,
        settings,
        42,
    )
    assert torch.allclose(kept.weight, model.score.weight, atol=1e-5) and not torch.allclose(
        kept.weight, fresh_head(backbone, 42).weight, atol=1e-2
    )


def test_head_is_deterministic_and_leaves_its_start_alone(bench, full, backbone):
    head = fresh_head(backbone, 42)
    train_head(head, bench.states(full.texts), full.labels, bench.head, 42)
    assert torch.equal(head.weight, fresh_head(backbone, 42).weight)
    a, b, c = (module.head_cell(bench, full, s) for s in (42, 42, 43))
    assert a.tobytes() == b.tobytes() != c.tobytes()


# ---- scoring


def test_auprc_is_sklearns_and_needs_two_classes():
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 2, 200), rng.random(200)
    assert auprc(labels, p) == average_precision_score(labels, p)
    with pytest.raises(UserError, match="all 3 test rows have one label"):
        auprc([1, 1, 1], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("training", ["LoRA", "head only"])
def test_a_cell_and_the_table(bench, full, corpora, training):
    cell = score_cell(bench, full, training, 42)
    assert (
        cell | dict(auprc=0)
        == dict(
            method="Full Dataset",
            training=training,
            seed=42,
            auprc=0,
            n_toxic=full.n_toxic,
            n_safe=full.n_safe,
        )
        and 0.9 < cell["auprc"] <= 1
    )
    with pytest.raises(UserError, match="training 'all' is unknown"):
        score_cell(bench, full, "all", 42)


def test_summary_uses_sample_sd_and_keeps_order():
    scores = pd.DataFrame(
        dict(
            method=["b", "b", "a"],
            training="LoRA",
            seed=[1, 2, 1],
            auprc=[0.2, 0.4, 0.5],
            n_toxic=3,
            n_safe=4,
        )
    )
    table = summary(scores)
    assert table.method.tolist() == ["b", "a"] and table.seeds.tolist() == [2, 1]
    assert table.auprc_mean.tolist() == pytest.approx([30, 50]) and table.auprc_sd[0] == pytest.approx(
        np.std([20, 40], ddof=1)
    )


def test_data_efficiency_is_figure_7():
    assert [
        round(data_efficiency(a, n), 2)
        for a, n in ((49.12, 200), (49.16, 400), (49.41, 600), (49.75, 800), (49.91, 1000))
    ] == [21.35, 18.89, 17.79, 17.14, 16.64]
    assert np.isnan(data_efficiency(50, 1)) and np.isnan(data_efficiency(50, 0))


def test_by_delta_and_by_samples(bench, corpora, samples):
    by_delta = score_sets(
        bench, sets_by_delta(corpora, samples, {0.0: [0, 1, 2], 1.0: [1], 9.0: []}), [42, 43]
    )
    assert (
        by_delta.n_samples.tolist() == [3, 3, 1, 1, 0, 0]
        and by_delta.missing.tolist() == [3, 3, 1, 1, 0, 0]
        and by_delta.auprc.between(0, 1).all()
    )
    by_samples = score_sets(bench, sets_by_samples(corpora, samples, 2), [42])
    assert by_samples.n_samples.tolist() == [3, 6] and by_samples.des.tolist() == pytest.approx(
        [100 * a / np.log10(n) for a, n in zip(by_samples.auprc, (3, 6))]
    )
    assert by_delta[by_delta.delta == 0].auprc[0] == by_samples.auprc[0], "the same rows, the same score"


# ---- the floor


def test_floor_on_a_small_set(corpora, samples, full):
    table = floor_table(
        [
            training_set("Baseline", corpora, samples, 0),
            full,
            *(drawn_rows(corpora, "full", 20, 20, s) for s in range(3)),
        ],
        corpora.texts("test"),
        corpora.labels("test"),
    )
    assert (
        table.rows.tolist() == ["Baseline", "Full Dataset", "full, 20 + 20"]
        and table.draws.tolist() == [1, 1, 3]
        and (table.base_rate == 0.5).all()
    )
    assert table.auprc[1] > table.auprc[0]
    with pytest.raises(UserError, match="TF-IDF floor cannot be fitted"):
        tfidf_floor(TrainingSet("Ours", ["a", "b"], [0, 1]), ["a"], [1])
    with pytest.raises(UserError, match="rows with label 1 of full"):
        drawn_rows(corpora, "full", 1, 999, 0)


@pytest.mark.skipif(
    not os.environ.get("FAC_DATA_DIR"),
    reason="FAC_DATA_DIR is not set: the published ToxicChat files are needed",
)
def test_floor_on_toxicchat_is_the_measured_one():
    train, test = (open_dataset("toxic-chat", split=s) for s in ("train", "test"))
    known = {r.text for r in train}
    test = [r for r in test if r.text not in known]
    corpora = Corpora({"toxicchat_train": train, "test": test})
    texts, labels = corpora.texts("test"), corpora.labels("test")
    assert len(train) == 2801 and len(test) == 2768
    whole = TrainingSet("all", corpora.texts("toxicchat_train"), corpora.labels("toxicchat_train"))
    assert tfidf_floor(whole, texts, labels) == pytest.approx(0.750, abs=0.01)
    assert np.mean(
        [tfidf_floor(drawn_rows(corpora, "toxicchat_train", 1000, 200, s), texts, labels) for s in range(2)]
    ) == pytest.approx(0.695, abs=0.01)
