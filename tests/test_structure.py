"""What keeps the house in order: notebooks and package agree, notebooks are clean and short, configurations agree."""

import configparser
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fac_synthesis.run.pages import readme_text
from fac_synthesis.run.parameters import coerce, declared_parameters, load_profile
from fac_synthesis.run.pipeline import stage_table

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NO_STAGE = {"010_records", "004_pipeline", "005_pages"}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def export_cells(path):
    return [source(c) for c in cells(path, "code") if re.search(r"^#\|\s*export", source(c), re.M)]


def module(path):
    return re.search(r"#\|\s*default_exp (\w+)", "\n".join(map(source, cells(path, "code"))))[1]


# ---- one notebook


@each_notebook
def test_begins_with_a_title_and_one_line(path):
    assert re.fullmatch(r"# \S.*\n+> \S.*", source(cells(path)[0]).strip())


@each_notebook
def test_is_short(path):
    assert len(cells(path)) < 60 and path.stat().st_size < 300_000
    long = [(len(s.splitlines()), s.splitlines()[:2]) for s in export_cells(path) if len(s.splitlines()) > 40]
    assert not long


@each_notebook
def test_has_one_parameters_cell_with_typed_literals(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    declared, lines = declared_parameters(path.stem), [l for l in source(tagged[0]).splitlines() if l.strip()]
    assert list(declared)[:2] == ["profile", "seed"] and len(lines) == len(declared), (
        "papermill reads every line"
    )
    for name, d in declared.items():
        assert re.fullmatch(r"(list\[)?(str|int|float|bool)\]?", d["kind"]), name
        assert coerce(d["default"], d["kind"], name) == d["default"] and type(
            coerce(d["default"], d["kind"], name)
        ) is type(d["default"]), name
        assert d["meaning"].strip(), f"{name} says what it means"


@each_notebook
def test_stored_outputs_are_no_errors(path):
    assert not [o for c in cells(path, "code") for o in c["outputs"] if o["output_type"] == "error"]


@each_notebook
def test_cell_ids_are_unique(path):
    ids = [c["id"] for c in cells(path)]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_export_cells_are_plain_python(path):
    for s in export_cells(path):
        assert not re.search(r"^\s*[%!]", s, re.M)
        compile(s, path.stem, "exec")


@each_notebook
def test_nothing_exports_while_it_runs(path):
    assert not [
        s
        for s in map(source, cells(path, "code"))
        if "nbdev_export(" in s or re.search(r"^\s*(import|from) nbdev", s, re.M)
    ]


@each_notebook
def test_imports_only_lower_numbers(path):
    number = {module(p): p.stem for p in NOTEBOOKS}
    used = {
        m
        for c in cells(path, "code")
        for m in re.findall(r"^\s*from fac_synthesis\.(\w+) import", source(c), re.M)
    } - {module(path)}
    assert used <= set(number) and all(number[m] < path.stem for m in used), used


def stages_named(text):
    return {
        m[2] for m in re.finditer(r"""((?:start|stage_record)\()?["'](\d\d_\w+)["']""", text) if not m[1]
    } & {p.stem for p in NOTEBOOKS}


@each_notebook
def test_the_makefile_names_what_it_reads(path):
    table = stage_table()
    if path.stem in NO_STAGE:
        assert path.stem not in table
        return
    code = "\n".join(source(c) for c in cells(path, "code"))
    run_cells = "\n".join(source(c) for c in cells(path, "code") if "eval: false" in source(c))
    helpers = [
        *export_cells(path),
        *(
            (ROOT / "fac_synthesis" / f"{m}.py").read_text()
            for m in re.findall(r"from fac_synthesis\.(\w+) import", code)
            if m != "experiment"
        ),
    ]
    here, through_helpers = (
        stages_named(run_cells) - {path.stem},
        stages_named("\n".join(helpers)) - {path.stem},
    )
    assert here <= set(table[path.stem]) <= here | through_helpers, (
        f"STAGES in the Makefile: {path.stem} reads {sorted(here)}"
    )


# ---- all of them


def test_every_notebook_is_a_stage_in_order():
    assert list(stage_table()) == [p.stem for p in NOTEBOOKS if p.stem not in NO_STAGE]


def test_export_is_a_no_op(tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nbs", "fac_synthesis"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    before, after = (
        {p.name: p.read_text() for p in (folder / "fac_synthesis").glob("*.py")}
        for folder in (ROOT, tmp_path)
    )
    different = sorted(name for name in before | after if before.get(name) != after.get(name))
    assert not different, "run `make export`"


def test_clean_is_a_no_op(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "fac_synthesis").mkdir()
    subprocess.run(
        [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    different = [
        p.name
        for p in sorted((ROOT / "nbs").glob("*.ipynb"))
        if not filecmp.cmp(p, tmp_path / "nbs" / p.name, shallow=False)
    ]
    assert not different, "run `make export`, which cleans too"


def test_the_package_needs_no_notebook_tools():
    "Importable without nbdev, papermill or Jupyter."
    blocked = "('nbdev', 'fastcore', 'execnb', 'papermill', 'nbformat', 'nbconvert', 'nbclient', 'IPython', 'ipykernel', 'jupyterlab', 'pytest')"
    modules = [module(p) for p in NOTEBOOKS]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport importlib\nfor m in {modules}: importlib.import_module(f'fac_synthesis.{{m}}')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_folder_of_a_machine_is_committed():
    files = [
        *NOTEBOOKS,
        ROOT / "nbs/index.ipynb",
        ROOT / "README.md",
        ROOT / "Makefile",
        ROOT / "constraints.txt",
        *(ROOT / "fac_synthesis").glob("*.py"),
        *(ROOT / "nbs/profiles").glob("*"),
        *(
            f
            for pattern in ("*/tables/*", "*/claims.md", "*/manifest.json")
            for f in (ROOT / "results").glob(pattern.replace("*", "mini", 1))
        ),
    ]
    found = [
        (f.name, m[0])
        for f in files
        for m in re.finditer(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|opt)/[\w.-]+", f.read_text())
    ]
    assert not found


def test_mini_tables_say_that_they_are_the_planted_world():
    for table in (ROOT / "results/mini/tables").glob("*.md"):
        assert "Planted world" in table.read_text().split("\n\n")[0], table.name


# ---- front page and configuration


def test_readme_is_its_notebook():
    assert (ROOT / "README.md").read_text() == readme_text(), "run `make readme`"


def test_the_front_page_lists_every_notebook():
    text = readme_text()
    assert re.findall(r"^\| \[(\w+)\]\(nbs/\1\.ipynb\) \| `(\w+)` \|", text, re.M) == [
        (p.stem, module(p)) for p in NOTEBOOKS
    ]
    for command in re.findall(r"^(?:FAC_\w+=\S+ )?make (\w+)", text, re.M):
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M), command


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "nbs/profiles").glob("*.yaml")))
def test_profiles_name_existing_parameters_and_right_types(name, monkeypatch):
    monkeypatch.setenv("FAC_DATA_DIR", "data")
    for stage, values in load_profile(name).items():
        for parameter, value in values.items():
            declared = declared_parameters(stage)[parameter]
            assert coerce(value, declared["kind"], f"{parameter} of {stage}") != declared["default"], (
                f"{parameter} of {stage}: only what differs from the default stands in a profile"
            )


def test_the_two_configurations_agree():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ini = ini["DEFAULT"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"], project["license"].lower(), project["requires-python"]) == (
        ini["lib_name"],
        ini["version"],
        ini["license"],
        f">={ini['min_python']}",
    )
    assert project["description"] == ini["description"]
    assert sorted(project["dependencies"]) == sorted(ini["requirements"].split())
    assert sorted(project["optional-dependencies"]["dev"]) == sorted(ini["dev_requirements"].split())


def test_no_package_index_is_named():
    for name in ("Makefile", "constraints.txt", "settings.ini", "pyproject.toml", ".ci/run", "README.md"):
        assert not re.search(r"index-url|find-links|--index|pypi|whl", (ROOT / name).read_text()), name


def test_constraints_pin_every_dependency():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [l for l in (ROOT / "constraints.txt").read_text().splitlines() if l and not l.startswith("#")]
    pins = {canonicalize_name(l.split("==")[0]): l.split("==")[1] for l in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", l) for l in lines) and not {"pip", "setuptools"} & set(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        r = Requirement(text)
        assert pins[canonicalize_name(r.name)] in r.specifier, text


@each_notebook
def test_saved_pictures_hang_on_no_chance(path):
    for c in cells(path):
        if "run.figure(" in source(c):
            assert not re.search(r"stripplot\((?![^\n]*jitter=False)|errorbar=\(?[\"']ci", source(c)), (
                "jitter and bootstrapped bars draw from the global generator, whose state depends on what was loaded"
            )
