"""Tuning, answering and the cells of the table, on a two-layer model."""

import copy

import pandas as pd
import pytest
import torch
from stage_cells import run_cells

from fac_synthesis.data.tasks import message_fault
from fac_synthesis.models.backbone import Backbone, tiny_model, train_language_model, word_tokenizer
from fac_synthesis.models.language_models import LocalModel, Sampling, prompt_ids
from fac_synthesis.run.artifacts import digest_of, remember_digest
from fac_synthesis.run.parameters import LeftOut, UserError
from fac_synthesis.synthesis.fine_tuning import LoRA, LoRASettings
from fac_synthesis.tasks.instructions import (
    INSTRUCTION_PARAMETERS,
    InstructionBench,
    InstructionSet,
    Referee,
    answer_cell,
    floor_cells,
    instruction_items,
    instruction_scores,
    instruction_set,
    instruction_sets,
    instruction_summary,
    judged_cell,
    long_rows,
    open_judge,
    prompt_completion,
    reference_answers,
    sft_rows,
    sft_trainer,
    stored_annotations,
    train_sft,
    write_answers,
)
from fac_synthesis.tasks.win_rates import LLMJudge, RubricJudge, fit_length_model

torch.set_num_threads(1)
WORDS = "bread piano garden stamp lock wall".split()
ASK, SAY = "write a message about : {} .", "tell me about the {} ."
FAST = LoRASettings(dropout=0.0, learning_rate=1e-2, epochs=25, batch=6, micro_batch=6, dtype="float32")
SHORT = LoRASettings(dropout=0.0, learning_rate=1e-2, epochs=1, batch=4, micro_batch=4, dtype="float32")
GREEDY = Sampling(max_new_tokens=10, temperature=0.0)
ROWS = InstructionSet("Ours", [ASK.format(w) for w in WORDS], [SAY.format(w) for w in WORDS], 6)


def tokenizer(chat=True):
    made = word_tokenizer(ROWS.instructions + ROWS.responses + ["what is a ? i know the , hello there lamp"])
    if not chat:
        made.chat_template = None
    return made


@pytest.fixture(scope="module")
def backbone():
    "Names things when asked what they are; has never written a message."
    torch.manual_seed(0)
    words = tokenizer()
    made = Backbone(tiny_model("llama", len(words), 64, 2), words, layer=1)
    torch.nn.init.normal_(made.model.get_input_embeddings().weight, 0, 0.1)
    chats = []
    for word in WORDS:
        user = dict(role="user", content=f"what is a {word} ?")
        chats.append([user, dict(role="assistant", content=f"i know the {word} .")])
    train_language_model(made.model, words, chats, steps=120, batch=12, learning_rate=3e-3, seed=0)
    remember_digest(made, "as one that an earlier stage left")
    return made


@pytest.fixture(scope="module")
def plain(backbone):
    return Backbone(copy.deepcopy(backbone.model), tokenizer(chat=False), layer=1)


def answers(model, words):
    return write_answers(LocalModel(model, words, 16), ROWS.instructions, GREEDY)


def n_right(found):
    "How many answers are the response, word for word."
    return sum(a == r for a, r in zip(found, ROWS.responses))


# ---- data


@pytest.fixture
def items():
    splits = {"seed": WORDS[:2], "full": WORDS, "test": WORDS}
    rows = [(split, word) for split, some in splits.items() for word in some]
    return pd.DataFrame([dict(split=s, instruction=ASK.format(w), response=SAY.format(w)) for s, w in rows])


@pytest.fixture
def samples():
    rows = []
    for method, n in (("two-step", 3), ("Magpie", 2)):
        for latent in range(n):
            for rank in range(2):
                pair = dict(instruction=f"{method} {latent} {rank}", response=SAY.format("lamp"))
                rows.append(dict(method=method, latent=latent, rank=rank, **pair))
    return pd.DataFrame(rows)


def test_rows_share_the_seed_items_and_the_budget(items, samples):
    sets, absent = instruction_sets(["Baseline", "Full Dataset", "Magpie", "Ours", "SAO"], items, samples, 3)
    assert {m: (len(s.instructions), s.n_samples) for m, s in sets.items()} == {
        "Baseline": (2, 0),
        "Full Dataset": (6, 4),
        "Magpie": (5, 3),
        "Ours": (5, 3),
    }
    own = sets["Magpie"].instructions[2:]
    assert own == ["Magpie 0 0", "Magpie 1 0", "Magpie 0 1"], "best of every feature first"
    assert all(sets[m].instructions[:2] == sets["Baseline"].instructions for m in ("Magpie", "Ours"))
    assert list(absent) == ["SAO"] and "no samples of 'SAO'" in absent["SAO"]


def test_unusable_rows_are_refused(items, samples, refused):
    assert "Alpaca" in refused(lambda: instruction_set("Alpaca", items, samples, 3))
    assert "row 2: response is empty" in refused(lambda: InstructionSet("Ours", ["a", "b"], ["c", " "]))
    assert "1 instructions but 0 responses" in refused(lambda: InstructionSet("Ours", ["a"], []))
    assert "no instruction" in refused(lambda: InstructionSet("Ours", [], []))
    assert "'response'" in refused(lambda: instruction_items(items.drop(columns="response"), "seed"))
    assert "full, seed, test" in refused(lambda: instruction_items(items, "train"))


# ---- from a row to tokens


def test_the_prompt_carries_no_loss_and_is_the_one_it_answers(backbone, plain, tmp_path):
    for b in (backbone, plain):
        rows = sft_trainer(b, ROWS, SHORT, 42, 64, str(tmp_path)).train_dataset
        for row, instruction, response in zip(rows, ROWS.instructions, ROWS.responses):
            prompt = prompt_ids(b.tokenizer, [dict(role="user", content=instruction)])
            n, ids = len(prompt), row["input_ids"]
            assert ids[:n] == prompt and row["labels"] == [-100] * n + ids[n:]
            learned = b.tokenizer.decode(ids[n:]).replace(" ", "")
            assert learned == (response + "<end>").replace(" ", ""), "the response and the token that ends it"


def test_loss_is_the_mean_over_response_tokens(backbone, tmp_path):
    trainer = sft_trainer(backbone, ROWS, SHORT, 42, 64, str(tmp_path))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        logits = backbone.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total = count = 0
    for row in range(3):
        for t in range(1, batch["input_ids"].shape[1]):
            if batch["labels"][row, t] != -100:
                total -= logits[row, t - 1].log_softmax(-1)[batch["input_ids"][row, t]].item()
                count += 1
    assert loss == pytest.approx(total / count, abs=1e-4)


def test_long_rows_are_cut_or_left_out_aloud(backbone, tmp_path, capsys, refused):
    rows = InstructionSet(
        "Ours",
        [ASK.format("bread"), ASK.format(" , ".join(WORDS * 4)), "what is a lock ?"],
        [SAY.format("bread"), "yes", SAY.format(" ".join(WORDS * 4))],
    )
    fates = long_rows(backbone.tokenizer, rows, 30)[["row", "fate"]].values.tolist()
    assert fates == [[1, "left out"], [2, "cut"]]
    trained = sft_trainer(backbone, rows, SHORT, 42, 30, str(tmp_path)).train_dataset
    assert [len(r["input_ids"]) for r in trained] == [18, 30]
    assert "of 3 rows 1 are cut to 30 tokens and 1 are left out" in capsys.readouterr().out
    sft_rows(backbone.tokenizer, ROWS, 64)
    assert not capsys.readouterr().out
    assert "raise it" in refused(lambda: sft_rows(backbone.tokenizer, rows, 5))


def test_a_tokenizer_without_any_end_is_refused(refused):
    words = tokenizer(chat=False)
    words.eos_token = None
    said = refused(lambda: prompt_completion(words, "a", "b"))
    assert "neither chat template nor end-of-text token" in said


# ---- training


def test_tuning_teaches_to_copy_and_leaves_the_backbone(backbone):
    before, old = answers(backbone.model, backbone.tokenizer), copy.deepcopy(backbone.model.state_dict())
    model = train_sft(backbone, ROWS, FAST, 42, 64)
    assert n_right(before) == 0 and n_right(answers(model, backbone.tokenizer)) >= 5
    assert all(torch.equal(v, old[k]) for k, v in backbone.model.state_dict().items())
    assert model.state_dict().keys() == old.keys() and "forward" not in vars(model), "an ordinary model"


def test_tuning_works_without_a_chat_template(plain):
    model = train_sft(plain, ROWS, FAST, 42, 64)
    assert n_right(answers(model, plain.tokenizer)) >= 5


def test_same_seed_same_weights(backbone):
    a, b, c = (list(train_sft(backbone, ROWS, SHORT, s, 64).named_parameters()) for s in (42, 42, 43))
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(a, b))
    assert not all(torch.equal(x, y) for (_, x), (_, y) in zip(a, c))
    for (name, x), y in zip(a, backbone.model.parameters()):
        moved = not torch.equal(x, y)
        assert moved == ("_proj" in name), "all seven linear maps of every block, and nothing else"


def test_micro_batches_and_checkpointing_do_not_matter(backbone):
    general = dict(dropout=0.0, learning_rate=1e-3, epochs=1, batch=6, dtype="float32")
    in_whole = LoRASettings(**general, micro_batch=6)
    in_parts = LoRASettings(**general, micro_batch=2, gradient_checkpointing=True)
    whole, parts = (train_sft(backbone, ROWS, settings, 42, 64) for settings in (in_whole, in_parts))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(whole.parameters(), parts.parameters()))
    assert answers(parts, backbone.tokenizer) == answers(whole, backbone.tokenizer)


def test_references(backbone, refused):
    test = pd.DataFrame(dict(instruction=ROWS.instructions, response=ROWS.responses))
    assert reference_answers("responses", test, backbone, GREEDY) == ROWS.responses
    own = reference_answers("backbone", test, backbone, GREEDY)
    assert own == answers(backbone.model, backbone.tokenizer)
    assert "responses or backbone" in refused(lambda: reference_answers("gpt", test, backbone, GREEDY))


# ---- the judge of a run


def test_open_judge(backbone, refused):
    planted = open_judge("planted rubric")
    instruction = ["be a pirate : what about the mural ?"]
    assert planted.preferences(instruction, ["ahoy , i see a mural ."], ["i see a mural ."]) == [1]
    test = pd.DataFrame(dict(instruction=["say hello"], response=["hello to you"]))
    overlap = open_judge("reference overlap", test=test)
    assert overlap.preferences(["say hello"], ["hello you"], ["good bye"]) == [1.0]
    assert isinstance(open_judge("local", backbone), LLMJudge)
    assert "cannot tell 1 from 2" in refused(lambda: open_judge("weighted:local", backbone))
    assert "no local model" in refused(lambda: open_judge("weighted:http://localhost:1/v1#judge"))
    refused(lambda: open_judge("local"))
    refused(lambda: open_judge("stored:no/such/file.json"))


# ---- a cell


def words_asked_for(instruction, answer):
    "A rubric: how many of the words that are asked for the answer has, half of it for an improper message."
    found = set(instruction.partition(":")[2].split()) & set(answer.split())
    return len(found) * (0.5 if message_fault(answer) else 1)


@pytest.fixture
def bench(backbone):
    return InstructionBench(backbone, ROWS.instructions, 64, GREEDY, 64)


def test_cells_and_tables(bench):
    referee = Referee(RubricJudge(words_asked_for), ROWS.instructions, ROWS.responses)
    parts = []
    for method, n in (("Baseline", 2), ("Ours", 6)):
        rows = InstructionSet(method, ROWS.instructions[:n], ROWS.responses[:n], n - 2)
        parts += [judged_cell(referee, answer_cell(bench, rows, LoRA(SHORT), seed)) for seed in (42, 43)]
    cells = pd.concat(parts, ignore_index=True)
    by_cell = cells.groupby("generator", sort=False)
    assert by_cell.size().tolist() == [6] * 4 and cells.generator[0] == "Baseline, LoRA, 42"
    assert cells.length.tolist() == cells.output.str.len().tolist()
    scores = instruction_scores(cells)
    assert scores.columns.tolist() == [
        "method",
        "training",
        "seed",
        "wr",
        "lc",
        "se",
        "n_samples",
        "unreadable",
        "mean_length",
    ]
    assert scores.method.tolist() == ["Baseline"] * 2 + ["Ours"] * 2
    assert scores.seed.tolist() == [42, 43] * 2 and scores.n_samples.tolist() == [0, 0, 4, 4]
    assert scores.wr.tolist() == pytest.approx((100 * by_cell.preference.mean()).tolist())
    floors = pd.concat([judged_cell(referee, cell) for cell in floor_cells(bench)], ignore_index=True)
    floor = instruction_scores(floors, fit_length_model(cells))
    assert floor.method.tolist() == ["untuned backbone", "echo"]
    assert floor.wr[1] == 0, "giving the request back wins nothing"
    table = instruction_summary(scores)
    assert table.method.tolist() == ["Baseline", "Ours"] and table.seeds.tolist() == [2, 2]
    assert table.wr_mean[0] == pytest.approx(scores.wr[:2].mean())


def test_a_judge_that_cannot_be_read_is_named(bench, scripted):
    judge = LLMJudge(scripted(lambda prompt, j: "hm"))
    referee = Referee(judge, ROWS.instructions, ROWS.responses)
    with pytest.raises(UserError, match="is readable|no preference"):
        instruction_scores(judged_cell(referee, floor_cells(bench)[0]))


def test_what_an_answer_depends_on(bench, backbone):
    "The judge and the head's settings are not among it; another length, sampling or test is."
    others = [
        InstructionBench(backbone, ROWS.instructions, 65, GREEDY, 64),
        InstructionBench(backbone, ROWS.instructions, 64, Sampling(max_new_tokens=11, temperature=0.0), 64),
        InstructionBench(backbone, ROWS.instructions[:5], 64, GREEDY, 64),
    ]
    assert len({digest_of(b) for b in [bench, *others]}) == 4
    assert digest_of(bench) == digest_of(InstructionBench(backbone, ROWS.instructions, 64, GREEDY, 64))


# ---- the run cells


@pytest.fixture
def run_instructions(items, samples, backbone, tmp_path, monkeypatch):
    "The notebook's run cells; results of an earlier call are found again."
    monkeypatch.setenv("FAC_RESULTS_DIR", str(tmp_path))

    def execute(tasks=("instruction",), **given):
        stand_ins = dict(
            read_source=lambda run: "planted",
            read_task_names=lambda run: list(tasks),
            read_task_items=lambda run, task: items,
            read_samples=lambda run, task: samples,
            read_base=lambda run: backbone,
            start=lambda stage, namespace: namespace["run"],
        )
        small = dict(methods=["Baseline", "SAO", "Ours"], seeds=[42], judge="reference overlap")
        small |= dict(lora_epochs=1, max_length=64, max_new_tokens=10)
        return run_cells("43_instruction_following", stand_ins, **{**small, **given})

    return execute


def stored(run, name):
    "The folders of the artifacts of this name."
    return set((run.folder / "artifacts" / "43_instruction_following").glob(f"{name}-*"))


def test_the_run_cells_leave_the_table_and_another_reference_trains_nothing(run_instructions):
    run = run_instructions()
    table = pd.read_csv(run.folder / "tables" / "instruction_scores.csv")
    assert list(table) == [
        "method",
        "lc_mean",
        "lc_sd",
        "wr_mean",
        "wr_sd",
        "se_mean",
        "seeds",
        "n_samples",
        "unreadable",
        "note",
    ]
    assert table.method.tolist() == ["Baseline", "Ours", "SAO"] and "no samples of 'SAO'" in table.note[2]
    assert (run.folder / "figures" / "instruction_scores.png").exists()
    assert {"all_judged", "scores", "floor"} <= set(run.outputs)
    caption = (run.folder / "tables" / "instruction_scores.md").read_text()
    assert "Untuned: WR 50.0, LC 50.0." in caption, "the references are its own answers"
    before = stored(run, "answers"), stored(run, "judged")
    again = run_instructions(reference="responses")
    assert stored(again, "answers") == before[0] and len(stored(again, "judged") - before[1]) == 4


def test_a_run_without_instructions_is_left_out(run_instructions):
    with pytest.raises(LeftOut, match="no instruction items"):
        run_instructions(tasks=["toxicity"])


class Reading:
    "Just enough of a run on published data."

    def __init__(self, source):
        self.source, self.read = source, []

    def setting(self, stage, name):
        return self.source

    def reads(self, path):
        self.read.append(path)
        return path


def test_annotations_are_read_where_the_run_reads_published_data(tmp_path):
    planted, published = Reading("planted"), Reading("published")
    assert stored_annotations(planted, str(tmp_path)) == (None, None)
    assert stored_annotations(published, str(tmp_path)) == (None, None), "there are none in this folder"
    assert published.read == [] and "data_dir" in INSTRUCTION_PARAMETERS
