"Small things that many tests share: a word tokenizer, a random backbone, a fitting SAE, a small project."

import json

import pandas as pd
import pytest
import torch

from fac_synthesis.models.backbone import Backbone, tiny_model, word_tokenizer
from fac_synthesis.models.language_models import LanguageModel
from fac_synthesis.run import parameters, stages
from fac_synthesis.run.parameters import UserError, declared_parameters
from fac_synthesis.run.stages import Run, start
from fac_synthesis.sae.core import SAE, SAEConfig

torch.set_num_threads(1)
TEXTS = [
    "tell me about the lock .",
    "first the spray , then the stencil , then the wall .",
    "the lock ?",
    "how do i use the spray with the stencil ?",
    "is a lock better than a wall for this ?",
    "  where should i put the spray ?  ",
    "stencil",
]


class Scripted(LanguageModel):
    "Answers reply(prompt, j), and remembers the prompts it was asked."

    name = "scripted"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def answers(self, conversations, sampling):
        self.asked += [c[-1]["content"] for c in conversations]
        return [[self.reply(c[-1]["content"], j) for j in range(sampling.n)] for c in conversations]


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def refused():
    "refused(call): the one sentence of the UserError that call() must raise."

    def check(call) -> str:
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message and len(message) > 20
        return message

    return check


@pytest.fixture(scope="session")
def texts():
    return list(TEXTS)


@pytest.fixture(scope="session")
def words():
    return word_tokenizer(TEXTS)


@pytest.fixture(scope="session")
def backbone(words):
    torch.manual_seed(0)
    return Backbone(tiny_model("llama", len(words), 32, 3), words, layer=2)


@pytest.fixture(scope="session")
def sae():
    torch.manual_seed(1)
    return SAE(SAEConfig(d_model=32, n_latents=96, k=6))


PARAMETERS = """\
profile: str = 'mini'  # scale
seed: int = 0  # seed (paper: 42)
k: int = 3  # how many (paper: 20, Appendix J)
rate: float = 0.5  # rate,
#   per step
names: list[str] = ['a']  # names
"""


def notebook_text(*sources: str) -> str:
    "JSON of a notebook whose first cell is the parameters cell."
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata={}, source=source, outputs=[], execution_count=None)
        for i, source in enumerate(sources)
    ]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    return json.dumps(dict(cells=cells, metadata={"kernelspec": kernel}, nbformat=4, nbformat_minor=5))


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with two notebooks and two profiles; the working directory is in it."
    (tmp_path / "nbs" / "profiles").mkdir(parents=True)
    (tmp_path / "nbs" / "published").mkdir()
    (tmp_path / "nbs" / "published" / "table01.csv").write_text("row,value\nOurs,1\n")
    (tmp_path / "settings.ini").write_text("")
    for stage in ("00_first", "10_second"):
        (tmp_path / "nbs" / f"{stage}.ipynb").write_text(notebook_text(PARAMETERS, "x = 1"))
    (tmp_path / "nbs/profiles/mini.yaml").write_text("{}\n")
    (tmp_path / "nbs/profiles/small.yaml").write_text("10_second:\n  k: 7\n  rate: 1e-3\n  names: [$WHERE]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAC_RESULTS_DIR", raising=False)
    monkeypatch.delenv("FAC_RESOLVED", raising=False)
    monkeypatch.setattr(parameters, "FILES_READ", {})
    monkeypatch.setattr(stages, "FILES_READ", parameters.FILES_READ)
    return tmp_path


@pytest.fixture
def begin(project):
    "begin(stage, **values): a run of the small project, as a notebook starts it."

    def run(stage="10_second", **values):
        defaults = {name: d["default"] for name, d in declared_parameters(stage).items()}
        return start(stage, {**defaults, **values})

    return run


class Asked:
    "Stands in for a run, and remembers what a reader asked it for."

    def frame(self, stage, name, columns):
        self.stage, self.kind, self.name, self.columns = stage, "table", name, columns
        return pd.DataFrame({column: pd.Series(dtype=kind) for column, kind in columns.items()})

    def input(self, stage, name, cls=None):
        self.stage, self.kind, self.name, self.columns = stage, "artifact", name, {}

    def setting(self, stage, name):
        self.stage, self.kind, self.name, self.columns = stage, "parameter", name, {}


@pytest.fixture
def asked():
    "asked(reader, ...): stage, kind, name and columns of what a reader asks a run for."

    def by(reader, *arguments):
        run = Asked()
        reader(run, *arguments)
        return run

    return by


@pytest.fixture
def leave(asked):
    """leave((value, reader, ...), ...): stages that have finished and left what their readers ask for.

    A table gets the columns that it lacks; the value None leaves nothing. Returns the runs by stage.
    """

    def finished(*found, texts_may_be_shown=True):
        wanted = [(value, asked(*reader_and_arguments)) for value, *reader_and_arguments in found]
        parameters = {about.stage: dict(profile="mini", seed=0) for _, about in wanted}
        for value, about in wanted:
            if about.kind == "parameter":
                parameters[about.stage][about.name] = value
        runs = {stage: Run(stage, given) for stage, given in parameters.items()}
        for value, about in wanted:
            if about.kind == "parameter" or value is None:
                continue
            absent = {column: kind() for column, kind in about.columns.items() if column not in value}
            runs[about.stage].keep(about.name, value.assign(**absent) if absent else value)
        for run in runs.values():
            run.note(texts_may_be_shown=texts_may_be_shown)
            run.finish()
        return runs

    return finished
