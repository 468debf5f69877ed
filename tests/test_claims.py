"""Verdicts on small made-up evidence: nothing here comes from a run."""

import itertools

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fac_synthesis.data.corpora import PLANTED_NOTE
from fac_synthesis.questions.missing_features import read_share_coverage, read_share_scores
from fac_synthesis.questions.what_predicts_performance import read_correlations, read_leading_metric
from fac_synthesis.results import claims
from fac_synthesis.results.claims import (
    FAILS,
    FIXED,
    HOLDS,
    ONE_EACH,
    OPEN,
    REASONS,
    UNTESTED,
    VERDICTS,
    Difference,
    Evidence,
    Interval,
    Judged,
    NotTestable,
    all_of,
    best_method,
    beyond,
    claims_page,
    coverage_never_rises,
    covering_beats_repeating,
    decide,
    diversity_fails,
    fac_leads,
    fac_predicts,
    fac_predicts_elsewhere,
    forest_plot,
    items_table,
    judge,
    lora_beats_head,
    lowest_threshold_best,
    more_samples_help_less,
    only_ours_climbs,
    paired,
    read_verdicts,
    seeds_matter_little,
    shares_rise,
    standard_exceeds_robust,
    threshold_counts,
    two_steps_cover_more,
    weakest,
)
from fac_synthesis.run.artifacts import notebook_sources
from fac_synthesis.run.parameters import UserError, published
from fac_synthesis.run.stages import Run
from fac_synthesis.tasks.scores import COLUMNS, main_columns
from fac_synthesis.tasks.toxicity import read_by_delta, read_by_samples

STAGE, CLAIMS, SEEDS = "91_claims", published("claims"), (42, 43, 44)
NOISE = {"Baseline": (0, 1, 2), "Ours": (1, 2, 0), "Full Dataset": (2, 0, 1)}
MEANS = {"Baseline": 40, "Magpie": 45, "Full Dataset": 50, "Ours": 60}
BOTH = ("LoRA", "head only")
SCORED = dict(  # column -> its trainings
    toxicity_auprc=BOTH,
    reward_accuracy=BOTH,
    sycophancy_scr=("steering",),
    survival_scr=("steering",),
    instruction_lc=("LoRA",),
    instruction_wr=("LoRA",),
)


def make_scores(means=MEANS, columns=tuple(SCORED)):
    "All scores in one layout: means per method, three seeds one point apart; SD is 9 throughout."
    rows = []
    for column in columns:
        for training, (method, mean) in itertools.product(SCORED[column], means.items()):
            about = dict(column=column, method=method, training=training, n=50)
            noise = NOISE.get(method, (0, 0, 0))
            rows += [dict(about, seed=s, value=mean + noise[i] - 1) for i, s in enumerate(SEEDS)]
    for method, seed in itertools.product(means, SEEDS):
        about = dict(column="instruction_sd", method=method, training="LoRA", n=50)
        rows.append(dict(about, seed=seed, value=9.0))
    return pd.DataFrame(rows)


def make_coverage(
    one=(28, 16, 12),
    two=(33, 18, 16),
    missing=40,
    deltas=(8.0, 10.0, 12.0),
    task="toxicity",
    more=0,
):
    "Activated features of both ways by threshold; `more` by all kept samples of one-step."
    rows = []
    for method, counts, beyond_equal in (("one-step", one, more), ("two-step", two, 0)):
        about = dict(task=task, method=method, missing=missing, n_kept=80, n_equal=75)
        for delta, n in zip(deltas, counts):
            shares = dict(fac_missing=(n + beyond_equal) / missing, fac_equal=n / missing)
            rows.append(dict(about, delta=delta, activated=n, **shares))
    return pd.DataFrame(rows)


def make_shares(columns=tuple(SCORED), each=(45.6, 46.6, 49.1), filled=(46.1, 47.0, 49.1), spread=0.02):
    "Scores by share of the missing features, in both ways; seeds differ by `spread`."
    rows = []
    for column, (way, values) in itertools.product(columns, ((ONE_EACH, each), (FIXED, filled))):
        for i, (share, value) in enumerate(zip((0.3, 0.6, 1.0), values)):
            about = dict(column=column, sampling=way, share=share)
            for j, seed in enumerate(SEEDS):
                rows.append(dict(about, seed=seed, score=value + spread * ((i + j) % 3)))
    return pd.DataFrame(rows)


OTHER_METRICS = {
    "Distinct-1": -0.6,
    "Distinct-2": -0.4,
    "POS tag Distinct-2": -0.6,
    "MLS": -0.3,
    "Trace": 0.3,
    "Pairwise cosine distance": 0.3,
    "Semantic entropy": 0.1,
}


def make_correlations(fac=0.95, half=0.03, **others):
    "FAC in every task, and `others` (r by metric); the intervals have half-width `half`."
    rows = []
    for task, (metric, r) in itertools.product(
        main_columns(), {"FAC": fac, **OTHER_METRICS, **others}.items()
    ):
        lead = abs(fac) - abs(r)
        row = dict(task=task, metric=metric, main=True, n=8)
        for name, value in (("pearson", r), ("spearman", r), ("lead", lead)):
            row |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
        rows.append(row)
    return pd.DataFrame(rows)


CLIMBS = {"Ours": 0.2, "Magpie": -0.1, "SAO": 0.0}
MULTIPLIERS = (-1.0, -0.5, 0.0, 0.5, 1.0)


def make_curves(climbs=CLIMBS, gap=0.2):
    "Accuracies by multiplier: robust rises by `climbs` per unit, the standard one lies `gap` above."
    behaviors, rows = ("sycophancy", "survival-instinct"), []
    for (method, climb), behavior, x in itertools.product(climbs.items(), behaviors, MULTIPLIERS):
        about = dict(method=method, behavior=behavior, options="two", multiplier=x)
        for i, seed in enumerate(SEEDS):
            accuracy = 0.4 + gap + climb * x + (i + (x > 0)) % 3 / 1e3
            rows.append(dict(about, seed=seed, accuracy=accuracy, robust=0.4 + climb * x + i / 1e3))
    return pd.DataFrame(rows)


def curve(x, values, n_samples, spread=0.02, **counts):
    "`values` per x in percent; seeds differ by `spread` in another order at every x."
    rows = []
    for i, (k, value) in enumerate(values.items()):
        n = n_samples[i]
        known = {x: k, "n_samples": n, **{name: column[i] for name, column in counts.items()}}
        des = value / np.log10(n) if n > 1 else np.nan
        for j, seed in enumerate(SEEDS):
            rows.append(dict(known, seed=seed, auprc=(value + spread * ((i + j) % 3)) / 100, des=des))
    return pd.DataFrame(rows)


DELTAS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
FIGURE06 = (49.12, 46.85, 44.20, 45.47, 45.98, 43.23)  # AUPRC as published
MISSING = (214, 182, 108, 110, 112, 60)  # as published


def make_by_delta(values=FIGURE06, missing=MISSING, n_samples=(200, 170, 100, 100, 100, 50), **more):
    "Scores by threshold."
    return curve("delta", dict(zip(DELTAS, values)), n_samples, missing=missing, **more)


def make_by_samples(values=(60.0, 62.0, 63.0, 63.5, 63.9), n_samples=(20, 40, 60, 80, 100), **more):
    "Scores by samples per feature."
    return curve("samples_per_feature", dict(enumerate(values, 1)), n_samples, **more)


def made_up():
    "A frame for every part of the evidence."
    return dict(
        scores=make_scores(),
        coverage=make_coverage(),
        by_delta=make_by_delta(),
        by_samples=make_by_samples(),
        by_share=make_shares(),
        correlations=make_correlations(),
        curves=make_curves(),
    )


def evidence(**parts):
    return Evidence(**(made_up() | parts))


def told(message):
    return pytest.raises(NotTestable, match=message)


# ---- Intervals


def test_student_by_hand():
    d = paired(pd.Series({1: 3.0, 2: 4.0, 3: 5.0}), pd.Series({3: 1.0, 2: 1.0, 1: 1.0}))
    assert np.allclose([d.mean, d.low, d.high], [3, 3 - 4.302653 / 3**0.5, 3 + 4.302653 / 3**0.5])


def test_bootstrap_of_three_seeds_is_their_range_and_repeats():
    a, b = pd.Series({1: 3.0, 2: 4.0, 3: 5.0}), pd.Series(1.0, index=[1, 2, 3])
    how = Interval("bootstrap", 0.95, 2000, 1)
    assert (paired(a, b, how).low, paired(a, b, how).high) == (2.0, 4.0)
    assert paired(a, b, how) == paired(a, b, how)


def test_only_common_seeds_count():
    assert paired(pd.Series({1: 1.0, 2: 2.0, 9: 99.0}), pd.Series({1: 0.0, 2: 1.0, 3: 5.0})).mean == 1.0
    with pytest.raises(NotTestable, match="there are 1"):
        paired(pd.Series({1: 1.0, 2: np.nan}), pd.Series({1: 0.0, 2: 1.0}))


@pytest.mark.parametrize(
    "how, words", [(Interval("exact"), "student or bootstrap"), (Interval(level=95.0), "between 0 and 1")]
)
def test_wrong_interval(how, words):
    with pytest.raises(UserError, match=words):
        paired(pd.Series([1.0, 2.0]), pd.Series([0.0, 0.0]), how)


def test_three_valued_and():
    assert (all_of([HOLDS, HOLDS]), all_of([HOLDS, OPEN]), all_of([OPEN, FAILS])) == (HOLDS, OPEN, FAILS)
    undecided = dict(a=Difference(1, 0.5, 2), b=Difference(1, -1, 3), c=Difference(2, -2, 4))
    assert weakest(undecided) == "c", "the lowest of those that decide nothing"
    assert weakest(dict(a=Difference(-1, -3, 1), b=Difference(-1, -2, -0.5))) == "b", "a failure weighs more"


# ---- Claims


def test_every_claim_has_one_verdict_or_one_reason():
    assert sorted([*VERDICTS, *REASONS]) == CLAIMS.id.tolist()
    judged = judge(CLAIMS, evidence())
    assert judged.id.tolist() == CLAIMS.id.tolist() and judged.evidence.ne("").all()
    assert judged.verdict.isin([HOLDS, FAILS, OPEN, UNTESTED]).all()
    assert set(judged.id[judged.verdict != UNTESTED]) == set(VERDICTS)
    assert set(judged.verdict[judged.id.isin(list(VERDICTS))]) <= {HOLDS, OPEN}
    untested = judged[judged.verdict == UNTESTED]
    assert (untested.comparisons == 0).all() and untested[["mean", "low", "high"]].isna().all(axis=None)
    decided = judged[judged.comparisons > 0]
    assert (decided.low <= decided["mean"]).all() and (decided["mean"] <= decided.high).all()
    counted = judged[(judged.verdict != UNTESTED) & (judged.comparisons == 0)]
    assert set(counted.id) == {"C15", "C16"} and counted["mean"].isna().all(), "counts have no interval"


def test_without_results_nothing_is_claimed():
    judged = judge(CLAIMS, Evidence())
    assert (judged.verdict == UNTESTED).all() and judged.evidence.ne("").all()
    columns_alone = Evidence(**{name: frame.head(0) for name, frame in made_up().items()})
    assert (judge(CLAIMS, columns_alone).verdict == UNTESTED).all()


def test_a_claim_nobody_wrote_a_test_for():
    judged = judge(CLAIMS.head(1).assign(id="C99"), Evidence())
    assert judged.evidence.tolist() == ["no test is written for this claim"]


def test_decide_counts_and_names():
    difference = Difference(1, 0.5, 2)
    one = decide({"a": difference}, "told", ["b"])
    assert one == Judged(HOLDS, "told; a +1.00 [+0.50, +2.00]; no value for b", 1, difference)
    many = decide({str(i): Difference(i, i - 1.5, i + 1.5) for i in range(-2, 3)}, "")
    assert many.verdict == FAILS and many.comparisons == 5
    assert "1 above zero, 3 undecided, 1 below; deciding: -2" in many.evidence
    assert many.deciding == Difference(-2, -3.5, -0.5)
    assert decide({"a": Difference(1, 0.5, 2)}, "", also=[OPEN]).verdict == OPEN
    with told("no value for x, y"):
        decide({}, "", ["x", "y"])


@pytest.mark.parametrize("full, verdict", [(40, HOLDS), (59.5, OPEN), (70, FAILS)])
@pytest.mark.parametrize(
    "column, training",
    [
        ("toxicity_auprc", "LoRA"),
        ("reward_accuracy", "head only"),
        ("survival_scr", "steering"),
        ("instruction_wr", "LoRA"),
    ],
)
def test_best_method_flips(full, verdict, column, training):
    known = evidence(scores=make_scores(MEANS | {"Full Dataset": full}))
    result = best_method(known, [column], (training,))
    assert result.verdict == verdict and result.comparisons == 3
    assert "Ours minus Baseline" in result.evidence
    assert f"{HOLDS} if Full Dataset, which has more samples, is left out" in result.evidence
    fair = best_method(known, [column], (training,), equal_budgets=True)
    assert fair.verdict == HOLDS and fair.comparisons == 2
    assert f"{verdict} if Full Dataset, which has more samples, is counted in" in fair.evidence


def test_best_method_over_several_columns_and_with_gaps():
    both = ["toxicity_auprc", "reward_accuracy"]
    assert best_method(evidence(), both).comparisons == 6
    part = best_method(evidence(scores=make_scores(columns=["toxicity_auprc"])), both)
    assert part.verdict == HOLDS and "no value for Ours and others in reward accuracy" in part.evidence
    scores = make_scores()
    scores.loc[(scores.method == "Magpie") & (scores.column == "toxicity_auprc"), "value"] = np.nan
    lost = best_method(evidence(scores=scores), both[:1])
    assert "no value for Magpie in toxicity AUPRC" in lost.evidence
    with told("Ours and others in toxicity AUPRC"):
        best_method(evidence(scores=make_scores({"Ours": 60})), both[:1])
    with told("Ours and others in toxicity AUPRC"):
        best_method(evidence(scores=make_scores({"Baseline": 60})), both[:1])


@pytest.mark.parametrize("shift, verdict", [(10, HOLDS), (0, OPEN), (-10, FAILS)])
def test_lora_against_head_flips(shift, verdict):
    scores = make_scores()
    lora = scores.training == "LoRA"
    scores.loc[lora, "value"] += shift + 0.1 * (scores.seed[lora] - 43)
    result = lora_beats_head(evidence(scores=scores))
    assert result.verdict == verdict and result.comparisons == 2


def test_two_steps_flip():
    result = two_steps_cover_more(evidence())
    assert result.verdict == HOLDS
    for words in ("28 → 33 (δ 8)", "40 missing", "75 samples", "3 of 3 cells"):
        assert words in result.evidence
    tie = two_steps_cover_more(evidence(coverage=make_coverage(two=(28, 16, 12))))
    assert tie.verdict == HOLDS, "a tie is at least as many"
    another_task = pd.concat([make_coverage(), make_coverage(two=(33, 18, 11), task="reward")])
    assert two_steps_cover_more(evidence(coverage=another_task)).verdict == FAILS
    kept = two_steps_cover_more(evidence(coverage=make_coverage(more=10)))
    assert kept.verdict == HOLDS and "in 0 of 3)" in kept.evidence, "all kept samples are not equally many"
    with told("both"):
        two_steps_cover_more(evidence(coverage=make_coverage().query("method != 'one-step'")))
    low, high = make_coverage(deltas=(1, 2, 3)), make_coverage(deltas=(4, 5, 6))
    apart = pd.concat([low.query("method == 'one-step'"), high.query("method == 'two-step'")])
    with told("at one threshold"):
        two_steps_cover_more(evidence(coverage=apart))


def test_coverage_over_thresholds_flips():
    assert coverage_never_rises(evidence()).verdict == HOLDS
    assert coverage_never_rises(evidence(coverage=make_coverage(one=(28, 29, 12)))).verdict == FAILS
    with told("one threshold"):
        coverage_never_rises(evidence(coverage=make_coverage((4,), (5,), deltas=(3.0,))))


@pytest.mark.parametrize(
    "change, verdict",
    [
        ({}, HOLDS),
        (dict(missing=(214, 182, 108, 110, 130, 60)), FAILS),
        (dict(missing=(60, 108, 110, 112, 182, 214)), FAILS),
        (dict(values=(49, 47, 46, 45, 44, 43)), FAILS),
        (dict(spread=3.0), OPEN),
    ],
)
def test_threshold_counts_flip(change, verdict):
    assert threshold_counts(evidence(by_delta=make_by_delta(**change))).verdict == verdict


@pytest.mark.parametrize(
    "change, verdict",
    [
        ({}, HOLDS),
        (dict(values=(43, 47, 46, 45, 44, 49)), FAILS),
        (dict(spread=3.0), OPEN),
        (dict(values=(49, 47, 46, 45, 42, 43)), FAILS),
    ],
)
def test_lowest_threshold_flips(change, verdict):
    result = lowest_threshold_best(evidence(by_delta=make_by_delta(**change)))
    assert result.verdict == verdict and result.comparisons == 9


def test_thresholds_that_say_nothing():
    five = make_by_delta().query("delta < 4")
    without_samples = make_by_delta(n_samples=(9, 9, 9, 9, 0, 0))
    nothing_missing = make_by_delta(missing=(9, 8, 4, 4, 4, 0), n_samples=(9, 8, 4, 4, 4, 0))
    for judge_one in (threshold_counts, lowest_threshold_best):
        with told("this run has 5"):
            judge_one(evidence(by_delta=five))
        with told(r"δ 2 \(112 missing\), 4 \(60 missing\)"):
            judge_one(evidence(by_delta=without_samples))
        with told(r"4 \(0 missing\)"):
            judge_one(evidence(by_delta=nothing_missing))


@pytest.mark.parametrize(
    "change, verdict",
    [
        ({}, HOLDS),
        (dict(values=(60, 62, 61, 63, 64)), FAILS),
        (dict(spread=2.0), OPEN),
        (dict(values=(60, 90, 140, 200, 300)), FAILS),
    ],
)
def test_more_samples_flip(change, verdict):
    assert more_samples_help_less(evidence(by_samples=make_by_samples(**change))).verdict == verdict


def test_one_number_of_samples_says_nothing():
    result = more_samples_help_less(evidence(by_samples=make_by_samples(n_samples=(20, 40, 60, 80, 80))))
    assert "for 1, 2, 3, 4 samples per feature" in result.evidence and result.comparisons == 6
    with told("fewer than two"):
        more_samples_help_less(evidence(by_samples=make_by_samples().query("samples_per_feature == 1")))


@pytest.mark.parametrize(
    "change, verdict", [({}, HOLDS), (dict(each=(47.6, 46.6, 49.1)), FAILS), (dict(spread=2.0), OPEN)]
)
def test_shares_flip(change, verdict):
    known = evidence(by_share=make_shares(**change))
    result = shares_rise(known, ["toxicity_auprc", "survival_scr"], (ONE_EACH, FIXED))
    assert result.verdict == verdict and result.comparisons == 8
    with told("two shares in reward accuracy"):
        shares_rise(evidence(by_share=make_shares(("toxicity_auprc",))), ["reward_accuracy"], (ONE_EACH,))


@pytest.mark.parametrize(
    "change, verdict", [({}, HOLDS), (dict(filled=(50.0, 50.0, 49.1)), FAILS), (dict(spread=5.0), OPEN)]
)
def test_covering_against_repeating_flips(change, verdict):
    assert covering_beats_repeating(evidence(by_share=make_shares(**change))).verdict == verdict
    with told("toxicity AUPRC, N2"):
        covering_beats_repeating(evidence(by_share=make_shares().query("sampling == 'N1'")))


def test_beyond_turns_intervals_round():
    row = pd.Series(dict(pearson=-0.5, pearson_low=-0.8, pearson_high=-0.1))
    assert beyond(row, sign=-1) == Difference(0.5, 0.1, 0.8)
    assert beyond(row, 0.2) == Difference(-0.7, -1.0, -0.1 - 0.2)


@pytest.mark.parametrize(
    "judge_one, change, verdict",
    [
        (fac_predicts, dict(fac=0.92), OPEN),
        (fac_predicts, dict(fac=0.5), FAILS),
        (fac_predicts_elsewhere, dict(fac=0.71), OPEN),
        (fac_predicts_elsewhere, dict(fac=0.5), FAILS),
        (fac_leads, {"MLS": -0.94}, OPEN),
        (fac_leads, {"MLS": -0.99}, FAILS),
        (diversity_fails, {"MLS": 0.01}, OPEN),
        (diversity_fails, {"MLS": 0.5}, FAILS),
        (diversity_fails, {"Trace": 0.49}, OPEN),
        (diversity_fails, {"Trace": -0.9}, FAILS),
        (diversity_fails, {"Trace": 0.01}, HOLDS),
    ],
)
def test_correlation_claims_flip(judge_one, change, verdict):
    assert judge_one(evidence(correlations=make_correlations(**change))).verdict == verdict


def test_correlations_of_some_tasks():
    some = make_correlations()
    part = fac_predicts_elsewhere(evidence(correlations=some[some.task.isin(["toxicity", "reward"])]))
    assert part.verdict == HOLDS and part.comparisons == 1
    assert "no value for FAC and score of sycophancy" in part.evidence
    some.loc[some.metric == "FAC", "pearson"] = np.nan
    for judge_one in (fac_predicts, fac_leads, diversity_fails):
        with told("no correlation of FAC with the score of toxicity"):
            judge_one(evidence(correlations=some))
    with told("no other metric"):
        fac_leads(evidence(correlations=make_correlations().query("metric == 'FAC'")))


@pytest.mark.parametrize("gap, verdict", [(0.2, HOLDS), (0.001, OPEN)])
def test_standard_accuracy_flips(gap, verdict):
    result = standard_exceeds_robust(evidence(curves=make_curves(gap=gap)))
    assert result.verdict == verdict and result.comparisons == 10


@pytest.mark.parametrize(
    "climbs, verdict",
    [
        ({"Ours": 0.2, "Magpie": 0.0}, HOLDS),
        ({"Ours": 0.2, "Magpie": 0.1}, FAILS),
        ({"Ours": -0.2, "Magpie": 0.0}, FAILS),
        ({"Ours": 0.0}, OPEN),
        ({"Ours": 0.2, "Baseline": 0.1, "Full Dataset": 0.1}, HOLDS),
    ],
)
def test_only_ours_climbs_flips(climbs, verdict):
    assert only_ours_climbs(evidence(curves=make_curves(climbs))).verdict == verdict
    curves = make_curves(climbs)
    with told("Ours for survival"):
        only_ours_climbs(evidence(curves=curves[curves.behavior == "sycophancy"]))


@pytest.mark.parametrize("se, verdict", [(9.0, HOLDS), (2.0, OPEN), (0.1, FAILS)])
def test_seeds_matter_little_flips(se, verdict):
    scores = make_scores()
    scores.loc[scores.column == "instruction_sd", "value"] = se
    assert seeds_matter_little(evidence(scores=scores)).verdict == verdict
    with told("one"):
        seeds_matter_little(evidence(scores=scores[scores.seed == 42]))


def test_page():
    judged = judge(CLAIMS, evidence())
    page = claims_page(judged, Interval(), PLANTED_NOTE)
    assert page == claims_page(judge(CLAIMS, evidence()), Interval(), PLANTED_NOTE), "same bytes"
    assert PLANTED_NOTE in page and "95 % interval" in page and "Student" in page
    assert all(f"| {i} |" in page for i in CLAIMS.id)
    other = claims_page(judged, Interval("bootstrap"))
    assert PLANTED_NOTE not in other and "10000 resamples" in other
    counts = page.split("42 claims: ")[1].split("\n")[0].split()
    assert sum(int(word) for word in counts if word.isdigit()) == 42
    assert f"{len(VERDICTS)} verdicts were drawn from {judged.comparisons.sum()} intervals" in page
    assert "mean" not in page.split("| --- |")[0].splitlines()[-1], "the interval is for the plot"


def test_forest_plot_has_a_line_per_interval_and_no_legend_on_data():
    judged = judge(CLAIMS, evidence())
    fig = forest_plot(judged)
    ax = fig.axes[0]
    drawn = [label.get_text()[:3] for label in ax.get_yticklabels()][::-1]
    assert drawn == judged.id[judged.low.notna() & (judged.high > judged.low)].tolist()
    fig.canvas.draw()
    assert not ax.get_legend().get_window_extent().overlaps(ax.bbox)
    points = [line for line in ax.lines if line.get_marker() not in ("None", None, "")]
    assert len({line.get_marker() for line in points}) == 3, "verdicts differ by more than colour"
    plt.close(fig)


# ---- Where everything is


def test_items():
    mine = ["tables/table08.csv", "tables/table08.md", "figures/figure03.png", "figures/figure03.csv"]
    files = {"50_x": mine, "90_y": ["tables/table02_examples.csv", "tables/table01.csv"]}
    items = items_table(files, published("index"), CLAIMS).set_index("item")
    assert len(items) == 37
    assert items.files["Table 8"] == "tables/table08.csv" and items.stage["Table 2"] == "90_y"
    assert "figures/figure03.png" in items.files["Figure 3"]
    absent = items[items.files == "none"]
    assert (absent.note != "ok").all() and (absent.note != "").all()
    assert "temperatures" in items.note["Table 4"] and "backbone" in items.note["Figure 18"]
    assert items.note["Figure 2"].startswith("a diagram")
    assert "reasoning" in items.note["Table 15"] and "self" not in items.note["Table 9"]


# ---- The notebook's own Run cells


def test_the_run_cells_on_made_up_stages(tmp_path, monkeypatch, leave):
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    correlations = make_correlations().replace({"metric": {"FAC": "some FAC"}})
    left = leave(
        *((None, column.read) for column in COLUMNS.values()),
        (make_by_delta(), read_by_delta),
        (make_by_samples(), read_by_samples),
        (correlations, read_correlations),
        ("some FAC", read_leading_metric),
        (make_coverage(), read_share_coverage),
        (make_shares(), read_share_scores),
    )
    steering = left["42_behavior_steering"]
    steering.files["figures/figure13.png"] = "its digest"
    steering.finish()
    run = Run(STAGE, dict(profile="mini", seed=0, interval="student", level=0.95, n_bootstrap=1000))
    contents = []
    for _ in range(2):
        namespace = vars(claims) | dict(run=run)
        for source in notebook_sources(STAGE):
            if source.startswith("#| eval: false") and "start(" not in source and "display(" not in source:
                exec(compile(source, STAGE, "exec"), namespace)
        contents.append({name: (run.folder / name).read_bytes() for name in run.files})
    assert contents[0] == contents[1]
    page = (run.folder / "claims.md").read_text()
    assert "| C01 | holds |" in page and "| C12 | holds |" in page
    assert "| C05 | not testable in this run | this run has no value for Ours" in page
    assert "figures/figure13.png" in (run.folder / "tables" / "published_items.csv").read_text()
    later = Run("92_summary", dict(profile="mini"))
    assert read_verdicts(later).set_index("id").verdict["C12"] == HOLDS
    plt.close("all")


def test_no_wins_at_all_say_nothing_about_seeds():
    scores = make_scores()
    scores.loc[scores.column.str.startswith("instruction"), "value"] = 0.0
    with told("win rate of 0 %"):
        seeds_matter_little(evidence(scores=scores))


def test_arithmetic_noise_is_no_difference():
    assert paired(pd.Series([1e-13, 2e-13, 1e-13]), pd.Series([0.0, 0.0, 0.0])) == Difference(0.0, 0.0, 0.0)
