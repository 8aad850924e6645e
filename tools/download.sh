#!/usr/bin/env bash
# Downloads the real models and data, 29 GB in all. This is the only place with the download commands.
#
#     bash tools/download.sh models    CLIP ViT-L/14 (1.7 GB) and TinyLlama-1.1B-Chat (2.2 GB), to the hub's cache
#     bash tools/download.sh stage1    LLaVA-CC3M-Pretrain-595K: captions and images (6.7 GB), to data/
#     bash tools/download.sh stage2    LLaVA-Instruct-150K (229 MB) and COCO train2017 (18 GB), to data/
#     bash tools/download.sh instruct  stage2 without the images
#     bash tools/download.sh           all of it
#
# Run it in the folder of the repository. A download that broke off is continued. `hf` comes with transformers.
set -euo pipefail
what=${1:-all}
case $what in all|models|stage1|stage2|instruct) ;; *) echo "usage: bash tools/download.sh [models|stage1|stage2|instruct]" >&2; exit 2 ;; esac

if [[ $what == all || $what == models ]]; then
  hf download openai/clip-vit-large-patch14 config.json preprocessor_config.json model.safetensors
  hf download TinyLlama/TinyLlama-1.1B-Chat-v1.0
fi
if [[ $what == all || $what == stage1 ]]; then
  hf download liuhaotian/LLaVA-CC3M-Pretrain-595K chat.json images.zip --repo-type dataset \
    --local-dir data/LLaVA-CC3M-Pretrain-595K
fi
if [[ $what == all || $what == stage2 || $what == instruct ]]; then  # instruct: without the images of COCO
  hf download liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json --repo-type dataset \
    --local-dir data/LLaVA-Instruct-150K
fi
if [[ $what == all || $what == stage2 ]] && [[ ! -f data/coco/train2017.zip ]]; then
  # The zip gets its name only when it is complete.
  curl -fL -C - --create-dirs -o data/coco/train2017.zip.part http://images.cocodataset.org/zips/train2017.zip
  mv data/coco/train2017.zip.part data/coco/train2017.zip
fi
