"""Loads a finished stage, for the sanity check and the tools. Loading is strict, as in pretrained.py."""

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load

from data import ChatDataset, ChatTemplate
from model import Llava, count_patches
from support.devices import choose_device, choose_dtype
from support.errors import UserError, explain_errors
from support.files import find_file, read_json
from support.images import ImageStore
from support.pretrained import load_image_processor, load_language_model, load_vision_tower
from support.records import read_records, select_usable_records
from support.results import load_projector, read_result


def load_adapter(model, folder):
    """Adds a saved LoRA adapter to the model, frozen. Raises UserError if it does not fit exactly (peft
    itself only warns about missing tensors)."""
    with explain_errors(f"read the adapter in {folder}"):
        tensors = load((Path(folder) / "adapter_model.safetensors").read_bytes())
        saved = read_json(Path(folder) / "adapter_config.json")
        # Other fields of the file are not used, because some of them would change the base weights.
        config = LoraConfig(r=saved["r"], lora_alpha=saved["lora_alpha"], task_type="CAUSAL_LM",
                            target_modules=list(saved["target_modules"]), inference_mode=True)
    model.add_lora(config)
    with explain_errors(f"load the adapter in {folder}, which must fit the LLM"):
        loaded = set_peft_model_state_dict(model.llm, tensors)
    wrong = loaded.unexpected_keys + [name for name in loaded.missing_keys if ".lora_" in name]
    if wrong:
        raise UserError(f"the adapter in {folder} does not fit the LLM: {len(wrong)} tensors are missing "
                        f"or unexpected, for example {wrong[0]}")


def load_trained(folder, device=torch.device("cpu"), dtype=torch.float32):
    """Returns (model, template, image_processor, content of run.json) of a finished stage."""
    folder, saved = Path(folder), read_result(folder)
    vision_tower = load_vision_tower(saved["vision_tower"], dtype)
    image_processor = load_image_processor(saved["vision_tower"])
    llm = load_language_model(saved["llm"], dtype, device)
    template = ChatTemplate(saved["llm"], num_image_tokens=count_patches(vision_tower.config))
    model = Llava(vision_tower, llm, template.image_token_id, saved["projector"], saved["vision_layer"])
    load_projector(model, folder)
    if saved["stage"] == 2:
        # W + (alpha / r)·B·A has the shape of W, so the adapter can be added to W once. The sum is computed
        # in fp32 and then rounded. Buffers are not rounded, because RoPE needs its frequencies in fp32.
        model.llm.float()
        load_adapter(model, folder / "adapter")
        model.llm = model.llm.merge_and_unload(safe_merge=True)
        for parameter in model.llm.parameters():
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval(), template, image_processor, saved


def load_heldout_dataset(folder, template, image_processor, count=None):
    """Returns the ChatDataset of the records that a finished stage has held out, or of the first `count`.
    Records that have become unusable are left out and printed."""
    settings = read_result(folder)["settings"]
    images = settings["heldout_images"] or settings["images"]
    try:
        store = ImageStore(find_file(images))
    except UserError as error:
        raise UserError(f"{error}; {folder}/run.json names it as the place of the held-out images, relative "
                        "to the folder where the stage was started") from error
    records = read_records(Path(folder) / "heldout.json", store)
    records, _ = select_usable_records(records.subset(slice(count)), template, settings["max_length"],
                                       thorough=True, quiet=True)
    return ChatDataset(records, template, image_processor, settings["max_length"])


def load_run(args, stage=None):
    """Returns what load_trained() returns of the stage that the flags name, and prints which one it is."""
    device = choose_device(args.device)
    stage = stage or args.stage or (2 if os.path.exists(args.run / "stage2" / "run.json") else 1)
    folder = args.run / f"stage{stage}"
    *loaded, saved = load_trained(folder, device, choose_dtype(args.precision, device))
    print(f"{folder}: {saved['projector']} projector{' and LoRA adapter' * (saved['stage'] == 2)}, after "
          f"step {saved['steps']:,}", file=sys.stderr)
    return *loaded, saved
