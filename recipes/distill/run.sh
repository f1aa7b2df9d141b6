#!/bin/sh
# A larger model's skill in a smaller one: from the teacher's answers (off-policy), and from the student's own, judged
# token by token by the teacher (on-policy). The control learns the right answers alone.
#
#     sh recipes/distill/run.sh ADDITION OUT [SEED]        ADDITION: the folder that recipes/addition made
#
# The teacher is four layers of 96, tuned to write sums of seven digits column by column; the student two of 64. A step of
# either sees about as many tokens.
set -eu
from=$1 out=$2 seed=${3:-0}
here=$(dirname "$0")
craton=${CRATON:-craton}
task=addition:scratchpad=7
teacher=$from/scratchpad-full
mkdir -p "$out"
[ -e "$out/student/report.html" ] || $craton train "$from/corpus" --out "$out/student" --recipe "$here/../addition/pretrain.toml" --seed "$seed" --set run.steps=300 --set model.num_hidden_layers=2 --set model.hidden_size=64
[ -e "$out/asked.jsonl" ] || $craton tasks rows $task --n 4000 --seed "$((seed + 50))" --out "$out/asked.jsonl"
tune() {
    name=$1
    shift
    [ -e "$out/$name/report.html" ] || $craton tune "$out/student" --out "$out/$name" --full --task $task --seed "$seed" "$@"
}
tune off "$out/asked.jsonl" --method distill --teacher "$teacher" --set tune.policy=off --steps 300 --set tune.rows=16 --set tune.lr=1e-3
tune on "$out/asked.jsonl" --method distill --teacher "$teacher" --set tune.policy=on --steps 300 --set tune.rows=32 --set tune.lr=1e-3
tune control "$out/asked.jsonl" --steps 300 --set tune.rows=16 --set tune.lr=1e-3
for name in off on control; do
    ${PYTHON:-python3} "$here/../score.py" "$out/$name"
done
