"""A trained run as a model of transformers' own Llava class, for every tool that knows that class; and back.

    python export_hf.py --out exported                    stage 2 of runs/toy where there is one, else stage 1
    python export_hf.py --run runs/mine --stage 1 --out exported
    python export_hf.py --preset tinyllama --dtype bf16 --out exported

Out comes a folder that needs nothing of this repository:

    from transformers import pipeline
    ask = pipeline("image-text-to-text", model="exported")
    ask([{"role": "user", "content": [{"type": "image", "path": "photo.jpg"},
                                      {"type": "text", "text": "What object is shown?"}]}])

Before the folder appears it is loaded again by transformers' Auto classes alone, and asked about held-out
records: ids, pixels, logits and 32 greedy words must be those of the run. That, and the merging of the
adapter, happens in fp32; --dtype rounds afterwards, once.

from_hf() is the way back: any folder of that class as our Llava, ChatTemplate and ImageProcessor.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoProcessor, AutoTokenizer, GenerationConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaImageProcessorPil, LlavaProcessor)

import plumbing
from data import IMAGE_TOKEN, ChatTemplate, collate
from loading import keep_usable, open_datasets
from model import Llava
from pixels import ImageProcessor
from plumbing import UserError, find_pretrained
from weights import VISION_MODELS, load

TOLERANCE = 1e-4  # between logits; two orders of summing in fp32 differ by about 1e-5
NEW_TOKENS = 32
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Put before the LLM's own chat template. That one was written for a language model, and takes a message's
# content as one string: "<image>\nWhat is it?". Image tools pass a list of parts instead:
#     [{"type": "image"}, {"type": "text", "text": "What is it?"}]
# which is turned into that string here; strings pass through. The image goes first, as in training.
# (Of the line break at the end nothing is left: jinja drops the first one after a block.)
TAKES_LISTS = """\
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


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("toy", "tinyllama"), default="toy", help="whose")
    parser.add_argument("--run", help="folder of the run; default: runs/<preset>")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: 2 where there is one, else 1")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights in the folder")
    parser.add_argument("--samples", type=plumbing.POSITIVE, default=8, help="held-out records to compare on")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.run, args.out = Path(args.run or f"runs/{args.preset}"), Path(args.out).resolve()
    return args


def main():
    args = parse_arguments()
    stage = args.stage or (2 if (args.run / "stage2" / "run.json").exists() else 1)
    folder = args.run / f"stage{stage}"
    run = plumbing.read_run(folder, ("stage1_align.py", "stage2_instruct.py")[stage - 1], args)
    refuse_unwritable(args.out)
    device = plumbing.pick_device(args.device)
    # fp32 whatever the run was trained in: merged in half precision, W + (alpha / r)·B·A would be rounded to
    # the steps of W, and the adapter's small numbers with it.
    model, template, image_processor = load(folder, run, device, torch.float32)
    print(f"{folder}: {run['steps']:,} steps, {run['projector']} projector"
          + (", LoRA adapter" if stage == 2 else ", no adapter"))
    _, held_out = open_datasets(argparse.Namespace(**run["settings"]), template, image_processor,
                                model.num_image_tokens)
    keep_usable(held_out, run["settings"]["allow_bad"])
    # First, since the export takes the LLM over and gives it a row or two more.
    expected = [our_answer(model, template, held_out, i, device)
                for i in range(min(args.samples, len(held_out)))]

    processor = to_processor(model, template, image_processor, find_pretrained(run["vision_tower"]))
    llava = to_llava(model, template, run)
    with plumbing.replacing(args.out) as temporary:
        try:
            llava.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            processor.image_processor.save_pretrained(temporary)  # once more, where older tools look for it
            del llava, model  # all of it is now loaded again: one copy in memory is enough
            llava = check(temporary, expected, device)
            if args.dtype != "fp32":
                llava.to(DTYPES[args.dtype]).save_pretrained(temporary)
        except UserError:
            plumbing.remove(temporary)
            raise
    print(f"saved in {args.out}, weights in {args.dtype}")


def refuse_unwritable(out):
    """Better now than after the minutes that it takes to load, merge and compare."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out, or delete it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error


# -- the model ---------------------------------------------------------------------------------------------


def to_llava(model, template, run):
    """Our Llava → LlavaForConditionalGeneration, which takes the LLM over: do not use `model` again."""
    llm = model.llm.merge_and_unload(safe_merge=True) if hasattr(model.llm, "peft_config") else model.llm
    if getattr(llm.config, "final_logit_softcapping", None):
        raise UserError(f"{run['llm']} caps its logits after the head (Gemma 2), and transformers' Llava "
                        "does not: exported, it would be another model")
    old_rows = llm.get_input_embeddings().num_embeddings
    add_rows(llm, template.image_token_id + 1)
    new_rows = range(old_rows, llm.get_input_embeddings().num_embeddings)

    # The whole encoder once more: ours has lost the blocks after --vision-layer, and other tools expect to
    # find them and to count from the end, as we do.
    vision_tower = type(model.vision_tower).from_pretrained(
        find_pretrained(run["vision_tower"]), config=model.vision_tower.config, dtype=torch.float32)
    config = LlavaConfig(
        vision_config=vision_tower.config, text_config=llm.config, image_token_index=template.image_token_id,
        image_seq_length=model.num_image_tokens, vision_feature_layer=run["vision_layer"],
        vision_feature_select_strategy=select_strategy(vision_tower, model.num_image_tokens),
        projector_hidden_act="linear" if run["projector"] == "linear" else "gelu",
        tie_word_embeddings=llm.config.tie_word_embeddings)
    with torch.device("meta"):  # a skeleton without weights: they are there already, and large
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = vision_tower
    llava.model.language_model = llm.get_decoder()
    llava.lm_head = llm.get_output_embeddings()
    llava.model.multi_modal_projector.to_empty(device="cpu")
    fill_projector(llava.model.multi_modal_projector, model.projector)
    llava.generation_config = GenerationConfig(
        bos_token_id=template.tokenizer.bos_token_id, eos_token_id=template.end_token_id,
        pad_token_id=template.tokenizer.pad_token_id,
        suppress_tokens=sorted({template.image_token_id, *new_rows}))  # see add_rows()
    return llava.cpu().eval()


def add_rows(llm, rows):
    """Embedding and head for all ids up to the image's, whose embedding transformers looks up before it
    overwrites the result with an image feature. (Ours never looks: see Llava.embed().)

    What must not happen is that the head says one of the new ids. A row of zeros would give it the logit 0,
    and that wins wherever all true words have a negative one. The mean of the other rows gives it the mean of
    the other logits, (1/V) Σ w_i·h, which is never above the largest: no greedy answer holds it. That a
    sampled one does not either, is for suppress_tokens in the generation config.
    """
    old = llm.get_input_embeddings().num_embeddings
    if rows <= old:  # Qwen's embedding has room for more ids than its tokenizer uses
        return
    llm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):  # one weight, where tied
            layer.weight[old:] = layer.weight[:old].mean(dim=0)


def select_strategy(vision_tower, num_image_tokens):
    """"default": drop the first vector, CLIP's class token. "full": there is none to drop (SigLIP)."""
    positions = vision_tower.embeddings.position_embedding.num_embeddings  # N, or 1 + N
    return "default" if positions > num_image_tokens else "full"


@torch.no_grad()
def fill_projector(theirs, ours):
    """transformers' projector always has two layers, linear_2(act(linear_1(x))); ours may have one."""
    if isinstance(ours, nn.Linear):  # I · (W·x + b) + 0, with an activation that does nothing
        theirs.linear_1.load_state_dict(ours.state_dict())
        nn.init.eye_(theirs.linear_2.weight)
        nn.init.zeros_(theirs.linear_2.bias)
    else:
        theirs.linear_1.load_state_dict(ours[0].state_dict())
        theirs.linear_2.load_state_dict(ours[2].state_dict())


# -- the processor -----------------------------------------------------------------------------------------


def to_processor(model, template, image_processor, vision_folder):
    """ChatTemplate and ImageProcessor → LlavaProcessor, which gives the very same ids and pixels."""
    # What runs where torchvision is missing, by name: asked for the other, transformers warns every time.
    theirs = AutoImageProcessor.from_pretrained(vision_folder, backend="pil")
    if image_processor.image_fit == "pad":
        settings = theirs.to_dict()
        settings.pop("image_processor_type")
        # SigLIP's settings do not speak of a crop, and LLaVA's class would then take 224 × 224 out of it.
        settings["do_center_crop"] = bool(settings.get("do_center_crop"))
        theirs = LlavaImageProcessorPil(**{**settings, "do_pad": True})

    tokenizer = template.tokenizer
    tokenizer.padding_side = "left"  # for answers to several prompts at once: the next word goes on the right
    if tokenizer.bos_token:
        # Exactly one bos, as in ChatTemplate.tokenize(). Where the chat template writes none, the tokenizer
        # has to add it. Written into the template it would change the ids behind it: a tokenizer of Llama's
        # kind sets ▁ before the text's first word, and the first word would be <s>.
        text = template.render([{"role": "user", "content": "Hi"}], prompt=True)
        tokenizer.add_bos_token = not text.startswith(tokenizer.bos_token)
    strategy = select_strategy(model.vision_tower, model.num_image_tokens)
    return LlavaProcessor(image_processor=theirs, tokenizer=tokenizer, image_token=IMAGE_TOKEN,
                          patch_size=model.vision_tower.config.patch_size,
                          vision_feature_select_strategy=strategy,
                          num_additional_image_tokens=1 if strategy == "default" else 0,
                          chat_template=TAKES_LISTS + tokenizer.chat_template)


# -- the check ---------------------------------------------------------------------------------------------


@torch.no_grad()
def our_answer(model, template, held_out, i, device):
    """What the run makes of a held-out record's first question: {"image", "question", and what comes out}."""
    prompt, _ = held_out.question(i)
    batch = collate([prompt], template.tokenizer.pad_token_id, padding_side="left")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    answer = model.generate(**batch, end_token_ids=[template.end_token_id], max_new_tokens=NEW_TOKENS)
    # Logits of prompt and answer together: those of the answer are the ones that decide.
    ids = torch.cat([batch["input_ids"], answer], dim=1)
    logits = model.llm(inputs_embeds=model.embed(ids, batch["pixel_values"])).logits
    record = held_out.record(i)
    question = held_out.messages(record)[0]["content"].removeprefix(f"{IMAGE_TOKEN}\n")
    return {"image": held_out.image(record), "question": question, "prompt": prompt["input_ids"],
            "pixel_values": prompt["pixel_values"], "answer": answer[0].tolist(), "logits": logits[0].cpu()}


@torch.no_grad()
def check(folder, expected, device):
    """Loads the folder by the Auto classes alone, asks what the run was asked, and compares.

    Returns the loaded model. Raises UserError if anything differs.
    """
    processor = AutoProcessor.from_pretrained(folder)
    llava = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    # With torchvision on the machine, transformers resizes by its own code, a little differently from Pillow.
    torchvision = not type(processor.image_processor).__name__.endswith("Pil")
    pixel_gap = logit_gap = 0.0
    same_prompts = same_answers = 0
    for ours in expected:
        content = [{"type": "text", "text": ours["question"]}]
        if ours["image"] is not None:
            content.insert(0, {"type": "image", "image": ours["image"]})
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True,
                                               add_generation_prompt=True, return_dict=True,
                                               return_tensors="pt").to(device)
        prompt = inputs["input_ids"][0].tolist()
        if prompt != ours["prompt"]:
            continue  # logits of other ids are not to be compared
        same_prompts += 1
        if ours["image"] is not None:
            gap = (inputs["pixel_values"][0].cpu() - ours["pixel_values"]).abs().max().item()
            pixel_gap = max(pixel_gap, gap)
            if torchvision:
                inputs["pixel_values"] = ours["pixel_values"][None].to(device)
        answer = llava.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, len(prompt):]
        same_answers += answer.tolist() == ours["answer"]
        inputs["input_ids"] = torch.tensor([prompt + ours["answer"]], device=device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = llava(**inputs).logits[0].cpu()[:, :ours["logits"].shape[1]]  # less what add_rows() added
        logit_gap = max(logit_gap, (logits - ours["logits"]).abs().max().item())

    print(f"the folder, loaded by AutoModelForImageTextToText and AutoProcessor, on {len(expected)} held-out "
          f"records:\n  same prompt ids        {same_prompts} of {len(expected)}\n"
          f"  same {NEW_TOKENS} greedy tokens  {same_answers} of {len(expected)}\n"
          f"  largest difference     logits {logit_gap:.1e}, pixels {pixel_gap:.1e}")
    if torchvision:
        print("  pixels differ because torchvision is installed, and resizes differently; the rest is "
              "compared on ours")
    same = same_prompts == same_answers == len(expected)
    if not same or logit_gap > TOLERANCE or (pixel_gap > TOLERANCE and not torchvision):
        raise UserError(f"the exported model is not the run's (see above; logits and pixels may differ by "
                        f"{TOLERANCE:.0e}): nothing was kept")
    return llava


# -- and back ----------------------------------------------------------------------------------------------


class FolderTemplate(ChatTemplate):
    """A chat template that was written for images, and not for us.

    It may want content as a list of parts (llava-1.5-7b-hf shows nothing at all of a string), and it may set
    no end token after an answer, though the model was trained with one.
    """

    def __init__(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.wants_lists, self.end = False, ""  # before super().__init__(), which renders
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
            self.wants_lists = "Hi" not in tokenizer.apply_chat_template(turns, tokenize=False)
            text = tokenizer.apply_chat_template(self.as_wanted(turns), tokenize=False)
            after = text[text.rindex("Yes"):] if "Yes" in text else ""
            if not any(token in after for token in tokenizer.all_special_tokens):
                self.end = tokenizer.eos_token
        super().__init__(folder)

    def as_wanted(self, messages):
        messages = [{**message, "content": message["content"] + self.end} if message["role"] == "assistant"
                    else message for message in messages]
        if not self.wants_lists:
            return messages
        listed = []
        for message in messages:
            text = message["content"].removeprefix(f"{IMAGE_TOKEN}\n")
            image = [{"type": "image"}] if text != message["content"] else []
            listed.append({**message, "content": image + [{"type": "text", "text": text}]})
        return listed

    def render(self, messages, prompt=False):
        return super().render(self.as_wanted(messages), prompt)


def from_hf(folder, device, dtype):
    """A folder of LlavaForConditionalGeneration, ready to answer: (model, template, image_processor).

    Raises UserError if something in it has no place in our model.
    """
    folder = find_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "llava":
        raise UserError(f"{folder} is a '{config.model_type}' model; only 'llava', one square image and one "
                        "projector, has the form of ours")
    layer, act = config.vision_feature_layer, config.projector_hidden_act
    if isinstance(layer, (list, tuple)) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        raise UserError(f"{folder} reads {len(layer)} hidden states of its encoder; our model reads one")
    if act not in ("linear", "gelu"):
        raise UserError(f"{folder} has a projector with '{act}'; our model knows 'gelu' and none at all")
    if config.vision_config.model_type not in VISION_MODELS:
        raise UserError(f"{folder} has a '{config.vision_config.model_type}' for an encoder; our model reads "
                        "CLIP and SigLIP")
    if layer >= 0:  # counted from the start; hidden_states has one entry more than there are blocks
        layer -= config.vision_config.num_hidden_layers + 1
    try:
        llava, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype,
                                                                    output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the weights in {folder}: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:  # transformers has filled them with random numbers
        raise UserError(f"the weights in {folder} lack {len(info['missing_keys'])} tensors, for example "
                        f"{sorted(info['missing_keys'])[0]}: fetch them again")
    template = FolderTemplate(folder)
    if template.image_token_id != config.image_token_index:
        raise UserError(f"{folder} marks an image by id {config.image_token_index}, and its tokenizer gives "
                        f"{IMAGE_TOKEN} the id {template.image_token_id}: they do not belong together")

    with torch.device("meta"):  # a skeleton for the LLM's own class, filled with the weights that are here
        llm = AutoModelForCausalLM.from_config(config.text_config)
    setattr(llm, llm.base_model_prefix, llava.model.language_model)
    llm.set_output_embeddings(llava.lm_head)
    vision_tower = llava.model.vision_tower
    model = Llava(vision_tower, llm, template.image_token_id, "linear" if act == "linear" else "mlp", layer)
    if config.vision_feature_select_strategy != select_strategy(vision_tower, model.num_image_tokens):
        raise UserError(f"{folder} takes the encoder's output as '{config.vision_feature_select_strategy}'; "
                        "our model gives the LLM one vector for each patch, and no class token")
    read_projector(model.projector, llava.model.multi_modal_projector)
    model.requires_grad_(False)
    return model.to(device).eval(), template, image_processor_of(folder)


@torch.no_grad()
def read_projector(ours, theirs):
    """The reverse of fill_projector(). Ours stays in fp32."""
    first, second = theirs.linear_1.float(), theirs.linear_2.float()
    zero = torch.zeros(first.out_features, device=first.weight.device)
    bias_1 = zero if first.bias is None else first.bias
    bias_2 = zero if second.bias is None else second.bias
    if isinstance(ours, nn.Linear):  # W_2·(W_1·x + b_1) + b_2: with nothing in between, two layers are one
        ours.weight.copy_(second.weight @ first.weight)
        ours.bias.copy_(second.weight @ bias_1 + bias_2)
    else:
        ours[0].weight.copy_(first.weight)
        ours[0].bias.copy_(bias_1)
        ours[2].weight.copy_(second.weight)
        ours[2].bias.copy_(bias_2)


def image_processor_of(folder):
    """Our ImageProcessor with the folder's settings; refused if it does not give the same pixels."""
    try:
        theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} does not say how images are prepared: {str(error).splitlines()[0]}"
                        ) from error
    with tempfile.TemporaryDirectory() as temporary:  # the settings may lie in either of two files there
        theirs.save_pretrained(temporary)
        ours = ImageProcessor(temporary, "pad" if getattr(theirs, "do_pad", False) else "crop")
    # Settings that we do not know show in the result: a picture of noise, wider than it is high.
    noise = torch.randint(0, 256, (60, 100, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    expected = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"][0])
    pixel_values = ours(image)
    if pixel_values.shape != expected.shape or (pixel_values - expected).abs().max() > 1e-3:
        raise UserError(f"{folder} prepares images with {type(theirs).__name__} in a way that ours cannot: "
                        "the pixels would differ")
    return ours


if __name__ == "__main__":
    plumbing.launch(main)
