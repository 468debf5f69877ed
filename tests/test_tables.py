"""Tables and figures on small made-up frames: nothing here comes from a run."""

import itertools

import matplotlib

matplotlib.use("Agg")
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fac_synthesis.data.corpora import read_task_names
from fac_synthesis.features.interpretation import read_features
from fac_synthesis.features.relevance import read_relevance
from fac_synthesis.results import tables
from fac_synthesis.results.tables import (
    EXAMPLES,
    PAPER,
    TABLES,
    THIS_RUN,
    columns_of,
    comparison,
    example_features,
    example_table,
    figure06_points,
    figure07_points,
    floor_rows,
    row_note,
    score_text,
    two_panels,
    wide_table,
)
from fac_synthesis.run.artifacts import notebook_sources
from fac_synthesis.run.parameters import published
from fac_synthesis.run.stages import Run
from fac_synthesis.synthesis.covered_samples import read_covered_samples
from fac_synthesis.tasks.scores import COLUMNS, Column, table_floors, table_scores
from fac_synthesis.tasks.steering import read_steering_floor, read_steering_scores
from fac_synthesis.tasks.toxicity import (
    read_by_delta,
    read_by_samples,
    read_toxicity_floor,
    read_toxicity_scores,
)

STAGE, SEEDS = "90_tables", (42, 43, 44)
ROWS = {"Baseline": 30, "Full Dataset": 90}  # texts by row; 50 in the others
MEANS = {"Baseline": 40, "Full Dataset": 50, "Ours": 60}
SECTIONS = ("chat", "chat_hard", "safety", "reasoning", "average")


def frame(means, values, size, trainings=("LoRA", "head only"), scale=100, **more):
    "A task's scores: means in the paper's unit per method, three seeds one point apart."
    rows = []
    for (method, mean), training in itertools.product(means.items(), trainings):
        about = dict(method=method, **{size: ROWS.get(method, 50)}, **more)
        if training:
            about["training"] = training
        for i, seed in enumerate(SEEDS):
            rows.append(dict(about, seed=seed, **dict.fromkeys(values, (mean + i - 1) / scale)))
    return pd.DataFrame(rows)


def toxicity(means=MEANS, trainings=("LoRA", "head only")):
    return frame(means, ["auprc"], "n_toxic", trainings)


def steering(behavior):
    return frame(MEANS, ["scr"], "n_items", [None], behavior=behavior)


STEERED = pd.concat([steering("sycophancy"), steering("survival-instinct")], ignore_index=True)
TASK_SCORES = dict(
    toxicity=toxicity(),
    reward=frame(MEANS, SECTIONS, "n_pairs"),
    sycophancy=STEERED,
    survival=STEERED,
    instruction=frame(MEANS, ("wr", "lc", "se"), "n_samples", ["LoRA"], scale=1),
)
TOXICITY_FLOOR = pd.DataFrame(dict(rows=["Baseline", "Ours"], auprc=[0.35, 0.5], base_rate=0.2))
REWARD_FLOOR = pd.DataFrame(
    [
        dict(floor=f, rows=r, **dict.fromkeys(SECTIONS, v))
        for f, r, v in (("random", "", 0.5), ("TF-IDF", "Baseline", 0.6), ("TF-IDF", "Ours", 0.7))
    ]
)
BEHAVIORS = ["sycophancy", "sycophancy", "survival-instinct", "survival-instinct"]
STEERING_FLOOR = pd.DataFrame(dict(behavior=BEHAVIORS, draw=[0, 1, 0, 1], scr=[0.0, 0.1, -0.2, 0.0]))
NAMES = ["untuned backbone", "echo"]
INSTRUCTION_FLOOR = pd.DataFrame(dict(method=NAMES, wr=[8.0, 2.0], lc=[9.0, 3.0], se=[1.0, 0.5]))
TASK_FLOORS = dict(
    toxicity=TOXICITY_FLOOR,
    reward=REWARD_FLOOR,
    sycophancy=STEERING_FLOOR,
    survival=STEERING_FLOOR,
    instruction=INSTRUCTION_FLOOR,
)
LONG, FLOORS = table_scores(TASK_SCORES), table_floors(TASK_FLOORS)


def cells(table, scores=LONG, floors=FLOORS):
    return comparison(scores, floors, table).set_index(["column", "row"])


# ---- Tables 1, 13 and 14


def test_main_table_by_hand():
    cell = cells("table01")
    ours = cell.loc[("toxicity_auprc", "Ours")]
    numbers = ["value", "sd", "published", "published_sd", "difference", "gap", "published_gap"]
    assert np.allclose(ours[numbers].astype(float), [60, 1, 62.60, 4.41, 60 - 62.6, 20, 23.63])
    assert (ours.seeds, ours.added, ours.note) == (3, 20, "")
    assert cell.added["toxicity_auprc", "Full Dataset"] == 60
    assert cell.loc[("reward_accuracy", "Baseline"), ["gap", "published_gap", "added"]].tolist() == [0, 0, 0]
    assert np.isclose(cell.value["instruction_wr", "Ours"], 60)
    assert np.isclose(cell.value["survival_scr", "Ours"], 60)
    assert cell.published["survival_scr", "Baseline"] == -2


@pytest.mark.parametrize("table", TABLES)
def test_published_stands_in_its_own_cell(table):
    paper = published(table).replace({"row": {"Self-Instruct": "Alpaca"}})
    paper, cell = paper[~paper.row.str.startswith("Gap")], cells(table)
    assert set(columns_of(table)) == set(paper.column)
    for p in paper.itertuples():
        assert cell.published[p.column, p.row] == p.value
        assert np.isnan(p.sd) or cell.published_sd[p.column, p.row] == p.sd
    assert cell.index.is_unique and not any(row.startswith("Gap") for _, row in cell.index)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("tasks", [(), ("toxicity",), tuple(TASK_SCORES)])
def test_every_cell_has_a_value_or_a_reason(table, tasks):
    scores = table_scores({task: TASK_SCORES[task] for task in tasks})
    details = comparison(scores, table_floors({task: TASK_FLOORS[task] for task in tasks}), table)
    assert (details.value.notna() | details.note.ne("")).all()
    wide = wide_table(details)
    assert wide.row.tolist()[-2:] == ["Floor", "Trivial"] and wide.row.is_unique
    assert not wide.isna().any().any() and (wide != "").all().all()
    incomplete = wide.map(lambda text: str(text).startswith("none")).any(axis=1)
    assert (wide.note[incomplete] != "ok").all()


def test_trainings_do_not_mix():
    lora, head = toxicity({"Ours": 60}, ["LoRA"]), toxicity({"Ours": 30}, ["head-only"])
    scores = table_scores(dict(toxicity=pd.concat([lora, head])))
    assert np.isclose(cells("table01", scores).value["toxicity_auprc", "Ours"], 60)
    head_alone = cells("table13", scores).value["toxicity_auprc", "Ours"]
    assert np.isclose(head_alone, 30), "both spellings of head only"


def test_missing_seeds_are_counted():
    scores = LONG.copy()

    def lose(method, n):
        "No values for the first `n` seeds of a row."
        where = (scores.column == "toxicity_auprc") & (scores.training == "LoRA") & (scores.method == method)
        scores.loc[where & scores.seed.isin(SEEDS[:n]), "value"] = np.nan

    lose("Ours", 1)
    lose("Baseline", 3)
    cell = cells("table01", scores)
    assert cell.seeds["toxicity_auprc", "Ours"] == 2
    assert cell.note["toxicity_auprc", "Ours"] == "1 of 3 seeds without a value"
    assert "none of 3 seeds" in cell.note["toxicity_auprc", "Baseline"]
    assert np.isnan(cell.gap["toxicity_auprc", "Ours"])
    lose("Ours", 2)
    note = cells("table01", scores).note["toxicity_auprc", "Ours"]
    assert note == "2 of 3 seeds without a value; one seed, so no sd"
    assert row_note(pd.Series(dict(asked=1, seeds=1)), ran=True) == "one seed, so no sd"


def test_rows_of_ours_alone_come_after_the_papers():
    more = toxicity(MEANS | {"Ours, one-step": 55})
    wide = wide_table(comparison(table_scores(TASK_SCORES | dict(toxicity=more)), FLOORS, "table01"))
    wide = wide.set_index("row")
    assert wide.index.tolist()[-3:] == ["Ours, one-step", "Floor", "Trivial"]
    row = wide.loc["Ours, one-step"]
    assert row["toxicity AUPRC"] == "55.00 ± 1.00" and row["reward accuracy"] == "none"
    assert "reward, sycophancy, survival, instruction: nothing was trained for this row" in row.note
    assert "not a row of the paper's table" in row.note


def test_wide_table():
    wide = wide_table(comparison(LONG, FLOORS, "table01")).set_index("row")
    assert wide["toxicity AUPRC"]["Ours"] == "60.00 ± 1.00 (62.60, -2.60)"
    assert wide["toxicity AUPRC"]["SAO"] == "none (50.51)" and wide.note["Ours"] == "ok"
    assert wide["samples added"]["Ours"] == "20 / 20 / 20 / 20 / 20"
    assert wide["samples added"]["SAO"] == "– / – / – / – / –"
    assert wide.note["SAO"] == "all: nothing was trained for this row"
    alone = dict(sd=np.nan, published=np.nan, difference=np.nan)
    assert score_text(pd.Series(dict(alone, value=3.0))) == "3.00"
    assert score_text(pd.Series(dict(alone, value=-0.001))) == "0.00", "there is no minus zero"


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
    nothing = cells("table01", floors=table_floors({}))
    assert nothing.note[column, "Floor"] == "this run left no floor"


def test_a_floor_without_a_value_says_so():
    levels = pd.DataFrame([dict(column="average", row="Floor", value=np.nan, sd=np.nan)])
    assert floor_rows(levels, "average").note.tolist() == ["this run left no floor"] * 2


def test_a_further_column_is_a_line_in_the_list_of_columns(monkeypatch):
    about = dict(task="poetry", read=read_toxicity_scores, value="rhymes", size="n")
    further = Column("poetry_rhymes", "poetry rhymes", **about)
    monkeypatch.setitem(COLUMNS, "poetry_rhymes", further)
    scores = table_scores(TASK_SCORES | dict(poetry=frame(MEANS, ["rhymes"], "n")))
    wide = wide_table(comparison(scores, table_floors({}), "table01")).set_index("row")
    assert wide["poetry rhymes"]["Ours"] == "60.00 ± 1.00" and wide["poetry rhymes"]["SAO"] == "none"


# ---- Figures


def curve(x, points):
    "Scores by threshold or number of samples: `points` has a row per x; seeds differ by 0.02 points."
    rows = []
    for i, (value, percent, counts) in enumerate(points):
        for j, seed in enumerate(SEEDS):
            auprc = (percent + 0.02 * ((i + j) % 3)) / 100
            rows.append({x: value, "seed": seed, "auprc": auprc, "des": percent / 2, **counts})
    return pd.DataFrame(rows)


def by_delta():
    points = [
        (0.0, 49.12, dict(missing=214, n_samples=200)),
        (1.0, 44.20, dict(missing=108, n_samples=100)),
        (2.0, 45.98, dict(missing=112, n_samples=100)),
    ]
    return curve("delta", points)


def by_samples():
    values = (60.0, 62.0, 63.0, 63.5, 63.9)
    return curve("samples_per_feature", [(k, v, dict(n_samples=20 * k)) for k, v in enumerate(values, 1)])


def test_points_of_figures_06_and_07():
    points = figure06_points(by_delta(), published("figure06"))
    ours = points[(points.source == THIS_RUN) & (points.x == 1.0)].set_index(["measure", "series"]).value
    assert ours["missing_features", "missing"] == 108
    assert ours["missing_features", "missing, with a sample"] == 100
    assert np.isclose(ours["toxicity_auprc", "missing"], 44.22)
    assert len(points[points.source == PAPER]) == 12
    points = figure07_points(by_samples(), published("figure07"))
    auprc = points.query("source == @THIS_RUN and measure == 'toxicity_auprc'")
    assert np.allclose(auprc.value, [60.02, 62.02, 63.02, 63.52, 63.92]) and np.allclose(auprc.sd, 0.02)
    des = points.query("source == @PAPER and measure == 'des'").value.tolist()
    assert des == [21.35, 18.89, 17.79, 17.14, 16.64]


@pytest.mark.parametrize(
    "points, frame, x, rows",
    [
        (figure06_points, by_delta(), "threshold", 2),
        (figure06_points, by_delta().head(0), "threshold", 2),
        (figure07_points, by_samples(), "samples", 3),
    ],
    ids=["figure 6", "figure 6 of nothing", "figure 7"],
)
def test_figures_are_labelled_and_readable_in_grey(points, frame, x, rows):
    data = points(frame, published(points.__name__.removesuffix("_points")))
    fig = two_panels(data, x)
    assert len(fig.axes) == 2 * rows and all(ax.get_ylabel() for ax in fig.axes)
    assert [ax.get_xlabel() for ax in fig.axes[-2:]] == [x, x]
    assert [ax.get_title() for ax in fig.axes[:2]] == ["this run", "published"]
    for ax in fig.axes:
        looks = [(c[0].get_marker(), c[0].get_linestyle()) for c in ax.containers]
        assert len(set(looks)) == len(looks), "curves differ by more than colour"
        assert ax.get_legend() is None, "a legend would cover data"
    if not (data.source == THIS_RUN).any():
        assert fig.axes[0].texts[0].get_text() == "no values"
    assert len(fig.legends) == (data.series[data.source == THIS_RUN].nunique() > 1)
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
    examples = example_features(FEATURES, RELEVANCE, SAMPLES, n_yes=2, n_no=1)
    assert list(examples) == EXAMPLES
    table = example_table(examples, published("table02"), texts=True, n_spans=1)
    shown = "unexplained features and those without a two-step sample are not shown"
    assert table.feature.tolist() == [3, 11, 2039, 17612, 46477], shown
    assert table["sample"].tolist() == ["best", None, None, None, None] and table.spans[0] == "the [lock]"


def test_examples_without_texts():
    examples = example_features(FEATURES, RELEVANCE, SAMPLES, n_yes=2, n_no=1)
    table = example_table(examples, published("table02"), texts=False)
    assert table[["spans", "sample"]].isna().all().all()
    assert table.note.str.contains("left out|not repeated").all()
    assert not any(t in table.to_csv() for t in ("best", "the [lock]"))


def test_examples_of_nothing():
    for nothing in (
        pd.DataFrame(columns=EXAMPLES),
        example_features(FEATURES.head(0), RELEVANCE.head(0), SAMPLES.head(0), n_yes=2, n_no=1),
    ):
        table = example_table(nothing, published("table02"), texts=True)
        assert table.label.tolist() == ["Yes", "No", "Yes", "Yes", "No"] and table.note.ne("").all()


# ---- A run's folder


def left_by(tasks):
    "What the stages leave in a run of these tasks."
    values = [(list(tasks), read_task_names), (FEATURES, read_features)]
    if "toxicity" in tasks:
        values += [
            (toxicity(), read_toxicity_scores),
            (TOXICITY_FLOOR, read_toxicity_floor),
            (by_delta(), read_by_delta),
            (by_samples(), read_by_samples),
            (RELEVANCE, read_relevance, "toxicity"),
            (SAMPLES, read_covered_samples, "toxicity"),
        ]
    if "survival" in tasks:
        values += [
            (STEERED, read_steering_scores),
            (STEERING_FLOOR, read_steering_floor),
        ]
    return values


@pytest.fixture
def run(tmp_path, monkeypatch, leave):
    "A run of the notebook in a folder of its own; every stage that it reads has finished, with nothing left."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    draw = matplotlib.figure.Figure.savefig

    def small(figure, file, **how):
        "Small pictures, to be quick."
        draw(figure, file, **{**how, "dpi": 30})

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", small)
    leave(*((None, column.read) for column in COLUMNS.values()))
    yield Run(STAGE, dict(profile="mini", n_yes=2, n_no=1, n_example_spans=2))
    plt.close("all")


def run_cells(run):
    "Executes the notebook's own Run cells. Returns the files that they left."
    namespace = vars(tables) | dict(run=run)
    for source in notebook_sources(STAGE):
        if source.startswith("#| eval: false") and "start(" not in source and "display(" not in source:
            exec(compile(source, STAGE, "exec"), namespace)
    return {name: (run.folder / name).read_bytes() for name in run.files}


NAMES_OF_TABLES = ("table01", "table13", "table14", "details", "table02_examples")


@pytest.mark.parametrize("tasks", [("toxicity", "survival"), ("reward",)])
def test_the_run_cells_on_made_up_stages(run, leave, tasks):
    "Twice: every output appears and has the same bytes; tasks that did not run are named."
    leave(*left_by(tasks))
    contents = [run_cells(run), run_cells(run)]
    expected = {f"tables/{t}.csv" for t in NAMES_OF_TABLES}
    expected |= {f"figures/figure0{i}{suffix}" for i in (6, 7) for suffix in (".png", ".csv")}
    assert contents[0] == contents[1] and expected <= set(contents[0])
    written = [p.name for p in (run.folder / "tables").glob("table01*.md")]
    assert written == ["table01.md"], "the one table that a run prints at its end"
    main = pd.read_csv(run.folder / "tables" / "table01.csv", keep_default_na=False).set_index("row")
    assert (main != "").all().all()
    if "toxicity" in tasks:
        assert "reward, instruction: this task has no scores in this run" in main.note["Ours"]
        assert main["toxicity AUPRC"]["Ours"].startswith("60.00")
        assert "the [lock]" in contents[0]["tables/table02_examples.csv"].decode()
    else:
        assert main.note["Ours"] == "all: this task has no scores in this run"
    assert pd.read_csv(run.folder / "tables" / "details.csv").note.notna().all()


def test_texts_of_data_that_may_not_be_shown_stay_out(run, leave):
    leave(*left_by(("toxicity",)), texts_may_be_shown=False)
    table = run_cells(run)["tables/table02_examples.csv"].decode()
    assert "the [lock]" not in table and "best" not in table and "licences" in table


def test_inputs_present_absent_and_broken(run, leave, asked, refused):
    left = leave((toxicity(), read_toxicity_scores))
    assert len(read_toxicity_scores(run)) == 18
    wanted = asked(read_by_delta)
    assert list(read_by_delta(run)) == list(wanted.columns)
    absent = f"{wanted.stage}/{wanted.name}"
    assert run.inputs[absent] is None, "once it exists, these tables are stale"
    wanted = asked(read_toxicity_floor)
    values = {column: [kind()] for column, kind in wanted.columns.items() if column != "base_rate"}
    left[wanted.stage].keep(wanted.name, pd.DataFrame(values))
    left[wanted.stage].finish()
    assert "no column 'base_rate'" in refused(lambda: read_toxicity_floor(run))
