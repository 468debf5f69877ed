"""Tables and figures on small made-up frames: nothing here comes from a run."""

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fac_synthesis.results.tables import (
    NEEDED,
    PAPER,
    TABLES,
    THIS_RUN,
    cell_text,
    columns_of,
    comparison,
    empty_frame,
    example_table,
    figure06_points,
    figure07_points,
    frame_or_empty,
    needed,
    table_scores,
    two_panels,
    wide_table,
)
from fac_synthesis.run.parameters import UserError, published
from fac_synthesis.tasks.scores import COLUMNS, INSTRUCTION, REWARD, STEERING, TOXICITY, Column
from threshold_curves import SEEDS, make_by_delta, make_by_samples

from fac_synthesis import experiment, tables

N = {"Baseline": 30, "Full Dataset": 90}
SAMPLES_31, SECTIONS = "31_covered_samples", ("chat", "chat_hard", "safety", "reasoning", "average")


def frame(means, trainings=("LoRA", "head only"), values=("auprc",), size="n_toxic", scale=100, **more):
    """A stage's scores: means in the paper's unit per method, three seeds one point apart."""
    return pd.DataFrame(
        [
            dict(
                method=m,
                **(dict(training=t) if t else {}),
                seed=s,
                **dict.fromkeys(values, (mean + i - 1) / scale),
                **{size: N.get(m, 50)},
                **more,
            )
            for m, mean in means.items()
            for t in trainings
            for i, s in enumerate(SEEDS)
        ]
    )


MEANS = {"Baseline": 40, "Full Dataset": 50, "Ours": 60}
STAGE_SCORES = {
    TOXICITY: frame(MEANS),
    REWARD: frame(MEANS, values=SECTIONS, size="n_pairs"),
    STEERING: pd.concat(
        [frame(MEANS, (None,), ("scr",), "n_items", behavior=b) for b in ("sycophancy", "survival-instinct")],
        ignore_index=True,
    ),
    INSTRUCTION: frame(MEANS, ("LoRA",), ("wr", "lc", "se"), "n_samples", 1),
}
FLOORS = {
    TOXICITY: pd.DataFrame(dict(rows=["Baseline", "Ours"], auprc=[0.35, 0.5], base_rate=0.2)),
    REWARD: pd.DataFrame(
        [
            dict(floor=f, rows=r, **dict.fromkeys(SECTIONS, v))
            for f, r, v in (("random", "", 0.5), ("TF-IDF", "Baseline", 0.6), ("TF-IDF", "Ours", 0.7))
        ]
    ),
    STEERING: pd.DataFrame(
        dict(
            behavior=["sycophancy"] * 2 + ["survival-instinct"] * 2,
            draw=[0, 1] * 2,
            scr=[0.0, 0.1, -0.2, 0.0],
        )
    ),
    INSTRUCTION: pd.DataFrame(
        dict(method=["untuned backbone", "echo"], wr=[8.0, 2.0], lc=[9.0, 3.0], se=[1.0, 0.5])
    ),
}
LONG = table_scores(STAGE_SCORES)


def cells(table, scores=LONG, floors=FLOORS):
    return comparison(scores, floors, table).set_index(["column", "row"])


# ---- Tables 1, 13 and 14


def test_main_table_by_hand():
    cell = cells("table01")
    ours = cell.loc[("toxicity_auprc", "Ours")]
    assert np.allclose(
        [
            ours.value,
            ours.sd,
            ours.published,
            ours.published_sd,
            ours.difference,
            ours.gap,
            ours.published_gap,
        ],
        [60, 1, 62.60, 4.41, 60 - 62.6, 20, 23.63],
    )
    assert (ours.seeds, ours.added, ours.note) == (3, 20, "") and cell.added[
        "toxicity_auprc", "Full Dataset"
    ] == 60
    assert cell.loc[("reward_accuracy", "Baseline"), ["gap", "published_gap", "added"]].tolist() == [0, 0, 0]
    assert (
        np.isclose(cell.value["instruction_wr", "Ours"], 60)
        and np.isclose(cell.value["survival_scr", "Ours"], 60)
        and cell.published["survival_scr", "Baseline"] == -2
    )


@pytest.mark.parametrize("table", TABLES)
def test_published_stands_in_its_own_cell(table):
    paper = published(table).replace({"row": {"Self-Instruct": "Alpaca"}})
    paper, cell = paper[~paper.row.str.startswith("Gap")], cells(table)
    assert set(columns_of(table)) == set(paper.column)
    for p in paper.itertuples():
        assert cell.published[p.column, p.row] == p.value and (
            np.isnan(p.sd) or cell.published_sd[p.column, p.row] == p.sd
        )
    assert cell.index.is_unique and not any(row.startswith("Gap") for _, row in cell.index)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("stages", [(), (TOXICITY,), tuple(STAGE_SCORES)])
def test_every_cell_has_a_value_or_a_reason(table, stages):
    details = comparison(
        table_scores({s: STAGE_SCORES[s] for s in stages}), {s: FLOORS[s] for s in stages}, table
    )
    assert (details.value.notna() | details.note.ne("")).all()
    wide = wide_table(details)
    assert (
        wide.row.tolist()[-2:] == ["Floor", "Trivial"]
        and wide.row.is_unique
        and not wide.isna().any().any()
        and (wide != "").all().all()
    )
    assert (
        wide.note[
            wide.eq("none").any(axis=1)
            | wide.apply(lambda r: any(str(v).startswith("none") for v in r), axis=1)
        ]
        != "ok"
    ).all()


def test_trainings_do_not_mix():
    lora = frame({"Ours": 60}, ("LoRA",))
    head = frame({"Ours": 30}, ("head-only",))
    scores = table_scores({TOXICITY: pd.concat([lora, head])})
    assert np.isclose(cells("table01", scores).value["toxicity_auprc", "Ours"], 60)
    assert np.isclose(cells("table13", scores).value["toxicity_auprc", "Ours"], 30), (
        "both spellings of head only"
    )


def test_missing_seeds_are_counted():
    scores = LONG.copy()
    lost = lambda method, n: (
        (scores.column == "toxicity_auprc")
        & (scores.training == "LoRA")
        & (scores.method == method)
        & scores.seed.isin(SEEDS[:n])
    )
    scores.loc[lost("Ours", 1), "value"] = np.nan
    scores.loc[lost("Baseline", 3), "value"] = np.nan
    cell = cells("table01", scores)
    assert (
        cell.seeds["toxicity_auprc", "Ours"] == 2
        and "1 of 3 seeds without a value" in cell.note["toxicity_auprc", "Ours"]
    )
    assert "none of 3 seeds" in cell.note["toxicity_auprc", "Baseline"] and np.isnan(
        cell.gap["toxicity_auprc", "Ours"]
    )
    scores.loc[lost("Ours", 2), "value"] = np.nan
    assert "one seed, so no sd" in cells("table01", scores).note["toxicity_auprc", "Ours"]


def test_rows_of_ours_alone_come_after_the_papers():
    scores = table_scores(STAGE_SCORES | {TOXICITY: frame(MEANS | {"Ours, one-step": 55})})
    wide = wide_table(comparison(scores, FLOORS, "table01")).set_index("row")
    assert wide.index.tolist()[-3:] == ["Ours, one-step", "Floor", "Trivial"]
    assert (
        wide["toxicity AUPRC"]["Ours, one-step"] == "55.00 ± 1.00"
        and wide["reward accuracy"]["Ours, one-step"] == "none"
    )
    assert (
        "reward, sycophancy, survival, instruction: nothing was trained for this row"
        in wide.note["Ours, one-step"]
        and "not a row of the paper's table" in wide.note["Ours, one-step"]
    )


def test_wide_table():
    wide = wide_table(comparison(LONG, FLOORS, "table01")).set_index("row")
    assert (
        wide["toxicity AUPRC"]["Ours"] == "60.00 ± 1.00 (62.60, -2.60)"
        and wide["toxicity AUPRC"]["SAO"] == "none (50.51)"
        and wide.note["Ours"] == "ok"
    )
    assert (
        wide["samples added"]["Ours"] == "20 / 20 / 20 / 20 / 20"
        and wide["samples added"]["SAO"] == "– / – / – / – / –"
    )
    assert wide.note["SAO"] == "all: nothing was trained for this row"
    assert cell_text(pd.Series(dict(value=3.0, sd=np.nan, published=np.nan, difference=np.nan))) == "3.00"


@pytest.mark.parametrize(
    "column, floor, trivial",
    [
        ("toxicity_auprc", 50, 20),
        ("reward_accuracy", 70, 50),
        ("sycophancy_scr", 5, 0),
        ("survival_scr", -10, 0),
        ("instruction_lc", 9, 3),
        ("instruction_sd", 1, 0.5),
    ],
)
def test_floors(column, floor, trivial):
    cell = cells("table01")
    assert np.allclose([cell.value[column, "Floor"], cell.value[column, "Trivial"]], [floor, trivial])
    assert cells("table01", floors={}).note[column, "Floor"] == "this run left no floor"


def test_a_further_task_is_a_line_in_the_list_of_tables(monkeypatch):
    monkeypatch.setitem(
        COLUMNS,
        "poetry_rhymes",
        Column("poetry_rhymes", "poetry rhymes", "poetry", "44_poetry", "rhymes", "n"),
    )
    scores = table_scores(STAGE_SCORES | {"44_poetry": frame(MEANS, values=("rhymes",), size="n")})
    wide = wide_table(comparison(scores, {}, "table01")).set_index("row")
    assert wide["poetry rhymes"]["Ours"] == "60.00 ± 1.00" and wide["poetry rhymes"]["SAO"] == "none"


# ---- Figures


def test_points_of_figures_06_and_07():
    points = figure06_points(make_by_delta(), published("figure06"))
    ours = points[(points.source == THIS_RUN) & (points.x == 1.0)].set_index(["measure", "series"]).value
    assert (
        ours["missing_features", "missing"] == 108
        and ours["missing_features", "missing, with a sample"] == 100
        and np.isclose(ours["toxicity_auprc", "missing"], 44.22)
    )
    assert len(points[points.source == PAPER]) == 12
    points = figure07_points(make_by_samples(), published("figure07"))
    auprc = points.query("source == @THIS_RUN and measure == 'toxicity_auprc'")
    assert np.allclose(auprc.value, [60.02, 62.02, 63.02, 63.52, 63.92]) and np.allclose(auprc.sd, 0.02)
    assert points.query("source == @PAPER and measure == 'des'").value.tolist() == [
        21.35,
        18.89,
        17.79,
        17.14,
        16.64,
    ]


@pytest.mark.parametrize(
    "points, x, rows",
    [
        (lambda: figure06_points(make_by_delta(), published("figure06")), "threshold", 2),
        (lambda: figure06_points(empty_frame(TOXICITY, "by_delta"), published("figure06")), "threshold", 2),
        (lambda: figure07_points(make_by_samples(), published("figure07")), "samples", 3),
    ],
)
def test_figures_are_labelled_and_readable_in_grey(points, x, rows):
    data = points()
    fig = two_panels(data, x)
    assert (
        len(fig.axes) == 2 * rows
        and all(ax.get_ylabel() for ax in fig.axes)
        and [ax.get_xlabel() for ax in fig.axes[-2:]] == [x, x]
    )
    assert [ax.get_title() for ax in fig.axes[:2]] == ["this run", "published"]
    for ax in fig.axes:
        looks = [(c[0].get_marker(), c[0].get_linestyle()) for c in ax.containers]
        assert len(set(looks)) == len(looks), "curves differ by more than colour"
    if not (data.source == THIS_RUN).any():
        assert fig.axes[0].texts[0].get_text() == "no values"
    plt.close(fig)


# ---- Table 2

FEATURES = pd.DataFrame(
    dict(
        latent=[3, 5, 8, 9, 11],
        explanation=["locks", "bread", "paint", "", "cake"],
        spans=[np.array(["the [lock]", "a [key]"])] + [["x"]] * 4,
    )
)
RELEVANCE = pd.DataFrame(
    dict(
        latent=[3, 5, 8, 9, 11],
        relevance=["Yes", "No", "Yes", "Yes", "No"],
        positives=[4, 2, 9, 50, 1],
        negatives=[0, 30, 1, 0, 90],
    )
)
SAMPLES = pd.DataFrame(
    dict(
        method=["two-step", "two-step", "two-step", "one-step"],
        latent=[3, 3, 9, 8],
        text=["best", "second", "no words", "other"],
        rank=[0, 1, 0, 0],
    )
)


def test_examples():
    table = example_table(
        FEATURES, RELEVANCE, SAMPLES, published("table02"), texts=True, n_yes=2, n_no=1, n_spans=1
    )
    assert table.feature.tolist() == [3, 11, 2039, 17612, 46477], (
        "unexplained features and those without a two-step sample are not shown"
    )
    assert table["sample"].tolist() == ["best", None, None, None, None] and table.spans[0] == "the [lock]"


def test_examples_without_texts():
    table = example_table(FEATURES, RELEVANCE, SAMPLES, published("table02"), texts=False)
    assert (
        table[["spans", "sample"]].isna().all().all()
        and table.note.str.contains("left out|not repeated").all()
    )
    assert not any(t in table.to_csv() for t in ("best", "the [lock]"))


def test_examples_of_nothing():
    table = example_table(
        empty_frame("21_feature_interpretation", "features"),
        empty_frame("22_task_relevance", "relevance_toxicity"),
        empty_frame(SAMPLES_31, "samples_toxicity"),
        published("table02"),
        texts=True,
    )
    assert table.label.tolist() == ["Yes", "No", "Yes", "Yes", "No"] and table.note.ne("").all()


# ---- A run's folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    return experiment.Run("90_tables", dict(profile="mini", seed=0, n_yes=2, n_no=1, n_spans=2))


def leave(run, stage, **frames):
    """A stage's record and artifacts, as a finished run leaves them."""
    other = experiment.Run(stage, {"profile": "mini", "seed": 0})
    for name, value in frames.items():
        other.cached(name, lambda work: value)
    experiment.write_atomic(
        run.dir / "stages" / f"{stage}.json",
        json.dumps(dict(parameters={"profile": "mini"}, outputs=other.outputs, files={})),
    )


def leave_all(run, tasks=("toxicity", "survival")):
    for stage, scores in STAGE_SCORES.items():
        leave(
            run,
            stage,
            **(dict(scores=scores, floor=FLOORS[stage]) if stage in (TOXICITY, STEERING) else {}),
            **(dict(by_delta=make_by_delta(), by_samples=make_by_samples()) if stage == TOXICITY else {}),
        )
    leave(run, SAMPLES_31, **{f"samples_{t}": SAMPLES for t in tasks})
    leave(run, "21_feature_interpretation", features=FEATURES)
    leave(run, "22_task_relevance", **({"relevance_toxicity": RELEVANCE} if "toxicity" in tasks else {}))


def test_inputs_present_absent_and_broken(run):
    leave(run, TOXICITY, scores=STAGE_SCORES[TOXICITY], floor=FLOORS[TOXICITY].drop(columns="base_rate"))
    assert len(frame_or_empty(run, TOXICITY, "scores")) == 18
    assert frame_or_empty(run, TOXICITY, "by_delta").columns.tolist() == NEEDED[f"{TOXICITY}/by_delta"]
    assert run.inputs[f"{TOXICITY}/by_delta"] is None, "once it exists, these tables are stale"
    with pytest.raises(UserError, match="no column 'base_rate'"):
        frame_or_empty(run, TOXICITY, "floor")
    assert needed(SAMPLES_31, "samples_survival") == needed(SAMPLES_31, "samples")


@pytest.mark.parametrize("tasks", [("toxicity", "survival"), ("reward",)])
def test_the_run_cells_on_made_up_stages(run, monkeypatch, tasks):
    """The notebook's own Run cells, twice: every output appears and has the same bytes; tasks that did not run are named."""
    leave_all(run, tasks)
    source = [
        "".join(c["source"])
        for c in json.loads(experiment.notebook_path("90_tables").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    source = [
        c for c in source if c.startswith("#| eval: false") and "start(" not in c and "display(" not in c
    ]
    draw = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, file, **how: draw(self, file, **{**how, "dpi": 30})
    )  # small pictures, to be quick
    contents = []
    for _ in range(2):
        namespace = {**vars(tables), "run": run}
        for cell in source:
            exec(cell, namespace)
        contents.append({name: (run.dir / name).read_bytes() for name in run.files})
    assert contents[0] == contents[1] and {
        *(f"tables/{t}.csv" for t in ("table01", "table13", "table14", "details", "table02_examples")),
        *(f"figures/figure0{i}{suffix}" for i in (6, 7) for suffix in (".png", ".csv")),
    } <= set(contents[0])
    assert [p.name for p in (run.dir / "tables").glob("table01*.md")] == ["table01.md"], (
        "the one table that a run prints at its end"
    )
    main = pd.read_csv(run.dir / "tables" / "table01.csv", keep_default_na=False).set_index("row")
    assert (
        (main != "").all().all()
        and "reward, instruction: this task has no scores in this run" in main.note["Ours"]
        and main["toxicity AUPRC"]["Ours"].startswith("60.00")
    )
    assert (pd.read_csv(run.dir / "tables" / "details.csv").note.notna()).all()
    plt.close("all")
