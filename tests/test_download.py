"""tools.download against a stand-in for the hub (see hub_server.py), with the hub's real client."""

import io
import shlex
import zipfile

import pytest
from hub_server import CHAT, make_data, serve, use

import stage1_align
import stage2_instruct

CC3M, COCO = "data/LLaVA-CC3M-Pretrain-595K/images", "data/coco/train2017"
PART = ["--limit", 10, "--heldout", 2]
SECOND_HALF = [f"coco/train2017/{i:012d}.jpg" for i in range(20, 40)]  # of the images on the server


@pytest.fixture
def hub(monkeypatch):
    """A server with 40 records of each stage."""
    with serve(None, records=40) as running:
        use(running.url, monkeypatch)
        yield running


def names_in(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_it_fetches_the_images_that_both_stages_read_and_nothing_twice(hub, script, tmp_path, parts, capsys):
    script("tools.download", *PART)
    commands = [line for line in capsys.readouterr().out.splitlines() if "--preset tinyllama" in line]
    images = {path.name: path.read_bytes() for path in (tmp_path / CC3M).iterdir()}
    with zipfile.ZipFile(io.BytesIO(hub.repositories[CHAT]["images.zip"])) as archive:
        assert images == {name: archive.read(name) for name in images}
        headers = 100 * (len(images) + len(archive.infolist()))  # those of members and directory are shorter
    assert len(images) == len(names_in(tmp_path / COCO)) == 12
    assert hub.sent["images.zip"] < sum(map(len, images.values())) + headers
    assert hub.redirects < 6  # the hub itself is not asked for each image
    hub.requested.clear()
    script("tools.download", *PART)
    assert hub.requested == []

    capsys.readouterr()
    for command, stage in zip(commands, (stage1_align, stage2_instruct), strict=True):
        _, name, *flags = shlex.split(command)
        assert name == f"{stage.__name__}.py"
        data, images = stage.PRESETS["tinyllama"]["data"], stage.PRESETS["tinyllama"]["images"]
        script("stage1_align", *flags, "--data", data, "--images", images, "--check-data",
               "--vision-tower", parts.clip, "--llm", parts.llm, "--max-length", 500)
        printed = capsys.readouterr().out
        assert "checked 10 records" in printed and ": 10 usable" in printed and ": 2 usable" in printed


def test_a_download_that_broke_off_is_continued(hub, refusal, script, tmp_path):
    hub.break_off |= {name: 100 for name in SECOND_HALF}
    sentence = refusal("tools.download", *PART, "--stage", 2)
    assert ".jpg; run the same command again to continue: RemoteProtocolError" in sentence
    complete = names_in(tmp_path / COCO)
    assert len(complete) < 12
    hub.requested.clear()
    hub.break_off |= {name: 1 for name in SECOND_HALF}  # a single failure is repaired at once
    script("tools.download", *PART, "--stage", 2)
    fetched = {name.split("/")[-1] for name, _ in hub.requested}
    assert not fetched & complete and len(fetched | complete) == 12
    assert names_in(tmp_path / COCO) == fetched | complete and not (tmp_path / CC3M).exists()


def test_a_server_without_ranges_is_refused_by_naming_the_full_download(hub, refusal):
    hub.ranges = False
    sentence = refusal("tools.download", *PART)
    assert "ignores ranges: fetch all of it with bash tools/download.sh stage1" in sentence
    assert [name for name, _ in hub.requested].count("images.zip") == 1


def test_missing_and_damaged_images_are_named_and_the_others_are_fetched(hub, script, tmp_path, capsys):
    hub.coco = make_data(records=20)[1]
    content = bytearray(hub.repositories[CHAT]["images.zip"])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist()[20:]:
            content[member.header_offset + 200] ^= 1
    hub.repositories[CHAT]["images.zip"] = bytes(content)
    script("tools.download", *PART)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE")]
    for folder, note in zip((CC3M, COCO), notes, strict=True):
        fetched = names_in(tmp_path / folder)
        assert 0 < len(fetched) < 12 and all(int(name[-8:-4]) < 20 for name in fetched)
        assert note.startswith(f"NOTE: {12 - len(fetched)} of 12 images are missing on the server or damaged")
        assert note.count(".jpg") == 12 - len(fetched)


def test_every_other_problem_is_one_sentence(hub, refusal, tmp_path, monkeypatch):
    with zipfile.ZipFile(pages := io.BytesIO(), "w") as archive:
        for name in zipfile.ZipFile(io.BytesIO(hub.coco)).namelist():
            archive.writestr(name, "<html>Please log in")
    hub.coco = pages.getvalue()
    coco = ["tools.download", *PART, "--stage", 2]
    assert "is a web page instead of an image: does your network ask for a login?" in refusal(*coco)
    monkeypatch.setenv("COCO_URL", "http://127.0.0.1:9")
    assert "run the same command again to continue: ConnectError" in refusal(*coco)
    del hub.repositories[CHAT]["images.zip"]
    sentence = refusal("tools.download", *PART)
    assert "/images.zip; run the same command again to continue" in sentence and "404" in sentence
    use("http://127.0.0.1:9", monkeypatch)
    (tmp_path / "data" / "LLaVA-CC3M-Pretrain-595K" / "chat.json").unlink()
    sentence = refusal("tools.download", *PART)
    assert "cannot fetch chat.json; run the same command again to continue" in sentence
