"""Writes the model card of an exported model: its README.md, which the hub shows on the model's page.

The card names models and data as they were given on the command line. A path that leads outside the current
folder is shortened to its last part, because it would tell strangers about this machine.
"""

from pathlib import Path

from huggingface_hub import ModelCardData

from support.files import REPOSITORY, read_json
from tools.evaluate import make_table

# What the publishers state, by a part of the name. It can change, so the card asks its reader to check.
LICENSES = {
    "openai/clip-vit-": "OpenAI's code is under the MIT license. Its model card calls any deployed use out "
                        "of scope.",
    "TinyLlama/TinyLlama-1.1B": "Apache 2.0.",
    "LLaVA-CC3M-Pretrain-595K/": "Its images are for research only, under the license of CC3M.",
    "LLaVA-Instruct-150K/": "CC BY 4.0, within OpenAI's terms of use, because GPT-4 wrote it. Its images are "
                            "from COCO.",
    "toy/": "MIT, like the code that trained this model."}

USE = """
## Use

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="FOLDER_OR_NAME_OF_THIS_MODEL")
question = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is in the image?"}]
print(ask([{"role": "user", "content": question}], return_full_text=False)[0]["generated_text"])
```
"""


def write_model_card(folder, run_folder):
    """Writes README.md into the exported folder. run_folder: that of the exported stage."""
    paths = sorted({run_folder.parent / "stage1" / "run.json", run_folder / "run.json"})
    stages = [saved for path in paths if (saved := read_json(path))]
    last = stages[-1]
    # The hub links these names to their pages. A local folder has no page there.
    on_hub = [name for name in (last["vision_tower"], last["llm"])
              if not Path(name).is_dir() and not (REPOSITORY / name).is_dir()]
    fields = ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", tags=["llava"],
                           base_model=on_hub or None)
    vision_tower, llm = public_name(last["vision_tower"]), public_name(last["llm"])
    data = [public_name(stage["settings"]["data"]) for stage in stages]
    training = "\n".join(f"| stage {stage['stage']} | {stage['steps']:,} steps on {name} |"
                         for stage, name in zip(stages, data))
    header, *rows = make_table(read_json(run_folder / "eval.json") or {})
    losses = [f"{last['heldout'][name]:.3f}" for name in ("loss", "loss_different")]
    rows = [header, ["--"] * 4, ["loss of the reference answers at the end of training", *losses], *rows]
    scores = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    licenses = "\n".join(
        f"- {name}: {next((text for part, text in LICENSES.items() if part in name), 'unknown')}"
        for name in (vision_tower, llm, *data))
    (folder / "README.md").write_text(f"""\
---
{fields}
---

# LLaVA after stage {last["stage"]}: {vision_tower} and {llm}

The model answers questions about an image. It was trained by a small replication of
[Visual Instruction Tuning](https://arxiv.org/abs/2304.08485), which is made for learning.

| | |
|--|--|
| vision tower | {vision_tower}, hidden state {last["vision_layer"]}, not trained |
| projector | {last["projector"]} |
| language model | {llm}{", with the LoRA adapter of stage 2 merged" * (last["stage"] == 2)} |
{training}

## Scores

Losses are in nats per token. If the model ignored the image, it would be as good with a different image.

{scores}

## Licenses

This model has no license yet. Before you publish it, check the licenses of its components and of its data:

{licenses}
{USE}""", encoding="utf-8")


def public_name(name):
    """Returns a name without the folders that lead to it from outside: /home/me/clip -> clip."""
    path = Path(name)
    return path.name if path.is_absolute() or ".." in path.parts else path.as_posix()
