"""The model from disk and back: pretrained parts, joined; what was trained, saved and loaded.

Weights are safetensors and everything else JSON: no pickle is opened. What does not fit is an error and never
a warning, for a model with a hole in it still answers fluently. There is nothing to run in this file.
"""

from pathlib import Path

from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

from data import ChatTemplate
from model import Llava
from pixels import ImageProcessor
from plumbing import UserError, find_pretrained, replacing, write_json

VISION_MODELS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


def build(vision_tower, llm, projector, vision_layer, dtype, image_fit="crop"):
    """The pretrained parts, joined by an untrained projector.

    Args:
        vision_tower, llm: folders, or names on the hub whose files are on this machine already.
        dtype: of the frozen weights; fp16 or bf16 on a GPU. Always said explicitly: left alone, transformers
            loads whatever the checkpoint happens to hold.
        image_fit: see ImageProcessor.
    Returns:
        (model, template, image_processor): see data.py and pixels.py.
    Raises:
        UserError if a part is not on this machine, or is not what it should be.
    """
    vision_folder, llm_folder = find_pretrained(vision_tower), find_pretrained(llm)
    vision_config = vision_config_of(vision_folder)
    vision_class = VISION_MODELS[vision_config.model_type]
    # CLIP's repository holds its text half too. Saying that this half is expected keeps the load silent, so
    # that any other unexpected key is still reported.
    vision_class._keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"projection\.", "logit_scale",
                                                       "logit_bias", "position_ids"]
    clip = _from_pretrained(vision_class, vision_folder, dtype, config=vision_config)
    image_processor = ImageProcessor(vision_folder, image_fit)
    if image_processor.size != (vision_config.image_size,) * 2:
        raise UserError(f"{vision_folder}: its preprocessor_config.json makes images of "
                        f"{image_processor.size}, and the encoder wants {vision_config.image_size} × "
                        f"{vision_config.image_size}")
    language_model = _from_pretrained(AutoModelForCausalLM, llm_folder, dtype)
    template = ChatTemplate(llm_folder)
    model = Llava(clip, language_model, template.image_token_id, projector, vision_layer)
    return model.eval(), template, image_processor


def vision_config_of(folder):
    """Configuration of the vision half of a CLIP or SigLIP."""
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_MODELS:
        raise UserError(f"{folder} is a '{config.model_type}' model; --vision-tower wants CLIP or SigLIP")
    return config


def _from_pretrained(model_class, folder, dtype, **kwargs):
    """from_pretrained() that refuses a checkpoint with holes: transformers fills them with random numbers."""
    try:
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a model of another kind
        raise UserError(f"cannot load the weights in {folder}: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        raise UserError(f"the weights in {folder} lack {len(info['missing_keys'])} tensors, for example "
                        f"{sorted(info['missing_keys'])[0]}: fetch them again")
    return model


def save(model, folder, run):
    """Writes what was trained: projector.safetensors, adapter/ (if there is one, as plain peft writes it),
    and, last, run.json: `run`, which says what they were trained for and on."""
    folder = Path(folder)
    with replacing(folder / "projector.safetensors") as temporary:
        save_file(model.projector.state_dict(), temporary)
    if hasattr(model.llm, "peft_config"):
        with replacing(folder / "adapter") as temporary:
            model.llm.save_pretrained(temporary)
    write_json(folder / "run.json", run)


def load_projector(model, path):
    """Loads a projector; a missing, unexpected or misshapen tensor is an error, never a warning: a projector
    left at random gives fluent answers that have nothing to do with the image."""
    try:
        model.projector.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this projector: {' '.join(str(error).split())}") from error


def load_adapter(model, folder):
    """Loads a LoRA adapter saved by save(), just as strictly (peft itself only warns about missing keys)."""
    try:
        config = LoraConfig.from_pretrained(folder)
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read the adapter in {folder}: {error}") from error
    config.inference_mode = True  # frozen, until a stage says otherwise
    model.add_lora(config)
    expected = get_peft_model_state_dict(model.llm)
    wrong = {name for name in expected.keys() | tensors.keys()
             if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape}
    if wrong:
        raise UserError(f"the adapter in {folder} does not fit the LLM: {len(wrong)} tensors are missing, "
                        f"unexpected or of another shape, for example {sorted(wrong)[0]}")
    set_peft_model_state_dict(model.llm, tensors)


def refuse_other_template(template, run, folder):
    """Raises UserError if what is in `folder`, with `run` for its run.json, was trained with another."""
    if run["template"] != template.fingerprint:
        raise UserError(f"{folder} was trained with another chat template than the one that "
                        f"{template.tokenizer.name_or_path} has now: put that back, or train anew")


def load(folder, run, device, dtype):
    """What a stage saved in `folder`, ready to answer: (model, template, image_processor).

    run: its run.json, which says what the parts are; nothing is guessed from names of folders.
    """
    model, template, image_processor = build(run["vision_tower"], run["llm"], run["projector"],
                                             run["vision_layer"], dtype, run["image_fit"])
    refuse_other_template(template, run, folder)
    load_projector(model, folder / "projector.safetensors")
    if run["stage"] == 2:
        load_adapter(model, folder / "adapter")
        # W + (alpha / r)·B·A is a matrix like any other: added up once (in fp32, by peft, and only then
        # rounded to W's type), the adapter costs nothing in the answers.
        model.llm = model.llm.merge_and_unload(safe_merge=True)
    return model.to(device).eval(), template, image_processor
