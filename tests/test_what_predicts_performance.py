"""Correlations of metrics with scores: by hand and by scipy, intervals, refusals, pictures, the Run cells."""

import itertools
import warnings

import matplotlib

matplotlib.use("agg")
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import fac_synthesis.questions.what_predicts_performance as module
from fac_synthesis.questions.what_predicts_performance import (
    CORRELATIONS,
    TRAININGS,
    Resampling,
    all_tasks_figure,
    correlation_table,
    fac_table,
    figure01,
    figure01_points,
    figure03,
    figure03_points,
    figure09,
    holm,
    label_points,
    least_squares,
    main_scores,
    main_training,
    method_draws,
    metric_by_method,
    metric_table,
    multiplicity,
    one_correlation,
    pearson,
    percentile_interval,
    permutation_p,
    read_correlations,
    read_leading_metric,
    score_by_method,
    spearman,
    why_none,
)
from fac_synthesis.run.artifacts import notebook_sources
from fac_synthesis.run.parameters import published
from fac_synthesis.run.stages import Run
from fac_synthesis.synthesis.covered_samples import GENERATED
from fac_synthesis.tasks.scores import COLUMNS

STAGE = "50_what_predicts_performance"
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
ON_CUT_SETS = FAC.removesuffix(", all texts")
FEW = Resampling(n_bootstrap=100)
TASKS = ["toxicity", "reward", "sycophancy", "survival", "instruction"]
rng = np.random.default_rng(3)
QUALITY = np.linspace(0, 1, 8)


def diversity_of(tasks, **metrics):
    "Metrics by task and set: FAC rises from method to method."
    metrics = {FAC: QUALITY, ON_CUT_SETS: QUALITY**2, **metrics}
    rows = []
    for task, (metric, values) in itertools.product(tasks, metrics.items()):
        for method, value in zip(METHODS, values):
            made = GENERATED.get(method, method)
            rows.append(dict(task=task, set=made, metric=metric.replace("_", " "), value=value))
    return pd.DataFrame(rows)


def scores_of(task, training, values, noise=0.5):
    "Scores by method (`values`) and seed."
    rows = []
    for method, value in zip(METHODS, values):
        about = dict(task=task, method=method, training=training)
        rows += [dict(about, seed=s, score=value + noise * rng.normal()) for s in SEEDS]
    return pd.DataFrame(rows)


# ---- coefficients


def test_coefficients_agree_with_scipy_ties_included():
    x, y = rng.normal(size=(5, 8)), rng.integers(0, 3, (5, 8)).astype(float)
    for i in range(5):
        assert pearson(x, y)[i] == pytest.approx(stats.pearsonr(x[i], y[i])[0])
        assert spearman(x, y)[i] == pytest.approx(stats.spearmanr(x[i], y[i])[0])


def test_no_spread_gives_nan_and_a_reason_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(pearson([0.1, 0.1, 0.1], [1, 2, 3]))
        assert np.isnan(spearman([1, 2, 3], [5, 5, 5]))
        found, drawn = one_correlation(np.full(4, 0.1), rng.normal(size=(4, 3)), method_draws(4, 50, 0), 0.95)
    assert found == dict(reason="the metric is the same for all methods") and np.isnan(drawn).all()
    assert why_none(np.arange(3.0), np.ones(3)) == "the score is the same for all methods"
    assert why_none(np.ones(2), np.ones(2)) == "2 methods with both numbers, a correlation needs three"
    assert why_none(np.ones(1), np.ones(1)).startswith("1 method with")
    assert "no value" in why_none(np.array([1, np.nan, 2]), np.arange(3.0))
    assert why_none(np.arange(3.0), np.arange(3.0)) == ""


def test_the_papers_points_and_line_recompute():
    scores, diversity = scores_of("toxicity", "LoRA", QUALITY), diversity_of(["toxicity"])
    paper = published("figure03")
    points = figure03_points(scores, diversity, "toxicity", "LoRA", METHODS, FAC, paper)
    paper = points[points.source == "published"]
    assert pearson(paper.fac, paper.score) == pytest.approx(0.9502, abs=1e-4)
    assert spearman(paper.fac, paper.score) == pytest.approx(0.9048, abs=1e-4)
    assert least_squares(paper.fac, paper.score) == pytest.approx((0.5684, 17.7996), abs=1e-3)
    assert points[points.source == "this run"].method.tolist() == METHODS, "sorted by FAC"
    assert np.isnan(least_squares([1, 1], [2, 3])).all()


# ---- intervals and many comparisons


def test_intervals_are_reproducible_and_hold_the_estimate(refused):
    draws = method_draws(8, 4000, 0)
    assert np.array_equal(draws, method_draws(8, 4000, 0)) and draws.max() == 7
    assert not np.array_equal(draws, method_draws(8, 4000, 1))
    y = QUALITY + 0.3 * rng.normal(size=8)
    wide, narrow = (percentile_interval(pearson(QUALITY[draws], y[draws]), level) for level in (0.95, 0.5))
    assert wide[0] < narrow[0] < pearson(QUALITY, y) < wide[1] <= 1
    mostly_undefined = np.array([np.nan, np.nan, 1.0])
    assert np.isnan(percentile_interval(mostly_undefined, 0.9)).all()
    assert "between 0 and 1" in refused(lambda: percentile_interval(np.ones(3), 95.0))


def test_permutation_p_is_exact():
    assert permutation_p(np.arange(4.0), np.arange(4.0)) == 2 / 24, "this order and its reverse"
    assert permutation_p(np.arange(9.0), np.arange(9.0)) < 0.001, "drawn orders beyond eight methods"


def test_holm_by_hand():
    corrected = holm(pd.Series([0.04, 0.01, np.nan, 0.03], index=list("abcd"))).round(6).to_dict()
    assert corrected == pytest.approx({"a": 0.06, "b": 0.03, "c": np.nan, "d": 0.06}, nan_ok=True)
    assert holm(pd.Series([0.9, 0.8])).tolist() == [1.0, 1.0]


# ---- tables


@pytest.fixture(scope="module")
def world():
    "Scores, metrics and correlations of three tasks; toxicity is trained in two ways."
    parts = [
        scores_of("toxicity", "LoRA", 40 + 20 * QUALITY),
        scores_of("toxicity", "head only", 30 + 5 * QUALITY),
        scores_of("survival", "steering", 10 * rng.normal(size=8)),
        scores_of("instruction", "LoRA", np.zeros(8), noise=0),
    ]
    scores = pd.concat(parts, ignore_index=True)
    metrics = {"Distinct-1": rng.normal(size=8), "Self-BLEU": -QUALITY, "MLS": np.full(8, 7.0)}
    diversity = diversity_of(["toxicity", "survival", "instruction"], **metrics)
    how = Resampling(n_bootstrap=500)
    return scores, diversity, correlation_table(scores, diversity, METHODS, FAC, how)


def test_a_predicting_metric_is_found_and_the_main_training_marked(world):
    scores, _, correlations = world
    assert list(correlations) == list(CORRELATIONS)
    table = correlations.set_index(["task", "training", "metric"])
    row = table.loc[("toxicity", "LoRA", FAC)]
    assert row.pearson > 0.99 and row.pearson_low > 0.9 and row.p < 0.001 and row.n == 8
    assert row.main and np.isnan(row.lead)
    assert not table.loc[("toxicity", "head only", FAC)].main
    assert main_training(scores, "toxicity") == "LoRA"
    mirrored = table.loc[("toxicity", "LoRA", "Self-BLEU")]
    assert mirrored.lead == pytest.approx(0, abs=1e-9), "the sign of a metric does not count against it"
    noise = table.loc[("toxicity", "LoRA", "Distinct-1")]
    assert noise.lead > 0 and noise.lead_low <= noise.lead_high
    constant = table.loc[("toxicity", "LoRA", "MLS")]
    assert constant.reason == "the metric is the same for all methods" and np.isnan(constant.lead)
    none = table.loc["instruction"]
    assert none.reason.str.contains("score is the same|metric is the same").all()
    assert none.pearson.isna().all()
    assert (correlations.p_holm.dropna() >= correlations.p.dropna()).all()


def test_methods_without_both_numbers_are_left_out_by_name(world):
    scores, diversity, _ = world
    fewer = scores[scores.method != "SAO"]
    few = correlation_table(fewer, diversity[diversity.set != "Magpie"], METHODS, FAC, FEW)
    assert set(few.n) == {6} and set(few.left_out) == {"Magpie, SAO"}
    none = correlation_table(scores, diversity[diversity.task == "toxicity"], METHODS, FAC, FEW)
    none = none[none.task == "survival"]
    assert len(none) == 1 and none.n.item() == 0 and "0 methods" in none.reason.item()


def test_an_unknown_fac_is_refused(world, refused):
    assert "no metric 'fac'" in refused(lambda: correlation_table(*world[:2], METHODS, "fac", FEW))


def test_tables_stand_beside_the_paper(world):
    correlations = world[2]
    table = fac_table(correlations, FAC, published("table08")).set_index(["task", "training"])
    assert table.pearson_published[("toxicity", "LoRA")] == 0.95
    assert table.spearman_published[("instruction", "LoRA")] == 0.88
    assert np.isnan(table.pearson_published[("toxicity", "head only")])
    survival = table.loc[("survival", "steering")]
    assert survival.pearson_difference == pytest.approx(survival.pearson - 0.79)
    assert table.note[("toxicity", "LoRA")] == ""
    assert table.note[("toxicity", "head only")] == "the paper's table has another training"
    every = metric_table(correlations, FAC, published("figure09")).set_index(["task", "training", "metric"])
    assert every.pearson_published[("toxicity", "LoRA", "Distinct-1")] == -0.58
    assert every.spearman_published[("toxicity", "LoRA", FAC)] == 0.90
    assert every.spearman_published[("toxicity", "LoRA", ON_CUT_SETS)] == 0.90
    assert every.pearson_published.drop(("toxicity", "LoRA")).isna().all()
    sentence = multiplicity(correlations)
    assert sentence.startswith(f"{len(correlations)} pairs")
    assert "n = 8 methods" in sentence and "expected by chance" in sentence


def test_another_leading_fac_has_the_papers_numbers(world):
    "The paper prints one FAC: it stands beside the one that leads, and beside no other."
    scores, diversity, _ = world
    other = diversity.replace({"metric": {ON_CUT_SETS: "Ours (FAC)"}})
    correlations = correlation_table(scores, other, METHODS, FAC, FEW)
    every = metric_table(correlations, FAC, published("figure09")).set_index(["task", "training", "metric"])
    assert np.isnan(every.pearson_published[("toxicity", "LoRA", "Ours (FAC)")])
    every = metric_table(correlations, "Ours (FAC), all texts", published("figure09"))
    assert every.set_index("metric").pearson_published["Ours (FAC)"].dropna().tolist() == [0.95]


def test_rows_of_ours_are_the_two_step_samples(world):
    scores, diversity, _ = world
    x = metric_by_method(diversity, "toxicity")
    assert x[FAC]["Ours"] == 1.0 and set(x.index) == set(METHODS)
    baseline = dict(task="toxicity", training="LoRA", method="Baseline", seed=42, score=1.0)
    y = score_by_method(pd.concat([scores, pd.DataFrame([baseline])]), "toxicity", "LoRA", METHODS)
    assert list(y.index) == METHODS and list(y.columns) == list(SEEDS)


def win_rates():
    rows = []
    for method, n, rate in (("Baseline", 0, 10.0), ("Ours", 50, 30.0)):
        about = dict(task="instruction", method=method, n=n)
        rows += [dict(about, seed=s, score=rate + s - 42) for s in (42, 43)]
    return pd.DataFrame(rows)


def test_figure01_divides_by_the_added_texts():
    points = figure01_points(win_rates(), published("figure01")).set_index("name")
    assert points.thousands["Ours"] == 0.05 and points.wr_per_1k["Ours"] == pytest.approx(610)
    assert np.isnan(points.wr_per_1k["Baseline"])
    assert points.wr_per_1k["GenQA"] == pytest.approx(0.0011, abs=1e-4)
    assert points.thousands["Ours (2.0k)"] == 2


# ---- pictures


def covers(texts):
    "Pairs of texts whose boxes overlap."
    boxes = {text.get_text(): text.get_window_extent() for text in texts}
    return [pair for pair in itertools.combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]


def test_names_of_a_crowd_cover_neither_each_other_nor_points():
    fig, ax = plt.subplots(figsize=(4, 3))
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    points = pd.DataFrame(dict(x=0.5 + 0.05 * np.cos(angles), y=0.5 + 0.05 * np.sin(angles)))
    points["name"] = [f"method {i}" for i in range(12)]
    ax.plot(points.x, points.y, "o")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    texts = label_points(ax, points, np.empty((0, 2)))
    at = ax.transData.transform(points[["x", "y"]])
    assert covers(texts) == [] and ax.get_xlim() == (0, 1)
    assert not any(text.get_window_extent().count_contains(at) for text in texts)
    plt.close(fig)


def test_pictures_have_their_names_apart_and_legends_off_the_data(world):
    scores, diversity, correlations = world
    points = figure03_points(scores, diversity, "toxicity", "LoRA", METHODS, FAC, published("figure03"))
    top = figure03(points, "toxicity", FAC).axes[:2]
    assert [len(ax.texts) for ax in top] == [8, 8] and [covers(ax.texts) for ax in top] == [[], []]
    names = figure01(figure01_points(win_rates(), published("figure01"))).axes[0].texts
    assert len(names) > 10 and covers(names) == []
    every = metric_table(correlations, FAC, published("figure09"))
    bars = figure09(every[(every.task == "toxicity") & (every.training == "LoRA")], "toxicity", FAC)
    heat = all_tasks_figure(correlations)
    for fig in (bars, heat, *map(plt.figure, plt.get_fignums())):
        assert not any(ax.get_legend() for ax in fig.axes)
    assert len(heat.axes[0].texts) == correlations[correlations.main].pearson.notna().sum()
    plt.close("all")


# ---- the scores of a run


def long_scores(tasks):
    "What `read_scores` says of these tasks: every column, four steps of ten points, percent."
    rows = []
    for column in COLUMNS.values():
        if column.task not in tasks:
            continue
        trainings = ["steering"] if column.name.endswith("_scr") else ["LoRA", "head only"]
        if column.task == "instruction":
            trainings = ["LoRA"]
        for training, (i, method) in itertools.product(trainings, enumerate(["Baseline", *METHODS])):
            about = dict(column=column.name, method=method, training=training, n=40)
            value = 10 * i if column.main else -1.0
            rows += [dict(about, seed=s, value=value + rng.random()) for s in SEEDS]
    return pd.DataFrame(rows)


def test_scores_of_a_task_are_its_main_column():
    scores = main_scores(long_scores(TASKS))
    assert list(scores.columns) == ["task", "method", "training", "seed", "score", "n"]
    assert list(dict.fromkeys(scores.task)) == TASKS and set(scores.training) == set(TRAININGS)
    means = scores[scores.method == "Ours"].groupby(["task", "training"]).score.mean()
    assert means.between(80, 82).all(), "other columns of a task do not enter"
    assert set(main_scores(long_scores(["toxicity"])).task) == {"toxicity"}, "the run has no other task"


@pytest.fixture
def results(tmp_path, monkeypatch):
    "A folder for results; pictures are small, to be quick."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    draw = matplotlib.figure.Figure.savefig

    def small(figure, file, **how):
        draw(figure, file, **{**how, "dpi": 30})

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", small)
    yield tmp_path / "mini"
    plt.close("all")


def new_run():
    values = dict(methods=METHODS, fac=FAC, n_bootstrap=200, level=0.95, pictured_task="toxicity")
    return Run(STAGE, dict(profile="mini", seed=0, **values))


def test_later_stages_read_the_correlations(results, world, refused):
    later = Run("91_claims", dict(profile="mini", seed=0))
    run = new_run()
    run.finish()
    assert list(read_correlations(later)) == list(CORRELATIONS) and read_correlations(later).empty
    run.keep("correlations", world[2])
    run.finish()
    pd.testing.assert_frame_equal(read_correlations(later), world[2], check_dtype=False)
    assert read_leading_metric(later) == FAC
    run.keep("correlations", world[2].drop(columns="lead"))
    run.finish()
    assert "no column 'lead'" in refused(lambda: read_correlations(later))


@pytest.mark.parametrize("tasks", [TASKS, ["survival"]], ids=["five tasks", "one task"])
def test_the_run_cells_leave_tables_and_figures(tasks, results, capsys):
    run, long = new_run(), long_scores(tasks)
    diversity = diversity_of(tasks, **{"Distinct-1": rng.normal(size=8)})
    known = dict(read_scores=lambda run: long, read_diversity=lambda run: diversity)
    namespace = vars(module) | known | dict(run=run)
    for source in notebook_sources(STAGE):
        if source.startswith("#| eval: false") and "start(" not in source:
            exec(compile(source, STAGE, "exec"), namespace)
    figures = ["figure03", "figure09", "correlations_by_task"] + ["figure01"] * ("instruction" in tasks)
    expected = {f"figures/{name}.{end}" for name in figures for end in ("png", "csv")}
    expected |= {f"tables/{t}.{end}" for t in ("table08", "metric_correlations") for end in ("csv", "md")}
    assert set(run.files) == expected
    assert "Holm" in (results / "tables/table08.md").read_text()
    table08 = pd.read_csv(results / "tables/table08.csv")
    assert set(table08.task) == set(tasks)
    metrics = namespace["metrics"]
    assert metrics["n_correlations"] == len(pd.read_csv(results / "tables/metric_correlations.csv"))
    assert set(run.outputs) == {"correlations"}
