"""Other language models, other templates, other encoders: the same scripts, the same guarantees."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import CHAT_TEMPLATE, CORPUS, SMALL, draw, make_tokenizer
from data import IGNORE_INDEX, IMAGE_TOKEN, ChatTemplate, collate
from pixels import ImageProcessor
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from weights import build

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# Qwen3's: empty thoughts before the last answer, and before no other.
THINKING = CHATML.replace(
    "{{ '<|im_start|>'",
    """{{ '<|im_start|>assistant
<think>

</think>

' + message['content'] + '<|im_end|>
' if loop.last and message['role'] == 'assistant' else '<|im_start|>'""",
)
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' +
message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] ==
'assistant' else 'user') + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model
' }}{% endif %}"""

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
FAMILIES = {  # name: (configuration, chat template, bytes instead of SentencePiece's pieces)
    "llama": (LlamaConfig, CHAT_TEMPLATE, False),
    "qwen2": (Qwen2Config, CHATML, True),
    "qwen3": (Qwen3Config, THINKING, True),
    "mistral": (MistralConfig, MISTRAL, False),
    "gemma": (GemmaConfig, GEMMA, False),
    "gemma2": (Gemma2Config, GEMMA, False),  # squeezes its logits
    "gemma3": (Gemma3TextConfig, GEMMA, True),
}


def byte_level_tokenizer(folder, chat_template):
    """A tokenizer of Qwen's kind: BPE over bytes, Ġ for a space in front, no bos, no pad."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        bos_token="<bos>" if "bos_token" in chat_template else None,
        additional_special_tokens=["<|im_start|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request, tmp_path_factory):
    """A folder with a tiny random model of the family, and a tokenizer of its kind."""
    config_class, chat_template, byte_level = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    if byte_level:
        tokenizer = byte_level_tokenizer(folder, chat_template)
    else:
        tokenizer = make_tokenizer(folder, chat_template)
        tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    config = config_class(
        **SIZES, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=2, pad_token_id=None
    )
    if "gemma2" in folder.name:
        config.final_logit_softcapping = 1.5  # of 30: where logits are this small it would hardly show
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


CONVERSATION = [
    {"role": "user", "content": f"{IMAGE_TOKEN}\nWhat object is shown?"},
    {"role": "assistant", "content": "the olives : 是的, 🫒 ."},
    {"role": "user", "content": "Is the answer Yes or No?"},
    {"role": "assistant", "content": "Yes"},
]


def test_labels_are_each_answer_and_its_end_token_under_every_familys_template(llm):
    template = ChatTemplate(llm)
    ids, labels = template.encode(CONVERSATION, 4)
    supervised = [label for label in labels if label != IGNORE_INDEX]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    first = supervised.index(template.end_token_id) + 1
    assert supervised.count(template.end_token_id) == 2 and supervised[-1] == template.end_token_id
    assert template.decode(supervised[:first]) == CONVERSATION[1]["content"]
    thoughts = "<think>\n\n</think>\n\n" if "qwen3" in llm.name else ""
    assert template.decode(supervised[first:]) == thoughts + "Yes"
    for k in (1, 3):
        prompt = template.encode_prompt(CONVERSATION[:k], 4)
        assert ids[: len(prompt)] == prompt and prompt.count(template.image_token_id) == 4
        assert labels[len(prompt)] != IGNORE_INDEX == labels[len(prompt) - 1]
    bos = template.tokenizer.bos_token_id
    assert bos is None or (ids[0], ids.count(bos)) == (bos, 1)
    assert template.tokenizer.pad_token_id is not None


def test_the_loss_is_the_familys_own(llm, parts):
    """In a padded batch, against its own forward() on each row alone."""
    model, template, _ = build(parts.clip, llm, "linear", -2, torch.float32)
    rows = []
    for question, answer in (("Sure?", CONVERSATION[3]), ("What is it?", CONVERSATION[1])):
        rows.append(template.encode([{"role": "user", "content": question}, answer], 0))
    batch = collate([{"input_ids": ids, "labels": labels, "pixel_values": None} for ids, labels in rows], 0)
    with torch.no_grad():
        ours = model(**batch)
        theirs = []
        for ids, labels in rows:
            logits = model.llm(input_ids=torch.tensor([ids])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none")
            theirs.append(losses[torch.tensor(labels[1:]) != IGNORE_INDEX])
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-5)


def test_both_stages_and_the_sanity_check_run_on_every_family(llm, parts, flags, script, tmp_path, capsys):
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, llm=llm, run=tmp_path / "run"), "--max-steps", 3)
        lines = (tmp_path / "run" / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
        assert len(losses) == 3 and losses[-1] < losses[0]
    script("sanity_check", "--run", tmp_path / "run", "--sample", 0, "--max-new-tokens", 4, *SMALL[2:4])
    assert "GENERATED" in capsys.readouterr().out
    export = ("export_hf", "--run", tmp_path / "run", "--out", tmp_path / "exported", *SMALL[2:4])
    if "gemma2" in llm.name:  # what it does after its head, transformers' Llava does not
        with pytest.raises(SystemExit, match="caps its logits"):
            script(*export)
    else:
        script(*export)  # which fails where the export answers otherwise than the run


def test_a_template_that_ends_no_answer_or_rewrites_prompts_is_refused(tmp_path):
    from plumbing import UserError

    byte_level_tokenizer(tmp_path / "endless", CHATML.replace("<|im_end|>", " "))
    with pytest.raises(UserError, match="no end token"):
        ChatTemplate(tmp_path / "endless")
    byte_level_tokenizer(
        tmp_path / "shouting", CHATML.replace("message['content']", "message['content'] | upper")
    )
    with pytest.raises(UserError, match="rewrites the answer 'Yes'"):
        ChatTemplate(tmp_path / "shouting")
    hidden = CHATML.replace("message['role'] + '", "(message['role'] if loop.last else 'past') + '")
    byte_level_tokenizer(tmp_path / "rewriting", hidden)
    with pytest.raises(UserError, match="differently once an answer follows"):
        ChatTemplate(tmp_path / "rewriting")


# -- encoders ----------------------------------------------------------------------------------------------

VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
)
SIGLIP_PREPROCESSOR = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "size": {"height": 28, "width": 28},
}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A folder with a tiny random SiglipModel, both halves, as on the hub."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(5)
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SIGLIP_PREPROCESSOR))
    return folder


@pytest.mark.parametrize("vision_layer", [-1, -2])
def test_siglips_patches_are_all_kept_and_come_from_the_layer_asked_for(siglip, parts, vision_layer, capfd):
    model, _, image_processor = build(siglip, parts.llm, "linear", vision_layer, torch.float32)
    pixel_values = torch.stack([image_processor(draw("red")), image_processor(draw("blue"))])
    whole = SiglipVisionModel.from_pretrained(siglip, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(pixel_values, output_hidden_states=True).hidden_states[vision_layer]
        torch.testing.assert_close(model.clip_features(pixel_values), expected)
    assert expected.shape == (2, 4, 32)
    assert "MISSING" not in capfd.readouterr().err


def test_both_stages_run_on_siglip(siglip, flags, script, tmp_path):
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, vision_tower=siglip, run=tmp_path / "run"), "--max-steps", 2)
    script("sanity_check", "--run", tmp_path / "run", "--sample", 0, "--max-new-tokens", 4, *SMALL[2:4])
    script("export_hf", "--run", tmp_path / "run", "--out", tmp_path / "exported", *SMALL[2:4])


def test_a_vision_tower_alone_serves_as_well_as_a_whole_clip(parts, tmp_path):
    CLIPVisionModel.from_pretrained(parts.clip, dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(
        (parts.clip / "preprocessor_config.json").read_bytes()
    )
    alone, _, _ = build(tmp_path, parts.llm, "linear", -2, torch.float32)
    whole, _, _ = build(parts.clip, parts.llm, "linear", -2, torch.float32)
    pixel_values = torch.randn(1, 3, 28, 28)
    assert torch.equal(alone.clip_features(pixel_values), whole.clip_features(pixel_values))


# -- how an image is fitted --------------------------------------------------------------------------------

SHAPES = [(40, 30), (31, 64), (28, 28), (200, 37)]


@pytest.mark.parametrize("size", SHAPES)
def test_padded_pixels_are_those_of_transformers_llava_processor(parts, size):
    theirs = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    image = Image.effect_noise(size, 80).convert("RGB")
    ours = ImageProcessor(parts.clip, "pad")(image)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SHAPES)
def test_siglips_pixels_are_those_of_its_own_processor(siglip, size):
    image = Image.effect_noise(size, 80).convert("RGB")
    expected = SiglipImageProcessorPil.from_pretrained(siglip)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ImageProcessor(siglip)(image), expected, atol=1e-5, rtol=0)


def test_the_fit_of_the_training_is_used_in_the_answer_and_refused_in_a_stage_that_has_another(
    flags, script, tmp_path
):
    script("stage1_align", *flags(1, run=tmp_path, image_fit="pad"), "--max-steps", 0)
    with pytest.raises(SystemExit, match="image_fit pad"):
        script("stage2_instruct", *flags(2, run=tmp_path), "--max-steps", 0)

    from weights import load
    from plumbing import read_run

    run = read_run(tmp_path / "stage1", "stage1_align.py", None)
    assert load(tmp_path / "stage1", run, torch.device("cpu"), torch.float32)[2].image_fit == "pad"


def test_a_preprocessor_for_another_size_than_the_encoders_is_refused(parts, tmp_path):
    from plumbing import UserError

    CLIPVisionModel(CLIPConfig(vision_config=VISION).vision_config).save_pretrained(tmp_path)
    config = json.loads((parts.clip / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "crop_size": 32}))
    with pytest.raises(UserError, match="the encoder wants 28"):
        build(tmp_path, parts.llm, "linear", -2, torch.float32)
