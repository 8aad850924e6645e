"""From a record of chat.json to what the model is given: ids, labels and pixels.

A record of LLaVA-CC3M-Pretrain-595K (stage 1; LLaVA-Instruct-150K has the same shape and more turns):

    {"id": "GCC_train_002582585", "image": "GCC_train_002582585.jpg", "conversations": [
        {"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
        {"from": "gpt",   "value": "olive oil is a healthy ingredient used liberally ."}]}

becomes, with TinyLlama's chat template (| stands between tokens, N image positions shortened to two):

    input_ids  <s>|<|user|>\n|<image>|<image>|\n|Provide|…|</s>|\n|<|assistant|>\n|ol|ive|▁oil|▁is|…|</s>|\n
    labels      -    -          -       -     -    -    -   -   -        -        ol|ive|▁oil|▁is|…|</s>| -

Three decisions are made here, once, for training and for inference alike:
  * bos: put in front by ChatTemplate.tokenize(), nowhere else;
  * padding: by collate(), masked by length and not by id (Llama's pad token *is* its end token);
  * the shift by one position: not here. labels[t] is the token *at* t; model.forward() shifts.

There is nothing to run in this file; `python sanity_check.py --show-mask 0` prints a record in colour.
"""

import hashlib
import re

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from plumbing import UserError
from storage import BadRecord

IMAGE_TOKEN = "<image>"
IGNORE_INDEX = -100  # what cross_entropy skips by default; no token has this id


# -- text: the template and its mask -----------------------------------------------------------------------


class ChatTemplate:
    """The LLM's own chat template, its tokenizer, and the labels that go with them.

    Using the template the LLM was tuned with is not a matter of taste: it has learned to answer after exactly
    these tokens. And one function renders for training and for inference, so that they cannot drift apart.
    """

    def __init__(self, llm_folder):
        self.tokenizer = AutoTokenizer.from_pretrained(llm_folder)
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer in {llm_folder} has no chat template: --llm wants a chat model")
        # One more word for the tokenizer, none for the LLM: this id is never looked up in the embedding,
        # because model.embed() puts an image feature in its place.
        self.tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        special = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = special.keys() - {self.image_token_id}
        self._special = re.compile("|".join(map(re.escape, special.values())))
        if self.tokenizer.pad_token_id is None:  # any would do: padding is masked by length, not by its id
            self.tokenizer.pad_token = self.tokenizer.eos_token

        # Names the template in run.json: a model answers only in the form that it was trained in.
        self.fingerprint = hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest()[:16]
        # What the mask relies on, checked with the real template before anything is trained with it.
        probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}] * 2
        try:
            ids, labels = self.encode(probe, num_image_tokens=0)
        except ValueError as error:
            raise UserError(f"the chat template in {llm_folder} cannot be used: {error}") from error
        prompts = [self.encode_prompt(probe[:i], num_image_tokens=0) for i in (1, 3)]
        if any(ids[:len(prompt)] != prompt for prompt in prompts):
            raise UserError(f"the chat template in {llm_folder} renders a prompt differently once an answer "
                            "follows it: the model would be asked in words it was not trained on")
        supervised = [label for label in labels if label != IGNORE_INDEX]
        self.end_token_id = supervised[-1] if supervised else None
        if self.end_token_id not in self._special_ids or supervised.count(self.end_token_id) != 2:
            raise UserError(f"the chat template in {llm_folder} puts no end token after an answer: the model "
                            "would never learn to stop")

    def render(self, messages, prompt=False):
        """messages → text. With prompt=True it ends where the assistant is to begin."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def tokenize(self, text, num_image_tokens):
        """text → (ids, character offsets), tokenised in one go.

        Tokenising question and answer apart and joining the ids is the classic mistake: "olive" alone is
        ▁o|live, but after the newline of "<|assistant|>\\n" it is ol|ive. The model would be trained on
        tokens that never occur at inference.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:  # some templates write it themselves
            ids, offsets = [bos] + ids, [(0, 0)] + offsets
        if self.image_token_id in ids:  # one <image> becomes the N positions that its features will take
            at = ids.index(self.image_token_id)
            ids[at:at + 1] = ids[at:at + 1] * num_image_tokens
            offsets[at:at + 1] = offsets[at:at + 1] * num_image_tokens
        return ids, offsets

    def encode(self, messages, num_image_tokens):
        """A whole conversation → (ids, labels), two lists of one length.

        labels[t] == ids[t] on every answer and on the end token after it, in every turn; -100 elsewhere.
        Raises ValueError if the template changes an answer's words, so that they cannot be found.
        The end token is an answer's last word: a model that is never shown it does not learn to stop.
        Source: preprocess_v1() in the reference's train.py, which finds the answers by tokenising pieces and
        counting; where the count is off, it throws the sample away behind a warning. Offsets cannot be off.
        """
        text = self.render(messages)
        ids, offsets = self.tokenize(text, num_image_tokens)
        labels = [IGNORE_INDEX] * len(ids)
        t = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # An answer starts where the prompt for it ends. What the template may set there (Mistral: a
            # space; Qwen3, before the last answer: empty thoughts) the model has to say itself: supervised.
            start = len(self.render(messages[:i], prompt=True))
            find = text.rfind if i + 1 == len(messages) else text.find
            if (begin := find(message["content"], start)) < 0:
                raise ValueError(f"the template rewrites the answer '{message['content'][:60]}'")
            end = begin + len(message["content"])
            # It ends with the first special token after its words. The newline behind that is nobody's.
            ended = False
            while t < len(ids) and not ended:
                if offsets[t][0] >= start:
                    labels[t] = ids[t]
                    ended = offsets[t][0] >= end and ids[t] in self._special_ids
                t += 1
        return ids, labels

    def encode_prompt(self, messages, num_image_tokens):
        """A conversation that waits for its next answer → ids; a prefix of what encode() gives for it."""
        return self.tokenize(self.render(messages, prompt=True), num_image_tokens)[0]

    def messages(self, record, has_image):
        """The record's turns as [{"role", "content"}], with the image moved to the front of its turn.

        As the reference does (preprocess_multimodal()): "<image>\\n" + question, wherever it stood. A record
        without an image is text alone, and is trained on like any other.
        Raises BadRecord if it is not a conversation that can be trained on.
        """
        turns = record.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadRecord(record, "'conversations' is not a list of turns")
        roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
        if turns and roles.get(str(turns[0].get("from"))) == "assistant":
            turns = turns[1:]  # as the reference does: an answer to nothing
        if len(turns) < 2:
            raise BadRecord(record, "no human turn with a gpt turn after it")
        questions = " ".join(str(turn.get("value")) for turn in turns[::2])
        if questions.count(IMAGE_TOKEN) > has_image:
            raise BadRecord(record, f"more {IMAGE_TOKEN} in its human turns than images",
                            f"{questions.count(IMAGE_TOKEN)}, and {int(has_image)} image")
        messages = []
        for i, turn in enumerate(turns):
            role, text = roles.get(str(turn.get("from"))), turn.get("value")
            if role != ("user", "assistant")[i % 2] or not isinstance(text, str):
                raise BadRecord(record, "turns that do not alternate between human and gpt",
                                f"turn {i + 1} should be a {('human', 'gpt')[i % 2]}'s, with a text as value")
            if not text.isprintable() and re.search("[\ud800-\udfff]", text):  # half a character of UTF-16
                raise BadRecord(record, "text that is not Unicode", f"turn {i + 1}")
            if role == "assistant" and not text.strip():
                raise BadRecord(record, "an empty answer", f"turn {i + 1}")  # it would teach to say nothing
            marked = role == "user" and IMAGE_TOKEN in text
            text = text.replace(IMAGE_TOKEN, "") if marked else text
            messages.append({"role": role, "content": self.plain(text)})
            if marked or (i == 0 and has_image and IMAGE_TOKEN not in questions):
                messages[-1]["content"] = f"{IMAGE_TOKEN}\n{messages[-1]['content']}"
        return messages[:len(messages) // 2 * 2]  # a last question without an answer teaches nothing

    def plain(self, text):
        """Text that somebody wrote, with special tokens in it made harmless: "</s>" becomes "< /s>".

        The tokenizer would take a literal "</s>" for the real end token, inside a question as inside an
        answer, and the model would learn to stop in the middle of a sentence.
        """
        return self._special.sub(lambda match: match[0][0] + " " + match[0][1:], text.strip())

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


# -- records, samples, batches -----------------------------------------------------------------------------


class ChatDataset(Dataset):
    """Samples for training: the i-th is {"input_ids", "labels", "pixel_values", "name", "bad"}.

    Args:
        records: a Records. images: an ImageStore. indices: which records, in this order.
        max_length: tokens of a sample, image positions included.
    """

    def __init__(self, records, images, indices, template, image_processor, num_image_tokens, max_length):
        self.records, self.images, self.indices = records, images, indices
        self.template, self.image_processor = template, image_processor
        self.num_image_tokens, self.max_length = num_image_tokens, max_length
        self.lengths = None  # about how many tokens each sample has: set by the check of the data
        self.features = None  # what the encoder makes of each image, where that was kept: a FeatureCache

    def __len__(self):
        return len(self.indices)

    def record(self, i):
        return self.records[self.indices[i]]

    def image(self, record):
        """The record's PIL image, or None if it is text alone. Raises BadRecord if it cannot be read."""
        name = self.images.name_for(record)
        return None if name is None else self.images.open(record, name)

    def pixel_values(self, record):
        image = self.image(record)
        return None if image is None else self.image_processor(image)

    def visual(self, i):
        """What the model gets of the i-th image: its pixels, or the features that were kept of it."""
        features = None if self.features is None else self.features[i]
        return self.pixel_values(self.record(i)) if features is None else features

    def messages(self, record):
        return self.template.messages(record, has_image=self.images.name_for(record) is not None)

    def tokens(self, record):
        """(input_ids, labels) of a record, cut to max_length. BadRecord if nothing is left to learn."""
        try:
            ids, labels = self.template.encode(self.messages(record), self.num_image_tokens)
        except ValueError as error:
            raise BadRecord(record, "an answer that the chat template rewrites", str(error)) from error
        if len(ids) > self.max_length:
            has_image = self.template.image_token_id in ids
            ids, labels = drop_last_turns(ids, labels, self.max_length)
            if has_image and self.template.image_token_id not in ids:
                ids = []  # the turn with the image is gone: what is left was not asked about it
        if not ids:
            raise BadRecord(record, "nothing left to learn within --max-length",
                            f"not one answer fits whole into {self.max_length} tokens, of which "
                            f"{self.num_image_tokens} are the image's")
        return ids, labels

    def question(self, i, turn=0):
        """The turn's question on its own, as a prompt → ({"input_ids", "pixel_values"}, true answer)."""
        record = self.record(i)
        pixel_values, messages = self.pixel_values(record), self.messages(record)
        text = messages[2 * turn]["content"]
        if pixel_values is not None and not text.startswith(IMAGE_TOKEN):
            text = f"{IMAGE_TOKEN}\n{text}"
        ids = self.template.encode_prompt([{"role": "user", "content": text}], self.num_image_tokens)
        return {"input_ids": ids, "pixel_values": pixel_values}, messages[2 * turn + 1]["content"]

    def __getitem__(self, i):
        """If the record's image cannot be decoded, the next record takes its place; sample["bad"] tells which
        did not work and why, for the training loop to count. (What can be known without decoding, the check
        of the data has sorted out before: see loading.py.)"""
        bad = []
        for index in range(i, i + 20):
            index %= len(self)
            record = self.record(index)
            try:
                ids, labels = self.tokens(record)
                return {"input_ids": ids, "labels": labels, "pixel_values": self.visual(index),
                        "name": str(record.get("id")), "bad": bad}
            except BadRecord as error:
                bad.append(str(error))
        raise UserError(f"20 records in a row cannot be used; the last: {bad[-1]}")


def drop_last_turns(ids, labels, max_length):
    """Cuts an over-long sample after the last answer that fits whole; ([], []) if not one does.

    Cutting at max_length would leave half an answer to learn, without its end, or a question without one.
    """
    after = [t + 1 for t, label in enumerate(labels)
             if label != IGNORE_INDEX and labels[t + 1:t + 2] in ([], [IGNORE_INDEX]) and t < max_length]
    end = after[-1] if after else 0
    return ids[:end], labels[:end]


def collate(samples, pad_token_id, padding_side="right"):
    """A list of samples → a batch of tensors.

    Returns:
        input_ids, labels: (B, T); attention_mask: (B, T) bool, True on what is not padding;
        pixel_values: (I, 3, H, W), the images of those samples that have one, in order. I may be 0.
    """
    longest = max(len(sample["input_ids"]) for sample in samples)

    def pad(values, filler):
        padding = [filler] * (longest - len(values))
        return values + padding if padding_side == "right" else padding + values

    images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    batch = {
        "input_ids": torch.tensor([pad(sample["input_ids"], pad_token_id) for sample in samples]),
        # By length: `input_ids != pad` would hide the ends of answers where pad is the end token.
        "attention_mask": torch.tensor([pad([True] * len(s["input_ids"]), False) for s in samples]),
        "pixel_values": torch.stack(images) if images else torch.empty(0, 3, 0, 0),
    }
    if "labels" in samples[0]:  # a prompt has none
        batch["labels"] = torch.tensor([pad(sample["labels"], IGNORE_INDEX) for sample in samples])
    return batch
