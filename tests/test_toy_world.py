"""Tests of toy/world.py, and of the tokenizer that toy/pretrain.py has made."""

import io
import json
import random
import subprocess
import sys
import zipfile

import pytest
from conftest import REPOSITORY
from PIL import Image
from transformers import AutoTokenizer

from support.records import read_turns
from toy import pretrain, world
from toy.world import BRIEF, PLACES, draw, heldout_scenes, objects_in, random_scene

COUNTS = {"chat": 60, "instruct": 60, "heldout": 30}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "data"
    draw(folder, **COUNTS)
    return folder


def load(folder, name):
    return json.loads((folder / name).read_text())


def captions(folder, name):
    return [record["conversations"][1]["value"] for record in load(folder, name)]


def colored_shapes(text):
    return frozenset((color, shape) for color, shape, _ in objects_in(text))


def test_world_needs_neither_torch_nor_transformers():
    code = "import sys, toy.world; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_same_seed_gives_same_bytes_and_other_seed_gives_other_bytes(drawn, tmp_path):
    draw(tmp_path / "again", **COUNTS)
    draw(tmp_path / "other", **COUNTS, seed=1)
    first, again, other = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
                           for folder in (drawn, tmp_path / "again", tmp_path / "other"))
    assert len(first) == 6 + COUNTS["instruct"]
    assert first == again
    assert not any(other.get(name) == content for name, content in first.items())


def test_training_data_never_shows_a_heldout_combination(monkeypatch, tmp_path):
    # Five colored shapes allow only 25 combinations, so chance would repeat some of them.
    few_shapes = [("red", "circle"), ("red", "star"), ("blue", "circle"), ("blue", "star"), ("green", "star")]
    monkeypatch.setattr(world, "COLORED_SHAPES", few_shapes)
    draw(tmp_path / "data", chat=50, instruct=5, heldout=12)
    heldout = {colored_shapes(text) for text in captions(tmp_path / "data", "heldout_chat.json")}
    training = {colored_shapes(text) for text in captions(tmp_path / "data", "chat.json")}
    assert len(heldout) == 12 and training and not training & heldout


def test_heldout_data_shows_the_combinations_that_pretraining_avoids(drawn):
    heldout = [colored_shapes(text) for text in captions(drawn, "heldout_chat.json")]
    assert heldout == list(heldout_scenes(random.Random(0), COUNTS["heldout"]))  # as in pretrain.pretrain()


@pytest.mark.parametrize("name, turns", [("chat.json", (1, 1)), ("instruct.json", (2, 5)),
                                         ("heldout_instruct.json", (2, 5))])
def test_records_have_llava_format(drawn, name, turns):
    records = load(drawn, name)
    assert len(records) == COUNTS["heldout" if name.startswith("heldout") else name.removesuffix(".json")]
    assert len({record["id"] for record in records}) == len(records)
    places = set()
    for record in records:
        assert record["image"] == record["id"] + ".jpg"
        assert 2 * turns[0] <= len(read_turns(record)) == len(record["conversations"]) <= 2 * turns[1]
        first, *others = [turn["value"] for turn in record["conversations"]]
        places.add((first.startswith("<image>\n"), first.endswith("\n<image>")))
        assert first.count("<image>") == 1 and not any("<image>" in value for value in others)
        if "chat" in name:
            assert first.replace("<image>", "").strip() in BRIEF
    assert places == {(True, False), (False, True)}


def test_image_files_are_exactly_those_named_in_the_records(drawn):
    def named(name):
        return {record["image"] for record in load(drawn, name)}

    for archive, names in (("images.zip", ["chat.json"]),
                           ("heldout.zip", ["heldout_chat.json", "heldout_instruct.json"])):
        with zipfile.ZipFile(drawn / archive) as opened:
            assert all(named(name) == set(opened.namelist()) for name in names)
            image = Image.open(io.BytesIO(opened.read(opened.namelist()[0])))
            assert (image.format, image.size, image.mode) == ("JPEG", (world.SIDE, world.SIDE), "RGB")
    assert named("instruct.json") == {path.name for path in (drawn / "images").iterdir()}


def test_kinds_match_the_answers_and_the_answers_match_the_scene(drawn):
    scenes = [{place: (color, shape) for color, shape, place in objects_in(text)}
              for text in captions(drawn, "heldout_chat.json")]
    for scene, record in zip(scenes, load(drawn, "heldout_instruct.json"), strict=True):
        turns = [turn["value"] for turn in record["conversations"]]
        for kind, question, answer in zip(record["kinds"], turns[::2], turns[1::2], strict=True):
            question = question.replace("<image>", "").strip()
            if kind == "count":
                assert answer == f"There are {world.NUMBERS[len(scene)]}."
            elif kind == "colour":
                color, _ = scene[next(place for place in PLACES if place in question)]
                assert answer == f"It is {color}."
            elif kind == "shape":
                [shape] = [shape for color, shape in scene.values() if color in question[:-1].split()]
                assert answer[:-1].split()[-1] == shape
            elif kind == "what_at":
                thing = scene.get(next(place for place in PLACES if place in question))
                assert answer.rstrip(".").lower().endswith(" ".join(thing) if thing else "nothing")
            elif kind == "yes_no":
                assert answer == ("Yes." if any(place in question for place in scene) else "No.")
            else:
                pytest.fail(f"unexpected kind: {kind}")


def test_objects_in_recovers_the_scene_from_every_caption():
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng)
        assert objects_in(world.caption_of(scene)) == {(*thing, place) for place, thing in scene.items()}


def test_tokenizer_round_trips_every_text_and_starts_lines_like_tinyllamas():
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "toy" / "llama-chat")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    rng = random.Random(0)
    for _ in range(20):
        text = tokenizer.apply_chat_template(pretrain.chat_about(random_scene(rng), rng), tokenize=False)
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer('A "Zebra", naïve?\n 日本').input_ids) == 'A "Zebra", naïve?\n 日本'
    # A word at the start of a line has a different token from the same word after a space.
    line = tokenizer.tokenize("<|assistant|>\nred circle.</s>")
    assert line[2:] == ["\n", "re", "d", "▁circle", ".", "</s>"]
    assert tokenizer.tokenize("a red circle") == ["▁a", "▁red", "▁circle"]


def test_two_processes_that_need_the_pictures_at_once_draw_them_once(tmp_path):
    code = ("import sys, toy.world as world, functools; from pathlib import Path; "
            "world.DATA = Path(sys.argv[1]); "
            "world.draw = functools.partial(world.draw, chat=200, instruct=200, heldout=9); "
            "world.draw_if_missing()")
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")], cwd=REPOSITORY, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sorted(printed) == ["", "drawing the toy world\n"] and (tmp_path / "data" / "chat.json").exists()
