"""Draws the toy world: pictures of colored shapes, with captions and conversations in LLaVA's file formats.

    python -m toy.world            draws toy/data again, in about 10 s

A picture shows two to four colored shapes on a 3x3 grid. The captions, questions and reference answers are
computed from the scene, so they are always correct. No training picture has the same set of colored shapes as
a held-out picture, so memorized captions do not fit the held-out pictures.

Three choices make this world easier than photos. One grid cell is exactly one patch of the toy CLIP. Every
scene has exactly one correct caption. And two kinds of question are left out of the data, because the toy
Llama answers them badly even if it reads the scene as text: "Where is the red star?" is 63% correct and "Is
there a red shape?" 55% (240 scenes).

Good scores show that the training code can connect a frozen CLIP to a frozen LLM. They do not show how well
the same code does on photos. toy/pretrain.py says how the toy models differ from the real ones.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw

DATA = Path(__file__).resolve().parent / "data"

# The strings in the data use British spelling, because the committed toy Llama was trained on them.
COLORS = {"red": (214, 39, 40), "green": (44, 150, 60), "blue": (40, 90, 210),
          "yellow": (245, 205, 30), "purple": (140, 60, 170), "orange": (255, 127, 14)}
# Every place has two words. If "top", "left" and "top left" were three places, the sum of a place's word
# embeddings would be ambiguous.
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
CELL = 32  # pixels; also the patch size of the toy CLIP
SIDE = 3 * CELL


def corners(count, radius, inner_radius=None):
    """Returns the corners of a regular polygon, or of a star if `inner_radius` is given."""
    radii = [radius, inner_radius or radius] * count
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(r * math.cos(angle), r * math.sin(angle)) for angle, r in zip(angles, radii)]


SHAPES = {  # outlines around the origin with a radius of about 1; y points down
    "circle": corners(32, 1),
    "square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
    "triangle": [(x, y + .15) for x, y in corners(3, 1.1)],
    "star": corners(10, 1.15, .48),
    "cross": [(-.34, -1), (.34, -1), (.34, -.34), (1, -.34), (1, .34), (.34, .34),
              (.34, 1), (-.34, 1), (-.34, .34), (-1, .34), (-1, -.34), (-.34, -.34)],
    "heart": [(math.sin(t) ** 3, .06 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
               - math.cos(4 * t)) / 16) for t in (math.pi * i / 16 for i in range(32))],
}
COLORED_SHAPES = [(color, shape) for color in COLORS for shape in SHAPES]


def random_scene(rng, forbidden=frozenset()):
    """Returns {place: (color, shape)} in reading order. No colored shape occurs twice in a scene."""
    while True:
        objects = rng.sample(COLORED_SHAPES, rng.randint(2, 4))
        if frozenset(objects) not in forbidden:
            return dict(zip((PLACES[cell] for cell in sorted(rng.sample(range(9), len(objects)))), objects))


def heldout_scenes(rng, count):
    """Returns {set of colored shapes: scene}. Training and pretraining avoid these sets."""
    scenes = {}
    while len(scenes) < count:
        scene = random_scene(rng, scenes)
        scenes[frozenset(scene.values())] = scene
    return scenes


def picture(scene, rng):
    """Returns a scene as an image. Size, tilt, position, color, background and pixel noise are random."""
    brightness = rng.randint(215, 250)
    background = tuple(brightness + rng.randint(-12, 5) for _ in range(3))
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), background)
    canvas = ImageDraw.Draw(image)
    for place, (color, shape) in scene.items():
        row, column = divmod(PLACES.index(place), 3)
        center_x, center_y = ((index + .5) * CELL + rng.uniform(-2, 2) for index in (column, row))
        size, tilt = rng.uniform(9.5, 12.5), math.radians(rng.uniform(-12, 12))
        cos, sin = math.cos(tilt) * size, math.sin(tilt) * size
        fill = tuple(max(0, min(255, value + rng.randint(-14, 14))) for value in COLORS[color])
        # Drawn at twice the size. Reducing the image below smooths the edges.
        points = [(2 * (center_x + cos * x - sin * y), 2 * (center_y + sin * x + cos * y))
                  for x, y in SHAPES[shape]]
        canvas.polygon(points, fill=fill, outline=tuple(value * 2 // 3 for value in fill))
    noise = np.random.default_rng(rng.getrandbits(32)).integers(-6, 7, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(image.reduce(2)) + noise).clip(0, 255).astype(np.uint8))


BRIEF = [  # LLaVA's eleven prompts that ask for a short description
    "Describe the image concisely.", "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.", "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.", "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
]
QUESTIONS = {  # "Which colour has …" is odd English, but the committed Llama was trained on it
    "count": ("How many shapes are there?", "How many shapes do you see?"),
    "colour": ("What colour is the shape at the {}?", "Which colour has the shape at the {}?"),
    "shape": ("What shape is the {} thing?", "Which shape is {}?"),
    "what_at": ("What is at the {}?", "What do you see at the {}?"),
    "where": ("Where is the {}?", "Where do you see the {}?"),
    "has_colour": ("Is there {} shape?", "Do you see {} shape?"),
    "yes_no": ("Is there a shape at the {}?", "Do you see a shape at the {}?"),
}
# Only the pretraining asks "where" and "has_colour". Only the data asks "yes_no", so stage 2 has to teach it.
DATA_KINDS = ("count", "colour", "shape", "what_at", "yes_no")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PHRASE = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b(?: at the ({'|'.join(PLACES)})\b)?")


def with_article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption_of(scene):
    """Returns the caption. It lists the objects in reading order, and ends in " ." as CC3M's captions do."""
    phrases = [f"{with_article(' '.join(thing))} at the {place}" for place, thing in scene.items()]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]} ."


def objects_in(caption):
    """Returns all (color, shape, place) phrases in a text as a set. The place is "" if it is missing."""
    return set(PHRASE.findall(caption))


def answer_of(scene, kind, subject):
    """Returns the correct answer to a question of one kind, or None if there is no single correct answer."""
    objects = {" ".join(thing): place for place, thing in scene.items()}
    if kind == "count":
        return f"There are {NUMBERS[len(scene)]}." if len(scene) in NUMBERS else None
    if kind == "colour":
        return f"It is {scene[subject][0]}." if subject in scene else None
    if kind == "shape":  # asks by color, so the color must occur once
        shapes = [shape for color, shape in scene.values() if color == subject]
        return f"It is {with_article(shapes[0])}." if len(shapes) == 1 else None
    if kind == "what_at":
        return f"{with_article(' '.join(scene[subject])).capitalize()}." if subject in scene else "Nothing."
    if kind == "where":
        return f"At the {objects[subject]}." if subject in objects else None
    there = scene if kind == "yes_no" else {with_article(color) for color, _ in scene.values()}  # has_colour
    return "Yes." if subject in there else "No."


def answer_to(scene, text):
    """Returns the correct answer to a question in words, or None if it has none or is not of this world."""
    if text in BRIEF:
        return caption_of(scene) if len(scene) > 1 else None
    for kind, forms in QUESTIONS.items():
        for form in forms:
            if match := re.fullmatch(re.escape(form).replace(r"\{\}", "(.*)"), text, re.DOTALL):
                return answer_of(scene, kind, *(match.groups() or [""]))
    return None


def question(scene, kind, rng):
    """Returns (question, answer) of one kind, or None if every such question would be ambiguous."""
    full, empty = list(scene), [place for place in PLACES if place not in scene]
    subject, colors = "", [color for color, _ in scene.values()]  # the subject replaces {} in the question
    if kind == "colour":
        subject = rng.choice(full)
    elif kind == "shape":
        unique = [color for color in colors if colors.count(color) == 1]
        if not unique:
            return None
        subject = rng.choice(unique)
    elif kind == "what_at":  # 20% ask about an empty cell
        subject = rng.choice(full if rng.random() < .8 else empty)
    elif kind == "where":
        subject = " ".join(scene[rng.choice(full)])
    elif kind == "yes_no":
        subject = rng.choice(full if rng.choice((True, False)) else empty)
    elif kind == "has_colour":
        choices = set(colors) if rng.choice((True, False)) else set(COLORS) - set(colors)
        subject = with_article(rng.choice(sorted(choices)))
    return rng.choice(QUESTIONS[kind]).format(subject), answer_of(scene, kind, subject)


def brief_description(scene, rng):
    """Returns a list with one (kind, question, answer) triple, which asks for the caption."""
    return [("caption", rng.choice(BRIEF), caption_of(scene))]


def conversation(scene, rng, kinds=DATA_KINDS):
    """Returns two to five (kind, question, answer) triples. No kind occurs twice."""
    candidates = [(kind, question(scene, kind, rng)) for kind in rng.sample(kinds, len(kinds))]
    return [(kind, *pair) for kind, pair in candidates if pair][:rng.randint(2, 5)]



def record(name, triples, rng, with_kinds=False):
    """Returns a LLaVA record. <image> stands at the start or the end of the first question."""
    texts = [text for _, *pair in triples for text in pair]
    texts[0] = rng.choice([f"<image>\n{texts[0]}", f"{texts[0]}\n<image>"])
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * len(triples), texts)]
    kinds = {"kinds": [kind for kind, *_ in triples]} if with_kinds else {}
    return {"id": name, "image": f"{name}.jpg", "conversations": turns} | kinds


def draw(folder=DATA, chat=6000, instruct=6000, heldout=240, seed=0):
    """Writes all files to a temporary folder and renames it, so `folder` is always complete. The same
    arguments give the same bytes."""
    rng, unfinished = random.Random(seed), folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "images").mkdir(parents=True)
    heldout_set = heldout_scenes(rng, heldout)  # first, because toy/pretrain.py repeats this call
    chat_ids = [f"GCC_train_{number:09d}" for number in rng.sample(range(3_000_000), chat + heldout)]
    instruct_ids = [f"{number:012d}" for number in rng.sample(range(580_000), instruct)]
    heldout_ids = chat_ids[chat:]

    def write_json(file_name, ids, scenes, triples_of, with_kinds=False):
        records = [record(name, triples_of(scene, rng), rng, with_kinds) for name, scene in zip(ids, scenes)]
        (unfinished / file_name).write_text(json.dumps(records, indent=1))

    def write_zip(file_name, ids, scenes):
        with zipfile.ZipFile(unfinished / file_name, "w") as archive:
            for name, scene in zip(ids, scenes):
                # ZipInfo stores a fixed date, so that every drawing has the same bytes.
                with archive.open(zipfile.ZipInfo(f"{name}.jpg"), "w") as file:
                    picture(scene, rng).save(file, "JPEG", quality=90)

    scenes = [random_scene(rng, heldout_set) for _ in range(chat)]
    write_json("chat.json", chat_ids, scenes, brief_description)
    write_zip("images.zip", chat_ids, scenes)

    scenes = [random_scene(rng, heldout_set) for _ in range(instruct)]
    write_json("instruct.json", instruct_ids, scenes, conversation)
    for name, scene in zip(instruct_ids, scenes):
        picture(scene, rng).save(unfinished / "images" / f"{name}.jpg", quality=90)

    scenes = heldout_set.values()
    write_json("heldout_chat.json", heldout_ids, scenes, brief_description)
    write_zip("heldout.zip", heldout_ids, scenes)
    write_json("heldout_instruct.json", heldout_ids, scenes, conversation, with_kinds=True)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.replace(folder)


def draw_if_missing():
    """Draws toy/data if it does not exist. Of several processes, the first one draws and the others wait."""
    if DATA.exists():
        return
    try:
        with FileLock(DATA.with_name("data.lock")):
            if not DATA.exists():
                print("drawing the toy world", flush=True)
                draw(DATA)
    except OSError as error:
        sys.exit(f"cannot draw the toy's pictures into {DATA}: {error.strerror}; copy this repository to a "
                 "folder that you can write to")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    draw()
    print(f"drew {DATA}")
