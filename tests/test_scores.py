"""Scores and floors of all tasks in one layout, from made-up frames and from a run."""

import json

import numpy as np
import pandas as pd
import pytest

from fac_synthesis.run.artifacts import save_artifact
from fac_synthesis.run.parameters import UserError, published, write_atomic
from fac_synthesis.run.stages import Run
from fac_synthesis.tasks import instructions, reward, scores, steering, toxicity
from fac_synthesis.tasks.scores import (
    COLUMNS,
    FLOOR_COLUMNS,
    SCORE_COLUMNS,
    Column,
    first_where,
    main_columns,
    of_task,
    read_floors,
    read_scores,
    table_floors,
    table_scores,
)

SEEDS = (42, 43, 44)
SECTIONS = ("chat", "chat_hard", "safety", "reasoning", "average")
MEANS = {"Baseline": 0.4, "Full Dataset": 0.5, "Ours": 0.6}


def frame(value, size, trainings=("LoRA", "head only"), scale=1.0, **more):
    "A notebook's scores: one row per method, training and seed, the seeds a hundredth apart."
    rows = []
    for method, mean in MEANS.items():
        for training in trainings:
            for place, seed in enumerate(SEEDS):
                about = dict(method=method, seed=seed) | (dict(training=training) if training else {})
                rows.append(dict(about, **{value: scale * (mean + place / 100), size: 50}, **more))
    return pd.DataFrame(rows)


def all_scores():
    "What the notebooks of all tasks leave, by task."
    both = [frame("scr", "n_items", (None,), behavior=b) for b in ("sycophancy", "survival-instinct")]
    steered = pd.concat(both, ignore_index=True)
    judged = frame("wr", "n_samples", ("LoRA",), 100)
    preferred = frame("average", "n_pairs")
    return dict(
        toxicity=frame("auprc", "n_toxic"),
        reward=preferred.assign(**dict.fromkeys(SECTIONS, preferred.average)),
        sycophancy=steered,
        survival=steered,
        instruction=judged.assign(lc=judged.wr + 1, se=2.0),
    )


def all_floors():
    "What the notebooks of all tasks leave as floors, by task."
    steered = pd.DataFrame(
        dict(
            behavior=["sycophancy", "sycophancy", "survival-instinct", "survival-instinct"],
            draw=[0, 1, 0, 1],
            scr=[0.0, 0.1, -0.2, 0.0],
        )
    )
    rules = pd.DataFrame(dict(floor=["random", "TF-IDF", "TF-IDF"], rows=["", "Baseline", "Ours"]))
    return dict(
        toxicity=pd.DataFrame(dict(rows=["Baseline", "Ours"], auprc=[0.35, 0.5], base_rate=0.2)),
        reward=rules.assign(**{section: [0.5, 0.6, 0.7] for section in SECTIONS}),
        sycophancy=steered,
        survival=steered,
        instruction=pd.DataFrame(
            dict(method=["untuned backbone", "echo"], wr=[8.0, 2.0], lc=[9.0, 3.0], se=[1.0, 0.5])
        ),
    )


# ---- the list


def test_every_column_of_the_papers_tables_is_in_the_list():
    for table in ("table01", "table13", "table14"):
        listed = {column.name for column in COLUMNS.values() if table in column.tables}
        assert listed == set(published(table).column)
    assert list(main_columns()) == ["toxicity", "reward", "sycophancy", "survival", "instruction"]
    assert [column.name for column in main_columns().values()] == [
        "toxicity_auprc",
        "reward_accuracy",
        "sycophancy_scr",
        "survival_scr",
        "instruction_wr",
    ]


def test_readers_stand_beside_their_writers():
    writers = {toxicity, reward, steering, instructions}
    for column in COLUMNS.values():
        for reader in (column.read, column.read_floor):
            assert reader.__module__ in {writer.__name__ for writer in writers}


# ---- one layout


def test_scores_of_all_tasks_in_the_papers_unit():
    long = table_scores(all_scores())
    assert list(long) == SCORE_COLUMNS and set(long.column) == set(COLUMNS)
    value = long[long.method == "Ours"].groupby(["column", "training"]).value.mean()
    assert value["toxicity_auprc", "LoRA"] == pytest.approx(61) == value["chat_hard", "head only"]
    assert value["survival_scr", "steering"] == pytest.approx(61) == value["instruction_wr", "LoRA"]
    assert value["instruction_lc", "LoRA"] == pytest.approx(62) and value["instruction_sd", "LoRA"] == 2
    assert (long.n == 50).all() and set(long.seed) == set(SEEDS)


def test_both_spellings_of_head_only_are_one():
    some = all_scores()["toxicity"]
    hyphenated = some.assign(training=some.training.str.replace(" ", "-"))
    assert table_scores(dict(toxicity=hyphenated)).equals(table_scores(dict(toxicity=some)))


def test_behaviours_share_a_notebook():
    steered = all_scores()["survival"]
    assert set(of_task(steered, "survival").behavior) == {"survival-instinct"}
    assert len(of_task(steered, "sycophancy")) == len(of_task(steered, "survival")) == 9
    assert of_task(all_scores()["toxicity"], "toxicity").equals(all_scores()["toxicity"])


def test_tasks_that_are_not_there_have_no_rows():
    assert list(table_scores({})) == SCORE_COLUMNS and table_scores({}).empty
    some = all_scores()
    part = table_scores(dict(toxicity=some["toxicity"], reward=some["reward"].iloc[:0]))
    assert set(part.column) == {"toxicity_auprc"}
    assert list(table_floors({})) == FLOOR_COLUMNS and table_floors({}).empty


@pytest.mark.parametrize(
    "column, floor, trivial",
    [
        ("toxicity_auprc", 50, 20),
        ("reward_accuracy", 70, 50),
        ("chat", 70, 50),
        ("sycophancy_scr", 5, 0),
        ("survival_scr", -10, 0),
        ("instruction_lc", 9, 3),
        ("instruction_sd", 1, 0.5),
    ],
)
def test_floors(column, floor, trivial):
    levels = table_floors(all_floors()).set_index(["column", "row"])
    assert np.allclose([levels.value[column, "Floor"], levels.value[column, "Trivial"]], [floor, trivial])
    draws = {"sycophancy_scr": [0, 0.1], "survival_scr": [-0.2, 0]}
    sd = 100 * np.std(draws[column], ddof=1) if column in draws else np.nan
    assert np.isclose(levels.sd[column, "Floor"], sd, equal_nan=True)


def test_a_level_that_was_not_left_is_nan():
    floors = all_floors()
    floors["toxicity"] = floors["toxicity"].head(1)
    levels = table_floors(floors).set_index(["column", "row"]).value
    assert np.isnan(levels["toxicity_auprc", "Floor"]) and levels["toxicity_auprc", "Trivial"] == 20
    assert np.isnan(first_where(floors["toxicity"], "auprc", rows="Ours"))


# ---- from a run


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A later stage's run."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    return Run("90_tables", dict(profile="mini"))


def leave(run, stage, **frames):
    "A stage's record and artifacts, as a finished run leaves them."

    outputs = {}
    for name, value in frames.items():
        folder = run.folder / "artifacts" / stage / name
        save_artifact(folder, value, {})
        outputs[name] = dict(folder=str(folder.relative_to(run.folder)), digest=name)
    record = dict(parameters={}, outputs=outputs, files={}, notes=dict(captions=[], texts_may_be_shown=True))
    write_atomic(run.folder / "stages" / f"{stage}.json", json.dumps(record))


STAGES = {
    "40_toxicity_detection": "toxicity",
    "41_reward_modeling": "reward",
    "42_behavior_steering": "survival",
    "43_instruction_following": "instruction",
}


def leave_some(run, stages):
    "Scores and floors of some task notebooks; the others ran and left nothing."
    for stage, task in STAGES.items():
        of_it = dict(scores=complete(all_scores()[task]), floor=complete(all_floors()[task]))
        leave(run, stage, **(of_it if stage in stages else {}))


def complete(table):
    "The table with all columns that the readers want."
    wanted = ("ties", "n_pairs", "n_safe", "n_toxic", "n_test", "scr_more", "scr_all", "auprc_sd", "draws")
    return table.assign(**{name: 0 for name in wanted if name not in table})


def test_read_from_a_run(run):
    leave_some(run, STAGES)
    assert set(read_scores(run).column) == set(COLUMNS) == set(read_floors(run).column)
    assert run.inputs["43_instruction_following/scores"] == "scores"


def test_a_task_that_was_left_out_is_missing_quietly(run):
    leave_some(run, ["42_behavior_steering"])
    assert set(read_scores(run).column) == {"sycophancy_scr", "survival_scr"} == set(read_floors(run).column)
    assert run.inputs["41_reward_modeling/scores"] is None, "once it exists, what read it is stale"


def test_a_table_of_another_version_is_named(run):
    leave_some(run, STAGES)
    leave(run, "40_toxicity_detection", scores=all_scores()["toxicity"].drop(columns="auprc"))
    with pytest.raises(UserError, match="no column 'auprc'"):
        read_scores(run)


def test_a_further_task_is_a_line_in_the_list(run, monkeypatch):
    def read_poetry_scores(run):
        return frame("rhymes", "n")

    column = Column("poetry_rhymes", "poetry rhymes", "poetry", read_poetry_scores, "rhymes", "n")
    monkeypatch.setitem(scores.COLUMNS, "poetry_rhymes", column)
    leave_some(run, STAGES)
    own = read_scores(run).query("column == 'poetry_rhymes' and method == 'Ours' and training == 'LoRA'")
    assert own.value.mean() == pytest.approx(61) and main_columns()["poetry"] is column
    assert "poetry_rhymes" not in set(read_floors(run).column), "it has no floor"
