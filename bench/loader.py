"""Does the loader keep up? Pictures per second of one worker, and how long a step waits for its data.

There is nothing to run in this file; see bench.py (--only loader). The pictures are made here, gradients with
noise, so that they decode like photos: 224 × 224 as in LLaVA-CC3M-Pretrain-595K, about 15 KB each, from a
zip; 640 × 480 as in COCO, about 70 KB, from a folder.
"""

import argparse
import io
import json
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_scale import write_chat_json
from hours import TFLOPS, UTILISATION, flops_per_sample
from sides import ROOT, Ours, build_ours

from data import ChatDataset, ChatTemplate
from loading import Windows, keep_usable
from pixels import ImageProcessor
from plumbing import Processes
from storage import ImageStore, Records

CLIP_PROCESSOR = {  # CLIP ViT-L/14's preprocessor_config.json, but for the size of the geometry's images
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def jpeg(width, height, rng):
    """A picture's bytes: soft gradients, and noise of which JPEG makes a photo's number of bytes."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(rng.uniform(2, 12) * x + rng.uniform(2, 12) * y + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 128 + 80 * np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def make_pictures(folder, names, rng):
    """The same names in images.zip (224 × 224) and in photos/ (640 × 480); returns mean sizes in bytes."""
    (folder / "photos").mkdir()
    small, large = [[jpeg(*size, rng) for _ in range(20)] for size in ((224, 224), (640, 480))]
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, small[i % 20])
            (folder / "photos" / name).write_bytes(large[i % 20])
    return [sum(map(len, pictures)) / 20 for pictures in (small, large)]


def pictures_per_second(store, process, names, seconds):
    """How many pictures one process opens, decodes and prepares in a second."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        name = names[count % len(names)]
        process(store.open({"id": name}, name))
        count += 1
    return count / (time.perf_counter() - started)


def waiting(args, shape, folder, image_processor):
    """The share of stage 1's time in which the loop waits for data: the stages' own Windows, ours alone.

    The toy world's tokenizer, which knows few of the captions' words, makes sequences of the usual length all
    the same. Its image id is inside the geometry's vocabulary, and is the model's here.
    """
    template = ChatTemplate(ROOT / "toy" / "llama-chat")
    records, images = Records(folder / "chat.json"), ImageStore(folder / "images.zip")
    parts = (template, image_processor, shape.image_tokens, 2048)
    dataset = ChatDataset(records, images, np.arange(len(records)), *parts)
    keep_usable(dataset, share_allowed=0)
    size = args.batch_size[1]
    steps = 2 if args.quick else 6
    # Two workers, as in the tinyllama preset.
    settings = argparse.Namespace(
        batch_size=size, grad_accum=args.window[1] // size, epochs=1, max_steps=steps + 1, seed=0, workers=2
    )
    model = build_ours(shape, 1, args.device, args.dtype)
    model.image_token_id = template.image_token_id
    side = Ours(model, args.device, args.dtype)
    waited, started, samples = 0.0, None, 0
    windows = Windows(dataset, settings, template.tokenizer.pad_token_id, Processes(args.device))
    for window in windows:
        if started is None:  # the first window: the workers start, the model warms up
            side.step(window.batches)
            started = time.perf_counter()
            continue
        waited += window.waited
        side.step(window.batches).item()  # .item() waits for a GPU to be done
        samples += window.size
    seconds = time.perf_counter() - started
    return waited / seconds, samples / seconds


def loader(args, shape, result):
    """The section; `result` holds those before it, for the samples per second that stage 1 and 2 make."""
    rng = np.random.default_rng(0)
    names = [f"GCC_train_{i:09d}.jpg" for i in range(1024)]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sizes = make_pictures(folder, names, rng)
        write_chat_json(folder / "chat.json", len(names))
        edge = shape.vision.image_size
        config = {**CLIP_PROCESSOR, "size": edge, "crop_size": edge, "do_center_crop": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
        image_processor = ImageProcessor(folder)
        seconds = 2 if args.quick else 6
        for name, place, size in zip(("zip_224", "folder_640x480"), ("images.zip", "photos"), sizes):
            rate = pictures_per_second(ImageStore(folder / place), image_processor, names, seconds)
            figures[name] = {"per_second_and_worker": rate, "mean_kb": size / 1e3}
            print(f"  {name:<16}{rate:6.0f} pictures/s per worker, of {size / 1e3:.0f} KB each", flush=True)
        share, rate = waiting(args, shape, folder, image_processor)
    figures["waiting_share"], figures["stage1_samples_per_s"] = share, rate
    print(f"  stage 1 with two workers: {rate:.2f} samples/s, {share:.2%} of the time waiting for data")
    for stage, name in (("stage1", "zip_224"), ("stage2", "folder_640x480")):
        if stage in result:
            need = result[stage]["samples_per_s"]["ours" if stage == "stage1" else "alone"]
            workers = need / figures[name]["per_second_and_worker"]
            print(f"  {stage} takes {need:.3g} samples/s here ({args.geometry}): {workers:.2f} workers' work")
    for stage in (1, 2):
        need = UTILISATION * 1e12 * TFLOPS["A100"] / flops_per_sample(stage)
        print(f"  stage {stage} at full geometry would take {need:.0f} samples/s on an A100 (see hours.py)")
    return figures
