"""Saves and loads what a stage has trained: projector and adapter as safetensors, and run.json."""

import shlex
from pathlib import Path

import torch
import transformers
from safetensors.torch import load, save_file

from support.errors import UserError, explain_errors
from support.files import atomic_write, delete, read_json, write_json
from support.metrics_log import format_metrics

# A projector translates from one layer of one vision tower to one LLM. It works with no others.
MODEL_SETTINGS = ("vision_tower", "vision_layer", "llm", "projector")


def save_result(stage_folder, model, progress, metrics):
    """Writes projector.safetensors, adapter/ (if there is one, as plain peft writes it), and last run.json.
    Then deletes the checkpoint. Rank 0 writes and the others wait for it.

    Args: stage_folder: a StageFolder. metrics: what measure_heldout() returned after the last step.
    Raises UserError if a trained weight is not finite.
    """
    if not all(parameter.isfinite().all() for parameter in model.trainable_parameters().values()):
        raise UserError("trained weights are not finite, so the result was not saved; try a lower --lr")
    if stage_folder.processes.rank == 0:
        with atomic_write(stage_folder.path / "projector.safetensors") as temporary:
            save_file(model.projector.state_dict(), temporary)
        if hasattr(model.llm, "peft_config"):
            with atomic_write(stage_folder.path / "adapter") as temporary:
                model.llm.save_pretrained(temporary, save_embedding_layers=False)
        gpu = torch.cuda.get_device_name() if stage_folder.processes.device.type == "cuda" else None
        write_json(stage_folder.path / "run.json", {
            "stage": stage_folder.stage, **{name: stage_folder.settings[name] for name in MODEL_SETTINGS},
            "steps": progress.steps_taken, "heldout": metrics, "settings": stage_folder.settings,
            "skipped": progress.skipped,  # records that turned out to be unusable
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "gpu": gpu}})
        delete(stage_folder.path / "checkpoint.pt")
    stage_folder.processes.barrier()
    print(f"before: {format_metrics(progress.first_metrics)}\nafter:  {format_metrics(metrics)}\n"
          f"saved in {stage_folder.path}")


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


def find_stage1(args):
    """Returns the folder of stage 1. Raises UserError if it is not finished, or if it was trained with
    another vision tower, layer, LLM or projector than those of `args`."""
    folder = Path(args.run) / "stage1"
    saved = read_result(folder, args.preset)
    for name in MODEL_SETTINGS:
        if saved[name] != getattr(args, name):
            raise UserError(f"{folder} was trained for {name} {saved[name]}, not {getattr(args, name)}: "
                            f"use --{name.replace('_', '-')} {saved[name]}, or another --run")
    return folder


def load_projector(model, folder):
    """Loads projector.safetensors into the model. Raises UserError if it does not fit exactly."""
    path = Path(folder) / "projector.safetensors"
    with explain_errors(f"load {path}, which must fit this projector"):
        model.projector.load_state_dict(load(path.read_bytes()), strict=True)
