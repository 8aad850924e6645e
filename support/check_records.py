"""Checks the data before the first step, so that a missing image does not stop the run hours later."""

import numpy as np
from tqdm import tqdm

from support.errors import BadRecord, UserError
from support.records import image_name


def drop_unusable_records(dataset, allow_bad=1.0, open_images=False, quiet=False):
    """Checks every record of a ChatDataset, prints why records cannot be used (if quiet: only then), and
    leaves them out of dataset.records. Returns the approximate number of tokens of each other sample:
    (samples,).

    Without open_images, images are only looked up, because opening 595,375 of them takes long. Raises
    UserError if more than the fraction `allow_bad` is unusable, or if the dataset's max_length is more
    than the LLM can read."""
    records, template = dataset.records, dataset.template
    if dataset.max_length > template.context_length:
        raise UserError(f"--max-length {dataset.max_length} is more than the LLM can read: pass --max-length "
                        f"{template.context_length} or less")
    # Upper bound of what the template adds to one message.
    overhead = len(template.render([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]))
    usable, lengths, failures = [], [], {}  # failures: {reason: [one sentence per unusable record]}
    for i in tqdm(range(len(records)), "checking the data", unit="record", leave=False, disable=None):
        record = records[i]
        try:
            name, messages = image_name(record), template.to_messages(record)
            if name is not None:
                (records.images.open if open_images else records.images.check)(record, name)
            num_bytes = sum(len(message["content"].encode()) + overhead for message in messages)
            # A token is at least one byte long. So a text with fewer bytes than this always fits.
            if num_bytes > dataset.max_length - template.num_image_tokens:
                dataset.encode_record(record)
        except BadRecord as error:
            failures.setdefault(error.reason, []).append(str(error))
            continue
        usable.append(i)
        # English text has about four bytes per token.
        lengths.append((name is not None) * template.num_image_tokens + num_bytes // 4)
    if failures or not quiet:
        print(f"checked {len(records):,} records of {records.path}: {len(usable):,} usable")
    for reason, sentences in failures.items():
        print(f"  {len(sentences):,} unusable: {reason}")
        print("\n".join(f"    {sentence}" for sentence in sentences[:10]))
    bad = len(records) - len(usable)
    if bad > allow_bad * len(records) or not usable:
        hint = " (is --images wrong?)" if "image missing" in failures else ""
        raise UserError(f"{bad:,} of {len(records):,} records of {records.path} cannot be used{hint}; "
                        "--allow-bad says how many may be left out")
    dataset.records = records.subset(usable)
    return np.array(lengths)
