"""The toy world keeps its promises: the same bytes for the same seed, held-out combinations, real formats."""

import io
import json
import random
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy_world
from toy_world import BRIEF, PLACES, combination, draw, objects_in, random_scene

COUNTS = {"chat": 60, "instruct": 60, "heldout": 30}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "data"
    draw(folder, **COUNTS)
    return folder


def load(folder, name):
    return json.loads((folder / name).read_text())


def things(text):
    return frozenset((colour, shape) for colour, shape, _ in objects_in(text))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(drawn, tmp_path):
    draw(tmp_path / "again", **COUNTS)
    draw(tmp_path / "other", **COUNTS, seed=1)
    once, again, other = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (drawn, tmp_path / "again", tmp_path / "other")
    )
    assert len(once) == 6 + COUNTS["instruct"]
    assert once == again
    assert not any(other.get(name) == content for name, content in once.items())


def test_no_heldout_combination_is_drawn_for_training(monkeypatch, tmp_path):
    # A world so small that chance alone would repeat combinations: five coloured shapes make 25.
    monkeypatch.setattr(
        toy_world,
        "COLOURED_SHAPES",
        [("red", "circle"), ("red", "star"), ("blue", "circle"), ("blue", "star"), ("green", "star")],
    )
    draw(tmp_path / "data", chat=50, instruct=5, heldout=12)
    heldout = [things(r["conversations"][1]["value"]) for r in load(tmp_path / "data", "heldout_chat.json")]
    training = {things(r["conversations"][1]["value"]) for r in load(tmp_path / "data", "chat.json")}
    assert len(set(heldout)) == 12 and training and not training & set(heldout)


def test_heldout_combinations_are_those_the_pretraining_avoids(drawn):
    """pretrain() calls heldout_scenes with a fresh generator of the same seed, as draw() does."""
    heldout = [things(r["conversations"][1]["value"]) for r in load(drawn, "heldout_chat.json")]
    assert heldout == [combination(s) for s in toy_world.heldout_scenes(random.Random(0), COUNTS["heldout"])]


@pytest.mark.parametrize(
    "name, turns",
    [
        ("chat.json", (1, 1)),
        ("instruct.json", (2, 5)),
        ("heldout_chat.json", (1, 1)),
        ("heldout_instruct.json", (2, 5)),
    ],
)
def test_records_have_llavas_form(drawn, name, turns):
    records = load(drawn, name)
    assert len(records) == COUNTS["heldout" if name.startswith("heldout") else name.removesuffix(".json")]
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert set(record) - {"kinds"} == {"id", "image", "conversations"}
        assert record["image"] == record["id"] + ".jpg"
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        assert turns[0] <= len(speakers) // 2 <= turns[1]
        first, *others = [turn["value"] for turn in record["conversations"]]
        assert first.startswith("<image>\n") != first.endswith("\n<image>")
        assert first.count("<image>") == 1 and not any("<image>" in value for value in others)
        if "chat" in name:
            assert first.replace("<image>", "").strip() in BRIEF
    firsts = [record["conversations"][0]["value"] for record in records]
    assert {value.startswith("<image>") for value in firsts} == {True, False}


def test_every_image_named_is_there_and_no_other(drawn):
    def named(name):
        return {record["image"] for record in load(drawn, name)}

    for archive, names in {
        "images.zip": ["chat.json"],
        "heldout.zip": ["heldout_chat.json", "heldout_instruct.json"],
    }.items():
        with zipfile.ZipFile(drawn / archive) as opened:
            assert all(named(name) == set(opened.namelist()) for name in names)
            image = Image.open(io.BytesIO(opened.read(opened.namelist()[0])))
            assert (image.format, image.size, image.mode) == ("JPEG", (toy_world.SIDE, toy_world.SIDE), "RGB")
    assert named("instruct.json") == {path.name for path in (drawn / "images").iterdir()}


def test_kinds_align_with_the_answers_and_answers_with_the_scene(drawn):
    captions = [record["conversations"][1]["value"] for record in load(drawn, "heldout_chat.json")]
    scenes = [{place: (colour, shape) for colour, shape, place in objects_in(text)} for text in captions]
    for scene, record in zip(scenes, load(drawn, "heldout_instruct.json"), strict=True):
        turns = [turn["value"] for turn in record["conversations"]]
        for kind, ask, answer in zip(record["kinds"], turns[::2], turns[1::2], strict=True):
            ask = ask.replace("<image>", "").strip()
            if kind == "count":
                assert answer == f"There are {toy_world.NUMBERS[len(scene)]}."
            elif kind == "colour":
                colour, _ = scene[next(place for place in PLACES if place in ask)]
                assert answer == f"It is {colour}."
            elif kind == "shape":
                [shape] = [shape for colour, shape in scene.values() if colour in ask[:-1].split()]
                assert answer[:-1].split()[-1] == shape
            elif kind == "where":
                assert " ".join(scene[answer.removeprefix("At the ").rstrip(".")]) in ask
            elif kind == "what_at":
                thing = scene.get(next(place for place in PLACES if place in ask))
                assert answer.rstrip(".").lower().endswith(" ".join(thing) if thing else "nothing")
            elif kind == "yes_no":
                there = any(place in ask for place in scene)
                assert answer == ("Yes." if there else "No.")
            else:
                pytest.fail(f"unexpected kind: {kind}")


def test_yes_and_no_are_equally_frequent():
    rng = random.Random(0)
    answers = [toy_world.question(random_scene(rng), "yes_no", rng)[1] for _ in range(2000)]
    assert set(answers) == {"Yes.", "No."} and 0.45 < answers.count("Yes.") / len(answers) < 0.55


def test_objects_in_recovers_the_truth_from_every_caption():
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng)
        assert objects_in(toy_world.caption_of(scene)) == {(*thing, place) for place, thing in scene.items()}


@pytest.mark.parametrize(
    "junk, found",
    [
        ("", set()),
        ("a red a red at the top left", set()),
        ("a reddish circle, a red circles", set()),
        ("a red circle at the top", {("red", "circle", "")}),
        ("an orange star at the bottom left and a blue at the", {("orange", "star", "bottom left")}),
        ("a red circle at the top left and a red circle at the top left .", {("red", "circle", "top left")}),
    ],
)
def test_objects_in_ignores_junk(junk, found):
    assert objects_in(junk) == found


def test_an_interrupted_draw_leaves_no_folder_and_the_next_succeeds(monkeypatch, tmp_path):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy_world, "picture", fail)
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path / "data", chat=2, instruct=2, heldout=2)
    assert not (tmp_path / "data").exists()
    draw(tmp_path / "data", chat=2, instruct=2, heldout=2)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# -- the committed stand-ins, and the tokenizer ------------------------------------------------------------

TOY = Path(toy_world.__file__).parent / "toy"


def test_the_stand_ins_load_like_the_real_models():
    import torch
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    clip, report = CLIPVisionModel.from_pretrained(
        TOY / "clip-vit", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    features = clip(
        torch.zeros(1, 3, toy_world.SIDE, toy_world.SIDE), output_hidden_states=True
    ).hidden_states[-2]
    assert features.shape == (1, 1 + len(PLACES), toy_world.WIDTH)  # the class token, and one patch a cell
    llama, report = AutoModelForCausalLM.from_pretrained(
        TOY / "llama-chat", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (llama.config.bos_token_id, llama.config.eos_token_id) == (1, 2)
    assert (
        sum(path.stat().st_size for name in ("clip-vit", "llama-chat") for path in (TOY / name).iterdir())
        < 8e6
    )


def test_the_tokenizer_gives_every_text_back_and_treats_lines_like_tinyllamas():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOY / "llama-chat")
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    rng = random.Random(0)
    for _ in range(20):
        text = tokenizer.apply_chat_template(toy_world.chat_about(random_scene(rng), rng), tokenize=False)
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer('A "Zebra", naïve?\n 日本').input_ids) == 'A "Zebra", naïve?\n 日本'
    # The first word of a line is another token than the same word further on.
    assert tokenizer.tokenize("<|assistant|>\nred circle.</s>")[2:] == [
        "\n",
        "re",
        "d",
        "▁circle",
        ".",
        "</s>",
    ]
    assert tokenizer.tokenize("a red circle") == ["▁a", "▁red", "▁circle"]
