"""The lessons: each one runs, and lessons/README.md shows what was measured."""

import importlib
import json
import random
import re

import pytest
import torch
from conftest import REPOSITORY

import toy.world
from data import ChatDataset, ChatTemplate, collate
from lessons import change_patches, contrastive, experiment, full_finetuning, run
from model import Llava
from support import step_batches
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
        patch.setattr(full_finetuning, "TIMED_STEPS", 2)
        patch.setattr(contrastive, "HELDOUT", 6)
        patch.setattr(contrastive, "PICTURES", 200)
        patch.setattr(experiment, "HELDOUT", 6)
        patch.setattr(experiment, "LIMIT", 64)
        yield
    experiment.train_baseline.cache_clear()


@pytest.mark.parametrize("name", run.NAMES)
def test_a_lesson_runs_and_leaves_the_project_unchanged(small, name, monkeypatch):
    if name == "change_patches":  # after one step, no answer is correct, so it would have no question
        monkeypatch.setattr(change_patches, "STAGE1_STEPS", 1)
        monkeypatch.setattr(change_patches, "answer", lambda trained, questions: [
            question.reference for question in questions])
    functions = [dict(vars(c)) for c in (Llava, ChatDataset, ChatTemplate)]
    modules = [dict(vars(stage)) for stage in experiment.STAGES.values()]
    results = run.run_lesson(name, [0])
    assert functions == [dict(vars(c)) for c in (Llava, ChatDataset, ChatTemplate)]
    assert modules == [dict(vars(stage)) for stage in experiment.STAGES.values()]
    conditions = list(results.values())
    assert len(conditions) > 1 and all(len(values) == 1 for c in conditions for values in c.values())
    if name in RESULTS:  # the committed results have the conditions and measures of this lesson
        assert {c: list(numbers) for c, numbers in results.items()} == {
            c: list(numbers) for c, numbers in RESULTS[name].items()}


@pytest.mark.parametrize("name", ["double_shift", "label_questions", "tokenize_pieces"])
def test_a_lesson_that_is_run_alone_trains_its_baseline_before_it_replaces_anything(small, name, monkeypatch):
    def all_functions():
        return [dict(vars(part)) for part in (Llava, ChatDataset, ChatTemplate, step_batches)]

    def train_unchanged(*args, **settings):
        assert all_functions() == before
        return train(*args, **settings)

    importlib.import_module(f"lessons.{name}")  # the lesson's own train() is not replaced below
    experiment.train_baseline.cache_clear()  # as if no other lesson had run before
    before, train = all_functions(), experiment.train
    monkeypatch.setattr(experiment, "train", train_unchanged)  # which train_baseline() calls
    run.run_lesson(name, [0])


def test_full_finetuning_changes_every_weight_of_the_llm_and_none_of_clip(small):
    before = experiment.train_baseline(1, 0)
    with experiment.replaced(Llava, add_lora=full_finetuning.train_all_weights):
        after = experiment.train(2, 0, "all-weights", before, lr=1e-3)
    old, new = (dict(trained.model.named_parameters()) for trained in (before, after))
    assert list(old) == list(new)
    for name in old:
        assert torch.equal(old[name], new[name]) == name.startswith("vision_tower."), name


def test_the_time_of_a_step_is_measured_without_changing_a_weight(small):
    model = experiment.train_baseline(2, 0).model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dataset = experiment.train_baseline(2, 0).heldout_dataset
    batch = collate([dataset[0], dataset[1]], pad_token_id=2)
    del batch["skipped"]
    [seconds] = full_finetuning.seconds_per_step([model], batch)
    assert seconds > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_the_contrastive_loss_is_the_mean_over_both_directions():
    s = torch.randn(5, 5, dtype=torch.float64)
    p, q = s.exp() / s.exp().sum(1, keepdim=True), s.exp() / s.exp().sum(0, keepdim=True)
    expected = sum(-(p[i, i].log() + q[i, i].log()) / 2 for i in range(5)) / 5
    torch.testing.assert_close(contrastive_loss(s), expected)
    matched = contrastive_loss(20 * torch.eye(5))
    assert matched < 1e-6 < contrastive_loss(20 * torch.eye(5).roll(1, dims=0))


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
    files = {path.stem for path in (REPOSITORY / "lessons").glob("*.py")} - {"run", "experiment", "toy_parts", "walk"}
    assert files == set(run.NAMES) and len(run.NAMES) == len(files)
    for name in run.NAMES:
        lesson = importlib.import_module(f"lessons.{name}")
        assert lesson.__doc__ and lesson.EXPECTED and lesson.MEANING, name


def test_the_readme_shows_the_committed_results_of_three_seeds():
    assert set(RESULTS) == set(run.NAMES)
    for conditions in RESULTS.values():
        assert all(len(values) == 3 for numbers in conditions.values() for values in numbers.values())
    assert README.split(run.START)[1] == run.make_report(RESULTS)


def test_the_walk_prints_every_step_of_a_record_and_its_terms_add_up_to_the_loss(script, flags, capsys):
    script("stage1_align", *flags(1, max_steps=1))
    capsys.readouterr()
    script("lessons.walk", "--run", "runs/toy", "--record", 1)
    printed = capsys.readouterr().out
    steps = re.findall(r"^(?:support/records|data|model|stage1_align)\.py, .*", printed, re.M)
    assert len(steps) == 9
    terms = [float(term) for term in re.findall(r"-log p = +([\d.]+)", printed)]
    total, count, mean = re.search(r"loss = ([\d.]+) / (\d+) = ([\d.]+) nats", printed).groups()
    assert len(terms) == int(count) and sum(terms) == pytest.approx(float(total), abs=1e-3 * len(terms))
    assert float(mean) == pytest.approx(float(total) / int(count), abs=1e-3)
