"""tools.pictures: attention is read at the right positions, and sheets, panels and curves show it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import COLORS, N, draw
from PIL import Image

from data import ChatDataset
from support.errors import UserError
from support.records import open_records
from tools import pictures


@pytest.fixture
def prompt(template, image_processor):
    messages = [{"role": "user", "content": "<image>\nWhat object is shown?"}]
    pixel_values = image_processor(draw("red"), return_tensors="pt")["pixel_values"][0]
    return {"input_ids": template.encode_prompt(messages, N), "pixel_values": pixel_values}


def test_attention_is_that_of_the_position_before_each_token_to_the_image(tiny, prompt):
    model, template, _ = tiny()
    answer = template.tokenizer("a cat .", add_special_tokens=False)["input_ids"]
    words, maps, layer = pictures.attention_to_image(model, template, prompt,
                                                     answer + [template.end_token_id], 2)
    assert words == ["a", "cat"] and maps.shape == (2, 2, 2) and layer == 2
    assert model.llm.config._attn_implementation == "sdpa"  # restored

    # The same numbers from the complete model, with the tokens of "cat" found by their text.
    ids = prompt["input_ids"] + answer
    model.llm.set_attn_implementation("eager")
    with torch.no_grad():
        inputs_embeds = model.embed(torch.tensor([ids]), prompt["pixel_values"][None])
        weights = model.llm(inputs_embeds=inputs_embeds, output_attentions=True).attentions[1][0]
    first = ids.index(template.image_token_id)
    texts = [template.tokenizer.decode(answer[:t + 1]).split() for t in range(len(answer))]
    cat = [t for t, text in enumerate(texts) if len(text) == 2 and t >= 1]
    for i, tokens in enumerate([[0], cat]):
        rows = [len(prompt["input_ids"]) + t - 1 for t in tokens]
        mean = weights[:, rows, first:first + N].mean(dim=(0, 1))  # (heads, rows, N) -> (N,)
        torch.testing.assert_close(maps[i].flatten(), mean)
    assert (maps.sum(dim=(1, 2)) < 1).all()


def test_the_layer_that_differs_most_from_word_to_word_is_chosen(tiny, prompt, monkeypatch):
    model, template, _ = tiny()
    answer = template.tokenizer("a cat", add_special_tokens=False)["input_ids"]
    length, first = len(prompt["input_ids"] + answer), prompt["input_ids"].index(template.image_token_id)
    constant = torch.zeros(1, 4, length, length)
    constant[..., first] = 0.9  # much attention, but always to the same patch
    varied = torch.zeros(1, 4, length, length)
    varied[..., ::2, first] = varied[..., 1::2, first + 1] = 0.2  # less attention, to different patches
    decoder = SimpleNamespace(attentions=(constant, varied, constant))
    monkeypatch.setattr(model.llm, "get_decoder", lambda: lambda **_: decoder)
    assert pictures.attention_to_image(model, template, prompt, answer)[2] == 2
    assert pictures.attention_to_image(model, template, prompt, answer, layer=3)[2] == 3
    with pytest.raises(UserError, match="1 to 3"):
        pictures.attention_to_image(model, template, prompt, answer, layer=4)


def test_the_bright_patch_is_the_one_with_the_attention_and_little_attention_is_dark():
    image = Image.new("RGB", (480, 480), "white")
    centers = {"top left": (120, 120), "top right": (360, 120), "bottom left": (120, 360)}
    bright = pictures.brighten(image, torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    light = {name: sum(bright.getpixel(center)) for name, center in centers.items()}
    assert max(light, key=light.get) == "top right"
    dim = pictures.brighten(image, torch.tensor([[0.0, 0.01], [0.0, 0.0]]))
    assert sum(dim.getpixel(centers["top right"])) < 0.6 * light["top right"]


def test_the_visible_image_is_what_the_crop_leaves(image_processor):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste(Image.new("RGB", (30, 30), (10, 200, 90)), (30, 0))  # the center
    pixel_values = image_processor(wide, return_tensors="pt")["pixel_values"][0]
    assert pictures.visible_image(pixel_values, image_processor).getpixel((240, 240)) == (10, 200, 90)


def test_lines_are_no_wider_than_their_cell():
    font = pictures.ImageFont.load_default(28)
    lines = pictures.wrap("a short line and averyveryverylongwordthatfitsnowhere " * 9, font, 200)
    assert len(lines) == 8 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert pictures.wrap("", font, 200) == []


def colors_in(path):
    """Returns {color: number of pixels}."""
    return {color: count for count, color in Image.open(path).convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize("with_kinds, expected", [(True, {pictures.GREEN, pictures.RED}), (False, set())])
def test_an_answer_is_marked_as_correct_or_wrong_only_if_its_record_names_kinds(
        template, image_processor, drawn, tmp_path, monkeypatch, with_kinds, expected):
    records = json.loads((drawn / "instruct.json").read_text())
    for record in records:
        record["kinds"] = record["kinds"] if with_kinds else None
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    heldout_records = open_records(path, drawn / "images", path, drawn / "images", 4, 0, 0)[1]
    dataset = ChatDataset(heldout_records, template, image_processor, N, max_length=512)
    answer = dataset.make_prompt(0)[1]  # correct for record 0 only
    monkeypatch.setattr(pictures, "generate_answers", lambda *_: [answer])
    pictures.draw_examples(tmp_path / "sheet.png", None, template, dataset, "cpu", 3, 8)
    assert {pictures.GREEN, pictures.RED} & colors_in(tmp_path / "sheet.png").keys() == expected


def test_a_sheet_has_a_cell_for_each_example(tmp_path):
    cells = [(draw(color), [("tick", "yes", pictures.GREEN)]) for color in ("red", "blue", "orange", "red")]
    pictures.draw_cells(tmp_path / "sheet.png", ["four images"], cells, columns=3)
    counts = colors_in(tmp_path / "sheet.png")
    assert 1.8 < counts[COLORS["red"]] / counts[COLORS["blue"]] < 2.2 and COLORS["orange"] in counts


def test_the_command_draws_a_sheet_and_attention(script, flags, tmp_path):
    script("stage1_align", *flags(1, max_steps=0))
    for words in (("--sheet", "a.png", "--count", 3), ("--attention", "b.png", "--sample", 1)):
        script("tools.pictures", *words, "--max-new-tokens", 6)
        assert Image.open(tmp_path / words[1]).width == pictures.WIDTH


@pytest.mark.parametrize("words, name", [
    (("--sheet", "."), "to .:"),  # a folder must not be replaced by a picture
    (("--attention", "nowhere/a.png"), "nowhere"),
    (("--attention", "a.png", "--sample", 99), "0 to 3"),
    (("--attention", "a.png", "--layer", 9), "1 to 2")])
def test_wrong_input_is_refused_in_one_sentence(refusal, script, flags, words, name):
    script("stage1_align", *flags(1, max_steps=0))
    assert name in refusal("tools.pictures", *words, "--max-new-tokens", 6)


def test_curves_of_both_stages_are_drawn_if_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib")
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        heldout = {"heldout_loss": 1.0, "heldout_loss_shuffled": 2.0, "heldout_image_match": 0.9}
        lines = [{"step": 0, **heldout}, {"step": 1, "loss": 3.0}, {"step": 1, **heldout}]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.draw_curves(tmp_path / "curves.png", tmp_path)
    assert Image.open(tmp_path / "curves.png").width > 1000
    (tmp_path / "stage2" / "metrics.jsonl").write_text("")  # a stage that has just begun
    pictures.draw_curves(tmp_path / "curves.png", tmp_path)
    (tmp_path / "stage1" / "metrics.jsonl").write_text('{"step": ')
    with pytest.raises(UserError, match="metrics.jsonl"):
        pictures.draw_curves(tmp_path / "curves.png", tmp_path)


def test_without_matplotlib_the_curves_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # import raises ImportError
    with pytest.raises(UserError, match="pip install matplotlib"):
        pictures.draw_curves(tmp_path / "curves.png", tmp_path)
