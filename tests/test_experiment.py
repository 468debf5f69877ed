"""Parameters, artifacts, keys and tables: what 00_experiment promises, and what it does when the disk or the user fails."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fac_synthesis.run.artifacts import (
    check_artifact,
    code_fingerprint,
    content_key,
    executed_sources,
    load_artifact,
    save_artifact,
    stamp,
)
from fac_synthesis.run.parameters import (
    UserError,
    coerce,
    declared_parameters,
    load_profile,
    parameter_table,
    published,
    resolve_parameters,
    resolve_path,
    write_atomic,
)
from fac_synthesis.run.stages import (
    PLANTED_NOTE,
    is_stale,
    markdown_table,
    progress,
    seed_everything,
    stage_output,
    stage_record,
    start,
)

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = "profile: str = 'mini'  # scale\nseed: int = 0  # seed (paper: 42)\nk: int = 3  # how many (paper: 20, Appendix J)\nrate: float = 0.5  # rate\nnames: list[str] = ['a']  # names\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with two notebooks and two profiles; the working directory is in it."
    (tmp_path / "nbs" / "profiles").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("")
    for stage in ("00_first", "10_second"):
        cells = [
            dict(
                cell_type="code",
                id="p",
                metadata={"tags": ["parameters"]},
                source=PARAMETERS,
                outputs=[],
                execution_count=None,
            ),
            dict(cell_type="code", id="c", metadata={}, source="x = 1", outputs=[], execution_count=None),
        ]
        (tmp_path / "nbs" / f"{stage}.ipynb").write_text(
            json.dumps(
                dict(
                    cells=cells,
                    metadata={
                        "kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}
                    },
                    nbformat=4,
                    nbformat_minor=5,
                )
            )
        )
    (tmp_path / "nbs/profiles/mini.yaml").write_text("{}\n")
    (tmp_path / "nbs/profiles/small.yaml").write_text("10_second:\n  k: 7\n  rate: 1e-3\n  names: [$WHERE]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAC_RESULTS_DIR", raising=False)
    monkeypatch.delenv("FAC_RESOLVED", raising=False)
    return tmp_path


def begin(stage="10_second", **values):
    "A run as a notebook starts it."
    return start(stage, {**{k: d["default"] for k, d in declared_parameters(stage).items()}, **values})


# ---- parameters


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        ("3", "int", 3),
        (3, "float", 3.0),
        ("1e-4", "float", 1e-4),
        ("true", "bool", True),
        ("False", "bool", False),
        (5, "str", "5"),
        ("x", "str", "x"),
        ("[1, 2]", "list[int]", [1, 2]),
        ("0.0,1.0", "list[float]", [0.0, 1.0]),
        ((1, 2), "list[float]", [1.0, 2.0]),
        ("a,b", "list[str]", ["a", "b"]),
        ([], "list[str]", []),
    ],
)
def test_coerce_follows_the_annotation(value, kind, expected):
    result = coerce(value, kind, "it")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    "value, kind",
    [
        ("abc", "float"),
        ("1.5", "int"),
        (1.5, "int"),
        (True, "int"),
        (True, "float"),
        ("yes", "bool"),
        (1, "bool"),
        (None, "str"),
        (3, "list[int]"),
        (["x"], "list[int]"),
        (1, "dict"),
    ],
)
def test_coerce_refuses_in_one_sentence(value, kind):
    with pytest.raises(UserError, match=r"^k of 10_sae must be .*but .* was given$"):
        coerce(value, kind, "k of 10_sae")


def test_parameters_are_read_from_the_notebook(project):
    d = declared_parameters("00_first")
    assert (
        d["k"] == dict(kind="int", default=3, paper="20, Appendix J", meaning="how many")
        and d["rate"]["paper"] == ""
    )
    with pytest.raises(UserError, match="the stages are 00_first, 10_second"):
        declared_parameters("99_none")


def test_default_yields_to_profile_yields_to_given(project, monkeypatch):
    monkeypatch.setenv("WHERE", "there")
    assert resolve_parameters("10_second", "mini")["k"] == 3
    assert resolve_parameters("10_second", "small") == dict(
        profile="small", seed=0, k=7, rate=1e-3, names=["$WHERE"]
    )
    assert resolve_parameters("10_second", "small", {"k": "9"})["k"] == 9


def test_profile_strings_read_the_environment(project, monkeypatch):
    (project / "nbs/profiles/small.yaml").write_text("10_second:\n  names: $WHERE\n")
    monkeypatch.setenv("WHERE", "a,b")
    assert load_profile("small") == {"10_second": {"names": "a,b"}}
    monkeypatch.delenv("WHERE")
    assert load_profile("small") == {"10_second": {"names": ""}}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("10_second: {kk: 1}", "profile small sets 'kk', which 10_second does not have"),
        ("11_none: {k: 1}", "there is no notebook 11_none"),
    ],
)
def test_a_profile_names_only_what_exists(project, text, sentence):
    (project / "nbs/profiles/small.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_profile("small")
    with pytest.raises(UserError, match="there is no profile 'smal'; the profiles are mini, small"):
        load_profile("smal")


def test_a_run_is_frozen(project, monkeypatch):
    run = begin(k=5)
    assert (run.k, run.seed, run.profile, run.dir) == (5, 0, "mini", project / "results/mini")
    with pytest.raises(AttributeError, match="parameters are frozen; change 'k'"):
        run.k = 6
    with pytest.raises(AttributeError, match="10_second has no parameter 'kk'"):
        run.kk
    table = parameter_table("10_second", run.parameters).set_index("parameter")
    assert (
        list(table.loc["k", ["value", "default", "paper"]]) == [5, 3, "20, Appendix J"]
        and "<table" in run._repr_html_()
    )
    with pytest.raises(UserError, match="run the parameters cell first, k has no value"):
        start("10_second", {"profile": "mini", "seed": 0, "rate": 0.5, "names": []})
    with pytest.raises(UserError, match="k of 10_second must be int"):
        begin(k="many")


def test_by_hand_a_default_yields_to_the_profile_and_under_the_runner_it_does_not(project, monkeypatch):
    assert begin(profile="small").k == 7
    monkeypatch.setenv("FAC_RESOLVED", "1")
    assert begin(profile="small").k == 3


def test_the_project_is_found_from_its_folders_and_paths_are_relative_to_it(project, monkeypatch):
    monkeypatch.chdir(project / "nbs")
    assert resolve_path("../data") == project.parent / "data" and resolve_path("/a") == Path("/a")


# ---- files


def test_write_atomic_leaves_the_old_file_where_the_disk_is_full(tmp_path, monkeypatch):
    file = write_atomic(tmp_path / "deep" / "a.txt", "old")

    def full(*a):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"^could not write .*a\.txt: No space left on device; free some space"
    ):
        write_atomic(file, b"new")
    assert file.read_text() == "old" and [p.name for p in file.parent.iterdir()] == ["a.txt"]


VALUES = [
    pd.DataFrame({"a": [1, 2], "t": ["x", "y"]}),
    {"w": torch.arange(4.0)},
    {"w": np.arange(4)},
    {"auprc": [0.5]},
    ["ä", None],
    {},
]


@pytest.mark.parametrize("value", VALUES, ids=["frame", "tensors", "arrays", "json", "list", "empty"])
def test_artifacts_come_back_as_they_were(tmp_path, value):
    folder = save_artifact(tmp_path / "a", value, {"why": "test"})
    back = load_artifact(folder)
    if isinstance(value, pd.DataFrame):
        pd.testing.assert_frame_equal(back, value)
    elif isinstance(value, dict) and "w" in value:
        assert (back["w"] == value["w"]).all() and type(back["w"]) is type(value["w"])
    else:
        assert back == value
    digest = check_artifact(folder)
    assert check_artifact(save_artifact(tmp_path / "b", value, {"why": "another"})) == digest, (
        "the digest is that of the content"
    )


class Saved:
    def __init__(self, text):
        self.text = text

    def save(self, folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "t.txt").write_text(self.text)

    @classmethod
    def load(cls, folder):
        return cls((folder / "sub" / "t.txt").read_text())


def test_a_class_writes_its_own_files(tmp_path):
    assert load_artifact(save_artifact(tmp_path / "a", Saved("hello"), {}), Saved).text == "hello"


@pytest.mark.parametrize(
    "harm, sentence",
    [
        (
            lambda f: f.write_bytes(f.read_bytes()[:10]),
            r"is truncated \(10 bytes, \d+ were written\): remove its folder and run again",
        ),
        (lambda f: f.unlink(), r"is truncated \(0 bytes"),
        (
            lambda f: f.write_bytes(f.read_bytes()[:-1] + b"x"),
            "was changed after it was written: remove its folder and run again",
        ),
        (lambda f: f.with_name("artifact.json").write_text("{"), r"has no readable artifact\.json"),
        (lambda f: f.with_name("artifact.json").unlink(), r"has no readable artifact\.json"),
    ],
)
def test_a_damaged_artifact_is_reported(tmp_path, harm, sentence):
    folder = save_artifact(tmp_path / "a", pd.DataFrame({"a": range(100)}), {})
    harm(folder / "data.parquet")
    with pytest.raises(UserError, match=sentence):
        load_artifact(folder)


def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(tmp_path):
    "The operating system itself refuses: no file of this process may grow beyond 64 kB. Each library wraps that in its own way."
    code = """
import resource, signal, sys; from pathlib import Path
import numpy as np, pandas as pd, torch
from fac_synthesis.run.artifacts import save_artifact
from fac_synthesis.run.parameters import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for value in (pd.DataFrame({'a': np.random.rand(200_000)}), {'w': torch.rand(200_000)}, {'w': np.random.rand(200_000)}, list(range(200_000))):
    try: save_artifact(Path(sys.argv[1]) / 'a', value, {})
    except UserError as e: print(e)"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 and not list(tmp_path.iterdir())
    for line in done.stdout.splitlines():
        assert re.fullmatch(
            r"could not write a: .*; free some space and run again, nothing half-written was kept", line
        )


def test_a_full_disk_keeps_the_artifact_that_was_there(tmp_path, monkeypatch):
    folder = save_artifact(tmp_path / "a", {"n": 1}, {})

    def full(*a, **k):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="could not write a: No space left on device"):
            save_artifact(folder, {"n": 2}, {})
    assert load_artifact(folder) == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_bug_keeps_its_traceback_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_artifact(tmp_path / "a", {"n": object()}, {})
    assert not list(tmp_path.iterdir())


# ---- keys and fingerprints


def test_keys_follow_content():
    assert content_key(a=1, b=[1, 2]) == content_key(b=[1, 2], a=1) != content_key(a=1, b=[2, 1])


def test_fingerprints_ignore_prose_and_see_code(project):
    def of(*sources):
        return code_fingerprint(list(sources))

    assert (
        of("def f(x):\n    'doc'\n    return x")
        == of("def f(x):\n    'other'\n\n    # comment\n    return x")
        != of("def f(x): return -x")
    )
    assert of("class A:\n    'doc'") == of("class A: pass") and of("%magic") != of("%other")
    package = project / "fac_synthesis"
    package.mkdir()
    (package / "base.py").write_text("from .deep import d\nB = 1")
    (package / "deep.py").write_text("d = 1")
    (package / "experiment.py").write_text("E = 1")
    use = "from fac_synthesis.base import B\nfrom fac_synthesis.experiment import E"
    first = of(use)
    (package / "experiment.py").write_text("E = 2")
    assert of(use) == first, "experiment moves results, it does not change them"
    (package / "deep.py").write_text("d = 2")
    assert of(use) != first, "a module imported by an imported module counts"


def test_the_cells_that_count_are_those_that_the_executing_one_depends_on():
    cells = [
        "from math import sqrt",
        "def f(): return g()",
        "for n in (1, 2): total = n",
        "def g(): return sqrt(2)",
        "f()  # an example",
        "bench = f()",
        "run.cached('x', bench)",
    ]
    of = lambda *cells: executed_sources({"In": list(cells)})
    assert of(*cells) == [cells[0], cells[1], cells[3], cells[5], cells[6]] and executed_sources({}) == []
    assert of(*cells, "def g(): return 2", cells[-1]) == [
        cells[1],
        "def g(): return 2",
        cells[5],
        cells[6],
    ], "the latest version of a definition counts"
    assert of(*cells, "bench = 3", "print(f())", cells[-1])[-2:] == ["bench = 3", cells[-1]]
    assert of("# Parameters\nn = 1", "run.cached('x', total + n)")[0].startswith("run."), (
        "parameters are part of the key anyway"
    )
    assert of("def f(): return 1", "use(f)", "f = 3", "use(f)") == of("f = 3", "use(f)")


def test_an_edited_function_below_start_makes_another_key(project):
    def session(source):
        space = {
            "In": [
                "#| export\nfrom fac_synthesis.experiment import start",
                "run = start('10_second', globals())",
            ],
            **begin().parameters,
        }
        run = start("10_second", space)  # stands above the definition, as in every notebook
        space["In"] += ["#| export\n" + source, "run.cached('answer', lambda work: f())"]
        exec(source, space)
        return run.cached("answer", lambda work: {"answer": space["f"]()})["answer"]

    assert session("def f(): return 1") == 1 == session("def f():\n    'Says one.'\n    return 1")
    assert session("def f(): return 2") == 2


# ---- a run and its record


def test_cached_computes_once_per_key_and_resumes_in_its_work_folder(project):
    calls = []

    def compute(work):
        calls.append(work)
        if not (work / "half").exists():
            (work / "half").write_text("")
            raise KeyboardInterrupt
        return {"answer": 42}

    with pytest.raises(KeyboardInterrupt):
        begin().cached("answer", compute)
    assert begin().cached("answer", compute) == {"answer": 42} == begin().cached("answer", compute)
    assert len(calls) == 2 and calls[0] == calls[1] and not calls[0].exists()
    begin(k=4).cached("answer", lambda work: {"answer": 43})
    begin().cached("answer", lambda work: {"answer": 44}, key="other")
    assert len(list((project / "results/mini/artifacts/10_second").iterdir())) == 3


def test_seeds_are_set_before_a_computation(project):
    draw = lambda work: [float(torch.rand(1)), float(np.random.rand()), __import__("random").random()]
    first = begin().cached("draw", draw)
    torch.rand(5)
    assert begin().cached("draw", draw, key="again") == first != begin(seed=1).cached("draw", draw)
    seed_everything(3)
    a = torch.rand(2)
    seed_everything(3)
    assert torch.equal(a, torch.rand(2))


def test_stages_find_each_other_by_record(project):
    first = begin("00_first")
    first.cached("numbers", lambda work: [1, 2])
    first.finish({"n": 2, "curve": [1]})
    second = begin()
    assert second.input("00_first", "numbers") == [1, 2] and second.upstream("00_first").k == 3
    with pytest.raises(UserError, match="00_first leaves no 'letters'; it leaves numbers"):
        second.input("00_first", "letters")
    assert stage_output("00_first", "numbers") == [1, 2]
    with pytest.raises(UserError, match="00_first leaves no 'letters'"):
        stage_output("00_first", "letters")
    with pytest.raises(UserError, match="10_second has not run in profile mini"):
        stage_output("10_second", "sum")
    second.cached("sum", lambda work: 3)
    shown = second.finish({"n": 2, "share": 0.5, "curve": [1]})
    assert [repr(v) for v in shown["10_second"]] == ["2", "0.5"], "a count stays a count"
    record = stage_record("10_second", "mini")
    assert (
        set(record["inputs"]) == {"00_first/numbers", "00_first/parameters"}
        and set(record["outputs"]) == {"sum"}
        and record["peak_mb"] > 0
    )
    (project / "results/mini/stages/10_second.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: remove it and run 10_second again"):
        stage_record("10_second", "mini")


def test_is_stale_names_the_reason(project):
    first = begin("00_first")
    first.cached("numbers", lambda work: [1, 2])
    first.finish()
    outside = project / "rows.csv"
    outside.write_text("a")
    run = begin()
    run.reads_file("rows.csv")
    run.input("00_first", "numbers")
    run.cached("sum", lambda work: 3)
    assert is_stale("10_second", "mini", run.parameters) == "never ran"
    run.table(pd.DataFrame({"a": [1]}), "t")
    run.finish()
    why = lambda **values: is_stale("10_second", "mini", {**run.parameters, **values})
    assert (why(), why(k=4)) == ("", "parameters")
    outside.write_text("ab")
    assert why() == "files read"
    run.reads_file("rows.csv")
    run.finish()
    assert why() == ""
    table = project / "results/mini/tables/t.csv"
    old = table.read_text()
    table.write_text("x")
    assert why() == "outputs"
    table.write_text(old)
    assert why() == ""
    again = begin("00_first", k=9)
    again.cached("numbers", lambda work: [1, 2])
    again.finish()
    assert why() == "", "the same content under another key"
    again = begin("00_first")
    again.cached("numbers", lambda work: [1, 3], key=1)
    again.finish()
    assert why() == "inputs"
    path = project / "nbs/10_second.ipynb"
    path.write_text(path.read_text().replace("x = 1", "x = 2"))
    assert why() == "code"


def test_stamps_follow_files_and_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = stamp(tmp_path)
    assert [s[:2] for s in first] == [["a/x", 1]]
    (tmp_path / "b").write_text("12")
    assert stamp(tmp_path) != first and stamp(tmp_path / "b")[0][1] == 2 and stamp(tmp_path / "none") == []


# ---- tables, numbers, progress


def test_a_mini_table_says_that_it_is_the_planted_world(project):
    frame = pd.DataFrame({"method": ["ours | two", None], "AUPRC": [62.6, np.nan], "n": [200, 7]})
    begin().table(frame, "t", "A caption.")
    text = (project / "results/mini/tables/t.md").read_text()
    assert (
        text.startswith(f"A caption. {PLANTED_NOTE}\n\n| method |")
        and "| ours \\| two | 62.60 | 200 |" in text
        and "| – | – | 7 |" in text
    )
    begin(profile="small").table(frame, "t", "A caption.")
    assert (project / "results/small/tables/t.md").read_text().startswith("A caption.\n") and (
        project / "results/small/tables/t.csv"
    ).read_text().startswith("method,AUPRC,n\n")
    assert markdown_table(pd.DataFrame({"a": []})) == "| a |\n| --- |\n"


def test_a_figure_is_the_same_bytes_twice(project):
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


def test_the_published_numbers_are_at_hand(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(published("index")) > 20
    with pytest.raises(UserError, match="hold no 'table99'; there are claims, "):
        published("table99")


def test_progress_speaks_now_and_then(capsys):
    assert list(progress(range(3), "quick")) == [0, 1, 2] and capsys.readouterr().out == ""
    import time

    for _ in progress(iter(range(4)), "slow", unit="text", every=0.03):
        time.sleep(0.02)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("· slow: 4 texts, ") and all(
        re.fullmatch(r"· slow: \d texts, [\d.e+]+ texts/s", l) for l in lines
    )
    for _ in progress([1, 2], "counted", every=0.0):
        pass
    assert "· counted: 1 of 2 steps" in capsys.readouterr().out
