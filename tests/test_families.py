"""Other language models, chat templates and vision towers: the same scripts and the same guarantees."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import CHAT_TEMPLATE, CORPUS, EXAMPLES, SMALL, batch_of, build, draw, make_tokenizer, preprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, ByT5Tokenizer, CLIPConfig, CLIPVisionModel,
                          Dinov2Config, Dinov2Model, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPTNeoXConfig, GraniteConfig,
                          LlamaConfig, MistralConfig, Phi3Config, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen3Config, SiglipConfig, SiglipModel, SiglipVisionModel)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data import IGNORE_INDEX, IMAGE_TOKEN, ChatTemplate, collate
from support.errors import UserError
from support.evaluation import AnswerPrinter, generate_answers
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


def make_family(folder, config_class, chat_template, byte_level, **config):
    """Saves a tiny random model of a family and a tokenizer of its kind. Returns the folder."""
    if byte_level:
        tokenizer = byte_level_tokenizer(folder, chat_template)
    else:
        tokenizer = make_tokenizer(folder, chat_template)
        tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    config = config_class(**SIZES, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=2,
                          pad_token_id=None, **config)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request, tmp_path_factory):
    """The folder of a tiny random model of each family."""
    return make_family(tmp_path_factory.mktemp(request.param), *FAMILIES[request.param])


# -- labels ------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat object is shown?"}]
# What each template writes, by hand: before the first question, before a question, between question and
# answer, before the answer (trained, because the prompt does not contain it), the end token, after it.
WRITTEN = {
    "llama": ("", "<|user|>\n", "</s>\n<|assistant|>\n", "", "</s>", "\n"),
    "llama3": ("<bos>", "<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>", ""),
    "qwen2": ("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>", "\n"),
    "qwen3": ("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n",
              "<|im_end|>", "\n"),
    "mistral": ("<s>", "[INST] ", " [/INST]", " ", "</s>", ""),
    "gemma": ("<s>", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "", "<end_of_turn>",
              "\n"),
    "gemma3": ("<bos>", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "", "<end_of_turn>",
               "\n"),
}
# The letters of the end tokens, and other short texts that occur in what the templates write.
LETTERS = "s</>deimnoprtu_|[]IST xq.\n"
ANSWERS = st.one_of(st.sampled_from([letter for letter in LETTERS if letter.strip()]),
                    st.text(LETTERS, min_size=1, max_size=3).filter(str.strip),
                    st.sampled_from(["是的, 🫒", "end", "im", "of", "turn", "user", "model", "</", "s>", "<<",
                                     "|>"]),
                    st.sampled_from(["</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<think>"]))


@cache
def template_of(folder):
    return ChatTemplate(folder)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(turns=st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=3))
def test_labels_of_short_answers_are_exactly_the_answer_and_its_end_token(llm, turns):
    """A search for the answer "s" would also find it in "</s>", and the newline after it would be trained."""
    template = template_of(llm)
    texts = [text for turn in turns for text in turn]
    texts[0] += "\n<image>"
    record = {"id": 1, "conversations": [{"from": ("human", "gpt")[i % 2], "value": text}
                                         for i, text in enumerate(texts)]}
    messages = template.to_messages(record, has_image=True)
    begin, before, between, opening, end, after = WRITTEN[llm.name.rstrip("0")]
    text, trained = begin, []  # trained: first character and end of what should be trained
    for i in range(0, len(messages), 2):
        text += before + messages[i]["content"] + between
        answer = messages[i + 1]["content"] + end
        if "<think>" not in opening or i + 2 == len(messages):  # Qwen3: only before the last answer
            answer = opening + answer
        trained.append((len(text), len(text + answer)))
        text += answer + after
    assert template.render(messages) == text

    ids, labels = template.encode(messages, 4)
    bos = template.tokenizer.bos_token_id
    assert ids.count(template.image_token_id) == 4 and (bos is None or ids.count(bos) == 1)
    for k in range(1, len(messages), 2):
        prompt = template.encode_prompt(messages[:k], 4)
        assert ids[:len(prompt)] == prompt and labels[len(prompt)] != IGNORE_INDEX
    offsets = template.tokenize(text, 4)[1]
    runs = []  # the characters of each run of trained tokens
    for t, label in enumerate(labels):
        if label != IGNORE_INDEX:
            assert label == ids[t]
            if t == 0 or labels[t - 1] == IGNORE_INDEX:
                runs.append([offsets[t][0], None])
            runs[-1][1] = offsets[t][1]
    assert [tuple(run) for run in runs] == trained


def test_a_template_that_ends_no_answer_or_changes_texts_is_refused(tmp_path):
    broken = {
        "no end token": CHATML.replace("<|im_end|>", " "),
        "changes the text of an answer": CHATML.replace("message['content']", "message['content'] | upper"),
        "renders a prompt differently": CHATML.replace(
            "message['role'] + '", "(message['role'] if loop.last else 'past') + '"),
        "cannot be used": "{{ raise_exception('only one turn') }}",
    }
    for i, (message, chat_template) in enumerate(broken.items()):
        folder = tmp_path / str(i)
        byte_level_tokenizer(folder, chat_template)
        looks_complete(folder)
        with pytest.raises(UserError, match=message) as error:
            ChatTemplate(folder)
        assert "\n" not in str(error.value)


def looks_complete(folder):
    """Adds a config and an empty file of weights, so that a folder with a tokenizer alone is taken for a model.
    Returns the folder."""
    LlamaConfig().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("loss", ["capitals", "accents", "spaces"])
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, loss):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.normalizer = {
        "capitals": normalizers.Lowercase(), "spaces": normalizers.Replace("  ", " "),
        "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])}[loss]
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer turns .* into") as error:
        ChatTemplate(looks_complete(tmp_path))
    assert "\n" not in str(error.value)


def test_the_prompt_is_the_same_on_every_day(tmp_path):
    """Llama 3.2's template writes today's date into the system message."""
    byte_level_tokenizer(tmp_path, "{{ 'Today: ' + strftime_now('%d %b %Y') }}" + CHATML)
    template = ChatTemplate(looks_complete(tmp_path))
    assert template.render(QUESTION).startswith("Today: 26 Jul 2024<")
    assert "strftime_now(" not in template.tokenizer.chat_template  # nor in an export


def test_the_answer_prefix_of_a_template_is_trained_but_not_part_of_an_answer(tmp_path, capsys):
    template = ChatTemplate(make_family(tmp_path, *FAMILIES["qwen3"]))
    messages = QUESTION + [{"role": "assistant", "content": "Yes ,\n是的"}]
    _, labels = template.encode(messages, 4)
    labeled = [label for label in labels if label != IGNORE_INDEX]
    assert template.tokenizer.decode(labeled).startswith("<think>\n\n</think>\n\nYes")
    assert template.decode(labeled) == messages[1]["content"]
    record = {"conversations": [{"from": "human", "value": "Who?"},
                                {"from": "gpt", "value": "<think>\n\n</think>\n\nYes"}]}
    assert template.to_messages(record, has_image=False)[1]["content"] == "Yes"  # a reference answer

    printer = AnswerPrinter(template)
    for token in labeled:
        printer.put(torch.tensor([token]))
        assert "\ufffd" not in capsys.readouterr().out and printer.ids[-1] == token
    printer.end()
    printer = AnswerPrinter(template)
    printer.put(torch.tensor(labeled))
    printer.end()
    assert capsys.readouterr().out.endswith("Yes ,\n是的\n")


# -- losses and whole runs ---------------------------------------------------------------------------------


def test_generation_stops_at_every_end_token_of_the_models_own_files(parts, tmp_path):
    llm = make_family(tmp_path, *FAMILIES["llama3"])
    model, template = build(parts.clip, llm)
    prompt = {"input_ids": template.encode_prompt([{"role": "user", "content": "Sure?"}], 0),
              "pixel_values": None}
    batch = collate([prompt], 0, padding_side="left")
    free = model.generate(**batch, end_token_ids=template.end_token_ids, max_new_tokens=12)[0].tolist()
    ends = [template.tokenizer.convert_tokens_to_ids("<|endoftext|>"), free[4]]
    config = json.loads((llm / "generation_config.json").read_text())
    (llm / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    template = ChatTemplate(llm)
    assert template.end_token_ids == [template.end_token_id, *ends, 2]  # 2 is in config.json
    [answer] = generate_answers(model, template, [prompt], torch.device("cpu"), 12)
    assert answer == template.decode(free[:free.index(free[4]) + 1])


@pytest.mark.parametrize("config_class, layers", [(Phi3Config, "gate_up_proj, o_proj, qkv_proj"),
                                                  (GPTNeoXConfig, "dense_h_to_4h, query_key_value")])
def test_an_llm_with_other_layers_than_lora_knows_is_refused_before_stage_1(
        flags, refusal, tmp_path, config_class, layers):
    make_tokenizer(tmp_path / "other")
    AutoModelForCausalLM.from_config(config_class(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=400,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=2)).save_pretrained(tmp_path / "other")
    sentence = refusal("stage1_align", *flags(1, llm=tmp_path / "other"))
    assert layers in sentence and "other consist of the layers" in sentence


def test_the_loss_is_the_familys_own(llm, parts):
    """The losses of a padded batch are those of the family's own forward() on each row alone."""
    model, template = build(parts.clip, llm)
    rows = []
    for question, answer in (("Sure?", "Yes"), ("What is it?", "the olives : 是的, 🫒 .")):
        rows.append(template.encode([{"role": "user", "content": question},
                                     {"role": "assistant", "content": answer}], 0))
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


def test_greedy_answers_are_the_familys_own(llm, parts):
    model, template = build(parts.clip, llm)
    prompts = [{"input_ids": template.encode_prompt([{"role": "user", "content": text}], 0),
                "pixel_values": None} for text in ("Sure?", "What is it?")]
    batch = collate(prompts, 0, padding_side="left")
    ours = model.generate(**batch, end_token_ids=[3], max_new_tokens=12)
    theirs = model.llm.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long(),
                                do_sample=False, eos_token_id=3, pad_token_id=3, max_new_tokens=12)
    assert torch.equal(ours, theirs[:, batch["input_ids"].shape[1]:])


def test_both_stages_the_sanity_check_and_the_export_run_on_every_family(
        llm, parts, flags, script, tmp_path, capsys):
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, llm=llm, run=tmp_path / "run"), "--max-steps", 3)
        lines = (tmp_path / "run" / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
        assert len(losses) == 3 and losses[-1] < losses[0]
    script("sanity_check", "--run", tmp_path / "run", "--sample", 0, "--max-new-tokens", 4, *SMALL[2:4])
    assert "GENERATED" in capsys.readouterr().out
    # The export fails if the exported model answers differently from the run.
    script("tools.export_hf", "--run", tmp_path / "run", "--out", tmp_path / "exported", *SMALL[2:4])


@pytest.mark.parametrize("config_class, change", [(Gemma2Config, {"final_logit_softcapping": 30.0}),
                                                  (GraniteConfig, {"logits_scaling": 2.0})])
def test_an_llm_that_changes_its_logits_after_the_head_is_refused(
        flags, refusal, tmp_path, config_class, change):
    """Llava.forward() would compute other losses than the LLM itself."""
    llm = make_family(tmp_path / "other", config_class, GEMMA, False, **change)
    assert "other changes its logits after the head" in refusal("stage1_align", *flags(1, llm=llm))


# -- vision towers -----------------------------------------------------------------------------------------

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
              patch_size=14)
NORMALIZE = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
PREPROCESSORS = {  # {tower: the file preprocessor_config.json}
    "siglip": NORMALIZE | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
                           "size": {"height": 28, "width": 28}},
    "dinov2": NORMALIZE | {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 28},
                           "do_center_crop": True, "crop_size": {"height": 28, "width": 28},
                           "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}}
WHOLE = {"siglip": SiglipVisionModel, "dinov2": Dinov2Model}
OWN_PROCESSOR = {"siglip": SiglipImageProcessorPil, "dinov2": BitImageProcessorPil}


@pytest.fixture(scope="module", params=["siglip", "dinov2"])
def tower(request, tmp_path_factory):
    """(kind, folder) of a tiny random SiglipModel, vision and text, and of a tiny Dinov2Model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    if request.param == "siglip":
        text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                    vocab_size=50)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    else:
        model = Dinov2Model(Dinov2Config(**{**VISION, "mlp_ratio": 2}, use_mask_token=False))
        for parameter in model.parameters():  # its layer scales and class token would all be the same number
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[request.param]))
    return request.param, folder


@pytest.mark.parametrize("vision_layer", [-1, -2, -4])
def test_all_patches_of_a_tower_are_kept_and_come_from_the_chosen_layer(tower, parts, vision_layer, capfd):
    kind, folder = tower
    model, _ = build(folder, parts.llm, vision_layer=vision_layer)
    image_processor = load_image_processor(folder)
    pixel_values = torch.stack([preprocess(image_processor, draw(color)) for color in ("red", "blue")])
    whole = WHOLE[kind].from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(pixel_values, output_hidden_states=True).hidden_states[vision_layer]
        assert expected.shape == (2, 5 if kind == "dinov2" else 4, 32)  # DINOv2 has a class token
        torch.testing.assert_close(model.encode_images(pixel_values), model.projector(expected[:, -4:]))
    assert "MISSING" not in capfd.readouterr().err


def test_both_stages_the_sanity_check_and_the_export_run_on_a_tower(tower, flags, script, tmp_path):
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, vision_tower=tower[1], run=tmp_path / "run"), "--max-steps", 2)
    script("sanity_check", "--run", tmp_path / "run", "--sample", 0, "--max-new-tokens", 4, *SMALL[2:4])
    script("tools.export_hf", "--run", tmp_path / "run", "--out", tmp_path / "exported", *SMALL[2:4])


@pytest.mark.parametrize("size", [(40, 30), (28, 28), (200, 37)])
def test_a_towers_pixels_are_those_of_its_own_processor(tower, size):
    kind, folder = tower
    image = Image.effect_noise(size, 80).convert("RGB")
    expected = preprocess(OWN_PROCESSOR[kind].from_pretrained(folder), image)
    torch.testing.assert_close(preprocess(load_image_processor(folder), image), expected, atol=0, rtol=0)


def test_a_preprocessor_for_another_size_than_the_vision_towers_is_refused(parts, flags, refusal, tmp_path):
    CLIPVisionModel(CLIPConfig(vision_config=VISION).vision_config).save_pretrained(tmp_path / "clip")
    config = json.loads((parts.clip / "preprocessor_config.json").read_text())
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({**config, "crop_size": 32}))
    assert "another size than 28 × 28" in refusal("stage1_align", *flags(1, vision_tower=tmp_path / "clip"))
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{}")
    assert "preprocessor_config.json" in refusal("stage1_align", *flags(1, vision_tower=tmp_path / "clip"))


def test_a_slow_tokenizer_is_named_as_such(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="slow tokenizer .ByT5Tokenizer."):
        ChatTemplate(looks_complete(tmp_path))


def test_an_llm_that_overflows_in_fp16_is_named_as_such(flags, refusal, tmp_path):
    llm = make_family(tmp_path / "llm", *FAMILIES["llama"])
    model = AutoModelForCausalLM.from_pretrained(llm)
    model.lm_head.weight.data *= 3e5 / model.lm_head.weight.abs().max()
    model.save_pretrained(llm)
    arguments = [word if word != "fp32" else "fp16" for word in flags(1, llm=llm)]
    assert "overflows in fp16: pass --precision bf16 or fp32" in refusal("stage1_align", *arguments)


def test_a_missing_tokenizer_json_is_named_as_a_tokenizer_that_loses_text(tmp_path):
    """transformers builds a tokenizer with four tokens then."""
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(UserError, match="its tokenizer turns .* into .*tokenizer.json"):
        ChatTemplate(looks_complete(tmp_path))
