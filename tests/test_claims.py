"""Verdicts on small made-up evidence: nothing here comes from a run."""

import json

import numpy as np
import pandas as pd
import pytest
from fac_synthesis.data.sources import TASKS
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
    items_table,
    judge,
    lora_beats_head,
    lowest_threshold_best,
    more_samples_help_less,
    only_ours_climbs,
    paired,
    seeds_matter_little,
    shares_rise,
    standard_exceeds_robust,
    threshold_counts,
    two_steps_cover_more,
    weakest,
)
from fac_synthesis.run.parameters import UserError, published
from fac_synthesis.run.stages import PLANTED_NOTE
from fac_synthesis.tasks.scores import STEERING, TOXICITY, score_stages
from threshold_curves import SEEDS, make_by_delta, make_by_samples

from fac_synthesis import claims, experiment

CLAIMS = published("claims")
NOISE = {"Baseline": (0, 1, 2), "Ours": (1, 2, 0), "Full Dataset": (2, 0, 1)}
MEANS = {"Baseline": 40, "Magpie": 45, "Full Dataset": 50, "Ours": 60}
SCORED = {
    c: ("steering",)
    if c.endswith("scr")
    else ("LoRA",)
    if c.startswith("instruction")
    else ("LoRA", "head only")
    for c in (
        "toxicity_auprc",
        "reward_accuracy",
        "sycophancy_scr",
        "survival_scr",
        "instruction_lc",
        "instruction_wr",
    )
}


def make_scores(means=MEANS, columns=SCORED):
    """All scores in one layout: means per method, three seeds one point apart; SD is 9 throughout."""
    rows = [
        dict(column=c, method=m, training=t, seed=s, value=mean + NOISE.get(m, (0, 0, 0))[i] - 1, n=50)
        for c in columns
        for t in SCORED[c]
        for m, mean in means.items()
        for i, s in enumerate(SEEDS)
    ]
    return pd.DataFrame(
        rows
        + [
            dict(column="instruction_sd", method=m, training="LoRA", seed=s, value=9.0, n=50)
            for m in means
            for s in SEEDS
        ]
    )


def make_coverage(
    one=(28, 16, 12), two=(33, 18, 16), missing=40, deltas=(8.0, 10.0, 12.0), task="toxicity", more=0
):
    return pd.DataFrame(
        [
            dict(
                task=task,
                method=m,
                delta=d,
                activated=n,
                missing=missing,
                fac_missing=(n + more * (m == "one-step")) / missing,
                fac_equal=n / missing,
                n_kept=80,
                n_equal=75,
            )
            for m, counts in (("one-step", one), ("two-step", two))
            for d, n in zip(deltas, counts)
        ]
    )


def make_shares(columns=tuple(SCORED), each=(45.6, 46.6, 49.1), filled=(46.1, 47.0, 49.1), spread=0.02):
    return pd.DataFrame(
        [
            dict(column=c, sampling=w, share=share, seed=s, score=v + spread * ((i + j) % 3))
            for c in columns
            for w, values in ((ONE_EACH, each), (FIXED, filled))
            for i, (share, v) in enumerate(zip((0.3, 0.6, 1.0), values))
            for j, s in enumerate(SEEDS)
        ]
    )


def make_correlations(fac=0.95, half=0.03, **others):
    """FAC in every task, and `others` (r by metric); the intervals have half-width `half`."""
    names = {
        "Distinct-1": -0.6,
        "Distinct-2": -0.4,
        "POS tag Distinct-2": -0.6,
        "MLS": -0.3,
        "Trace": 0.3,
        "Pairwise cosine distance": 0.3,
        "Semantic entropy": 0.1,
    } | others
    return pd.DataFrame(
        [
            dict(
                task=t,
                metric=m,
                main=True,
                n=8,
                pearson=r,
                pearson_low=r - half,
                pearson_high=r + half,
                spearman=r,
                spearman_low=r - half,
                spearman_high=r + half,
                lead=abs(fac) - abs(r),
                lead_low=abs(fac) - abs(r) - half,
                lead_high=abs(fac) - abs(r) + half,
            )
            for t in TASKS
            for m, r in {"FAC": fac, **names}.items()
        ]
    )


def make_curves(climbs={"Ours": 0.2, "Magpie": -0.1, "SAO": 0.0}, gap=0.2):
    return pd.DataFrame(
        [
            dict(
                method=m,
                behavior=b,
                options="two",
                multiplier=x,
                seed=s,
                accuracy=0.4 + gap + climb * x + (i + (x > 0)) % 3 / 1e3,
                robust=0.4 + climb * x + i / 1e3,
            )
            for m, climb in climbs.items()
            for b in ("sycophancy", "survival-instinct")
            for x in (-1.0, -0.5, 0.0, 0.5, 1.0)
            for i, s in enumerate(SEEDS)
        ]
    )


def evidence(**parts):
    frames = dict(
        scores=make_scores(),
        coverage=make_coverage(),
        by_delta=make_by_delta(),
        by_samples=make_by_samples(),
        by_share=make_shares(),
        correlations=make_correlations(),
        curves=make_curves(),
    )
    return Evidence(**(frames | parts))


def told(message):
    return pytest.raises(NotTestable, match=message)


# ---- Intervals


def test_student_by_hand():
    d = paired(pd.Series({1: 3.0, 2: 4.0, 3: 5.0}), pd.Series({3: 1.0, 2: 1.0, 1: 1.0}))
    assert np.allclose([d.mean, d.low, d.high], [3, 3 - 4.302653 / 3**0.5, 3 + 4.302653 / 3**0.5])


def test_bootstrap_of_three_seeds_is_their_range_and_repeats():
    a, b = pd.Series({1: 3.0, 2: 4.0, 3: 5.0}), pd.Series(1.0, index=[1, 2, 3])
    how = Interval("bootstrap", 0.95, 2000, 1)
    assert (paired(a, b, how).low, paired(a, b, how).high) == (2.0, 4.0) and paired(a, b, how) == paired(
        a, b, how
    )


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
    assert (
        weakest(dict(a=Difference(1, 0.5, 2), b=Difference(1, -1, 3), c=Difference(2, -2, 4))) == "c"
        and weakest(dict(a=Difference(-1, -3, 1), b=Difference(-1, -2, -0.5))) == "b"
    )


# ---- Claims


def test_every_claim_has_one_verdict_or_one_reason():
    assert sorted([*VERDICTS, *REASONS]) == CLAIMS.id.tolist()
    judged = judge(CLAIMS, evidence())
    assert (
        judged.id.tolist() == CLAIMS.id.tolist()
        and judged.verdict.isin([HOLDS, FAILS, OPEN, UNTESTED]).all()
        and judged.evidence.ne("").all()
    )
    assert set(judged.id[judged.verdict != UNTESTED]) == set(VERDICTS) and set(
        judged.verdict[judged.id.isin(list(VERDICTS))]
    ) <= {HOLDS, OPEN}
    assert (judged.comparisons[judged.verdict == UNTESTED] == 0).all()


def test_without_results_nothing_is_claimed():
    judged = judge(CLAIMS, Evidence())
    assert (judged.verdict == UNTESTED).all() and judged.evidence.ne("").all()
    columns = Evidence(
        scores=make_scores().head(0),
        **{
            k: v.head(0)
            for k, v in dict(
                coverage=make_coverage(),
                by_share=make_shares(),
                correlations=make_correlations(),
                curves=make_curves(),
                by_delta=make_by_delta(),
                by_samples=make_by_samples(),
            ).items()
        },
    )
    assert (judge(CLAIMS, columns).verdict == UNTESTED).all()


def test_a_claim_nobody_wrote_a_test_for():
    assert judge(CLAIMS.head(1).assign(id="C99"), Evidence()).evidence.tolist() == [
        "no test is written for this claim"
    ]


def test_decide_counts_and_names():
    one = decide({"a": Difference(1, 0.5, 2)}, "told", ["b"])
    assert one == Judged(HOLDS, "told; a +1.00 [+0.50, +2.00]; no value for b", 1)
    many = decide({str(i): Difference(i, i - 1.5, i + 1.5) for i in range(-2, 3)}, "")
    assert (
        many.verdict == FAILS
        and many.comparisons == 5
        and "1 above zero, 3 undecided, 1 below; deciding: -2" in many.evidence
    )
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
    result = best_method(evidence(scores=make_scores(MEANS | {"Full Dataset": full})), [column], (training,))
    assert (
        result.verdict == verdict
        and result.comparisons == 3
        and "Ours minus Baseline" in result.evidence
        and f"{HOLDS} if Full Dataset, which has more samples, is left out" in result.evidence
    )
    fair = best_method(
        evidence(scores=make_scores(MEANS | {"Full Dataset": full})),
        [column],
        (training,),
        equal_budgets=True,
    )
    assert (
        fair.verdict == HOLDS
        and fair.comparisons == 2
        and f"{verdict} if Full Dataset, which has more samples, is counted in" in fair.evidence
    )


def test_best_method_over_several_columns_and_with_gaps():
    both = ["toxicity_auprc", "reward_accuracy"]
    assert best_method(evidence(), both).comparisons == 6
    part = best_method(evidence(scores=make_scores(columns=["toxicity_auprc"])), both)
    assert part.verdict == HOLDS and "no value for Ours and others in reward accuracy" in part.evidence
    scores = make_scores()
    scores.loc[(scores.method == "Magpie") & (scores.column == "toxicity_auprc"), "value"] = np.nan
    assert "no value for Magpie in toxicity AUPRC" in best_method(evidence(scores=scores), both[:1]).evidence
    with told("Ours and others in toxicity AUPRC"):
        best_method(evidence(scores=make_scores({"Ours": 60})), both[:1])
    with told("Ours and others in toxicity AUPRC"):
        best_method(evidence(scores=make_scores({"Baseline": 60})), both[:1])


@pytest.mark.parametrize("shift, verdict", [(10, HOLDS), (0, OPEN), (-10, FAILS)])
def test_lora_against_head_flips(shift, verdict):
    scores = make_scores()
    lora = scores.training == "LoRA"
    scores.loc[lora, "value"] += shift + 0.1 * (scores.seed[lora] - 43)
    assert (
        lora_beats_head(evidence(scores=scores)).verdict == verdict
        and lora_beats_head(evidence(scores=scores)).comparisons == 2
    )


def test_two_steps_flip():
    result = two_steps_cover_more(evidence())
    assert result.verdict == HOLDS and all(
        w in result.evidence for w in ("28 → 33 (δ 8)", "40 missing", "75 samples", "3 of 3 cells")
    )
    assert two_steps_cover_more(evidence(coverage=make_coverage(two=(28, 16, 12)))).verdict == HOLDS, (
        "a tie is at least as many"
    )
    assert (
        two_steps_cover_more(
            evidence(coverage=pd.concat([make_coverage(), make_coverage(two=(33, 18, 11), task="reward")]))
        ).verdict
        == FAILS
    )
    kept = two_steps_cover_more(evidence(coverage=make_coverage(more=10)))
    assert kept.verdict == HOLDS and "in 0 of 3)" in kept.evidence, "all kept samples are not equally many"
    with told("both"):
        two_steps_cover_more(evidence(coverage=make_coverage().query("method != 'one-step'")))
    apart = pd.concat(
        [
            make_coverage(deltas=(1, 2, 3)).query("method == 'one-step'"),
            make_coverage(deltas=(4, 5, 6)).query("method == 'two-step'"),
        ]
    )
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
    for judge_one in (threshold_counts, lowest_threshold_best):
        with pytest.raises(NotTestable, match="this run has 5"):
            judge_one(evidence(by_delta=make_by_delta().query("delta < 4")))
        with pytest.raises(NotTestable, match=r"δ 2 \(112 missing\), 4 \(60 missing\)"):
            judge_one(evidence(by_delta=make_by_delta(n_samples=(9, 9, 9, 9, 0, 0))))
        with pytest.raises(NotTestable, match=r"4 \(0 missing\)"):
            judge_one(
                evidence(by_delta=make_by_delta(missing=(9, 8, 4, 4, 4, 0), n_samples=(9, 8, 4, 4, 4, 0)))
            )


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
    with pytest.raises(NotTestable, match="fewer than two"):
        more_samples_help_less(evidence(by_samples=make_by_samples().query("samples_per_feature == 1")))


@pytest.mark.parametrize(
    "change, verdict", [({}, HOLDS), (dict(each=(47.6, 46.6, 49.1)), FAILS), (dict(spread=2.0), OPEN)]
)
def test_shares_flip(change, verdict):
    result = shares_rise(
        evidence(by_share=make_shares(**change)), ["toxicity_auprc", "survival_scr"], (ONE_EACH, FIXED)
    )
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
    assert beyond(row, sign=-1) == Difference(0.5, 0.1, 0.8) and beyond(row, 0.2) == Difference(
        -0.7, -1.0, -0.1 - 0.2
    )


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
    assert (
        part.verdict == HOLDS
        and part.comparisons == 1
        and "no value for FAC and score of sycophancy" in part.evidence
    )
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
    assert (
        PLANTED_NOTE in page
        and "95 % interval" in page
        and "Student" in page
        and all(f"| {i} |" in page for i in CLAIMS.id)
    )
    assert PLANTED_NOTE not in claims_page(
        judged, Interval("bootstrap")
    ) and "10000 resamples" in claims_page(judged, Interval("bootstrap"))
    assert sum(int(w) for w in page.split("42 claims: ")[1].split("\n")[0].split() if w.isdigit()) == 42
    assert f"{len(VERDICTS)} verdicts were drawn from {judged.comparisons.sum()} intervals" in page


# ---- Where everything is


def test_items():
    items = items_table(
        {
            "50_x": [
                "tables/table08.csv",
                "tables/table08.md",
                "figures/figure03.png",
                "figures/figure03.csv",
            ],
            "90_y": ["tables/table02_examples.csv", "tables/table01.csv"],
        },
        published("index"),
        CLAIMS,
    ).set_index("item")
    assert (
        len(items) == 37
        and items.files["Table 8"] == "tables/table08.csv"
        and items.stage["Table 2"] == "90_y"
        and "figures/figure03.png" in items.files["Figure 3"]
    )
    absent = items[items.files == "none"]
    assert (
        (absent.note != "ok").all()
        and (absent.note != "").all()
        and "temperatures" in items.note["Table 4"]
        and "backbone" in items.note["Figure 18"]
        and items.note["Figure 2"] == "a diagram"
    )
    assert "reasoning" in items.note["Table 15"] and "self" not in items.note["Table 9"]


# ---- The notebook's own Run cells


def test_the_run_cells_on_made_up_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    run = experiment.Run(
        "91_claims", dict(profile="mini", seed=0, interval="student", level=0.95, n_bootstrap=1000)
    )

    def leave(stage, parameters={}, files=(), **frames):
        other = experiment.Run(stage, {"profile": "mini", "seed": 0})
        for name, frame in frames.items():
            other.cached(name, lambda work: frame)
        experiment.write_atomic(
            run.dir / "stages" / f"{stage}.json",
            json.dumps(
                dict(
                    parameters=dict(profile="mini", **parameters),
                    outputs=other.outputs,
                    files=dict.fromkeys(files),
                )
            ),
        )

    leave(TOXICITY, by_delta=make_by_delta(), by_samples=make_by_samples())
    for stage in (*score_stages()[1:], "90_tables"):
        leave(stage, files=["figures/figure13.png"] if stage == STEERING else [])
    leave(
        "50_what_predicts_performance",
        dict(fac="some FAC"),
        ["tables/table08.csv"],
        correlations=make_correlations().replace({"metric": {"FAC": "some FAC"}}),
    )
    leave("51_missing_features", coverage=make_coverage(), share_scores=make_shares())
    source = [
        "".join(c["source"])
        for c in json.loads(experiment.notebook_path("91_claims").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    contents = []
    for _ in range(2):
        namespace = {**vars(claims), "run": run}
        for cell in source:
            if cell.startswith("#| eval: false") and "start(" not in cell and "display(" not in cell:
                exec(cell, namespace)
        contents.append({name: (run.dir / name).read_bytes() for name in run.files})
    page = (run.dir / "claims.md").read_text()
    assert (
        contents[0] == contents[1]
        and "| C01 | holds |" in page
        and "| C05 | not testable in this run | this run has no value for Ours" in page
        and "| C12 | holds |" in page
    )
    assert "figures/figure13.png" in (run.dir / "tables" / "published_items.csv").read_text()


def test_no_wins_at_all_say_nothing_about_seeds():
    scores = make_scores()
    scores.loc[scores.column.str.startswith("instruction"), "value"] = 0.0
    with told("win rate of 0 %"):
        seeds_matter_little(evidence(scores=scores))


def test_arithmetic_noise_is_no_difference():
    assert paired(pd.Series([1e-13, 2e-13, 1e-13]), pd.Series([0.0, 0.0, 0.0])) == Difference(0.0, 0.0, 0.0)
