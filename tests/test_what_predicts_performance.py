"""Correlations of metrics with scores over methods: numbers by hand and by scipy, intervals, refusals, and the Run cells on a stand-in run."""

import json, warnings
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from fac_synthesis.questions.what_predicts_performance import (
    TRAININGS,
    correlation_table,
    fac_table,
    figure01_points,
    figure03_points,
    holm,
    least_squares,
    long_scores,
    main_training,
    method_draws,
    metric_by_method,
    metric_table,
    multiplicity,
    one_correlation,
    pearson,
    percentile_interval,
    permutation_p,
    score_by_method,
    spearman,
    task_scores,
    why_none,
)
from fac_synthesis.run.parameters import published
from fac_synthesis.synthesis.covered_samples import GENERATED
from scipy import stats

from fac_synthesis import what_predicts_performance as module

METHODS = [
    "Alpaca",
    "Evol-Instruct",
    "Magpie",
    "CoT-Self-Instruct",
    "SAO",
    "Prismatic Synthesis",
    "SynAlign",
    "Ours",
]
FAC, SEEDS = "FAC of missing features, all texts", (42, 43, 44)
rng = np.random.default_rng(3)
QUALITY = np.linspace(0, 1, 8)


def diversity_of(tasks, **metrics):
    return pd.DataFrame(
        [
            dict(task=t, set=GENERATED.get(m, m), metric=k.replace("_", " "), value=v)
            for t in tasks
            for k, values in {FAC: QUALITY, FAC.removesuffix(", all texts"): QUALITY**2, **metrics}.items()
            for m, v in zip(METHODS, values)
        ]
    )


def scores_of(task, training, values, noise=0.5):
    return pd.DataFrame(
        [
            dict(task=task, method=m, training=training, seed=s, score=v + noise * rng.normal())
            for m, v in zip(METHODS, values)
            for s in SEEDS
        ]
    )


# ---- coefficients


def test_coefficients_agree_with_scipy_ties_included():
    x, y = rng.normal(size=(5, 8)), rng.integers(0, 3, (5, 8)).astype(float)
    for i in range(5):
        assert pearson(x, y)[i] == pytest.approx(stats.pearsonr(x[i], y[i])[0])
        assert spearman(x, y)[i] == pytest.approx(stats.spearmanr(x[i], y[i])[0])


def test_no_spread_gives_nan_and_a_reason_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(pearson([0.1, 0.1, 0.1], [1, 2, 3])) and np.isnan(spearman([1, 2, 3], [5, 5, 5]))
        found, drawn = one_correlation(np.full(4, 0.1), rng.normal(size=(4, 3)), method_draws(4, 50, 0), 0.95)
    assert found == dict(reason="the metric is the same for all methods") and np.isnan(drawn).all()
    assert why_none(
        np.arange(3.0), np.ones(3)
    ) == "the score is the same for all methods" and "a correlation needs three" in why_none(
        np.ones(2), np.ones(2)
    )
    assert "no value" in why_none(np.array([1, np.nan, 2]), np.arange(3.0))


def test_the_papers_points_and_line_recompute():
    points = figure03_points(
        scores_of("toxicity", "LoRA", QUALITY),
        diversity_of(["toxicity"]),
        "toxicity",
        "LoRA",
        METHODS,
        FAC,
        published("figure03"),
    )
    paper = points[points.source == "published"]
    assert pearson(paper.fac, paper.score) == pytest.approx(0.9502, abs=1e-4) and spearman(
        paper.fac, paper.score
    ) == pytest.approx(0.9048, abs=1e-4)
    assert least_squares(paper.fac, paper.score) == pytest.approx((0.5684, 17.7996), abs=1e-3)
    assert points[points.source == "this run"].method.tolist() == METHODS, "sorted by FAC"
    assert np.isnan(least_squares([1, 1], [2, 3])).all()


# ---- intervals and many comparisons


def test_intervals_are_reproducible_and_hold_the_estimate(refused):
    draws = method_draws(8, 4000, 0)
    assert (
        np.array_equal(draws, method_draws(8, 4000, 0))
        and not np.array_equal(draws, method_draws(8, 4000, 1))
        and draws.max() == 7
    )
    y = QUALITY + 0.3 * rng.normal(size=8)
    wide, narrow = (percentile_interval(pearson(QUALITY[draws], y[draws]), level) for level in (0.95, 0.5))
    assert wide[0] < narrow[0] < pearson(QUALITY, y) < wide[1] <= 1
    assert np.isnan(percentile_interval(np.array([np.nan, np.nan, 1.0]), 0.9)).all(), (
        "most draws undefined: no interval"
    )
    assert "between 0 and 1" in refused(lambda: percentile_interval(np.ones(3), 95.0))


def test_permutation_p_is_exact():
    assert permutation_p(np.arange(4.0), np.arange(4.0)) == 2 / 24, "this order and its reverse"
    assert permutation_p(np.arange(9.0), np.arange(9.0)) < 0.001, "drawn orders beyond eight methods"


def test_holm_by_hand():
    assert holm(pd.Series([0.04, 0.01, np.nan, 0.03], index=list("abcd"))).round(
        6
    ).to_dict() == pytest.approx({"a": 0.06, "b": 0.03, "c": np.nan, "d": 0.06}, nan_ok=True)
    assert holm(pd.Series([0.9, 0.8])).tolist() == [1.0, 1.0]


# ---- tables


@pytest.fixture(scope="module")
def world():
    scores = pd.concat(
        [
            scores_of("toxicity", "LoRA", 40 + 20 * QUALITY),
            scores_of("toxicity", "head only", 30 + 5 * QUALITY),
            scores_of("survival", "steering", 10 * rng.normal(size=8)),
            scores_of("instruction", "LoRA", np.zeros(8), noise=0),
        ],
        ignore_index=True,
    )
    diversity = diversity_of(
        ["toxicity", "survival", "instruction"],
        **{"Distinct-1": rng.normal(size=8), "Self-BLEU": -QUALITY, "MLS": np.full(8, 7.0)},
    )
    return scores, diversity, correlation_table(scores, diversity, METHODS, FAC, 500)


def test_a_predicting_metric_is_found_and_the_main_training_marked(world):
    table = world[2].set_index(["task", "training", "metric"])
    row = table.loc[("toxicity", "LoRA", FAC)]
    assert (
        row.pearson > 0.99
        and row.pearson_low > 0.9
        and row.p < 0.001
        and row.n == 8
        and row.main
        and np.isnan(row.lead)
    )
    assert (
        not table.loc[("toxicity", "head only", FAC)].main and main_training(world[0], "toxicity") == "LoRA"
    )
    assert table.loc[("toxicity", "LoRA", "Self-BLEU")].lead == pytest.approx(0, abs=1e-9), (
        "the sign of a metric does not count against it"
    )
    assert (
        table.loc[("toxicity", "LoRA", "Distinct-1")].lead > 0
        and table.loc[("toxicity", "LoRA", "MLS")].reason == "the metric is the same for all methods"
    )
    assert (
        table.loc["instruction"].reason.str.contains("score is the same|metric is the same")
    ).all() and table.loc["instruction"].pearson.isna().all()
    assert (world[2].p_holm.dropna() >= world[2].p.dropna()).all()


def test_methods_without_both_numbers_are_left_out_by_name(world):
    scores, diversity, _ = world
    few = correlation_table(
        scores[scores.method != "SAO"], diversity[(diversity.set != "Magpie")], METHODS, FAC, 100
    )
    assert set(few.n) == {6} and set(few.left_out) == {"Magpie, SAO"}
    none = correlation_table(scores, diversity[diversity.task == "toxicity"], METHODS, FAC, 100).query(
        "task == 'survival'"
    )
    assert len(none) == 1 and none.n.item() == 0 and "0 methods" in none.reason.item()


def test_an_unknown_fac_is_refused(world, refused):
    assert "no metric 'fac'" in refused(lambda: correlation_table(*world[:2], METHODS, "fac", 100))


def test_tables_stand_beside_the_paper(world):
    table = fac_table(world[2], FAC, published("table08")).set_index(["task", "training"])
    assert (
        table.pearson_published[("toxicity", "LoRA")] == 0.95
        and table.spearman_published[("instruction", "LoRA")] == 0.88
        and np.isnan(table.pearson_published[("toxicity", "head only")])
    )
    assert table.pearson_difference[("survival", "steering")] == pytest.approx(
        table.pearson[("survival", "steering")] - 0.79
    )
    every = metric_table(world[2], FAC, published("figure09")).set_index(["task", "training", "metric"])
    assert (
        every.pearson_published[("toxicity", "LoRA", "Distinct-1")] == -0.58
        and every.spearman_published[("toxicity", "LoRA", FAC)] == 0.90
    )
    assert every.pearson_published.drop(("toxicity", "LoRA")).isna().all()
    sentence = multiplicity(world[2])
    assert (
        sentence.startswith(f"{len(world[2])} pairs")
        and "n = 8 methods" in sentence
        and "expected by chance" in sentence
    )


def test_rows_of_ours_are_the_two_step_samples(world):
    x = metric_by_method(world[1], "toxicity")
    assert x[FAC]["Ours"] == 1.0 and set(x.index) == set(METHODS)
    y = score_by_method(
        pd.concat(
            [
                world[0],
                pd.DataFrame([dict(task="toxicity", training="LoRA", method="Baseline", seed=42, score=1.0)]),
            ]
        ),
        "toxicity",
        "LoRA",
        METHODS,
    )
    assert list(y.index) == METHODS and list(y.columns) == list(SEEDS)


def test_figure01_divides_by_the_added_texts():
    own = pd.DataFrame(
        [
            dict(method=m, seed=s, n_samples=n, wr=w + s - 42)
            for m, n, w in (("Baseline", 0, 10.0), ("Ours", 50, 30.0))
            for s in (42, 43)
        ]
    )
    points = figure01_points(own, published("figure01")).set_index("name")
    assert (
        points.thousands["Ours"] == 0.05
        and points.wr_per_1k["Ours"] == pytest.approx(610)
        and np.isnan(points.wr_per_1k["Baseline"])
    )
    assert (
        points.wr_per_1k["GenQA"] == pytest.approx(0.0011, abs=1e-4) and points.thousands["Ours (2.0k)"] == 2
    )


# ---- the scores of a run


def stage_scores():
    rows = [
        (m, s, 0.1 * i + 0.01 * rng.random()) for i, m in enumerate(["Baseline", *METHODS]) for s in SEEDS
    ]
    frame = lambda **more: pd.DataFrame(
        [
            dict(method=m, seed=s, **{k: v(x) if callable(v) else v for k, v in more.items()})
            for m, s, x in rows
        ]
    )
    value = lambda x: x
    return {
        "40_toxicity_detection": pd.concat(
            [frame(training=t, auprc=value, n_toxic=9, n_safe=9) for t in ("LoRA", "head only")]
        ),
        "41_reward_modeling": frame(training="LoRA", average=value, n_pairs=9),
        "42_behavior_steering": pd.concat(
            [frame(behavior=b, scr=value) for b in ("sycophancy", "survival-instinct")]
        ),
        "43_instruction_following": frame(
            training="LoRA", wr=lambda x: 100 * x, lc=0.0, se=1.0, n_samples=40
        ),
    }


class StandIn:
    "Just enough of a run."

    def __init__(self, inputs, **parameters):
        self.inputs_, self.left = inputs, {}
        self.__dict__.update(parameters, profile="mini")

    def input(self, stage, name, cls=None):
        return self.inputs_[stage, name]

    def cached(self, name, compute, cls=None, key=None):
        return compute(None)

    def table(self, frame, name, caption=""):
        self.left[name] = (frame, caption)
        return frame

    def figure(self, figure, name, data=None):
        self.left[name] = data
        plt.close(figure)
        return figure

    def finish(self, metrics=None):
        self.left["metrics"] = metrics
        return metrics


def stand_in(tasks, **more):
    inputs = {
        ("02_corpora", "tasks"): tasks,
        ("33_diversity_metrics", "diversity"): diversity_of(tasks, **{"Distinct-1": rng.normal(size=8)}),
        **{(stage, "scores"): s for stage, s in stage_scores().items()},
    }
    return StandIn(
        inputs, methods=METHODS, fac=FAC, n_bootstrap=200, level=0.95, seed=0, pictured="toxicity", **more
    )


TASKS = ["toxicity", "reward", "sycophancy", "survival", "instruction"]


def test_task_scores_are_one_table_in_percent():
    scores = task_scores(stand_in(TASKS))
    assert (
        list(scores.columns) == ["task", "method", "training", "seed", "score"]
        and list(dict.fromkeys(scores.task)) == TASKS
    )
    means = scores[(scores.method == "Ours")].groupby(["task", "training"]).score.mean()
    assert means.between(80, 82).all() and set(scores.training) == set(TRAININGS)
    assert set(task_scores(stand_in(["toxicity"])).task) == {"toxicity"}, "the run has no other task"


def test_a_missing_column_is_named(refused):
    assert "no column 'wr'" in refused(
        lambda: long_scores("43_instruction_following", pd.DataFrame(dict(method=["Ours"], seed=1)))
    )


def run_cells(path, namespace):
    "Executes the cells that only a run executes, but the one that starts it."
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "eval: false" in source and "run = start(" not in source:
            exec(compile(source, path.stem, "exec"), namespace)


@pytest.mark.parametrize("tasks", [TASKS, ["survival"]], ids=["five tasks", "one task"])
def test_the_run_cells_leave_tables_and_figures(tasks, monkeypatch, capsys):
    run = stand_in(tasks)
    run_cells(
        Path(__file__).parent.parent / "nbs/50_what_predicts_performance.ipynb",
        {**vars(module), "plt": plt, "sns": sns, "run": run},
    )
    expected = {
        "table08",
        "metric_correlations",
        "figure03",
        "figure09",
        "correlations_by_task",
        "metrics",
    } | ({"figure01"} if "instruction" in tasks else set())
    assert set(run.left) == expected and "Holm" in run.left["table08"][1]
    assert set(run.left["table08"][0].task) >= set(tasks) and run.left["metrics"]["n_correlations"] == len(
        run.left["metric_correlations"][0]
    )
