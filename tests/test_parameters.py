"""Parameters, profiles, folders and files of the project, and what is said where the user fails."""

import errno
import os
from pathlib import Path

import pytest
from conftest import PARAMETERS, notebook_text

from fac_synthesis.run import parameters
from fac_synthesis.run.parameters import (
    UserError,
    coerce,
    declared_parameters,
    load_profile,
    parameter_table,
    project_file,
    published,
    resolve_parameters,
    resolve_path,
    write_atomic,
)
from fac_synthesis.run.stages import start

ROOT = Path(__file__).resolve().parent.parent


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
    assert d["k"] == dict(kind="int", default=3, paper="20, Appendix J", meaning="how many")
    assert d["rate"]["paper"] == "" and d["rate"]["meaning"] == "rate, per step", (
        "comments below belong to it"
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


def test_a_run_is_frozen(project, monkeypatch, begin):
    run = begin(k=5)
    assert (run.k, run.seed, run.profile, run.folder) == (5, 0, "mini", project / "results/mini")
    with pytest.raises(AttributeError, match="parameters are frozen; change 'k'"):
        run.k = 6
    with pytest.raises(AttributeError, match="10_second has no parameter 'kk'"):
        print(run.kk)
    table = parameter_table("10_second", run.parameters).set_index("parameter")
    assert list(table.loc["k", ["value", "default", "paper"]]) == [5, 3, "20, Appendix J"]
    assert list(table.index) == ["seed", "k"], "only what differs from the default or from the paper"
    assert "<table" in run._repr_html_()
    with pytest.raises(UserError, match="run the parameters cell first, k has no value"):
        start("10_second", {"profile": "mini", "seed": 0, "rate": 0.5, "names": []})
    with pytest.raises(UserError, match="k of 10_second must be int"):
        begin(k="many")


def test_by_hand_a_default_yields_to_the_profile_and_under_the_runner_it_does_not(
    project, monkeypatch, begin
):
    assert begin(profile="small").k == 7
    monkeypatch.setenv("FAC_RESOLVED", "1")
    assert begin(profile="small").k == 3


def test_the_project_is_found_from_its_folders_and_paths_are_relative_to_it(project, monkeypatch):
    monkeypatch.chdir(project / "nbs")
    assert resolve_path("../data") == project.parent / "data" and resolve_path("/a") == Path("/a")


def test_a_parameter_cannot_be_called_like_something_of_a_run(project, begin):
    path = project / "nbs/10_second.ipynb"
    path.write_text(notebook_text(PARAMETERS + "table: int = 1  # rows\n", "x = 1"))
    with pytest.raises(UserError, match="a parameter cannot be called 'table', which a run has already"):
        begin(table=1)


def test_files_of_the_project_are_noted_as_read(project):
    assert published("table01").value.tolist() == [1]
    first = dict(parameters.FILES_READ)
    project_file("published/table01.csv").write_text("row,value\nOurs,2\n")
    published("table01")
    assert list(first) == ["published/table01.csv"] == list(parameters.FILES_READ)
    assert first != parameters.FILES_READ
    with pytest.raises(UserError, match="holds no file nbs/planted/none.yaml"):
        project_file("planted/none.yaml")


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


def test_the_published_numbers_are_at_hand(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(published("index")) > 20
    with pytest.raises(UserError, match="hold no 'table99'; there are claims, "):
        published("table99")
