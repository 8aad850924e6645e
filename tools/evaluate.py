"""Evaluates a finished stage on held-out records, with the correct image and with a different image.

    python -m tools.evaluate --run runs/toy             stage 2 if it is finished, else stage 1
    python -m tools.evaluate --run runs/toy --stage 1   how much is already known before stage 2
    python -m tools.evaluate --data FILE --images DIR   on other records in LLaVA's format, such as POPE's

The toy takes about 30 seconds on 2 CPU cores. The script prints a table and the first mistakes, and writes
the numbers to eval.json in the stage's folder (eval_FILE.json for other records). If the scores are as good
with a different image, the model ignores the image.

"Captions" are the held-out records of stage 1, and "answers" are those of stage 2 or of --data. Each stage is
evaluated on both, if the run has both. Stage 2 may have forgotten how to write captions. These are the keys:

    stage                 the stage that was evaluated
    captions_loss, captions_loss_different, captions_loss_blank
                          loss of the reference answers with the correct, a different and a blank image, in
                          nats per token
    captions_correct_more_likely
                          fraction of the records whose reference answers are more likely with the correct
                          image than with a different one; chance is 0.5
    captions_same_image, captions_not_finite
                          records that these numbers leave out, if there are any: how many have no different
                          image, and the images of those whose loss is not finite
    answers_loss, …       the same numbers for the records of stage 2
    objects_f1, caption_f1
                          F1 of the objects (color, shape) in the generated captions, and of (color, shape,
                          place); only for the toy
    objects_f1_different, caption_f1_different
                          the same captions, compared with the reference answer to a different image
    qa_exact, qa_exact_different
                          fraction of the generated answers that equal the reference answer, if the question
                          is asked about the correct and about a different image. Only questions whose kind is
                          in the record ("kinds") are scored, because others can have several correct answers.
    qa_exact_by_kind, qa_exact_different_by_kind
                          the same for each kind of question
    captions_exact, …     the same for the captions, if their records name kinds
    yes_no, yes_no_different
                          accuracy, precision, recall, F1 and the fraction of answers with "yes", for
                          questions whose reference answer is yes or no, counted as POPE does
                          (arXiv:2305.10355)
    most_frequent_by_kind
                          for each kind, the fraction of the most frequent answer among the generated and
                          among the reference answers. The second is what always giving that answer would
                          score. If the first is much larger, the model has a habit.
    counts                number of generated captions and answers, and of answers by kind
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data import IMAGE_TOKEN, ChatDataset
from support.errors import UserError, printable, run_script
from support.evaluation import (generate_answers, make_heldout_batches, measure_heldout,
                                records_with_other_images)
from support.files import find_file, write_json
from support.images import ImageStore
from support.records import read_records, select_usable_records
from support.settings import INT_FROM_0, INT_FROM_1, add_run_flags
from support.trained import load_heldout_dataset, load_run
from toy.world import PLACES, caption_of, objects_in


class Question(NamedTuple):
    """One question of a held-out record."""
    record: int  # number of the record in its dataset
    turn: int  # 0 for the first question of the record
    text: str
    reference: str  # the reference answer
    kind: str  # "" if the record does not name the kind


def list_questions(dataset):
    """Returns all questions of a ChatDataset, in order."""
    questions = []
    for i in range(len(dataset)):
        record = dataset.records[i]
        messages, kinds = dataset.template.to_messages(record), record.get("kinds")
        pairs = list(zip(messages[::2], messages[1::2]))
        if not isinstance(kinds, list) or len(kinds) != len(pairs):
            kinds = [""] * len(pairs)
        for turn, ((question, answer), kind) in enumerate(zip(pairs, kinds)):
            text = question["content"].removeprefix(IMAGE_TOKEN).strip()
            questions.append(Question(i, turn, text, answer["content"], str(kind)))
    return questions


def is_toy_caption(text):
    """Returns True for a caption of the toy world, which can be rebuilt from the objects in it.

    Other captions must not be scored with the toy's grammar: it finds no object in "a man on a horse". """
    objects = {place: (color, shape) for color, shape, place in objects_in(text)}
    scene = {place: objects[place] for place in PLACES if place in objects}
    return len(scene) > 1 and caption_of(scene) == text


def evenly_spaced(items, count):
    """Returns `count` of the items at equal distances, or all items if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def answer_questions(model, template, dataset, questions, batch_size, max_new_tokens,
                     different_image=False):
    """Returns the generated answers as texts. With different_image=True, each question is asked about the
    next image of the dataset."""
    answers = []
    for start in tqdm(range(0, len(questions), batch_size), "generating answers", leave=False, disable=None):
        prompts = []
        for question in questions[start:start + batch_size]:
            prompt, _ = dataset.make_prompt(question.record, question.turn)
            if different_image and prompt["pixel_values"] is not None:
                [record] = records_with_other_images(dataset.records, question.record)
                prompt["pixel_values"] = dataset.load_pixel_values(record)
            prompts.append(prompt)
        answers += generate_answers(model, template, prompts, max_new_tokens)
    return answers


def f1(generated, reference):
    """Returns the F1 score, 2 · P · R / (P + R) = 2 · hits / (generated objects + reference objects), of two
    lists with the set of objects in each caption. P and R are computed over all captions together."""
    hits = sum(len(objects & correct) for objects, correct in zip(generated, reference))
    return 2 * hits / max(1, sum(map(len, generated)) + sum(map(len, reference)))


def score_captions(captions, references):
    """Returns the F1 scores of captions of the toy world, as a dict."""
    scores = {}
    for name, length in (("objects_f1", 2), ("caption_f1", 3)):  # of (color, shape, place)
        generated, reference = ([{phrase[:length] for phrase in objects_in(text)} for text in texts]
                                for texts in (captions, references))
        scores[name] = f1(generated, reference)
        scores[f"{name}_different"] = f1(generated, reference[1:] + reference[:1])
    return scores


def score_answers(questions, answers, name="qa_exact"):
    """Returns the fraction of answers that equal the reference answer, in total and by kind, as a dict."""
    correct = {}  # {kind: [one bool per question]}
    for question, answer in zip(questions, answers):
        correct.setdefault(question.kind, []).append(answer == question.reference)
    return {name: sum(map(sum, correct.values())) / len(questions),
            f"{name}_by_kind": {kind: sum(correct[kind]) / len(correct[kind]) for kind in sorted(correct)}}


def is_yes_no(text):
    return text.lower().rstrip(".") in ("yes", "no")


def score_yes_no(references, answers):
    """Returns the scores of POPE's evaluate.py, in which "yes" is the positive class. As there, an answer
    counts as yes unless its first sentence contains "no" or "not"."""
    says_yes = [not {"No", "no", "not"} & set(answer.split(".")[0].replace(",", "").split())
                for answer in answers]
    is_yes = [reference.lower().startswith("yes") for reference in references]
    hits = sum(says and true for says, true in zip(says_yes, is_yes))
    return {"accuracy": sum(says == true for says, true in zip(says_yes, is_yes)) / len(answers),
            "precision": hits / max(1, sum(says_yes)), "recall": hits / max(1, sum(is_yes)),
            "f1": 2 * hits / max(1, sum(says_yes) + sum(is_yes)), "yes": sum(says_yes) / len(answers)}


def most_frequent_shares(questions, answers):
    """Returns {kind: [share of the most frequent generated answer, share of the most frequent reference]}."""
    pairs = {}  # {kind: [(generated answer, reference answer)]}
    for question, answer in zip(questions, answers):
        pairs.setdefault(question.kind, []).append((answer, question.reference))
    return {kind: [Counter(texts).most_common(1)[0][1] / len(texts) for texts in zip(*pairs[kind])]
            for kind in sorted(pairs)}


def make_table(result):
    """Returns the content of eval.json as rows of texts. The first row is the header."""
    rows = [("held-out records, with the", "correct image", "different image", "blank image")]
    for name in ("captions", "answers"):
        if f"{name}_loss" in result:
            rows += [(f"{name}: loss, nats per token", *(f"{result[f'{name}_loss{image}']:.3f}"
                                                         for image in ("", "_different", "_blank"))),
                     (f"{name}: correct image more likely", f"{result[f'{name}_correct_more_likely']:.1%}",
                      "chance 50%")]
        if f"{name}_same_image" in result:
            rows.append(("    records left out: same image", str(result[f"{name}_same_image"])))
        if f"{name}_not_finite" in result:
            rows.append(("    records left out: not finite", str(len(result[f"{name}_not_finite"]))))
    for key, label in (("objects_f1", "captions: F1 of color and shape"),
                       ("caption_f1", "captions: F1 of color, shape and place"),
                       ("captions_exact", "captions: equal to the reference answer"),
                       ("qa_exact", "answers: equal to the reference answer")):
        if key in result:
            rows.append((label, f"{result[key]:.3f}", f"{result[f'{key}_different']:.3f}"))
        for kind, fraction in result.get(f"{key}_by_kind", {}).items():
            count = result["counts"]["captions_by_kind" if "captions" in key else "answers_by_kind"][kind]
            rows.append((printable(f"    {kind} ({count})"), f"{fraction:.3f}",
                         f"{result[f'{key}_different_by_kind'][kind]:.3f}"))
    if "yes_no" in result:
        rows.append((f"answers to {result['counts']['yes_no']} yes/no questions, counted as POPE does "
                     '(all without "no" or "not" are "yes")',))
        rows += [(f"    {'answered with yes' if name == 'yes' else name}", f"{value:.3f}",
                  f"{result['yes_no_different'][name]:.3f}") for name, value in result["yes_no"].items()]
    if shares := result.get("most_frequent_by_kind"):
        rows.append(("fraction of the most frequent answer among", "generated", "reference"))
        rows += [(printable(f"    {kind}"), *(f"{share:.3f}" for share in pair))
                 for kind, pair in shares.items()]
    return rows


def evaluate(model, dataset, name, result, args):
    """Evaluates the model on a ChatDataset and adds the numbers to `result`. Returns a title and pairs of a
    question and its generated answer, to be printed. `name` is "captions" or "answers"."""
    # 1. With the reference answers. This can be measured on any data.
    batches = make_heldout_batches(dataset, args.batch_size)
    measured = measure_heldout(model, batches, blank=True)
    result |= {f"{name}_{key}": value for key, value in measured.items()}

    # 2. With generated answers. They can be scored only if no other answer is correct.
    questions = list_questions(dataset)
    is_toy = name == "captions" and any(is_toy_caption(question.reference) for question in questions)
    scored = [q for q in questions if (is_toy_caption(q.reference) if is_toy else q.kind)]
    yes_no = [q for q in questions if is_yes_no(q.reference)]
    asked = scored or yes_no or evenly_spaced(questions, args.count)
    settings = dataset, asked, args.batch_size, args.max_new_tokens
    answers = answer_questions(model, dataset.template, *settings)
    result["counts"][name] = len(asked)
    if not (scored or yes_no):
        return f"{len(asked)} of the generated {name}", list(zip(asked, answers))
    if is_toy:
        result |= score_captions(answers, [question.reference for question in asked])
    else:
        different = answer_questions(model, dataset.template, *settings, different_image=True)
        if scored:
            key = "captions_exact" if name == "captions" else "qa_exact"
            result["counts"][f"{name}_by_kind"] = Counter(sorted(question.kind for question in asked))
            result |= score_answers(asked, answers, key) | score_answers(asked, different, f"{key}_different")
            if name == "answers":
                result["most_frequent_by_kind"] = most_frequent_shares(asked, answers)
        positions = [i for i, question in enumerate(asked) if is_yes_no(question.reference)]
        if positions and name == "answers":
            result["counts"]["yes_no"] = len(positions)
            for key, texts in (("yes_no", answers), ("yes_no_different", different)):
                result[key] = score_yes_no([asked[i].reference for i in positions],
                                           [texts[i] for i in positions])
    mistakes = [(question, answer) for question, answer in zip(asked, answers)
                if answer != question.reference]
    title = f"{len(mistakes)} of {len(asked)} generated {name} differ from the reference answer"
    return title, mistakes[:args.count]


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    parser.add_argument("--data", help="JSON file of other records to evaluate on")
    parser.add_argument("--images", help="folder or .zip file with the images of --data")
    parser.add_argument("--heldout", type=INT_FROM_1, help="evaluate only on the first HELDOUT of the "
                        "records (default: all)")
    parser.add_argument("--batch-size", type=INT_FROM_1, default=32, help="records per batch (default: 32)")
    parser.add_argument("--max-new-tokens", type=INT_FROM_1, default=128, help="longest answer in tokens")
    parser.add_argument("--count", type=INT_FROM_0, default=5, help="how many mistakes to print; if the "
                        "answers cannot be scored, how many of them to generate and print (default: 5)")
    args = parser.parse_args()
    if bool(args.data) != bool(args.images):
        raise UserError("--data and --images belong together: pass both, or neither to evaluate on the "
                        "held-out records of the run")
    model, template, image_processor, saved = load_run(args)
    folder = args.run / f"stage{saved['stage']}"
    path, datasets = folder / "eval.json", {}
    if args.data:
        path = folder / f"eval_{Path(args.data).stem}.json"
        records = read_records(find_file(args.data), ImageStore(find_file(args.images)))
        records, _ = select_usable_records(records.subset(slice(args.heldout)), template,
                                           template.context_length, thorough=True)
        datasets["answers"] = ChatDataset(records, template, image_processor, template.context_length)
    for stage, name in ((1, "captions"), (2, "answers")):
        if args.data or not (args.run / f"stage{stage}" / "run.json").exists():
            continue
        try:
            datasets[name] = load_heldout_dataset(args.run / f"stage{stage}", template, image_processor,
                                                  args.heldout)
        except UserError as error:
            if stage == saved["stage"]:
                raise
            print(f"The {name} are left out, because the held-out records of stage {stage} cannot be used: "
                  f"{error}")
    result = {"stage": saved["stage"], "counts": {}}
    examples = [evaluate(model, dataset, name, result, args) for name, dataset in datasets.items()]
    for name, *cells in make_table(result):
        print(f"{name:<42}" + "".join(f"{cell:>17}" for cell in cells))
    for title, pairs in examples:
        print(f"\n{title}{', for example' if pairs else ''}")
        for question, answer in pairs:
            lines = question.text, f"  generated: {answer}", f"  reference: {question.reference}"
            print("\n".join(f"  {printable(line)}" for line in lines))
    write_json(path, result)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run_script(main)
