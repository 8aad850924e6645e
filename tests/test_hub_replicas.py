"""The real tokenizer, template and preprocessor, at the real image size, on real photos; only the weights are
tiny."""

import json
import shutil

import pytest
import torch
from conftest import SHARED, metrics
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

CLIP, LLM = SHARED / "hub" / "clip-vit-large-patch14", SHARED / "hub" / "TinyLlama-1.1B-Chat-v1.0"
PHOTOS = SHARED / "photos"

pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in (CLIP, LLM, PHOTOS)), reason="needs shared/"
)

# In the words of LLaVA-CC3M-Pretrain-595K: lower case, a space before the full stop.
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders with the replicas, and the photos with records in both data sets' formats."""
    folder = tmp_path_factory.mktemp("replicas")
    torch.manual_seed(0)
    clip = json.loads((CLIP / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        clip[part].update(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    CLIPModel(CLIPConfig.from_dict(clip)).save_pretrained(folder / "clip")
    shutil.copy(CLIP / "preprocessor_config.json", folder / "clip")
    llm = json.loads((LLM / "config.json").read_text())
    llm.update(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(LlamaConfig.from_dict(llm)).save_pretrained(folder / "llm")
    for path in LLM.iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder / "llm")

    chat, instruct = [], []
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        question = [
            "Provide a brief description of the given image.\n<image>",
            "<image>\nSummarize the visual content of the image.",
        ][i % 2]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        chat.append({"id": f"GCC_train_{i:09d}", "image": f"{name}.jpg", "conversations": turns})
        instruct.append(
            {
                "id": f"{i:012d}",
                "image": f"{name}.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is shown?"},
                    {"from": "gpt", "value": f"The photo shows {caption}"},
                    {"from": "human", "value": "Is it a drawing?"},
                    {"from": "gpt", "value": "No, it is a photo."},
                ],
            }
        )
    (folder / "chat.json").write_text(json.dumps(chat))
    (folder / "instruct.json").write_text(json.dumps(instruct))
    return folder


def test_both_stages_and_the_sanity_check_run_on_photos_and_the_loss_falls(script, world, tmp_path, capsys):
    def flags(data, **changes):
        values = {
            "preset": "tinyllama",
            "vision_tower": world / "clip",
            "llm": world / "llm",
            "data": world / data,
            "images": PHOTOS,
            "held_out": 2,
            "batch_size": 3,
            "grad_accum": 2,
            "epochs": 12,
            "precision": "fp32",
            "device": "cpu",
            "workers": 0,
            "log_every": 1,
            "run": "photos",
            **changes,
        }
        return [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), value)]

    script("stage1_align", *flags("chat.json", lr=3e-2))
    assert "6 samples to train on, 2 held out; 12 steps" in capsys.readouterr().out
    script("stage2_instruct", *flags("instruct.json", lr=1e-2, projector_lr=1e-2))
    for stage, least in ((1, 0.95), (2, 0.5)):
        lines, _ = metrics(tmp_path / "photos" / f"stage{stage}")
        assert lines[-1]["loss"] < least * lines[0]["loss"], stage

    capsys.readouterr()
    script("sanity_check", "--preset", "tinyllama", "--run", "photos", "--sample", 0, "--max-new-tokens", 16)
    out = capsys.readouterr().out
    assert "<|user|>\n<image>×256\nWhat is shown?</s>\n<|assistant|>\nGENERATED" in out
    assert "TRUE\nThe photo" in out
    script("sanity_check", "--run", "photos", "--eval", "--max-new-tokens", 8)
    assert (tmp_path / "photos" / "sheet.png").stat().st_size > 10_000
