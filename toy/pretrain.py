"""Trains the two small models that replace CLIP and TinyLlama in the toy world.

    python -m toy.pretrain         trains toy/clip-vit and toy/llama-chat in about 30 min on 2 cores

The weights are committed, so you need this command only if you want to check or change them.

The CLIP learns from pictures with captions, as the real one does. Its position embeddings are initialized
with a standard deviation of 0.5 instead of the usual 0.02. Otherwise its patch features hardly encode the
place.

The Llama never sees a picture or CLIP's output. However, it is also trained to read single vectors. In 70%
of its training examples, one vector per fact, such as "red star top left", stands in the image's place: the
sum of the embeddings of these words, with noise. More than half of these examples give all nine cells in the
order of CLIP's patches. In the other 30% of all examples, the facts are text. TinyLlama has had no such
training. A model this small needs it, because otherwise it does not learn to read several words from one
vector. The toy therefore shows that a projector can learn to translate a frozen CLIP's features into vectors
that a frozen LLM already reads. It does not show how well this works for an LLM without such training.
"""

import argparse
import copy
import json
import multiprocessing
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toy.world import (CELL, PLACES, SIDE, brief_description, caption_of, conversation, heldout_scenes,
                       picture, random_scene)

HERE = Path(__file__).resolve().parent
WIDTH = 128  # hidden size of both models
IMAGE_MEAN, IMAGE_STD = [.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]  # CLIP's
# "yes_no" is missing on purpose: stage 2 has to teach this kind of question.
QUESTION_KINDS = ("count", "colour", "shape", "what_at", "where", "has_colour")
# TinyLlama's template, unchanged. <|user|> and <|assistant|> are ordinary text, but </s> is one token.
CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}")



def chat_about(scene, rng):
    """Returns chat messages: a conversation (70%) or a caption (30%). They start with <image>."""
    triples = brief_description(scene, rng)
    if rng.random() < .7:
        triples = conversation(scene, rng, QUESTION_KINDS)
    texts = [text for _, *pair in triples for text in pair]
    texts[0] = "<image>\n" + texts[0]
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def fact(scene, place):
    """Returns the words of one fact: ["red", "star", "top", "left"] or ["nothing", "top", "left"]."""
    return [*scene.get(place, ["nothing"]), *place.split()]


def facts_as_text(scene, rng):
    """Returns facts about all objects and up to two empty cells, one per line, in random order."""
    places = list(scene) + rng.sample([place for place in PLACES if place not in scene], rng.randint(0, 2))
    return "\n".join("- " + " ".join(fact(scene, place)) for place in rng.sample(places, len(places)))


def wrap_tokenizer(tokenizer):
    """Returns the tokenizer for transformers. It splits text as Llama's does and has TinyLlama's template."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        # Newlines and punctuation are never merged with a word.
        pre_tokenizers.Split(Regex(r"\n| ?[.,?!:;]"), "isolated"),
        # "▁" replaces a space and is added before the text. As with TinyLlama, a word at the start of a line
        # has a different token from the same word after a space.
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>", chat_template=CHAT_TEMPLATE, model_max_length=256)


def train_tokenizer(rng, forbidden):
    """Returns a BPE tokenizer like Llama's, trained on chats about scenes. It falls back to bytes."""
    trained = Tokenizer(models.BPE())
    wrapped = wrap_tokenizer(trained)
    texts = []
    for scene in (random_scene(rng, forbidden) for _ in range(3000)):
        text = wrapped.apply_chat_template(chat_about(scene, rng), tokenize=False)
        texts.append(text.replace("<image>", facts_as_text(scene, rng)).replace("</s>", ""))
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    bpe = json.loads(trained.to_str())["model"]
    # The order of Llama's vocabulary: special tokens, bytes, then the learned tokens.
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += sorted(bpe["vocab"].keys() - set(tokens), key=bpe["vocab"].get)
    return wrap_tokenizer(Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(merge) for merge in bpe["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True)))


def make_optimizer_step(model, lr, steps, warmup):
    """Returns a function that takes a loss and does one optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .98), weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=warmup)

    def optimizer_step(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return optimizer_step


def to_pixel_values(images):
    """Returns arrays (S, S, 3) of bytes as CLIP reads them: (B, 3, S, S)."""
    pixels = (torch.tensor(np.stack(images)) / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return pixels.permute(0, 3, 1, 2)


def save_clip(clip, folder, side):
    """Writes the weights of a CLIP for images of side × side pixels, and its preprocessor_config.json."""
    clip.half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": side, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
        "resample": 3, "size": side}, indent=2) + "\n")


def new_clip(tokenizer):
    """Returns a CLIP with random weights. The tokenizer is that of its text tower."""
    # The end token gets a new id, the last one. With eos_token_id=2, transformers would take the text feature
    # at the largest id of the caption, to support old checkpoints. Then training stalls.
    end_id = len(tokenizer)
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    clip = CLIPModel(CLIPConfig(
        projection_dim=WIDTH,
        vision_config=tower | {"num_hidden_layers": 4, "image_size": SIDE, "patch_size": CELL},
        text_config=tower | {"num_hidden_layers": 2, "vocab_size": end_id + 1, "max_position_embeddings": 64,
                             "bos_token_id": 1, "eos_token_id": end_id, "pad_token_id": end_id}))
    # With the usual 0.02 the patch embeddings are much larger than the position embeddings. A linear probe on
    # the patch features then finds color and shape of every object, but its place in only 20% of the cases.
    clip.vision_model.embeddings.position_embedding.weight.data.normal_(std=.5)
    return clip


def draw_pictures(scenes, rng):
    """Returns one picture of each scene as an array of bytes, (S, S, 3)."""
    return [np.asarray(picture(scene, rng)) for scene in scenes]


def similarities(clip, tokenizer, scenes, images):
    """Returns s_ij = exp(t) · cos(u_i, v_j), (B, B): one row per image i, one column per caption j. u_i and
    v_j are CLIP's features. The number t is trained too."""
    end_id = clip.config.text_config.eos_token_id
    rows = [[1, *tokenizer(caption_of(scene), add_special_tokens=False).input_ids] for scene in scenes]
    length = max(map(len, rows)) + 1
    ids = torch.tensor([row + [end_id] * (length - len(row)) for row in rows])
    return clip(input_ids=ids, pixel_values=to_pixel_values(images)).logits_per_image


def contrastive_loss(logits):
    """Returns CLIP's loss for the similarities s of B pairs, logits (B, B). Each image has to find its
    caption, and each caption its image:

        loss = mean over i of  -1/2 (log softmax_j(s_ij)[j = i] + log softmax_j(s_ji)[j = i])
    """
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def fit_clip(clip, tokenizer, heldout_set, rng, steps, batch_size, pictures=8000):
    """Trains a CLIP with the contrastive loss. heldout_set is what heldout_scenes() returns. It is used for
    evaluation only."""
    scenes = [random_scene(rng, heldout_set) for _ in range(pictures)]
    images = draw_pictures(scenes, rng)
    heldout = list(heldout_set.values())
    heldout_images = draw_pictures(heldout, rng)
    # With a shorter warm-up or a higher learning rate, training collapses at a loss of ln(batch size).
    optimizer_step = make_optimizer_step(clip, 7e-4, steps, warmup=.3)
    for step in range(1, steps + 1):
        chosen = rng.sample(range(len(scenes)), batch_size)
        loss = contrastive_loss(
            similarities(clip, tokenizer, [scenes[i] for i in chosen], [images[i] for i in chosen]))
        optimizer_step(loss)
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                logits = similarities(clip, tokenizer, heldout, heldout_images)
            correct = logits.argmax(1) == torch.arange(len(heldout))
            print(f"clip, step {step} of {steps}: loss {loss:.3f}; held-out accuracy "
                  f"{correct.float().mean():.3f} in choosing among {len(correct)} captions", flush=True)


def train_clip(folder, tokenizer, heldout_set, seed, steps=700, batch_size=192):
    """Trains a CLIP with the contrastive loss and saves it to `folder`."""
    torch.manual_seed(seed)
    clip = new_clip(tokenizer)
    fit_clip(clip, tokenizer, heldout_set, random.Random(seed), steps, batch_size)
    save_clip(clip, folder, SIDE)


def llama_example(scene, as_vectors, tokenizer, rng):
    """Returns one training example, in which facts about the scene replace <image>: as text, or with
    as_vectors=True each as one vector (a *fact position*). The tokenizer must encode <image> as one token.

    Returns:
        ids: L token ids; 0 at a fact position.
        fact_ids: L lists of four token ids, whose embeddings are summed at a fact position. 0 is padding.
        weights: L weights of the tokens in the loss; 0 outside the answers.
    """
    text = tokenizer.apply_chat_template(chat_about(scene, rng), tokenize=False)
    if not as_vectors:
        text = text.replace("<image>", facts_as_text(scene, rng))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [1] + encoding.input_ids
    # All answers have the same total weight, so the long captions do not dominate "It is red."
    answers = [match.span(1) for match in re.finditer(r"<\|assistant\|>\n(.*?</s>)", text)]
    answer_of = [next((n for n, (start, end) in enumerate(answers, 1) if start <= offset < end), 0)
                 for offset, _ in encoding.offset_mapping]  # 1, 2, ... in the answers, 0 elsewhere
    weights = [0.] + [1 / answer_of.count(n) if n else 0. for n in answer_of]
    fact_ids = [[0] * 4] * len(ids)
    if as_vectors:
        places = PLACES  # 60%: all cells in reading order, as CLIP's patches are
        if rng.random() < .4:  # 40%: all objects and some empty cells in random order
            empty = [place for place in PLACES if place not in scene]
            places = list(scene) + rng.sample(empty, rng.randint(0, len(empty)))
            rng.shuffle(places)
        token_ids = [tokenizer.convert_tokens_to_ids([f"▁{word}" for word in fact(scene, place)])
                     for place in places]
        assert all(all(row) for row in token_ids), "a word of a fact is not a single token"
        image = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
        ids[image:image + 1] = [0] * len(places)
        weights[image:image + 1] = [0.] * len(places)
        fact_ids[image:image + 1] = [(row + [0])[:4] for row in token_ids]
    return ids, fact_ids, weights


def collate(examples):
    """Returns ids (B, L), fact_ids (B, L, 4), weights (B, L) and is_padding (B, L), padded on the right."""
    lengths = [len(ids) for ids, _, _ in examples]
    ids, fact_ids, weights = (
        torch.tensor([row + [filler] * (max(lengths) - len(row)) for row in rows])
        for rows, filler in zip(zip(*examples), (2, [0] * 4, 0.)))
    return ids, fact_ids, weights, torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def embed_with_facts(embedding, ids, fact_ids, noise):
    """Returns the embeddings (B, L, D) of `ids`, with one noisy sum of embeddings at each fact position.

    The noise imitates the errors of a projector. A fact with the tokens t becomes the vector

        scale * (sum over t of (1 + 0.3 n a_t) embedding_t  +  0.5 n s u offset  +  0.7 n s v jitter)

    n is the noise level, s the standard deviation of all embeddings, and scale = exp(0.4 n z). The numbers
    a_t and the vector `jitter` are drawn for each fact. The numbers z, u, v and the vector `offset` are
    drawn once for all facts of an example. u and v are uniform in 0..1. The others are standard normal.
    """
    is_fact = fact_ids[..., 0] > 0  # (B, L)
    token_weights = (fact_ids[is_fact] > 0).float()  # (N, 4) for the N facts of the batch; 0 for padding
    if noise:
        token_weights = token_weights * (1 + .3 * noise * torch.randn(token_weights.shape))
    vectors = (embedding(fact_ids[is_fact]) * token_weights[..., None]).sum(1)  # (N, 4, D) -> (N, D)
    if noise:
        example_of = is_fact.nonzero()[:, 0]  # (N,)
        noise_std = noise * embedding.weight.detach().std()
        scale = torch.exp(.4 * noise * torch.randn(len(ids), 1))  # (B, 1)
        offset_size, jitter_size = torch.rand(2, len(ids), 1)  # u and v, (B, 1) each
        offset = .5 * noise_std * offset_size * torch.randn(len(ids), WIDTH)  # (B, D)
        jitter = .7 * noise_std * jitter_size[example_of] * torch.randn(vectors.shape)  # (N, D)
        vectors = scale[example_of] * (vectors + offset[example_of] + jitter)
    return embedding(ids).masked_scatter(is_fact[..., None], vectors)


def train_llama(folder, tokenizer, heldout_set, seed, steps=4000, batch_size=32):
    """Trains a Llama to answer questions about the facts in its context, and saves it to `folder`. If it
    learned only captions, it would ignore the context, and no projector could repair that."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=336, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        pad_token_id=2))
    embedding = llama.model.embed_tokens
    # With the usual 0.02, the first steps of a projector would overshoot the embeddings by far.
    embedding.weight.data.normal_(std=.5)
    with_image_token = copy.deepcopy(tokenizer)
    with_image_token.add_tokens(["<image>"], special_tokens=True)

    def batches():
        # Sorting the examples of eight batches by length saves a third of the padding.
        while True:
            examples = [
                llama_example(random_scene(rng, heldout_set), rng.random() < .7, with_image_token, rng)
                for _ in range(8 * batch_size)]
            examples.sort(key=lambda example: len(example[0]))
            yield from (collate(examples[i * batch_size:][:batch_size]) for i in rng.sample(range(8), 8))

    def forward(ids, fact_ids, noise):
        # No attention mask is needed, because padding is on the right and attention is causal.
        return llama(inputs_embeds=embed_with_facts(embedding, ids, fact_ids, noise)).logits

    optimizer_step = make_optimizer_step(llama, 2e-3, steps, warmup=.1)
    for step, (ids, fact_ids, weights, is_padding) in zip(range(1, steps + 1), batches()):
        logits = forward(ids, fact_ids, noise=min(1, 2 * step / steps))  # the noise grows in the first half
        if step <= steps // 2:
            # In the first half every answer token has the same weight, so the long captions dominate. They
            # teach the model to copy from the context, which the short answers alone do not.
            weights = (weights > 0).float()
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights.sum()
        # The questions are mostly unpredictable, so their tokens get a weight of only 0.1.
        is_question = ((weights == 0) & ~is_padding & (fact_ids[..., 0] == 0))[:, 1:]
        optimizer_step(loss + .1 * losses[is_question].mean())
        if step % 200 == 0 or step == steps:
            print(f"llama, step {step} of {steps}: loss on answers {loss:.3f}", end="")
            for form in ("text", "vectors"):
                ids, fact_ids, weights, _ = collate([
                    llama_example(scene, form == "vectors", with_image_token, rng)
                    for scene in heldout_set.values()])
                with torch.no_grad():
                    correct = forward(ids, fact_ids, noise=0)[:, :-1].argmax(-1) == ids[:, 1:]
                accuracy = (correct * weights[:, 1:]).sum() / weights.sum()
                print(f"; held-out token accuracy with facts as {form}: {accuracy:.4f}", end="")
            print(flush=True)
            copy.deepcopy(llama).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(train, folder, seed=0):
    """Runs train_clip or train_llama on the same held-out scenes as toy.world.draw()."""
    torch.set_num_threads(1)  # both trainings run at the same time, with one core each
    rng = random.Random(seed)
    heldout_set = heldout_scenes(rng, 240)
    train(folder, train_tokenizer(rng, heldout_set), heldout_set, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for clip-vit/ and llama-chat/")
    out = parser.parse_args().out
    spawn = multiprocessing.get_context("spawn").Process
    trainings = [spawn(target=pretrain, args=(train_clip, out / "clip-vit")),
                 spawn(target=pretrain, args=(train_llama, out / "llama-chat"))]
    for training in trainings:
        training.start()
    for training in trainings:
        training.join()
    if any(training.exitcode for training in trainings):
        raise SystemExit("pretraining failed; the error message is above")


if __name__ == "__main__":
    main()
