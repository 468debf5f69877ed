"""Notebook, package and run are one movement: what an edit of a prompt reaches, and whose edit is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fac_synthesis.run import export
from fac_synthesis.run.parameters import UserError

ROOT = Path(__file__).resolve().parent.parent


def write_notebook(folder: Path, name: str, body: str):
    "A notebook that exports one cell."
    sources = [f"#| default_exp room.{name[3:]}", f"#| export\n{body}"]
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata={}, source=source, outputs=[], execution_count=None)
        for i, source in enumerate(sources)
    ]
    text = json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    (folder / "nbs" / f"{name}.ipynb").write_text(text)


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with one notebook, exported."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "fac_synthesis").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    write_notebook(tmp_path, "10_toy", "x = 1")
    monkeypatch.chdir(tmp_path)
    assert export.export_edited() == ["10_toy"] and export.export_edited() == []
    return tmp_path


def module(project) -> Path:
    return project / "fac_synthesis/room/toy.py"


def test_an_edited_notebook_is_exported(project):
    write_notebook(project, "10_toy", "x = 2")
    assert export.export_edited() == ["10_toy"] and module(project).read_text().endswith("x = 2\n")
    write_notebook(project, "11_more", "y = 1")
    assert export.export_edited() == ["11_more"] and (project / "fac_synthesis/room/more.py").exists()


def test_prose_exports_nothing(project):
    path = project / "nbs/10_toy.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"].append(dict(cell_type="markdown", id="m", metadata={}, source="Prose."))
    path.write_text(json.dumps(notebook))
    before = module(project).stat().st_mtime_ns
    assert export.export_edited() == [] and module(project).stat().st_mtime_ns == before


@pytest.mark.parametrize("notebook_too", [False, True])
def test_a_module_edited_by_hand_is_refused_and_kept(project, notebook_too, capsys):
    module(project).write_text("x = 3\n")
    if notebook_too:
        write_notebook(project, "10_toy", "x = 4")
    with pytest.raises(
        UserError, match=r"toy\.py was edited by hand, but nbs/10_toy\.ipynb is what it is exported"
    ):
        export.export_edited()
    assert module(project).read_text() == "x = 3\n"
    assert export.main() == 1 and capsys.readouterr().err.count("\n") == 1


def test_in_a_fresh_clone_the_newer_file_decides(project):
    export.state_file().unlink()
    assert export.export_edited() == [], "both say the same"
    export.state_file().unlink()
    module(project).write_text("x = 3\n")
    at = time.time() + 60
    os.utime(module(project), (at, at))
    with pytest.raises(UserError, match="edited by hand"):
        export.export_edited()
    os.utime(project / "nbs/10_toy.ipynb", (at + 60, at + 60))
    assert export.export_edited() == ["10_toy"]


def test_a_missing_module_is_written_again(project):
    module(project).unlink()
    assert export.export_edited() == ["10_toy"]


CODE_OF_STAGES = """
import json, sys
from fac_synthesis.run.export import export_edited
export_edited()
from fac_synthesis.run.artifacts import notebook_fingerprint, notebook_sources
print(json.dumps({s: notebook_fingerprint(notebook_sources(s)) for s in sys.argv[1:]}))
"""


def fingerprints(folder: Path, *stages: str) -> dict:
    "Of the stages' code, in a process that imports that folder's package."
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("FAC_RESULTS_DIR", None)
    command = [sys.executable, "-W", "ignore", "-c", CODE_OF_STAGES, *stages]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def edit(folder: Path, stage: str, old: str, new: str):
    "Replaces a text in a notebook, as a person would."
    path = folder / "nbs" / f"{stage}.ipynb"
    text = path.read_text()
    assert old in text, f"{stage} does not hold {old!r}"
    path.write_text(text.replace(old, new))


REACHED = [
    # notebook, an edit, stages that must run again, stages that need not
    (
        "05_prompts",
        ("State the intent only", "State the aim only"),
        ("30_contrastive_pairs", "31_covered_samples", "32_baselines"),
        ("01_planted_world", "03_backbone", "11_sae_pretraining", "13_sae_benchmark"),
    ),
    (
        "05_prompts",
        ("Which answer is better?", "Which of them is better?"),
        ("43_instruction_following",),
        ("03_backbone", "11_sae_pretraining", "41_reward_modeling", "42_behavior_steering"),
    ),
    (
        "34_fine_tuning",
        ("def fit_head(", "def fit_head_anew("),
        ("40_toxicity_detection", "41_reward_modeling"),
        ("03_backbone", "11_sae_pretraining", "32_baselines", "42_behavior_steering"),
    ),
    (
        "10_sae",
        ("def to_threshold(", "def to_a_threshold("),
        ("12_sae_checkpoints",),
        ("03_backbone", "01_planted_world", "32_baselines"),
    ),
]


def copy_of_the_project(folder: Path):
    for name in ("nbs", "fac_synthesis"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "settings.ini", folder)


def later(path: Path):
    "Gives a file a time of change that no other file has reached yet."
    at = time.time() + 60
    os.utime(path, (at, at))


@pytest.mark.parametrize(
    "notebook, change, reached, spared", REACHED, ids=[f"{r[0]}-{r[2][0]}" for r in REACHED]
)
def test_an_edit_reaches_the_stages_that_use_it_and_no_others(tmp_path, notebook, change, reached, spared):
    "Edit a prompt, and synthesis runs again with it; the models need not."
    copy_of_the_project(tmp_path)
    before = fingerprints(tmp_path, *reached, *spared)
    edit(tmp_path, notebook, *change)
    later(tmp_path / "nbs" / f"{notebook}.ipynb")
    after = fingerprints(tmp_path, *reached, *spared)
    assert [s for s in reached if before[s] == after[s]] == [], "these must run again"
    assert [s for s in spared if before[s] != after[s]] == [], "these need not"


KERNEL = """
import sys, types
sys.modules["ipykernel"] = types.ModuleType("ipykernel")
from fac_synthesis.models.prompts import TOXICITY_PROMPTS
print(TOXICITY_PROMPTS.one_step)
"""


def test_a_kernel_exports_before_it_imports(tmp_path):
    "*Run All* in JupyterLab computes with what the other notebooks say."
    copy_of_the_project(tmp_path)
    edit(tmp_path, "05_prompts", "State the intent only", "State the aim only")
    later(tmp_path / "nbs/05_prompts.ipynb")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("FAC_RESOLVED", None)
    command = [sys.executable, "-W", "ignore", "-c", KERNEL]
    done = subprocess.run(command, cwd=tmp_path / "nbs", env=environment, capture_output=True, text=True)
    assert "State the aim only" in done.stdout, done.stderr
    prompts = tmp_path / "fac_synthesis/models/prompts.py"
    prompts.write_text(prompts.read_text() + "x = 1\n")
    done = subprocess.run(command, cwd=tmp_path / "nbs", env=environment, capture_output=True, text=True)
    assert "prompts.py was edited by hand" in done.stderr
