"""Saves and loads what the stages have trained: projector, adapter and run.json.

Loading is strict, as in pretrained.py. Weights are safetensors and the rest is JSON. (Only checkpoint.pt is a
pickle, which is loaded with weights_only=True.)
"""

import hashlib
import os
import shlex
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load, save_file

from data import ChatTemplate
from model import Llava
from support.devices import DTYPES, choose_device, choose_dtype
from support.errors import UserError, explain_errors
from support.files import atomic_write, delete, read_json, write_json
from support.metrics_log import format_image_use
from support.pretrained import load_image_processor, load_language_model, load_vision_tower

# A projector translates from one layer of one vision tower to one LLM. It works with no others.
MODEL_SETTINGS = ("vision_tower", "vision_layer", "llm", "projector")


def save_result(folder, stage, model, progress, image_use):
    """Writes projector.safetensors, adapter/ (if there is one, as plain peft writes it), and last run.json.
    Then deletes the checkpoint. Process 0 writes and the others wait for it.

    Args: folder: a StageFolder. image_use: what measure_image_use() returned after the last step.
    Raises UserError if a trained weight is not finite.
    """
    if not all(parameter.isfinite().all() for parameter in model.trainable_parameters().values()):
        raise UserError("trained weights are not finite, so the result was not saved; try a lower --lr")
    if folder.processes.rank == 0:
        with atomic_write(folder.path / "projector.safetensors") as temporary:
            save_file(model.projector.state_dict(), temporary)
        if hasattr(model.llm, "peft_config"):
            with atomic_write(folder.path / "adapter") as temporary:
                model.llm.save_pretrained(temporary, save_embedding_layers=False)
        gpu = torch.cuda.get_device_name() if folder.processes.device.type == "cuda" else None
        write_json(folder.path / "run.json", {
            "stage": stage, **{name: folder.settings[name] for name in MODEL_SETTINGS},
            "steps": progress.step, "heldout": image_use, "settings": folder.settings,
            "skipped": progress.skipped,  # images that process 0 could not decode
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "gpu": gpu}})
        delete(folder.path / "checkpoint.pt")
    folder.processes.barrier()
    print(f"before: {format_image_use(progress.before)}\nafter:  {format_image_use(image_use)}\n"
          f"saved in {folder.path}")


def read_result(folder, preset=None):
    """Returns run.json of a finished stage. Raises UserError if it is not finished."""
    folder = Path(folder)
    saved = read_json(folder / "run.json")
    if saved is None:
        if folder.parent.name in ("stage1", "stage2"):
            raise UserError(f"pass --run {shlex.quote(str(folder.parents[1]))}, the folder of the run")
        script = "stage2_instruct.py" if folder.name == "stage2" else "stage1_align.py"
        words = ["python", script, *(["--preset", preset] if preset else []), "--run", str(folder.parent)]
        raise UserError(f"{folder} holds no finished run: train it first, with {shlex.join(words)} and the "
                        "flags of your preset, data and models")
    if not {"stage", "settings", *MODEL_SETTINGS} <= set(saved):
        raise UserError(f"{folder}/run.json is damaged, or an older version of this code wrote it: copy the "
                        "folder again, or train again with --restart")
    return saved


def read_stage1(args):
    """Returns (folder of stage 1, a hash of its projector). Raises UserError if it is not finished, or if
    it was trained with another vision tower, layer, LLM or projector than those of `args`."""
    folder = Path(args.run) / "stage1"
    saved = read_result(folder, args.preset)
    for name in MODEL_SETTINGS:
        if saved[name] != getattr(args, name):
            raise UserError(f"{folder} was trained for {name} {saved[name]}, not {getattr(args, name)}: "
                            f"use --{name.replace('_', '-')} {saved[name]}, or another --run")
    with explain_errors(f"read {folder}/projector.safetensors"):
        return folder, hashlib.sha256((folder / "projector.safetensors").read_bytes()).hexdigest()[:16]


def load_projector(model, folder):
    """Loads projector.safetensors into the model. Raises UserError if it does not fit exactly."""
    path = Path(folder) / "projector.safetensors"
    with explain_errors(f"load {path}, which must fit this projector"):
        model.projector.load_state_dict(load(path.read_bytes()), strict=True)


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


def load_trained(folder, device, dtype):
    """Returns (model, template, image_processor, content of run.json) of a finished stage."""
    folder, saved = Path(folder), read_result(folder)
    template, image_processor = ChatTemplate(saved["llm"]), load_image_processor(saved["vision_tower"])
    vision_tower = load_vision_tower(saved["vision_tower"], dtype)
    llm = load_language_model(saved["llm"], dtype, device)
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


def add_run_flags(parser, precision=None):
    """Adds the flags that all tools share: --run, --stage, --device, and --precision unless it is given."""
    parser.add_argument("--run", type=Path, default="runs/toy", help="folder of the run (default: runs/toy)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: 2 if it is finished, else 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, … (default: auto)")
    if precision:
        parser.set_defaults(precision=precision)
    else:
        parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto",
                            help="of frozen weights and matrix products (default: auto)")


def load_run(args):
    """Returns what load_trained() returns of the stage that the flags name, and prints which one it is."""
    device = choose_device(args.device)
    stage = args.stage or (2 if os.path.exists(args.run / "stage2" / "run.json") else 1)
    folder = args.run / f"stage{stage}"
    *loaded, saved = load_trained(folder, device, choose_dtype(args.precision, device))
    print(f"{folder}: {saved['projector']} projector{' and LoRA adapter' * (saved['stage'] == 2)}, after "
          f"step {saved['steps']:,}", file=sys.stderr)
    return *loaded, saved
