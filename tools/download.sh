#!/usr/bin/env bash
# Downloads LLaVA's data, 25 GB in all, to data/. Run it in the folder of the repository. For a run with --limit,
# python -m tools.download fetches only the needed images.
#
#     bash tools/download.sh stage1    LLaVA-CC3M-Pretrain-595K: captions and images (6.7 GB)
#     bash tools/download.sh stage2    LLaVA-Instruct-150K (229 MB) and the images of COCO train2017 (18 GB)
#     bash tools/download.sh           stage1 and stage2
#     bash tools/download.sh models    CLIP ViT-L/14 (1.7 GB) and TinyLlama-1.1B-Chat (2.2 GB), to the hub's cache
#
# The stages fetch the models themselves on their first run. "models" fetches them beforehand. Run the same command
# again if a download breaks off: the .zip files are continued, and a smaller file is fetched from its beginning.
# The program hf comes with transformers.
set -euo pipefail
what=${1:-data}
case $what in data|stage1|stage2|models) ;; *) echo "usage: bash tools/download.sh [stage1|stage2|models]" >&2; exit 2 ;; esac
hub=${HF_ENDPOINT:-https://huggingface.co}
coco=${COCO_ZIP:-http://images.cocodataset.org/zips/train2017.zip}

fetch_zip() {  # fetch_zip ADDRESS FILE. The file gets its name only when it is complete.
  [[ -f $2 ]] && return
  echo "fetching $1"
  curl -fL -C - --retry 5 --create-dirs -o "$2.part" "$1"
  mv "$2.part" "$2"
}

if [[ $what == data || $what == stage1 ]]; then
  hf download liuhaotian/LLaVA-CC3M-Pretrain-595K chat.json --repo-type dataset --local-dir data/LLaVA-CC3M-Pretrain-595K
  fetch_zip "$hub/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K/resolve/main/images.zip" data/LLaVA-CC3M-Pretrain-595K/images.zip
fi
if [[ $what == data || $what == stage2 ]]; then
  hf download liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json --repo-type dataset --local-dir data/LLaVA-Instruct-150K
  fetch_zip "$coco" data/coco/train2017.zip
fi
if [[ $what == models ]]; then
  hf download openai/clip-vit-large-patch14 --include "*.json" --include "*.txt" --include model.safetensors
  hf download TinyLlama/TinyLlama-1.1B-Chat-v1.0
fi
