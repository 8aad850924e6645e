"""tools.evaluate: which numbers it writes, and on which data it leaves some of them out."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import toy_table
from support import evaluation
from support.errors import UserError
from support.evaluation import make_heldout_batches, measure_heldout, records_with_other_images
from support.metrics_log import format_metrics
from support.records import image_name
from tools.evaluate import (Question, f1, is_toy_caption, most_frequent_shares, score_answers, score_captions,
                            score_yes_no)

TOY = ["--device", "cpu", "--heldout", 6, "--limit", 8, "--max-steps", 0]  # no good model is needed
LOSSES = ("loss", "loss_different", "loss_blank", "correct_more_likely")
F1 = {"objects_f1", "caption_f1", "objects_f1_different", "caption_f1_different"}
EXACT = {"qa_exact", "qa_exact_different", "qa_exact_by_kind", "qa_exact_different_by_kind",
         "most_frequent_by_kind"}
YES_NO = {"yes_no", "yes_no_different"}
CAPTIONS, ANSWERS = ({f"{name}_{loss}" for loss in LOSSES} for name in ("captions", "answers"))


def evaluate_run(script, run, *words):
    script("tools.evaluate", "--run", run, "--device", "cpu", "--max-new-tokens", 4, *words)
    stage = 2 if (run / "stage2").exists() and "--stage" not in words else 1
    return json.loads((run / f"stage{stage}" / "eval.json").read_text())


def train(script, flags, run, stages=(1, 2), data={}, **changes):
    """Runs the stages with the tiny models, without a step. `data` maps a stage to another JSON file."""
    for stage in stages:
        paths = {"data": data[stage], "heldout_data": data[stage]} if stage in data else {}
        script({1: "stage1_align", 2: "stage2_instruct"}[stage],
               *flags(stage, max_steps=0, run=run, **paths, **changes))
    return run


# -- the toy -----------------------------------------------------------------------------------------------


def test_the_toy_gets_exactly_these_keys_and_each_stage_has_its_own_file(script, tmp_path, capsys):
    run = tmp_path / "run"
    script("stage1_align", *TOY, "--run", run)
    alone = evaluate_run(script, run)
    assert alone.keys() == {"stage", "counts"} | CAPTIONS | F1
    assert alone["stage"] == 1 and alone["counts"] == {"captions": 6}
    out = capsys.readouterr().out
    assert f"{alone['captions_correct_more_likely']:.1%}" in out
    assert "captions: F1 of color and shape" in out and f"wrote {run / 'stage1' / 'eval.json'}" in out

    script("stage2_instruct", *TOY, "--run", run)
    second = evaluate_run(script, run)
    assert second.keys() == {"stage", "counts"} | CAPTIONS | F1 | ANSWERS | EXACT | YES_NO
    assert set(toy_table.COLUMNS.values()) <= second.keys()
    by_kind = second["counts"]["answers_by_kind"]
    assert sum(by_kind.values()) == second["counts"]["answers"] > 6
    for key in ("qa_exact_by_kind", "qa_exact_different_by_kind"):
        assert second[key].keys() == by_kind.keys()

    first = evaluate_run(script, run, "--stage", 1)  # how much of stage 2's questions stage 1 can answer
    assert first.keys() == second.keys() and (first["stage"], second["stage"]) == (1, 2)
    assert first["counts"] == second["counts"]
    assert json.loads((run / "stage2" / "eval.json").read_text()) == second


def test_correct_captions_score_1_and_those_of_different_images_less():
    references = ["a red circle at the top left and a blue star at the middle left .",
                  "a green heart at the top left and a blue star at the bottom left ."]
    scores = score_captions(references, references)
    assert scores["objects_f1"] == scores["caption_f1"] == 1
    assert scores["objects_f1_different"] == 0.5 and scores["caption_f1_different"] == 0
    assert f1([set()], [{"circle"}]) == 0 and f1([set()], [set()]) == 0


def dataset_of(names):
    """Returns a dataset with one record for each letter. The pixels of an image are its letter's code, and so
    is the token of its answer."""
    class Dataset(list):
        records = [{"image": name} for name in names]
        template = SimpleNamespace(pad_token_id=0)

    return Dataset({"input_ids": [0, ord(name)], "labels": [0, ord(name)],
                    "pixel_values": torch.full((3, 1, 1), ord(name))} for name in names)


def test_a_different_image_is_never_the_same_one():
    class Records(list):
        path = "records.json"

    def names(images, i, count=1):
        records = Records({"image": image} for image in images)
        return [image_name(record) for record in records_with_other_images(records, i, count)]

    images = ["a", "a", None, "b", "c", "a"]
    assert names(images, 0, count=9) == ["b", "c"] and names(images, 4) == ["a"] and names(images, 3) == ["c"]
    with pytest.raises(UserError, match="records.json: all held-out records have the same image"):
        names(["a", None, "a"], 0)


@pytest.mark.parametrize("names, left_out", [("aaaaaaab", 6), ("aaab", 2), ("abcd", 0)])
def test_a_record_whose_different_image_would_be_the_same_is_left_out_and_counted(
        names, left_out, monkeypatch):
    """The model is perfect: its loss is 0 with the correct image and 1 with every other."""
    def losses(model, batch):
        return (batch["pixel_values"][:, 0, 0, 0] != batch["labels"][:, 1]).double()

    monkeypatch.setattr(evaluation, "record_losses", losses)
    for batch_size in (1, 3, 8):  # which changes no number
        batches = make_heldout_batches(dataset_of(names), batch_size)
        measured = measure_heldout(torch.nn.Linear(1, 1), batches)
        assert (measured["loss"], measured["loss_different"], measured["correct_more_likely"]) == (0, 1, 1)
        assert measured.get("same_image", 0) == left_out
        assert (f"without a different image: {left_out}" in format_metrics(measured)) == (left_out > 0)


# -- other data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("a red circle at the top left and a blue star at the middle left .", True),
    ("a red circle at the top left, a blue star at the middle left and a green cross at the bottom left .",
     True),
    ("a red circle at the top left .", False),
    ("the photo shows a red circle at the top left and a blue star at the middle left .", False),
    ("a man on a horse .", False)])
def test_only_what_the_toy_grammar_writes_is_a_toy_caption(text, expected):
    assert is_toy_caption(text) == expected


def test_other_captions_get_no_f1_and_fewer_held_out_records_can_be_evaluated(
        script, flags, drawn, tmp_path, capsys):
    run = train(script, flags, tmp_path / "run", stages=[1], data={1: drawn / "chat.json"}, heldout=4)
    for asked, evaluated in ((2, 2), (9, 4)):  # never more than the stage has held out
        result = evaluate_run(script, run, "--heldout", asked, "--count", 9)
        assert result.keys() == {"stage", "counts"} | CAPTIONS
        assert result["counts"]["captions"] == evaluated
    assert "F1" not in capsys.readouterr().out


def test_answers_without_kinds_are_printed_but_not_scored(script, flags, drawn, tmp_path, capsys):
    records = json.loads((drawn / "instruct.json").read_text())
    for record in records:
        del record["kinds"]
    (tmp_path / "free.json").write_text(json.dumps(records))
    run = train(script, flags, tmp_path / "run", data={2: tmp_path / "free.json"})
    capsys.readouterr()
    result = evaluate_run(script, run, "--count", 3)
    assert not EXACT & result.keys() and result["counts"] == {"answers": 3, "captions": 3}
    assert "3 of the generated answers, for example" in capsys.readouterr().out


def test_stage_2_without_the_images_of_stage_1_leaves_the_captions_out_and_says_so(
        script, flags, drawn, tmp_path, capsys):
    run = train(script, flags, tmp_path / "run", stages=[1], images=drawn / "images", heldout_images="",
                heldout_data="")
    saved = json.loads((run / "stage1" / "run.json").read_text())
    saved["settings"]["images"] = "gone.zip"
    (run / "stage1" / "run.json").write_text(json.dumps(saved))
    train(script, flags, run, stages=[2])
    capsys.readouterr()
    result = evaluate_run(script, run)
    assert not CAPTIONS & result.keys() and ANSWERS | EXACT <= result.keys()
    out = capsys.readouterr().out
    assert "The captions are left out" in out and "gone.zip does not exist" in out


def test_other_records_are_evaluated_and_yes_or_no_is_scored_as_pope_does(
        script, flags, drawn, tmp_path, capsys):
    run, records = train(script, flags, tmp_path / "run", stages=[1]), []
    for i, color in enumerate(("red", "green", "blue")):  # in POPE's form, with the images of the test
        turns = [{"from": "human", "value": f"<image>\nIs there a {color} thing in the image?"},
                 {"from": "gpt", "value": ["Yes", "No"][i % 2]}]
        records.append({"id": str(i), "image": f"{color}.png", "conversations": turns})
    (tmp_path / "pope.json").write_text(json.dumps(records))
    script("tools.evaluate", "--run", run, "--data", tmp_path / "pope.json", "--images", drawn / "images")
    result = json.loads((run / "stage1" / "eval_pope.json").read_text())
    assert result.keys() == {"stage", "counts"} | ANSWERS | YES_NO
    assert result["counts"] == {"answers": 3, "yes_no": 3}
    assert "answers to 3 yes/no questions" in capsys.readouterr().out
    assert not (run / "stage1" / "eval.json").exists()


def test_yes_and_no_are_counted_as_in_popes_own_script():
    references = ["Yes", "No", "Yes", "No"]
    assert score_yes_no(references, ["Yes, there is.", "Yes", "yes", "It is. No"]) == {
        "accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes": 1}
    assert score_yes_no(references, ["No.", "No", "There is not one", "no, none"]) == {
        "accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes": 0}


def test_a_stage_that_is_not_finished_is_refused(refusal, script, flags, tmp_path):
    assert "python stage1_align.py --run none" in refusal("tools.evaluate", "--run", "none")
    train(script, flags, tmp_path / "run", stages=[1])
    assert "stage2_instruct.py" in refusal("tools.evaluate", "--run", "run", "--stage", 2)


def test_a_habit_shows_as_the_share_of_the_most_frequent_answer():
    references = {"yes_no": ["Yes.", "No.", "No.", "Yes.", "No."], "count": ["two", "two", "three"]}
    questions = [Question(0, 0, "", reference, kind) for kind in references for reference in references[kind]]
    answers = ["Yes."] * 5 + ["one", "two", "three"]
    assert most_frequent_shares(questions, answers) == {"count": [1 / 3, 2 / 3], "yes_no": [1.0, 0.6]}
    always = score_answers(questions, ["No."] * 5 + ["two"] * 3)["qa_exact_by_kind"]
    assert always == {"count": 2 / 3, "yes_no": 0.6}


def test_codes_that_change_the_terminal_are_escaped_when_printed(script, flags, drawn, tmp_path, capsys):
    records = json.loads((drawn / "chat.json").read_text())
    for record in records:
        record["conversations"][0]["value"] += " \x1b[2J"
        record["conversations"][1]["value"] += " \u202e"
    (tmp_path / "codes.json").write_text(json.dumps(records))
    run = train(script, flags, tmp_path / "run", stages=[1], data={1: tmp_path / "codes.json"})
    evaluate_run(script, run)
    script("sanity_check", "--run", run)
    out = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(out) and out.count(r"\u202e") > 3 and r"\x1b[2J" in out
