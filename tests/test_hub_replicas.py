"""The real tokenizer, template and preprocessor, at the real image size, on real photos. Only the weights are
tiny and random."""

import json
import shutil

import pytest
import torch
from conftest import SHARED, metrics
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

PHOTOS = SHARED / "photos"

pytestmark = pytest.mark.skipif(not PHOTOS.exists(), reason="needs shared/photos")

# In the style of LLaVA-CC3M-Pretrain-595K: lower case, a space before the full stop.
CAPTIONS = {
    "animals": "a group of animals in front of a white background .",
    "cat": "a cat looks at the camera .",
    "cobra": "the cobra raises its head .",
    "diving": "a diver explores a coral reef .",
    "dogdinner": "dogs wait for their dinner at a table .",
    "frog": "a green frog sits on a leaf .",
    "extreme_ironing": "a man irons a shirt on the back of a taxi .",
    "waterview": "a wooden pier leads into a lake between mountains .",
}


def make_replica(folder, config_class, model_class, change):
    """Replaces the weights in `folder` by those of a tiny random model. Its configuration is the real one,
    changed by `change`."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    files = {path.name: path.read_bytes() for path in folder.iterdir()
             if path.name not in ("config.json", "model.safetensors")}
    torch.manual_seed(0)
    model_class(config_class.from_dict(config)).save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def shrink_clip(config):
    for half in ("text_config", "vision_config"):
        config[half].update(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)


def shrink_llm(config):
    config.update(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, initializer_range=0.3)


@pytest.fixture(scope="module")
def world(real, tmp_path_factory):
    """A folder with clip/ and llm/, and with records about the photos in the formats of both data sets."""
    folder = tmp_path_factory.mktemp("replicas")
    for name, source, *how in (("clip", real.clip, CLIPConfig, CLIPModel, shrink_clip),
                               ("llm", real.llm, LlamaConfig, LlamaForCausalLM, shrink_llm)):
        shutil.copytree(source, folder / name)
        make_replica(folder / name, *how)
    chat, instruct = [], []
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        question = ["Provide a brief description of the given image.\n<image>",
                    "<image>\nSummarize the visual content of the image."][i % 2]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        chat.append({"id": f"GCC_train_{i:09d}", "image": f"{name}.jpg", "conversations": turns})
        instruct.append({"id": f"{i:012d}", "image": f"{name}.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat is shown?"},
            {"from": "gpt", "value": f"The photo shows {caption}"},
            {"from": "human", "value": "Is it a drawing?"},
            {"from": "gpt", "value": "No, it is a photo."}]})
    (folder / "chat.json").write_text(json.dumps(chat))
    (folder / "instruct.json").write_text(json.dumps(instruct))
    return folder


def test_both_stages_and_the_sanity_check_run_on_photos_and_the_loss_falls(
        script, world, tmp_path, capsys):
    def flags(data, **changes):
        values = {"preset": "tinyllama", "vision_tower": world / "clip", "llm": world / "llm",
                  "data": world / data, "images": PHOTOS, "heldout": 2, "batch_size": 3, "grad_accum": 2,
                  "epochs": 12, "precision": "fp32", "device": "cpu", "workers": 0, "log_every": 1,
                  "run": "photos", **changes}
        return [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), value)]

    script("stage1_align", *flags("chat.json", lr=3e-2))
    out = capsys.readouterr().out
    assert "6 samples to train on, 2 held out; 12 steps" in out
    assert out.strip().endswith("next: python stage2_instruct.py --preset tinyllama --run photos")
    script("stage2_instruct", *flags("instruct.json", lr=1e-2, projector_lr=1e-2))
    for stage, least in ((1, 0.95), (2, 0.5)):
        lines, _ = metrics(tmp_path / "photos" / f"stage{stage}")
        assert lines[-1]["loss"] < least * lines[0]["loss"], stage

    assert capsys.readouterr().out.strip().endswith("next: python sanity_check.py --run photos")
    script("sanity_check", "--run", "photos", "--sample", 0, "--max-new-tokens", 16)
    out = capsys.readouterr().out
    assert "<|user|>\n<image>×256\nWhat is shown?</s>\n<|assistant|>\nGENERATED" in out
    assert "REFERENCE\nThe photo" in out and "different image" in out
