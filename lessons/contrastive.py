"""A CLIP with random weights learns from pictures with captions, as toy/clip-vit did. In each step,
every one of B = 64 pictures has to choose its caption among B, and every caption its picture:

    s_ij = exp(t) · cos(u_i, v_j)        similarity of picture i (u_i) and caption j (v_j)
    loss = mean over i of  −½ (log softmax_j(s_ij) + log softmax_j(s_ji))  at j = i

u and v are the outputs of the two towers, and the number t is trained, too."""

import random

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from lessons import experiment
from lessons.toy_parts import PRESETS
from support.pretrained import load_tokenizer
from toy.pretrain import draw_pictures, fit_clip, new_clip, similarities, to_pixel_values
from toy.world import COLORS, PLACES, SHAPES, heldout_scenes, random_scene

MINUTES, DIFFICULTY, CHANGE = 4, "hard", ["probe"]
EXPECTED = """At first a picture finds its caption by chance, and after the training most do. The loss reads
only the class token, so the patches are trained only through attention. Even so, their colors and shapes
become easier to read. A linear classifier that is fitted to many pictures, however, reads them nearly as well
from random weights, because a random tower loses little of what the pixels contain."""
MEASURES = """Only a CLIP is trained here and no LLaVA, for 150 steps of 64 pairs, while toy/clip-vit took 700
steps of 192. "finds its caption" is the fraction of the 240 held-out pictures whose correct caption has the
highest similarity among all 240, where chance is 0.004. A probe is a linear classifier that reads the color
(or shape) of an object from the feature of its patch. It is fitted to 100 or 1,000 training pictures, and its
accuracy is measured on held-out ones, where chance is 0.17."""
MEANING = """After 150 steps, more than half of the pictures find their caption among 240, and after the 700
steps of toy/clip-vit, nearly all do. The training makes color easier to read from a patch, so that 100
pictures are enough for a classifier, while shape needs the longer training. If they are fitted to 1,000
pictures, however, the classifiers are right in about nine of ten cases even on random weights. So a good
score of a classifier shows that a feature contains the information, not that training put it there."""

HELDOUT = 240  # pictures
PICTURES = 4000
PROBED = (100, 1000)  # pictures that a probe is fitted to


def patches_of_objects(clip, scenes, images):
    """Returns the features of the P patches that show an object, (P, D_v), and the numbers of their colors
    and shapes, {"color": (P,), "shape": (P,)}. The features are those that LLaVA reads."""
    states = clip.vision_model(to_pixel_values(images), output_hidden_states=True).hidden_states
    z_v = states[PRESETS[1]["vision_layer"]][:, 1:]  # (I, 1 + N, D_v) -> (I, N, D_v)
    objects = [(i, PLACES.index(place), *thing) for i, scene in enumerate(scenes)
               for place, thing in scene.items()]
    image, place, colors, shapes = zip(*objects)
    labels = {"color": [list(COLORS).index(color) for color in colors],
              "shape": [list(SHAPES).index(shape) for shape in shapes]}
    return z_v[list(image), list(place)], {name: torch.tensor(of) for name, of in labels.items()}


def probe(features, labels, heldout_features, heldout_labels):
    """Returns the accuracy of a linear classifier, argmax of W·x + b, on held-out patches. W and b are those
    that minimize the squared error of the outputs, 1 for the correct class and 0 for the others."""
    features, heldout_features = (F.pad(x, (0, 1), value=1.0) for x in (features, heldout_features))  # for b
    weights = torch.linalg.lstsq(features, F.one_hot(labels).float()).solution  # (D_v + 1, classes)
    return ((heldout_features @ weights).argmax(1) == heldout_labels).float().mean().item()


@torch.no_grad()
def evaluate(clip, tokenizer, training, heldout):
    """Returns the fraction of held-out pictures that choose their caption, and the accuracy of linear probes
    that are fitted to few and to many pictures. `training` and `heldout` are (scenes, images)."""
    correct = similarities(clip, tokenizer, *heldout).argmax(1) == torch.arange(len(heldout[0]))
    measured = {"finds its caption": correct.float().mean().item()}
    heldout_features, heldout_labels = patches_of_objects(clip, *heldout)
    for count in PROBED:
        features, labels = patches_of_objects(clip, *(part[:count] for part in training))
        for name in labels:
            measured[f"{name}, probe on {count:,} pictures"] = probe(
                features, labels[name], heldout_features, heldout_labels[name])
    return measured


def run(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer, *_ = load_tokenizer(PRESETS[1]["llm"])
    heldout_set = heldout_scenes(random.Random(0), HELDOUT)  # those that toy/clip-vit has not seen
    for_probes = [random_scene(rng, heldout_set) for _ in range(max(PROBED))]
    training, heldout = ((scenes, draw_pictures(scenes, rng))
                         for scenes in (for_probes, list(heldout_set.values())))
    clip = new_clip(tokenizer)
    results = {"random weights (baseline)": evaluate(clip, tokenizer, training, heldout)}
    fit_clip(clip, tokenizer, heldout_set, rng, experiment.STEPS["clip"], batch_size=64, pictures=PICTURES)
    results["trained"] = evaluate(clip, tokenizer, training, heldout)
    clip = CLIPModel.from_pretrained(PRESETS[1]["vision_tower"], dtype=torch.float32)
    results["toy/clip-vit"] = evaluate(clip, tokenizer, training, heldout)
    return results
