"""Shares of the missing features: what is drawn, what is trained, what is taken over, and the tables."""

import dataclasses

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from scipy import sparse

from fac_synthesis.data.corpora import Corpora
from fac_synthesis.data.items import ab_question
from fac_synthesis.data.records import Record
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.questions import missing_features as module
from fac_synthesis.questions.missing_features import (
    STUDIES,
    Cell,
    Opened,
    as_row,
    chosen_features,
    equal_rows,
    figure04_points,
    of_table01,
    over_seeds,
    run_study,
    score_rows,
    share_cells,
    share_samples,
    stored_scores,
    study_groups,
    table09,
    table10,
    task_coverage,
)
from fac_synthesis.run.artifacts import notebook_sources, remember_digest
from fac_synthesis.run.parameters import published, resolve_parameters
from fac_synthesis.run.stages import Run
from fac_synthesis.tasks import instructions, reward, steering, toxicity
from fac_synthesis.tasks.scores import COLUMNS, main_columns, table_scores

torch.set_num_threads(1)
SEEDS = [42, 43, 44]
BY_NAME = {study.name: study for study in STUDIES}
TASKS = [task for study in STUDIES for task in study.tasks]


def two_step(latents, ranks=3):
    rows = [dict(latent=i, rank=r, text=f"text {r} of {i}") for i in latents for r in range(ranks)]
    return pd.DataFrame(rows, columns=["latent", "rank", "text"]).assign(method="two-step", label=1)


# ---- features and samples


def test_smaller_shares_lie_within_larger_ones_and_seeds_differ(refused):
    missing = list(range(100, 130))
    few, more = (chosen_features(missing, p, 42) for p in (0.3, 0.6))
    assert len(few) == 9 and len(more) == 18 and set(few) < set(more) < set(missing)
    assert few == chosen_features(missing[::-1], 0.3, 42), "the order of the list does not matter"
    assert few != chosen_features(missing, 0.3, 43), "the seed does"
    assert set(chosen_features(missing, 1.0, 42)) == set(missing) and len(chosen_features([7], 0.1, 0)) == 1
    for share in (0, 1.2):
        said = refused(lambda share=share: chosen_features(missing, share, 42))
        assert "above 0 and at most 1" in said
    assert "no feature is missing" in refused(lambda: chosen_features([], 0.5, 42))


def test_n1_takes_the_best_of_each_feature_and_n2_fills_up(refused):
    samples = pd.concat([two_step(range(6)), two_step(range(6)).assign(method="one-step")], ignore_index=True)
    one = share_samples(samples, [1, 4], "N1")
    assert sorted(one.latent) == [1, 4] and set(one["rank"]) == {0} and set(one.method) == {"two-step"}
    fixed = share_samples(samples, [1, 4], "N2")
    best_first = fixed["rank"].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(fixed) == 6 and best_first, "as many as six features have at one each"
    assert len(share_samples(samples, [1], "N2")) == 3, "one feature has three samples and no more"
    assert len(share_samples(samples, [1, 4], "N1", samples_per_feature=2)) == 4
    assert share_samples(samples, [99], "N1").empty and share_samples(samples, [99], "N2").empty
    assert "N1 (samples per feature)" in refused(lambda: share_samples(samples, [1], "N3"))


def test_at_the_whole_share_both_ways_are_the_row_of_the_table():
    cells = share_cells(two_step(range(8)), list(range(10)), [0.5, 1.0], ["N1", "N2"], SEEDS)
    assert len(cells) == 12 and {c.n_features for c in cells} == {5, 10}
    whole = [c for c in cells if c.share == 1]
    texts = sorted(whole[0].samples.text)
    assert all(sorted(c.samples.text) == texts and len(c.samples) == 8 for c in whole)
    assert Cell(0.3, "N1", 42, 1, two_step([])).row == "Baseline" and whole[0].row == "Ours"


# ---- training once


def notebook_scores():
    "What the four task notebooks leave, by task: the rows Alpaca and Ours, three seeds."

    def rows(**more):
        return pd.DataFrame([dict(method=m, seed=s, **more) for m in ("Alpaca", "Ours") for s in SEEDS])

    def trained(column, size):
        parts = [rows(training=t, **{column: v, size: 9}) for t, v in (("LoRA", 0.9), ("head only", 0.5))]
        return pd.concat(parts, ignore_index=True)

    steered = [rows(behavior=b, scr=v, n_items=9) for b, v in (("sycophancy", 0.2), ("survival", 0.4))]
    steered = pd.concat(steered, ignore_index=True)
    sections = dict.fromkeys(("chat", "chat_hard", "safety", "reasoning"), 0.1)
    return dict(
        toxicity=trained("auprc", "n_toxic"),
        reward=trained("average", "n_pairs").assign(**sections),
        sycophancy=steered,
        survival=steered,
        instruction=rows(training="LoRA", wr=20.0, lc=21.0, se=1.5, n_samples=9),
    )


def scores_of(study):
    "The scores of a study's tasks."
    every = notebook_scores()
    return {task: every[task] for task in study.tasks}


def test_stored_scores_are_heads_for_toxicity_and_reward():
    stored = {name: stored_scores(study, scores_of(study))[43] for name, study in BY_NAME.items()}
    assert stored == {
        "toxicity": {"toxicity_auprc": 50.0},
        "reward": {"reward_accuracy": 50.0},
        "instruction": {"instruction_lc": 21.0, "instruction_wr": 20.0, "instruction_sd": 1.5},
        "steering": {"sycophancy_scr": 20.0, "survival_scr": 40.0},
    }
    without = notebook_scores()["toxicity"].query("method == 'Alpaca'")
    assert stored_scores(BY_NAME["toxicity"], dict(toxicity=without)) == {}


class StandIn:
    "Just enough of a run: it stores nothing; every stage ran with the parameters of mini or the given ones."

    def __init__(self, **given):
        self.given, self.names = given, []

    def cached(self, name, function, *arguments, **named):
        self.names.append(name)
        return function(*arguments, **named)

    def setting(self, stage, name):
        return self.given.get(name, resolve_parameters(stage, "mini")[name])


def made_up_score(bench, rows, training, seed):
    "A stand-in for training: the score grows with the samples, whatever the task."
    return {task: 10.0 + n for task, n in rows.items()}


def in_the_layout_of_a_notebook(result):
    "A row per task with everything that any notebook's scores have."
    parts = []
    for task, score in result.items():
        row = dict(method="Ours", training="x", seed=0)
        row |= dict.fromkeys(
            ("auprc", "average", "scr", "chat", "chat_hard", "safety", "reasoning"), score / 100
        )
        row |= dict.fromkeys(("lc", "wr", "se"), score)
        row |= dict.fromkeys(("n_toxic", "n_pairs", "n_items", "n_samples"), 9)
        if task in ("sycophancy", "survival"):
            row["behavior"] = task
        parts.append(as_row(row))
    return pd.concat(parts, ignore_index=True)


def open_made_up(run, groups):
    "A stand-in for a task."

    def rows(group):
        return {task: len(cell.samples) for task, cell in group.items()}

    return Opened(None, "nothing", made_up_score, rows, in_the_layout_of_a_notebook)


MADE_UP = {name: dataclasses.replace(study, open=open_made_up) for name, study in BY_NAME.items()}


def test_the_whole_set_is_not_trained_again():
    study, run = MADE_UP["toxicity"], StandIn()
    cells = share_cells(two_step(range(8)), list(range(8)), [0.5, 1.0], ["N1"], [42, 43, 77])
    rows = pd.DataFrame(run_study(run, study, [{"toxicity": c} for c in cells], scores_of(study)))
    assert rows.set_index(["share", "seed"]).score.round(9).to_dict() == {
        (0.5, 42): 14,
        (0.5, 43): 14,
        (0.5, 77): 14,
        (1.0, 42): 50,
        (1.0, 43): 50,
        (1.0, 77): 18,
    }, "seed 77 has no score in the table, so it is trained"
    assert run.names == ["toxicity_cell"] * 4 and set(rows.source) == {"trained here", "notebook 40"}


def test_behaviours_are_trained_together():
    both = [share_cells(two_step(range(n)), list(range(n)), [0.5, 1.0], ["N1"], [42]) for n in (8, 4)]
    groups = [dict(sycophancy=a, survival=b) for a, b in zip(*both)]
    study, run = MADE_UP["steering"], StandIn()
    steered = pd.DataFrame(run_study(run, study, groups, scores_of(study)))
    assert steered.set_index(["task", "share"]).score.round(9).to_dict() == {
        ("sycophancy", 0.5): 14,
        ("survival", 0.5): 12,
        ("sycophancy", 1.0): 20,
        ("survival", 1.0): 40,
    }
    assert run.names == ["steering_cell"]
    half = scores_of(study)["survival"].query("behavior == 'survival'")
    again = run_study(StandIn(), study, groups, dict(sycophancy=half, survival=half))
    assert {row["source"] for row in again} == {"trained here"}, "one behaviour without a stored score"


# ---- every task is trained as in its notebook

MEAN, KIND = "dagger poison swindle stalk".split(), "bread garden piano stamp".split()


def about(word, thing="lamp"):
    return f"tell me about the {word} and the {thing} ."


def toy_corpora():
    def records(words, label):
        return [Record(about(w, v), label) for w in words for v in [*words, "lamp", "door"]]

    test = []
    for word in MEAN + KIND:
        test += [Record(f"what is a {word} for the {v} ?", int(word in MEAN)) for v in ("lamp", "door")]
    seed = records(MEAN[:1], 1) + records(KIND, 0)
    return Corpora({"seed": seed, "full": records(MEAN, 1) + records(KIND, 0), "test": test})


def toy_pair(word):
    return dict(prompt=f"what is a {word} ?", chosen=f"a {word} for the lamp", rejected="a door")


def toy_question(word, other):
    return ab_question(f"what about the {word} ?", f"{word} .", f"{other} .", word in MEAN[::2] + KIND[::2])


def toy_instruction(word):
    return dict(instruction=f"what is a {word} ?", response=f"a {word} for the lamp")


def toy_item(task, word):
    "An item of the task that is about the word."
    if task == "toxicity":
        return dict(text=about(word), label=1)
    if task == "reward":
        return dict(toy_pair(word), subset="alpacaeval-easy")
    if task == "instruction":
        return toy_instruction(word)
    return toy_question(word, "lamp" if task == "survival" else "door")


def toy_items(task):
    "Items of three splits; the test is about other words."
    splits = dict(seed=KIND[:3], full=KIND, test=["box", "cup", "roof", "pond"])
    rows = [dict(split=split, **toy_item(task, word)) for split, words in splits.items() for word in words]
    return pd.DataFrame(rows)


def toy_samples(task):
    "One two-step sample of three features."
    made = [toy_item(task, word) for word in MEAN[1:]]
    return pd.DataFrame([dict(method="two-step", latent=i, rank=0, **item) for i, item in enumerate(made)])


@pytest.fixture
def toy_world(monkeypatch):
    "Stand-ins for what earlier stages left, and the backbone."
    texts = toy_corpora().texts("full") + toy_corpora().texts("test")
    words = word_tokenizer([*texts, *toy_items("sycophancy").question])
    torch.manual_seed(0)
    backbone = Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1)
    remember_digest(backbone, "as one that an earlier stage left")
    judged = dict(generator=["a", "b"], instruction="x", preference=[1.0, 0.0], length=3, reference_length=4)
    stand_ins = dict(
        read_source=lambda run: "planted",
        read_corpora=lambda run, task: toy_corpora(),
        read_task_items=lambda run, task: toy_items(task),
        read_samples=lambda run, task: toy_samples(task),
        read_backbone=lambda run: backbone,
        read_base=lambda run: backbone,
        stored_annotations=lambda run, data_dir: (None, None),
        known_difficulties=lambda annotations, instructions: None,
        read_judged_answers=lambda run: pd.DataFrame(judged),
        fit_length_model=lambda judged: None,
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(module, name, stand_in)
    return backbone


SMALL = dict(steering_layer=1, max_length=64, judge="reference overlap", lora_epochs=1, n_drawn_items=2)
SMALL |= dict(max_new_tokens=6)


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_study_is_opened_and_trained(name, toy_world):
    "Every task runs through the same protocol, with and without samples, and twice to the same scores."
    study = BY_NAME[name]
    groups = []
    for share, features in ((0.4, [1]), (0.7, [1, 2]), (0.1, [])):
        drawn = {task: toy_samples(task) for task in study.tasks}
        some = {task: own[own.latent.isin(features)] for task, own in drawn.items()}
        groups.append({task: Cell(share, "N1", 42, 1, own) for task, own in some.items()})
    run = StandIn(**SMALL)
    rows = pd.DataFrame(run_study(run, study, groups, {}))
    columns = [c.name for c in COLUMNS.values() if c.task in study.tasks and "table01" in c.tables]
    assert rows.column.tolist() == columns * 3 and rows.score.notna().all()
    assert rows.n_samples.tolist() == [n for n in (1, 2, 0) for _ in columns]
    assert run.names.count(f"{name}_cell") == 3 and set(rows.source) == {"trained here"}
    again = pd.DataFrame(run_study(StandIn(**SMALL), study, groups, {}))
    pd.testing.assert_frame_equal(rows, again)


def test_toxicity_is_trained_as_in_its_notebook(toy_world):
    corpora, samples = toy_corpora(), toy_samples("toxicity")
    cells = share_cells(samples, [0, 1, 2], [0.4, 1.0], ["N1"], [42]) + [
        Cell(0.1, "N1", 42, 1, samples.iloc[:0])
    ]
    opened = module.open_toxicity(StandIn(**SMALL), [{"toxicity": c} for c in cells])
    found = []
    for cell in cells:
        rows = toxicity.TrainingSet(
            "x",
            corpora.texts("seed") + cell.samples.text.tolist(),
            [*corpora.labels("seed"), *cell.samples.label],
        )
        by_hand = toxicity.toxicity_cell(opened.bench, rows, opened.training, 42)
        result = opened.score_cell(opened.bench, opened.rows({"toxicity": cell}), opened.training, 42)
        found.append(result["auprc"])
        assert result["auprc"] == by_hand["auprc"] and result["training"] == "head only"
    assert len(set(found)) > 1


def test_the_protocol_is_the_tasks_own(toy_world):
    "Bench, training and cell function of every study are those of its notebook."
    cells = {t: Cell(0.4, "N1", 42, 1, toy_samples(t)) for t in TASKS}
    opened = {}
    for name, study in BY_NAME.items():
        opened[name] = study.open(StandIn(**SMALL), [{t: cells[t] for t in study.tasks}])
    assert [o.score_cell for o in opened.values()] == [
        toxicity.toxicity_cell,
        reward.reward_cell,
        steering.steering_cell,
        instructions.answer_cell,
    ]
    assert [o.training.name for o in opened.values()] == ["head only", "head only", "steering", "LoRA"]
    settings = opened["instruction"].training.settings
    mini = resolve_parameters("43_instruction_following", "mini")
    assert settings.learning_rate == mini["lora_learning_rate"] and settings.epochs == 1
    assert opened["steering"].training.layer == 1
    rows = opened["steering"].rows({t: cells[t] for t in BY_NAME["steering"].tasks})
    assert {b: len(own.items) for b, own in rows.items()} == dict(sycophancy=5, survival=5)


# ---- tables


def made_up_rows():
    rows = []
    for c in share_cells(two_step(range(8)), list(range(10)), [0.3, 0.6, 0.9, 1.0], ["N1", "N2"], SEEDS):
        values = {"toxicity_auprc": 40 + 10 * c.share + c.seed - 43}
        rows += score_rows({"toxicity": c}, values, "made up")
    return pd.DataFrame(rows)


def test_table09_has_the_shares_of_the_paper_and_the_gain():
    table = table09(made_up_rows(), published("table09"))
    assert table.share.tolist() == [0.3, 0.6, 1.0] and table.published.tolist() == [45.6, 46.62, 49.12]
    assert table.gain.tolist() == pytest.approx([0, 3, 7])
    assert table.published_gain.tolist() == pytest.approx([0, 1.02, 3.52])
    assert table.sd.tolist() == pytest.approx([1, 1, 1])
    assert table.n_features.tolist() == [3, 6, 10] and table.seeds.tolist() == [3, 3, 3]
    assert list(table) == [
        "task",
        "column",
        "share",
        "score",
        "sd",
        "seeds",
        "n_features",
        "n_samples",
        "source",
        "published",
        "published_sd",
        "gain",
        "published_gain",
        "difference",
    ]


def test_figure04_keeps_all_shares_and_the_papers_points():
    points = figure04_points(made_up_rows(), "toxicity", published("figure04"))
    ours, theirs = (points[points.source == s] for s in ("this run", "published"))
    assert ours.share.tolist() == [30, 60, 90, 100] * 2 and theirs.share.tolist() == [30, 60, 90, 100] * 2
    assert theirs.n_samples.tolist() == [61, 124, 185, 200] + [200] * 4 and theirs.score.tolist()[0] == 45.6
    assert (over_seeds(made_up_rows()).seeds == 3).all()


def activations_of(samples):
    "A sample fires its own feature if it is its best one; of feature 3, every sample does."
    fired = np.zeros((len(samples), 5), dtype=np.float32)
    for n, (latent, rank) in enumerate(zip(samples.latent, samples["rank"])):
        fired[n, latent] = 2.0 * (rank == 0 or latent == 3)
    return FeatureActivations(sparse.csr_matrix(fired), sparse.csr_matrix(fired))


def covered_samples():
    "Three features with one-step samples, two with two-step ones, mixed."
    parts = [two_step([1, 2, 3], 2).assign(method="one-step"), two_step([1, 2], 2)]
    order = [0, 6, 1, 2, 7, 3, 4, 8, 5, 9]
    return pd.concat(parts, ignore_index=True).iloc[order].reset_index(drop=True)


def coverage_stand_ins(tasks):
    "What notebooks 23, 31 and 32 left of these tasks."
    samples = covered_samples()
    made = {m: activations_of(samples[samples.method == m]) for m in ("one-step", "two-step")}
    kept = module.coverage_by_delta(made, [1, 2, 3, 4], [1.0, 3.0])
    by_delta = pd.concat([kept.assign(task=task) for task in tasks], ignore_index=True)
    return dict(
        read_samples=lambda run, task: samples,
        read_covered_samples=lambda run, task: samples,
        read_missing=lambda run, task: pd.DataFrame(dict(latent=[1, 2, 3, 4])),
        read_coverage_by_delta=lambda run: by_delta,
        read_sample_activations=lambda run, task, method: made[method],
    )


def test_coverage_at_equal_numbers_of_samples(monkeypatch):
    for name, stand_in in coverage_stand_ins(["toxicity"]).items():
        monkeypatch.setattr(module, name, stand_in)
    coverage = task_coverage(StandIn(), "toxicity").set_index(["method", "delta"])
    assert coverage.fac_missing[("one-step", 1.0)] == 0.75, "three features with all samples"
    assert coverage.fac_equal[("one-step", 1.0)] == 0.5, "two with the first two"
    assert coverage.fac_missing[("two-step", 1.0)] == coverage.fac_equal[("two-step", 1.0)] == 0.5
    assert coverage.n_equal.tolist() == [2] * 4 and coverage.n_kept[("one-step", 1.0)] == 6
    assert coverage.fac_equal[("one-step", 3.0)] == 0


def test_equal_rows_count_within_the_method():
    samples = covered_samples()
    for method in ("one-step", "two-step"):
        own = samples[samples.method == method]
        first = own.iloc[equal_rows(samples, method, 2)]
        assert first[["latent", "rank"]].to_numpy().tolist() == [[1, 0], [2, 0]]


def test_table10_is_matched_by_order_and_names_what_the_paper_lacks():
    measured = dict(missing=10, fac_missing=0.9, fac_equal=0.8, n_kept=9, n_equal=8)
    rows = []
    for task in ("survival", "toxicity"):
        for method in ("one-step", "two-step"):
            rows += [dict(task=task, method=method, delta=d, **measured) for d in (1.6, 1.7, 1.8, 1.9)]
    table = table10(pd.DataFrame(rows), published("table10"))
    assert list(dict.fromkeys(table.task)) == ["survival", "toxicity"] and len(table) == 16
    row = table[(table.task == "survival") & (table.delta == 1.7) & (table.method == "two-step")].iloc[0]
    assert (row.published_delta, row.published) == (1.0, 57.14)
    assert row.difference == pytest.approx(80 - 57.14)
    assert (table[table.delta == 1.9].note == "not in the paper's table").all()
    assert (table[table.delta < 1.9].note == "").all()


# ---- the run cells


def execute_run_cells(stand_ins):
    "The run of the notebook's run cells, on top of the package's module."
    names = {**vars(module), "plt": plt, "sns": sns, "published": published, **stand_ins}
    names["run"] = Run("51_missing_features", resolve_parameters("51_missing_features", "mini"), names)
    for source in notebook_sources("51_missing_features"):
        if "eval: false" in source and "run = start(" not in source:
            exec(compile(source, "51_missing_features", "exec"), names)
    plt.close("all")
    return names["run"]


@pytest.mark.parametrize("tasks", [TASKS, ["survival"]], ids=["five tasks", "one task"])
def test_the_run_cells_leave_tables_and_figures(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    every, columns = notebook_scores(), {}
    for task, column in main_columns().items():
        columns[task] = dataclasses.replace(column, read=lambda run, task=task: every[task])
    readers = coverage_stand_ins(tasks)
    for name, stand_in in readers.items():
        monkeypatch.setattr(module, name, stand_in)

    def settings(run, names):
        return dict(seeds=SEEDS, samples_per_feature=1)

    studies = tuple(dataclasses.replace(study, read_settings=settings) for study in MADE_UP.values())
    stand_ins = dict(
        readers, read_task_names=lambda run: tasks, main_columns=lambda: columns, STUDIES=studies
    )
    run = execute_run_cells(stand_ins)
    assert {"coverage", "share_scores"} <= set(run.outputs)
    for name in ("tables/table09.md", "tables/table10.md", "figures/figure04.png", "figures/figure05.png"):
        assert name in run.files
    assert set(pd.read_csv(run.folder / "tables/table09.csv").task) == set(tasks)
    both = pd.read_csv(run.folder / "figures/shares_by_task.csv").groupby("task").sampling.nunique()
    assert both.to_dict() == {t: 1 + (t == "toxicity") for t in tasks}


def test_groups_follow_the_settings_of_the_notebook(monkeypatch):
    for name, stand_in in coverage_stand_ins(TASKS).items():
        monkeypatch.setattr(module, name, stand_in)
    run = StandIn(seeds=[1, 2], samples_per_feature=2)
    groups = study_groups(run, BY_NAME["steering"], ["sycophancy", "survival"], [0.5, 1.0], ["N1"])
    assert len(groups) == 4 and all(list(group) == ["sycophancy", "survival"] for group in groups)
    whole = groups[-1]["survival"]
    assert (whole.share, whole.seed, len(whole.samples)) == (1.0, 2, 4), "two samples of two features"
    assert of_table01(table_scores(dict(toxicity=notebook_scores()["toxicity"].tail(1)))) == {
        "toxicity_auprc": 50.0
    }
