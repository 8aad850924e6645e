"""The lessons: each one runs, and lessons/README.md shows what was measured."""

import difflib
import importlib
import inspect
import json
import random
import re

import pytest
import torch
from conftest import REPOSITORY
from transformers import LlamaModel

import stage2_instruct
import toy.world
from data import ChatDataset, ChatTemplate
from lessons import (change_patches, contrastive, experiment, find_the_bug, image_attention, run,
                     what_to_unfreeze)
from model import Llava
from support.errors import UserError
from tools.page import token_probabilities
from support.evaluation import prompt_batch
from support.pretrained import load_tokenizer
from toy.pretrain import contrastive_loss, draw_pictures, new_clip, to_pixel_values
from toy.world import COLORS, SHAPES

RESULTS = json.loads((REPOSITORY / "lessons" / "results.json").read_text(encoding="utf-8"))
README = (REPOSITORY / "lessons" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Lessons train one step on few records, in a temporary folder."""
    toy.world.draw_if_missing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "RUNS", tmp_path_factory.mktemp("lessons"))
        patch.setattr(experiment, "STEPS", {1: 1, 2: 1, "clip": 1})
        patch.setattr(contrastive, "HELDOUT", 6)
        patch.setattr(contrastive, "PICTURES", 200)
        patch.setattr(experiment, "HELDOUT", 6)
        patch.setattr(experiment, "LIMIT", 64)
        yield
    experiment.train_baseline.cache_clear()


def everything_that_lessons_replace():
    return [dict(vars(part)) for part in (Llava, ChatDataset, ChatTemplate, LlamaModel, stage2_instruct,
                                          torch.optim, *experiment.STAGES.values())]


@pytest.mark.parametrize("name", run.NAMES)
def test_a_lesson_runs_and_leaves_the_project_unchanged(small, name, monkeypatch):
    if name == "change_patches":  # after one step, no answer is correct, so it would have no question
        monkeypatch.setattr(change_patches, "STAGE1_STEPS", 1)
        monkeypatch.setattr(change_patches, "answer", lambda trained, questions: [
            question.reference for question in questions])
    before = everything_that_lessons_replace()
    results = run.run_lesson(name, [0])
    assert everything_that_lessons_replace() == before
    conditions = list(results.values())
    assert len(conditions) > 1 and all(len(values) == 1 for c in conditions for values in c.values())
    if name in RESULTS:  # the committed results have the conditions and measures of this lesson
        assert {c: list(numbers) for c, numbers in results.items()} == {
            c: list(numbers) for c, numbers in RESULTS[name]["conditions"].items()}


@pytest.mark.parametrize("name", ["double_shift", "image_attention", "label_everything", "tokenize_pieces"])
def test_a_lesson_that_is_run_alone_trains_its_baseline_before_it_replaces_anything(small, name, monkeypatch):
    def train_unchanged(*args, **settings):
        assert everything_that_lessons_replace() == before
        return train(*args, **settings)

    run.load_lesson(name)  # the lesson's own train() is not replaced below
    experiment.train_baseline.cache_clear()  # as if no other lesson had run before
    before, train = everything_that_lessons_replace(), experiment.train
    monkeypatch.setattr(experiment, "train", train_unchanged)  # which train_baseline() calls
    run.run_lesson(name, [0])


LORA = r"llm\..*\.lora_[AB]\."


@pytest.mark.parametrize(("add_lora", "trained"), [
    (what_to_unfreeze.train_nothing_else, None),
    (what_to_unfreeze.train_outer_blocks, r"llm\.model\.layers\.[03]\."),
    (what_to_unfreeze.train_all_of_the_llm, r"llm\."),
    ("clip", rf"{LORA}|vision_tower\.encoder\.layers\.[12]\.")])
def test_a_row_of_what_to_unfreeze_changes_the_projector_and_what_its_name_says(small, add_lora, trained):
    before = experiment.train_baseline(1, 0)
    context = (what_to_unfreeze.clip_is_trained(1e-3) if add_lora == "clip" else
               experiment.replaced(Llava, add_lora=add_lora))
    with context:  # LoRA's A changes only in the second step, because its B is zero at first
        after = experiment.train(2, 0, "unfrozen", before, lr=1e-3, max_steps=2)
    old, new = (dict(each.model.named_parameters()) for each in (before, after))
    old |= {name.replace("llm.", "llm.base_model.model.", 1): p for name, p in old.items()}  # peft's names
    for name, parameter in new.items():
        base = name.replace(".base_layer", "")
        changed = base not in old or not torch.equal(old[base], parameter)
        expected = name.startswith("projector.") or bool(trained and re.match(trained, name))
        assert changed == expected, name


def test_the_image_mask_lets_patches_see_all_patches_and_keeps_text_causal(small):
    trained = experiment.train_baseline(1, 0)
    model, dataset = trained.model, trained.heldout_dataset
    prompt, _ = dataset.make_prompt(0)
    ids, pixels = torch.tensor([prompt["input_ids"]]), prompt["pixel_values"][None]
    is_image = ids[0] == model.image_token_id

    def reached():
        """Returns which inputs (columns) the output at each position (row) depends on."""
        embeds = model.embed(ids, pixels).detach().requires_grad_()
        hidden = model.llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return torch.stack([torch.autograd.grad(row.sum(), embeds, retain_graph=True)[0][0].norm(dim=1) > 0
                            for row in hidden[0]])

    causal = torch.ones(len(is_image), len(is_image)).tril().bool()
    with experiment.replaced(Llava, embed=image_attention.remembering_embed), \
            experiment.replaced(LlamaModel, forward=image_attention.forward_with_mask):
        assert torch.equal(reached(), causal | (is_image[:, None] & is_image))
        # Generation with the cache, in a batch with padding on the left, equals one pass over all tokens.
        questions = experiment.list_questions(dataset)[:3]
        prompts = [dataset.make_prompt(question.record)[0] for question in questions]
        prompts[0]["input_ids"] = prompts[0]["input_ids"][:-3]
        batch = prompt_batch(trained.template, prompts, torch.device("cpu"))
        answers = model.generate(**batch, end_token_ids=[-1], max_new_tokens=5)
        for prompt, answer in zip(prompts, answers.tolist()):
            rows = token_probabilities(model, trained.template, prompt, answer)
            assert all(p > other for _, p, _, other in rows)
    assert torch.equal(reached(), causal)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_bug_is_one_line_and_its_symptom_shows(small, monkeypatch, capsys, tmp_path, number):
    experiment.train_baseline(2, 0)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(experiment.RUNS / "baseline-seed0")
    monkeypatch.chdir(tmp_path)
    function, right, wrong, *_ = find_the_bug.BUGS[number - 1]
    source, _ = find_the_bug.broken_copy(function, right, wrong)
    lines = inspect.getsource(function).splitlines()
    added = [line for line in difflib.ndiff([line.strip() for line in lines],
                                            [line.strip() for line in source.splitlines()]) if line[0] == "+"]
    assert len(added) == 1 and wrong in added[0]
    monkeypatch.setattr("sys.argv", ["find_the_bug", str(number), "--solution"])
    find_the_bug.main()
    printed = capsys.readouterr().out
    original, broken = re.search(r"^original:  (.*)\nthis copy: (.*)$", printed, re.M).groups()
    assert original != broken and re.search("^reported:  .*https://github.com/", printed, re.M)


def test_only_with_write_a_lesson_changes_a_file_of_the_repository(small, monkeypatch, capsys):
    files = {path: path.read_bytes() for path in (REPOSITORY / "lessons").glob("*.*")}
    monkeypatch.setattr("sys.argv", ["run", "temperature", "--seeds", "0", "--steps", "1"])
    run.main()
    assert files == {path: path.read_bytes() for path in (REPOSITORY / "lessons").glob("*.*")}
    written = json.loads((experiment.RUNS / "temperature.json").read_text())
    assert written["seeds"] == [0] and "greedy (baseline)" in written["conditions"]
    assert "greedy (baseline): captions " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["run", "temperature", "--seeds", "0", "--write"])
    with pytest.raises(UserError, match="--write needs the default seeds and steps"):
        run.main()


def test_the_contrastive_loss_is_the_mean_over_both_directions():
    s = torch.randn(5, 5, dtype=torch.float64)
    p, q = s.exp() / s.exp().sum(1, keepdim=True), s.exp() / s.exp().sum(0, keepdim=True)
    expected = sum(-(p[i, i].log() + q[i, i].log()) / 2 for i in range(5)) / 5
    torch.testing.assert_close(contrastive_loss(s), expected)


def test_the_probes_read_the_patch_that_shows_the_object_and_score_unseen_ones():
    clip, scene = new_clip(load_tokenizer("toy/llama-chat")[0]), {"bottom left": ("blue", "star")}
    clip.eval()
    images = draw_pictures([scene], random.Random(0))
    with torch.no_grad():
        features, labels = contrastive.patches_of_objects(clip, [scene], images)
        states = clip.vision_model(to_pixel_values(images), output_hidden_states=True).hidden_states
    assert torch.equal(features[0], states[-2][0, 1 + 6])  # class token, then six patches before it
    assert {name: label.tolist() for name, label in labels.items()} == {
        "color": [list(COLORS).index("blue")], "shape": [list(SHAPES).index("star")]}
    torch.manual_seed(0)
    x, labels = torch.randn(300, 8), torch.arange(300) % 3
    separable = x + 20 * torch.nn.functional.one_hot(labels, 8)
    assert contrastive.probe(separable[:200], labels[:200], separable[200:], labels[200:]) == 1
    assert contrastive.probe(x[:200], labels[:200], x[200:], labels[200:]) < 0.6


def test_every_lesson_is_in_the_list_and_says_what_it_expects_and_what_came_out():
    others = {"run", "experiment", "toy_parts", "walk", "find_the_bug"}
    files = {path.stem for path in (REPOSITORY / "lessons").glob("*.py")} - others
    assert sorted(files) == sorted(run.NAMES)
    for name in run.NAMES:
        lesson = run.load_lesson(name)
        assert lesson.__doc__ and lesson.EXPECTED and lesson.MEANING, name
        assert lesson.MINUTES > 0 and lesson.DIFFICULTY in ("easy", "medium", "hard"), name


def test_the_readme_shows_the_committed_results_of_three_seeds_and_hides_them_at_first():
    assert set(RESULTS) <= set(run.NAMES)  # a lesson that has not been measured is left out
    for result in RESULTS.values():
        for measured in result["conditions"].values():
            assert all(len(values) == 3 for values in measured.values())
    report = README.split(run.START)[1]
    assert report == run.make_report(RESULTS)
    shown = re.sub(r"<details>[\s\S]*?</details>", "", report)
    assert "0.85" in report and not re.search(r"\b0\.\d\d\b", shown)
    assert "\n\n    s_ij = exp(t)" in report  # the formula stays a block


def test_the_walk_shows_each_model_whose_terms_add_up_and_the_gradient_of_stage_1(script, flags, capsys):
    script("stage1_align", *flags(1, max_steps=1))
    for models in (2, 3):
        capsys.readouterr()
        script("lessons.walk", "--record", 1)
        printed = capsys.readouterr().out
        assert len(re.findall(r"^(?:support/records|data|model|stage1_align)\.py, .*", printed, re.M)) == 10
        rows = re.findall(r"^ +\d+  '.*'((?: +[\d.]+){%d})$" % (2 * models), printed, re.M)
        losses = re.findall(r"loss = ([\d.]+) / (\d+) = ([\d.]+)", printed)
        assert len(losses) == models
        for i, numbers in enumerate(losses):
            total, count, mean = map(float, numbers)
            assert len(rows) == count and mean == pytest.approx(total / count, abs=1e-3)
            terms = [float(row.split()[2 * i]) for row in rows]
            assert sum(terms) == pytest.approx(total, abs=1e-3 * count)
        three, ignored, two = re.findall(r"labels \[.*\] +([\d.]+)", printed)
        assert three != ignored == two
        [at_patches] = re.findall(r"input of block 1 .* (\S+)$", printed, re.M)
        assert re.search(r"H_v +\(1, 4, 48\) +" + re.escape(at_patches), printed)
        assert re.search(r"^    W +\(48, 32\) +\d", printed, re.M)
        if models == 2:
            script("stage2_instruct", *flags(2, max_steps=1))
