#!/bin/sh
# Past the demonstrator: a model learns countdown from answers of which half are wrong, and reinforcement by what
# is right takes it past them. The control goes on learning from the demonstrations for as many tokens.
#
#     sh recipes/countdown/run.sh OUT [SEED]
set -eu
out=$1 seed=${2:-0}
here=$(dirname "$0")
craton=${CRATON:-craton}
mkdir -p "$out"
[ -e "$out/rows.jsonl" ] || $craton tasks rows countdown=3 --n 60000 --shots 0 --seed "$seed" --out "$out/rows.jsonl"
${PYTHON:-python3} "$here/noise.py" "$out/rows.jsonl" "$out/demonstrations.jsonl" 0.5
# Digits apart, as in recipes/addition.
[ -e "$out/letters.jsonl" ] || $craton tasks rows sorting=5 --n 3000 --shots 0 --out "$out/letters.jsonl"
[ -e "$out/letters/manifest.json" ] || $craton corpus build "$out/letters.jsonl" --skip near --vocab-size 300 --out "$out/letters"
[ -e "$out/corpus/manifest.json" ] || $craton corpus build "$out/demonstrations.jsonl" --skip near --tokenizer "$out/letters/tokenizer" --out "$out/corpus"
[ -e "$out/learner/report.html" ] || $craton train "$out/corpus" --out "$out/learner" --recipe "$here/learn.toml" --seed "$seed"
[ -e "$out/reinforced/report.html" ] || $craton tune "$out/learner" --task countdown=3 --out "$out/reinforced" --recipe "$here/reinforce.toml" --seed "$seed"
[ -e "$out/control/report.html" ] || $craton train "$out/corpus" --out "$out/control" --recipe "$here/learn.toml" --seed "$seed" --steps 1000
$craton eval "$out/learner" "$out/reinforced" "$out/control" --tasks countdown=3 --out "$out/scores"
${PYTHON:-python3} "$here/../score.py" "$out/reinforced"
