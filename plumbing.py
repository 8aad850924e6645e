"""What the scripts need and what is not the lesson: settings, devices, precision, files, logs, clear errors.

Nothing here is about LLaVA. Read it last, or not at all.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers.utils import cached_file

HERE = Path(__file__).resolve().parent


# -- errors ------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the person at the keyboard can mend. Its text is one sentence: what is wrong, what to
    do."""


def launch(main):
    """Runs a script: a UserError ends it with its sentence and exit code 1; a bug still shows its
    traceback."""
    transformers.logging.disable_progress_bar()  # "Loading weights": ours is the bar to look at
    # peft 0.21 asks transformers 5 for an attribute under its old name; there is nothing that anybody could
    # do.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        main()
    except UserError as error:
        # One that was raised in a loader worker arrives with the worker's traceback above it.
        sentence = str(error).splitlines()[-1].removeprefix("plumbing.UserError: ")
        sys.exit(f"{Path(sys.argv[0]).name}: {sentence}")
    except (RuntimeError, MemoryError) as error:  # on a GPU an OutOfMemoryError, on a CPU one of these
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {out_of_memory(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def out_of_memory(error):
    """What to do about it, with the values in use."""
    text = f"out of memory ({(str(error).splitlines() or ['no details'])[0]})"
    if not _settings:
        return text
    return (f"{text}: halve --batch-size {_settings.batch_size} and double --grad-accum "
            f"{_settings.grad_accum}, which keeps the effective batch; or lower --max-length "
            f"{_settings.max_length}; or choose a half --precision (now {_settings.precision})")


# -- settings ----------------------------------------------------------------------------------------------


def _number(kind, least):
    def parse(text):
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value
    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


COUNT, POSITIVE, REAL = _number(int, 0), _number(int, 1), _number(float, 0.0)

FLAGS = {  # name: (type or choices, help)
    "vision_tower": (str, "CLIP or SigLIP: a folder, or a name on the hub whose files are on this machine"),
    "vision_layer": (int, "which of CLIP's hidden states to read, counted from the end"),
    "image_fit": (("crop", "pad"), "crop: as the encoder's own preprocessing; pad: to a square, LLaVA-1.5's"),
    "llm": (str, "the chat language model: a folder, or a name on the hub"),
    "projector": (("linear", "mlp"), "linear: the paper's; mlp: LLaVA-1.5's two layers"),
    "data": (str, "JSON file of records"),
    "cache_features": (str, "folder for the encoder's features: images seen more than once are encoded once"),
    "images": (str, "folder or .zip that the records' images are in"),
    "heldout_data": (str, "JSON file to measure on; without one, --held-out records of --data are kept back"),
    "heldout_images": (str, "folder or .zip of the images of --heldout-data"),
    "held_out": (POSITIVE, "how many records to measure on"),
    "limit": (COUNT, "train on so many records, the first after a seeded shuffle; 0: all"),
    "max_length": (POSITIVE, "tokens of a sample, image positions included; longer ones lose last turns"),
    "run": (str, "folder of the run: stage1/ and stage2/ go below it"),
    "lr": (REAL, "peak learning rate"),
    "projector_lr": (REAL, "peak learning rate of the projector"),
    "batch_size": (POSITIVE, "samples in one forward pass (the micro-batch)"),
    "grad_accum": (POSITIVE, "micro-batches in one optimizer step"),
    "epochs": (POSITIVE, "passes over the data"),
    "max_steps": (COUNT, "stop after so many optimizer steps; 0: save the untrained parts"),
    "warmup": (REAL, "share of the steps in which the learning rate rises"),
    "clip": (REAL, "largest norm of the gradient"),
    "lora_r": (POSITIVE, "rank of the LoRA matrices"),
    "lora_alpha": (POSITIVE, "LoRA's output is scaled by alpha / r"),
    "lora_dropout": (REAL, "dropout before LoRA's A"),
    "precision": (("auto", "fp32", "bf16", "fp16"), "of frozen weights and matrix products"),
    "device": (str, "auto, cpu, cuda, cuda:1, mps, …"),
    "allow_bad": (REAL, "share of records that may be unusable; above it the script stops"),
    "save_every": (POSITIVE, "optimizer steps between two checkpoints"),
    "workers": (COUNT, "processes that load data; 0: in the main one"),
    "eval_every": (POSITIVE, "optimizer steps between two looks at the held-out records"),
    "log_every": (POSITIVE, "optimizer steps between two lines of metrics.jsonl"),
    "seed": (COUNT, "of everything that is drawn at random"),
}


SWITCHES = {
    "resume": "go on with the unfinished run in the folder, from its newest checkpoint",
    "restart": "throw the run in the folder away, and start anew",
    "check_data": "check the data, and do no more",
    "activation_checkpointing": "keep less for the backward pass, and compute it again: slower, less memory",
    "tensorboard": "write metrics for TensorBoard too, into <run>/stage<N>/tensorboard/",
    "compile": "torch.compile the blocks of encoder and LLM: a slow start, then faster steps",
}


_settings = None  # what parse_settings() returned last, for the advice in launch()


def parse_settings(doc, presets):
    """Command line → settings: the chosen preset's values, then what the flags say, one flag for each.

    Returns an argparse.Namespace. `doc` is the script's docstring, shown by --help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets, default="toy", help="where the defaults come from")
    for name in presets["toy"]:
        kind, text = FLAGS[name]
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "X"}
        defaults = ", ".join(f"{preset}: {values[name]}" for preset, values in presets.items())
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{text} ({defaults})", **how)
    for name, text in SWITCHES.items():
        parser.add_argument("--" + name.replace("_", "-"), action="store_true", help=text)
    given = vars(parser.parse_args())
    global _settings
    _settings = argparse.Namespace(**{"preset": given["preset"], **presets[given["preset"]], **given})
    return _settings


def print_settings(settings):
    print("settings")
    for name, value in vars(settings).items():
        print(f"  {name:<16} {value}")


# -- files that must be there ------------------------------------------------------------------------------

# What the tinyllama preset reads and this repository does not hold: size, and the command that fetches it.
DOWNLOADS = {
    "openai/clip-vit-large-patch14":
        ("1.7 GB", "hf download openai/clip-vit-large-patch14 config.json preprocessor_config.json "
                   "model.safetensors"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0":
        ("2.2 GB", "hf download TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    "data/LLaVA-CC3M-Pretrain-595K/chat.json":
        ("211 MB", "hf download liuhaotian/LLaVA-CC3M-Pretrain-595K chat.json --repo-type dataset "
                   "--local-dir data/LLaVA-CC3M-Pretrain-595K"),
    "data/LLaVA-CC3M-Pretrain-595K/images.zip":
        ("6.5 GB", "hf download liuhaotian/LLaVA-CC3M-Pretrain-595K images.zip --repo-type dataset "
                   "--local-dir data/LLaVA-CC3M-Pretrain-595K"),
    "data/LLaVA-Instruct-150K/llava_instruct_150k.json":
        ("229 MB", "hf download liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json --repo-type dataset "
                   "--local-dir data/LLaVA-Instruct-150K"),
    "data/coco/train2017.zip":
        ("18 GB", "curl -L --create-dirs -o data/coco/train2017.zip "
                  "http://images.cocodataset.org/zips/train2017.zip"),
}


def _missing(what, kind):
    size, command = DOWNLOADS.get(what, (None, None))
    if size:
        return UserError(f"{what} is not on this machine ({size}); fetch it with: {command}")
    return UserError(f"{kind} {what} does not exist")


def find_file(name):
    """Path of a data file or folder, which is relative to the current folder or to this repository's."""
    toy_data = HERE / "toy" / "data"
    if toy_data in (HERE / name).parents and not toy_data.exists():
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            import toy_world  # only here: nothing else needs it

            print("drawing the toy world", flush=True)
            toy_world.draw(toy_data)  # seconds; the same pictures on every machine
        while not toy_data.exists():  # another process is drawing; the folder appears when it is complete
            time.sleep(0.2)
    for path in (Path(name), HERE / name):
        if path.exists():
            return path
    raise _missing(name, "the file or folder")


def find_pretrained(name):
    """Folder with the files of a pretrained model: a folder as it is, a hub name in the hub's local cache.

    Nothing is ever downloaded here: gigabytes arrive by a command that somebody has typed.
    """
    for path in (Path(name), HERE / name):
        if path.is_dir():
            if not (path / "config.json").exists():
                raise UserError(f"{path} holds no config.json: it is not the folder of a pretrained model")
            return str(path)
    try:
        # A download that broke off has a config but no weights; both must be there.
        config = cached_file(name, "config.json", local_files_only=True)
        for weights in ("model.safetensors", "model.safetensors.index.json"):
            if cached_file(name, weights, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False):
                return str(Path(config).parent)
    except (OSError, ValueError) as error:
        raise _missing(name, "the model") from error
    raise _missing(name, "the model")


# -- device and precision ----------------------------------------------------------------------------------


def pick_device(name):
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(name, device):
    """(dtype, why): bf16 where the GPU has it, else fp16, fp32 without a GPU."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], "as asked"
    if device.type != "cuda":
        return torch.float32, f"no CUDA GPU ({device.type})"
    # Not torch.cuda.is_bf16_supported(): that says yes to a T4, which emulates it, slowly.
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"compute capability {major}.{minor} computes in bf16"
    return torch.float16, f"compute capability {major}.{minor} has no bf16"


class Processes:
    """The processes that train together: one, or as many as torchrun has started (RANK, WORLD_SIZE,
    LOCAL_RANK).

    Attributes: rank, world (their number), device (this one's).
    """

    def __init__(self, device_name):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device_name)
        if self.world == 1:
            return
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        # Where torchrun restarts its workers, the addresses that the dead ones have left in its store are
        # still there, and the new ones would call those: every attempt gets a shelf of its own.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                world_size=self.world)
        if self.rank > 0:  # one of them speaks; errors (stderr) come from all
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def sum(self, value):
        """A number, summed over the processes."""
        if self.world == 1:
            return float(value)
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def any(self, number):
        """The largest of the processes' numbers: not 0 if any of them is not."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def sum_gradients(self, parameters):
        """Adds up the gradients of all processes, in one message. A process without a sample sends zeros."""
        if self.world == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)
        for parameter, part in zip(parameters, message.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)

    def gather(self, tensor):
        """The processes' CPU tensors, in the order of their ranks."""
        gathered = [tensor] * self.world
        if self.world > 1:
            dist.all_gather_object(gathered, tensor)
        return gathered

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# -- what is printed and logged ----------------------------------------------------------------------------


def print_parameters(model):
    """The table of what is frozen and what trains."""
    print("parameters                      frozen       trained")
    for name, part in model.named_children():
        sizes = {True: 0, False: 0}
        for parameter in part.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        print(f"  {name:<18}{sizes[False]:>18,}{sizes[True]:>14,}")


def print_plan(settings, processes, num_samples, num_held_out, total_steps):
    effective = settings.batch_size * settings.grad_accum * processes.world
    print(f"batch: {settings.batch_size} (micro-batch) × {settings.grad_accum} (accumulation) × "
          f"{processes.world} (processes) = {effective} samples in a step")
    print(f"data: {num_samples:,} samples to train on, {num_held_out:,} held out; {total_steps:,} steps")


def print_sample(sample, template):
    print(f"a sample; {'green' if sys.stdout.isatty() else 'in [[ ]]'}: what the model is trained to say")
    text = marked(sample["input_ids"], sample["labels"], template, sys.stdout.isatty())
    print("  " + text.strip().replace("\n", "\n  "))


def marked(ids, labels, template, color):
    """A sample as text, what is trained set apart: in green where colours show, else in [[ ]]."""
    on, off = ("\033[1;32m", "\033[0m") if color else ("[[", "]]")
    pieces, i = [], 0
    while i < len(ids):
        j = i
        while j < len(ids) and (labels[j] == ids[j]) == (labels[i] == ids[i]):
            j += 1
        text = template.tokenizer.decode(ids[i:j])
        pieces.append(f"{on}{text}{off}" if labels[i] == ids[i] else text)
        i = j
    image = template.tokenizer.convert_ids_to_tokens(template.image_token_id)
    count = ids.count(template.image_token_id)
    return "".join(pieces).replace(image * count, f"{image}×{count}") if count else "".join(pieces)


def outcome(measured):
    """What grounding() measured, in one line."""
    return (f"held-out loss {measured['loss']:.3f}, with another's image {measured['loss_shuffled']:.3f}, "
            f"own image preferred {measured['image_match']:.0%}")


def peak_memory(device):
    """The most memory used so far, as text: on the GPU, or by this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the GPU"
    try:
        import resource  # not on Windows
    except ImportError:
        return "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB"


# -- writing -----------------------------------------------------------------------------------------------


def make_folder(path):
    """Creates a folder that can be written to; better to learn now than after the training that it cannot."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder with --run"
                        ) from error
    return path


@contextmanager
def replacing(path):
    """A file or folder that appears whole or not at all: written under a temporary name beside it, flushed to
    the disk, then renamed. A run killed in the middle of this leaves what was there before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        remove(temporary)  # what a run that was killed here has left
        yield temporary
        for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if file.is_file():
                with open(file, "r+b") as handle:
                    os.fsync(handle.fileno())
        if path.is_dir():  # a rename replaces a file, but not a folder that has something in it
            remove(path)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# What a projector or an adapter is made for, and useless without.
PARTS = ("vision_tower", "vision_layer", "image_fit", "llm", "projector")


def read_run(folder, script, settings):
    """run.json of a stage's folder; `script` is what writes it."""
    path = Path(folder) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        flags = same_flags(settings, *PARTS)
        raise UserError(f"{path} does not exist: run python {script}{flags} first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def refuse_other_parts(run, settings, folder):
    """A projector is a dictionary between one encoder and one LLM; with others it is noise."""
    for name in PARTS:
        if run[name] != getattr(settings, name):
            raise UserError(f"{folder} was made for {name} {run[name]}, not {getattr(settings, name)}: give "
                            f"--{name.replace('_', '-')} {run[name]}, or another --run")


def same_flags(settings, *names):
    """The flags that the next script needs to find this run again, as they would be typed."""
    flags = "" if settings.preset == "toy" else f" --preset {settings.preset}"
    given = [word.split("=")[0] for word in sys.argv[1:]]
    for name in ("run", *names):
        flag = "--" + name.replace("_", "-")
        if flag in given and hasattr(settings, name):
            flags += f" {flag} {getattr(settings, name)}"
    return flags
