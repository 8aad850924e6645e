"""A stand-in for functions that support/records.py will have. It repeats how open_records() chooses records."""

import numpy as np

from support.errors import BadRecord
from support.files import find_file
from support.records import RecordFile, RecordSet, image_field


def read_records(path):
    file = RecordFile(find_file(path))
    return RecordSet(file, None, np.arange(len(file)))


def image_name(record):
    name = image_field(record)
    if name in (None, "", []):
        return None
    if not isinstance(name, str):
        raise BadRecord(record, "'image' is not the name of one file")
    return name


def split_records(records, heldout, limit, seed):
    hashes = records.file.image_hashes ^ np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    order = np.lexsort((records.file.record_hashes, hashes))
    first_of_image = np.unique(hashes[order], return_index=True)[1]
    train = order[first_of_image[heldout]:]
    return records.subset(train[:limit or None]), records.subset(order[first_of_image[:heldout]])
