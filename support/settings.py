"""The command line: every setting of a stage's presets is a flag."""

import argparse
import math
import shlex
from pathlib import Path

from support.devices import DTYPES
from support.errors import UserError
from support.files import find_file


def number(kind, minimum, maximum=math.inf):
    """Returns an argparse type: a finite `kind` between `minimum` and `maximum`."""
    def parse(text):
        value = kind(text)
        if not (minimum <= value <= maximum and math.isfinite(value)):
            limit = f"from {minimum} to {maximum}" if maximum < math.inf else f"of at least {minimum}"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {limit}")
        return value
    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


INT_FROM_0, INT_FROM_1, FLOAT_FROM_0 = number(int, 0, 10**6), number(int, 1, 10**6), number(float, 0.0)
FRACTION = number(float, 0.0, 1.0)

FLAGS = {  # name: (type or choices, help)
    "run": (str, "folder of the run; stage1/ and stage2/ are created in it"),
    "vision_tower": (str, "CLIP or SigLIP: a folder, or the name of a model of the hub; DINOv2: a "
                     "folder written by tools.small"),
    "vision_layer": (int, "which hidden state of the vision tower to use, counted from the end"),
    "llm": (str, "the chat model: a folder, or the name of a model of the hub"),
    "projector": (("linear", "mlp"), "linear: the paper; mlp: LLaVA-1.5's two layers"),
    "data": (str, "JSON file of records"),
    "images": (str, "folder or .zip file with the images of the records"),
    "heldout_data": (str, "JSON file of held-out records; if not given, some records of --data are held out"),
    "heldout_images": (str, "folder or .zip file with the images of --heldout-data"),
    "heldout": (INT_FROM_1, "number of images of --data to hold out, with one record each; with "
                "--heldout-data: number of its records"),
    "limit": (INT_FROM_0, "train on the first LIMIT records, in a seeded random order; 0: on all"),
    "max_length": (INT_FROM_1, "longest sample in tokens, image included; longer ones lose their last turns"),
    "allow_bad": (FRACTION, "stop if more than this fraction of the records is unusable"),
    "workers": (INT_FROM_0, "processes that load data; 0: the main process loads"),
    "lr": (FLOAT_FROM_0, "peak learning rate; in stage 2, that of the adapter"),
    "projector_lr": (FLOAT_FROM_0, "peak learning rate of the projector"),
    "lora_r": (INT_FROM_1, "rank r of the LoRA matrices"),
    "lora_alpha": (INT_FROM_1, "the output of LoRA is scaled by alpha / r"),
    "lora_dropout": (FRACTION, "dropout before LoRA's A"),
    "batch_size": (INT_FROM_1, "samples per forward pass (the micro-batch)"),
    "grad_accum": (INT_FROM_1, "micro-batches per optimizer step"),
    "epochs": (INT_FROM_1, "passes over the data"),
    "max_steps": (INT_FROM_0, "optimizer steps, instead of --epochs; 0 trains nothing"),
    "warmup": (FRACTION, "fraction of the steps in which the learning rate rises"),
    "max_grad_norm": (FLOAT_FROM_0, "gradients with a larger norm are scaled down to it; 0: no clipping"),
    "precision": (("auto", *DTYPES), "of frozen weights and matrix products"),
    "device": (str, "auto, cpu, cuda, cuda:1, mps, …"),
    "seed": (INT_FROM_0, "seed of all random numbers"),
    "eval_every": (INT_FROM_1, "optimizer steps between two evaluations on the held-out records; if not "
                   "set: a tenth of all steps"),
    "save_every": (INT_FROM_1, "optimizer steps between two checkpoints; if not set: 100, but at most a "
                   "twentieth of all steps"),
}
SWITCHES = {
    "resume": "continue the unfinished run in the folder from its checkpoint",
    "restart": "discard the run in the folder and train again",
    "check_data": "check all records, print one sample, and stop",
    "activation_checkpointing": "recompute activations in the backward pass: less memory, more time",
}


def parse_settings(description, presets, argv=None):
    """Returns the settings as an argparse.Namespace: those of the chosen preset, changed by the flags in
    `argv` (None: of the command line). Prints those that differ from the preset.
    presets: {name: {setting: value}}."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets, default="toy", help="where the default values come from")
    for name, (kind, text) in FLAGS.items():
        if name not in presets["toy"]:  # a setting of the other stage
            continue
        type_or_choices = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "X"}
        values = {preset: preset_values[name] for preset, preset_values in presets.items()}
        defaults = ", ".join(f"{preset}: {value}" for preset, value in values.items())
        if len(set(map(str, values.values()))) == 1:
            defaults = f"default: {values['toy']}"
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{text} ({defaults})", **type_or_choices)
    resume_or_restart = parser.add_mutually_exclusive_group()
    for name, text in SWITCHES.items():
        group = resume_or_restart if name in ("resume", "restart") else parser
        group.add_argument("--" + name.replace("_", "-"), action="store_true", help=text)
    given = vars(parser.parse_args(argv))
    preset = presets[given["preset"]]
    if given.keys() & {"data", "heldout_data", "heldout_images"}:  # the preset's would not belong to them
        preset = {**preset, "heldout_data": None, "heldout_images": None}
    args = argparse.Namespace(**{"preset": given["preset"], **preset, **given})
    if bool(args.heldout_data) != bool(args.heldout_images):
        raise UserError("--heldout-data and --heldout-images belong together: pass both, or neither to hold "
                        "records out of --data")
    for path in filter(None, (args.data, args.images, args.heldout_data, args.heldout_images)):
        if not path.startswith("toy/data/"):  # these are drawn when they are read
            find_file(path)  # raises UserError, so that a wrong path is found before models are fetched
    changed = changed_settings(args, presets[args.preset])
    print(f"preset {args.preset}" + "".join(f", {name}={value}" for name, value in changed.items()))
    return args


def changed_settings(args, preset):
    """Returns {name: value} of the settings that differ from those of the preset."""
    return {name: value for name, value in vars(args).items() if preset.get(name, value) != value}


def stage2_command(args, preset):
    """Returns the command of stage 2 that continues a stage 1 with these settings: with the same models and
    data, if they are not those of the preset."""
    words = ["python", "stage2_instruct.py"]
    if args.preset != "toy":
        words += ["--preset", args.preset]
    words += ["--run", str(args.run)]
    names = ["vision_tower", "vision_layer", "llm", "projector", "limit", "heldout", "max_length",
             "allow_bad", "precision", "device"]
    changed = changed_settings(args, preset)
    if "data" in changed:  # else the next stage of the preset has data and images of its own
        # With another seed, stage 2 would hold out images that stage 1 has trained on.
        names += ["data", "images", "heldout_data", "heldout_images", "seed"]
    for name in names:
        if changed.get(name) is not None:
            words += ["--" + name.replace("_", "-"), str(changed[name])]
    return shlex.join(words)


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
