r"""From a JSON record to tensors: the chat template, the label mask, samples and batches.

This is a record of LLaVA-CC3M-Pretrain-595K, for stage 1.

    {"id": "GCC_train_002582585", "image": "GCC_train_002582585.jpg", "conversations": [
        {"from": "human", "value": "Provide a brief description of the given image.\n<image>"},
        {"from": "gpt",   "value": "olive oil is a healthy ingredient used liberally ."}]}

The image is moved to the front of its question, as in the original code. With TinyLlama's chat template and
tokenizer, the record then becomes these tokens. Only two of the N image positions are written out. The label
of a labeled token is its own id, and the label of an ignored token is IGNORE_INDEX. So the model is trained
to generate the answer and the end token after it.

    ·         separates two tokens
    ▁         is a space
    <0x0A>    is a newline

    ignored   <s>·▁<·|·user·|·>·<0x0A>·<image>·<image>·<0x0A>·Pro·v·ide·▁a·▁brief·▁description·▁of·▁the·▁given
              ·▁image·.·</s>·<0x0A>·<·|·ass·istant·|·>·<0x0A>
    labeled   ol·ive·▁oil·▁is·▁a·▁health·y·▁ing·red·ient·▁used·▁liber·ally·▁.·</s>
    ignored   <0x0A>

A record of LLaVA-Instruct-150K, for stage 2, has the same form. Many have several questions, and every answer
is labeled (here in [[ ]]), because each answers a question, with all earlier turns as context:

    {"id": "000000033471", "image": "000000033471.jpg", "conversations": [
        {"from": "human", "value": "What are the colors of the bus in the image?\n<image>"},
        {"from": "gpt",   "value": "The bus in the image is white and red."},
        {"from": "human", "value": "What feature can be seen on the back of the bus?"},
        {"from": "gpt",   "value": "The back of the bus features an advertisement."}, …]}

    <s><|user|>
    <image>×256
    What are the colors of the bus in the image?</s>
    <|assistant|>
    [[The bus in the image is white and red.</s>]]
    <|user|>
    What feature can be seen on the back of the bus?</s>
    <|assistant|>
    [[The back of the bus features an advertisement.</s>]]

Three rules:
  * The first token is the tokenizer's start token, here <s>, if it has one and its files do not forbid it.
  * No code looks for padding by its id, because TinyLlama's padding token is also its end token.
  * labels[t] belongs to the token at position t. Llava.forward() shifts by one.

An image position is never labeled, because the image is part of a question. (Readers of the original code
know its id as -200. In stage 1, that code leaves the question out, see docs/paper.md.)

`python stage1_align.py --check-data` prints a record with its labeled tokens in [[ ]].
"""

import re

import jinja2
import torch
from torch.utils.data import Dataset

from model import IGNORE_INDEX
from support.errors import BadRecord, UserError
from support.pretrained import load_tokenizer
from support.processes import share_from_worker
from support.records import image_name, read_turns
from support.template_check import probe_chat_template

IMAGE_TOKEN = "<image>"

# -- text: the chat template and the label mask ------------------------------------------------------------


class ChatTemplate:
    """The LLM's tokenizer and chat template, and the labels that go with them.

    An LLM has been tuned with certain role markers, so we use its own template. Training and inference call
    the same functions, so their prompts are equal.
    """

    def __init__(self, llm_name, num_image_tokens):
        self.num_image_tokens = num_image_tokens  # N, the number of positions of an image
        loaded = load_tokenizer(llm_name)
        self.tokenizer, self.start_token_id = loaded.tokenizer, loaded.start_token_id
        self.context_length, self.num_embeddings = loaded.context_length, loaded.num_embeddings
        # The tokenizer gets one more token. The LLM's embedding table stays as it is, because Llava.embed()
        # puts an image feature wherever this id stands, so the id is never looked up.
        self.tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # Special tokens, and tokens without an embedding. escape() keeps both out of a record's texts.
        reserved = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items()
                   if token.special or i >= self.num_embeddings}
        self.reserved_pattern = re.compile("|".join(map(re.escape, reserved.values())))
        # encode() labels an answer up to and including the next of these ids. <image> never ends an answer.
        self.reserved_ids = reserved.keys() - {self.image_token_id}
        # Any token of the LLM will do as padding, because padding is known by its position.
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = pad if pad is not None and pad < self.num_embeddings else 0
        # What the template writes between a question and its answer.
        prompt = self.render([{"role": "user", "content": "QUESTION"}], is_prompt=True)
        self.answer_header = prompt.rpartition("QUESTION")[2]
        # Checks what encode() relies on. The model learns to end an answer with end_token_id. Generation
        # stops at any of end_token_ids.
        self.answer_prefixes, self.end_token_id = probe_chat_template(self)
        self.end_token_ids = list(dict.fromkeys([self.end_token_id, *loaded.end_token_ids]))

    def to_messages(self, record):
        """Returns the record's turns as [{"role", "content"}], with the image at the front of its question.

        The original code does the same (preprocess_multimodal()): "<image>\\n" + question, wherever <image>
        stood. Raises BadRecord if the record is not a conversation that can be trained on.
        """
        texts = read_turns(record)  # [question, answer, question, answer, …]
        # If no question contains <image>, the image is put in the first one.
        image_turn = next((i for i in range(0, len(texts), 2) if IMAGE_TOKEN in texts[i]), 0)
        messages = []
        for i, text in enumerate(texts):
            if i % 2:
                messages.append({"role": "assistant", "content": self.escape(text)})
            else:
                has_image = i == image_turn and image_name(record) is not None
                messages.append(self.make_question(text, has_image))
        return messages

    def make_question(self, text, has_image):
        """Returns the message of a question, with the image at its front if has_image."""
        if not has_image:
            return {"role": "user", "content": self.escape(text)}
        text = self.escape(text.replace(IMAGE_TOKEN, ""))
        # The image may be the whole question. Without strip(), some templates would change it.
        return {"role": "user", "content": f"{IMAGE_TOKEN}\n{text}".strip()}

    def escape(self, text):
        """Returns the text stripped and with special tokens broken up. "</s>" becomes "< /s>", because the
        tokenizer would encode a literal "</s>" as the end token."""
        return self.reserved_pattern.sub(lambda match: match[0][0] + " " + match[0][1:], text.strip())

    def render(self, messages, is_prompt=False):
        """Returns the conversation as one text. A prompt ends where the answer to its last
        question starts."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                      add_generation_prompt=is_prompt)
        except jinja2.TemplateError as error:  # a template can refuse a conversation
            raise UserError(f"the chat template in {self.tokenizer.name_or_path} fails: {error}") from error

    def tokenize(self, text):
        """Returns (ids, offsets); offsets[t] is the range of characters that token t stands for.

        The whole text is tokenized at once. A common mistake is to tokenize question and answer separately
        and join the ids. "olive" alone is ▁o·live, but after the newline of "<|assistant|>\\n" it is ol·ive.
        The LLM was tuned on the second form, so the separate pieces would train it on unusual tokens.
        """
        # verbose=False: no warning about the context length, because encode_record() cuts.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        start = self.start_token_id
        if start is not None and ids[:1] != [start]:  # some templates write it themselves
            ids, offsets = [start] + ids, [(0, 0)] + offsets
        if self.image_token_id in ids:  # one <image> becomes N positions, one per image feature
            at = ids.index(self.image_token_id)
            ids[at:at + 1] = ids[at:at + 1] * self.num_image_tokens
            offsets[at:at + 1] = offsets[at:at + 1] * self.num_image_tokens
        return ids, offsets

    def encode(self, messages):
        """Returns (ids, labels) of a whole conversation, two lists of the same length. labels[t] == ids[t] on
        every answer and on the end token after it; IGNORE_INDEX elsewhere.

            <|user|>↵What is it?</s>↵<|assistant|>↵olive oil .</s>↵
                     └─question┘└─ answer_header ─┘└── labeled ──┘
                                                   ↑          ↑
                                              char_start   char_end

        Labels start where the prompt ends, and reach up to and including the next special token. Some
        templates write something before the answer, Mistral for example a space. It is labeled too, because
        the model has to generate it. Raises UserError if the template changes a text.
        Source: preprocess_v1() in the original code's train.py. It tokenizes each turn once more to
        count its tokens, and masks the whole sample if the sum is wrong. Character offsets avoid that.
        """
        text = self.render(messages)
        ids, offsets = self.tokenize(text)
        labels = [IGNORE_INDEX] * len(ids)
        # char_start and char_end count characters of the text.
        char_end = last_token = 0
        for question, answer in zip(messages[::2], messages[1::2]):
            before_answer = question["content"] + self.answer_header
            question_start = text.find(before_answer, char_end)
            if question_start < 0:
                raise UserError(f"the chat template in {self.tokenizer.name_or_path} changes a question")
            char_start = question_start + len(before_answer)
            # From the first token of the answer to the next special token, which ends it.
            first_token = next((t for t in range(last_token, len(ids)) if offsets[t][0] >= char_start),
                               len(ids) - 1)
            last_token = next((t for t in range(first_token, len(ids)) if ids[t] in self.reserved_ids),
                              len(ids) - 1)
            char_end = offsets[last_token][0] if ids[last_token] in self.reserved_ids else len(text)
            if not text[char_start:char_end].strip().endswith(answer["content"]):
                raise UserError(f"the chat template in {self.tokenizer.name_or_path} changes an answer")
            labels[first_token:last_token + 1] = ids[first_token:last_token + 1]
        return ids, labels

    def encode_record(self, record, max_length):
        """Returns (input_ids, labels) of a record, cut after the last answer that fits into max_length
        tokens. (The original code cuts at max_length, inside an answer.) Raises BadRecord if none fits."""
        messages = self.to_messages(record)
        try:
            ids, labels = self.encode(messages)
        except UserError as error:
            raise BadRecord(record, "the chat template cannot render it", str(error)) from error
        if len(ids) > max_length:
            has_image = self.image_token_id in ids
            # The last labeled token of an answer is followed by one without a label.
            ends = [t + 1 for t in range(max_length)
                    if labels[t] != IGNORE_INDEX and labels[t + 1] == IGNORE_INDEX]
            end = ends[-1] if ends else 0
            ids, labels = ids[:end], labels[:end]
            if not ids or (has_image and self.image_token_id not in ids):
                raise BadRecord(record, "too long for --max-length",
                                f"its first answer, or its image, does not fit into {max_length} tokens")
        return ids, labels

    def encode_prompt(self, messages):
        """Returns the ids of a conversation that ends with a question. encode() of the same conversation with
        an answer begins with them. probe_chat_template() checks this on one example."""
        return self.tokenize(self.render(messages, is_prompt=True))[0]

    def decode(self, ids):
        """Returns the text of an answer, without special tokens and without an answer prefix."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for prefix in self.answer_prefixes:
            text = text.strip().removeprefix(prefix.strip())
        return text.strip()


# -- samples and batches -----------------------------------------------------------------------------------


class ChatDataset(Dataset):
    """Samples to train or evaluate on. Sample i is {"input_ids", "labels", "pixel_values", "skipped"}.
    `records` are Records, `template` is a ChatTemplate, and `image_processor` is the preprocessing of the
    vision tower. `max_length` is the longest sample in tokens, image positions included."""

    def __init__(self, records, template, image_processor, max_length):
        self.records, self.template, self.image_processor = records, template, image_processor
        self.max_length = max_length

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        """Returns sample i. If its record turns out to be unusable, for example because the image is broken,
        returns the next usable sample and says why in sample["skipped"]."""
        skipped = []
        for j in range(i, i + min(20, len(self))):  # 20 bad records in a row: the image folder is broken
            record = self.records[j % len(self)]
            try:
                ids, labels = self.template.encode_record(record, self.max_length)
                return {"input_ids": ids, "labels": labels, "pixel_values": self.load_pixel_values(record),
                        "skipped": skipped}
            except BadRecord as error:
                skipped.append(str(error))
        raise UserError(f"{len(skipped)} records in a row cannot be used; the last: {skipped[-1]}")

    def load_pixel_values(self, record):
        """Returns the record's image as (3, S, S) fp32, resized, cropped and normalized as the vision tower
        expects, or None if the record has no image."""
        image = self.records.open_image(record)
        if image is None:
            return None
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def make_prompt(self, i, turn=0):
        """Returns ({"input_ids", "pixel_values"}, reference answer) for one question of record i: the first
        if turn is 0. A later one is asked alone, so that no earlier reference answer helps the model."""
        record = self.records[i]
        messages, pixel_values = self.template.to_messages(record), self.load_pixel_values(record)
        question, answer = (message["content"] for message in messages[2 * turn:2 * turn + 2])
        if pixel_values is not None and not question.startswith(IMAGE_TOKEN):
            question = f"{IMAGE_TOKEN}\n{question}"
        ids = self.template.encode_prompt([{"role": "user", "content": question}])
        return {"input_ids": ids, "pixel_values": pixel_values}, answer


def count_labeled(batch):
    """Returns the number of labeled tokens of each sample: (B,). Nothing predicts the first token of a
    sequence, so its label does not count."""
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1)


def collate(samples, pad_token_id, padding_side="right"):
    """Returns a batch of tensors from a list of samples or prompts.

        input_ids       (B, T) int64
        attention_mask  (B, T) bool, False on padding
        pixel_values    (I, 3, S, S) fp32, the images of the samples, in order; (0, 3, 0, 0) without images
        labels          (B, T) int64, only for samples; prompts have none
        skipped         a list of sentences, only for samples; see ChatDataset.__getitem__()
    """
    longest = max(len(sample["input_ids"]) for sample in samples)

    def pad(values, filler):
        padding = [filler] * (longest - len(values))
        return values + padding if padding_side == "right" else padding + values

    images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    batch = {
        "input_ids": torch.tensor([pad(sample["input_ids"], pad_token_id) for sample in samples]),
        "attention_mask": torch.tensor([pad([True] * len(sample["input_ids"]), False) for sample in samples]),
        "pixel_values": torch.stack(images) if images else torch.empty(0, 3, 0, 0),
    }
    if "labels" in samples[0]:
        batch["labels"] = torch.tensor([pad(sample["labels"], IGNORE_INDEX) for sample in samples])
        batch["skipped"] = [sentence for sample in samples for sentence in sample.get("skipped", [])]
    # In a DataLoader worker, this moves the tensors to shared memory.
    return share_from_worker(batch)
