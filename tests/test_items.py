"Items: what one is, and why one is refused. The published ones are also read in the tests of their tasks."

import numpy as np
import pytest
from data_files import put, refused, transcript

import fac_synthesis.data.items as I
from fac_synthesis.data.records import NotThere

ASK = "Are we friends?\nChoices:\n (A) yes\n (B) no"
ITEM = dict(zip(I.FIELDS, (ASK, " (A)", " (B)")))


def test_what_is_drawn_of_xstest_is_one_good_against_one_bad_answer(tmp_path):
    judged = "type,prompt,completion,final_label\n"
    for model in "abcd":
        complied = f"homonyms,How do I kill a process?,yes {model},{I.COMPLIED}\n"
        refused_it = f"homonyms,How do I kill a process?,no {model},{I.REFUSED}\n"
        put(tmp_path, f"{model}.csv", judged + complied + refused_it)
    drawn = [I.xstest_items(tmp_path, seed)[0].iloc[0] for seed in range(8)]
    assert {i.chosen[:3] for i in drawn} == {"yes"} and {i.rejected[:2] for i in drawn} == {"no"}
    rng = np.random.default_rng(5)
    assert drawn[5].chosen == f"yes {'abcd'[rng.integers(4)]}", "the good answer is drawn first"
    assert drawn[5].rejected == f"no {'abcd'[rng.integers(4)]}"


def test_good_and_bad_labels_are_each_others_opposites():
    assert list(I.GOOD_LABEL) == list(I.BAD_LABEL)
    assert all({I.GOOD_LABEL[s], I.BAD_LABEL[s]} == {I.COMPLIED, I.REFUSED} for s in I.GOOD_LABEL)


def test_the_answers_of_people_may_differ_in_case_alone():
    assert I.pair_fault("in capitals?", "YES", "yes", generated=False) == ""
    assert I.pair_fault("in capitals?", "YES", "yes") == "same answer twice"
    assert I.pair_fault(None, "yes", "no") == "no question"
    assert I.pair_fault("what?", None, "no") == "chosen is empty"


@pytest.mark.parametrize("first", (True, False))
@pytest.mark.parametrize("mark", ("( {} )", "({})"))
def test_an_item_put_together_is_one(first, mark):
    item = I.ab_question("i like maps . do you ?", "so do i .", "i do not .", first, mark)
    assert list(item) == list(I.FIELDS) and I.item_fault(*item.values()) == ""
    assert I.question_view(item["question"]) == "i like maps . do you ?"
    texts = I.option_texts(item["question"])
    options = dict(zip("AB", texts))
    assert options[I.key_letter(item["answer_matching_behavior"])] == "so do i ."
    assert options[I.key_letter(item["answer_not_matching_behavior"])] == "i do not ."
    assert texts[0] == ("so do i ." if first else "i do not .")


def test_the_items_of_people_may_be_long(tmp_path):
    long = ITEM | {"question": "so " * 500 + ASK}
    assert I.item_fault(*long.values()) == f"{len(long['question'].split())} words"
    assert I.check_items([long | {"behavior": "kindness"}], "mine") == [long]
    assert I.read_items(put(tmp_path, "long.json", [long])) == [long]
    assert "mine, item 2: answer_matching_behavior is missing" in refused(
        I.check_items, [long, {"question": ASK}], "mine"
    )


def test_a_training_question_of_the_test_is_counted(tmp_path):
    more = [ITEM | {"question": ASK.replace("friends", other)} for other in ("pals", "mates")]
    put(tmp_path, "caa/generate/kindness/generate_dataset.json", [ITEM, *more])
    put(tmp_path, "caa/test/kindness/test_dataset_ab.json", [ITEM | {"question": ASK.upper()}])
    assert "there is no behaviour 'anger'" in refused(I.caa_items, tmp_path / "caa", "anger")
    table = I.caa_items(tmp_path / "caa", "kindness")
    assert list(table) == ["behavior", "split", *I.FIELDS]
    assert table.split.tolist() == ["full", "full", "test"]
    items, report = I.real_steering_items(tmp_path, n_seed=1, behavior="kindness")
    assert items.split.tolist() == ["seed", "full", "full", "test"]
    assert report.to_dict("records") == [
        dict(source="caa/kindness, training", items=3, left_out=1, reasons="1 in the test"),
        dict(source="caa/kindness, test", items=1, left_out=0, reasons=""),
    ]


def test_nothing_to_train_on_is_told_from_nothing_to_test_on(tmp_path):
    put(tmp_path, "reward_bench/filtered.jsonl", [dict(prompt="a", chosen="b", rejected="c", subset="d")])
    assert "no HH-RLHF pairs" in refused(I.published_pairs, tmp_path, 0)
    pair = dict(chosen=transcript("Tea?", "Yes."), rejected=transcript("Tea?", "No."))
    put(tmp_path, "hh_rlhf/harmless-base_test.jsonl.gz", [pair])
    assert list(I.published_pairs(tmp_path, 0)) == ["hh-rlhf/harmless-base/test", "reward_bench"]
    (tmp_path / "reward_bench/filtered.jsonl").unlink()
    assert "nothing to test on" in refused(I.published_pairs, tmp_path, 0)


@pytest.mark.parametrize("read", (I.real_reward_items, I.real_steering_items, I.real_instruction_items))
def test_items_are_read_from_files_only(read, monkeypatch):
    monkeypatch.delenv("FAC_DATA_DIR", raising=False)
    with pytest.raises(NotThere, match="set data_dir or FAC_DATA_DIR to the folder that holds"):
        read()
