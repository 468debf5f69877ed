"Small files that tests write and readers read."

import gzip
import json
from pathlib import Path

import pytest

from fac_synthesis.run.parameters import UserError


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
    "The one sentence of the UserError that the call must raise."
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20
    return message


def transcript(question: str, answer: str) -> str:
    "One question and one answer as HH-RLHF writes them."
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def requests(name: str, n: int) -> list[dict]:
    "Rows of the harmful and harmless instructions."
    return [{"instruction": f"{name} request {i}", "category": None} for i in range(n)]


def toxicchat(texts: list[str]) -> dict:
    "ToxicChat as JSON; every second text is toxic."
    return {
        "instances": [
            {"instance": text, "annotations": {"toxicity": {"majority_human": str(i % 2)}}}
            for i, text in enumerate(texts)
        ]
    }


def put_toxicity_files(folder: Path) -> Path:
    "A tiny folder with the layout of the published files that the toxicity corpora are made of."
    asked = {
        "advbench.json": requests("adv", 6),
        "harmbench_val.json": requests("val", 4),
        "harmbench_test.json": requests("test", 4),
        "splits/harmless_train.json": requests("harmless train", 30),
        "splits/harmless_val.json": requests("harmless val", 30),
    }
    for name, rows in asked.items():
        put(folder, f"harm_prompts/{name}", rows)
    chats = []
    for i in (1, 2, 2, 3):
        question = f"hh question {i}"
        chats.append({name: transcript(question, name) for name in ("chosen", "rejected")})
    put(folder, "hh_rlhf/harmless-base_test.jsonl.gz", chats)
    put(folder, "toxicchat/toxic_chat_train.json", toxicchat(["one", "two", "three", "three"]))
    test = ["three", "Two", "four", "hh question 3", "five"]
    put(folder, "toxicchat/toxic_chat_test.json", toxicchat(test))
    put(folder, "llamafactory/wiki_demo.txt", "word " * 250)
    return folder
