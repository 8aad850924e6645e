"""Finds a pretrained model: in a folder, in the cache of the hub's client, or on the hub.

A model of the hub that is not in the cache is fetched on first use, as transformers does. The client's
environment variables work here too: HF_HOME moves the cache, and HF_HUB_OFFLINE=1 forbids every request.
"""

import os
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (GatedRepoError, HFValidationError, OfflineModeIsEnabled,
                                    RepositoryNotFoundError)

from support.errors import UserError, explain_errors
from support.files import REPOSITORY, read_json

# What this project reads of a model. Many repositories hold the same weights in several other formats.
FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors",
         "model.safetensors.index.json", "model-*.safetensors", "tokenizer*", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"]


def find_or_fetch_pretrained(name, required_file="config.json"):
    """Returns the folder of a pretrained model: `name` itself if it is a folder, else that of the hub's model
    `name`, which is fetched if it is not complete in the cache. required_file: a file that the folder must
    have, beside config.json and the weights."""
    for folder in (Path(name), REPOSITORY / name):
        if os.path.isdir(folder):
            break
    else:
        folder = find_in_cache(name)
        if folder is None or missing_file(folder, required_file):
            folder = fetch(name, required_file)
    if missing := missing_file(folder, required_file):
        raise UserError(f"{folder} is not a complete pretrained model: it has no {missing}")
    return str(folder)


def find_in_cache(name):
    """Returns the folder of a model in the cache, which can be incomplete, or None. Makes no request."""
    try:
        # Without allow_patterns, the client demands every file that the repository has.
        return Path(snapshot_download(str(name), allow_patterns=["config.json"], local_files_only=True))
    except (OSError, ValueError):
        return None


def missing_file(folder, required_file):
    """Returns the name of a file that a folder of a pretrained model lacks, or None."""
    weights, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists():  # the weights are split into several files
        with explain_errors(f"read {index}; fetch it again"):
            weights = sorted(set(read_json(index)["weight_map"].values()))
    for file in ("config.json", *weights, required_file):
        if not (folder / file).exists():
            pickles = [path.name for path in folder.glob("*.bin")] if file in weights else []
            return f"{file} ({pickles[0]} is a pickle: convert it to safetensors)" if pickles else file
    return None


def fetch(name, required_file):
    """Fetches a model from the hub, with the client's progress bar, and returns its folder in the cache. If a
    download breaks off, complete files stay in the cache, and the next attempt fetches the others."""
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / f"{str(name).replace('/', '--')}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # of several processes, one fetches; the others wait, and then find the model
            folder = find_in_cache(name)
            missing = missing_file(folder, required_file) if folder else "config.json"
            if not missing:
                return folder
            # dry_run only asks for the sizes.
            files = snapshot_download(str(name), allow_patterns=FILES, dry_run=True)
            if not any(file.filename.startswith("model") for file in files):
                raise UserError(f"the model {name} on the hub has no weights in the format safetensors: "
                                "choose another model, or convert its weights and name the folder")
            size = sum(file.file_size or 0 for file in files if file.will_download)
            print(f"fetching {name}: {size / 1e9:.2f} GB to {constants.HF_HUB_CACHE}", flush=True)
            return Path(snapshot_download(str(name), allow_patterns=FILES))
    except UserError:
        raise
    except Exception as error:  # the errors of the client and of its HTTP library have no common class
        cause = error.__cause__ or error
        if isinstance(cause, GatedRepoError):
            reason = "it is gated: accept its license on its page of the hub, then run hf auth login"
        elif isinstance(cause, (RepositoryNotFoundError, HFValidationError)):
            reason = "it is neither a folder here nor a public model on the hub: correct the name"
        elif isinstance(cause, OfflineModeIsEnabled):
            reason = f"HF_HUB_OFFLINE=1 forbids it, and the hub's cache has no {missing} of this model"
        else:
            detail = getattr(cause, "strerror", None) or " ".join(f"{type(cause).__name__}: {cause}".split())
            reason = f"{detail[:200]}; run the same command again, and complete files are not fetched twice"
        raise UserError(f"cannot fetch the model {name}: {reason}") from error
