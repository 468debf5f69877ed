"""Shares of the missing features: what is drawn, what is trained, what is taken over, and the tables beside the paper."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from fac_synthesis.data.corpora import Corpora
from fac_synthesis.data.records import Record
from fac_synthesis.features.activations import FeatureActivations
from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.questions.missing_features import (
    STUDIES,
    Cell,
    chosen_features,
    equal_rows,
    figure04_points,
    over_seeds,
    run_study,
    score_rows,
    share_cells,
    share_samples,
    stored_scores,
    table09,
    table10,
    task_coverage,
    toxicity_scorer,
)
from fac_synthesis.run.parameters import published, resolve_parameters
from fac_synthesis.tasks.scores import main_columns
from fac_synthesis.tasks.toxicity import TrainingSet, score_cell
from scipy import sparse

from fac_synthesis import missing_features_used as module

torch.set_num_threads(1)
SEEDS = [42, 43, 44]


def two_step(latents, ranks=3, text="text {r} of {i}"):
    return pd.DataFrame(
        [
            dict(method="two-step", latent=i, rank=r, text=text.format(i=i, r=r), label=1)
            for i in latents
            for r in range(ranks)
        ]
    )


# ---- features and samples


def test_smaller_shares_lie_within_larger_ones_and_seeds_differ(refused):
    missing = list(range(100, 130))
    few, more = (chosen_features(missing, p, 42) for p in (0.3, 0.6))
    assert len(few) == 9 and len(more) == 18 and set(few) < set(more) < set(missing)
    assert few == chosen_features(missing[::-1], 0.3, 42) != chosen_features(missing, 0.3, 43), (
        "the order of the list does not matter, the seed does"
    )
    assert set(chosen_features(missing, 1.0, 42)) == set(missing) and len(chosen_features([7], 0.1, 0)) == 1
    for share in (0, 1.2):
        assert "above 0 and at most 1" in refused(lambda: chosen_features(missing, share, 42))
    assert "no feature is missing" in refused(lambda: chosen_features([], 0.5, 42))


def test_n1_takes_the_best_of_each_feature_and_n2_fills_up(refused):
    samples = pd.concat([two_step(range(6)), two_step(range(6)).assign(method="one-step")], ignore_index=True)
    one = share_samples(samples, [1, 4], "N1")
    assert sorted(one.latent) == [1, 4] and set(one["rank"]) == {0} and set(one.method) == {"two-step"}
    fixed = share_samples(samples, [1, 4], "N2")
    assert len(fixed) == 6 and fixed["rank"].tolist() == [0, 0, 1, 1, 2, 2], (
        "as many as six features have at one each, best first"
    )
    assert len(share_samples(samples, [1], "N2")) == 3, "one feature has three samples and no more"
    assert len(share_samples(samples, [1, 4], "N1", samples_per_feature=2)) == 4
    assert share_samples(samples, [99], "N1").empty and share_samples(samples, [99], "N2").empty
    assert "N1 (samples per feature)" in refused(lambda: share_samples(samples, [1], "N3"))


def test_at_the_whole_share_both_ways_are_the_row_of_the_table():
    cells = share_cells(two_step(range(8)), list(range(10)), [0.5, 1.0], ["N1", "N2"], SEEDS)
    assert len(cells) == 12 and {c.n_features for c in cells} == {5, 10}
    whole = [c for c in cells if c.share == 1]
    assert all(sorted(c.samples.text) == sorted(whole[0].samples.text) and len(c.samples) == 8 for c in whole)
    assert Cell(0.3, "N1", 42, 1, two_step([])).row == "Baseline" and whole[0].row == "Ours"


# ---- training once


def study_scores():
    rows = lambda **more: pd.DataFrame(
        [dict(method=m, seed=s, **more) for m in ("Alpaca", "Ours") for s in SEEDS]
    )
    heads = lambda column: pd.concat(
        [rows(training=t, **{column: v}) for t, v in (("LoRA", 0.9), ("head only", 0.5))]
    )
    return {
        "toxicity": heads("auprc"),
        "reward": heads("average"),
        "instruction": rows(training="LoRA", wr=20.0, lc=21.0, se=1.5),
        "steering": pd.concat([rows(behavior=b, scr=v) for b, v in (("sycophancy", 0.2), ("survival", 0.4))]),
    }


def test_stored_scores_are_heads_for_toxicity_and_reward():
    stored = {study: stored_scores(study, scores)[43] for study, scores in study_scores().items()}
    assert stored == {
        "toxicity": {"toxicity_auprc": 50.0},
        "reward": {"reward_accuracy": 50.0},
        "instruction": {"instruction_lc": 21.0, "instruction_wr": 20.0, "instruction_sd": 1.5},
        "steering": {"sycophancy_scr": 20.0, "survival_scr": 40.0},
    }
    assert stored_scores("toxicity", study_scores()["toxicity"].query("method == 'Alpaca'")) == {}


class StandIn:
    "Just enough of a run."

    def __init__(self, inputs, **parameters):
        self.inputs_, self.left, self.keys = inputs, {}, []
        self.__dict__.update(parameters, profile="mini")

    def input(self, stage, name, cls=None):
        return self.inputs_[stage, name]

    def upstream(self, stage):
        return type(
            "Parameters",
            (),
            {**resolve_parameters(stage, "mini"), **self.inputs_.get((stage, "parameters"), {})},
        )

    def cached(self, name, compute, cls=None, key=None):
        self.keys.append((name, str(key)))
        return compute(None)

    def table(self, frame, name, caption=""):
        self.left[name] = frame
        return frame

    def figure(self, figure, name, data=None):
        self.left[name] = data
        plt.close(figure)
        return figure

    def finish(self, metrics=None):
        self.left["metrics"] = metrics
        return metrics


def counting_scorer(run, cells):
    "A stand-in for training: the score grows with the samples."
    return lambda group: {main_columns()[t].name: 10.0 + len(c.samples) for t, c in group.items()}


def test_the_whole_set_is_not_trained_again(monkeypatch):
    for study in STUDIES:
        monkeypatch.setitem(STUDIES, study, (*STUDIES[study][:2], counting_scorer))
    scores = study_scores()
    run = StandIn(
        {
            ("40_toxicity_detection", "scores"): scores["toxicity"],
            ("42_behavior_steering", "scores"): scores["steering"],
        }
    )
    groups = [
        {"toxicity": c}
        for c in share_cells(two_step(range(8)), list(range(8)), [0.5, 1.0], ["N1"], [42, 43, 77])
    ]
    rows = pd.DataFrame(run_study(run, "toxicity", groups))
    assert rows.set_index(["share", "seed"]).score.to_dict() == {
        (0.5, 42): 14,
        (0.5, 43): 14,
        (0.5, 77): 14,
        (1.0, 42): 50,
        (1.0, 43): 50,
        (1.0, 77): 18,
    }, "seed 77 has no score in the table, so it is trained"
    assert len(run.keys) == len(set(run.keys)) == 4 and set(rows.source) == {"trained here", "notebook 40"}
    pairs = [
        dict(sycophancy=a, survival=b)
        for a, b in zip(
            *(share_cells(two_step(range(n)), list(range(n)), [0.5, 1.0], ["N1"], [42]) for n in (8, 4))
        )
    ]
    steered = pd.DataFrame(run_study(run, "steering", pairs))
    assert steered.set_index(["task", "share"]).score.to_dict() == {
        ("sycophancy", 0.5): 14,
        ("survival", 0.5): 12,
        ("sycophancy", 1.0): 20,
        ("survival", 1.0): 40,
    }


def test_toxicity_is_trained_as_in_its_notebook():
    mean, kind = "dagger poison swindle stalk".split(), "bread garden piano stamp".split()
    records = lambda words, label: [
        Record(f"tell me about the {w} and the {v} .", label) for w in words for v in words + ["lamp", "door"]
    ]
    corpora = Corpora(
        {
            "seed": records(mean[:1], 1) + records(kind, 0),
            "full": records(mean, 1) + records(kind, 0),
            "test": [
                Record(f"what is a {w} for the {v} ?", int(w in mean))
                for w in mean + kind
                for v in ("lamp", "door")
            ],
        }
    )
    samples = two_step(range(3), ranks=1).assign(text=[f"tell me about the {w} ." for w in mean[1:]])
    words = word_tokenizer(corpora.texts("full") + corpora.texts("test"))
    torch.manual_seed(0)
    backbone = Backbone(tiny_model("llama", len(words), 32, 2), words, layer=1)
    run = StandIn(
        {
            ("02_corpora", "corpora_toxicity"): corpora,
            ("03_backbone", "backbone"): backbone,
            ("02_corpora", "tasks"): ["toxicity"],
            ("31_covered_samples", "samples_toxicity"): samples,
            ("32_baselines", "samples_toxicity"): samples.iloc[:0],
        }
    )
    cells = share_cells(samples, [0, 1, 2], [0.4, 1.0], ["N1"], [42]) + [
        Cell(0.1, "N1", 42, 1, samples.iloc[:0])
    ]
    scorer = toxicity_scorer(run, [{"toxicity": c} for c in cells])
    found = [scorer({"toxicity": c})["toxicity_auprc"] for c in cells]
    bench = module.open_toxicity_bench(
        run, run.upstream("40_toxicity_detection"), module.open_task("toxicity", True), corpora, samples
    )
    by_hand = [
        TrainingSet(
            "x", corpora.texts("seed") + c.samples.text.tolist(), [*corpora.labels("seed"), *c.samples.label]
        )
        for c in cells
    ]
    assert (
        found == [100 * score_cell(bench, rows, "head only", 42)["auprc"] for rows in by_hand]
        and len(set(found)) > 1
    )


# ---- tables


def made_up_rows():
    cells = share_cells(two_step(range(8)), list(range(10)), [0.3, 0.6, 0.9, 1.0], ["N1", "N2"], SEEDS)
    return pd.DataFrame(
        [
            row
            for c in cells
            for row in score_rows(
                {"toxicity": c}, {"toxicity_auprc": 40 + 10 * c.share + c.seed - 43}, "made up"
            )
        ]
    )


def test_table09_has_the_shares_of_the_paper_and_the_gain():
    table = table09(made_up_rows(), published("table09"))
    assert table.share.tolist() == [0.3, 0.6, 1.0] and table.published.tolist() == [45.6, 46.62, 49.12]
    assert (
        table.gain.tolist() == pytest.approx([0, 3, 7])
        and table.published_gain.tolist() == pytest.approx([0, 1.02, 3.52])
        and table.sd.tolist() == pytest.approx([1, 1, 1])
    )
    assert table.n_features.tolist() == [3, 6, 10] and table.seeds.tolist() == [3, 3, 3]


def test_figure04_keeps_all_shares_and_the_papers_points():
    points = figure04_points(made_up_rows(), "toxicity", published("figure04"))
    ours, theirs = (points[points.source == s] for s in ("this run", "published"))
    assert ours.share.tolist() == [30, 60, 90, 100] * 2 and theirs.share.tolist() == [30, 60, 90, 100] * 2
    assert theirs.n_samples.tolist() == [61, 124, 185, 200] + [200] * 4 and theirs.score.tolist()[0] == 45.6
    assert (over_seeds(made_up_rows()).seeds == 3).all()


def coverage_inputs(task="toxicity"):
    samples = (
        pd.concat([two_step([1, 2, 3], 2).assign(method="one-step"), two_step([1, 2], 2)], ignore_index=True)
        .iloc[[0, 6, 1, 2, 7, 3, 4, 8, 5, 9]]
        .reset_index(drop=True)
    )
    fires = lambda some: (lambda g: FeatureActivations(g, g))(
        sparse.csr_matrix(
            np.array(
                [
                    [2.0 * (l == i and (r == 0 or l == 3)) for i in range(5)]
                    for l, r in zip(some.latent, some["rank"])
                ],
                dtype=np.float32,
            )
        )
    )
    made = {m: fires(samples[samples.method == m]) for m in ("one-step", "two-step")}
    kept = module.coverage_by_delta(made, [1, 2, 3, 4], [1.0, 3.0]).assign(task=task)
    return {
        ("31_covered_samples", f"samples_{task}"): samples,
        ("31_covered_samples", "coverage_by_delta"): kept,
        ("23_coverage", f"missing_{task}"): pd.DataFrame(dict(latent=[1, 2, 3, 4])),
        **{("31_covered_samples", f"activations_{task}_{m}"): a for m, a in made.items()},
    }


def test_coverage_at_equal_numbers_of_samples():
    coverage = task_coverage(StandIn(coverage_inputs()), "toxicity").set_index(["method", "delta"])
    assert coverage.fac_missing[("one-step", 1.0)] == 0.75 and coverage.fac_equal[("one-step", 1.0)] == 0.5, (
        "three features with all samples, two with the first two"
    )
    assert (
        coverage.fac_missing[("two-step", 1.0)] == coverage.fac_equal[("two-step", 1.0)] == 0.5
        and coverage.n_equal.tolist() == [2] * 4
        and coverage.n_kept[("one-step", 1.0)] == 6
    )
    assert coverage.fac_equal[("one-step", 3.0)] == 0


def test_equal_rows_count_within_the_method():
    samples = coverage_inputs()["31_covered_samples", "samples_toxicity"]
    for method in ("one-step", "two-step"):
        own = samples[samples.method == method]
        assert own.iloc[equal_rows(samples, method, 2)][["latent", "rank"]].to_numpy().tolist() == [
            [1, 0],
            [2, 0],
        ]


def test_table10_is_matched_by_order_and_names_what_the_paper_lacks():
    coverage = pd.DataFrame(
        [
            dict(task=t, method=m, delta=d, missing=10, fac_missing=0.9, fac_equal=0.8, n_kept=9, n_equal=8)
            for t in ("survival", "toxicity")
            for m in ("one-step", "two-step")
            for d in (1.6, 1.7, 1.8, 1.9)
        ]
    )
    table = table10(coverage, published("table10"))
    assert list(dict.fromkeys(table.task)) == ["survival", "toxicity"] and len(table) == 16
    row = table[(table.task == "survival") & (table.delta == 1.7) & (table.method == "two-step")].iloc[0]
    assert (row.published_delta, row.published) == (1.0, 57.14) and row.difference == pytest.approx(
        80 - 57.14
    )
    assert (table[table.delta == 1.9].note == "not in the paper's table").all() and (
        table[table.delta < 1.9].note == ""
    ).all()


# ---- the Run cells


@pytest.mark.parametrize(
    "tasks",
    [["toxicity", "reward", "sycophancy", "survival", "instruction"], ["survival"]],
    ids=["five tasks", "one task"],
)
def test_the_run_cells_leave_tables_and_figures(tasks, monkeypatch):
    for study in STUDIES:
        monkeypatch.setitem(STUDIES, study, (*STUDIES[study][:2], counting_scorer))
    scores, inputs = study_scores(), {("02_corpora", "tasks"): tasks}
    for study, (stage, *_) in STUDIES.items():
        inputs[stage, "scores"] = scores[study]
    parts = [coverage_inputs(t) for t in tasks]
    for t, part in zip(tasks, parts):
        inputs |= part | {
            ("32_baselines", f"samples_{t}"): part["31_covered_samples", f"samples_{t}"].iloc[:0]
        }
    inputs["31_covered_samples", "coverage_by_delta"] = pd.concat(
        [p["31_covered_samples", "coverage_by_delta"] for p in parts], ignore_index=True
    )
    run = StandIn(
        inputs,
        seed=0,
        shares=[0.3, 0.6, 1.0],
        figure_shares=[0.3, 0.6, 0.9, 1.0],
        both_ways=["toxicity"],
        pictured="toxicity",
    )
    namespace = {**vars(module), "plt": plt, "sns": sns, "run": run}
    for cell in json.loads((Path(__file__).parent.parent / "nbs/51_missing_features.ipynb").read_text())[
        "cells"
    ]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "eval: false" in source and "run = start(" not in source:
            exec(compile(source, "51", "exec"), namespace)
    assert set(run.left) == {
        "table09",
        "table10",
        "figure04",
        "figure05",
        "shares_by_task",
        "metrics",
    } and set(run.left["table09"].task) == set(tasks)
    both = run.left["shares_by_task"].groupby("task").sampling.nunique().to_dict()
    assert both == {t: 1 + (t == "toxicity") for t in tasks}
