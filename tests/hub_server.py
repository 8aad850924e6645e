"""A stand-in for the hub on the loopback: the real client downloads from it as it does from the hub.

It serves two models and two data sets under their real names, with the file lists that they have on the hub,
and COCO's images, as a zip and one by one. The weights are random. The tokenizer and the preprocessor are the
real ones where the folder shared/hub exists, and small ones that the tests make elsewhere.
"""

import hashlib
import io
import json
import re
import threading
import zipfile
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

from conftest import COLORS, SHARED, draw, make_clip, make_llm, record_of
from huggingface_hub import constants
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

CLIP, LLM = "openai/clip-vit-large-patch14", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
CHAT, INSTRUCT = "liuhaotian/LLaVA-CC3M-Pretrain-595K", "liuhaotian/LLaVA-Instruct-150K"
# Files of the real repositories that nothing here reads, such as other formats of the same weights.
UNUSED = {CLIP: [".gitattributes", "README.md", "flax_model.msgpack", "pytorch_model.bin", "tf_model.h5",
                 "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"],
          LLM: [".gitattributes", "README.md", "eval_results.json"],
          CHAT: [".gitattributes", "README.md", "metadata.json"],
          INSTRUCT: [".gitattributes", "README.md", "complex_reasoning_77k.json", "conversation_58k.json",
                     "detail_23k.json", "llava_instruct_80k.json", "llava_v1_5_mix665k.json"]}


def make_models(folder):
    """Makes both models in `folder`, with few parameters. Returns {name: {file: its content}}."""
    folders, real = {CLIP: folder / "clip", LLM: folder / "llm"}, SHARED / "hub"
    if real.exists():
        clip = CLIPConfig.from_pretrained(real / CLIP.split("/")[1])
        llm = LlamaConfig.from_pretrained(real / LLM.split("/")[1])
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
        clip.vision_config.update({**sizes, "image_size": 28})
        clip.text_config.update(sizes)
        llm.update(dict(sizes, num_hidden_layers=2, num_key_value_heads=1, initializer_range=0.3))
        # On the hub, CLIP's weights are in fp32 and TinyLlama's in bf16.
        for name, model in ((CLIP, CLIPModel(clip)), (LLM, LlamaForCausalLM(llm).bfloat16())):
            model.save_pretrained(folders[name])
            for path in (real / name.split("/")[1]).iterdir():
                if path.name != "config.json":
                    (folders[name] / path.name).write_bytes(path.read_bytes())
        preprocessor = folders[CLIP] / "preprocessor_config.json"
        settings = json.loads(preprocessor.read_text())
        preprocessor.write_text(json.dumps({**settings, "size": 28, "crop_size": 28}))
    else:
        make_clip(folders[CLIP])
        make_llm(folders[LLM], max_position_embeddings=2048)
    return {name: {path.name: path.read_bytes() for path in source.iterdir()}
            for name, source in folders.items()}


def make_data(records):
    """Returns {name: {file: bytes}} of both data sets, and COCO's zip, with `records` records each.

    The names, the questions and the places of the images are those of the real data.
    """
    colors = list(COLORS)
    chat, instruct, cc3m, coco = [], [], io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(cc3m, "w") as images, zipfile.ZipFile(coco, "w") as train2017:
        for i in range(records):
            color, name = colors[i % len(colors)], f"GCC_train_{i:09d}"
            question = ["Provide a brief description of the given image.\n<image>",
                        "<image>\nSummarize the visual content of the image."][i % 2]
            chat.append(record_of(question, f"a {color} picture .", id=name, image=f"{name}.jpg"))
            instruct.append(record_of("What object is shown?\n<image>", f"It is a {color} picture.",
                                      "Is it a photo?", "No.", id=f"{i:012d}", image=f"{i:012d}.jpg"))
            content = io.BytesIO()
            draw(color, size=(40 + i % 9, 30)).save(content, "JPEG")
            compression = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            images.writestr(f"{name}.jpg", content.getvalue(), compression)
            train2017.writestr(f"train2017/{i:012d}.jpg", content.getvalue())
    return {CHAT: {"chat.json": json.dumps(chat).encode(), "images.zip": cc3m.getvalue()},
            INSTRUCT: {"llava_instruct_150k.json": json.dumps(instruct).encode()}}, coco.getvalue()


class Hub(BaseHTTPRequestHandler):
    """Answers the requests of the client. The class attributes are set by serve().

    requested: a list of (name, first byte). redirects: how often a .zip file's storage was named, as the hub
    does. sent: bytes by name. ranges: False for a server that ignores the Range header.
    """
    protocol_version, ranges, redirects = "HTTP/1.1", True, 0
    repositories, coco, requested, sent, gated, break_off = {}, b"", [], Counter(), set(), {}

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, sent=None, **headers):
        """Sends the first `sent` bytes of the body, or all of them."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def send_file(self, name, body, **headers):
        """Sends a file, or the part of it that a Range header asks for. break_off = {name: how many more of
        its downloads end in the middle}."""
        start, end = 0, len(body)
        asked = self.ranges and re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2]) + 1 if asked[2] else end
        if self.command == "GET":
            self.requested.append((name, start))
        rest = body[start:end]
        if asked:
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        breaks_off = self.command == "GET" and self.break_off.get(name, 0) > 0
        self.answer(rest, 206 if asked else 200, sent=len(rest) // 2 if breaks_off else len(rest),
                    Accept_Ranges="bytes" if self.ranges else "none", **headers)
        if breaks_off:
            self.break_off[name] -= 1
            self.close_connection = True
            self.connection.close()
        elif self.command == "GET":
            self.sent[name] += len(rest)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        if path == "coco/train2017.zip":
            return self.send_file(path, self.coco)
        if path.startswith("coco/"):  # one image
            with zipfile.ZipFile(io.BytesIO(self.coco)) as images:
                name = path.removeprefix("coco/")
                if name not in images.namelist():
                    return self.answer(b"", 404)
                return self.send_file(path, images.read(name))
        for name, files in self.repositories.items():
            before, found, what = f"{path}/".partition(f"{name}/")
            commit, what = hashlib.sha1(name.encode()).hexdigest(), what.strip("/")
            if not found:
                continue
            if before == "storage/":
                return self.send_file(what, files[what])
            if name in self.gated:
                return self.answer(b"{}", 403, X_Error_Code="GatedRepo", X_Error_Message="Access to model "
                                   f"{name} is restricted and you are not in the authorized list.")
            if what.startswith("resolve/"):
                file = what.split("/", 2)[2]
                if file in files and file.endswith(".zip"):
                    type(self).redirects += 1
                    return self.answer(b"", 302, Location=f"{self.url}/storage/{name}/{file}")
                if file in files:
                    etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
                    return self.send_file(file, files[file], ETag=etag, X_Repo_Commit=commit)
            elif what.startswith("tree/"):
                rows = [{"type": "file", "path": file, "size": len(body),
                         "oid": hashlib.sha1(body).hexdigest()} for file, body in files.items()]
                return self.answer(json.dumps(rows).encode(), Content_Type="application/json")
            else:
                info = {"_id": "1", "id": name, "sha": commit, "private": False, "tags": [], "downloads": 0,
                        "likes": 0, "siblings": [{"rfilename": file} for file in files]}
                return self.answer(json.dumps(info).encode(), Content_Type="application/json")
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        return self.answer(b'{"error": "Repository not found"}', 401, X_Error_Code="RepoNotFound")


@contextmanager
def serve(folder, records):
    """Yields the handler class of a running server. Its `url` is the address. Without a folder for them, it
    has no models."""
    data, coco = make_data(records)
    repositories = {**(make_models(folder) if folder else {}), **data}
    for name, files in repositories.items():
        files |= {file: b"x" for file in UNUSED[name]}
    handler = type("RunningHub", (Hub,), {"repositories": repositories, "coco": coco, "requested": [],
                                          "sent": Counter(), "gated": set(), "break_off": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


def use(url, monkeypatch):
    """Makes this process take the server for the hub and for COCO's."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("COCO_URL", f"{url}/coco/train2017")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
