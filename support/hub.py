"""Finds a pretrained model: in a folder, in the cache of the hub's client, or on the hub.

Used by data.py.

A model of the hub that is not in the cache is fetched on first use, as transformers does. The client's
environment variables work here too: HF_HOME moves the cache, and HF_HUB_OFFLINE=1 forbids every request.
"""

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from support.errors import UserError, explain_errors
from support.files import REPOSITORY, read_json

# What this project reads of a model. Many repositories hold the same weights in several other formats.
FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors",
         "model.safetensors.index.json", "model-*.safetensors", "tokenizer*", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"]


def find_pretrained(name, also="config.json"):
    """Returns the folder of a pretrained model: `name` itself if it is a folder, else that of the hub's model
    `name`, which is fetched if it is not complete in the cache. The folder must have config.json, the weights
    and the file `also`."""
    for folder in (Path(name), REPOSITORY / name):
        if os.path.isdir(folder):
            break
    else:
        folder = find_in_cache(name)
        missing = missing_file(folder, also) if folder else "config.json"
        if missing:
            folder = fetch(name, missing)
    if missing := missing_file(folder, also):
        raise UserError(f"{folder} is not a complete pretrained model: it has no {missing}")
    return str(folder)


def find_in_cache(name):
    """Returns the folder of a model in the cache, which can be incomplete, or None. Makes no request."""
    try:
        # Without allow_patterns, the client demands every file that the repository has.
        return Path(snapshot_download(str(name), allow_patterns=["config.json"], local_files_only=True))
    except (OSError, ValueError):
        return None


def missing_file(folder, also):
    """Returns the name of a file that a folder of a pretrained model lacks, or None."""
    index = read_json(folder / "model.safetensors.index.json")  # if the weights are split into several files
    weights = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    return next((file for file in ("config.json", *weights, also) if not (folder / file).exists()), None)


def fetch(name, missing):
    """Fetches a model, whose file `missing` is not in the cache, and returns its folder in the cache. If a
    download breaks off, complete files stay in the cache. Of several processes, one fetches a file."""
    print(f"fetching {name} to {constants.HF_HUB_CACHE}", flush=True)
    enable_progress_bars()
    try:
        with explain_errors(f"fetch {name}, which is no folder here and has no {missing} in the hub's cache"):
            return Path(snapshot_download(str(name), allow_patterns=FILES))
    finally:
        disable_progress_bars()
