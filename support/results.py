"""Saves and loads what the stages have trained: projector, adapter and run.json.

Loading is strict, as in pretrained.py. Weights are safetensors and the rest is JSON. (Only checkpoint.pt is a
pickle, which is loaded with weights_only=True.)
"""

import hashlib
import math
import os
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from data import ChatTemplate
from model import Llava
from support.devices import DTYPES, choose_device, choose_dtype
from support.errors import UserError, explain_errors
from support.files import atomic_write, delete, read_json, write_json
from support.pretrained import load_image_processor, load_language_model, load_vision_tower
from support.records import describe_records

# A projector translates from one layer of one vision tower to one LLM. It works with no others.
MODEL_SETTINGS = ("vision_tower", "vision_layer", "llm", "projector")
RESULT_FILES = ("projector.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")


def save_result(folder, stage, model, settings, progress, grounding, train_dataset, heldout_dataset,
                processes):
    """Writes projector.safetensors, adapter/ (if there is one, as plain peft writes it), and last run.json.
    Then deletes the checkpoint. Process 0 writes and the others wait for it. Raises UserError if the loss in
    `grounding`, which measure_grounding() returned, is not finite."""
    if not math.isfinite(grounding["loss"]):
        raise UserError("the held-out loss is not finite, so the result was not saved; try a lower --lr")
    if processes.rank == 0:
        with atomic_write(folder / "projector.safetensors") as temporary:
            save_file(model.projector.state_dict(), temporary)
        if hasattr(model.llm, "peft_config"):
            with atomic_write(folder / "adapter") as temporary:
                model.llm.save_pretrained(temporary)
        write_json(folder / "run.json", {
            "stage": stage, **{name: settings[name] for name in MODEL_SETTINGS},
            "template": train_dataset.template.template_hash, "checksums": result_checksums(folder),
            "steps": progress.step, "heldout": grounding, "settings": settings,
            "skipped_images": len(progress.skipped),  # those that process 0 could not decode
            "records": describe_records(train_dataset.records, heldout_dataset.records),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
        delete(folder / "checkpoint.pt")
    processes.barrier()


def result_checksums(folder):
    """Returns {name: checksum} of the result files of a stage."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in RESULT_FILES
            if (folder / name).is_file()}


def read_run(folder):
    """Returns run.json of a finished stage. Raises UserError if it is not finished, or a file is damaged."""
    run = read_json(Path(folder) / "run.json")
    if run is None:
        script = "stage2_instruct.py" if Path(folder).name == "stage2" else "stage1_align.py"
        raise UserError(f"{folder} holds no finished run: run python {script} --run {Path(folder).parent} "
                        "first")
    if not {"stage", "template", "settings", "records", "checksums", *MODEL_SETTINGS} <= set(run):
        raise UserError(f"{folder}/run.json is damaged, or an older version of this code wrote it: copy the "
                        "folder again, or train again with --restart")
    # One flipped bit changes the answers and raises no error.
    if run["checksums"] != result_checksums(Path(folder)):
        raise UserError(f"{folder} is damaged: a file is missing or has changed since it was written (one of "
                        f"{', '.join(RESULT_FILES)}): copy the folder again, or train again with --restart")
    return run


def read_matching_run(folder, settings):
    """Returns read_run(folder). Raises UserError if the run used another vision tower, layer, LLM or
    projector than `settings`."""
    run = read_run(folder)
    for name in MODEL_SETTINGS:
        if run[name] != getattr(settings, name):
            raise UserError(f"{folder} was trained for {name} {run[name]}, not {getattr(settings, name)}: "
                            f"use --{name.replace('_', '-')} {run[name]}, or another --run")
    return run


def check_same_template(run, template, folder):
    """Raises UserError if the run was trained with a different chat template."""
    if run["template"] != template.template_hash:
        raise UserError(f"{folder} was trained with a different chat template from the one now in "
                        f"{template.tokenizer.name_or_path}: restore the original template, or train again")


def load_projector(model, path):
    """Loads projector.safetensors into the model. Raises UserError if it does not fit exactly."""
    with explain_errors(f"load {path}, which must fit this projector"):
        model.projector.load_state_dict(load_file(path), strict=True)


def load_adapter(model, folder):
    """Adds a saved LoRA adapter to the model, frozen. Raises UserError if it does not fit exactly (peft
    itself only warns about missing tensors)."""
    with explain_errors(f"load the adapter in {folder}, which must fit the LLM"):
        # Other fields of the file are not used, because some of them would change the base weights.
        saved = read_json(Path(folder) / "adapter_config.json")
        model.add_lora(LoraConfig(r=saved["r"], lora_alpha=saved["lora_alpha"], task_type="CAUSAL_LM",
                                  target_modules=list(saved["target_modules"]), inference_mode=True))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        loaded = set_peft_model_state_dict(model.llm, tensors)
        wrong = loaded.unexpected_keys + [name for name in loaded.missing_keys if ".lora_" in name]
        if wrong:
            raise UserError(f"the adapter in {folder} does not fit the LLM: {len(wrong)} tensors are missing "
                            f"or unexpected, for example {wrong[0]}")


def load_trained(folder, device, dtype):
    """Returns (model, template, image_processor, run.json) of a finished stage, ready to answer."""
    run = read_run(folder)
    template, image_processor = ChatTemplate(run["llm"]), load_image_processor(run["vision_tower"])
    check_same_template(run, template, folder)
    vision_tower = load_vision_tower(run["vision_tower"], dtype)
    llm = load_language_model(run["llm"], dtype, device)
    with explain_errors(f"build the model of {folder}/run.json"):
        model = Llava(vision_tower, llm, template.image_token_id, run["projector"], run["vision_layer"])
    load_projector(model, Path(folder) / "projector.safetensors")
    if run["stage"] == 2:
        stage1, expected = Path(folder).parent / "stage1", run["settings"].get("stage1_checksum")
        if expected and result_checksums(stage1).get("projector.safetensors", expected) != expected:
            print(f"NOTE: {folder} was trained from another stage 1 than the one that is now in {stage1}: "
                  "train stage 2 again with --restart, or pass --stage 1")
        # W + (alpha / r)·B·A has the shape of W, so the adapter can be added to W once. The sum is computed
        # in fp32 and then rounded. Buffers are not rounded, because RoPE needs its frequencies in fp32.
        model.llm.float()
        load_adapter(model, Path(folder) / "adapter")
        model.llm = model.llm.merge_and_unload(safe_merge=True)
        for parameter in model.llm.parameters():
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval(), template, image_processor, run


def add_run_flags(parser, precision=None):
    """Adds the flags that all tools share: --run, --stage, --device, and --precision unless it is given."""
    parser.add_argument("--run", type=Path, default="runs/toy", help="folder of the run (default: runs/toy)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: 2 if it is finished, else 1")
    parser.add_argument("--device", default="auto")
    if precision:
        parser.set_defaults(precision=precision)
    else:
        parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto")


def load_run(args):
    """Returns what load_trained() returns of the stage that the flags name, and prints which one it is."""
    device = choose_device(args.device)
    stage = args.stage or (2 if os.path.exists(args.run / "stage2" / "run.json") else 1)
    folder = args.run / f"stage{stage}"
    *loaded, run = load_trained(folder, device, choose_dtype(args.precision, device))
    print(f"{folder}: {run['steps']:,} steps, {run['projector']} projector, "
          f"{'LoRA adapter' if run['stage'] == 2 else 'no adapter'}", file=sys.stderr)
    return *loaded, run
