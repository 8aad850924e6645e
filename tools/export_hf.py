"""Exports a finished stage as a model of transformers' own class LlavaForConditionalGeneration.

    python -m tools.export_hf --run runs/toy --out exported
    python -m tools.export_hf --run runs/tinyllama --out exported --dtype bf16

The exported folder does not need this repository:

    from transformers import pipeline
    ask = pipeline("image-text-to-text", model="exported")
    ask([{"role": "user", "content": [{"type": "image", "path": "photo.jpg"},
                                      {"type": "text", "text": "What is this?"}]}])

Before the folder gets its name, transformers' Auto classes load it, and it is compared with the run on up to
8 held-out records in fp32. If a prompt or one of up to 32 generated tokens differs, or logits or pixels by
more than 1e-4, the folder is deleted. --dtype rounds the weights afterwards, without another comparison.
docs/export.md says which other tools load the folder, and how to serve it or publish it.

If torchvision is installed, transformers resizes images with it. Pixels then differ by up to one of their 256
levels from those of the run. AutoProcessor.from_pretrained("exported", backend="pil") avoids that.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import (AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor)

from data import IMAGE_TOKEN
from support.devices import DTYPES
from support.errors import UserError, run_script
from support.evaluation import prompt_batch
from support.files import atomic_write
from support.pretrained import find_pretrained
from support.settings import add_run_flags
from support.trained import load_heldout_dataset, load_run
from tools.model_card import write_model_card

# Largest allowed difference of logits and of pixel values. The order of summation changes logits by about
# 1e-5 in fp32.
TOLERANCE = 1e-4
RECORDS, NEW_TOKENS = 8, 32  # to compare: held-out records, and generated tokens of each

# The LLM's chat template takes the content of a message as one string, "<image>\nWhat is it?". Other tools
# pass a list, [{"type": "image"}, {"type": "text", "text": "What is it?"}]. This text is put in front of the
# template. It turns such a list into the string, with the image first as in training. (Jinja drops the
# newline at its end.)
ACCEPT_LISTS = """\
{%- set joined = namespace(messages=[]) %}
{%- for message in messages %}
{%- if message['content'] is not string %}
{%- set turn = namespace(images='', text='') %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{% set turn.images = turn.images + '<image>\\n' %}
{%- elif part['type'] == 'text' %}{% set turn.text = turn.text + part['text'] %}{% endif %}
{%- endfor %}
{%- set message = dict(message, content=turn.images + turn.text) %}
{%- endif %}
{%- set joined.messages = joined.messages + [message] %}
{%- endfor %}
{%- set messages = joined.messages %}
"""


def build_hf_model(model, template, saved):
    """Returns the model as a LlavaForConditionalGeneration on the CPU. Its LLM is taken out of `model`."""
    llm = model.llm
    add_embedding_rows(llm, template.image_token_id + 1)
    # Llava has deleted the last blocks of its vision tower. transformers needs the complete tower, because it
    # counts the hidden states from the end too.
    vision_tower = type(model.vision_tower).from_pretrained(
        find_pretrained(saved["vision_tower"]), config=model.vision_tower.config, dtype=torch.float32)
    config = LlavaConfig(
        vision_config=vision_tower.config, text_config=llm.config, image_token_index=template.image_token_id,
        image_seq_length=model.num_image_tokens, vision_feature_layer=saved["vision_layer"],
        vision_feature_select_strategy="default" if has_class_token(model) else "full",
        projector_hidden_act="linear" if isinstance(model.projector, nn.Linear) else "gelu",
        tie_word_embeddings=llm.config.tie_word_embeddings)
    with torch.device("meta"):  # without memory for weights, because all exist already
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = vision_tower
    llava.model.language_model = llm.get_decoder()
    llava.lm_head = llm.get_output_embeddings()
    for part in (config.vision_config, config.text_config):
        part._name_or_path = ""  # else config.json would tell where the models lie on this machine
    llava.model.multi_modal_projector.to_empty(device="cpu")
    copy_projector(model.projector, llava.model.multi_modal_projector)
    llava.generation_config = GenerationConfig(
        bos_token_id=template.tokenizer.bos_token_id, eos_token_id=template.end_token_ids,
        pad_token_id=template.pad_token_id)
    return llava.cpu().eval()


def add_embedding_rows(llm, rows):
    """Adds rows to the embedding and the head, so that both have at least `rows`. transformers looks up the
    embedding of the image id before it puts an image feature there. (Llava.embed() looks up id 0 instead.)

    The head must never choose a new id. A row of zeros would give it the logit 0, which wins if all other
    logits are negative. The mean of the old rows gives it the mean of the old logits, which is never the
    largest."""
    old = llm.get_input_embeddings().num_embeddings
    if rows <= old:  # the embedding of Qwen has more rows than its tokenizer has ids
        return
    llm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):  # may share one weight
            layer.weight[old:] = layer.weight[:old].mean(dim=0)


def has_class_token(model):
    return model.vision_tower.config.model_type != "siglip_vision_model"


def copy_projector(ours, theirs):
    """Copies our projector into that of transformers, which is always linear_2(act(linear_1(x))). For a
    linear projector, act does nothing (see projector_hidden_act) and linear_2 is the identity."""
    if isinstance(ours, nn.Linear):
        theirs.linear_1.load_state_dict(ours.state_dict())
        nn.init.eye_(theirs.linear_2.weight)
        nn.init.zeros_(theirs.linear_2.bias)
    else:
        theirs.linear_1.load_state_dict(ours[0].state_dict())
        theirs.linear_2.load_state_dict(ours[2].state_dict())


def save_model(llava, folder):
    """Writes config.json, generation_config.json and the weights, with the names that they have in the LLaVA
    models on the hub, because vLLM expects these. transformers alone would leave out "vision_model." of CLIP
    and SigLIP."""
    level = "" if llava.config.vision_config.model_type == "dinov2" else "vision_model."
    llava.save_pretrained(folder, state_dict={
        name.replace("model.vision_tower.", f"model.vision_tower.{level}"): tensor
        for name, tensor in llava.state_dict().items()})


def build_hf_processor(model, template, image_processor):
    """Returns a LlavaProcessor that gives the same ids and pixels as ChatTemplate and the image processor."""
    tokenizer = template.tokenizer
    tokenizer.padding_side = "left"  # for batched generation, where new tokens follow on the right
    if tokenizer.bos_token:
        # Exactly one <s>, as in ChatTemplate.tokenize(). If the chat template does not write it, the
        # tokenizer must add it. Adding it to the template would change the next token, because Llama's
        # tokenizer puts ▁ before the first word of a text, and the first word would then be <s>.
        text = template.render([{"role": "user", "content": "Hi"}], is_prompt=True)
        tokenizer.add_bos_token = not text.startswith(tokenizer.bos_token)
    # transformers drops the class token with the strategy "default", and keeps all tokens with "full".
    return LlavaProcessor(image_processor=image_processor, tokenizer=tokenizer, image_token=IMAGE_TOKEN,
                          patch_size=model.vision_tower.config.patch_size,
                          vision_feature_select_strategy="default" if has_class_token(model) else "full",
                          num_additional_image_tokens=int(has_class_token(model)),
                          chat_template=ACCEPT_LISTS + tokenizer.get_chat_template())


@torch.no_grad()
def run_ours(model, template, heldout, i, device):
    """Returns what the run computes for the first question of held-out record i, as a dict."""
    prompt, _ = heldout.make_prompt(i)
    batch = prompt_batch(template, [prompt], device)
    answer = model.generate(**batch, end_token_ids=template.end_token_ids, max_new_tokens=NEW_TOKENS)
    ids = torch.cat([batch["input_ids"], answer], dim=1)
    logits = model.llm(inputs_embeds=model.embed(ids, batch["pixel_values"])).logits  # of prompt and answer
    record = heldout.records[i]
    question = heldout.template.to_messages(record)[0]["content"].removeprefix(f"{IMAGE_TOKEN}\n")
    return {"image": heldout.records.open_image(record), "question": question, "prompt": prompt["input_ids"],
            "pixel_values": prompt["pixel_values"], "answer": answer[0].tolist(), "logits": logits[0].cpu()}


@torch.no_grad()
def compare(folder, expected, device):
    """Loads the exported folder with the Auto classes alone, compares it with what run_ours() returned, and
    returns the loaded model. Raises UserError if anything differs."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    llava = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    pixel_gap = logit_gap = 0.0
    for ours in expected:
        content = [{"type": "text", "text": ours["question"]}]
        if ours["image"] is not None:
            content.insert(0, {"type": "image", "image": ours["image"]})
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True,
                                               add_generation_prompt=True, return_dict=True,
                                               return_tensors="pt").to(device)
        prompt = inputs["input_ids"][0].tolist()
        generated = llava.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        answer = generated[0, len(prompt):].tolist()
        if (prompt, answer) != (ours["prompt"], ours["answer"]):
            raise UserError(f"the exported model differs from the run in its prompt or its answer to "
                            f"{ours['question']!r}, so it was not kept")
        if ours["image"] is not None:
            gap = (inputs["pixel_values"][0].cpu() - ours["pixel_values"]).abs().max().item()
            pixel_gap = max(pixel_gap, gap)
        inputs["input_ids"] = torch.tensor([prompt + answer], device=device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = llava(**inputs).logits[0].cpu()[:, :ours["logits"].shape[1]]  # without the new rows
        logit_gap = max(logit_gap, (logits - ours["logits"]).abs().max().item())
    gaps = f"largest difference {logit_gap:.1e} of the logits, {pixel_gap:.1e} of the pixels"
    if max(logit_gap, pixel_gap) > TOLERANCE:
        raise UserError(f"the exported model differs from the run ({gaps}), so it was not kept")
    print(f"the exported folder, loaded by transformers' Auto classes, on {len(expected)} held-out records:\n"
          f"  same prompts, same generated tokens, {gaps}")
    return llava


def export(args, folder):
    """Writes the run to `folder` and compares it. Raises UserError if it differs from the run."""
    model, template, image_processor, saved = load_run(args)
    device, run_folder = model.llm.device, args.run / f"stage{saved['stage']}"
    heldout = load_heldout_dataset(run_folder, template, image_processor, RECORDS)
    expected = [run_ours(model, template, heldout, i, device) for i in range(len(heldout))]

    processor = build_hf_processor(model, template, image_processor)
    llava = build_hf_model(model, template, saved)
    save_model(llava, folder)
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)  # older tools read preprocessor_config.json
    write_model_card(folder, run_folder)
    del llava, model  # because compare() loads all weights again
    llava = compare(folder, expected, device)
    if args.dtype != "fp32":
        save_model(llava.to(DTYPES[args.dtype]), folder)


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.export_hf", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, precision="fp32")  # the export is compared in fp32
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist yet")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the exported weights")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists already: choose another folder with --out, or delete it first")
    with atomic_write(args.out) as temporary:
        temporary.mkdir(parents=True)  # fails here, and not after minutes, if it cannot be written
        export(args, temporary)
    print(f"wrote {args.out}, with weights in {args.dtype}. Read its README.md before you publish it.")


if __name__ == "__main__":
    run_script(main)
