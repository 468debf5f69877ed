"""What keeps the house in order: notebooks and package agree, rooms stand on lower rooms, settings agree."""

import ast
import configparser
import filecmp
import importlib
import json
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

from fac_synthesis.run.artifacts import Source, reached
from fac_synthesis.run.pages import readme_text
from fac_synthesis.run.parameters import coerce, declared_parameters, load_profile
from fac_synthesis.run.pipeline import stage_table
from fac_synthesis.run.stages import Run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MODULES = sorted(p for p in (ROOT / "fac_synthesis").rglob("*.py") if p.name != "__init__.py")
STAGES = stage_table()
PARTS = dict(run=0, data=0, models=0, sae=1, features=2, synthesis=3, tasks=4, questions=5, own=6, results=9)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}.{p.stem}")


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def export_cells(path):
    return [source(c) for c in cells(path, "code") if re.search(r"^#\|\s*export", source(c), re.M)]


def module(path):
    found = re.search(r"#\|\s*default_exp ([\w.]+)", "\n".join(map(source, cells(path, "code"))))
    return found[1] if found else None


def parameters_cell(path):
    return [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]


# ---- one notebook


@each_notebook
def test_begins_with_a_title_and_one_line(path):
    assert re.fullmatch(r"# \S.*\n+> \S.*", source(cells(path)[0]).strip())


@each_notebook
def test_is_no_burden_for_the_repository(path):
    assert path.stat().st_size < 300_000


@each_notebook
def test_has_one_parameters_cell_with_typed_literals(path):
    assert len(parameters_cell(path)) == 1
    declared = declared_parameters(path.stem)
    assert list(declared)[0] == "profile"
    for name, d in declared.items():
        assert re.fullmatch(r"(list\[)?(str|int|float|bool)\]?", d["kind"]), name
        value = coerce(d["default"], d["kind"], name)
        assert value == d["default"] and type(value) is type(d["default"]), name
        assert d["meaning"].strip(), f"{name} says what it means"
        assert name == "profile" or not hasattr(Run, name), f"a run has a {name!r} of its own"


@each_notebook
def test_no_line_is_wider_than_110(path):
    wide = [line for c in cells(path, "code") for line in source(c).splitlines() if len(line) > 110]
    assert not wide


@each_notebook
def test_stored_outputs_are_no_errors(path):
    outputs = [o for c in cells(path, "code") for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]


@each_notebook
def test_cell_ids_are_unique(path):
    ids = [c["id"] for c in cells(path)]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_export_cells_are_plain_python(path):
    for text in export_cells(path):
        assert not re.search(r"^\s*[%!]", text, re.M)
        compile(text, path.stem, "exec")


@each_notebook
def test_header_leaves_reads_and_writes_to_the_record(path):
    header = "\n".join(source(c) for c in cells(path)[:3])
    assert not re.search(r"^\| (reads|writes)\b", header, re.M) and "TODO" not in header


@each_notebook
def test_saved_pictures_hang_on_no_chance(path):
    "Jitter and bootstrapped bars draw from the global generator, whose state depends on what was loaded."
    for c in cells(path, "code"):
        if "run.figure(" in source(c) or re.search(r"^def \w*figure\w*\(", source(c), re.M):
            for call in re.findall(r"stripplot\((.*?)\n\s*\)|stripplot\(([^\n]*)\)", source(c), re.S):
                assert "jitter=False" in "".join(call)
            assert not re.search(r"errorbar=\(?[\"']ci", source(c))


# ---- names


def test_a_parameter_means_one_thing():
    meanings = {}
    for path in NOTEBOOKS:
        for name, d in declared_parameters(path.stem).items():
            meanings.setdefault(name, {}).setdefault((d["kind"], d["meaning"]), []).append(path.stem)
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}


def strings(text):
    "String constants of a source text."
    try:
        tree = ast.parse("\n".join(line for line in text.splitlines() if not line.startswith(("%", "!"))))
    except SyntaxError:
        return set()
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@each_notebook
def test_a_stage_is_named_in_its_own_notebook_only(path):
    "Results are read through the readers that stand beside their writers."
    if path.stem in ("005_pipeline", "006_pages"):
        return  # they show examples of stages
    named = set().union(*(strings(source(c)) for c in cells(path, "code")))
    assert named & set(STAGES) <= {path.stem}


@each_notebook
def test_what_the_makefile_says_is_read_can_be_read(path):
    "Each stage of its line in STAGES is named by code that the notebook reaches; a run checks the rest."
    if path.stem not in STAGES:
        return
    source_of = Source("notebook", [source(c) for c in cells(path, "code")])
    names = sorted(set(source_of.owner) | {n for s in source_of.always for n in s.uses})
    found, _ = reached(names, source_of)
    text = "\n".join(s.text for group in found.values() for s in group)
    named = {stage for stage in STAGES if f"'{stage}'" in text}
    goes_by_its_line = ("fac_synthesis.run.pipeline", "stage_table") in found
    assert goes_by_its_line or set(STAGES[path.stem]) <= named


def test_every_stage_is_a_notebook_and_they_run_in_reading_order():
    names = [p.stem for p in NOTEBOOKS]
    assert set(STAGES) <= set(names)
    numbered = [stage for stage in STAGES if not stage.startswith("000")]
    assert numbered == sorted(numbered, key=names.index)


# ---- rooms


def imported(text, name):
    "Modules of the package that a source text imports, as 'part.module'."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level] if node.level else []
            full = ".".join([*parents, *filter(None, [node.module])])
            if full.startswith("fac_synthesis."):
                found.add(full.removeprefix("fac_synthesis."))
    return found


@each_module
def test_a_room_stands_on_lower_rooms(path):
    name = f"fac_synthesis.{path.parent.name}.{path.stem}"
    order = {module(p): p.stem for p in NOTEBOOKS if module(p)}
    own = f"{path.parent.name}.{path.stem}"
    for used in imported(path.read_text(), name):
        assert PARTS[used.split(".")[0]] <= PARTS[path.parent.name], f"{own} imports {used}, a higher part"
        assert order[used] < order[own], f"{own} ({order[own]}) imports {used} ({order[used]})"


@each_module
def test_no_definition_of_the_paper_knows_the_planted_world(path):
    allowed = {
        "planted_world",
        "planted_tasks",
        "planted_rubric",
        "sources",
        "corpora",
        "ground_truth",
        "instructions",
    }
    if path.stem not in allowed:
        used = imported(path.read_text(), f"fac_synthesis.{path.parent.name}.{path.stem}")
        assert not [m for m in used if "planted" in m]


@each_module
def test_no_function_ends_the_process(path):
    "Only what `make` starts may: a library raises, and its caller decides."
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("command", "stop"):
            ends = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == "SystemExit"]
            exits = [
                n
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute) and ast.unparse(n) in ("sys.exit", "os._exit", "os.abort")
            ]
            assert not ends + exits, node.name


# ---- code to be read


@each_module
def test_no_walrus_in_an_argument(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    inside = [a for c in calls for a in [*c.args, *(k.value for k in c.keywords)] for a in ast.walk(a)]
    assert not [a for a in inside if isinstance(a, ast.NamedExpr)]


def comment_lines(path):
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return {t.start[0] for t in tokens if t.type == tokenize.COMMENT}


def parameters_of(function):
    a = function.args
    return [
        p
        for p in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        if p and p.arg not in ("self", "cls")
    ]


def public(body):
    return [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


@each_module
def test_every_parameter_of_a_public_function_is_described(path):
    "In a comment on its line, or by name in the docstring; so is every field of a data class."
    tree, comments, silent = ast.parse(path.read_text()), comment_lines(path), []
    for node in public(tree.body):
        functions = [node] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.ClassDef):
            is_dataclass = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and is_dataclass]
            silent += [
                f"{node.name}.{f.target.id}"
                for f in fields
                if f.end_lineno not in comments and f.target.id not in (ast.get_docstring(node) or "")
            ]
            functions = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        for function in functions:
            own = parameters_of(function)
            said = (ast.get_docstring(function) or "") + (ast.get_docstring(node) or "")
            silent += [
                f"{node.name}({p.arg})"
                for p in own
                if p.end_lineno not in comments and not re.search(rf"\b{p.arg}\b", said) and len(own) > 1
            ]
    assert not silent


# ---- notebooks and package agree


def copy_of_the_project(folder):
    shutil.copy(ROOT / "settings.ini", folder)
    for name in ("nbs", "fac_synthesis"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".exported.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


def test_the_package_is_what_the_notebooks_export(tmp_path):
    copy_of_the_project(tmp_path)
    code = "from fac_synthesis.run.export import write_module, module_path, stages_on_disk\n"
    code += "for stage in stages_on_disk():\n    if module_path(stage):\n        write_module(stage)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    before, after = (
        {str(p.relative_to(folder)): p.read_text() for p in (folder / "fac_synthesis").rglob("*.py")}
        for folder in (ROOT, tmp_path)
    )
    different = sorted(name for name in before | after if before.get(name) != after.get(name))
    assert not different, "run `make export`"


def test_clean_is_a_no_op(tmp_path):
    copy_of_the_project(tmp_path)
    code = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    same = {p.name: filecmp.cmp(p, tmp_path / "nbs" / p.name, shallow=False) for p in NOTEBOOKS}
    assert [name for name, equal in same.items() if not equal] == [], "run `make export`, which cleans too"


def test_every_module_has_its_notebook():
    modules = {f"{p.parent.name}.{p.stem}" for p in MODULES}
    assert modules == {module(p) for p in NOTEBOOKS if module(p)}


def test_the_package_needs_no_notebook_tools():
    "Importable without nbdev, papermill or Jupyter."
    tools = "nbdev fastcore execnb papermill nbformat nbconvert nbclient IPython ipykernel jupyterlab pytest"
    modules = [f"fac_synthesis.{module(p)}" for p in NOTEBOOKS if module(p)]
    code = f"import sys, importlib\nfor name in {tools.split()}:\n    sys.modules[name] = None\n"
    code += f"for name in {modules}:\n    importlib.import_module(name)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_module
def test_modules_say_what_they_are_for(path):
    found = importlib.import_module(f"fac_synthesis.{path.parent.name}.{path.stem}")
    assert found.__doc__ and importlib.import_module(f"fac_synthesis.{path.parent.name}").__doc__


# ---- what is committed


def committed_texts():
    yield from NOTEBOOKS
    yield from MODULES
    for name in ("nbs/index.ipynb", "README.md", "RESULTS.md", "Makefile", "constraints.txt"):
        if (ROOT / name).exists():
            yield ROOT / name
    yield from (ROOT / "nbs/profiles").glob("*")
    for pattern in ("tables/*", "claims.md", "manifest.json"):
        yield from (ROOT / "results/mini").glob(pattern)


def test_no_folder_of_a_machine_is_committed():
    folders = r"(?<![\w.:/])/(?:home|root|work|tmp|Users|opt)/[\w.-]+"
    assert not [(f.name, m[0]) for f in committed_texts() for m in re.finditer(folders, f.read_text())]


def test_mini_tables_say_that_they_are_the_planted_world():
    for table in (ROOT / "results/mini/tables").glob("*.md"):
        assert "Planted world" in table.read_text().split("\n\n")[0], table.name


# ---- front page and configuration


def test_readme_is_its_notebook():
    assert (ROOT / "README.md").read_text() == readme_text(), "run `make readme`"


def test_the_front_page_lists_every_notebook():
    text = readme_text()
    assert sorted(set(re.findall(r"\[(\w+)\]\(nbs/\1\.ipynb\)", text))) == [p.stem for p in NOTEBOOKS]
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^(?:FAC_\w+=\S+ )?make (\w+)", text, re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "nbs/profiles").glob("*.yaml")))
def test_profiles_name_existing_parameters_and_right_types(name, monkeypatch):
    monkeypatch.setenv("FAC_DATA_DIR", "data")
    for stage, values in load_profile(name).items():
        for parameter, value in values.items():
            declared = declared_parameters(stage)[parameter]
            given = coerce(value, declared["kind"], f"{parameter} of {stage}")
            assert given != declared["default"], (
                f"{parameter} of {stage}: only what differs stands in a profile"
            )


def test_the_two_configurations_agree():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ini = ini["DEFAULT"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = (project["name"], project["version"], project["license"].lower(), project["requires-python"])
    assert ours == (ini["lib_name"], ini["version"], ini["license"], f">={ini['min_python']}")
    assert project["description"] == ini["description"]
    assert sorted(project["dependencies"]) == sorted(ini["requirements"].split())
    assert sorted(project["optional-dependencies"]["dev"]) == sorted(ini["dev_requirements"].split())


def test_no_package_index_is_named():
    for name in ("Makefile", "constraints.txt", "settings.ini", "pyproject.toml", ".ci/run", "README.md"):
        assert not re.search(r"index-url|find-links|--index|pypi|whl", (ROOT / name).read_text()), name


def test_constraints_pin_every_dependency():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert not {"pip", "setuptools"} & set(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(wanted)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, wanted
