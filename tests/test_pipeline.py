"""The runner, on a project of four small notebooks: order, skipping, selection, refusals, faults, kills."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fac_synthesis.run import pipeline
from fac_synthesis.run.parameters import UserError
from fac_synthesis.run.stages import stage_record

ROOT = Path(__file__).resolve().parent.parent

MAKEFILE = """
define STAGES
00_numbers:
10_squares:  00
20_total:    10
21_count:    00
endef
"""
HEAD = "profile: str = 'mini'  # scale\nseed: int = 0  # seed\n"
NOTEBOOKS = {
    "00_numbers": [
        HEAD + "n: int = 4  # how many\nremark: str = ''  # changes no result\n",
        """
def numbers(n):
    return list(range(n))
run.cached('numbers', numbers, run.n)
run.finish()""",
    ],
    "10_squares": [
        HEAD + "power: float = 2.0  # exponent\n",
        """
import os, time
def powers(numbers, power, work):
    part = work / 'half.txt'
    part.write_text(str(os.getpid()))
    for _ in progress(range(int(os.environ.get('TINY_STEPS', 0))), 'waiting', every=0.2):
        time.sleep(0.1)
    return [n ** power for n in numbers]
squares = run.cached('squares', powers, run.input('00_numbers', 'numbers'), run.power)
run.finish()""",
    ],
    "20_total": [
        HEAD + "explode: bool = False  # fail on purpose\nbug: bool = False  # fail without a sentence\n"
        "nothing: bool = False  # have nothing to do\n",
        """
import pandas as pd
if run.explode:
    raise UserError('the fuse is lit; put it out')
if run.bug:
    1 / 0
if run.nothing:
    left_out(run, 'there are no squares')
total = sum(run.input('10_squares', 'squares'))
run.table(pd.DataFrame([dict(total=total)]), 'table01_total', 'A total.')
run.finish({'total': total})""",
    ],
    "21_count": [
        HEAD,
        """
run.keep('count', len(run.input('00_numbers', 'numbers')))
run.finish()""",
    ],
}


def write_notebook(folder, stage, parameters, code):
    start = (
        "from fac_synthesis.run.parameters import UserError\n"
        "from fac_synthesis.run.stages import left_out, progress, start\n"
        f"run = start('{stage}', globals())"
    )
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={"tags": ["parameters"]} if i == 0 else {},
            source=source.strip(),
            outputs=[],
            execution_count=None,
        )
        for i, source in enumerate((parameters, start, code))
    ]
    text = json.dumps(
        dict(
            cells=cells,
            metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
            nbformat=4,
            nbformat_minor=5,
        )
    )
    (folder / f"{stage}.ipynb").write_text(text)


def make_project(folder):
    (folder / "nbs" / "profiles").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "nbs" / "profiles" / "mini.yaml").write_text("{}\n")
    (folder / "nbs" / "profiles" / "real.yaml").write_text("10_squares:\n  power: 3.0\n")
    for stage, cells in NOTEBOOKS.items():
        write_notebook(folder / "nbs", stage, *cells)
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "The tiny projects know nothing of results or data elsewhere."
    for name in ("FAC_RESULTS_DIR", "FAC_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A project that was run once, and what that run printed."
    folder = make_project(tmp_path_factory.mktemp("ran") / "project")
    done = command(folder, "run")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def project(ran, tmp_path, monkeypatch):
    "A copy of it to play with; the working directory is in it."
    shutil.copytree(ran[0], tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    make_project(tmp_path / "fresh")
    monkeypatch.chdir(tmp_path / "fresh")
    return tmp_path / "fresh"


def environment(**more):
    return {
        **{k: v for k, v in os.environ.items() if k not in ("FAC_RESULTS_DIR", "FAC_DATA_DIR")},
        "PYTHONPATH": str(ROOT),
        **more,
    }


def command(folder, *arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "fac_synthesis.run.pipeline", *arguments],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def verdicts(output):
    "stage -> the words of its last line."
    return dict(re.findall(r"^\[ *\d+/\d+\] (\w+) +(.*)$", output, re.M))


def statuses(capsys, *arguments):
    capsys.readouterr()
    assert pipeline.main(["status", *arguments]) == 0
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}


def test_a_run_goes_in_order_and_reports(ran):
    folder, output = ran
    finished = re.findall(r"\] (\w+) +done in [\d.]+ s, [\d.]+ GB", output)
    assert sorted(finished) == sorted(NOTEBOOKS) and all(
        finished.index(above) < finished.index(stage)
        for stage in NOTEBOOKS
        for above in pipeline.ancestors([stage], pipeline.read_stages((folder / "Makefile").read_text()))
    )
    assert "| total |" in output and "14.00" in output, "Table 1 stands in the terminal"
    assert re.search(r"^all stages +[\d.]+ +\d+$", output, re.M) and "Results are in results/mini" in output
    manifest = json.loads((folder / "results/mini/manifest.json").read_text())
    assert list(manifest["stages"]) == list(NOTEBOOKS)
    assert (
        manifest["stages"]["10_squares"]["parameters"]["power"] == 2.0
        and manifest["stages"]["10_squares"]["peak_mb"] > 10
    )
    text = json.dumps(manifest)
    assert str(folder) not in text and os.uname().nodename not in text
    assert "seconds" not in (folder / "results/mini/tables/table01_total.md").read_text()


def test_a_second_run_starts_no_kernel(project, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "execute_notebook", lambda *a: pytest.fail("a kernel was started"))
    began = time.monotonic()
    assert pipeline.main(["run"]) == 0
    assert set(verdicts(capsys.readouterr().out).values()) == {"unchanged"}
    assert time.monotonic() - began < 10


def test_only_with_a_value_runs_what_depends_on_it(project, capsys):
    before = {stage: stage_record(stage, "mini") for stage in NOTEBOOKS}
    assert pipeline.main(["run", "--only", "10", "--params", "-p power 3.0"]) == 0
    said = verdicts(capsys.readouterr().out)
    assert list(said) == ["10_squares", "20_total"] and all(v.startswith("done") for v in said.values())
    assert stage_record("20_total", "mini")["metrics"]["total"] == 36
    assert all(stage_record(stage, "mini") == before[stage] for stage in ("00_numbers", "21_count"))
    # the value is remembered where the stage is only a dependent, and dropped where it is selected again
    assert pipeline.make_plan("mini", only="00")["10_squares"] == {"power": "3.0"}
    assert pipeline.make_plan("mini", only="10")["10_squares"] == {}
    assert statuses(capsys)["10_squares"] == "stale (parameters changed: power 3.0 → 2.0)"


def test_unchanged_content_makes_nothing_stale(project, capsys):
    assert pipeline.main(["run", "--only", "numbers", "--params=-p remark hello"]) == 0
    said = verdicts(capsys.readouterr().out)
    assert (
        said.pop("00_numbers").startswith("done") and set(said.values()) == {"unchanged"} and len(said) == 3
    )


def test_plan_says_what_would_run(project, capsys):
    assert pipeline.main(["plan", "--params", "-p n 5"]) == 0
    said = verdicts(capsys.readouterr().out)
    assert said["00_numbers"].startswith("runs: parameters changed: n 4 → 5")
    assert said["20_total"].startswith("runs if 00_numbers changes")


def test_plan_tells_the_cost_of_the_last_time(project, capsys):
    stages = json.loads((project / "results/mini/manifest.json").read_text())["stages"]
    assert pipeline.main(["plan", "--only", "10", "--params", "-p power 3.0"]) == 0
    assert (
        f"2 stages took {stages['10_squares']['seconds'] + stages['20_total']['seconds']:.0f} s when they"
        in capsys.readouterr().out
    )
    assert pipeline.main(["plan"]) == 0 and "nothing to run" in capsys.readouterr().out
    (project / "results/mini/manifest.json").unlink()
    assert (
        pipeline.main(["plan", "--params", "-p n 5"]) == 0
        and "no earlier run of profile mini" in capsys.readouterr().out
    )


def test_plan_names_the_data_that_are_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)
    assert (
        pipeline.main(["plan", "--profile", "small"]) == 0
        and "02_corpora has no data_dir and FAC_DATA_DIR is not set" in capsys.readouterr().out
    )
    monkeypatch.setenv("FAC_DATA_DIR", str(tmp_path))
    assert (
        pipeline.main(["plan", "--profile", "small"]) == 0
        and "has no data_dir" not in capsys.readouterr().out
    )


def test_a_reader_may_close_the_pipe(project):
    done = subprocess.run(
        [
            "bash",
            "-o",
            "pipefail",
            "-c",
            f"{sys.executable} -m fac_synthesis.run.pipeline status | head -c 1",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_code_and_outputs_count_and_prose_does_not(project, capsys):
    path = project / "nbs" / "10_squares.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"].append(dict(cell_type="markdown", id="m", metadata={}, source="more prose"))
    notebook["cells"][2]["source"] += "  # a comment"
    path.write_text(json.dumps(notebook))
    assert set(statuses(capsys).values()) == {"done"}
    notebook["cells"][2]["source"] += "\nx = 1"
    path.write_text(json.dumps(notebook))
    (project / "results/mini/tables/table01_total.md").unlink()
    now = statuses(capsys)
    assert (
        now["10_squares"] == "stale (code changed)"
        and now["20_total"] == "stale (outputs missing or changed)"
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--profile", "minni"], "there is no profile 'minni'; the profiles are mini, real"),
        (["--only", "15"], "there is no stage '15'"),
        (["--only", "squares,totl"], "did you mean 'total'?"),
        (["--params", "-p powr 3"], "did you mean 'power'?"),
        (["--params", "-p power often"], "power of 10_squares must be float, but 'often' was given"),
        (["--params", "-p n 1.5"], "n of 00_numbers must be int"),
        (["--params", "power=3"], 'write P="-p name value'),
        (["--params", "-p profile real"], "PROFILE="),
        (["--only", "20", "--params", "-p power 3"], "but 10_squares has: add it to ONLY"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(fresh, capsys, arguments, sentence):
    assert pipeline.main(["run", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and sentence in said.err
    assert not (fresh / "results").exists()


def test_a_missing_data_folder_is_refused(fresh, capsys, monkeypatch):
    monkeypatch.setenv("FAC_DATA_DIR", "nowhere/at/all")
    assert (
        pipeline.main(["run"]) == 1
        and "FAC_DATA_DIR is nowhere/at/all, which is not a folder" in capsys.readouterr().err
    )
    monkeypatch.delenv("FAC_DATA_DIR")
    with pytest.raises(UserError, match="data_dir of 02_corpora is gone, which is not a folder"):
        pipeline.check_folders({"02_corpora": {"data_dir": "gone"}})


def test_a_failed_stage_never_looks_done(project, capsys):
    folder = project / "results/mini/notebooks"
    (folder / "20_total.ipynb").unlink()
    assert pipeline.main(["run", "--only", "20", "--params", "-p explode true"]) == 1
    said = capsys.readouterr()
    assert (
        re.fullmatch(
            r"\[ 1/1\] 20_total +FAILED: the fuse is lit; put it out \(see .*20_total\.failed\.ipynb\)\n",
            said.err,
        )
        and "Traceback" not in said.out
    )
    assert (
        (folder / "20_total.failed.ipynb").exists()
        and not (folder / "20_total.ipynb").exists()
        and not (folder / "20_total.running.ipynb").exists()
    )
    assert statuses(capsys, "--params", "-p explode true")["20_total"].startswith("failed")
    assert (
        pipeline.main(["run", "--only", "20", "--params", "-p bug true"]) == 1
        and "FAILED: ZeroDivisionError: division by zero" in capsys.readouterr().err
    )
    assert pipeline.main(["run"]) == 0 and verdicts(capsys.readouterr().out)["20_total"] == "unchanged", (
        "its record still holds for the notebook's own values"
    )


def test_a_stage_with_nothing_to_do_is_done(project, capsys):
    assert pipeline.main(["run", "--only", "20", "--params", "-p nothing true"]) == 0
    assert verdicts(capsys.readouterr().out)["20_total"] == "left out: there are no squares"
    assert statuses(capsys, "--params", "-p nothing true")["20_total"] == "done"


def test_a_notebook_edited_while_it_runs_is_said(project, capsys):
    "The kernel rewrites its own file, as an editor would; the run says so, and the next takes the new code."
    own = NOTEBOOKS["21_count"][1]
    touch = "p = 'nbs/21_count.ipynb'\nimport os\np = p if os.path.exists(p) else '../' + p\n"
    edit = touch + "text = open(p).read().replace('early', 'late')\nopen(p, 'w').write(text)\nx = 'early'\n"
    write_notebook(project / "nbs", "21_count", NOTEBOOKS["21_count"][0], edit + own)
    assert pipeline.main(["run", "--only", "21"]) == 0
    assert "was edited while it ran (21_count.ipynb): run again" in capsys.readouterr().out
    assert statuses(capsys)["21_count"] == "stale (code changed)"


def test_a_failure_ends_the_run(half, capsys):
    write_notebook(
        half / "nbs",
        "10_squares",
        NOTEBOOKS["10_squares"][0],
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert pipeline.main(["run"]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "FAILED: the kernel died" in said.err
    now = statuses(capsys)
    assert (
        now["00_numbers"] == "done"
        and now["10_squares"].startswith("failed")
        and now["20_total"] == "never ran"
    )
    assert list(pipeline.make_plan("mini", only="21")) == ["21_count"], "00 ran, so it is taken as it is"
    assert list(pipeline.make_plan("mini", only="20")) == ["10_squares", "20_total"], (
        "10 never finished, so 20 needs it"
    )


def test_what_a_stage_reads_must_stand_in_the_makefile(project, capsys):
    (project / "Makefile").write_text(MAKEFILE.replace("21_count:    00", "21_count:"))
    with pytest.raises(UserError, match="21_count: reads 00_numbers; add that to its line of STAGES"):
        pipeline.check_reads("21_count", "mini", pipeline.stage_table())
    (project / "Makefile").write_text("all:\n")
    assert pipeline.main(["run"]) == 1 and "no `define STAGES` table" in capsys.readouterr().err


def test_one_run_at_a_time(project, capsys):
    with pipeline.locked("mini"):
        assert (
            pipeline.main(["run"]) == 1
            and "another run of profile mini is at work" in capsys.readouterr().err
        )


def begin(folder):
    "A run in a process of its own, in the middle of stage 10; and the pid of that stage's kernel."
    process = subprocess.Popen(
        [sys.executable, "-m", "fac_synthesis.run.pipeline", "run"],
        cwd=folder,
        env=environment(TINY_STEPS="600"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell ignores it in background jobs
    for _ in range(600):
        if found := list((folder / "results/mini/artifacts/10_squares").glob("*.work/half.txt")):
            if found[0].read_text():
                return process, int(found[0].read_text())
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the stage did not begin")


@pytest.fixture
def half(project):
    "The project as it is when stages 10 and 20 never ran."
    for stage in ("10_squares", "20_total"):
        for path in (project / "results/mini").rglob(f"{stage}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(project / "results/mini/tables")
    return project


def gone(pid, seconds=20):
    "Whether the process ended (or is a zombie that nobody has waited for) within `seconds`."
    for _ in range(seconds * 10):
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rsplit(")")[-1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_run_goes_on_and_writes_the_same_bytes(half, ran, capsys):
    process, kernel = begin(half)
    if Path("/proc").exists():
        assert statuses(capsys)["10_squares"] == "running"
    process.kill()
    process.communicate()
    assert gone(kernel), "the kernel ends with the run that started it"
    now = statuses(capsys)
    assert now["00_numbers"] == "done" and now["10_squares"] == "stopped" and now["20_total"] == "never ran"
    assert pipeline.main(["run"]) == 0
    assert verdicts(capsys.readouterr().out)["00_numbers"] == "unchanged"
    for name in ("table01_total.md", "table01_total.csv"):
        assert (half / "results/mini/tables" / name).read_bytes() == (
            ran[0] / "results/mini/tables" / name
        ).read_bytes()
    assert not list((half / "results/mini").rglob("*.work")) and not list(
        (half / "results/mini").rglob("*.running.ipynb")
    )


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_takes_its_kernel_with_it(half, number, code):
    process, kernel = begin(half)
    time.sleep(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and "· waiting" in out, "progress of the kernel passes through"
    assert gone(kernel, 5)
