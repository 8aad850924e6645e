"""tools.page: its numbers are those of the model, the page is one safe file, and a browser shows it."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import N, metrics

from data import ChatDataset
from support.evaluation import generate_answers
from support.images import ImageStore
from support.records import image_name, read_records
from tools import page

HOSTILE = "</script><script>document.title = 'broken'</script><!-- <b>&amp;\u2028"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def results_of(path):
    """Returns the JSON in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>',
                                path.read_text(encoding="utf-8"), re.DOTALL)[1])


@pytest.fixture
def page_file(script, flags, tmp_path):
    """The page of a run whose stages have trained for one step each."""
    for stage, name in ((1, "stage1_align"), (2, "stage2_instruct")):
        script(name, *flags(stage, max_steps=1, eval_every=1, run=tmp_path / "run"))
    script("tools.page", "--run", tmp_path / "run", "--device", "cpu", "--max-new-tokens", 4)
    return tmp_path / "run" / "page.html"


@pytest.fixture
def asked(tiny, drawn):
    """A model, a held-out question with its image, and what the page shows of it."""
    model, template, image_processor = tiny()
    records = read_records(drawn / "instruct.json", ImageStore(drawn / "images.zip"))
    dataset = ChatDataset(records, template, image_processor, 512)
    args = SimpleNamespace(batch_size=3, max_new_tokens=6, questions=2)
    question = page.choose_questions(dataset, 2)[0]
    mean = page.mean_feature(model, dataset, torch.device("cpu"))
    described = page.describe_question(model, template, dataset, question, mean, {}, args)
    return SimpleNamespace(model=model, template=template, dataset=dataset, question=question, mean=mean,
                           described=described, prompt=dataset.make_prompt(question.record, question.turn)[0])


# -- the numbers -------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_the_model_with_changed_features(asked):
    def answer(change):
        hook = asked.model.projector.register_forward_hook(lambda module, inputs, output: change(output))
        [text] = generate_answers(asked.model, asked.template, [asked.prompt], 6)
        hook.remove()
        return text

    def replaced(features, i, vector):
        features = features.clone()
        features[0, i] = vector
        return features

    names = [image_name(record) for record in asked.dataset.records]
    other = next(j for j in range(asked.question.record + 1, 8) if names[j] != names[asked.question.record])
    pixels = asked.dataset.load_pixel_values(asked.dataset.records[other])
    second = asked.model.encode_images(pixels[None])[0]
    described = asked.described
    order = torch.randperm(N, generator=torch.Generator().manual_seed(asked.question.record))
    assert described["answer"] == [answer(lambda f: f), None]
    assert described["shuffled"] == [answer(lambda f: f[:, order]), None]
    assert described["erased"] == [(answer(lambda f: replaced(f, i, asked.mean)), None) for i in range(N)]
    assert described["copied"] == [(answer(lambda f: replaced(f, i, second[i])), None) for i in range(N)]
    answers = {text for text, _ in described["erased"] + described["copied"]}
    assert len(answers) > 1 and "encode_images" not in vars(asked.model)  # restored


def test_effect_and_attention_are_those_of_the_complete_model(asked):
    model, prompt_ids = asked.model, asked.prompt["input_ids"]
    features = model.encode_images(asked.prompt["pixel_values"][None])[0]
    answer_ids = asked.template.tokenizer("a cat .", add_special_tokens=False)["input_ids"]
    regions, _ = page.find_regions(N)
    erased = page.replace_each(features, asked.mean, regions)
    effect = page.effect_on_tokens(model, prompt_ids, answer_ids, features, erased, batch_size=2)
    attention, layer = page.attention_to_regions(model, prompt_ids, answer_ids, features, regions)
    assert model.llm.config._attn_implementation == "sdpa"  # restored

    model.llm.set_attn_implementation("eager")
    ids = torch.tensor(prompt_ids + answer_ids)
    first = prompt_ids.index(model.image_token_id)
    log_p = []
    for vectors in (features, *erased):
        inputs_embeds = model.llm.get_input_embeddings()(ids.masked_fill(ids == model.image_token_id, 0))
        inputs_embeds[first:first + N] = vectors
        with torch.no_grad():
            output = model.llm(inputs_embeds=inputs_embeds[None], output_attentions=True)
        log_probs = output.logits[0, len(prompt_ids) - 1:-1].log_softmax(dim=-1)
        log_p.append(log_probs[torch.arange(len(answer_ids)), answer_ids])
        if vectors is features:
            weights = output.attentions[layer - 1][0].mean(dim=0)
            torch.testing.assert_close(attention, weights[len(prompt_ids) - 1:-1, first:first + N])
    torch.testing.assert_close(effect, torch.stack([log_p[0] - other for other in log_p[1:]], dim=1),
                               rtol=1e-4, atol=1e-4)
    assert effect.shape == attention.shape == (len(answer_ids), N)


def test_characters_of_several_tokens_do_not_vanish(template):
    text = "嗎 👍🏽 é, 是的 a cat"
    ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = page.split_text(template, ids)
    assert len(pieces) == len(ids) > len(text)
    assert "".join(pieces).strip() == text and "\ufffd" not in "".join(pieces)
    assert "嗎" in pieces and "是" in pieces


@pytest.mark.parametrize("side, sizes", [(2, [1, 1]), (11, [2, 1, 2, 1, 1, 2, 1, 1]), (16, [2] * 8),
                                         (27, [4, 3, 4, 3, 3, 4, 3, 3]), (37, [5, 5, 4, 5, 5, 4, 5, 4])])
def test_regions_are_rectangles_that_cover_each_patch_once(side, sizes):
    regions, found = page.find_regions(side * side)  # a prime number of rows cannot have equal regions
    assert found == sizes and sum(sizes) == side and regions.sum(dim=1).eq(1).all()
    for i, mask in enumerate(regions.T.view(-1, side, side)):
        row, column = divmod(i, len(sizes))
        top, left = sum(sizes[:row]), sum(sizes[:column])
        assert mask[top:top + sizes[row], left:left + sizes[column]].all()
        assert mask.sum() == sizes[row] * sizes[column]
    features = torch.arange(side * side).float()[:, None]
    changed = page.replace_each(features, -features, regions)
    assert (changed[1] < 0).flatten().equal(regions[:, 1].bool()) and changed[1].abs().equal(features)


def test_a_shuffled_picture_has_each_patch_at_its_new_place():
    image = torch.arange(3 * 9).float().view(3, 3, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    order = torch.randperm(9)
    shuffled = page.shuffle_picture(image, order)
    assert shuffled[:, ::2, ::2].reshape(3, 9).equal(image[:, ::2, ::2].reshape(3, 9)[:, order])
    assert shuffled[:, 1::2, 1::2].equal(shuffled[:, ::2, ::2])


def test_the_expected_answers_follow_from_the_scene():
    scene = {"top left": ("red", "star"), "bottom right": ("blue", "cross")}
    second = {"top left": ("green", "heart"), "middle left": ("red", "circle")}
    unchanged, erased, copied = page.expected_answers("What is at the top left?", scene, second, 9)
    assert unchanged == "A red star."
    assert erased == ["Nothing."] + ["A red star."] * 8
    assert copied == ["A green heart."] + ["A red star."] * 8
    _, erased, copied = page.expected_answers("Which shape is red?", scene, second, 9)
    assert erased == [""] + ["It is a star."] * 8  # no red shape is left
    assert copied == ["", *["It is a star."] * 2, "", *["It is a star."] * 5]  # none, and two
    assert page.expected_answers("What is at the top left?", scene, None, 4) == (None, [None] * 4, [None] * 4)
    assert page.expected_answers("Is it </s>?", scene, second, 9)[0] == ""


# -- the file ----------------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_that_loads_nothing(page_file):
    text = page_file.read_text(encoding="utf-8")
    assert page_file.stat().st_size < 1_000_000
    assert set(re.findall(r"https?://[^\"'`\s]*", text)) <= {"http://www.w3.org/${space}"}
    assert not re.search(r"<link|<iframe|\bimport\b|\bfetch\(|XMLHttpRequest|@import|innerHTML|outerHTML|"
                         r"insertAdjacentHTML|document\.write|\beval\(", text)
    assert text.count("</script>") == 2 and "default-src 'none'" in text

    described = results_of(page_file)
    assert [stage["name"] for stage in described["stages"]] == ["stage 1", "stage 2"]
    assert [group["name"] for group in described["answers"]] == [
        f"records of stage {i}, answered after stage 2" for i in (1, 2)]
    for i, stage in enumerate(described["stages"], start=1):
        _, evaluations = metrics(page_file.parent / f"stage{i}")
        assert stage["evaluations"] == evaluations
        answer = [text for text, labeled in stage["tokens"] if labeled]
        assert "".join(answer).split("</s>")[0] == stage["reference"] and answer[-1] == "</s>"
        assert [f"<image>×{N}", False] in stage["tokens"]
    assert len(described["questions"]) == 5
    for question in described["questions"]:
        assert len(question["erased"]) == len(question["copied"]) == N
        assert len(question["attention"]) == len(question["effect"]) == len(question["tokens"])


# -- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    """A headless Chromium. Nothing is fetched, not even by selenium itself."""
    os.environ.update(SE_OFFLINE="true", SE_AVOID_STATS="true")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, see requirements-dev.txt")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars",
                 "window-size=1100,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield running
    running.quit()


@pytest.mark.skipif(not (CHROMIUM and shutil.which("chromedriver")),
                    reason="needs Chromium and chromedriver, see docs/checks.md")
def test_a_reader_moves_the_slider_and_breaks_the_picture_and_it_fits_a_phone(page_file, browser):
    described = results_of(page_file)
    question = described["questions"][1]
    question["question"], question["answer"] = HOSTILE, ["A cat.", "A cat."]
    question["erased"] = [["A cat.", "A cat."]] * 2 + [["Nothing.", "Nothing."], ["Two.", "Nothing."]]
    question["copied"] = [[HOSTILE, "A dog."]] + [["A cat.", None]] * 3
    described["stages"][1]["evaluations"][0] |= dict.fromkeys(("heldout_loss", "heldout_correct_more_likely"))
    described["regions"] = [2, 1]  # as in a grid of 3 × 3 patches with 2 × 2 regions
    overflowed = described["questions"][2]
    overflowed["correlation"], count = float("nan"), len(overflowed["tokens"])
    overflowed["attention"] = overflowed["effect"] = [[float("inf")] * 4] * count
    overflowed["probabilities"] = [["a", float("nan"), "b", float("nan")]] * count
    page_file.write_text(page.make_page(described), encoding="utf-8")
    browser.get(page_file.as_uri())

    def text(selector):
        return browser.find_element("css selector", selector).text

    def elements(selector):
        return browser.find_elements("css selector", selector)

    first = described["stages"][0]["evaluations"][0]
    browser.execute_script("arguments[0].focus()", elements("#nearest .slider input")[0])
    elements("#nearest .slider input")[0].send_keys("\ue011")  # the Home key: to the first evaluation
    assert text("#training .slider output") == text("#nearest .slider output") == "stage 1, step 0"
    assert f"{first['heldout_loss']:.3f}" in text("#training table")
    elements("#nearest .cell")[3].click()
    for word, cosine in first["nearest_tokens"][3]:
        assert word in text("#nearest table") and f"{cosine:.2f}" in text("#nearest table")
    elements("#nearest .slider input")[0].send_keys("\ue010")  # End
    assert text("#training .slider output") == "stage 2, step 1"
    evaluations = [line for stage in described["stages"] for line in stage["evaluations"]]
    points = elements("polyline.correct")[0].get_attribute("points").split()
    assert len(points) == len(evaluations) - 1 and not any("NaN" in point for point in points)

    wide, narrow = (elements("#break .cell")[i] for i in (0, 3))
    assert abs(wide.size["width"] - 2 * narrow.size["width"]) <= 2
    assert abs(wide.size["height"] - 2 * narrow.size["height"]) <= 2
    assert [cell.value_of_css_property("background-size") for cell in (wide, narrow)] == [
        "150% 150%", "300% 300%"]
    elements("#break option")[1].click()
    assert HOSTILE.split("\u2028")[0] in text("#break .output") and text("#break .answer") == "A cat."
    elements("#break .cell")[2].click()
    assert text("#break .answer") == "Nothing." and "(given)" in text("#break .output")
    elements("#break .cell")[2].send_keys("\ue014", "\ue007")  # arrow right, Enter
    assert text("#break .answer") == "Two." and "(not given)" in text("#break .output")
    assert len(elements("#break .cell[tabindex='0']")) == 1
    elements("#break input[value=copied]")[0].click()
    elements("#break .cell")[0].click()
    assert text("#break .answer").startswith("</script>") and "A dog." in text("#break .output")
    elements("#break .shuffle")[0].click()
    assert text("#break .answer") == question["shuffled"][0]
    elements("#break .undo")[0].click()
    assert text("#break .answer") == "A cat."

    question = described["questions"][0]
    tokens = len(question["tokens"])
    assert len(elements("#cause .tokens button")) == tokens == len(question["probabilities"])
    chosen = max(range(tokens), key=lambda i: max(question["attention"][i]) * max(question["effect"][i]))
    assert f"{100 * question['probabilities'][chosen][1]:.1f}%" in elements("#cause .output")[0].text
    elements("#cause option")[2].click()
    assert elements("#cause .output")[0].text.count("none") == 5  # instead of numbers
    assert len(elements("#labels .labeled")) == sum(
        labeled for stage in described["stages"] for _, labeled in stage["tokens"])
    shown = [example for group in described["answers"] for example in group["shown"]]
    wrong = sum(example["answer"] != example["reference"] for example in shown)
    elements("#answers input[value=wrong]")[0].click()
    assert sum(card.is_displayed() for card in elements("#answers .card")) == wrong
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True})
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert browser.title == "LLaVA: run" and not elements("b b, p > script")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
