"""A run of a notebook: load or compute, what it leaves for others, and when its record no longer holds."""

import re
import time

import numpy as np
import pandas as pd
import pytest
import torch

from fac_synthesis.run import artifacts, stages
from fac_synthesis.run.parameters import LeftOut, UserError, published
from fac_synthesis.run.stages import (
    is_stale,
    left_out,
    markdown_table,
    progress,
    seed_everything,
    stage_output,
    stage_record,
    stamp,
)

# ---- load or compute


def answer(question, work):
    "Is killed at the first try, and goes on in its work folder at the second."
    if not (work / "half").exists():
        (work / "half").write_text("")
        raise KeyboardInterrupt
    return {"answer": 42, "question": question}


def numbers(n):
    return list(range(n))


def draws(n):
    return [float(torch.rand(1)), float(np.random.rand())]


def test_cached_computes_once_per_key_and_resumes_in_its_work_folder(project, begin):
    with pytest.raises(KeyboardInterrupt):
        begin().cached("answer", answer, "six times seven")
    folder = project / "results/mini/artifacts/10_second"
    assert [p.suffix for p in folder.iterdir()] == [".work"]
    first = begin().cached("answer", answer, "six times seven")
    assert first == {"answer": 42, "question": "six times seven"} and len(list(folder.iterdir())) == 1
    assert begin().cached("answer", answer, "six times seven") == first and len(list(folder.iterdir())) == 1


@pytest.fixture
def counted(begin, monkeypatch):
    "counted(name, n, **values): how often `numbers` is computed for that."
    calls = []
    monkeypatch.setattr(stages, "save_artifact", lambda *a: calls.append(1) or artifacts.save_artifact(*a))

    def count(name="numbers", n=3, **values):
        before = len(calls)
        begin(**values).cached(name, numbers, n)
        return len(calls) - before

    return count


def test_a_key_holds_what_is_used_and_nothing_else(counted):
    assert counted() == 1 and counted() == 0
    assert counted(k=9, rate=0.1, names=["b"]) == 0, "a parameter that the function does not get"
    assert counted(n=4) == 1 and counted(seed=1) == 1 and counted(name="others") == 1


def test_seeds_are_set_before_a_computation(begin):
    first = begin().cached("draw", draws, 1)
    torch.rand(5)
    assert begin().cached("draw", draws, 2) == first != begin(seed=1).cached("draw", draws, 1)
    seed_everything(3)
    a = torch.rand(2)
    seed_everything(3)
    assert torch.equal(a, torch.rand(2))


def in_a_notebook(begin, *cells):
    "The globals of a notebook that has executed these cells after its start."
    space = {
        "In": ["#| export\nfrom fac_synthesis.run.stages import start", "run = start('10_second', globals())"]
    }
    space.update(begin().parameters, __name__="__main__")
    space["run"] = stages.start("10_second", space)
    for cell in cells:
        space["In"].append(cell)
        exec(cell, space)
    return space


def test_an_edited_function_below_start_makes_another_key(begin):
    def session(*cells):
        space = in_a_notebook(begin, *cells)
        return space["run"].cached("answer", space["f"])

    assert session("def f():\n    return 1") == 1 == session("def f():\n    'Says one.'\n    return 1")
    assert session("def g():\n    return 1", "def f():\n    return g() + 1") == 2
    assert session("def g():\n    return 2", "def f():\n    return g() + 1") == 3


@pytest.mark.parametrize(
    "cell, sentence",
    [
        ("def f():\n    return run.k", "f uses 'run', which no key can hold"),
        ("def g():\n    return run.k\ndef f():\n    return g()", "f uses 'run', which no key can hold"),
        ("half = run.k / 2\ndef f():\n    return half", "f uses 'run', which no key can hold"),
        ("f = lambda: 1", "only a function with a name can be cached"),
    ],
)
def test_a_function_whose_key_would_forget_something_is_refused(begin, cell, sentence):
    space = in_a_notebook(begin, cell)
    with pytest.raises(UserError, match=sentence):
        space["run"].cached("answer", space["f"])


def test_what_has_no_content_is_no_argument(begin):
    with pytest.raises(TypeError, match="a Run cannot be compared by content"):
        begin().cached("answer", numbers, begin())


def test_what_was_put_together_is_kept(begin):
    run = begin()
    assert run.keep("rows", [1, 2]) == [1, 2]
    run.finish()
    assert stage_output("10_second", "rows") == [1, 2]


# ---- a run and its record


def test_stages_find_each_other_by_record(project, begin):
    first = begin("00_first")
    first.cached("numbers", numbers, 2)
    first.finish({"n": 2, "curve": [1]})
    second = begin()
    assert second.input("00_first", "numbers") == [0, 1] and second.setting("00_first", "k") == 3
    with pytest.raises(UserError, match="00_first leaves no 'letters'; it leaves numbers"):
        second.input("00_first", "letters")
    assert stage_output("00_first", "numbers") == [0, 1]
    with pytest.raises(UserError, match="10_second has not run in profile mini"):
        stage_output("10_second", "sum")
    second.keep("sum", 3)
    shown = second.finish({"n": 2, "share": 0.5})
    assert shown.values.tolist() == [
        ["reads", "00_first", "numbers, k (parameter)"],
        ["writes", "artifacts", "sum"],
        ["says", "metrics", "n 2, share 0.5"],
    ]
    record = stage_record("10_second", "mini")
    assert set(record["inputs"]) == {"00_first/numbers", "00_first:k"} and set(record["outputs"]) == {"sum"}
    assert record["peak_mb"] > 0
    (project / "results/mini/stages/10_second.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: remove it and run 10_second again"):
        stage_record("10_second", "mini")


def test_a_table_that_a_stage_did_not_leave_is_empty_and_its_coming_is_noticed(begin):
    columns = {"method": str, "score": float}
    begin("00_first").finish()
    run = begin()
    assert list(run.frame("00_first", "scores", columns)) == ["method", "score"]
    run.finish()
    assert is_stale("10_second", "mini", run.parameters) == ""
    first = begin("00_first")
    first.keep("scores", pd.DataFrame({"method": ["ours"], "score": [1.0]}))
    first.finish()
    assert is_stale("10_second", "mini", run.parameters) == "inputs"
    assert begin().frame("00_first", "scores", columns).score.tolist() == [1.0]
    with pytest.raises(UserError, match="scores of 00_first has no column 'sd': another version wrote it"):
        begin().frame("00_first", "scores", {"sd": float})


def test_notes_travel_with_the_data(project, begin):
    first = begin("00_first")
    first.note("An artificial language.")
    first.keep("texts", ["a"])
    first.finish()
    second = begin()
    second.input("00_first", "texts")
    assert second.shows_texts
    second.table(pd.DataFrame({"a": [1]}), "t", "A caption.")
    caption = (project / "results/mini/tables/t.md").read_text().splitlines()[0]
    assert caption == "A caption. An artificial language."
    first.note(texts_may_be_shown=False)
    first.finish()
    third = begin()
    third.setting("00_first", "k")
    assert not third.shows_texts, "private texts stay private, whatever the profile is called"


def test_a_stage_without_work_is_done_with_its_reason(begin):
    run = begin()
    run.keep("early", 1)
    with pytest.raises(LeftOut, match="this run has no reward items"):
        left_out(run, "this run has no reward items")
    record = stage_record("10_second", "mini")
    assert record["metrics"] == {"left_out": "this run has no reward items"} and set(record["outputs"]) == {
        "early"
    }
    assert is_stale("10_second", "mini", run.parameters) == ""


def test_is_stale_names_the_reason(project, begin):
    first = begin("00_first")
    first.cached("numbers", numbers, 2)
    first.finish()
    outside = project / "rows.csv"
    outside.write_text("a")
    run = begin()
    run.reads("rows.csv")
    run.input("00_first", "numbers")
    published("table01")
    assert is_stale("10_second", "mini", run.parameters) == "never ran"
    run.table(pd.DataFrame({"a": [1]}), "t")
    run.finish()

    def why(**values):
        return is_stale("10_second", "mini", {**run.parameters, **values})

    assert (why(), why(k=4)) == ("", "parameters")
    outside.write_text("ab")
    assert why() == "files read"
    run.reads("rows.csv")
    run.finish()
    assert why() == ""
    numbers_of_the_paper = project / "nbs/published/table01.csv"
    old = numbers_of_the_paper.read_text()
    numbers_of_the_paper.write_text("row,value\n")
    assert why() == "files read"
    numbers_of_the_paper.write_text(old)
    table = project / "results/mini/tables/t.csv"
    old = table.read_text()
    table.write_text("x")
    assert why() == "outputs"
    table.write_text(old)
    assert why() == ""
    again = begin("00_first", k=9)
    again.cached("numbers", numbers, 2)
    again.finish()
    assert why() == "", "the same content, and the parameter was not asked for"
    again = begin("00_first")
    again.cached("numbers", numbers, 3)
    again.finish()
    assert why() == "inputs"
    path = project / "nbs/10_second.ipynb"
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    assert why() == "code"


def test_what_is_edited_while_a_stage_runs_is_noticed_at_its_end(project, begin, capsys, monkeypatch):
    run = begin()
    path = project / "nbs/10_second.ipynb"
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    run.finish()
    assert "edited while this stage ran: 10_second.ipynb" in capsys.readouterr().out
    assert is_stale("10_second", "mini", run.parameters) == "code", (
        "the record is of the code that was loaded"
    )
    run = begin()
    package, name = artifacts.LOADED, "fac_synthesis.run.parameters"
    monkeypatch.setattr(stages, "read_package", lambda: {**package, name: "changed = 1"})
    run.finish()
    assert "edited while this stage ran: fac_synthesis.run.parameters" in capsys.readouterr().out
    assert stage_record("10_second", "mini")["edited"] == [name]
    with pytest.raises(
        UserError, match="changed after this kernel loaded it: restart the kernel and run all"
    ):
        begin()


def test_cells_that_the_file_does_not_hold_are_noticed(begin, capsys):
    space = in_a_notebook(begin, "x = 3  # edited in the browser, not saved")
    space["run"].finish()
    assert "edited while this stage ran: 10_second.ipynb" in capsys.readouterr().out


def test_stamps_follow_files_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = stamp(tmp_path)
    assert [s[:2] for s in first] == [["a/x", 1]]
    (tmp_path / "b").write_text("12")
    assert stamp(tmp_path) != first and stamp(tmp_path / "b")[0][1] == 2 and stamp(tmp_path / "none") == []


# ---- tables, figures, progress


def test_a_table_for_machines_and_one_for_people(project, begin):
    frame = pd.DataFrame({"method": ["ours | two", None], "AUPRC": [62.6, np.nan], "n": [200, 7]})
    begin().table(frame, "t", "A caption.")
    text = (project / "results/mini/tables/t.md").read_text()
    assert text.startswith("A caption.\n\n| method |") and "| ours \\| two | 62.60 | 200 |" in text
    assert "| – | – | 7 |" in text
    assert (project / "results/mini/tables/t.csv").read_text().startswith("method,AUPRC,n\n")
    assert markdown_table(pd.DataFrame({"a": []})) == "| a |\n| --- |\n"


def test_a_figure_is_the_same_bytes_twice(project, begin):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    def draw():
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        begin().figure(figure, "f", pd.DataFrame({"y": [1, 2]}))
        plt.close(figure)
        return (project / "results/mini/figures/f.png").read_bytes()

    assert draw() == draw() and (project / "results/mini/figures/f.csv").read_text() == "y\n1\n2\n"


def test_progress_speaks_now_and_then(capsys):
    assert list(progress(range(3), "quick")) == [0, 1, 2] and capsys.readouterr().out == ""
    for _ in progress(iter(range(4)), "slow", unit="text", every=0.03):
        time.sleep(0.02)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("· slow: 4 texts, ")
    assert all(re.fullmatch(r"· slow: \d texts, [\d.e+]+ texts/s", line) for line in lines)
    for _ in progress([1, 2], "counted", every=0.0):
        pass
    assert "· counted: 1 of 2 steps" in capsys.readouterr().out
