#!/bin/sh
# Reasoning found by reinforcement (arXiv 2510.11495), from nothing: parity of 24 bits.
#
#     sh recipes/parity/run.sh OUT [SEED [BITS]]        16 minutes with 180 steps of reinforcement, on one core
#
# A model reads sums of which one in five has its steps written. Trained on the next token it stays at chance, however
# long (the control); rewarded for right answers alone it finds that the steps help, and its answers grow longer.
set -eu
out=$1 seed=${2:-0} bits=${3:-24}
here=$(dirname "$0")
craton=${CRATON:-craton}
mkdir -p "$out"
[ -e "$out/direct.jsonl" ] || $craton tasks rows "parity=$bits" --n 40000 --shots 0 --seed "$seed" --out "$out/direct.jsonl"
[ -e "$out/steps.jsonl" ] || $craton tasks rows "parity:scratchpad=$bits" --n 10000 --shots 0 --seed "$((seed + 1000))" --out "$out/steps.jsonl"
[ -e "$out/corpus/manifest.json" ] || $craton corpus build "$out/direct.jsonl" "$out/steps.jsonl" --skip near --vocab-size 300 --out "$out/corpus"
[ -e "$out/base/report.html" ] || $craton train "$out/corpus" --out "$out/base" --recipe "$here/pretrain.toml" --seed "$seed"
[ -e "$out/reasoner/report.html" ] || $craton tune "$out/base" --task "parity:scratchpad=$bits" --out "$out/reasoner" --recipe "$here/reinforce.toml" --seed "$seed"
[ -e "$out/control/report.html" ] || $craton train "$out/corpus" --out "$out/control" --recipe "$here/pretrain.toml" --seed "$seed" --set run.steps=1800
$craton eval "$out/base" "$out/reasoner" "$out/control" --tasks "parity:scratchpad=$bits" --out "$out/scores"
