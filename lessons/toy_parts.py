"""Builds the toy's models and data for the exercises, as the stages do. No finished run is needed."""

from argparse import Namespace

import torch

import stage1_align
import stage2_instruct
import toy.world
from data import ChatDataset, ChatTemplate
from model import Llava, count_patches
from support.pretrained import load_image_processor, load_language_model, load_vision_tower
from support.records import load_records

PRESETS = {1: stage1_align.PRESETS["toy"], 2: stage2_instruct.PRESETS["toy"]}


def load_model(model_class=Llava, seed=0):
    """Returns (model, template). The projector has random weights, and all parameters are frozen."""
    settings, cpu = PRESETS[1], torch.device("cpu")
    vision_tower = load_vision_tower(settings["vision_tower"], torch.float32)
    template = ChatTemplate(settings["llm"], count_patches(vision_tower.config))
    torch.manual_seed(seed)
    model = model_class(vision_tower, load_language_model(settings["llm"], torch.float32, cpu),
                        template.image_token_id, settings["projector"], settings["vision_layer"])
    return model.eval(), template


def load_datasets(template, stage):
    """Returns the (training, held-out) ChatDatasets of a stage: 6,000 and 240 records."""
    settings = Namespace(**PRESETS[stage])
    toy.world.draw_if_missing()  # about 10 s, only once
    image_processor = load_image_processor(settings.vision_tower)
    train_records, heldout_records, _ = load_records(settings, template)
    return [ChatDataset(records, template, image_processor, settings.max_length)
            for records in (train_records, heldout_records)]
