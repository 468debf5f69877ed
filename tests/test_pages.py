"""Pages, published outputs and the README, on a project of one notebook made on the spot."""

import base64
import json
import re
from pathlib import Path

import pytest

from fac_synthesis.run import pages


def notebook(*cells):
    return json.dumps(
        dict(
            cells=list(cells),
            metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
            nbformat=4,
            nbformat_minor=5,
        )
    )


def text(i, source):
    return dict(cell_type="markdown", id=i, metadata={}, source=source)


def code(i, source, *outputs, tags=()):
    return dict(
        cell_type="code",
        id=i,
        metadata={"tags": list(tags)} if tags else {},
        source=source,
        outputs=list(outputs),
        execution_count=None,
    )


def stream(words, name="stdout"):
    return dict(output_type="stream", name=name, text=words)


def result(html):
    return dict(
        output_type="execute_result",
        data={"text/html": html, "text/plain": "frame"},
        metadata={"m": 1},
        execution_count=7,
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "nbs/profiles").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "Makefile").write_text("define STAGES\n10_one:\nendef\n")
    (tmp_path / "nbs/profiles/mini.yaml").write_text("{}")
    (tmp_path / "nbs/index.ipynb").write_text(
        notebook(text("a", "# Front\n\nSee [10_one](10_one.ipynb)."), code("b", "#| hide\nsecret = 1"))
    )
    cells = [
        code("p", "profile: str = 'mini'", tags=["parameters"]),
        text("m", "$x^2$"),
        code("c", "1 + 1"),
        code("d", "edited"),
        code("h", "#| hide\nhidden = 1"),
    ]
    (tmp_path / "nbs/10_one.ipynb").write_text(notebook(*cells))
    executed = tmp_path / "results/mini/notebooks"
    executed.mkdir(parents=True)
    outputs = [
        stream("· step 1\n"),
        stream(f"in {tmp_path}/nbs\n"),
        stream("Warning", "stderr"),
        stream("more\n"),
        result("<i id='T_0a1b2'>2</i>"),
    ]
    (executed / "10_one.ipynb").write_text(
        notebook(
            cells[0],
            code("i", "profile = 'mini'", stream("no"), tags=["injected-parameters"]),
            cells[1],
            code("c", "1 + 1", *outputs),
            code("d", "before", stream("old")),
            cells[4],
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAC_RESULTS_DIR", raising=False)
    return tmp_path


def test_readme_links_into_nbs_and_hides(project):
    assert pages.main(["readme"]) == 0
    assert (project / "README.md").read_text() == "# Front\n\nSee [10_one](nbs/10_one.ipynb).\n"


def test_the_front_page_has_the_numbers_of_the_run(project):
    "The rows and RESULTS.md come from the run; links hold from the project's folder."
    index = project / "nbs/index.ipynb"
    rows, links = "<!-- results -->\nold\n<!-- /results -->", "![f](../results/mini/figures/f.svg)"
    index.write_text(notebook(text("a", f"# Front\n\n{rows}\n\n{links}")))
    (project / "results/mini/front_page.md").write_text("| a |\n| --- |\n| 79.6 |\n")
    (project / "results/mini/RESULTS.md").write_text("# Results\n\n![f](figures/f.svg) [claims](claims.md)\n")
    assert pages.main(["readme"]) == 0
    readme = (project / "README.md").read_text()
    assert "| 79.6 |" in readme and "old" not in readme and "](results/mini/figures/f.svg)" in readme
    assert "| 79.6 |" in index.read_text(), "the notebook shows the same rows"
    results = (project / "RESULTS.md").read_text()
    assert "](results/mini/figures/f.svg)" in results and "](results/mini/claims.md)" in results


def test_pages_load_nothing_from_outside(project):
    "Executed outputs, equations as MathML, drawings in the page itself, and a way back."
    (project / "results/mini/d.svg").write_text("<svg><title>drawn</title></svg>")
    source = project / "nbs/10_one.ipynb"
    source.write_text(source.read_text().replace("$x^2$", "$x^2$ ![d](../results/mini/d.svg)"))
    executed = project / "results/mini/notebooks/10_one.ipynb"
    executed.write_text(executed.read_text().replace("$x^2$", "$x^2$ ![d](../results/mini/d.svg)"))
    assert pages.main(["html"]) == 0
    front, one = (Path("results/mini/html") / f"{n}.html" for n in ("index", "10_one"))
    assert 'href="10_one.html"' in front.read_text() and "secret" not in front.read_text()
    html = one.read_text()
    assert "<script" not in html and "<link" not in html
    assert "<msup>" in html and "<title>drawn</title>" in html and "more" in html
    assert "hidden = 1" not in html and '<a href="index.html">front page</a>' in html


def test_a_picture_of_the_run_is_in_the_page_itself(project):
    (project / "results/mini/f.png").write_bytes(b"picture")
    content = base64.b64encode(b"picture").decode()
    assert pages.with_drawings("![f](../results/mini/f.png)") == f"![f](data:image/png;base64,{content})"


def test_a_drawing_outside_of_the_project_stays_a_link(project, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "d.svg"
    outside.write_text("<svg/>")
    link = f"![d](../../{outside.parent.name}/d.svg)"
    assert pages.with_drawings(link) == link and pages.with_drawings("![d](none.svg)") == "![d](none.svg)"


def test_equations_become_mathml_and_code_stays():
    drawn = pages.with_mathml("$$\n\\frac{a}{b}\n$$ and $\\delta$, `$HOME/$USER`, ```\n$x$\n``` for $5 or $6")
    assert drawn.count("<math") == 2 and 'display="block"' in drawn
    assert "<mfrac>" in drawn and "\\" not in drawn
    assert "`$HOME/$USER`" in drawn and "```\n$x$\n```" in drawn and drawn.endswith("$5 or $6")


def test_every_equation_of_the_notebooks_is_drawn():
    for path in sorted((Path(__file__).parents[1] / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                drawn = re.findall(r"<math.*?</math>", pages.with_mathml("".join(cell["source"])), re.S)
                left = [m for m in drawn if "\\" in re.sub("<[^>]*>", "", m)]
                assert not left, f"{path.name}: {left}"


def test_pages_of_a_profile_that_never_ran_are_refused(project, capsys):
    (project / "nbs/profiles/small.yaml").write_text("{}")
    assert pages.main(["html", "--profile", "small"]) == 1
    assert (
        "profile small has not run yet" in capsys.readouterr().err
        and not (project / "results/small").exists()
    )


def test_published_outputs_are_tidy_and_the_same_each_time(project):
    source = project / "nbs/10_one.ipynb"
    assert pages.main(["publish"]) == 0
    first = source.read_text()
    cells = {c["id"]: c for c in json.loads(first)["cells"]}
    assert cells["c"]["outputs"][0] == dict(output_type="stream", name="stdout", text="in ./nbs\nmore\n")
    assert (
        cells["c"]["outputs"][1]["execution_count"] is None
        and cells["c"]["outputs"][1]["metadata"] == {}
        and len(cells["c"]["outputs"]) == 2
    )
    assert cells["d"]["outputs"] == [] and "i" not in cells, (
        "an edited cell keeps its own outputs; the injected cell stays out"
    )
    executed = project / "results/mini/notebooks/10_one.ipynb"
    executed.write_text(executed.read_text().replace("T_0a1b2", "T_fffff"))
    assert pages.publish() == ["10_one"] and source.read_text() == first


def test_publish_executes_what_is_no_stage(project, monkeypatch):
    "Every notebook is refreshed, not only those that leave results."
    (project / "nbs/00_ground.ipynb").write_text((project / "nbs/10_one.ipynb").read_text())
    executed = []
    monkeypatch.setattr(pages, "execute_notebook", lambda stage, *a: executed.append(stage))
    assert pages.publish() == ["10_one"] and executed == ["00_ground"]


def test_pictures_are_made_small_and_stay_pictures():
    import base64
    import io

    import matplotlib.pyplot as plt
    from PIL import Image

    fig, ax = plt.subplots()
    ax.plot(range(9))
    large = io.BytesIO()
    fig.savefig(large, format="png")
    plt.close(fig)
    [kept] = pages.tidy_outputs(
        [
            dict(
                output_type="display_data",
                data={"image/png": base64.b64encode(large.getvalue()).decode()},
                metadata={},
            )
        ]
    )
    small = base64.b64decode(kept["data"]["image/png"])
    assert (
        len(small) < 0.6 * len(large.getvalue())
        and Image.open(io.BytesIO(small)).size == Image.open(large).size
    )


def test_every_figure_of_a_run_is_in_its_notebook():
    for path in sorted((Path(__file__).parents[1] / "nbs").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.search(r"^run\.figure\(", source, re.M):
                there = any("image/png" in o.get("data", {}) for o in cell["outputs"])
                assert there, (
                    f"{path.name}: the picture of {source[:60]!r} was left out; make publish says why"
                )


def test_a_notebook_stays_small():
    source = {"cells": [code(i, i) for i in "abcdef"]}
    executed = {"cells": [code(i, i, stream(i * 60_000)) for i in "abcdef"]}
    after = pages.with_outputs(source, executed)
    assert len(json.dumps(after, indent=1)) < 280_000
    assert 0 < sum(bool(c["outputs"]) for c in after["cells"]) < 6
    assert pages.tidy_outputs([stream("x" * 100_001)]) == []
