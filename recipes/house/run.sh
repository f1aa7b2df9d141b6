#!/bin/sh
# A published chat model learns a format of one's own, by an adapter on its packed weights, and what that costs.
#
#     sh recipes/house/run.sh MODEL OUT [HELLASWAG]
#
# MODEL: a folder or a GGUF file of a chat model. HELLASWAG: its file, for a score of general ability.
set -eu
model=$1 out=$2
here=$(dirname "$0")
craton=${CRATON:-craton}
${PYTHON:-python3} "$here/make.py" "$out"
[ -e "$out/adapter/report.html" ] || $craton tune "$model" "$out/train.jsonl" --out "$out/adapter" --lora 16 --steps 60 --task "$out/house.toml"
tasks=$out/house.toml
$craton eval "$model" "$model+$out/adapter" --tasks "$tasks" --out "$out/scores"
[ -z "${3:-}" ] || $craton eval "$model" "$model+$out/adapter" --tasks "hellaswag=$3" --limit 500 --out "$out/general"
