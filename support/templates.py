"""The check of a chat template: can the label mask of data.py be built from it?"""

from model import IGNORE_INDEX
from support.errors import UserError


def check_template(template, folder):
    """Returns the id of the end token of the template. Raises UserError if the label mask would be wrong.

    ChatTemplate.encode() relies on two properties. Adding an answer leaves the tokens of its prompt
    unchanged, and every answer ends in a special token.
    """
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}] * 3
    try:
        ids, labels = template.encode(messages, num_image_tokens=0)
        prompts = [template.encode_prompt(messages[:i], num_image_tokens=0) for i in (1, 3, 5)]
    except Exception as error:  # a template is a program, which may raise anything
        raise UserError(f"the chat template in {folder} cannot be used: {error}") from error
    ignored = [label == IGNORE_INDEX for label in labels]
    if any(ids[:len(prompt)] != prompt or ignored[len(prompt) - 1:len(prompt) + 1] != [True, False]
           for prompt in prompts):
        raise UserError(f"the chat template in {folder} renders a prompt differently once its answer is "
                        "added, so the model would be trained on prompts that it never gets")
    labeled_ids = [label for label in labels if label != IGNORE_INDEX]
    end = labeled_ids[-1] if labeled_ids else None
    if end not in template.special_ids or labeled_ids.count(end) != 3:
        raise UserError(f"the chat template in {folder} has no end token after an answer, so the model would "
                        "never learn to stop")
    return end
