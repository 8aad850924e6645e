"""Checks that a chat template does what ChatTemplate.encode() in data.py relies on.

A chat template is a program that comes with the model, so it may do anything. What most of them do can be
found out with one conversation whose texts show whether the template or the tokenizer changes them.
"""

from support.errors import UserError

# Quotes, letters with accents, double spaces, line breaks, and the space before a comma or "!" (which some
# tokenizers remove when they decode).
PROBE = [{"role": role, "content": 'Is it 2 × "Größe"  (10%)?\nNo. , yes !'}
         for role in ("user", "assistant")] * 3


def probe_chat_template(template):
    """Returns (answer prefixes, id of the end token) of a ChatTemplate.

    The answer prefixes are what the template writes between a prompt and its answer, the longest first:
    Mistral a space, and Qwen3 an empty thinking block before the last answer. The end token ends every
    answer. Raises UserError if the template cannot be used.
    """
    def refuse(reason):
        raise UserError(f"the chat template in {template.tokenizer.name_or_path} cannot be used: {reason}")

    rendered = template.render(PROBE)
    ids, _ = template.tokenize(rendered)
    if max(ids) >= template.num_embeddings:
        refuse(f"it writes a token with the id {max(ids)}, but the LLM has embeddings for "
               f"{template.num_embeddings} tokens only")
    prefixes = set()
    for i in (1, 3, 5):  # the prompts of the three answers
        prompt = template.render(PROBE[:i], is_prompt=True)
        prompt_ids = template.encode_prompt(PROBE[:i])
        if not rendered.startswith(prompt) or ids[:len(prompt_ids)] != prompt_ids:
            refuse("it renders a prompt differently once its answer is added, so the model would be trained "
                   "on prompts that it never gets")
        prefixes.add(rendered[len(prompt):rendered.find(PROBE[i]["content"], len(prompt))])

    _, labels = template.encode(PROBE)
    answer = labels[len(template.encode_prompt(PROBE[:5])):]  # the last answer, and ignored labels after it
    end = next((t for t, i in enumerate(answer) if i in template.reserved_ids), None)
    if end is None or labels.count(answer[end]) != 3:
        refuse("it writes no end token after an answer, so the model would never learn to stop")
    decoded = template.tokenizer.decode(answer[:end], clean_up_tokenization_spaces=False)
    if not decoded.endswith(PROBE[5]["content"]):
        refuse(f"its tokenizer turns {PROBE[5]['content']!r} into {decoded!r}; fetch the folder again if a "
               "file is missing, such as tokenizer.json")
    return sorted(prefixes, key=len, reverse=True), answer[end]
