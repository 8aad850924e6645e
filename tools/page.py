"""Writes one HTML page about a run: its training, what its patches say, and what happens if they are changed.

    python -m tools.page --run runs/toy         writes runs/toy/page.html

The page is a single file and needs neither a server nor a network. Losses, nearest tokens and the answers to
the first held-out record come from metrics.jsonl, which the stages wrote. All other answers are generated
here, with stage 2 of the run if it is finished, else with stage 1. The toy takes about 10 seconds. While a
stage goes on, python -m tools.loss_picture draws its losses.

A patch is erased by replacing its feature by the mean feature of many held-out patches. At real size, erasing
one of 256 patches changes little, and erasing each of them would take long. So patches are changed in
regions, at most 8 × 8 per image, which are squares or nearly so. For the toy, a region is one patch.
"""

import argparse
import base64
import io
import json
import math
import os
import re
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import IMAGE_TOKEN
from model import IGNORE_INDEX
from support.errors import UserError, run_script
from support.evaluation import generate_answers, prompt_batch, records_with_other_images, token_text
from support.files import atomic_write
from support.records import image_name
from support.results import read_result
from support.settings import INT_FROM_1, add_run_flags
from support.trained import load_heldout_dataset, load_run
from tools.evaluate import answer_questions, evenly_spaced, is_toy_caption, list_questions
from tools.loss_picture import read_lines
from toy.world import PLACES, answer_to, objects_in

MAX_SIDE = 8  # regions per row of an image
MAX_SCORED, MAX_SHOWN = 240, 8  # answers generated to count the correct ones; of these, shown of each sort


def read_metrics(folder):
    """Returns (training, evaluations) of a stage: the lines of its metrics.jsonl of both kinds, as dicts."""
    lines = read_lines(folder)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "heldout_loss" in line]
    if not evaluations:
        raise UserError(f"{folder}/metrics.jsonl is missing or has no evaluation: copy it from where the "
                        "stage was trained")
    return training, evaluations


def image_url(pixel_values, image_processor):
    """Returns what the model sees, (3, S, S) with the normalization undone, as a data: URL; None for None."""
    if pixel_values is None:
        return None
    pixels = pixel_values.float().cpu().numpy().transpose(1, 2, 0)  # (S, S, 3)
    pixels = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    file = io.BytesIO()
    Image.fromarray((pixels * 255).round().clip(0, 255).astype("uint8")).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def split_text(template, ids):
    """Returns the text that each token adds to the tokens before it. A character that several tokens spell is
    the text of the last one, and the others have none."""
    pieces, length = [], 0
    for t in range(1, len(ids) + 1):
        text = template.tokenizer.decode(ids[:t], clean_up_tokenization_spaces=False)
        complete = t == len(ids) or not text.endswith("\ufffd")
        pieces.append(text[length:] if complete else "")
        length += len(pieces[-1])
    return pieces


def describe_stage(folder, saved, dataset):
    """Returns what the page shows of one stage: its curves, and its first held-out record."""
    training, evaluations = read_metrics(folder)
    ids, labels = dataset.template.encode_record(dataset.records[0], dataset.max_length)
    count = ids.count(dataset.template.image_token_id)
    tokens = []
    for i, (text, label) in enumerate(zip(split_text(dataset.template, ids), labels)):
        if ids[i] != dataset.template.image_token_id:
            tokens.append([text, label != IGNORE_INDEX])
        elif ids[i - 1] != ids[i]:  # the first of the image positions stands for all of them
            tokens.append([f"{IMAGE_TOKEN}×{count}", False])
    prompt, reference = dataset.make_prompt(0)
    return {"name": f"stage {saved['stage']}", "steps": saved["steps"], "training": training,
            "evaluations": evaluations, "tokens": tokens, "reference": reference,
            "picture": image_url(prompt["pixel_values"], dataset.image_processor)}


@contextmanager
def features_replaced(model, features):
    """Lets the model see `features`, (I, N, D), in place of those of its images."""
    model.encode_images = lambda pixel_values: features  # hides the method of the class
    try:
        yield
    finally:
        del model.encode_images


def find_regions(num_patches):
    """Returns which patches each region holds, (N, R) of 0 and 1, and the sizes of the rows of regions, in
    patches. The columns have the same sizes. Regions are counted in reading order."""
    side = math.isqrt(num_patches)
    count = min(side, MAX_SIDE)
    row = torch.arange(side) * count // side  # (G,): the row of regions in which each row of patches lies
    region = row[:, None] * count + row  # (G, G)
    return F.one_hot(region.flatten()), row.bincount().tolist()


def replace_each(features, replacement, regions):
    """Returns (R, N, D): the features, (N, D), with one region replaced in each copy."""
    return torch.where(regions.T.bool()[:, :, None].to(features.device), replacement, features)


def shuffle_picture(pixel_values, order):
    """Returns the image, (3, S, S), with patch order[i] in the place of patch i."""
    side = math.isqrt(len(order))
    size = pixel_values.shape[-1] // side  # of a patch, in pixels
    patches = F.unfold(pixel_values[None], size, stride=size)  # (1, 3 · size², N)
    return F.fold(patches[:, :, order], size * side, size, stride=size)[0]


def generate_with(model, template, prompt, features, args):
    """Returns the answers to one prompt, one for each of the features, (B, N, D)."""
    answers = []
    for part in features.split(args.batch_size):
        with features_replaced(model, part):
            prompts = [prompt] * len(part)
            answers += generate_answers(model, template, prompts, args.max_new_tokens)
    return answers


@torch.no_grad()
def token_probabilities(model, template, prompt, answer_ids):
    """Returns how sure the model is of each token of an answer, as a list of tuples: the token's text, its
    probability, and text and probability of the most likely other token.

    One pass over prompt and answer computes them all, because in a causal model the output at position t - 1,
    which predicts token t, does not depend on what follows.
    """
    batch = prompt_batch(template, [prompt], model.llm.device)
    answer = torch.tensor([answer_ids], device=model.llm.device)  # (1, A)
    input_ids = torch.cat([batch["input_ids"], answer], dim=1)  # (1, T + A)
    embeds = model.embed(input_ids, batch["pixel_values"])  # (1, T + A, D)
    hidden = model.llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = model.llm.get_output_embeddings()(hidden[0, -answer.shape[1] - 1:-1])  # (A, D) -> (A, V)
    probabilities = logits.float().softmax(dim=-1)
    rows = []
    for i, row in zip(answer_ids, probabilities):  # row: (V,)
        p = row[i].item()
        row[i] = -1  # so that max() finds another token
        rows.append((token_text(template, i), p, token_text(template, int(row.argmax())), row.max().item()))
    return rows


@torch.no_grad()
def effect_on_tokens(model, prompt_ids, answer_ids, features, changed, batch_size):
    """Returns by how much log p of each answer token falls if the features are changed: (T, R). Each is
    predicted from the same tokens before it, those of `answer_ids`."""
    ids = torch.tensor([prompt_ids + answer_ids], device=features.device)  # (1, P + T)
    labels = torch.tensor([[IGNORE_INDEX] * len(prompt_ids) + answer_ids], device=features.device)
    losses = []
    for part in torch.cat([features[None], changed]).split(batch_size):
        with features_replaced(model, part):
            repeated = {"input_ids": ids.repeat(len(part), 1), "labels": labels.repeat(len(part), 1)}
            losses.append(model(**repeated, pixel_values=None, attention_mask=None).view(len(part), -1))
    losses = torch.cat(losses)  # (1 + R, T)
    return (losses[1:] - losses[0]).T


@torch.no_grad()
def attention_to_regions(model, prompt_ids, answer_ids, features, regions):
    """Returns how strongly each answer token attends to each region, (T, R), and the layer.

    The position *before* a token predicts it, so that position's weights are used. They are added up over the
    patches of a region and averaged over the heads of one layer: the layer, counted from 1, whose weights
    differ most from token to token. """
    ids = torch.tensor([prompt_ids + answer_ids], device=features.device)  # (1, P + T)
    with features_replaced(model, features[None]):
        inputs_embeds = model.embed(ids, None)
    usual = model.llm.config._attn_implementation  # "sdpa" or "expanded", which never store the weights
    model.llm.set_attn_implementation("eager")
    weights = model.llm.get_decoder()(inputs_embeds=inputs_embeds, output_attentions=True,
                                      use_cache=False).attentions  # L × (1, heads, P + T, P + T)
    model.llm.set_attn_implementation(usual)
    before = slice(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(answer_ids))
    image = (ids[0] == model.image_token_id).nonzero().squeeze(1)  # (N,)
    maps = torch.stack([w[0].float().mean(dim=0)[before][:, image] for w in weights])  # (L, T, N)
    maps = maps @ regions.to(maps)  # (L, T, R)
    layer = (maps - maps.mean(dim=1, keepdim=True)).abs().sum(dim=(1, 2)).argmax().item()
    return maps[layer], layer + 1


def choose_questions(dataset, count):
    """Returns `count` questions about images, one of each kind before a second one of any kind. Kinds with
    the most different reference answers come first."""
    questions = [q for q in list_questions(dataset)
                 if image_name(dataset.records[q.record]) is not None]
    kinds = [[q for q in questions if q.kind == kind] for kind in {q.kind for q in questions}]
    kinds.sort(key=lambda asked: (-len({q.reference for q in asked}), asked[0].kind))
    chosen = [(kinds[i % len(kinds)], i) for i in range(min(count, len(questions)))]
    # The k-th of the `count` questions is taken k / count of the way through the records.
    return list(dict.fromkeys(asked[i * len(asked) // len(chosen)] for asked, i in chosen))


@torch.no_grad()
def mean_feature(model, dataset, device, count=64):
    """Returns the mean image feature, (D,), over all patches of held-out images."""
    records = [dataset.records[i] for i in evenly_spaced(range(len(dataset)), count)]
    images = [pixels for record in records if (pixels := dataset.load_pixel_values(record)) is not None]
    return torch.stack([model.encode_images(image[None].to(device))[0].mean(dim=0)
                        for image in images]).mean(dim=0)


def expected_answers(text, scene, second, num_regions):
    """Returns the correct answers to a question about the toy world: (unchanged, erased, copied), the latter
    two as lists with one answer per region. "" means that the question has no correct answer any more. If
    scene or second, {place: (color, shape)} of both images, is None, all answers are None."""
    if scene is None or second is None or num_regions != len(PLACES):
        return None, [None] * num_regions, [None] * num_regions

    def answer(place=None, thing=None):
        changed = {**scene, place: thing}
        return answer_to({place: changed[place] for place in PLACES if changed.get(place)}, text) or ""

    return (answer(), [answer(place) for place in PLACES],
            [answer(place, second.get(place)) for place in PLACES])


def describe_question(model, template, dataset, question, mean, scenes, args):
    """Returns what the page shows of one question: the answers to all changes of its image, the expected
    answers, and for each token of the answer the attention to each region and the effect of erasing it."""
    records, device = dataset.records, mean.device
    regions, _ = find_regions(model.num_image_tokens)  # (N, R)
    num_regions, scene = regions.shape[1], scenes.get(image_name(records[question.record]))
    # Patches are copied from one of the next 20 pictures: from the one that leads to most correct answers
    # that erasing does not lead to. Without known correct answers, this is the first.
    others = records_with_other_images(records, question.record, count=20)
    expected = [expected_answers(question.text, scene, scenes.get(image_name(other)), num_regions)
                for other in others]
    best = max(range(len(others)), key=lambda i: len(set(expected[i][2]) - set(expected[i][1])))
    second, (unchanged, if_erased, if_copied) = others[best], expected[best]
    prompt, _ = dataset.make_prompt(question.record, question.turn)
    images = torch.stack([prompt["pixel_values"], dataset.load_pixel_values(second)])  # (2, 3, S, S)
    with torch.no_grad():
        features, second_features = model.encode_images(images.to(device))  # (N, D) each
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(question.record))
    erased = replace_each(features, mean, regions)  # (R, N, D)
    copied = replace_each(features, second_features, regions)  # (R, N, D)

    variants = torch.cat([features[None], features[None, order], erased, copied])
    answer, shuffled, *changed = generate_with(model, template, prompt, variants, args)
    ids = model.generate(**prompt_batch(template, [prompt], device), end_token_ids=template.end_token_ids,
                         max_new_tokens=args.max_new_tokens)[0].tolist()
    ids = list(takewhile(lambda i: i not in template.end_token_ids, ids))
    described = {
        "picture": image_url(images[0], dataset.image_processor),
        "second": image_url(images[1], dataset.image_processor),
        "shuffled_picture": image_url(shuffle_picture(images[0], order), dataset.image_processor),
        "question": question.text, "reference": question.reference, "answer": [answer, unchanged],
        "shuffled": [shuffled, unchanged],
        "probabilities": token_probabilities(model, template, prompt, ids) if ids else [],
        "erased": list(zip(changed[:num_regions], if_erased)),
        "copied": list(zip(changed[num_regions:], if_copied)), "tokens": split_text(template, ids)}
    if ids:
        attention, layer = attention_to_regions(model, prompt["input_ids"], ids, features, regions)
        effect = effect_on_tokens(model, prompt["input_ids"], ids, features, erased, args.batch_size)
        both = torch.stack([attention.flatten(), effect.flatten()])
        tensors = {"attention": attention, "effect": effect, "correlation": torch.corrcoef(both)[0, 1]}
        described |= {name: torch.round(tensor.cpu().double(), decimals=3).tolist()
                      for name, tensor in tensors.items()} | {"layer": layer}
    return described


def describe_answers(model, template, dataset, args):
    """Returns held-out questions with the generated and the reference answer: some of those that equal the
    reference answer and some that do not. If no question has one correct answer, few are generated."""
    questions = list_questions(dataset)
    scored = [q for q in questions if q.kind or is_toy_caption(q.reference)]
    asked = evenly_spaced(scored or questions, MAX_SCORED if scored else MAX_SHOWN)
    answers = answer_questions(model, template, dataset, asked, args.batch_size, args.max_new_tokens)
    pairs = list(zip(asked, answers))
    equal = [(question, answer) for question, answer in pairs if answer == question.reference]
    different = [pair for pair in pairs if pair not in equal]
    shown = [{"picture": image_url(dataset.load_pixel_values(dataset.records[question.record]),
                                   dataset.image_processor),
              "question": question.text, "answer": answer, "reference": question.reference}
             for question, answer in evenly_spaced(different, MAX_SHOWN) + evenly_spaced(equal, MAX_SHOWN)]
    return {"shown": shown, "asked": len(asked), "equal": len(equal)}


def describe_run(args, model, template, image_processor, saved):
    """Returns everything that the page shows, as one value that can be written as JSON."""
    last, device = saved["stage"], model.llm.device
    stages, answers, scenes = [], [], {}
    for stage in range(1, last + 1):
        folder = args.run / f"stage{stage}"
        try:
            saved = read_result(folder)
            dataset = load_heldout_dataset(folder, template, image_processor)
        except UserError as error:
            if stage == last:
                raise
            print(f"stage {stage} is left out, because it cannot be read: {error}")
            continue
        stages.append(describe_stage(folder, saved, dataset))
        answers.append({"name": f"records of stage {stage}, answered after stage {last}",
                        **describe_answers(model, template, dataset, args)})
        scenes |= {image_name(dataset.records[question.record]):
                   {place: (color, shape) for color, shape, place in objects_in(question.reference)}
                   for question in list_questions(dataset) if is_toy_caption(question.reference)}
    mean = mean_feature(model, dataset, device)
    questions = [describe_question(model, template, dataset, question, mean, scenes, args)
                 for question in choose_questions(dataset, args.questions)]
    return {"run": args.run.name, "stage": last, "stages": stages, "questions": questions, "answers": answers,
            "patches": model.num_image_tokens, "regions": find_regions(model.num_image_tokens)[1]}


def make_page(described):
    """Returns the HTML of the page, with its style, its script and the results inside. JSON has no NaN, so a
    number that is not finite becomes null. A "</script>" in the results would end the script, so "<" is
    written as an escape sequence of JSON."""
    html, css, js = (Path(__file__).with_suffix(ending).read_text(encoding="utf-8")
                     for ending in (".html", ".css", ".js"))
    described = json.loads(json.dumps(described), parse_constant=lambda name: None)
    data = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c").encode("utf-8", "replace").decode("utf-8")
    before, after_css, after_data, end = re.split("PAGE_CSS|PAGE_DATA|PAGE_JS", html)
    return before + css + after_css + data + after_data + js + end


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    parser.add_argument("--out", type=Path, metavar="HTML", help="file to write (default: <run>/page.html)")
    parser.add_argument("--questions", type=INT_FROM_1, default=5, help="questions whose image is changed "
                        "(default: 5); at real size, each takes more than 100 answers")
    parser.add_argument("--batch-size", type=INT_FROM_1, default=32, help="answers per batch (default: 32)")
    parser.add_argument("--max-new-tokens", type=INT_FROM_1, default=64, help="longest answer in tokens")
    args = parser.parse_args()
    path = args.out or args.run / "page.html"
    if args.out and not os.access(path.absolute().parent, os.W_OK):  # else it would fail after minutes
        raise UserError(f"cannot write {path}: name a file in a writable folder")
    html = make_page(describe_run(args, *load_run(args)))
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    print(f"wrote {path} ({path.stat().st_size / 1000:,.0f} kB): open it in a browser")


if __name__ == "__main__":
    run_script(main)
