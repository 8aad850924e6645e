"""Loads pretrained models: the vision tower with its preprocessing, the language model and its tokenizer.

Loading is strict. A missing tensor is an error and never a warning, because a model with random weights in
one place still answers fluently.
"""

import re
from datetime import date

import torch
from PIL import Image
from torch import nn
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer,
                          CLIPVisionModel, Dinov2Model, SiglipVisionModel)

from model import LORA_TARGETS
from support.devices import choose_attention
from support.errors import UserError, explain_errors
from support.files import read_json
from support.hub import find_or_fetch_pretrained
from support.images import decode_image

VISION_MODELS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel,
                 "dinov2": Dinov2Model}


def load_vision_config(name):
    """Returns the configuration of a DINOv2, or of the vision half of a CLIP or SigLIP."""
    folder = find_or_fetch_pretrained(name)
    with explain_errors(f"read {folder}/config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_MODELS:
        raise UserError(f"{folder} is a '{config.model_type}'; --vision-tower must name a CLIP, "
                        "SigLIP or DINOv2")
    return config


def load_image_processor(name):
    """Returns the preprocessing of a vision tower: resize, crop the center, normalize.

    The Pillow implementation is asked for by name. Otherwise transformers would use torchvision where that is
    installed, and pixels would differ between machines.
    """
    size = load_vision_config(name).image_size
    folder = find_or_fetch_pretrained(name, "preprocessor_config.json")
    with explain_errors(f"read {folder}/preprocessor_config.json"):
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        pixel_values = image_processor(Image.new("RGB", (size, size)), return_tensors="pt")["pixel_values"]
    if pixel_values.shape != (1, 3, size, size):
        raise UserError(f"{folder}/preprocessor_config.json makes images of another size than {size} × "
                        f"{size}, which the vision tower needs")
    return image_processor


def load_image(path, image_processor):
    """Returns the pixel values, (3, S, S), of an image file that the user has named."""
    try:
        return image_processor(decode_image(path, path), return_tensors="pt")["pixel_values"][0]
    except ValueError as error:
        raise UserError(str(error)) from error


def load_vision_tower(name, dtype):
    """Returns a CLIPVisionModel, SiglipVisionModel or Dinov2Model with its pretrained weights."""
    config = load_vision_config(name)
    vision_class = VISION_MODELS[config.model_type]
    # The files of CLIP hold its text half too. Listing its weights here keeps transformers from reporting
    # them, so that any other unexpected weight stands out.
    vision_class._keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"projection\.", "logit_scale",
                                                       "logit_bias", "position_ids"]
    vision_tower = _load_strictly(vision_class, name, dtype, config=config)
    # Skip the last norm. hidden_states are taken before it, at every layer.
    if isinstance(vision_tower, SiglipVisionModel):
        vision_tower.post_layernorm, vision_tower.head, vision_tower.use_head = nn.Identity(), None, False
    if isinstance(vision_tower, Dinov2Model):
        vision_tower.layernorm = nn.Identity()
        vision_tower.encoder.layers = vision_tower.encoder.layer  # the name that CLIP and SigLIP use
    return vision_tower


def load_language_model(name, dtype, device):
    """Returns a decoder-only language model with its pretrained weights, still on the CPU. `device`, where it
    will compute, decides the attention kernel."""
    attention = choose_attention(device, dtype)
    llm = _load_strictly(AutoModelForCausalLM, name, dtype, attn_implementation=attention)
    # LoRA would leave out the layers that have other names. (A weight matrix has two dimensions.)
    blocks = max((module for module in llm.modules() if isinstance(module, nn.ModuleList)), key=len)
    layers = {key.removesuffix(".weight").split(".")[-1]
              for key, parameter in blocks.named_parameters() if parameter.ndim > 1}
    if layers != set(LORA_TARGETS):
        raise UserError(f"the blocks of {name} consist of the layers {', '.join(sorted(layers))}, but LoRA "
                        f"needs {', '.join(LORA_TARGETS)}: name another --llm, such as a Llama or a Qwen")
    # Llava.forward() applies the head to the decoder's output. Some models (Gemma 2, Cohere, Granite) then
    # change the logits once more. Refuse them, because their loss would be wrong.
    ids = torch.arange(3)[None]  # (1, 3)
    with torch.no_grad():
        logits = llm.get_output_embeddings()(llm.get_decoder()(ids, use_cache=False).last_hidden_state)
        expected = llm(ids, use_cache=False).logits
    if not expected.isfinite().all():
        raise UserError(f"{name} overflows in fp16: pass --precision bf16 or fp32"
                        if dtype == torch.float16 else
                        f"{name} computes logits that are not finite: fetch its weights again")
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
        raise UserError(f"{name} changes its logits after the head, which this project does not support")
    return llm


def load_tokenizer(name):
    """Returns (tokenizer, ids of the end tokens that the model's own files list, how many tokens the model
    can read, prompt and answer together)."""
    folder = find_or_fetch_pretrained(name, "tokenizer_config.json")
    with explain_errors(f"load the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        text = tokenizer.get_chat_template() if tokenizer.chat_template else None
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        context_length = config.max_position_embeddings
    if not text:
        raise UserError(f"the tokenizer in {folder} has no chat template: --llm must name a chat model")
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has a slow tokenizer ({type(tokenizer).__name__}), which does not say "
                        "where its tokens are in a text: name another --llm, with a fast tokenizer")
    # Some chat templates write today's date. They get a fixed one, or each day would have its own prompts.
    fixed = date(2024, 7, 26)  # Llama 3's own default
    tokenizer.chat_template = re.sub(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""",
                                     lambda call: repr(fixed.strftime(call[2])), text)
    end_token_ids = []
    for file in ("generation_config.json", "config.json"):
        ids = (read_json(f"{folder}/{file}") or {}).get("eos_token_id")  # a number, a list or nothing
        end_token_ids += ids if isinstance(ids, list) else [ids]
    return tokenizer, [i for i in end_token_ids if i is not None], context_length


def _load_strictly(model_class, name, dtype, **kwargs):
    """from_pretrained() that raises UserError if weights are missing or have another shape than the model;
    transformers would fill in random numbers."""
    folder = find_or_fetch_pretrained(name)
    with explain_errors(f"load the weights in {folder}"):
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True,
                                                  ignore_mismatched_sizes=True, use_safetensors=True,
                                                  trust_remote_code=False, **kwargs)
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key, *_ in info["mismatched_keys"])
    if wrong:
        raise UserError(f"the weights in {folder} do not fit its config.json: {len(wrong)} missing or of "
                        f"another shape, for example {wrong[0]}; fetch the folder again")
    return model
