"""Training sets, cells, floor and curves of toxicity detection, on a tiny model and a few dozen sentences."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score

from fac_synthesis.data.corpora import Corpora
from fac_synthesis.data.records import Record, open_dataset
from fac_synthesis.data.sources import open_task
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.run.artifacts import remember_digest
from fac_synthesis.run.parameters import UserError
from fac_synthesis.run.stages import Run
from fac_synthesis.synthesis.covered_samples import GENERATED, chosen_samples, sample_budget
from fac_synthesis.synthesis.fine_tuning import (
    HeadOnly,
    HeadSettings,
    LoRA,
    LoRASettings,
    States,
    chosen_trainings,
    grid,
    open_head_only,
    percent,
    pooled_states,
    summary,
    train_cells,
)
from fac_synthesis.tasks.toxicity import (
    SUMMARY,
    TrainingSet,
    auprc,
    data_efficiency,
    drawn_rows,
    floor_table,
    head_only_probabilities,
    lora_probabilities,
    read_toxicity_scores,
    read_toxicity_settings,
    score_sets,
    sets_by_delta,
    sets_by_samples,
    texts_to_read,
    tfidf_floor,
    toxicity_bench,
    toxicity_cell,
    training_set,
)

torch.set_num_threads(1)
MEAN, KIND = "dagger poison swindle stalk".split(), "bread garden piano stamp".split()
FAST = LoRA(LoRASettings(learning_rate=1e-2, epochs=4, micro_batch=16, dtype="float32"))


def records(words, label):
    others = [*words, "lamp", "door", "cup"]
    return [Record(f"tell me about the {w} and the {other} .", label) for w in words for other in others]


@pytest.fixture(scope="module")
def corpora():
    test = []
    for w in MEAN + KIND:
        for thing in ("lamp", "door", "box"):
            end = " , please ?" if thing == "box" else " ?"
            test.append(Record(f"what is a {w} for the {thing}{end}", int(w in MEAN)))
    seed = records(MEAN[:1], 1) + records(KIND, 0)
    return Corpora({"seed": seed, "full": records(MEAN, 1) + records(KIND, 0), "test": test})


@pytest.fixture(scope="module")
def samples():
    rows = []
    for m, found in (("two-step", 3), ("one-step", 2), ("random", 3)):
        for i, w in enumerate(MEAN[1 : 1 + found]):
            for r in range(3):
                text = f"{m} : the {w} , number {r} ."
                rows.append(dict(method=m, latent=i, text=text, label=1, score=1.0, rank=r))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def backbone(corpora, samples):
    words = word_tokenizer(corpora.texts("full") + corpora.texts("test") + samples.text.tolist())
    torch.manual_seed(0)
    return Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1)


@pytest.fixture(scope="module")
def full(corpora, samples):
    return training_set("Full Dataset", corpora, samples, 0)


@pytest.fixture(scope="module")
def bench(backbone, corpora):
    return toxicity_bench(backbone, corpora, open_task("toxicity"), 256, 8192)


@pytest.fixture(scope="module")
def head_only(backbone, corpora, samples):
    texts = list(dict.fromkeys(corpora.texts("full") + samples.text.tolist() + corpora.texts("test")))
    return HeadOnly(HeadSettings(1e-2, 5), States(texts, pooled_states(backbone, texts, "mean")))


class Uncached:
    "A run that stores nothing."

    def cached(self, name, function, *arguments):
        return function(*arguments)


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
    safe = [r.text for r in corpora["seed"] if r.label == 0]
    for s in sets:
        assert [t for t, label in zip(s.texts, s.labels) if label == 0] == safe
    baseline = training_set("Baseline", corpora, samples, n)
    assert baseline.texts == corpora.texts("seed")
    assert all(s.texts[: len(baseline.texts)] == baseline.texts for s in sets)


def test_best_samples_of_every_feature_come_first(samples):
    shuffled = samples.sample(frac=1, random_state=3)
    picked = chosen_samples(shuffled, "Ours", 5)
    assert picked["rank"].tolist() == [0, 0, 0, 1, 1] and picked.latent.tolist() == [0, 1, 2, 0, 1]
    own = set(chosen_samples(shuffled, "random", 2).method)
    assert own == {"random"}, "a name of the samples' own works as well"
    with pytest.raises(UserError, match="no samples of 'magpie'.*one-step, random, two-step"):
        chosen_samples(samples, "magpie", 2)


# ---- scoring


def test_auprc_is_sklearns_and_needs_two_classes():
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 2, 200), rng.random(200)
    assert auprc(labels, p) == average_precision_score(labels, p)
    with pytest.raises(UserError, match="all 3 test rows have one label"):
        auprc([1, 1, 1], [0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", ["LoRA", "head only"])
def test_a_cell_and_the_table(bench, full, head_only, name):
    training = chosen_trainings([name], [FAST, head_only])[0]
    cell = toxicity_cell(bench, full, training, 42)
    about = dict(method="Full Dataset", training=name, seed=42)
    assert cell | dict(auprc=0) == dict(about, auprc=0, n_toxic=full.n_toxic, n_safe=full.n_safe)
    assert 0.9 < cell["auprc"] <= 1
    with pytest.raises(UserError, match="training 'all' is unknown"):
        chosen_trainings(["all"], [FAST, head_only])


def test_cells_are_deterministic_and_depend_on_the_seed(bench, full, head_only):
    for trained, training in ((lora_probabilities, FAST), (head_only_probabilities, head_only)):
        a, b, c = (trained(bench, full, training, s) for s in (42, 42, 43))
        assert a.tobytes() == b.tobytes() != c.tobytes()


def test_summary_uses_sample_sd_and_keeps_order():
    about = dict(training="LoRA", n_toxic=3, n_safe=4)
    scores = pd.DataFrame(dict(about, method=["b", "b", "a"], seed=[1, 2, 1], auprc=[0.2, 0.4, 0.5]))
    table = summary(percent(scores, ["auprc"]), SUMMARY)
    assert list(table) == ["method", "training", "auprc_mean", "auprc_sd", "seeds", "n_toxic", "n_safe"]
    assert table.method.tolist() == ["b", "a"] and table.seeds.tolist() == [2, 1]
    assert table.auprc_mean.tolist() == pytest.approx([30, 50])
    assert table.auprc_sd[0] == pytest.approx(np.std([20, 40], ddof=1))


def test_data_efficiency_is_figure_7():
    printed = {200: 49.12, 400: 49.16, 600: 49.41, 800: 49.75, 1000: 49.91}
    found = [round(data_efficiency(a, n), 2) for n, a in printed.items()]
    assert found == [21.35, 18.89, 17.79, 17.14, 16.64]
    assert np.isnan(data_efficiency(50, 1)) and np.isnan(data_efficiency(50, 0))


def test_by_delta_and_by_samples(bench, corpora, samples, head_only):
    sets = sets_by_delta(corpora, samples, {0.0: [0, 1, 2], 1.0: [1], 9.0: []})
    by_delta = score_sets(Uncached(), bench, head_only, sets, [42, 43])
    assert list(by_delta) == ["delta", "missing", "n_samples", "seed", "auprc", "des"]
    assert by_delta.n_samples.tolist() == by_delta.missing.tolist() == [3, 3, 1, 1, 0, 0]
    assert by_delta.auprc.between(0, 1).all()
    by_samples = score_sets(Uncached(), bench, head_only, sets_by_samples(corpora, samples, 2), [42])
    assert by_samples.n_samples.tolist() == [3, 6]
    expected = [100 * a / np.log10(n) for a, n in zip(by_samples.auprc, (3, 6))]
    assert by_samples.des.tolist() == pytest.approx(expected)
    assert by_delta[by_delta.delta == 0].auprc[0] == by_samples.auprc[0], "the same rows, the same score"


def test_curves_and_table_share_their_cells(bench, corpora, samples, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    remember_digest(backbone, "a toy")
    run = Run("40_toxicity_detection", {"profile": "mini", "seed": 0}, {})
    parameters = dict(head_learning_rate=0.01, head_epochs=1, head_batch=16)
    parameters |= dict(pooling="mean", max_length=256, batch_tokens=8192)
    texts = texts_to_read(corpora, open_task("toxicity"), samples)
    head = open_head_only(run, "states_toxicity", backbone, texts, parameters)

    def n_cells():
        return len(list((tmp_path / "mini/artifacts/40_toxicity_detection").glob("cell-*")))

    ours, one_step = (training_set(m, corpora, samples, 3) for m in ("Ours", "Ours, one-step"))
    scores = train_cells(run, "cell", toxicity_cell, bench, grid([ours, one_step], [head], [42, 43]))
    assert n_cells() == 4
    by_delta = score_sets(run, bench, head, sets_by_delta(corpora, samples, {1.6: [0, 1, 2]}), [42, 43])
    assert n_cells() == 4 and by_delta.auprc.tolist() == [c["auprc"] for c in scores[:2]]
    score_sets(run, bench, head, sets_by_delta(corpora, samples, {1.6: [0, 1, 2], 1.8: [1]}), [42, 43])
    assert n_cells() == 6, "a further threshold trains its own cells"
    score_sets(run, bench, head, sets_by_samples(corpora, samples, 2), [42, 43])
    assert n_cells() == 8, "one sample per feature is the table's row"


def test_readers_of_a_later_stage():
    class Later:
        "A run in which toxicity detection left nothing."

        def frame(self, stage, name, columns):
            return pd.DataFrame({c: pd.Series(dtype=kind) for c, kind in columns.items()})

        def setting(self, stage, name):
            return {"seeds": [1], "head_epochs": 2}[name]

    assert list(read_toxicity_scores(Later())) == ["method", "training", "seed", "auprc", "n_toxic", "n_safe"]
    assert read_toxicity_settings(Later(), ["seeds", "head_epochs"]) == {"seeds": [1], "head_epochs": 2}


# ---- the floor


def test_floor_on_a_small_set(corpora, samples, full):
    baseline = training_set("Baseline", corpora, samples, 0)
    draws = [drawn_rows(corpora, "full", 20, 20, s) for s in range(3)]
    table = floor_table([baseline, full, *draws], corpora.texts("test"), corpora.labels("test"))
    assert table.rows.tolist() == ["Baseline", "Full Dataset", "full, 20 + 20"]
    assert table.draws.tolist() == [1, 1, 3] and (table.base_rate == 0.5).all()
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
    draws = [drawn_rows(corpora, "toxicchat_train", 1000, 200, s) for s in range(2)]
    assert np.mean([tfidf_floor(d, texts, labels) for d in draws]) == pytest.approx(0.695, abs=0.01)
