"""Corpora: every reader's good and bad rows, published sets, duplicates and leaks, roles, and the real files where FAC_DATA_DIR names them."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from fac_synthesis.data.records import Record, read_records
from fac_synthesis.run.parameters import UserError

from fac_synthesis import corpora as C

PAIR = {"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."}
TOXIC = {"instance": "tea", "annotations": {"toxicity": {"majority_human": "1"}}}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": ""},
]


def put(folder: Path, name: str, content) -> Path:
    "Writes text, bytes, or rows as JSON (a list) or JSON lines (by extension)."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = "\n".join(map(json.dumps, content)) if ".jsonl" in name else json.dumps(content)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20
    return message


# --- records ---------------------------------------------------------------------------------------------------------------------------------


def test_record_ids_are_stable_and_tell_content_apart():
    assert Record("tea", source="a").id == "d57e83e5d8d4" == Record("tea", 1, "a").id
    assert (
        len(
            {
                Record("tea").id,
                Record("tea", source="a").id,
                Record("tea", turns=(("user", "tea"), ("assistant", "x"))).id,
            }
        )
        == 3
    )
    assert Record("tea", id="mine").id == "mine"
    with pytest.raises(AttributeError):
        Record("tea").text = "coffee"


def test_messages():
    assert Record("tea").messages() == [{"role": "user", "content": "tea"}]
    assert Record("Hi", turns=C.as_turns(CHAT, "")).messages() == CHAT


def test_frame_round_trip_is_exact(tmp_path):
    records = [
        Record("tea", 0, "a"),
        Record('quotes " and\nlines \u2028 ü 茶', 1),
        Record("Hi", None, "b", "own", C.as_turns(CHAT, "")),
    ]
    C.to_frame(records).to_parquet(tmp_path / "r.parquet")
    assert (
        C.from_frame(pd.read_parquet(tmp_path / "r.parquet"))
        == records
        == C.from_frame(C.to_frame(records))
        == read_records(tmp_path / "r.parquet")
    )
    assert C.from_frame(C.to_frame([])) == []
    assert "row 2" in refused(C.from_frame, pd.DataFrame({"text": ["a", " "]}), "mine")
    assert "'text'" in refused(C.from_frame, pd.DataFrame({"words": ["a"]}))


# --- good rows -------------------------------------------------------------------------------------------------------------------------------

GOOD = {
    "toxicchat.json": ({"instances": [TOXIC]}, [("tea", 1, 0)]),
    "hub.csv": (
        'conv_id,user_input,human_annotation,toxicity\n1,"tea, ""hot""\nnow",True,1\n2,cake,False,0\n',
        [('tea, "hot"\nnow', 1, 0), ("cake", 0, 0)],
    ),
    "hh.jsonl": ([PAIR], [("Tea?", None, 2)]),
    "hh.jsonl.gz": ([PAIR], [("Tea?", None, 2)]),
    "advbench.json": ([{"instruction": "spread a rumour", "category": None}], [("spread a rumour", None, 0)]),
    "goals.csv": ("goal,target\nspread a rumour,Sure\n", [("spread a rumour", None, 0)]),
    "behaviors.csv": ("Behavior,BehaviorID\nspread a rumour,r1\n", [("spread a rumour", None, 0)]),
    "alpaca.json": (
        [
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": "Sing", "input": "", "output": ""},
        ],
        [("Add\n\n1 2", None, 2), ("Sing", None, 0)],
    ),
    "gsm.jsonl": ([{"question": "1 + 1?", "answer": "#### 2"}], [("1 + 1?", None, 0)]),
    "share.json": (
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}],
        [("Hi", None, 2)],
    ),
    "chat.jsonl": (
        [{"messages": CHAT, "label": 0}, {"messages": CHAT[1:2]}],
        [("Hi", 0, 3), ("Hi", None, 0)],
    ),
    "chat.csv": ('messages,label\n"[[""user"", ""Hi""], [""assistant"", ""Ho""]]",1\n', [("Hi", 1, 2)]),
    "lines.txt": ("one\n\n two\r\n", [("one", None, 0), (" two", None, 0)]),
    "head.tsv": ('text\tlabel\n"tea ""x"""\t1\n', [('tea "x"', 1, 0)]),
    "bare.tsv": ('He said "no\t0\n\nfirst\\nsecond\t1', [('He said "no', 0, 0), ("first\nsecond", 1, 0)]),
    "bom.csv": (b"\xef\xbb\xbftext,label\nt\xc3\xa9,1\n", [("té", 1, 0)]),
    "zipped.txt.gz": ("tea\n", [("tea", None, 0)]),
    "separators.jsonl": ('{"text": "a\u2028b"}\n', [("a\u2028b", None, 0)]),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_rows(tmp_path, name):
    content, expected = GOOD[name]
    records = read_records(put(tmp_path, name, content))
    assert [(r.text, r.label, len(r.turns)) for r in records] == expected
    assert {r.source for r in records} == {name.split(".")[0]}


def test_parquet_chats_and_floats(tmp_path):
    pd.DataFrame({"messages": [CHAT, CHAT], "label": [1.0, np.nan]}).to_parquet(tmp_path / "c.parquet")
    assert [(r.text, r.label, r.turns[2]) for r in read_records(tmp_path / "c.parquet")] == [
        ("Hi", 1, ("assistant", "")),
        ("Hi", None, ("assistant", "")),
    ]


def test_label_fills_only_what_is_missing(tmp_path):
    path = put(tmp_path, "a.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": None}])
    assert [r.label for r in read_records(path, label=1, source="s")] == [0, 1]
    assert "line 2" in refused(read_records, path, labelled=True)
    assert "label 3" in refused(read_records, path, label=3)


def test_kto_is_read_by_name_only(tmp_path):
    path = put(tmp_path, "kto.json", [{"messages": CHAT, "label": True}])
    assert read_records(path, "kto")[0].label is None
    assert "label True" in refused(read_records, path)


def test_a_format_can_be_added(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "FORMATS", dict(C.FORMATS))
    C.register("poll", "statement")(lambda row, where: dict(text=row["statement"]))
    assert read_records(put(tmp_path, "poll.json", [{"statement": "tea"}]))[0].text == "tea"


def test_transcripts_are_parsed_exactly():
    text = "\n\nHuman: a\nHuman: b\n\nAssistant: \n\nAssistant: c\n\n  d\n\nHuman: e\n\nAssistant:"
    turns = C.parse_transcript(text, "")
    assert [role for role, _ in turns] == ["user", "assistant", "assistant", "user", "assistant"]
    assert turns[0][1] == "a\nHuman: b" and turns[2][1] == "c\n\n  d" and turns[4][1] == ""


# --- bad rows: file and line -----------------------------------------------------------------------------------------------------------------

BAD = {
    "label.csv": ("text,label\na,0\nb,2\n", "line 3: label '2'"),
    "nolabel.csv": ("text,label\na,0\nb,\n", "line 3: label ''"),
    "blank.jsonl": ([{"text": "a"}, {"text": "  "}], "line 2: text is empty"),
    "number.jsonl": ([{"text": 3}], "line 1: text is int"),
    "null.jsonl": ([{"text": None}], "line 1: text is missing"),
    "column.jsonl": ([{"text": "a"}, {"body": "b"}], "line 2: column 'text' is missing"),
    "broken.jsonl": ('{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON"),
    "broken.json": ('[{"text": "a"},\n {"text": "b"\n]', "line 3: not valid JSON"),
    "deep.json": ("[" * 100000, "line 1: not valid JSON"),
    "list.jsonl": ("[1]\n", "line 1: found list"),
    "object.json": ({"rows": []}, "must hold a list"),
    "surrogate.jsonl": ('{"text": "a\\ud800"}', "line 1: text holds half"),
    "latin.csv": (b"text\nfine\nt\xe9\n", "line 3: the bytes are not UTF-8"),
    "fields.csv": ('text,label\n"a\nb",1\na,b,0\n', "line 4: 3 fields where the header has 2"),
    "quote.csv": ('text,label\n"a" b,1\n', "line 2: "),
    "open.csv": ('text,label\na,0\n"b,1\n', "line 3: unexpected end of data"),
    "tabs.tsv": ("a\t1\nb\tc\t1\n", "line 2: 3 fields"),
    "bare.tsv": ("a\t1\nb\t7\n", "line 2: label '7'"),
    "unknown.csv": ("sentence,class\na,0\n", "no known format has the columns sentence, class"),
    "empty.csv": ("", "holds no rows"),
    "header.csv": ("text,label\n", "holds no rows"),
    "empty.json": ([], "holds no rows"),
    "model.pkl": (b"", "unknown format"),
    "truncated.jsonl.gz": ("x", None),
    "toxic.json": (
        {"instances": [TOXIC, {"instance": "b", "annotations": {"toxicity": None}}]},
        "item 2: annotations.toxicity.majority_human",
    ),
    "toxic2.json": (
        {"instances": [{**TOXIC, "annotations": {"toxicity": {"majority_human": "tie"}}}]},
        "item 1: label 'tie'",
    ),
    "toxic3.json": (
        {"instances": [{**TOXIC, "annotations": {"toxicity": {"majority_human": None}}}]},
        "item 1: label None",
    ),
    "hub.csv": ("user_input,human_annotation,toxicity\na,maybe,0\n", "line 2: human_annotation is 'maybe'"),
    "hub2.csv": ("user_input,human_annotation,toxicity\na,True,0.5\n", "line 2: label '0.5'"),
    "hh.jsonl": ([PAIR, {**PAIR, "rejected": "Human: Tea?"}], "line 2, rejected: the transcript must begin"),
    "hh2.jsonl": (
        [{**PAIR, "rejected": "\n\nHuman: Cake?\n\nAssistant: No."}],
        "line 1: chosen and rejected",
    ),
    "hh3.jsonl": (
        [{**PAIR, "chosen": "\n\nHuman: \n\nAssistant: x"}],
        "line 1, chosen: the turn of Human is empty",
    ),
    "hh4.jsonl": ([{**PAIR, "chosen": "\n\nAssistant: x"}], "line 1, chosen: the transcript must begin"),
    "role.jsonl": ([{"messages": [{"role": "robot", "content": "a"}]}], "line 1: message 1 needs 'role'"),
    "pair.jsonl": ([{"messages": ["a"]}], "line 1: message 1 needs 'role'"),
    "nobody.jsonl": (
        [{"messages": [{"role": "assistant", "content": "a"}]}],
        "line 1: the chat has no user message",
    ),
    "nochat.jsonl": ([{"messages": []}], "line 1: the chat is empty"),
    "chat.csv": ("messages\nhello\n", "line 2: the chat is not valid JSON"),
    "silent.jsonl": ([{"messages": [{"role": "user", "content": " "}]}], "line 1: message 1 is empty"),
    "output.json": ([{"instruction": "a", "output": None}], "item 1: output is missing"),
    "bad.parquet": (b"PAR1", "not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_file_and_place(tmp_path, name):
    content, expected = BAD[name]
    path = put(tmp_path, name, content)
    if expected is None:
        path.write_bytes(path.read_bytes()[:-9])
        expected = "cannot be read"
    message = refused(read_records, path)
    assert str(path) in message and expected in message


def test_missing_files_and_kinds(tmp_path):
    for name in ("no.csv", "no.parquet"):
        assert "does not exist" in refused(read_records, tmp_path / name)
    (tmp_path / "folder.json").mkdir()
    assert "cannot be read" in refused(read_records, tmp_path / "folder.json")
    assert "format 'csv' is unknown" in refused(read_records, put(tmp_path, "a.txt", "tea"), "csv")
    assert "column 'chosen'" in refused(read_records, tmp_path / "a.txt", "hh_rlhf")


# --- published sets --------------------------------------------------------------------------------------------------------------------------


def test_open_dataset_from_a_folder(tmp_path, monkeypatch):
    put(
        tmp_path,
        "toxicchat/toxic-chat_annotation_test.csv",
        "user_input,human_annotation,toxicity\na,True,1\nb,False,0\n",
    )
    assert [(r.text, r.source) for r in C.open_dataset("toxic-chat", tmp_path, "test")] == [
        ("a", "toxic-chat/test")
    ]
    assert len(C.open_dataset("toxic-chat", tmp_path, "test", human_only=False)) == 2
    put(
        tmp_path,
        "toxicchat/toxic-chat_annotation_train.csv",
        "user_input,human_annotation,toxicity\nb,False,0\n",
    )
    assert "human_only=False" in refused(C.open_dataset, "toxic-chat", tmp_path)
    assert "gsm8k/train.jsonl" in refused(C.open_dataset, "gsm8k", tmp_path)
    assert "no split 'dev'" in refused(C.open_dataset, "gsm8k", tmp_path, "dev")
    assert "data set 'gsm' is unknown" in refused(C.open_dataset, "gsm", tmp_path)
    assert "not a folder" in refused(C.open_dataset, "gsm8k", tmp_path / "nowhere")
    monkeypatch.setenv("FAC_DATA_DIR", str(tmp_path))
    assert C.open_dataset("toxic-chat", split="test")[0].label == 1


def test_hub_rows_go_through_the_same_checks(tmp_path, monkeypatch):
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)
    local = tmp_path / "hub.parquet"
    pd.DataFrame(
        {"user_input": ["a", "b", "c"], "human_annotation": [True, False, True], "toxicity": [0, 1, 1]}
    ).to_parquet(local)
    asked, load = [], datasets.load_dataset

    def from_disk(hub, name=None, data_dir=None, split=None):
        asked.append((hub, name, data_dir, split))
        return load("parquet", data_files=str(local), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    assert [(r.text, r.label, r.source) for r in C.open_dataset("toxic-chat", split="test")] == [
        ("a", 0, "toxic-chat/test"),
        ("c", 1, "toxic-chat/test"),
    ]
    assert "Anthropic/hh-rlhf (helpful-base/train), row 1: column 'chosen'" in refused(
        C.open_dataset, "hh-rlhf", split="helpful-base/train"
    )
    assert asked == [
        ("lmsys/toxic-chat", "toxicchat0124", None, "test"),
        ("Anthropic/hh-rlhf", None, "helpful-base", "train"),
    ]


def test_no_network_is_one_sentence(monkeypatch):
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refused(C.open_dataset, "advbench")
    assert (
        "set data_dir or FAC_DATA_DIR" in message and "no route" in message and "walledai/AdvBench" in message
    )
    assert "read from files only" in refused(C.open_dataset, "harmless")


# --- duplicates, leaks, roles ----------------------------------------------------------------------------------------------------------------


def test_deduplicate_keeps_the_first_and_reports_conflicts():
    rows = [
        Record("Tea  time", 0),
        Record("tea time", 1),
        Record("TEA\ntime", 0),
        Record("cake", 1),
        Record("x"),
    ]
    kept, removed = C.deduplicate(rows)
    assert kept == [rows[0], rows[3], rows[4]] and removed == 2
    assert C.label_conflicts(rows).to_dict("records") == [{"text": "Tea  time", "n_safe": 2, "n_toxic": 1}]
    assert C.label_conflicts(rows[3:]).empty


def test_chats_are_compared_as_a_whole():
    chats = [Record("Hi", turns=(("user", "Hi"), ("assistant", answer))) for answer in ("a", "b", "A")]
    assert C.deduplicate(chats)[1] == 1 and C.remove_overlap([Record("Hi")], chats)[1] == 0


def test_overlap():
    train, test = [Record("Tea time")], [Record("tea  time"), Record("Tea time"), Record("cake")]
    assert C.remove_overlap(train, test) == ([test[2]], 2)
    assert C.remove_overlap(train, test, exact=True) == ([test[0], test[2]], 1)
    assert C.remove_overlap([], test) == (test, 0)


def test_draws_are_nested_and_seeded():
    rows = [Record(str(i)) for i in range(50)]
    assert C.draw(rows, 10, 3) == C.draw(rows, 20, 3)[:10] != C.draw(rows, 10, 4)
    assert len(set(C.draw(rows, 50, 0))) == 50
    assert "n_safe is 51" in refused(C.draw, rows, 51, 0, "n_safe") and "-1" in refused(C.draw, rows, -1, 0)


def toy_roles() -> dict[str, list[Record]]:
    rows = lambda role, n: [Record(f"{role} {i}", i % 2) for i in range(n)]
    return dict(
        pretraining=[Record(f"p {i}") for i in range(20)] + [Record("TEST 1")],
        anchor=rows("anchor", 8) + rows("test", 1),
        seed=rows("seed", 4),
        full=rows("anchor", 8) * 2,
        test=rows("test", 6) + rows("floor", 2) + rows("test", 2),
        floor=rows("floor", 4) * 2,
    )


def test_build_corpora_cleans_and_reports():
    built = C.build_corpora(toy_roles(), seed=1, max_texts=12, fixed=("floor",))
    report = built.report.set_index("role")
    assert report.rows.to_dict() == dict(pretraining=12, anchor=8, seed=4, full=8, test=8, floor=8)
    assert report.overlap.to_dict() == dict(pretraining=1, anchor=1, seed=0, full=0, test=2, floor=0)
    assert report.duplicates.to_dict() == dict(pretraining=0, anchor=0, seed=0, full=8, test=0, floor=0)
    assert (
        report.toxic_share["anchor"] == 0.5
        and np.isnan(report.toxic_share["pretraining"])
        and report.mean_words["seed"] == 2
    )
    assert built.labels("seed").tolist() == [0, 1, 0, 1] and built.texts("seed")[0] == "seed 0"
    assert (
        built
        == C.build_corpora(toy_roles(), seed=1, max_texts=12, fixed=("floor",))
        != C.build_corpora(toy_roles(), seed=2, max_texts=12, fixed=("floor",))
    )


def test_roles_are_checked():
    roles = toy_roles()
    assert "'test' has no rows" in refused(C.build_corpora, {k: v for k, v in roles.items() if k != "test"})
    assert "'pretraining' has no rows" in refused(C.build_corpora, {**roles, "pretraining": []}, max_texts=3)
    assert "4 safe, 0 toxic and 1 unlabelled" in refused(
        C.build_corpora, {**roles, "seed": [Record(str(i), 0) for i in range(4)] + [Record("x")]}
    )
    assert "corpus 'anchor' has no rows" in refused(C.build_corpora, {**roles, "anchor": roles["test"]})


def test_save_and_load(tmp_path):
    built = C.build_corpora(toy_roles())
    for name in "ab":
        (tmp_path / name).mkdir()
        built.save(tmp_path / name)
    loaded = C.Corpora.load(tmp_path / "a")
    assert loaded == built and loaded.report.equals(built.report) and list(loaded.roles) == list(built.roles)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    (tmp_path / "a" / "role_seed.parquet").unlink()
    assert "role_seed.parquet does not exist" in refused(C.Corpora.load, tmp_path / "a")
    assert "report.parquet does not exist" in refused(C.Corpora.load, tmp_path / "c")
    assert "no corpus 'train'" in refused(built.texts, "train")


def test_planted_corpora():
    frames = {
        role: pd.DataFrame(
            [dict(role=role, text=r.text, label=r.label, source="planted", turns="") for r in rs]
        )
        for role, rs in toy_roles().items()
    }
    frames["pretraining"]["turns"] = json.dumps([["user", "p"], ["assistant", "q"]])
    built = C.planted_corpora(frames)
    assert (
        len(built["pretraining"]) == 1
        and built["pretraining"][0].turns[1] == ("assistant", "q")
        and built["seed"][1].label == 1
    )
    frames["seed"].loc[2, "label"] = 5
    assert "planted world, seed, row 3: label 5" in refused(C.planted_corpora, frames)


def test_files_corpora(tmp_path):
    train = put(tmp_path, "train.csv", "text,label\na,0\nb,1\nt1,0\n")
    test = put(tmp_path, "test.jsonl", [{"text": "t1", "label": 0}, {"text": "t2", "label": 1}])
    built = C.files_corpora(train, test)
    assert built.texts("seed") == built.texts("full") == built.texts("anchor") == ["a", "b"] and built.texts(
        "test"
    ) == ["t1", "t2"]
    anchor, texts = put(tmp_path, "anchor.tsv", "c\t0\nd\t1\n"), put(tmp_path, "texts.txt", "one\ntwo\nt2\n")
    built = C.files_corpora(train, test, anchor, texts, max_texts=1)
    assert (
        built.texts("full") == ["a", "b", "c", "d"]
        and built.report.set_index("role").overlap["pretraining"] == 1
    )
    assert len(built["pretraining"]) == 1 and built["pretraining"][0].label is None
    assert "test_file is not set" in refused(C.files_corpora, train, "")
    assert "texts.txt, line 1: there is no label" in refused(C.files_corpora, train, texts)


def test_pieces():
    assert C.pieces("a  b", 2) == ["a  b"] and C.pieces("a b c d e", 2) == ["a b", "c d", "e"]


def published_folder(folder: Path) -> Path:
    "A tiny folder with the layout of the published files."
    ask = lambda name, n: [{"instruction": f"{name} request {i}", "category": None} for i in range(n)]
    chat = lambda i: {k: f"\n\nHuman: hh question {i}\n\nAssistant: {k}" for k in ("chosen", "rejected")}
    toxic = lambda names: {
        "instances": [
            {"instance": n, "annotations": {"toxicity": {"majority_human": str(i % 2)}}}
            for i, n in enumerate(names)
        ]
    }
    for name, content in {
        "advbench.json": ask("adv", 6),
        "harmbench_val.json": ask("val", 4),
        "harmbench_test.json": ask("test", 4),
        **{f"splits/harmless_{s}.json": ask(f"harmless {s}", 30) for s in ("train", "val")},
    }.items():
        put(folder, f"harm_prompts/{name}", content)
    put(folder, "hh_rlhf/harmless-base_test.jsonl.gz", [chat(i) for i in (1, 2, 2, 3)])
    put(folder, "toxicchat/toxic_chat_train.json", toxic(["one", "two", "three", "three"]))
    put(folder, "toxicchat/toxic_chat_test.json", toxic(["three", "Two", "four", "hh question 3", "five"]))
    put(folder, "llamafactory/wiki_demo.txt", "word " * 250)
    return folder


def test_published_corpora(tmp_path):
    folder = published_folder(tmp_path)
    built = C.published_corpora(folder, seed=0, n_seed_toxic=3, n_safe=10, max_texts=0)
    assert (
        built.texts("test") == ["Two", "four", "hh question 3", "five"] and len(built["toxicchat_train"]) == 4
    )
    assert Counter(r.label for r in built["seed"]) == {1: 3, 0: 10} and {
        r.source for r in built["seed"] if r.label
    } == {"harmbench/val"}
    assert Counter(r.label for r in built["anchor"]) == {1: 16, 0: 17} and Counter(
        r.label for r in built["full"]
    ) == {1: 16, 0: 10}
    assert not {r.text for r in built["anchor"] if not r.label} & set(built.texts("seed"))
    assert (
        {r.label for r in built["pretraining"]} == {None}
        and "hh question 3" not in built.texts("pretraining")
        and "chosen" in built.texts("pretraining")
    )
    assert max(len(t.split()) for t in built.texts("pretraining")) == 200
    assert C.published_corpora(folder, 0, 3, 10, 0, exact=False).texts("test") == [
        "four",
        "hh question 3",
        "five",
    ]
    assert built == C.published_corpora(folder, 0, 3, 10, 0) != C.published_corpora(folder, 1, 3, 10, 0)
    assert set(C.published_corpora(folder, 0, 2, 10, 0)["seed"]) < set(built["seed"])
    assert "n_seed_toxic is 5" in refused(C.published_corpora, folder, n_seed_toxic=5, n_safe=10)


# --- the real files --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_dir() -> str:
    folder = os.environ.get("FAC_DATA_DIR", "")
    if not folder:
        pytest.skip("FAC_DATA_DIR is not set: no folder with the published files")
    return folder


def test_real_toxicchat(data_dir):
    train, test = (C.open_dataset("toxic-chat", data_dir, split) for split in ("train", "test"))
    assert (len(train), len(test), sum(r.label for r in train), sum(r.label for r in test)) == (
        2801,
        2853,
        384,
        362,
    )
    assert len({r.text for r in train} & {r.text for r in test}) == 84
    kept, removed = C.remove_overlap(train, test, exact=True)
    assert (len(kept), removed) == (2768, 85) and np.mean([r.label for r in kept]) == pytest.approx(
        0.1207, abs=1e-4
    )
    assert len(C.remove_overlap(train, test)[0]) == 2750
    assert C.label_conflicts(train).empty and C.label_conflicts(test).empty


def test_real_hh_rlhf(data_dir):
    path = Path(data_dir) / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    records = C.open_dataset("hh-rlhf", data_dir, "harmless-base/test")
    assert len(records) == 2312 and all(
        r.text == r.turns[0][1] and r.turns[0][0] == "user" and r.turns[-1][0] == "assistant" for r in records
    )
    names = {"user": "Human", "assistant": "Assistant"}
    for record, line in zip(records, gzip.open(path, "rt", encoding="utf-8")):
        assert (
            "".join(f"\n\n{names[role]}: {content}" for role, content in record.turns)
            == json.loads(line)["chosen"]
        )


def test_real_harmless_splits_partition_alpaca(data_dir):
    splits = [[r.text for r in C.open_dataset("harmless", data_dir, s)] for s in ("train", "val", "test")]
    assert list(map(len, splits)) == [18793, 6264, 6266]
    assert Counter(sum(splits, [])) == Counter(r.text for r in C.open_dataset("alpaca", data_dir))


@pytest.mark.parametrize(
    "name, split, rows",
    [
        ("advbench", "", 520),
        ("harmbench", "val", 41),
        ("harmbench", "test", 159),
        ("gsm8k", "test", 1319),
        ("gsm8k", "train", 7473),
        ("alpaca-demo", "", 999),
        ("dpo-demo", "", 300),
        ("kto-demo", "", 300),
        ("c4-demo", "", 300),
        ("wiki-demo", "", 30),
    ],
)
def test_real_row_counts(data_dir, name, split, rows):
    assert len(C.open_dataset(name, data_dir, split)) == rows


def test_real_corpora(data_dir):
    built = C.published_corpora(data_dir, seed=0, n_seed_toxic=30, n_safe=1000, max_texts=5000)
    report = built.report.set_index("role")
    assert report.rows.to_dict() == dict(
        pretraining=5000, anchor=5791, seed=1030, full=3894, test=2768, toxicchat_train=2801
    )
    assert report.toxic_share["test"] == pytest.approx(0.1207, abs=1e-4) and report.overlap["test"] == 85
    tested = set(map(C.content_key, built["test"]))
    for role in ("pretraining", "anchor", "seed", "full"):
        assert not tested & set(map(C.content_key, built[role])), role
    assert len({r.source for r in built["pretraining"]}) == 10


# --- items of the other tasks ----------------------------------------------------------------------------------------------------------------


def options(view):
    return {
        "question": f"{view}\n\nChoices:\n (A) Yes, do\n (B) No, don't",
        "answer_matching_behavior": " (A)",
        "answer_not_matching_behavior": " (B)",
    }


@pytest.fixture
def items_folder(tmp_path):
    "A handful of rows of every published set that has items; one training question, one instruction and one prompt stand in the test too."
    talk = lambda question, answer: f"\n\nHuman: {question}\n\nAssistant: {answer}"
    put(
        tmp_path,
        "hh_rlhf/harmless-base_test.jsonl.gz",
        [
            {"chosen": talk(q, "Yes, gladly."), "rejected": talk(q, "No.")}
            for q in ("How is tea made?", "Where is the  lamp?", "What is soap?")
        ],
    )
    for name in C.LLMBAR_SUBSETS:
        put(
            tmp_path,
            f"llmbar/LLMBar/{name}/dataset.json",
            [{"input": "where is the lamp?", "output_1": "There.", "output_2": "A hat.", "label": 1}],
        )
    for behavior in ("sycophancy", "survival-instinct"):
        put(
            tmp_path,
            f"caa/generate/{behavior}/generate_dataset.json",
            [options(f"May we stop you, number {i}?") for i in range(4)],
        )
        put(
            tmp_path,
            f"caa/test/{behavior}/test_dataset_ab.json",
            [options("MAY we stop you, number 3?"), options("Shall we?")],
        )
    put(
        tmp_path,
        "harm_prompts/splits/harmless_val.json",
        [{"instruction": f"Name bird {i}.", "category": None} for i in range(3)],
    )
    alpaca = lambda what: {"instruction": what, "input": "", "output": "As you say."}
    put(
        tmp_path,
        C.ALPACA_SEEDS,
        [{"instruction": f"Sing part {i}.", "instances": [{"input": "", "output": "La."}]} for i in range(3)],
    )
    put(
        tmp_path,
        C.ALPACA_DEMO,
        [alpaca("Count."), alpaca("Say hello."), {**alpaca("Be quiet."), "output": " "}],
    )
    put(tmp_path, C.ALPACA_EVAL_REFERENCE, [alpaca("say  hello."), alpaca("Name a tree.")])
    return tmp_path


@pytest.mark.parametrize(
    "task, left_out", [("reward", 1), ("sycophancy", 1), ("survival", 1), ("instruction", 1)]
)
def test_published_items_never_train_on_the_test(items_folder, task, left_out):
    items, report = C.published_items(task, items_folder, seed=1, n_seed=2)
    assert (
        set(items.split) == {"anchor", "seed", "full", "test"}
        and report.left_out.sum() == left_out
        and set(report.task) == {task}
    )
    question = {"reward": "prompt", "instruction": "instruction"}.get(task, "question")
    asked = {split: {C.prompt_key(q) for q in f[question]} for split, f in items.groupby("split")}
    assert (
        not asked["test"] & (asked["seed"] | asked["full"] | asked["anchor"])
        and asked["anchor"] <= asked["full"]
    )
    corpora = C.item_corpora(items)
    assert set(corpora.roles) == set(C.ROLES) and all(set(corpora.labels(r)) == {0, 1} for r in C.ROLES[1:])
    kept = C.items_in(items, corpora)
    assert len(kept) and all(t in corpora.texts(s) for s, t in zip(kept.split, kept.text))
    smaller, _ = C.published_items(task, items_folder, seed=1, n_seed=1, n_anchor=1, n_full=1)
    assert smaller.split.value_counts()[["anchor", "seed", "full"]].tolist() == [1, 1, 1]


def test_the_texts_of_an_item(items_folder):
    text = lambda task: C.published_items(task, items_folder, n_seed=1)[0].iloc[0]
    assert (
        text("instruction").negative in ("La.", "As", "As you")
        and text("reward").text == text("reward").chosen
        and text("reward").prompt.startswith(text("reward").negative)
    )
    item = text("survival")
    assert (
        item.text.startswith("May we stop you")
        and "Choices" not in item.text
        and item.negative.startswith("Name bird")
        and item.behavior == "survival"
    )
    assert C.question_view(options("Once.\n (A) is a letter. Do you?")["question"]).startswith("Once.")


@pytest.mark.parametrize(
    "task, gone",
    [
        ("reward", "hh_rlhf/harmless-base_test.jsonl.gz"),
        ("sycophancy", "caa/generate/sycophancy/generate_dataset.json"),
        ("survival", "harm_prompts/splits/harmless_val.json"),
        ("instruction", C.ALPACA_EVAL_REFERENCE),
    ],
)
def test_a_missing_file_is_told_from_a_damaged_one(items_folder, task, gone):
    (items_folder / gone).unlink()
    with pytest.raises(C.NotThere):
        C.published_items(task, items_folder, n_seed=1)
    if gone.endswith("gz"):
        return
    put(items_folder, gone, "[{")
    with pytest.raises(UserError) as caught:
        C.published_items(task, items_folder, n_seed=1)
    assert not isinstance(caught.value, C.NotThere) and "not valid JSON" in str(caught.value)


@pytest.mark.skipif(
    not os.environ.get("FAC_DATA_DIR"), reason="FAC_DATA_DIR is not set: no folder with the published files"
)
@pytest.mark.parametrize(
    "task, n_test", [("reward", 333), ("sycophancy", 50), ("survival", 50), ("instruction", 805)]
)
def test_real_items_become_corpora(task, n_test):
    items, _ = C.published_items(task)
    kept = C.items_in(items, C.item_corpora(items))
    assert (
        (kept.split == "test").sum() == n_test
        and (kept.split == "seed").sum() == 40
        and (kept.split == "anchor").sum() > 390
    )
