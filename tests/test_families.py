"""Other language models, chat templates and vision towers: the same scripts and the same guarantees."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import (CHAT_TEMPLATE, CORPUS, N, SMALL, batch_of, build, draw, make_tokenizer, metrics,
                      preprocess, record_of)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, CLIPConfig, CLIPProcessor, CLIPVisionModel,
                          Dinov2Config, Dinov2Model, Gemma2Config, Gemma3TextConfig, GemmaConfig, LlamaConfig,
                          MistralConfig, Phi3Config, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config,
                          SiglipConfig, SiglipModel, SiglipVisionModel)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data import IGNORE_INDEX, IMAGE_TOKEN, ChatTemplate, collate
from support.errors import UserError
from support.evaluation import generate_answers
from support.pretrained import load_image_processor

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# Qwen3's template writes an empty thinking block before the last answer, and before no other.
THINKING = CHATML.replace("{{ '<|im_start|>'", """{{ '<|im_start|>assistant
<think>

</think>

' + message['content'] + '<|im_end|>
' if loop.last and message['role'] == 'assistant' else '<|im_start|>'""")
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' +
message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] ==
'assistant' else 'user') + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model
' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +
'<|end_header_id|>

' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{
'<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
             tie_word_embeddings=False)
FAMILIES = {  # name: (configuration, chat template, bytes instead of SentencePiece's pieces)
    "llama": (LlamaConfig, CHAT_TEMPLATE, False),
    "llama3": (LlamaConfig, LLAMA3, True),
    "qwen2": (Qwen2Config, CHATML, True),
    "qwen3": (Qwen3Config, THINKING, True),
    "mistral": (MistralConfig, MISTRAL, False),
    "gemma": (GemmaConfig, GEMMA, False),
    "gemma3": (Gemma3TextConfig, GEMMA, True),
}


def byte_level_tokenizer(folder, chat_template):
    """Saves a tokenizer of Qwen's kind: BPE over bytes, Ġ for a space in front, no <s>, no padding token."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet,
                                                          show_progress=False))
    special = ["<|im_start|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
               "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>",
                                        bos_token="<bos>" if "bos_token" in chat_template else None,
                                        additional_special_tokens=special, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_family(folder, config_class, chat_template, byte_level):
    """Saves a tiny random model of a family and a tokenizer of its kind. Returns the folder."""
    if byte_level:
        tokenizer = byte_level_tokenizer(folder, chat_template)
    else:
        tokenizer = make_tokenizer(folder, chat_template)
        tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    config = config_class(**SIZES, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=2,
                          pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request, tmp_path_factory):
    """The folder of a tiny random model of each family."""
    return make_family(tmp_path_factory.mktemp(request.param), *FAMILIES[request.param])


# -- labels ------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat object is shown?"}]
SURE = [{"role": "user", "content": "Sure?"}]
# What each template writes, by hand: before a question, between question and answer, before the answer
# (labeled, because the prompt does not contain it), the end token, after it.
WRITTEN = {
    CHAT_TEMPLATE: ("<|user|>\n", "</s>\n<|assistant|>\n", "", "</s>", "\n"),
    LLAMA3: ("<|start_header_id|>user<|end_header_id|>\n\n",
             "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>", ""),
    CHATML: ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>", "\n"),
    THINKING: ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n",
               "<|im_end|>", "\n"),
    MISTRAL: ("[INST] ", " [/INST]", " ", "</s>", ""),
    GEMMA: ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "", "<end_of_turn>", "\n"),
}
# Texts that are short, or mean something to a tokenizer or a template. A search for the answer "s" would also
# find it in "</s>", and the newline after it would be labeled.
PIECES = st.one_of(st.text("s</>deimnoprtu_|[]IST xq.\n", max_size=3), st.text(max_size=12), st.sampled_from([
    "</s>", "<s>", "<unk>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<think>", "<|user|>\n", "[/INST]",
    "user", "end", "im", "of", "turn", "model", "</", "s>", "<<", "|>", "{{ eos_token }}", "<0x0A>", "是的, 🫒",
    "é", "אב", "\t", "\u3000", "olive"]))
TEXTS = st.lists(PIECES, max_size=3).map("".join)
TURNS = st.lists(st.tuples(TEXTS.filter(lambda text: IMAGE_TOKEN not in text),
                           TEXTS.filter(str.strip) | TEXTS.map(lambda text: text + IMAGE_TOKEN)),
                 min_size=1, max_size=3)


template_of = cache(ChatTemplate)  # for each of the examples


@settings(max_examples=500, deadline=None, derandomize=True)  # 2000 after a change of the labels
@given(turns=TURNS, image_in=st.sampled_from(["nowhere", "front", "back", "second turn"]))
def test_labels_are_exactly_the_answers_and_their_end_tokens(llm, turns, image_in):
    template = template_of(llm, N)
    texts = [text for turn in turns for text in turn]
    if image_in == "second turn" and len(turns) > 1:
        texts[2] += "<image>"
    elif image_in != "nowhere":
        texts[0] = f"<image>\n{texts[0]}" if image_in == "front" else f"{texts[0]}\n<image>"
    messages = template.to_messages(record_of(*texts, image="a.png"))
    for message, text in zip(messages[1::2], texts[1::2]):  # special tokens are broken up by a space
        assert message["content"].replace(" ", "") == text.strip().replace(" ", "")

    bos = template.tokenizer.bos_token or ""
    before, between, opening, end, after = WRITTEN[template.tokenizer.chat_template]
    text, expected = bos if bos in template.render(messages) else "", []
    for i in range(0, len(messages), 2):
        text += before + messages[i]["content"] + between
        answer = messages[i + 1]["content"] + end
        if "<think>" not in opening or i + 2 == len(messages):  # Qwen3: only before the last answer
            answer = opening + answer
        expected.append((len(text), len(text + answer)))  # the range of characters that should be labeled
        text += answer + after
    assert template.render(messages) == text

    ids, labels = template.encode(messages)
    assert ids.count(template.image_token_id) == N
    assert not bos or ids.count(template.tokenizer.bos_token_id) == 1
    for k in range(1, len(messages), 2):
        prompt = template.encode_prompt(messages[:k])
        assert ids[:len(prompt)] == prompt and labels[len(prompt)] != IGNORE_INDEX
    offsets = template.tokenize(text)[1]
    labeled = [t for t, label in enumerate(labels) if label != IGNORE_INDEX]
    assert all(labels[t] == ids[t] for t in labeled)
    starts = [offsets[t][0] for t in labeled if labels[t - 1] == IGNORE_INDEX]
    ends = [offsets[t][1] for t in labeled if labels[t + 1:t + 2] in ([], [IGNORE_INDEX])]
    assert list(zip(starts, ends)) == expected


@pytest.mark.parametrize("message, chat_template", [
    ("no end token", CHATML.replace("<|im_end|>", " ")),
    ("changes a question", CHATML.replace("message['content']", "message['content'] | upper")),
    ("changes an answer", CHATML.replace(
        "message['content']", "(message['content'] | upper if loop.index is even else message['content'])")),
    ("renders a prompt differently",
     CHATML.replace("message['role'] + '", "(message['role'] if loop.last else 'past') + '"))])
def test_a_template_that_ends_no_answer_or_changes_texts_or_prompts_is_refused(
        tmp_path, message, chat_template):
    byte_level_tokenizer(tmp_path, chat_template)
    with pytest.raises(UserError, match=message):
        ChatTemplate(looks_complete(tmp_path), N)


def looks_complete(folder, config=LlamaConfig()):
    """Adds a config and empty weights, because a folder without them is refused. Returns the folder."""
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("loss", [normalizers.Lowercase(), normalizers.Replace("  ", " "), None],
                         ids=["capitals", "spaces", "no tokenizer.json"])
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, loss):
    tokenizer = make_tokenizer(tmp_path)
    if loss:
        tokenizer.backend_tokenizer.normalizer = loss
        tokenizer.save_pretrained(tmp_path)
    else:  # transformers builds a tokenizer with four tokens then
        (tmp_path / "tokenizer.json").unlink()
        edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(UserError, match="its tokenizer turns .* into"):
        ChatTemplate(looks_complete(tmp_path), N)


def test_the_answer_prefix_of_a_template_is_trained_but_not_part_of_an_answer(tmp_path):
    template = ChatTemplate(make_family(tmp_path, *FAMILIES["qwen3"]), N)
    messages = QUESTION + [{"role": "assistant", "content": "Yes ,\n是的"}]
    labeled = [label for label in template.encode(messages)[1] if label != IGNORE_INDEX]
    assert template.tokenizer.decode(labeled).startswith("<think>\n\n</think>\n\nYes")
    assert template.decode(labeled) == messages[1]["content"]


# -- losses and whole runs ---------------------------------------------------------------------------------


def test_generation_stops_at_every_end_token_of_the_models_own_files(parts, tmp_path):
    llm = make_family(tmp_path, *FAMILIES["llama3"])
    model, template = build(parts.clip, llm)
    prompt = {"input_ids": template.encode_prompt(SURE), "pixel_values": None}
    batch = collate([prompt], 0, padding_side="left")
    free = model.generate(**batch, end_token_ids=template.end_token_ids, max_new_tokens=12)[0].tolist()
    ends = [template.tokenizer.convert_tokens_to_ids("<|endoftext|>"), free[4]]
    edit_json(llm / "generation_config.json", eos_token_id=ends)
    template = ChatTemplate(llm, N)
    assert template.end_token_ids == [template.end_token_id, *ends, 2]  # 2 is in config.json
    [answer] = generate_answers(model, template, [prompt], 12)
    assert answer == template.decode(free[:free.index(free[4]) + 1])


def test_losses_and_greedy_answers_are_the_familys_own(llm, parts):
    """The losses of a padded batch are those of the family's own forward() on each row alone."""
    model, template = build(parts.clip, llm)
    rows = [template.encode(template.to_messages(record_of(question, answer))) for question, answer in
            (("Sure?", "Yes"), ("What is it?", "the olives : 是的, 🫒 ."))]
    samples = [{"input_ids": ids, "labels": labels, "pixel_values": None} for ids, labels in rows]
    batch = batch_of(samples, template)
    with torch.no_grad():
        ours = model(**batch)
        theirs = []
        for ids, labels in rows:
            logits = model.llm(input_ids=torch.tensor([ids])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none")
            theirs.append(losses[torch.tensor(labels[1:]) != IGNORE_INDEX])
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-5)

    prompts = [{"input_ids": template.encode_prompt([{"role": "user", "content": text}]),
                "pixel_values": None} for text in ("Sure?", "What is it?")]
    batch = collate(prompts, 0, padding_side="left")
    ours = model.generate(**batch, end_token_ids=[3], max_new_tokens=12)
    theirs = model.llm.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long(),
                                do_sample=False, eos_token_id=3, pad_token_id=3, max_new_tokens=12)
    assert torch.equal(ours, theirs[:, batch["input_ids"].shape[1]:])


def run_everything(script, flags, steps, **changes):
    """Runs both stages, the sanity check, and the export, which fails if the exported model answers
    differently from the run. All of them use --run run in the current folder."""
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, run="run", max_steps=steps, **changes))
    script("sanity_check", "--run", "run", "--sample", 0, "--max-new-tokens", 4, *SMALL[2:4])
    script("tools.export_hf", "--run", "run", "--out", "exported", *SMALL[2:4])


def test_both_stages_the_sanity_check_and_the_export_run_on_every_family(llm, flags, script, tmp_path):
    run_everything(script, flags, steps=3, llm=llm)
    for stage in (1, 2):
        losses = [line["loss"] for line in metrics(tmp_path / "run" / f"stage{stage}")[0]]
        assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.parametrize("config_class", [Phi3Config, Gemma2Config])
def test_another_type_of_language_model_is_refused(flags, refusal, tmp_path, config_class):
    """The layers of Phi 3 have other names than LoRA's targets, and Gemma 2 changes its logits once more."""
    llm = make_family(tmp_path / config_class.model_type, config_class, GEMMA, False)
    assert config_class.model_type in refusal("stage1_align", *flags(1, llm=llm))


# -- vision towers -----------------------------------------------------------------------------------------

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
              patch_size=14)
SIZE = {"dinov2": dict(size={"shortest_edge": 28}, crop_size=28),  # of their image processors
        "siglip": dict(size={"height": 28, "width": 28})}
OWN = {"clip": (CLIPVisionModel, CLIPImageProcessorPil), "dinov2": (Dinov2Model, BitImageProcessorPil),
       "siglip": (SiglipVisionModel, SiglipImageProcessorPil)}


@pytest.fixture(scope="module", params=OWN)
def tower(request, tmp_path_factory, parts):
    """(kind, folder) of a tiny random CLIPModel and SiglipModel, vision and text, and of a Dinov2Model."""
    if request.param == "clip":
        return "clip", parts.clip
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    if request.param == "siglip":
        text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    else:
        model = Dinov2Model(Dinov2Config(**{**VISION, "mlp_ratio": 2}, use_mask_token=False))
        for parameter in model.parameters():  # its layer scales and class token would all be the same number
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    OWN[request.param][1](**SIZE[request.param]).save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("vision_layer", [-1, -2, -4])
def test_all_patches_of_a_tower_are_kept_and_come_from_the_chosen_layer(tower, parts, vision_layer):
    kind, folder = tower
    model, _ = build(folder, parts.llm, vision_layer=vision_layer)
    image_processor = load_image_processor(folder)
    pixel_values = torch.stack([preprocess(image_processor, draw(color)) for color in ("red", "blue")])
    whole = OWN[kind][0].from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(pixel_values, output_hidden_states=True).hidden_states[vision_layer]
        assert expected.shape == (2, 4 if kind == "siglip" else 5, 32)  # SigLIP has no class token
        torch.testing.assert_close(model.encode_images(pixel_values), model.projector(expected[:, -4:]))
    assert len(model.vision_tower.encoder.layers) == 4 + vision_layer  # the blocks after it are deleted


def test_both_stages_the_sanity_check_and_the_export_run_on_a_tower(tower, flags, script):
    run_everything(script, flags, steps=2, vision_tower=tower[1])


@pytest.mark.parametrize("size", [(40, 30), (28, 28), (200, 37)])
def test_a_towers_pixels_are_those_of_its_own_processor(tower, size):
    kind, folder = tower
    image = Image.effect_noise(size, 80).convert("RGB")
    expected = preprocess(OWN[kind][1].from_pretrained(folder), image)
    torch.testing.assert_close(preprocess(load_image_processor(folder), image), expected, atol=0, rtol=0)


@pytest.mark.parametrize("change", [{"crop_size": {"height": 32, "width": 32}}, {"do_center_crop": False}])
def test_a_preprocessor_that_does_not_make_every_image_the_towers_size_is_refused(tmp_path, change):
    """DINOv2 would take other sizes, and only the last N of its patches would be used."""
    looks_complete(tmp_path, Dinov2Config(**VISION))
    BitImageProcessorPil(**SIZE["dinov2"]).save_pretrained(tmp_path)
    load_image_processor(tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", **change)
    with pytest.raises(UserError, match="does not make every image 28 × 28 pixels large"):
        load_image_processor(tmp_path)


def test_processor_config_json_alone_is_read(parts, tmp_path):
    """transformers 5 writes this file instead of preprocessor_config.json."""
    original = load_image_processor(parts.clip)
    CLIPProcessor(original, AutoTokenizer.from_pretrained(parts.llm)).save_pretrained(tmp_path)
    looks_complete(tmp_path, CLIPConfig(vision_config=VISION))
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    assert torch.equal(preprocess(load_image_processor(tmp_path), image), preprocess(original, image))


# -- tokenizers --------------------------------------------------------------------------------------------


def test_a_padding_token_beyond_the_embedding_table_is_not_used(flags, script, tmp_path):
    """People add [PAD] to a tokenizer and do not resize the model."""
    llm = make_family(tmp_path / "llm", *FAMILIES["llama"])
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(llm)
    template = ChatTemplate(llm, N)
    assert template.tokenizer.pad_token_id == template.num_embeddings > template.pad_token_id
    script("stage1_align", *flags(1, llm=llm, max_steps=1))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML  # which writes them
    tokenizer.save_pretrained(llm)
    with pytest.raises(UserError, match="the LLM has embeddings for"):
        ChatTemplate(llm, N)


@pytest.mark.parametrize("value", [False, True, None])
def test_a_tokenizer_that_says_so_gets_no_start_token(tmp_path, value):
    make_tokenizer(tmp_path)
    if value is not None:
        edit_json(tmp_path / "tokenizer_config.json", add_bos_token=value)
    template = ChatTemplate(looks_complete(tmp_path), N)
    ids, start = template.encode_prompt(QUESTION), template.tokenizer.bos_token_id
    assert ids.count(start) == int(value is not False) and (ids[0] == start) == (value is not False)
