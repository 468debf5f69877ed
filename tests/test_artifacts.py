"""Keys and stored results: what counts as a change, and what happens when the disk fails."""

import dataclasses
import errno
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from fac_synthesis.run import artifacts
from fac_synthesis.run.artifacts import (
    Source,
    check_artifact,
    code_fingerprint,
    content_key,
    digest_of,
    load_artifact,
    notebook_fingerprint,
    package_source,
    read_package,
    remember_digest,
    save_artifact,
)
from fac_synthesis.run.parameters import UserError

ROOT = Path(__file__).resolve().parent.parent

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
    "No file of this process may grow beyond 64 kB; each library wraps the refusal in its own way."
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np, pandas as pd, torch
from fac_synthesis.run.artifacts import save_artifact
from fac_synthesis.run.parameters import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
numbers = np.random.rand(200_000)
for value in (pd.DataFrame({'a': numbers}), {'w': torch.rand(200_000)}, {'w': numbers}, list(range(200_000))):
    try:
        save_artifact(Path(sys.argv[1]) / 'a', value, {})
    except UserError as e:
        print(e)"""
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


# ---- code


def fingerprint(*texts, names=("f",)):
    "Of the names in a notebook with these cells."
    return code_fingerprint(list(names), Source("notebook", list(texts)))


def test_fingerprints_ignore_prose_and_see_code():
    first = fingerprint("def f(x):\n    'doc'\n    return x")
    assert first == fingerprint("def f(x):\n    'other'\n\n    # comment\n    return x")
    assert first != fingerprint("def f(x):\n    return -x")
    assert fingerprint("class f:\n    'doc'") == fingerprint("class f:\n    pass")


def test_only_what_is_reached_counts():
    cells = ["def f():\n    return g()", "def g():\n    return 1", "def h():\n    return 1"]
    assert fingerprint(*cells) == fingerprint(*cells[:2], "def h():\n    return 2")
    assert fingerprint(*cells) != fingerprint(cells[0], "def g():\n    return 2", cells[2])
    assert fingerprint(*cells, "def g():\n    return 1") == fingerprint(*cells), "the latest version counts"
    local = "def f(h):\n    g = h\n    return g"
    assert fingerprint(local) == fingerprint(local, "def g():\n    return 1"), "local names reach nothing"
    constant = ["LIMIT = 3", "def f(x):\n    return x > LIMIT"]
    assert fingerprint(*constant) != fingerprint("LIMIT = 4", constant[1])


@pytest.fixture
def package(monkeypatch):
    "Lets a test say what the package holds."

    def holds(**modules):
        texts = {f"fac_synthesis.{name.replace('__', '.')}": text for name, text in modules.items()}
        monkeypatch.setattr(artifacts, "LOADED", texts)
        forget()

    def forget():
        package_source.cache_clear()
        artifacts.named_code.cache_clear()

    yield holds
    forget()


def test_the_package_is_followed_by_name(package):
    use = "from fac_synthesis.sae.core import encode\ndef f(x):\n    return encode(x)"
    core = "from ..run.base import unit\ndef encode(x):\n    return unit(x)\ndef decode(x):\n    return x"
    base = "def unit(x):\n    return x\ndef other(x):\n    return x"
    package(sae__core=core, run__base=base)
    first = fingerprint(use)
    package(
        sae__core=core.replace("def decode(x):\n    return x", "def decode(x):\n    return -x"),
        run__base=base,
    )
    assert fingerprint(use) == first, "a function that is not reached does not count"
    package(
        sae__core=core, run__base=base.replace("def unit(x):\n    return x", "def unit(x):\n    return -x")
    )
    assert fingerprint(use) != first, "a function reached through another module counts"
    package(sae__core=core + "\nregister(encode)", run__base=base)
    assert fingerprint(use) != first, "what a module does on import counts"


def test_a_file_that_the_code_names_counts(tmp_path, monkeypatch):
    (tmp_path / "nbs/planted").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("")
    lexicon = tmp_path / "nbs/planted/lexicon.yaml"
    lexicon.write_text("a")
    monkeypatch.chdir(tmp_path)
    reads = "def f():\n    return project_file('planted/lexicon.yaml').read_text()"
    first = fingerprint(reads)
    lexicon.write_text("b")
    assert fingerprint(reads) != first


def test_a_notebook_is_its_cells_and_what_they_reach(package):
    cells = ["from fac_synthesis.sae.core import encode", "x = encode(1)"]
    package(sae__core="def encode(x):\n    return x")
    first = notebook_fingerprint(cells)
    assert (
        first
        == notebook_fingerprint([*cells[:1], "x = encode(1)  # one"])
        != notebook_fingerprint([*cells, "y = 2"])
    )
    package(sae__core="def encode(x):\n    return -x")
    assert notebook_fingerprint(cells) != first


# ---- arguments


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    words: tuple = ("a",)


class Judge:
    def __init__(self, name, batch):
        self.name, self.batch = name, batch

    def content(self):
        return self.name


def one(x):
    return x + 1


PAIRS = [
    (1, 1.0),
    ("1", 1),
    (True, 1),
    ([1, 2], [2, 1]),
    ([[1], 2], [1, [2]]),
    ({"a": 1}, {"a": 2}),
    ({1, 2}, {1, 3}),
    (Settings(), Settings(0.2)),
    (np.arange(3), np.arange(3.0)),
    (np.zeros((2, 3)), np.zeros((3, 2))),
    (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
    (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})),
    (pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [1, 3]})),
    (pd.DataFrame({"a": [["x"], ["y"]]}), pd.DataFrame({"a": [["x"], ["z"]]})),
    (sparse.csr_matrix([[0, 1.0]]), sparse.csr_matrix([[1.0, 0]])),
    (functools.partial(one, 1), functools.partial(one, 2)),
    (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    (Judge("a", 1), Judge("b", 1)),
    (one, fingerprint),
]


@pytest.mark.parametrize("a, b", PAIRS, ids=[type(a).__name__ + str(i) for i, (a, _) in enumerate(PAIRS)])
def test_different_content_has_different_digests(a, b):
    assert digest_of(a) == digest_of(a) != digest_of(b)


def test_equal_content_has_equal_digests():
    frame = pd.DataFrame({"a": [1.0, np.nan], "t": ["x", None], "content": [1, 2]})
    assert digest_of(frame) == digest_of(frame.copy())
    assert digest_of(np.arange(6).reshape(2, 3).T) == digest_of(np.arange(6).reshape(2, 3).T.copy())
    assert digest_of((1, [2])) == digest_of((1, [2])) and digest_of({1, 2}) == digest_of({2, 1})
    assert digest_of(Judge("a", 1)) == digest_of(Judge("a", 99)), "an object says itself what counts"


def test_what_has_no_content_is_refused(tmp_path):
    for value in (object(), Path("a"), iter([1]), open(tmp_path / "x", "w")):
        with pytest.raises(TypeError, match="cannot be compared by content"):
            digest_of([value])


def test_the_code_of_an_arguments_class_counts(package):
    "A function that gets an object calls its methods."
    text = "class Reader:\n    def read(self):\n        return unit()\n"
    text += "def unit():\n    return 1\ndef other():\n    return 1"
    reader = type("Reader", (), {"__module__": "fac_synthesis.sae.core", "content": lambda self: 1})()
    package(sae__core=text)
    first = digest_of(reader)
    package(sae__core=text.replace("def other():\n    return 1", "def other():\n    return 2"))
    assert digest_of(reader) == first
    package(sae__core=text.replace("def unit():\n    return 1", "def unit():\n    return 2"))
    assert digest_of(reader) != first


def test_a_function_within_a_function_has_a_digest():
    def outer(n):
        return lambda x: x + n

    assert digest_of(outer) == digest_of(outer) != digest_of(lambda n: lambda x: x - n)


def test_a_loaded_object_is_known_by_its_artifact_and_so_are_its_parts():
    class Model:
        pass

    class Holder:
        carries = ("model",)

        def __init__(self):
            self.model = Model()

    holder = Holder()
    remember_digest(holder, "abc")
    other = Holder()
    remember_digest(other, "abd")
    assert digest_of(holder) == digest_of(holder) != digest_of(other)
    assert digest_of(holder.model) != digest_of(other.model)
    with pytest.raises(TypeError):
        digest_of(Model())


def test_keys_follow_content():
    assert content_key(a=1, b=[1, 2]) == content_key(b=[1, 2], a=1) != content_key(a=1, b=[2, 1])


def test_the_package_is_read_once(monkeypatch):
    "Whatever happens to the files afterwards, the key tells of the code that this process loaded."
    assert set(artifacts.LOADED) == set(read_package())
    first = code_fingerprint(["digest_of"], package_source("fac_synthesis.run.artifacts"))
    monkeypatch.setattr(Path, "read_text", lambda self, *a: "changed = 1")
    package_source.cache_clear()
    assert code_fingerprint(["digest_of"], package_source("fac_synthesis.run.artifacts")) == first
