"""Writes the model card of an exported model: its README.md, which the hub shows on the model's page.

The card names models and data as they were given on the command line. A path that leads outside the current
folder is shortened to its last part, because it would tell strangers about this machine.
"""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from support.files import REPOSITORY
from tools.evaluate import make_table

# What the publishers state, by a part of the name. It can change, so the card asks its reader to check.
LICENSES = {
    "openai/clip-vit-": "OpenAI's code is under the MIT license. Its model card calls any deployed use out "
                        "of scope.",
    "TinyLlama/TinyLlama-1.1B": "Apache 2.0.",
    "LLaVA-CC3M-Pretrain-595K/": "Its images are for research only, under the license of CC3M.",
    "LLaVA-Instruct-150K/": "CC BY 4.0, within OpenAI's terms of use, because GPT-4 wrote it. Its images are "
                            "from COCO.",
    **dict.fromkeys(("toy/data/", "toy/clip-vit", "toy/llama-chat"),
                    "MIT, like the code that trained this model."),
}

CARD = """\
---
{{ card_data }}
---

# LLaVA after stage {{ stage }}: {{ vision_tower }} and {{ llm }}

The model answers questions about an image. It was trained by a small replication of
[Visual Instruction Tuning](https://arxiv.org/abs/2304.08485), which is made for learning.

| component | |
|--|--|
| vision tower | {{ vision_tower }}, hidden state {{ vision_layer }}, not trained |
| projector | {{ projector }}, trained in {{ "stages 1 and 2" if stage == 2 else "stage 1" }} |
| language model | {{ llm }}, {{ "with the LoRA adapter of stage 2 merged" if stage == 2 else "not trained" }} |

## Training

| stage | data | optimizer steps |
|--|--|--|
{{ training }}

## Scores

Losses are in nats per token. If the model ignored the image, it would be as good with a different image.

{{ scores }}

## Licenses

This model has no license yet. Before you publish it, check the licenses of its components and of its data:

{{ licenses }}

## Use

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="FOLDER_OR_NAME_OF_THIS_MODEL")
question = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is in the image?"}]
print(ask([{"role": "user", "content": question}], return_full_text=False)[0]["generated_text"])
```
"""


def write_model_card(folder, stages, evaluation):
    """Writes README.md into the exported folder.

    Args:
        stages: run.json of each stage that was trained, in order. The last one is exported.
        evaluation: eval.json of the exported stage, or None.
    """
    last = stages[-1]
    vision_tower, llm = public_name(last["vision_tower"]), public_name(last["llm"])
    data = [public_name(stage["settings"]["data"]) for stage in stages]
    # The hub links these names to their pages. A local folder has no page there.
    on_hub = [name for name in (last["vision_tower"], last["llm"])
              if not Path(name).is_dir() and not (REPOSITORY / name).is_dir()]
    header, *rows = make_table(evaluation or {})
    losses = [f"{last['heldout'][name]:.3f}" for name in ("loss", "loss_different")]
    rows = [header, ["--"] * 4, ["loss of the reference answers at the end of training", *losses], *rows]
    ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", tags=["llava"],
                      base_model=on_hub or None),
        template_str=CARD, stage=last["stage"], vision_tower=vision_tower, llm=llm,
        vision_layer=last["vision_layer"], projector=last["projector"],
        training="\n".join(f"| {stage['stage']} | {name} | {stage['steps']:,} |"
                           for stage, name in zip(stages, data)),
        scores="\n".join(f"| {' | '.join(row)} |" for row in rows),
        licenses="\n".join(f"- {name}: {license_of(name)}" for name in (vision_tower, llm, *data)),
    ).save(folder / "README.md")


def public_name(name):
    """Returns a name without the folders that lead to it from outside: /home/me/clip -> clip."""
    path = Path(name)
    return path.name if path.is_absolute() or ".." in path.parts else path.as_posix()


def license_of(name):
    """Returns what LICENSES has about a model or a data file."""
    return next((text for part, text in LICENSES.items() if f"/{part}" in f"/{name}"),
                "unknown to the script that wrote this card.")
