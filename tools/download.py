"""Fetches only the data that both stages of --preset tinyllama read with --limit.

    python -m tools.download --limit 20000             about 4 GB, instead of the 25 GB of tools/download.sh
    python -m tools.download --limit 20000 --stage 1   about 0.5 GB

    stage 1   chat.json has 211 MB. Of the 6.46 GB of images.zip, only its directory (41 MB or more) and the
              needed images are fetched, 11 kB each, which is 220 MB for 20,000 records.
    stage 2   llava_instruct_150k.json has 229 MB. COCO's images are fetched one by one, 160 kB each, which is
              at most 3.2 GB for 20,000 records, because some records share an image.

Everything goes to data/. Where the preset names a .zip file of images, the images go to a folder of the same
name without .zip, and the stages find it there. If a download breaks off, run the same command again, because
complete files are not fetched again. At the end it prints the commands of the stages, which fetch the models
themselves.
"""

import argparse
import os
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfFileSystem, hf_hub_download, hf_hub_url
from huggingface_hub.utils import http_backoff, http_stream_backoff, logging
from tqdm import tqdm

import stage1_align
import stage2_instruct
from support.errors import UserError, explain_errors, run_script
from support.files import atomic_write
from support.records import image_name, read_records, split_records
from support.settings import INT_FROM_0, INT_FROM_1

STAGES = {1: stage1_align, 2: stage2_instruct}
KILOBYTES = {1: 11, 2: 160}  # of an average image
PATIENCE = dict(timeout=30, max_retries=3)  # the client waits 1, 2 and 4 seconds between its attempts
AGAIN = "run the same command again to continue"


def open_images_zip(repository, name):
    """Returns the address of a .zip file's storage, and {member: (its ZipInfo, end of its bytes)}."""
    address = hf_hub_url(repository, name, repo_type="dataset")
    with explain_errors(f"fetch {address}; {AGAIN}"):
        # Streamed, because a server that ignores the range would send the whole file.
        with http_stream_backoff("GET", address, headers={"Range": "bytes=0-0"}, **PATIENCE) as response:
            if response.raise_for_status().status_code != 206:
                raise UserError(f"{address} cannot be fetched in parts, because its server ignores ranges: "
                                "fetch all of it with bash tools/download.sh stage1")
            # The hub has redirected to its storage. Images are requested there, because the hub itself
            # answers only 3,000 requests in 5 minutes (https://huggingface.co/docs/hub/rate-limits).
            storage = str(response.url)
        print(f"reading the directory of {name}", flush=True)
        archive = zipfile.ZipFile(HfFileSystem().open(f"datasets/{repository}/{name}"))
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
    return storage, {member.filename: (member, end) for member, end in zip(members, ends)}


def fetch_from_zip(address, members, name):
    """Returns the bytes of a member, or None if it is missing or damaged."""
    if name not in members:
        return None
    member, end = members[name]
    with explain_errors(f"fetch {name}; {AGAIN}"):
        headers = {"Range": f"bytes={member.header_offset}-{end - 1}"}
        content = http_backoff("GET", address, headers=headers, **PATIENCE).raise_for_status().content
    # The header: 30 bytes that end in two lengths, then a name and a field of these lengths (APPNOTE.TXT).
    name_length, extra_length = struct.unpack("<26x2H", content[:30])
    content = content[30 + name_length + extra_length:][:member.compress_size]
    with suppress(zlib.error):
        if member.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, -zlib.MAX_WBITS)
        return content if zlib.crc32(content) == member.CRC else None


def fetch_from_coco(name):
    """Returns the bytes of an image of COCO, or None if the server does not have it."""
    address = f"{os.environ.get('COCO_URL', 'http://images.cocodataset.org/train2017')}/{name}"
    with explain_errors(f"fetch {address}; {AGAIN}"):
        response = http_backoff("GET", address, **PATIENCE)
        if response.status_code in (403, 404):  # S3 answers 403 for a missing file if listing is forbidden
            return None
        content = response.raise_for_status().content
    if content.lstrip().startswith(b"<"):
        raise UserError(f"{address} is a web page instead of an image: does your network ask for a login?")
    return content


def fetch_images(names, fetch, folder):
    """Writes fetch(name) to the folder for each of the names, and prints those that could not be fetched."""
    def save_image(name):
        content = fetch(name)
        if content is not None:
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(content)
        return content is not None

    pool = ThreadPoolExecutor(16)
    try:
        saved = list(tqdm(pool.map(save_image, names), total=len(names), unit="image"))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C
    unavailable = [name for name, ok in zip(names, saved) if not ok]
    if unavailable:
        print(f"NOTE: {len(unavailable):,} of {len(names):,} images are missing on the server or damaged:",
              ", ".join(unavailable[:10]), "…" * (len(unavailable) > 10))


def choose_images(data, args):
    """Returns the file names of the images that the stage reads, for training and held out."""
    parts = split_records(read_records(data), args.heldout, args.limit, args.seed)
    names = {image_name(records[i]) for records in parts for i in range(len(records))}
    return {name for name in names if name and Path(name).name == name}  # none may lead out of the folder


def fetch_stage(stage, args):
    """Fetches what is missing of the data of one stage. Returns the command that trains with it."""
    preset = STAGES[stage].PRESETS["tinyllama"]
    data, archive = Path(preset["data"]), Path(preset["images"])
    folder, repository = archive.with_suffix(""), f"liuhaotian/{data.parent.name}"
    if not data.exists():
        with explain_errors(f"fetch {data.name}; {AGAIN}"):
            hf_hub_download(repository, data.name, repo_type="dataset", local_dir=data.parent)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(choose_images(data, args) - set(os.listdir(folder)))
    print(f"stage {stage}: {len(names):,} images to fetch, {len(names) * KILOBYTES[stage] / 1e3:,.0f} MB")
    if names and stage == 1:
        fetch_images(names, partial(fetch_from_zip, *open_images_zip(repository, archive.name)), folder)
    elif names:
        fetch_images(names, fetch_from_coco, folder)
    flags = [f"--{name} {value}" for name, value in vars(args).items() if value != preset.get(name, value)]
    return " ".join([f"python {STAGES[stage].__name__}.py --preset tinyllama", *flags])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=STAGES, help="fetch only the data of this stage")
    parser.add_argument("--limit", type=INT_FROM_0, default=20_000, help="as in the stages (default: 20000)")
    parser.add_argument("--heldout", type=INT_FROM_1, default=256, help="as in the stages (default: 256)")
    parser.add_argument("--seed", type=INT_FROM_0, default=0, help="as in the stages (default: 0)")
    args = parser.parse_args()
    logging.set_verbosity_error()  # the hub's client would warn of each request that it repeats
    commands = [fetch_stage(stage, args) for stage in STAGES if args.stage in (None, stage)]
    print("To train with these data:", *commands, sep="\n    ")


if __name__ == "__main__":
    run_script(main)
