"""Cells of a table, the classifier and both ways to train it, on a tiny model and a few dozen sentences."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score

from fac_synthesis.models.backbone import Backbone, pad, padding_id, tiny_model, tokenize, word_tokenizer
from fac_synthesis.run.artifacts import digest_of, remember_digest
from fac_synthesis.run.parameters import UserError, resolve_parameters
from fac_synthesis.run.stages import Run
from fac_synthesis.synthesis import fine_tuning
from fac_synthesis.synthesis.fine_tuning import (
    BASELINE,
    FULL,
    HeadOnly,
    HeadSettings,
    LabelledTexts,
    LoRA,
    LoRASettings,
    States,
    added_samples,
    chosen_trainings,
    classifier,
    fit_head,
    fresh_head,
    grid,
    head_probabilities,
    head_settings,
    human_part,
    lora_settings,
    open_head_only,
    percent,
    pooled_states,
    probabilities,
    projections,
    summary,
    text_key,
    train_cells,
    train_head,
    train_lora,
    with_lora,
)
from fac_synthesis.tasks.reward import RewardSettings

torch.set_num_threads(1)
MEAN, KIND = "dagger poison swindle stalk".split(), "bread garden piano stamp".split()
FAST = LoRASettings(learning_rate=1e-2, epochs=4, micro_batch=16, dtype="float32")


def sentences(words):
    others = [*words, "lamp", "door", "cup"]
    return [f"tell me about the {w} and the {other} ." for w in words for other in others]


TEST = [
    f"what is a {w} for the {thing} , please ?" if thing == "box" else f"what is a {w} for the {thing} ?"
    for w in MEAN + KIND
    for thing in ("lamp", "door", "box")
]
TEST_LABELS = np.array([int(w in MEAN) for w in MEAN + KIND for _ in range(3)])


@pytest.fixture(scope="module")
def full():
    mean, kind = sentences(MEAN), sentences(KIND)
    return LabelledTexts(FULL, mean + kind, np.array([1] * len(mean) + [0] * len(kind)))


def make_backbone(kind="llama"):
    samples = [f"{method} : the number {rank} ." for method in ("two-step", "random") for rank in range(3)]
    words = word_tokenizer(sentences(MEAN) + sentences(KIND) + TEST + samples)
    torch.manual_seed(0)
    return Backbone(tiny_model(kind, len(words), 32, 2), words, layer=1)


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


@pytest.fixture(scope="module")
def head_only(backbone, full):
    states = pooled_states(backbone, full.texts + TEST, "mean")
    return HeadOnly(HeadSettings(1e-2, 5), States(full.texts + TEST, states))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    return Run("34_fine_tuning", {"profile": "mini", "seed": 0}, {})


# ---- a cell


@dataclass(frozen=True)
class Bench:
    question: str


COMPUTED = []


def score_cell(bench, rows, training, seed):
    COMPUTED.append((rows[0], training.name, seed))
    return dict(method=rows[0], training=training.name, seed=seed, score=len(rows) / 10)


def computed(run, bench, rows, trainings, seeds):
    "The cells that were computed, and not loaded."
    COMPUTED.clear()
    cells = train_cells(run, "cell", score_cell, bench, grid(rows, trainings, seeds))
    assert [c["seed"] for c in cells] == [s for _, _, s in grid(rows, trainings, seeds)]
    return list(COMPUTED)


def test_only_the_cells_that_changed_are_trained(run):
    bench, rows = Bench("is it mean ?"), [[BASELINE], ["Ours", "another"]]
    lora, head = LoRA(LoRASettings()), HeadOnly(HeadSettings(), States(["a"], torch.ones(1, 2), ["made"]))
    assert len(computed(run, bench, rows, [lora, head], [42, 43])) == 8
    assert computed(run, bench, rows, [lora, head], [42, 43]) == []
    new_seed = [(BASELINE, "head only", 44), ("Ours", "head only", 44)]
    assert computed(run, bench, rows, [head], [43, 44]) == new_seed
    more = [*rows, ["Magpie"]]
    assert computed(run, bench, more, [lora], [42]) == [("Magpie", "LoRA", 42)]
    slower = LoRA(LoRASettings(epochs=4))
    assert {name for _, name, _ in computed(run, bench, rows, [slower, head], [42])} == {"LoRA"}
    hotter = HeadOnly(HeadSettings(epochs=4), head.states)
    assert {name for _, name, _ in computed(run, bench, rows, [lora, hotter], [42])} == {"head only"}
    longer = [[BASELINE], ["Ours", "another", "a third"]]
    assert {name for name, _, _ in computed(run, bench, longer, [lora], [42])} == {"Ours"}
    assert len(computed(run, Bench("is it kind ?"), rows, [lora], [42])) == 2


def test_states_count_by_how_they_were_made():
    x_ND = torch.ones(2, 3)
    assert digest_of(States(["a", "b"], x_ND, ["made"])) == digest_of(States(["c"], x_ND[:1], ["made"]))
    assert digest_of(States(["a"], x_ND[:1], ["made"])) != digest_of(States(["a"], x_ND[:1], ["otherwise"]))
    assert digest_of(States(["a"], x_ND[:1])) != digest_of(States(["a"], 2 * x_ND[:1])), "by value"


def test_states_of_a_table_are_read_once(run, backbone, monkeypatch):
    remember_digest(backbone, "a toy")
    parameters = dict(head_learning_rate=0.1, head_epochs=2, head_batch=4)
    parameters |= dict(pooling="mean", max_length=64, batch_tokens=8192)
    head = open_head_only(run, "states", backbone, TEST + TEST[:3], parameters)
    assert head.settings == HeadSettings(0.1, 2, 4) and head.states.x_ND.shape == (len(TEST), 32)
    assert torch.equal(head.states(TEST[:2] * 2), pooled_states(backbone, TEST, "mean", 64)[[0, 1, 0, 1]])
    wider = open_head_only(run, "states", backbone, TEST + sentences(KIND), parameters)
    assert digest_of(wider) == digest_of(head) and wider.states.x_ND.shape != head.states.x_ND.shape
    other = open_head_only(run, "states", backbone, TEST, parameters | dict(pooling="last"))
    assert digest_of(other) != digest_of(head)
    tokens = tokenize(backbone.tokenizer, TEST, 64)
    by_tokens = open_head_only(run, "tokens", backbone, tokens, parameters)
    assert torch.equal(by_tokens.states(tokens), head.states(TEST))
    assert text_key(tokens[0]) == tuple(tokens[0].ids)
    monkeypatch.setattr(fine_tuning, "pooled_states", None)  # what is stored is not read again
    stored = open_head_only(run, "states", backbone, TEST, parameters)
    assert torch.equal(stored.states.x_ND, head.states.x_ND)


def test_trainings_by_name(head_only):
    lora = LoRA(FAST)
    assert chosen_trainings(["head only", "LoRA"], [lora, head_only]) == [head_only, lora]
    with pytest.raises(UserError, match="training 'all' is unknown; use LoRA or head only"):
        chosen_trainings(["LoRA", "all"], [lora, head_only])


def test_the_papers_settings_are_the_defaults():
    toxicity = resolve_parameters("40_toxicity_detection", "paper")
    assert lora_settings(toxicity) == LoRASettings(gradient_checkpointing=True)
    assert head_settings(toxicity) == HeadSettings()
    reward = resolve_parameters("41_reward_modeling", "paper")
    more = dict(warmup=reward["warmup"], weight_decay=reward["weight_decay"])
    assert lora_settings(reward, RewardSettings, **more) == RewardSettings(gradient_checkpointing=True)
    assert head_settings(reward, reward["weight_decay"]) == HeadSettings(epochs=5, weight_decay=0.01)


def test_summary_uses_sample_sd_and_keeps_order():
    scores = pd.DataFrame(
        dict(method=["b", "b", "a"], training="LoRA", seed=[1, 2, 1], score=[0.2, 0.4, 0.5], n=[3, 4, 5])
    )
    columns = dict(mean=("score", "mean"), sd=("score", "std"), seeds=("seed", "size"), n=("n", "first"))
    table = summary(percent(scores, ["score"]), columns)
    assert list(table) == ["method", "training", "mean", "sd", "seeds", "n"]
    assert table.method.tolist() == ["b", "a"]
    assert table.seeds.tolist() == [2, 1] and table.n.tolist() == [3, 5]
    assert table["mean"].tolist() == pytest.approx([30, 50])
    assert table.sd[0] == pytest.approx(np.std([20, 40], ddof=1)) and np.isnan(table.sd[1])
    assert summary(scores, dict(n=("n", "sum")), by=("training",)).n.tolist() == [12]


def test_what_a_row_adds():
    samples = pd.DataFrame(dict(method="two-step", latent=[2, 1, 1], rank=[0, 0, 1], text=["a", "b", "c"]))
    assert [human_part(m) for m in (BASELINE, FULL, "Ours")] == ["seed", "full", "seed"]
    assert added_samples(BASELINE, samples, 2).empty and added_samples(FULL, samples, 0).empty
    assert added_samples("Ours", samples, 2).text.tolist() == ["b", "a"]
    with pytest.raises(UserError, match="no samples of 'Magpie'"):
        added_samples("Magpie", samples, 2)


# ---- the classifier


def test_padding_never_ends_a_text(backbone):
    assert padding_id(backbone.tokenizer) == 0
    other = make_backbone().tokenizer
    other.pad_token = other.eos_token  # as many published tokenizers do; <end> closes the user's turn
    assert padding_id(other) == other.bos_token_id
    other.pad_token = other.bos_token = other.unk_token = None
    with pytest.raises(UserError, match="no token to pad with"):
        padding_id(other)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_classifier_starts_from_the_backbone(kind):
    b = make_backbone(kind)
    model = classifier(b, 42)
    ours, theirs = dict(model.base_model.named_parameters()), dict(b.model.base_model.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(model.score.weight, fresh_head(b, 42).weight)
    assert not torch.equal(model.score.weight, fresh_head(b, 43).weight)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert projections(model) == sorted(every)
    logits_NC = pooled_states(b, TEST) @ model.score.weight.T.detach()
    assert np.allclose(logits_NC.softmax(-1)[:, 1].numpy(), probabilities(model, b, TEST), atol=1e-5)


def test_a_model_without_sequence_head_is_refused(backbone, monkeypatch):
    def unknown(config):
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(fine_tuning.AutoModelForSequenceClassification, "from_config", unknown)
    with pytest.raises(UserError, match="llama has no sequence classifier"):
        classifier(backbone, 0)
    monkeypatch.setattr(
        fine_tuning.AutoModelForSequenceClassification, "from_config", lambda config: torch.nn.Linear(1, 1)
    )
    with pytest.raises(UserError, match="llama has no sequence classifier"):
        classifier(backbone, 0)


def test_reading_is_independent_of_batches_and_single_bos(backbone):
    model = classifier(backbone, 42)
    many, few = (probabilities(model, backbone, TEST, batch_tokens=n) for n in (8192, 20))
    assert np.allclose(many, few, atol=1e-6)
    ids = tokenize(backbone.tokenizer, TEST[:1], 256)[0].ids
    assert ids.count(backbone.tokenizer.bos_token_id) == 1 and ids[0] == backbone.tokenizer.bos_token_id
    assert len(tokenize(backbone.tokenizer, TEST[:1], 5)[0].ids) == 5
    assert np.isfinite(probabilities(model, backbone, TEST, max_length=5)).all()


def test_mean_pooling_is_over_the_users_tokens(backbone):
    text = "tell me about the bread"
    t = tokenize(backbone.tokenizer, [text], 256)[0]
    with torch.no_grad():
        x_TD = backbone.model.base_model(torch.tensor([t.ids])).last_hidden_state[0]
    pooled = pooled_states(backbone, [text, text + " and the garden ."], "mean")[0]
    assert torch.allclose(pooled, x_TD[t.first : t.last].mean(0), atol=1e-6)
    with pytest.raises(UserError, match="pooling 'max'"):
        pooled_states(backbone, [text], "max")


# ---- training


def test_lora_trains_adapters_and_head_only(backbone, full):
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    start = {n: p.clone() for n, p in with_lora(classifier(backbone, 42), FAST, 42).named_parameters()}
    model = train_lora(backbone, full, FAST, 42)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == trainable and all("lora_" in n or "score.modules_to_save" in n for n in trainable)
    assert sum("lora_A" in n for n in trainable) == 7 * 2, "seven projections in each of two layers"
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, before[name]), "the backbone itself is not touched"
    assert average_precision_score(TEST_LABELS, probabilities(model, backbone, TEST)) > 0.9


def test_lora_is_deterministic_and_depends_on_the_seed(backbone, full):
    a, b, c = (probabilities(train_lora(backbone, full, FAST, s), backbone, TEST) for s in (42, 42, 43))
    assert a.tobytes() == b.tobytes() != c.tobytes()


def test_accumulation_and_checkpointing_change_cost_only_grouping_the_order(backbone, full):
    def trained(**more):
        settings = LoRASettings(learning_rate=1e-3, epochs=1, dropout=0.0, dtype="float32", **more)
        return probabilities(train_lora(backbone, full, settings, 42), backbone, TEST)

    whole, parts = trained(micro_batch=16), trained(micro_batch=4)
    assert np.allclose(whole, parts, atol=1e-4)
    assert np.allclose(parts, trained(micro_batch=4, gradient_checkpointing=True), atol=1e-5)
    assert not np.allclose(trained(micro_batch=16, group_by_length=True), whole, atol=1e-4)
    with pytest.raises(UserError, match="lora_batch 16 is no multiple of micro_batch 5"):
        train_lora(backbone, full, LoRASettings(micro_batch=5), 42)


def test_half_precision_body_with_float32_head(backbone, full):
    settings = LoRASettings(learning_rate=1e-3, epochs=1, micro_batch=16)  # the defaults: bfloat16
    model = train_lora(backbone, full, settings, 42)
    kinds = {(p.requires_grad, p.dtype) for n, p in model.named_parameters() if "score" not in n}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    assert model.score.weight.dtype == torch.float32
    assert np.isfinite(probabilities(model, backbone, TEST)).all()


def test_head_on_kept_states_equals_frozen_model(backbone, full):
    settings, labels_N = HeadSettings(1e-2, 3, 4), torch.tensor(full.labels)
    x_ND = pooled_states(backbone, full.texts)
    kept = train_head(fresh_head(backbone, 42), x_ND, full.labels, settings, 42)
    model, tokens = classifier(backbone, 42), tokenize(backbone.tokenizer, full.texts, 256)
    for p in model.base_model.parameters():
        p.requires_grad_(False)

    def logits_of(rows):
        return model(**pad([tokens[i] for i in rows.tolist()], 0, "cpu")[0]).logits

    fit_head(model.score, logits_of, labels_N, settings, 42)
    assert torch.allclose(kept.weight, model.score.weight, atol=1e-5)
    assert not torch.allclose(kept.weight, fresh_head(backbone, 42).weight, atol=1e-2)


def test_head_is_deterministic_and_leaves_its_start_alone(head_only, full, backbone):
    def trained(seed):
        x_ND = head_only.states(full.texts)
        head = train_head(fresh_head(backbone, seed), x_ND, full.labels, head_only.settings, seed)
        return head_probabilities(head, head_only.states(TEST))

    head = fresh_head(backbone, 42)
    train_head(head, head_only.states(full.texts), full.labels, head_only.settings, 42)
    assert torch.equal(head.weight, fresh_head(backbone, 42).weight)
    a, b, c = (trained(s) for s in (42, 42, 43))
    assert a.tobytes() == b.tobytes() != c.tobytes()
