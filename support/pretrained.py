"""Finds and loads pretrained models: the vision tower with its preprocessing, the language model and its
tokenizer.

Loading is strict. A tensor that is missing or has no place in the model is an error and never a warning,
because a model with random weights in one place still answers fluently. (The text half of a CLIP or SigLIP is
not used.)
"""

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer,
                          CLIPVisionModel, Dinov2Model, SiglipVisionModel)

from support.devices import choose_attention
from support.errors import UserError, explain_errors
from support.files import REPOSITORY, find_file, read_json
from support.images import decode_image

transformers.logging.disable_progress_bar()  # the bar of loading weights
# peft 0.21 asks transformers 5 for an attribute by its old name. The user can do nothing about it.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# Older versions of transformers 5 lack the new name activation_checkpointing_enable.
warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)

# Each entry is the "model_type" in config.json. Other language models may have layers that LoRA would leave
# out, or may change their logits after the head (Gemma 2 does), so that Llava.forward() would be wrong.
LANGUAGE_MODELS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"]
VISION_MODELS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel,
                 "dinov2": Dinov2Model}
# What this project reads of a model. Many repositories hold the same weights in several other formats.
FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
         "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "tokenizer*",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*"]


def find_pretrained(name):
    """Returns the folder of a pretrained model: `name` itself if it is a folder, else the files of the hub's
    model `name`. They are downloaded at first use to the hub's cache, as in transformers. HF_HOME sets its
    place, and HF_HUB_OFFLINE=1 forbids every request."""
    folder = next((folder for folder in (Path(name), REPOSITORY / name) if os.path.isdir(folder)), None)
    if folder is None and str(name).count("/") > 1:  # the name of a hub's model has at most one
        find_file(name)  # raises UserError
    if folder is None:
        with suppress(OSError, ValueError):  # without a request, if the files are in the cache
            folder = Path(snapshot_download(str(name), allow_patterns=FILES, local_files_only=True))
        if folder is None or missing_file(folder):
            print(f"fetching {name} from the hub", flush=True)
            with explain_errors(f"fetch the model {name}, which is not a folder here"):
                folder = Path(snapshot_download(str(name), allow_patterns=FILES))
    if missing := missing_file(folder):
        raise UserError(f"the pretrained model {name} is not complete: it has no {missing}")
    return str(folder)


def missing_file(folder):
    """Returns what a folder of a pretrained model lacks, or None."""
    if not any(folder.glob("model*.safetensors")):
        return "weights in the format safetensors; docs/reference.md says how to convert others"
    if not any(folder.glob("*processor_config.json")) and not (folder / "tokenizer_config.json").exists():
        return "preprocessor_config.json or tokenizer_config.json"
    return None


def load_config(name):
    """Returns the configuration of a pretrained model."""
    folder = find_pretrained(name)
    with explain_errors(f"read {folder}/config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_vision_config(name, vision_layer=-1):
    """Returns the configuration of a DINOv2, or of the vision half of a CLIP or SigLIP. Raises UserError if
    it is something else, or if it has no hidden state with the number vision_layer."""
    config = load_config(name)
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_MODELS:
        raise UserError(f"{name} is a '{config.model_type}'; --vision-tower must name a CLIP, SigLIP or "
                        "DINOv2")
    if not -1 - config.num_hidden_layers <= vision_layer <= -1:
        raise UserError(f"--vision-layer {vision_layer} does not exist: {name} has -1 (last block) to "
                        f"{-1 - config.num_hidden_layers} (embeddings)")
    return config


def load_image_processor(name):
    """Returns the preprocessing of a vision tower: resize, crop the center, normalize.

    The Pillow implementation is asked for by name. Otherwise transformers would use torchvision where that is
    installed, and pixels would differ between machines.
    """
    folder, size = find_pretrained(name), load_vision_config(name).image_size
    with explain_errors(f"load the preprocessing in {folder}"):
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        shapes = {tuple(image_processor(Image.new("RGB", image_size))["pixel_values"][0].shape)
                  for image_size in ((size, size), (2 * size, size), (size, 2 * size))}
    if shapes != {(3, size, size)}:
        raise UserError(f"the preprocessing in {folder} does not make every image {size} × {size} pixels "
                        "large, as the vision tower needs it")
    return image_processor


def load_image(path, image_processor):
    """Returns the pixel values, (3, S, S), of an image file that the user has named."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: name an image on this machine")
    with explain_errors(f"read {path}"):
        content = Path(path).read_bytes()
    return image_processor(decode_image(content, path), return_tensors="pt")["pixel_values"][0]


def load_vision_tower(name, dtype):
    """Returns a CLIPVisionModel, SiglipVisionModel or Dinov2Model with its pretrained weights."""
    config = load_vision_config(name)
    vision_class = VISION_MODELS[config.model_type]
    # The files of CLIP hold its text half too. Listing its weights here keeps transformers from reporting
    # them, so that any other unexpected weight stands out.
    vision_class._keys_to_ignore_on_load_unexpected = [
        r"^text_model\.", r"^(visual|text)_projection\.", r"^logit_(scale|bias)$",
        r"embeddings\.position_ids$"]
    vision_tower = _load_strictly(vision_class, name, dtype, config=config)
    # Skip the last norm. hidden_states are taken before it, at every layer.
    if isinstance(vision_tower, SiglipVisionModel):
        vision_tower.post_layernorm, vision_tower.head, vision_tower.use_head = nn.Identity(), None, False
    if isinstance(vision_tower, Dinov2Model):
        vision_tower.layernorm = nn.Identity()
        vision_tower.encoder.layers = vision_tower.encoder.layer  # the name that CLIP and SigLIP use
    return vision_tower


def load_language_model(name, dtype, for_device):
    """Returns a decoder-only language model with its pretrained weights, on the CPU. for_device is where it
    will compute, and decides the attention kernel."""
    llm = _load_strictly(AutoModelForCausalLM, name, dtype,
                         attn_implementation=choose_attention(for_device, dtype))
    # peft writes this name into adapter/. Otherwise it would be the folder of the LLM on this machine.
    llm.name_or_path = llm.config.name_or_path = str(name)
    if for_device.type == "cpu" and llm.num_parameters() > 5e8:
        print(f"WARNING: on a CPU, {name} is many times slower than on a GPU. If this machine has one, "
              "install a PyTorch that supports it.")
    return llm


class LoadedTokenizer(NamedTuple):
    tokenizer: object
    start_token_id: int | None
    end_token_ids: list  # all that generation should stop at
    context_length: int  # number of tokens that the LLM can read, prompt and answer together
    num_embeddings: int  # rows of its embedding table


def load_tokenizer(name):
    """Returns the LoadedTokenizer of an LLM. Raises UserError if the LLM or its tokenizer cannot be used."""
    folder, config = find_pretrained(name), load_config(name)
    if config.model_type not in LANGUAGE_MODELS or getattr(config, "final_logit_softcapping", None):
        raise UserError(f"{name} is a '{config.model_type}'; --llm must name a model of the type "
                        f"{', '.join(LANGUAGE_MODELS)}")
    with explain_errors(f"load the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {folder} has no chat template: --llm must name a chat model")
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has a slow tokenizer ({type(tokenizer).__name__}), which does not say "
                        "where its tokens are in a text: name another --llm, with a fast tokenizer")
    files = [read_json(f"{folder}/{file}") or {} for file in
             ("tokenizer_config.json", "generation_config.json", "config.json")]
    # Only an explicit false counts, because TinyLlama was tuned with <s> and its files do not mention it.
    start_token_id = None if files[0].get("add_bos_token") is False else tokenizer.bos_token_id
    end_token_ids = []
    for ids in (file.get("eos_token_id") for file in files[1:]):  # a number, a list or nothing
        end_token_ids += ids if isinstance(ids, list) else [ids]
    return LoadedTokenizer(tokenizer, start_token_id, [i for i in end_token_ids if i is not None],
                           config.max_position_embeddings, config.vocab_size)


def _load_strictly(model_class, name, dtype, **kwargs):
    """from_pretrained() that raises UserError if weights are missing, have another shape than the model, or
    have no place in it; transformers would fill in random numbers, or leave weights out."""
    folder = find_pretrained(name)
    with explain_errors(f"load the weights in {folder}"):
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True,
                                                  ignore_mismatched_sizes=True, use_safetensors=True,
                                                  trust_remote_code=False, **kwargs)
    mismatched = (key for key, *_ in info["mismatched_keys"])
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *mismatched})
    if wrong:
        raise UserError(f"the weights in {folder} do not fit its config.json: {len(wrong)} are missing, of "
                        f"another shape or have no place, for example {wrong[0]}; fetch the folder again, or "
                        "name another model")
    return model
