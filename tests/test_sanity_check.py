"""What sanity_check.py shows of a model: nearest tokens, answers at every stage."""

import re

import torch
from conftest import N, REPOSITORY, draw, metrics, preprocess

from sanity_check import make_image_prompt, print_nearest_tokens
from tools.page import token_probabilities
from support.evaluation import nearest_tokens, prompt_batch


def test_a_patch_that_equals_an_embedding_is_named_after_its_token(tiny, monkeypatch):
    model, template, image_processor = tiny()
    ids = [template.tokenizer.convert_tokens_to_ids(name) for name in ("▁red", "▁cat", "<0x0A>", "▁the")]
    vectors = model.llm.get_input_embeddings().weight[ids] * torch.tensor([[3.0], [0.1], [1.0], [2.0]])
    monkeypatch.setattr(model, "encode_images", lambda pixel_values: vectors[None])  # (1, N, D)
    found = nearest_tokens(model, template, preprocess(image_processor, draw("red")), count=2)
    assert [patch[0] for patch in found] == [("red", 1), ("cat", 1), ("<0x0A>", 1), ("the", 1)]
    assert all(len(patch) == 2 and patch[1][1] < 1 for patch in found)
    assert nearest_tokens(model, template, None) == []  # a record without an image


def test_both_projectors_are_printed_side_by_side_in_the_order_of_the_patches(tiny, capsys):
    model, template, image_processor = tiny(seed=5)
    pixel_values = preprocess(image_processor, draw("red"))
    trained = nearest_tokens(model, template, pixel_values, count=2)
    print_nearest_tokens(model, template, pixel_values, stage=1)
    title, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"patch +untrained projector +after stage 1", title) and len(lines) == N
    places = ["row 1, col 1", "row 1, col 2", "row 2, col 1", "row 2, col 2"]
    for line, place, patch in zip(lines, places, trained):
        words = [f"{token[:10]} {cosine:.2f}".split() for token, cosine in patch]
        left, right = line[16:52].split(), line[52:].split()
        assert line.startswith(place) and right == sum(words, []) and left != right
    assert nearest_tokens(model, template, pixel_values, count=2) == trained  # the model is unchanged


def test_every_evaluation_logs_the_words_of_the_first_held_out_picture(script, flags, tmp_path, refusal):
    script("stage1_align", *flags(1, max_steps=2, eval_every=1))
    script("stage2_instruct", *flags(2, max_steps=1))
    for stage, count in ((1, 3), (2, 2)):
        _, evaluations = metrics(tmp_path / "runs" / "toy" / f"stage{stage}")
        words = [line["nearest_tokens"] for line in evaluations]
        assert len(words) == count and words[0] != words[-1]
        assert all(len(patches) == N and all(len(patch) == 3 for patch in patches) for patches in words)
    script("sanity_check", "--nearest-tokens", 1)
    assert "there is no held-out record 99" in refusal("sanity_check", "--nearest-tokens", 99)


def test_token_probabilities_are_those_that_generation_chose_from(tiny):
    model, template, image_processor = tiny()
    pixel_values = preprocess(image_processor, draw("red"))
    prompt = make_image_prompt(template, "What object is shown?", pixel_values)
    ids = model.generate(**prompt_batch(template, [prompt], "cpu"), end_token_ids=template.end_token_ids,
                         max_new_tokens=6)[0].tolist()
    rows = token_probabilities(model, template, prompt, ids)
    assert len(rows) == len(ids) > 1
    assert all(p >= p_other and 0 < p_other < 1 and token for token, p, _, p_other in rows)  # greedy
    # One token at a time, by transformers' own LLM.
    for k, (_, p, _, p_other) in enumerate(rows):
        embeds = model.embed(torch.tensor([prompt["input_ids"] + ids[:k]]), prompt["pixel_values"][None])
        with torch.no_grad():
            expected = model.llm(inputs_embeds=embeds).logits[0, -1].softmax(dim=-1)
        torch.testing.assert_close(torch.tensor([p, p_other]), expected.topk(2).values, atol=1e-5, rtol=0)


def test_every_stage_answers_the_same_question(script, flags, tmp_path, capsys, refusal):
    script("stage1_align", *flags(1, max_steps=2))
    draw("red").save("mine.png")
    script("sanity_check", "--image", "mine.png", "--every-stage", "--max-new-tokens", 5)
    assert "Stage 2 is not finished" in capsys.readouterr().out
    script("stage2_instruct", *flags(2, max_steps=2, lr=0.1))
    capsys.readouterr()

    def printed(*words):
        script("sanity_check", *words, "--max-new-tokens", 5)
        return capsys.readouterr().out

    question = ["--image", "mine.png", "--question", "What?"]
    titles = ["WITHOUT AN IMAGE", "UNTRAINED PROJECTOR", "AFTER STAGE 1", "AFTER STAGE 2"]
    out = printed(*question, "--every-stage")
    answers = [re.search(f"{title}\n(.*)\n", out)[1] for title in titles]
    assert "QUESTION\nWhat?" in out and len(set(answers)) > 2
    assert answers[3] in printed(*question)
    assert "QUESTION\nProvide a brief description" in printed("--every-stage", "--sample", 1)
    assert "no --stage" in refusal("sanity_check", "--every-stage", "--stage", 1)
    # The Python code of the README gives the same answer as the command.
    code = re.search("```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace("docs/sample.png", "mine.png")
         .replace("Describe the image concisely.", "What?"), {})
    assert answers[3].strip()[:10] in capsys.readouterr().out
