"""A world in which alignment can be proved on a laptop: drawn scenes, and stand-ins for CLIP and TinyLlama.

Each picture shows two to four coloured shapes on a 3x3 grid. The scene is known exactly, so captions,
conversations and the truth about every answer come from the scene itself, in the formats of LLaVA's two data
sets. Held-out scenes show *combinations* (sets of coloured shapes) that occur nowhere in training: whoever
describes them has seen them, and cannot have memorised them.

    python toy_world.py               draws toy/data, about 10 s
    python toy_world.py --pretrain    trains toy/clip-vit and toy/llama-chat, about 30 min on 2 cores

The stand-ins' weights are committed, so the second command is only for checking or changing them. Like the
real models, they have never met: the CLIP learns from pictures with captions, the Llama from text alone.
"""

import argparse
import copy
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# torch, transformers and tokenizers are imported inside the pretraining functions: whoever only draws, or
# scores captions with objects_in, needs none of them and should not wait for their import.

# -- 1. the world: scenes and their pictures -------------------------------------------------------------

COLOURS = {"red": (214, 39, 40), "green": (44, 150, 60), "blue": (40, 90, 210),
           "yellow": (245, 205, 30), "purple": (140, 60, 170), "orange": (255, 127, 14)}
# A place always takes two words. With "top", "left" and "top left" side by side, a vector that says several
# words at once would be ambiguous, and places would never be learned.
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
CELL = 32  # pixels; one cell is one patch of the CLIP, so that one image token shows one object at most
SIDE = 3 * CELL


def corners(count, radius, inner=None):
    """A regular polygon, or a star if an inner radius is given; the first corner points up."""
    radii = [radius] if inner is None else [radius, inner]
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(r * math.cos(angle), r * math.sin(angle)) for angle, r in zip(angles, radii * count)]


SHAPES = {  # outlines around the origin, of radius 1 or so; y points down
    "circle": corners(32, 1),
    "square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
    "triangle": [(x, y + .15) for x, y in corners(3, 1.1)],
    "star": corners(10, 1.15, .48),
    "cross": [(-.34, -1), (.34, -1), (.34, -.34), (1, -.34), (1, .34), (.34, .34),
              (.34, 1), (-.34, 1), (-.34, .34), (-1, .34), (-1, -.34), (-.34, -.34)],
    "heart": [(math.sin(t) ** 3, .06 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
               - math.cos(4 * t)) / 16) for t in (math.pi * i / 16 for i in range(32))],
}
COLOURED_SHAPES = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def random_scene(rng, forbidden=frozenset()):
    """{place: (colour, shape)} in reading order, never of a forbidden combination. No coloured shape occurs
    twice, so that "Where is the red circle?" has one answer."""
    while True:
        objects = rng.sample(COLOURED_SHAPES, rng.randint(2, 4))
        if frozenset(objects) not in forbidden:
            return dict(zip((PLACES[cell] for cell in sorted(rng.sample(range(9), len(objects)))), objects))


def combination(scene):
    return frozenset(scene.values())


def heldout_scenes(rng, count):
    """Scenes of pairwise different combinations, which the training data and the pretraining all avoid."""
    seen, scenes = set(), []
    while len(scenes) < count:
        scenes.append(random_scene(rng, seen))
        seen.add(combination(scenes[-1]))
    return scenes


def picture(scene, rng):
    """Draws a scene. Size, tilt, position, tint, background and grain vary, so no picture occurs twice."""
    light = rng.randint(215, 250)
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), tuple(light + rng.randint(-12, 5) for _ in range(3)))
    canvas = ImageDraw.Draw(image)
    for place, (colour, shape) in scene.items():
        row, column = divmod(PLACES.index(place), 3)
        x, y = ((index + .5) * CELL + rng.uniform(-2, 2) for index in (column, row))
        size, tilt = rng.uniform(9.5, 12.5), math.radians(rng.uniform(-12, 12))
        c, s = math.cos(tilt) * size, math.sin(tilt) * size
        fill = tuple(max(0, min(255, value + rng.randint(-14, 14))) for value in COLOURS[colour])
        # At twice the size, halved below: smooth edges.
        points = [(2 * (x + c * u - s * v), 2 * (y + s * u + c * v)) for u, v in SHAPES[shape]]
        canvas.polygon(points, fill=fill, outline=tuple(value * 2 // 3 for value in fill))
    grain = np.random.default_rng(rng.getrandbits(32)).integers(-6, 7, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(image.reduce(2)) + grain).clip(0, 255).astype(np.uint8))


# -- 2. its language: captions, questions, answers -------------------------------------------------------

BRIEF = [  # LLaVA's eleven ways to ask for a short description
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
]
QUESTIONS = {
    "count": ("How many shapes are there?", "How many shapes do you see?"),
    "colour": ("What colour is the shape at the {}?", "Which colour has the shape at the {}?"),
    "shape": ("What shape is the {} thing?", "Which shape is {}?"),
    "what_at": ("What is at the {}?", "What do you see at the {}?"),
    "where": ("Where is the {}?", "Where do you see the {}?"),
    "has_colour": ("Is there {} shape?", "Do you see {} shape?"),
    "yes_no": ("Is there a shape at the {}?", "Do you see a shape at the {}?"),
}
# The Llama meets these in its pretraining, and learns two of them badly: finding a thing's place, and that a
# colour is nowhere. What a language model cannot do in text, no projector gives it: the data asks the others,
# and a yes/no question that the Llama has never met.
PRETRAINING_KINDS = ("count", "colour", "shape", "what_at", "where", "has_colour")
DATA_KINDS = ("count", "colour", "shape", "what_at", "yes_no")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PHRASE = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b(?: at the ({'|'.join(PLACES)})\b)?")


def with_article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption_of(scene):
    """In reading order, so that a scene has one right caption; in the style of CC3M, lower case and " ."."""
    phrases = [f"{with_article(' '.join(thing))} at the {place}" for place, thing in scene.items()]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]} ."


def objects_in(caption):
    """The (colour, shape, place) phrases in a caption, be it malformed; place is "" where none follows.

    "a red circle at the top left, a blue and a green star"
    -> {("red", "circle", "top left"), ("green", "star", "")}
    """
    return set(PHRASE.findall(caption))


def question(scene, kind, rng):
    """(question, answer) of one kind; None if every such question about this scene would be ambiguous."""
    objects = list(scene.values())
    if kind == "count":
        about, answer = "", f"There are {NUMBERS[len(objects)]}."
    elif kind == "colour":
        about = rng.choice(list(scene))
        answer = f"It is {scene[about][0]}."
    elif kind == "shape":  # asked by its colour, which must occur once
        unique = [thing for thing in objects if sum(thing[0] == colour for colour, _ in objects) == 1]
        if not unique:
            return None
        about, shape = rng.choice(unique)
        answer = f"It is {with_article(shape)}."
    elif kind == "what_at":  # one time in five about an empty cell
        about = rng.choice(list(scene) if rng.random() < .8 else [p for p in PLACES if p not in scene])
        answer = f"{with_article(' '.join(scene[about])).capitalize()}." if about in scene else "Nothing."
    elif kind == "where":
        place = rng.choice(list(scene))
        about, answer = " ".join(scene[place]), f"At the {place}."
    elif kind == "yes_no":  # as often yes as no
        answer = rng.choice(("Yes.", "No."))
        about = rng.choice([place for place in PLACES if (place in scene) == (answer == "Yes.")])
    elif kind == "has_colour":
        there = sorted({colour for colour, _ in objects})
        answer = rng.choice(("Yes.", "No."))
        about = with_article(rng.choice(there if answer == "Yes." else sorted(set(COLOURS) - set(there))))
    return rng.choice(QUESTIONS[kind]).format(about), answer


def conversation(scene, rng, kinds):
    """[(kind, question, answer)], two to five; no kind twice, so that all are about equally frequent."""
    asked = [(kind, question(scene, kind, rng)) for kind in rng.sample(kinds, len(kinds))]
    return [(kind, *pair) for kind, pair in asked if pair][:rng.randint(2, 5)]


# -- 3. the files, in LLaVA's formats --------------------------------------------------------------------


def record(name, pairs, rng):
    """`<image>` opens or closes the first human turn, and stands in no other."""
    texts = [text for pair in pairs for text in pair]
    texts[0] = rng.choice([f"<image>\n{texts[0]}", f"{texts[0]}\n<image>"])
    turns = [{"from": speaker, "value": text} for speaker, text in zip(("human", "gpt") * len(pairs), texts)]
    return {"id": name, "image": f"{name}.jpg", "conversations": turns}


def draw(folder="toy/data", chat=6000, instruct=6000, heldout=240, seed=0):
    """Draws all files, into a sibling folder that is renamed at the end, so that an interrupted draw is never
    taken for a complete one."""
    folder, rng = Path(folder), random.Random(seed)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "images").mkdir(parents=True)
    heldout_set = heldout_scenes(rng, heldout)  # first, as in pretrain(): the same seed gives the same scenes
    forbidden = {combination(scene) for scene in heldout_set}
    chat_ids = [f"GCC_train_{number:09d}" for number in rng.sample(range(3_000_000), chat + heldout)]
    instruct_ids = [f"{number:012d}" for number in rng.sample(range(580_000), instruct)]

    def jpeg(scene):
        buffer = io.BytesIO()
        picture(scene, rng).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    def caption_record(name, scene):
        return record(name, [(rng.choice(BRIEF), caption_of(scene))], rng)

    def conversation_record(name, scene, with_kinds=False):
        kinds, *pairs = zip(*conversation(scene, rng, DATA_KINDS))
        return record(name, list(zip(*pairs)), rng) | ({"kinds": list(kinds)} if with_kinds else {})

    def write_json(name, records):
        (unfinished / name).write_text(json.dumps(records, indent=1))

    def write_zip(name, records, scenes):
        with zipfile.ZipFile(unfinished / name, "w") as archive:
            for entry, scene in zip(records, scenes):
                # ZipInfo has a fixed date; a plain name would take today's, and the bytes would change.
                archive.writestr(zipfile.ZipInfo(entry["image"]), jpeg(scene))

    scenes = [random_scene(rng, forbidden) for _ in range(chat)]
    records = [caption_record(name, scene) for name, scene in zip(chat_ids, scenes)]
    write_json("chat.json", records)
    write_zip("images.zip", records, scenes)

    scenes = [random_scene(rng, forbidden) for _ in range(instruct)]
    records = [conversation_record(name, scene) for name, scene in zip(instruct_ids, scenes)]
    write_json("instruct.json", records)
    for entry, scene in zip(records, scenes):
        (unfinished / "images" / entry["image"]).write_bytes(jpeg(scene))

    records = [caption_record(name, scene) for name, scene in zip(chat_ids[chat:], heldout_set)]
    write_json("heldout_chat.json", records)
    write_zip("heldout.zip", records, heldout_set)
    write_json("heldout_instruct.json", [conversation_record(entry["id"], scene, with_kinds=True)
                                         for entry, scene in zip(records, heldout_set)])
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(unfinished, folder)

# -- 4. the stand-ins and their pretraining --------------------------------------------------------------

WIDTH = 128
IMAGE_MEAN, IMAGE_STD = [.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]  # CLIP's
# TinyLlama's, to the letter: <|user|> and <|assistant|> are ordinary text, </s> is a token of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}")


def chat_about(scene, rng):
    """Messages about a scene: a caption or a conversation; `<image>` comes first, where LLaVA moves it."""
    pairs = [(rng.choice(BRIEF), caption_of(scene))]
    if rng.random() < .7:
        pairs = [pair for _, *pair in conversation(scene, rng, PRETRAINING_KINDS)]
    texts = [text for pair in pairs for text in pair]
    texts[0] = "<image>\n" + texts[0]
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(pairs), texts)]


def fact(scene, place):
    return [*scene.get(place, ["nothing"]), *place.split()]


def facts(scene, rng):
    """The scene in words, in any order, one fact a line: facts that run into each other are ambiguous."""
    places = list(scene) + rng.sample([place for place in PLACES if place not in scene], rng.randint(0, 2))
    return "\n".join("- " + " ".join(fact(scene, place)) for place in rng.sample(places, len(places)))


def train_tokenizer(rng, forbidden):
    """A BPE like Llama's, learned from the world's chats; what it has never seen it spells out in bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def wrap(tokenizer):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            # Line breaks and punctuation stay apart from words ...
            pre_tokenizers.Split(Regex(r"\n| ?[.,?!:;]"), "isolated"),
            # ... and "▁" stands for a space, or the start of the text: as in TinyLlama's, the first word of a
            # line is another token than the same word further on.
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                               decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
            pad_token="</s>", chat_template=CHAT_TEMPLATE, model_max_length=256)

    learner = Tokenizer(models.BPE())
    render = wrap(learner).apply_chat_template
    texts = []
    for scene in (random_scene(rng, forbidden) for _ in range(3000)):
        text = render(chat_about(scene, rng), tokenize=False)
        texts.append(text.replace("<image>", facts(scene, rng)).replace("</s>", ""))
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    # The ids of Llama's vocabulary: the special tokens, the bytes, then what was learned.
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += sorted(learned["vocab"].keys() - set(words), key=learned["vocab"].get)
    return wrap(Tokenizer(models.BPE(
        {word: i for i, word in enumerate(words)}, [tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True)))


def optimiser_for(model, lr, steps, warmup):
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .98), weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warmup)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return step


def train_clip(folder, tokenizer, forbidden, heldout_set, seed, steps=700, batch_size=192):
    """A CLIP, by CLIP's own contrastive loss: which of these captions belongs to which of these pictures?"""
    import torch
    import torch.nn.functional as F
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    rng = random.Random(seed)
    # With eos_token_id=2 transformers' text tower pools at the *largest id*, for the sake of old checkpoints,
    # and training stalls. So the end token gets an id of its own, the last one, and the config says so.
    end = len(tokenizer)
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    clip = CLIPModel(CLIPConfig(
        projection_dim=WIDTH,
        vision_config=tower | {"num_hidden_layers": 4, "image_size": SIDE, "patch_size": CELL},
        text_config=tower | {"num_hidden_layers": 2, "vocab_size": end + 1, "max_position_embeddings": 64,
                             "bos_token_id": 1, "eos_token_id": end, "pad_token_id": end}))
    # Position embeddings not much smaller than what the patches show. With the usual 0.02 they drown in it: a
    # linear probe on patch features finds an object's colour and shape always, its place in 0.2 of cases.
    clip.vision_model.embeddings.position_embedding.weight.data.normal_(std=.5)

    def similarities(scenes, images):
        rows = [[1, *tokenizer(caption_of(scene), add_special_tokens=False).input_ids] for scene in scenes]
        length = max(map(len, rows)) + 1
        ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
        pixels = (torch.tensor(np.stack(images)) / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
        return clip(input_ids=ids, pixel_values=pixels.permute(0, 3, 1, 2)).logits_per_image

    scenes = [random_scene(rng, forbidden) for _ in range(8000)]
    images, heldout_images = ([np.asarray(picture(scene, rng)) for scene in some]
                              for some in (scenes, heldout_set))
    # A short warm-up or a higher rate ends in collapse, at a loss of ln(batch size).
    update = optimiser_for(clip, 7e-4, steps, warmup=.3)
    for step in range(1, steps + 1):
        chosen = rng.sample(range(len(scenes)), batch_size)
        logits = similarities([scenes[i] for i in chosen], [images[i] for i in chosen])
        truth = torch.arange(batch_size)
        loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        update(loss)
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                right = similarities(heldout_set, heldout_images).argmax(1) == torch.arange(len(heldout_set))
            print(f"clip, step {step} of {steps}: loss {loss:.3f}; finds the caption of "
                  f"{right.float().mean():.3f} of the held-out pictures, among {len(right)}", flush=True)
    clip.half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
        "resample": 3, "size": SIDE}, indent=2) + "\n")


def train_llama(folder, tokenizer, forbidden, heldout_set, seed, steps=4000, batch_size=32):
    """A Llama that has learned from text what TinyLlama has: to read its context, and to answer.

    (One that has only learned captions writes fluent ones whatever it is shown, at a fine-looking loss, and
    no projector mends that.) In the image's place stand facts about the scene: in words or, more often, as
    *soft* tokens, one vector a fact, the sum of its words' embeddings. For a projected patch says colour,
    shape and place in one vector; large models cope with that, this one must have met it. Scale, offset and
    noise make the sums unreliable, as a projector's will be.
    """
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=336, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        pad_token_id=2))
    # Larger than the usual 0.02, which a projector's first steps would shoot far past.
    llama.model.embed_tokens.weight.data.normal_(std=.5)
    reader = copy.deepcopy(tokenizer)  # in which <image> is one token, as it will be in the stages
    reader.add_tokens(["<image>"], special_tokens=True)
    image_id = reader.convert_tokens_to_ids("<image>")

    def word_ids(scene, place):
        ids = reader.convert_tokens_to_ids([f"▁{word}" for word in fact(scene, place)])
        assert all(ids), "a word of a fact is not one token"
        return ids

    def example(scene, soft):
        """Of each token: its id, its words' ids if soft (padded to four with 0), its weight in the loss."""
        text = reader.apply_chat_template(chat_about(scene, rng), tokenize=False)
        if not soft:
            text = text.replace("<image>", facts(scene, rng))
        answers = [match.span(1) for match in re.finditer(r"<\|assistant\|>\n(.*?</s>)", text)]
        encoding = reader(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = [1] + encoding.input_ids
        # Every answer weighs the same, however long: else captions, easily learned, would drown "It is red."
        answer_of = [next((n for n, (a, b) in enumerate(answers, 1) if a <= i < b), 0)
                     for i, _ in encoding.offset_mapping]
        weights = [0.] + [1 / answer_of.count(n) if n else 0. for n in answer_of]
        words = [[0] * 4] * len(ids)
        if soft:
            places = PLACES  # mostly all cells in reading order, as patches come; else some in any order
            if rng.random() < .4:
                empty = [place for place in PLACES if place not in scene]
                places = list(scene) + rng.sample(empty, rng.randint(0, len(empty)))
                rng.shuffle(places)
            at, count = ids.index(image_id), len(places)
            ids[at:at + 1], weights[at:at + 1] = [0] * count, [0.] * count
            words[at:at + 1] = [(word_ids(scene, place) + [0])[:4] for place in places]
        return ids, words, weights

    def collate(rows):
        length = max(len(row[0]) for row in rows)
        ids, words, weights = (torch.tensor([row[i] + [filler] * (length - len(row[i])) for row in rows])
                               for i, filler in enumerate((2, [0] * 4, 0.)))
        return ids, words, weights, torch.arange(length) < torch.tensor([[len(row[0])] for row in rows])

    def batches():
        while True:  # eight at a time, cut from examples sorted by length: that spares a third of the padding
            rows = [example(random_scene(rng, forbidden), rng.random() < .7) for _ in range(8 * batch_size)]
            rows.sort(key=lambda row: len(row[0]))
            yield from (collate(rows[i * batch_size:][:batch_size]) for i in rng.sample(range(8), 8))

    def forward(ids, words, noise=0.):
        embed, soft = llama.model.embed_tokens, words[..., 0] > 0
        strength = (words[soft] > 0).float()  # (F, 4) for F soft tokens in the batch
        if noise:
            strength = strength * (1 + .3 * noise * torch.randn(strength.shape))
        vectors = (embed(words[soft]) * strength[..., None]).sum(1)  # (F, 4, D) -> (F, D)
        if noise:  # scale and strengths are drawn once per example
            example_of, unit = soft.nonzero()[:, 0], noise * embed.weight.detach().std()
            scale, far, rough = torch.exp(.4 * noise * torch.randn(len(ids), 1)), *torch.rand(2, len(ids), 1)
            offset = .5 * unit * far * torch.randn(len(ids), WIDTH)
            grain = .7 * unit * rough[example_of] * torch.randn(vectors.shape)
            vectors = scale[example_of] * (vectors + offset[example_of] + grain)
        # No attention mask: padding is only on the right, where a causal model never looks.
        return llama(inputs_embeds=embed(ids).masked_scatter(soft[..., None], vectors)).logits

    update = optimiser_for(llama, 2e-3, steps, warmup=.1)
    for step, (ids, words, weights, real) in zip(range(1, steps + 1), batches()):
        logits = forward(ids, words, noise=min(1, 2 * step / steps))  # what is clear is learned first
        if step <= steps // 2:
            # At first every *token* weighs the same, so that the long captions lead: they teach to look up
            # things in the context, which short answers alone do not. Later they would drown "It is red."
            weights = (weights > 0).float()
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights.sum()
        # How a question goes on is mostly chance, so that it counts little; an answer can be known.
        rest = (real & (weights == 0) & (words[..., 0] == 0))[:, 1:]
        update(loss + .1 * losses[rest].mean())
        if step % 200 == 0 or step == steps:
            print(f"llama, step {step} of {steps}: loss on answers {loss:.3f}", end="")
            for form in ("words", "vectors"):
                ids, words, weights, _ = collate([example(s, form == "vectors") for s in heldout_set])
                with torch.no_grad():
                    right = forward(ids, words)[:, :-1].argmax(-1) == ids[:, 1:]
                share = (right * weights[:, 1:]).sum() / weights.sum()
                print(f"; held out, facts as {form}: {share:.4f} of an answer right", end="")
            print(flush=True)
            copy.deepcopy(llama).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(train, folder, seed=0):
    import torch
    torch.set_num_threads(1)  # so small a model gains little from a second thread: train both side by side
    rng = random.Random(seed)
    heldout_set = heldout_scenes(rng, 240)  # those of draw()
    forbidden = {combination(scene) for scene in heldout_set}
    train(folder, train_tokenizer(rng, forbidden), forbidden, heldout_set, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="toy/data", help="folder to draw into, replaced if there")
    parser.add_argument("--pretrain", action="store_true", help="train the stand-ins instead of drawing")
    parser.add_argument("--out-weights", type=Path, default="toy", help="for clip-vit/ and llama-chat/")
    args = parser.parse_args()
    if not args.pretrain:
        draw(args.out)
        print(f"drew {args.out}")
        return
    spawn = multiprocessing.get_context("spawn").Process
    trainings = [spawn(target=pretrain, args=(train_clip, args.out_weights / "clip-vit")),
                 spawn(target=pretrain, args=(train_llama, args.out_weights / "llama-chat"))]
    for training in trainings:
        training.start()
    for training in trainings:
        training.join()
    if any(training.exitcode for training in trainings):
        raise SystemExit("pretraining failed")


if __name__ == "__main__":
    main()
