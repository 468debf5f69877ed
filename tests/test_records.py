"""Records: every reader's good and bad rows, published sets, duplicates and leaks, and the real files."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from data_files import put, refused, transcript

import fac_synthesis.data.records as R
from fac_synthesis.data.records import Record, read_records
from fac_synthesis.run.artifacts import Source, code_fingerprint, package_source

PAIR = {"chosen": transcript("Tea?", "Yes."), "rejected": transcript("Tea?", "No.")}
TOXIC = {"instance": "tea", "annotations": {"toxicity": {"majority_human": "1"}}}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": ""},
]


# ---- records


def test_record_ids_are_stable_and_tell_content_apart():
    assert Record("tea", source="a").id == "d57e83e5d8d4" == Record("tea", 1, "a").id
    chat = Record("tea", turns=(("user", "tea"), ("assistant", "x")))
    assert len({Record("tea").id, Record("tea", source="a").id, chat.id}) == 3
    assert Record("tea", id="mine").id == "mine"
    with pytest.raises(AttributeError):
        Record("tea").text = "coffee"


def test_messages():
    assert Record("tea").messages() == [{"role": "user", "content": "tea"}]
    assert Record("Hi", turns=R.as_turns(CHAT, "")).messages() == CHAT


def test_frame_round_trip_is_exact(tmp_path):
    records = [
        Record("tea", 0, "a"),
        Record('quotes " and\nlines \u2028 ü 茶', 1),
        Record("Hi", None, "b", "own", R.as_turns(CHAT, "")),
    ]
    R.to_frame(records).to_parquet(tmp_path / "r.parquet")
    assert R.from_frame(R.to_frame(records)) == records
    assert R.from_frame(pd.read_parquet(tmp_path / "r.parquet")) == records
    assert read_records(tmp_path / "r.parquet") == records
    assert R.from_frame(R.to_frame([])) == []
    assert "row 2" in refused(R.from_frame, pd.DataFrame({"text": ["a", " "]}), "mine")
    assert "'text'" in refused(R.from_frame, pd.DataFrame({"words": ["a"]}))


# ---- good rows

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
    records = read_records(tmp_path / "c.parquet")
    assert [(r.text, r.label) for r in records] == [("Hi", 1), ("Hi", None)]
    assert [r.turns[2] for r in records] == [("assistant", "")] * 2


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
    monkeypatch.setattr(R, "FORMATS", dict(R.FORMATS))
    R.register("poll", "statement")(lambda row, where: dict(text=row["statement"]))
    assert read_records(put(tmp_path, "poll.json", [{"statement": "tea"}]))[0].text == "tea"


def test_a_converter_is_part_of_the_key_of_what_reads_it():
    source = package_source("fac_synthesis.data.records")
    as_it_is = code_fingerprint(["open_dataset"], source)
    text = Path(R.__file__).read_text()
    assert as_it_is == code_fingerprint(["open_dataset"], Source(source.name, [text]))
    other = text.replace('row["annotations"]["toxicity"]', 'row["annotations"]["harm"]')
    assert as_it_is != code_fingerprint(["open_dataset"], Source(source.name, [text, other]))


def test_formats_are_taken_in_their_order():
    assert list(R.FORMATS) == [
        "toxicchat",
        "toxicchat_csv",
        "hh_rlhf",
        "messages",
        "sharegpt",
        "kto",
        "alpaca",
        "instructions",
        "gsm8k",
        "advbench_csv",
        "harmbench_csv",
        "prompts",
        "text",
    ]
    assert R.recognise(["messages", "label"], "").name == "messages"
    assert R.recognise(["instruction", "output", "text"], "").name == "alpaca"


def test_transcripts_are_parsed_exactly():
    text = "\n\nHuman: a\nHuman: b\n\nAssistant: \n\nAssistant: c\n\n  d\n\nHuman: e\n\nAssistant:"
    turns = R.parse_transcript(text, "")
    assert [role for role, _ in turns] == ["user", "assistant", "assistant", "user", "assistant"]
    assert turns[0][1] == "a\nHuman: b" and turns[2][1] == "c\n\n  d" and turns[4][1] == ""


# ---- bad rows: file and line

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


# ---- published sets


def test_open_dataset_from_a_folder(tmp_path, monkeypatch):
    header = "user_input,human_annotation,toxicity\n"
    put(tmp_path, "toxicchat/toxic-chat_annotation_test.csv", header + "a,True,1\nb,False,0\n")
    people = R.open_dataset("toxic-chat", tmp_path, "test")
    assert [(r.text, r.source) for r in people] == [("a", "toxic-chat/test")]
    assert len(R.open_dataset("toxic-chat", tmp_path, "test", human_only=False)) == 2
    put(tmp_path, "toxicchat/toxic-chat_annotation_train.csv", header + "b,False,0\n")
    assert "human_only=False" in refused(R.open_dataset, "toxic-chat", tmp_path)
    assert "gsm8k/train.jsonl" in refused(R.open_dataset, "gsm8k", tmp_path)
    assert "no split 'dev'" in refused(R.open_dataset, "gsm8k", tmp_path, "dev")
    assert "data set 'gsm' is unknown" in refused(R.open_dataset, "gsm", tmp_path)
    assert "not a folder" in refused(R.open_dataset, "gsm8k", tmp_path / "nowhere")
    monkeypatch.setenv("FAC_DATA_DIR", str(tmp_path))
    assert R.open_dataset("toxic-chat", split="test")[0].label == 1


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
    records = R.open_dataset("toxic-chat", split="test")
    assert [(r.text, r.label) for r in records] == [("a", 0), ("c", 1)]
    assert {r.source for r in records} == {"toxic-chat/test"}
    said = refused(R.open_dataset, "hh-rlhf", split="helpful-base/train")
    assert "Anthropic/hh-rlhf (helpful-base/train), row 1: column 'chosen'" in said
    assert asked == [
        ("lmsys/toxic-chat", "toxicchat0124", None, "test"),
        ("Anthropic/hh-rlhf", None, "helpful-base", "train"),
    ]


def test_no_network_is_one_sentence(monkeypatch):
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refused(R.open_dataset, "advbench")
    assert "set data_dir or FAC_DATA_DIR" in message
    assert "no route" in message and "walledai/AdvBench" in message
    assert "read from files only" in refused(R.open_dataset, "harmless")


# ---- duplicates, leaks, draws


def test_deduplicate_keeps_the_first_and_reports_conflicts():
    rows = [
        Record("Tea  time", 0),
        Record("tea time", 1),
        Record("TEA\ntime", 0),
        Record("cake", 1),
        Record("x"),
    ]
    kept, removed = R.deduplicate(rows)
    assert kept == [rows[0], rows[3], rows[4]] and removed == 2
    assert R.label_conflicts(rows).to_dict("records") == [{"text": "Tea  time", "n_safe": 2, "n_toxic": 1}]
    assert R.label_conflicts(rows[3:]).empty


def test_chats_are_compared_as_a_whole():
    chats = [Record("Hi", turns=(("user", "Hi"), ("assistant", answer))) for answer in ("a", "b", "A")]
    assert R.deduplicate(chats)[1] == 1 and R.remove_overlap([Record("Hi")], chats)[1] == 0


def test_overlap():
    train, test = [Record("Tea time")], [Record("tea  time"), Record("Tea time"), Record("cake")]
    assert R.remove_overlap(train, test) == ([test[2]], 2)
    assert R.remove_overlap(train, test, exact=True) == ([test[0], test[2]], 1)
    assert R.remove_overlap([], test) == (test, 0)


def test_draws_are_nested_and_seeded():
    rows = [Record(str(i)) for i in range(50)]
    assert R.draw(rows, 10, 3) == R.draw(rows, 20, 3)[:10] != R.draw(rows, 10, 4)
    assert len(set(R.draw(rows, 50, 0))) == 50
    assert "n_safe is 51" in refused(R.draw, rows, 51, 0, "n_safe") and "-1" in refused(R.draw, rows, -1, 0)


# ---- the real files


@pytest.fixture(scope="module")
def data_dir() -> str:
    folder = os.environ.get("FAC_DATA_DIR", "")
    if not folder:
        pytest.skip("FAC_DATA_DIR is not set: no folder with the published files")
    return folder


def test_real_toxicchat(data_dir):
    train, test = (R.open_dataset("toxic-chat", data_dir, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2801, 2853)
    assert (sum(r.label for r in train), sum(r.label for r in test)) == (384, 362)
    assert len({r.text for r in train} & {r.text for r in test}) == 84
    kept, removed = R.remove_overlap(train, test, exact=True)
    assert (len(kept), removed) == (2768, 85)
    assert np.mean([r.label for r in kept]) == pytest.approx(0.1207, abs=1e-4)
    assert len(R.remove_overlap(train, test)[0]) == 2750
    assert R.label_conflicts(train).empty and R.label_conflicts(test).empty


def test_real_hh_rlhf(data_dir):
    path = Path(data_dir) / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    records = R.open_dataset("hh-rlhf", data_dir, "harmless-base/test")
    assert len(records) == 2312
    assert all(r.text == r.turns[0][1] and r.turns[0][0] == "user" for r in records)
    assert all(r.turns[-1][0] == "assistant" for r in records)
    names = {"user": "Human", "assistant": "Assistant"}
    for record, line in zip(records, gzip.open(path, "rt", encoding="utf-8")):
        whole = "".join(f"\n\n{names[role]}: {content}" for role, content in record.turns)
        assert whole == json.loads(line)["chosen"]


def test_real_harmless_splits_partition_alpaca(data_dir):
    splits = [[r.text for r in R.open_dataset("harmless", data_dir, s)] for s in ("train", "val", "test")]
    assert list(map(len, splits)) == [18793, 6264, 6266]
    assert Counter(text for split in splits for text in split) == Counter(
        r.text for r in R.open_dataset("alpaca", data_dir)
    )


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
    assert len(R.open_dataset(name, data_dir, split)) == rows
