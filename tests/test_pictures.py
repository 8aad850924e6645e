"""The pictures: attention comes from the rows and columns it should, sheets have a cell for each sample, and
curves are drawn where they can be."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import N, draw
from PIL import Image

import pictures


def asked(template, image_processor, colour="red"):
    messages = [{"role": "user", "content": "<image>\nWhat object is shown?"}]
    return {
        "input_ids": template.encode_prompt(messages, N),
        "pixel_values": image_processor(draw(colour)),
    }


# -- attention ---------------------------------------------------------------------------------------------


def test_attention_is_that_of_the_position_before_each_token_to_the_image(tiny):
    model, template, image_processor = tiny()
    prompt = asked(template, image_processor)
    answer = template.tokenizer("a cat .", add_special_tokens=False)["input_ids"]
    words, maps, layer = pictures.attention_to_image(
        model, template, prompt, answer + [template.end_token_id], layer=2
    )
    assert words == ["a", "cat"] and maps.shape == (2, 2, 2) and layer == 2
    assert model.llm.config._attn_implementation == "sdpa"  # as it was

    # The same by a route of its own: whole model, one head after the other, tokens by their own texts.
    ids = prompt["input_ids"] + answer
    model.llm.set_attn_implementation("eager")
    with torch.no_grad():
        embeds = model.embed(torch.tensor([ids]), prompt["pixel_values"][None])
        weights = model.llm(inputs_embeds=embeds, output_attentions=True).attentions[1][0]  # (heads, T, T)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(weights.shape[:2]))
    assert weights.triu(1).abs().max() == 0  # nobody looks ahead
    first = ids.index(template.image_token_id)
    assert ids[first : first + N] == [template.image_token_id] * N
    pieces = [template.tokenizer.decode(answer[: t + 1]).split() for t in range(len(answer))]
    cat = [t for t, said in enumerate(pieces) if len(said) == 2 and t >= 1]
    for i, tokens in enumerate([[0], cat]):
        rows = [len(prompt["input_ids"]) + t - 1 for t in tokens]
        mean = weights[:, rows, first : first + N].mean(dim=(0, 1))
        torch.testing.assert_close(maps[i].flatten(), mean)
    assert (maps.sum(dim=(1, 2)) < 1).all()


def test_the_layer_that_differs_most_from_word_to_word_is_chosen(tiny, monkeypatch):
    model, template, image_processor = tiny()
    prompt = asked(template, image_processor)
    answer = template.tokenizer("a cat", add_special_tokens=False)["input_ids"]
    length, first = len(prompt["input_ids"] + answer), prompt["input_ids"].index(template.image_token_id)
    sink = torch.zeros(1, 4, length, length)
    sink[..., first] = 0.9  # much, but always the same patch
    looks = torch.zeros(1, 4, length, length)
    looks[..., ::2, first] = looks[..., 1::2, first + 1] = 0.2  # little, but now here, now there
    decoder = SimpleNamespace(attentions=(sink, looks, sink))
    monkeypatch.setattr(model.llm, "get_decoder", lambda: lambda **_: decoder)
    assert pictures.attention_to_image(model, template, prompt, answer)[2] == 2
    assert pictures.attention_to_image(model, template, prompt, answer, layer=3)[2] == 3
    with pytest.raises(pictures.UserError, match="1 to 3"):
        pictures.attention_to_image(model, template, prompt, answer, layer=4)


def test_the_picture_under_the_heat_is_what_the_model_was_shown(image_processor):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste(Image.new("RGB", (30, 30), (10, 200, 90)), (30, 0))  # the centre, all that the crop leaves
    shown = pictures.shown_image(image_processor(wide), image_processor)
    assert shown.size == (28, 28) and shown.getpixel((14, 14)) == (10, 200, 90)
    hot = pictures.heat(shown, torch.tensor([[0.0, 0.1], [0.0, 0.0]]))
    light = {place: sum(hot.getpixel(place)) for place in ((120, 120), (360, 120), (120, 360), (360, 360))}
    assert max(light, key=light.get) == (360, 120)  # x, y: the second patch is to the right, not below


# -- sheets ------------------------------------------------------------------------------------------------


def test_a_sheet_has_a_cell_for_each_sample_and_marks_that_need_no_colour(tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(pictures, "draw_mark", lambda draw, mark, *_: marks.append(mark))
    samples = [(draw("red"), "What?", "It is red.", "It is red.", True)] * 3
    samples += [(draw("blue"), "What? " * 50, "", "x" * 500, False), (draw("white"), "?", "a", "b", None)]
    pictures.contact_sheet(tmp_path / "sheet.png", "five", samples)
    assert [mark for mark in marks if mark] == ["right"] * 3 + ["wrong"]
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.width == 1080
    colours = {colour: count for count, colour in sheet.getcolors(1 << 24)}
    area = 336 * 252  # a picture of 4:3 in a cell
    assert colours[(220, 30, 30)] > 2.4 * area * 0.8 and colours[(30, 60, 220)] > 0.8 * area * 0.8


def test_lines_are_no_wider_than_their_cell():
    font = pictures.ImageFont.load_default(28)
    lines = pictures.wrap("a short line and averyveryverylongwordthatfitsnowhere " * 9, font, 200)
    assert len(lines) == 8 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert pictures.wrap("", font, 200) == [""]
    assert pictures.spread(list(range(10)), 4) == [0, 2, 5, 7] and pictures.spread([1], 12) == [1]


def test_the_sanity_check_draws_a_sheet_and_attention(script, flags, tmp_path, capsys):
    script("stage1_align", *flags(1, max_steps=0))
    script("sanity_check", "--sheet", "sheet.png", "--count", 3, "--max-new-tokens", 4)
    assert "with 3 held-out samples" in capsys.readouterr().out
    draw("green").save(tmp_path / "mine.png")
    own = ("--image", "mine.png", "--question", "What object is shown?", "--layer", 1)
    for words in (("--sample", 1), own):
        script("sanity_check", "--attention", "attention.png", "--max-new-tokens", 6, *words)
        assert Image.open(tmp_path / "attention.png").width == 1080
    for wrong, named in (
        (("--sheet", tmp_path), str(tmp_path)),  # not replaced by a picture
        (("--attention", "nowhere/a.png"), "nowhere"),
        (("--sheet", "a.png", "--image", "mine.png"), "--image"),
        (("--hf", "somewhere", "--eval"), "--run"),
        (("--hf", "somewhere"), "--chat"),
    ):
        with pytest.raises(SystemExit) as error:
            script("sanity_check", *wrong)
        assert named in error.value.code and "\n" not in error.value.code
    assert (tmp_path / "mine.png").exists()


# -- curves ------------------------------------------------------------------------------------------------


def write_metrics(run, *stages):
    for stage in stages:
        (run / f"stage{stage}").mkdir(parents=True)
        held = {"heldout_loss": 1.0, "heldout_loss_shuffled": 2.0, "heldout_image_match": 0.9}
        lines = [{"step": 0, **held}, {"step": 1, "loss": 3.0}, {"step": 1, **held}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / f"stage{stage}" / "metrics.jsonl").write_text(text)


def test_curves_of_both_stages_are_drawn_without_a_window(tmp_path):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "run", 1)
    pictures.draw_curves(tmp_path / "run")
    width = Image.open(tmp_path / "run" / "curves.png").width
    write_metrics(tmp_path / "run", 2)
    assert str(tmp_path / "run" / "curves.png") in pictures.draw_curves(tmp_path / "run")
    assert Image.open(tmp_path / "run" / "curves.png").width == 2 * width
    assert "matplotlib.pyplot" not in sys.modules
    (tmp_path / "run" / "stage1" / "metrics.jsonl").write_text('{"step": ')
    assert pictures.draw_curves(tmp_path / "run").startswith("no ")  # a sentence, and no traceback


def test_without_matplotlib_training_ends_as_well_and_says_what_to_install(
    script, flags, tmp_path, monkeypatch, capsys
):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    script("stage1_align", *flags(1, max_steps=1))
    out = capsys.readouterr().out
    assert out.count("pip install matplotlib") == 1
    assert (tmp_path / "runs" / "toy" / "stage1" / "run.json").exists()
    assert not (tmp_path / "runs" / "toy" / "curves.png").exists()


def test_tensorboard_gets_the_metrics_or_is_refused_at_once(script, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as error:
        script("stage1_align", *flags(1, max_steps=1, llm="nobody/nothing"), "--tensorboard")
    assert "pip install tensorboard" in error.value.code

    class Writer:
        written = []

        def __init__(self, folder, purge_step):
            self.written.append((str(folder), purge_step))

        def add_scalar(self, *values):
            self.written.append(values)

        def close(self):
            self.written.append("closed")

    monkeypatch.setattr("runs.summary_writer", lambda: Writer)
    script("stage1_align", *flags(1, max_steps=1), "--tensorboard")
    lines = (tmp_path / "runs" / "toy" / "stage1" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        name = "loss" if "loss" in line else "heldout_loss"
        assert (name, line[name], line["step"]) in Writer.written
    assert Writer.written[-1] == "closed"
