"""Whatever makes a step cheaper computes the same thing: loss and gradients are those of the plain path."""

import json
import shutil

import pytest
import torch
from conftest import N, draw
from data import IGNORE_INDEX, collate
from model import LORA_TARGETS
from peft import LoraConfig


@pytest.fixture
def step(tiny, template, image_processor):
    """step(change) → (loss, gradients) of one batch of unequal lengths, one row without an image, on a model
    and a batch that `change` has had in its hands."""
    samples = []
    for colour, repeats in (("red", 1), ("blue", 4), (None, 2)):
        question = {"role": "user", "content": "<image>\n" * (colour is not None) + "What object is shown?"}
        said = {"role": "assistant", "content": " ".join(["a solid cold road ."] * repeats)}
        ids, labels = template.encode([question, said], N)
        pixel_values = colour and image_processor(draw(colour))
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixel_values})

    def run(change=lambda model, batch: None):
        model, _, _ = tiny()
        torch.manual_seed(3)
        model.add_lora(LoraConfig(r=4, target_modules=LORA_TARGETS))
        for parameter in model.trainable().values():
            torch.nn.init.normal_(parameter, std=0.1)
        model.projector.requires_grad_(True)
        model.train()
        batch = collate(samples, template.tokenizer.pad_token_id)
        change(model, batch)
        loss = model(**batch).sum()
        loss.backward()
        return loss.detach(), {name: parameter.grad for name, parameter in model.trainable().items()}

    return run


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    assert one[1].keys() == other[1].keys()
    largest = max(gradient.abs().max() for gradient in other[1].values())
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=1e-6 * largest.item(), msg=name)


def test_activation_checkpointing_changes_no_gradient_and_computes_blocks_twice(step):
    calls = []

    def checkpointed(model, batch):
        model.checkpoint_activations()
        for layer in model.llm.get_decoder().layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    assert_same(step(checkpointed), step())
    assert len(calls) == 4  # two blocks, forward and once more in backward


def test_kept_features_change_no_gradient(step):
    def features_instead_of_pixels(model, batch):
        batch["pixel_values"] = model.clip_features(batch["pixel_values"])
        model.vision_tower = None  # it could not be asked

    assert_same(step(features_instead_of_pixels), step())


def test_no_mask_for_padding_on_the_right_changes_no_gradient(step):
    def with_a_mask(model, batch):
        decoder = model.llm.get_decoder()
        plain = decoder.forward
        decoder.forward = lambda **kwargs: plain(**{**kwargs, "attention_mask": batch["attention_mask"]})

    assert_same(step(), step(with_a_mask))


def test_logits_at_labels_alone_change_no_gradient(step):
    def everywhere(model, batch):
        def forward(input_ids, labels, pixel_values, attention_mask):
            embeds = model.embed(input_ids, pixel_values)
            logits = model.llm(inputs_embeds=embeds, attention_mask=attention_mask).logits[:, :-1]
            return torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
            )

        model.forward = forward

    assert_same(step(), step(everywhere))


def test_mlps_are_spared_positions_that_nobody_reads_and_no_gradient_changes(step):
    rows, batches = [], []

    def counted(model, batch):
        batches.append(batch)
        for layer in model.llm.get_decoder().layers:
            layer.mlp.act_fn.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[0]))

    def everywhere(model, batch):
        for module in model.llm.modules():
            vars(module).pop("forward", None)

    assert_same(step(counted), step(everywhere))
    real = batches[0]["attention_mask"].sum().item()
    labelled = (batches[0]["labels"] != IGNORE_INDEX).sum().item()
    assert rows == [real, labelled] and labelled < real < batches[0]["input_ids"].numel()


@pytest.mark.parametrize("checkpointed", (False, True))
def test_after_a_step_all_positions_count_again(step, checkpointed):
    seen = []

    def watched(model, batch):
        if checkpointed:
            model.checkpoint_activations()
        seen.append((model, batch))

    def hidden(model, batch):
        embeds = model.embed(batch["input_ids"], batch["pixel_values"])
        return model.llm.get_decoder()(inputs_embeds=embeds).last_hidden_state

    step(lambda model, batch: seen.append(hidden(model.eval(), batch)))
    step(watched)
    torch.testing.assert_close(hidden(seen[1][0].eval(), seen[1][1]), seen[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_change_no_gradient_and_have_no_graph_break_also_when_checkpointed(step):
    def both(model, batch):
        model.compile_blocks()  # with fullgraph=True, which makes a graph break an error
        model.checkpoint_activations()

    torch._dynamo.reset()
    assert_same(step(both), step())


# -- features kept on disk ---------------------------------------------------------------------------------


def losses(folder):
    lines = [json.loads(line) for line in (folder / "stage1" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_on_kept_features_is_the_run_without_and_their_folder_is_used_again(
    script, flags, tmp_path, capsys
):
    words = [*flags(1, batch_size=3), "--epochs", 2]
    script("stage1_align", *words, "--run", tmp_path / "plain")
    for attempt in ("first", "second"):
        kept = ["--cache-features", tmp_path / "features", "--run", tmp_path / attempt]
        script("stage1_align", *words, *kept)
        assert losses(tmp_path / attempt) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
        assert f"{8 if attempt == 'second' else 0} done" in capsys.readouterr().out


def test_features_of_another_encoder_or_of_other_images_are_refused(script, flags, parts, drawn, tmp_path):
    kept = ["--cache-features", tmp_path / "features", "--max-steps", 1]
    script("stage1_align", *flags(1), *kept, "--run", tmp_path / "one")
    with pytest.raises(SystemExit, match="another vision_layer"):
        script("stage1_align", *flags(1, vision_layer=-1), *kept, "--run", tmp_path / "two")
    with pytest.raises(SystemExit, match="another image names"):
        script("stage1_align", *flags(1, limit=3), *kept, "--run", tmp_path / "three")
    with open(tmp_path / "features" / "features.bin", "r+b") as file:  # as if by another encoder
        file.write(bytes(4000))
    with pytest.raises(SystemExit, match="not what the encoder makes of these images now"):
        script("stage1_align", *flags(1), *kept, "--run", tmp_path / "four")
