"""Corpora: roles from every source, their items, what the stage leaves, and the real files."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_files import put, put_toxicity_files, refused, transcript

import fac_synthesis.data.corpora as C
from fac_synthesis.data import planted_world
from fac_synthesis.data.items import (
    ALPACA_DEMO,
    ALPACA_EVAL_REFERENCE,
    ALPACA_SEEDS,
    LLMBAR_SUBSETS,
    prompt_key,
    question_view,
)
from fac_synthesis.data.records import NotThere, Record, text_key
from fac_synthesis.run.parameters import UserError, is_parameters_cell, notebook_cells
from fac_synthesis.run.stages import stage_output, stage_record


def numbered(role: str, n: int) -> list[Record]:
    return [Record(f"{role} {i}", i % 2) for i in range(n)]


def toy_roles() -> dict[str, list[Record]]:
    return dict(
        pretraining=[Record(f"p {i}") for i in range(20)] + [Record("TEST 1")],
        anchor=numbered("anchor", 8) + numbered("test", 1),
        seed=numbered("seed", 4),
        full=numbered("anchor", 8) * 2,
        test=numbered("test", 6) + numbered("floor", 2) + numbered("test", 2),
        floor=numbered("floor", 4) * 2,
    )


def toy_frames() -> dict[str, pd.DataFrame]:
    "Role -> texts as the planted world leaves them."
    frames = {}
    for role, records in toy_roles().items():
        rows = [dict(role=role, text=r.text, label=r.label, source="planted", turns="") for r in records]
        frames[role] = pd.DataFrame(rows).astype({"label": "Int64"})
    return frames


# ---- roles


def test_build_corpora_cleans_and_reports():
    built = C.build_corpora(toy_roles(), seed=1, max_texts=12, fixed=("floor",))
    report = built.report.set_index("role")
    assert report.rows.to_dict() == dict(pretraining=12, anchor=8, seed=4, full=8, test=8, floor=8)
    assert report.overlap.to_dict() == dict(pretraining=1, anchor=1, seed=0, full=0, test=2, floor=0)
    assert report.duplicates.to_dict() == dict(pretraining=0, anchor=0, seed=0, full=8, test=0, floor=0)
    assert report.toxic_share["anchor"] == 0.5 and np.isnan(report.toxic_share["pretraining"])
    assert report.mean_words["seed"] == 2
    assert built.labels("seed").tolist() == [0, 1, 0, 1] and built.texts("seed")[0] == "seed 0"
    assert built == C.build_corpora(toy_roles(), seed=1, max_texts=12, fixed=("floor",))
    assert built != C.build_corpora(toy_roles(), seed=2, max_texts=12, fixed=("floor",))


def test_roles_are_checked():
    roles = toy_roles()
    without_test = {role: records for role, records in roles.items() if role != "test"}
    assert "'test' has no rows" in refused(C.build_corpora, without_test)
    assert "'pretraining' has no rows" in refused(C.build_corpora, {**roles, "pretraining": []}, max_texts=3)
    unlabelled = [Record(str(i), 0) for i in range(4)] + [Record("x")]
    assert "4 safe, 0 toxic and 1 unlabelled" in refused(C.build_corpora, {**roles, "seed": unlabelled})
    assert "corpus 'anchor' has no rows" in refused(C.build_corpora, {**roles, "anchor": roles["test"]})


def test_save_and_load(tmp_path):
    built = C.build_corpora(toy_roles())
    for name in "ab":
        (tmp_path / name).mkdir()
        built.save(tmp_path / name)
    loaded = C.Corpora.load(tmp_path / "a")
    assert loaded == built and loaded.report.equals(built.report)
    assert list(loaded.roles) == list(built.roles)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second
    (tmp_path / "a" / "role_seed.parquet").unlink()
    assert "role_seed.parquet does not exist" in refused(C.Corpora.load, tmp_path / "a")
    assert "report.parquet does not exist" in refused(C.Corpora.load, tmp_path / "c")
    assert "no corpus 'train'" in refused(built.texts, "train")


def test_planted_corpora():
    frames = toy_frames()
    frames["pretraining"]["turns"] = json.dumps([["user", "p"], ["assistant", "q"]])
    built = C.planted_corpora(frames)
    assert len(built["pretraining"]) == 1
    assert built["pretraining"][0].turns[1] == ("assistant", "q")
    assert built["seed"][1].label == 1
    frames["seed"].loc[2, "label"] = 5
    assert "planted world, seed, row 3: label 5" in refused(C.planted_corpora, frames)


def test_files_corpora(tmp_path):
    train = put(tmp_path, "train.csv", "text,label\na,0\nb,1\nt1,0\n")
    test = put(tmp_path, "test.jsonl", [{"text": "t1", "label": 0}, {"text": "t2", "label": 1}])
    built = C.files_corpora(train, test)
    assert built.texts("seed") == built.texts("full") == built.texts("anchor") == ["a", "b"]
    assert built.texts("test") == ["t1", "t2"]
    anchor = put(tmp_path, "anchor.tsv", "c\t0\nd\t1\n")
    texts = put(tmp_path, "texts.txt", "one\ntwo\nt2\n")
    built = C.files_corpora(train, test, anchor, texts, max_texts=1)
    assert built.texts("full") == ["a", "b", "c", "d"]
    assert built.report.set_index("role").overlap["pretraining"] == 1
    assert len(built["pretraining"]) == 1 and built["pretraining"][0].label is None
    assert "test_file is not set" in refused(C.files_corpora, train, "")
    assert "texts.txt, line 1: there is no label" in refused(C.files_corpora, train, texts)


def test_pieces():
    assert C.pieces("a  b", 2) == ["a  b"] and C.pieces("a b c d e", 2) == ["a b", "c d", "e"]


def test_published_corpora(tmp_path):
    folder = put_toxicity_files(tmp_path)
    built = C.published_corpora(folder, seed=0, n_seed_toxic=3, n_safe=10, max_texts=0)
    assert built.texts("test") == ["Two", "four", "hh question 3", "five"]
    assert len(built["toxicchat_train"]) == 4
    assert Counter(r.label for r in built["seed"]) == {1: 3, 0: 10}
    assert {r.source for r in built["seed"] if r.label} == {"harmbench/val"}
    assert Counter(r.label for r in built["anchor"]) == {1: 16, 0: 17}
    assert Counter(r.label for r in built["full"]) == {1: 16, 0: 10}
    assert not {r.text for r in built["anchor"] if not r.label} & set(built.texts("seed"))
    assert {r.label for r in built["pretraining"]} == {None}
    assert "hh question 3" not in built.texts("pretraining") and "chosen" in built.texts("pretraining")
    assert max(len(t.split()) for t in built.texts("pretraining")) == 200
    strict = C.published_corpora(folder, 0, 3, 10, 0, exact=False)
    assert strict.texts("test") == ["four", "hh question 3", "five"]
    assert built == C.published_corpora(folder, 0, 3, 10, 0) != C.published_corpora(folder, 1, 3, 10, 0)
    assert set(C.published_corpora(folder, 0, 2, 10, 0)["seed"]) < set(built["seed"])
    assert "n_seed_toxic is 5" in refused(C.published_corpora, folder, n_seed_toxic=5, n_safe=10)


# ---- tasks


def test_every_source_has_toxicity_and_the_planted_world_has_what_it_plants():
    assert all(tasks[0] == "toxicity" for tasks in C.TASKS_OF.values())
    assert C.TASKS_OF["planted"] == ("toxicity", *planted_world.POSITIVE)
    assert C.TASKS_OF["published"] == ("toxicity", *C.ITEM_SOURCES)


def test_asked_tasks():
    assert C.asked_tasks("planted", []) == list(C.EVERY_TASK)
    assert C.asked_tasks("planted", ["reward", "toxicity"]) == ["reward", "toxicity"]
    assert "'web' must be planted, published or files" in refused(C.asked_tasks, "web", [])
    assert "for the task 'reward', only for toxicity" in refused(C.asked_tasks, "files", ["reward"])


# ---- items of the other tasks


def options(view: str) -> dict:
    return {
        "question": f"{view}\n\nChoices:\n (A) Yes, do\n (B) No, don't",
        "answer_matching_behavior": " (A)",
        "answer_not_matching_behavior": " (B)",
    }


def alpaca(instruction: str, answer: str = "As you say.") -> dict:
    return {"instruction": instruction, "input": "", "output": answer}


def put_item_files(folder: Path) -> Path:
    """A handful of rows of every published set that has items.

    One training question, one instruction and one prompt stand in the test too.
    """
    pairs = []
    for question in ("How is tea made?", "Where is the  lamp?", "What is soap?"):
        answers = dict(chosen="Yes, gladly.", rejected="No.")
        pairs.append({name: transcript(question, answer) for name, answer in answers.items()})
    put(folder, "hh_rlhf/harmless-base_test.jsonl.gz", pairs)
    compared = {"input": "where is the lamp?", "output_1": "There.", "output_2": "A hat.", "label": 1}
    for name in LLMBAR_SUBSETS:
        put(folder, f"llmbar/LLMBar/{name}/dataset.json", [compared])
    training = [options(f"May we stop you, number {i}?") for i in range(4)]
    test = [options("MAY we stop you, number 3?"), options("Shall we?")]
    for behavior in ("sycophancy", "survival-instinct"):
        put(folder, f"caa/generate/{behavior}/generate_dataset.json", training)
        put(folder, f"caa/test/{behavior}/test_dataset_ab.json", test)
    birds = [{"instruction": f"Name bird {i}.", "category": None} for i in range(3)]
    put(folder, "harm_prompts/splits/harmless_val.json", birds)
    sung = [{"input": "", "output": "La."}]
    put(folder, ALPACA_SEEDS, [{"instruction": f"Sing part {i}.", "instances": sung} for i in range(3)])
    put(folder, ALPACA_DEMO, [alpaca("Count."), alpaca("Say hello."), alpaca("Be quiet.", " ")])
    put(folder, ALPACA_EVAL_REFERENCE, [alpaca("say  hello."), alpaca("Name a tree.")])
    return folder


@pytest.fixture
def items_folder(tmp_path):
    return put_item_files(tmp_path)


@pytest.mark.parametrize(
    "task, left_out", [("reward", 1), ("sycophancy", 1), ("survival", 1), ("instruction", 1)]
)
def test_published_items_never_train_on_the_test(items_folder, task, left_out):
    items, report = C.published_items(task, items_folder, seed=1, n_seed=2)
    assert set(items.split) == {"anchor", "seed", "full", "test"}
    assert report.left_out.sum() == left_out and set(report.task) == {task}
    question = {"reward": "prompt", "instruction": "instruction"}.get(task, "question")
    asked = {split: {prompt_key(q) for q in rows[question]} for split, rows in items.groupby("split")}
    assert not asked["test"] & (asked["seed"] | asked["full"] | asked["anchor"])
    assert asked["anchor"] <= asked["full"]
    corpora = C.item_corpora(items)
    assert set(corpora.roles) == set(C.ROLES)
    assert all(set(corpora.labels(role)) == {0, 1} for role in C.ROLES[1:])
    kept = C.items_in(items, corpora)
    assert len(kept) and all(t in corpora.texts(s) for s, t in zip(kept.split, kept.text))
    smaller, _ = C.published_items(task, items_folder, seed=1, n_seed=1, n_anchor=1, n_full=1)
    assert smaller.split.value_counts()[["anchor", "seed", "full"]].tolist() == [1, 1, 1]


def test_the_texts_of_an_item(items_folder):
    first = {task: C.published_items(task, items_folder, n_seed=1)[0].iloc[0] for task in C.ITEM_SOURCES}
    assert first["instruction"].negative in ("La.", "As", "As you")
    assert first["reward"].text == first["reward"].chosen
    assert first["reward"].prompt.startswith(first["reward"].negative)
    item = first["survival"]
    assert item.text.startswith("May we stop you") and "Choices" not in item.text
    assert item.negative.startswith("Name bird") and item.behavior == "survival"
    assert question_view(options("Once.\n (A) is a letter. Do you?")["question"]).startswith("Once.")


@pytest.mark.parametrize(
    "task, gone",
    [
        ("reward", "hh_rlhf/harmless-base_test.jsonl.gz"),
        ("sycophancy", "caa/generate/sycophancy/generate_dataset.json"),
        ("survival", "harm_prompts/splits/harmless_val.json"),
        ("instruction", ALPACA_EVAL_REFERENCE),
    ],
)
def test_a_missing_file_is_told_from_a_damaged_one(items_folder, task, gone):
    (items_folder / gone).unlink()
    with pytest.raises(NotThere):
        C.published_items(task, items_folder, n_seed=1)
    if gone.endswith("gz"):
        return
    put(items_folder, gone, "[{")
    with pytest.raises(UserError) as caught:
        C.published_items(task, items_folder, n_seed=1)
    assert not isinstance(caught.value, NotThere) and "not valid JSON" in str(caught.value)


# ---- what the stage leaves


@pytest.fixture
def stage(tmp_path, monkeypatch):
    "stage(**parameters): the record that notebook 02 leaves with them; its cells run in this process."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)
    monkeypatch.delenv("FAC_RESOLVED", raising=False)

    def run(**parameters) -> dict:
        namespace = {"__name__": "__main__"}
        for cell in notebook_cells("02_corpora"):
            source = "".join(cell["source"])
            if is_parameters_cell(cell):
                exec(source, namespace)
                namespace.update(parameters)
            elif cell["cell_type"] == "code" and ("#| export" in source or "#| eval: false" in source):
                exec(source, namespace)
        return stage_record("02_corpora", "mini")

    return run


def test_the_stage_on_files_of_ones_own(stage, tmp_path):
    train = put(tmp_path, "train.csv", "text,label\na,0\nb,1\nc,0\n")
    test = put(tmp_path, "test.csv", "text,label\nt1,0\nt2,1\n")
    own = dict(source="files", train_file=str(train), test_file=str(test))
    record = stage(**own)
    assert list(record["outputs"]) == ["corpora_toxicity", "tasks"]
    assert stage_output("02_corpora", "tasks") == ["toxicity"]
    assert record["notes"] == {"captions": [], "texts_may_be_shown": False}
    assert set(record["outside"]) == {str(train), str(test)}
    assert record["metrics"]["toxicity_seed"] == 3
    assert stage(**own)["outputs"] == record["outputs"], "loaded"
    put(tmp_path, "train.csv", "text,label\na,0\nb,1\nt1,0\n")
    again = stage(**own)
    assert again["outputs"]["corpora_toxicity"] != record["outputs"]["corpora_toxicity"]
    assert again["metrics"]["toxicity_seed"] == 2


def test_the_stage_on_published_files(stage, tmp_path):
    folder = put_item_files(tmp_path / "data")
    given = dict(source="published", data_dir=str(folder), n_seed_items=1, n_safe=10, n_seed_toxic=3)
    record = stage(**given)
    tasks = ["reward", "sycophancy", "survival", "instruction"]
    assert stage_output("02_corpora", "tasks") == tasks, "there is no toxicity without its files"
    put_toxicity_files(folder)
    record = stage(**given)
    assert stage_output("02_corpora", "tasks") == ["toxicity", *tasks]
    assert set(record["outputs"]) == {
        "tasks",
        "corpora_toxicity",
        *(f"corpora_{task}" for task in tasks),
        *(f"items_{task}" for task in tasks),
    }
    assert not record["notes"]["texts_may_be_shown"] and list(record["outside"]) == [str(folder)]
    table = pd.read_csv(tmp_path / "results/mini/tables/corpora_report.csv")
    assert list(table)[:4] == ["task", "role", "rows", "positive_share"]
    sources = pd.read_csv(tmp_path / "results/mini/tables/item_sources.csv")
    assert list(sources) == ["task", "source", "items", "left_out", "reasons"]

    put(folder, "harm_prompts/advbench.json", [{"instruction": "another", "category": None}])
    changed = stage(**given)["outputs"]
    assert changed["corpora_toxicity"] != record["outputs"]["corpora_toxicity"]
    assert changed["corpora_survival"] == record["outputs"]["corpora_survival"], "made of other files"
    (folder / ALPACA_EVAL_REFERENCE).unlink()
    stage(**given)
    assert stage_output("02_corpora", "tasks") == ["toxicity", *tasks[:3]]
    with pytest.raises(NotThere):
        stage(**given, tasks=["instruction"])


def test_the_stage_on_the_planted_world(stage, tmp_path, monkeypatch):
    texts = pd.concat([frame.assign(task="reward") for frame in toy_frames().values()], ignore_index=True)
    items = pd.DataFrame(dict(split=["seed", "anchor", "test"], text=["seed 1", "test 0", "test 1"]))
    monkeypatch.setattr(planted_world, "read_planted_texts", lambda run: texts)
    monkeypatch.setattr(planted_world, "read_planted_items", lambda run, task: items)
    record = stage(tasks=["reward"])
    assert list(record["outputs"]) == ["corpora_reward", "tasks", "items_reward"]
    assert record["notes"] == {"captions": [C.PLANTED_NOTE], "texts_may_be_shown": True}
    kept = stage_output("02_corpora", "items_reward")
    assert kept.text.tolist() == ["seed 1", "test 1"], "the test has the anchor's"
    caption = (tmp_path / "results/mini/tables/corpora_report.md").read_text().splitlines()[0]
    assert caption == f"Rows per task and role after cleaning. {C.PLANTED_NOTE}"
    counts = pd.read_csv(tmp_path / "results/mini/figures/corpora_roles.csv")
    assert list(counts) == ["role", "label", "rows"]
    assert "no corpora for the task 'chess'" in refused(stage, tasks=["chess"])


# ---- the real files


@pytest.fixture(scope="module")
def data_dir() -> str:
    folder = os.environ.get("FAC_DATA_DIR", "")
    if not folder:
        pytest.skip("FAC_DATA_DIR is not set: no folder with the published files")
    return folder


def test_real_corpora(data_dir):
    built = C.published_corpora(data_dir, seed=0, n_seed_toxic=30, n_safe=1000, max_texts=5000)
    report = built.report.set_index("role")
    assert report.rows.to_dict() == dict(
        pretraining=5000, anchor=5791, seed=1030, full=3894, test=2768, toxicchat_train=2801
    )
    assert report.toxic_share["test"] == pytest.approx(0.1207, abs=1e-4) and report.overlap["test"] == 85
    tested = set(map(text_key, built["test"]))
    for role in ("pretraining", "anchor", "seed", "full"):
        assert not tested & set(map(text_key, built[role])), role
    assert len({r.source for r in built["pretraining"]}) == 10


@pytest.mark.parametrize(
    "task, n_test", [("reward", 333), ("sycophancy", 50), ("survival", 50), ("instruction", 805)]
)
def test_real_items_become_corpora(data_dir, task, n_test):
    items, _ = C.published_items(task, data_dir)
    kept = C.items_in(items, C.item_corpora(items))
    assert (kept.split == "test").sum() == n_test
    assert (kept.split == "seed").sum() == 40
    assert (kept.split == "anchor").sum() > 390
