#!/bin/sh
# A skill that reinforcement took hundreds of steps to find, given to the model it began from in ten: from the teacher's
# answers (off-policy), and from the student's own, judged token by token by the teacher (on-policy). The control learns
# right answers alone, for as many steps.
#
#     sh recipes/distill/run.sh PARITY OUT [SEED]        PARITY: the folder that recipes/parity made; a minute or two
#
# A step of either sees about as many tokens. A student of three layers, which cannot yet take the steps itself, learns
# nothing of either in as many.
set -eu
from=$1 out=$2 seed=${3:-0}
here=$(dirname "$0")
craton=${CRATON:-craton}
task=parity:scratchpad=24
mkdir -p "$out"
[ -e "$out/asked.jsonl" ] || $craton tasks rows parity=24 --n 1000 --seed "$((seed + 50))" --out "$out/asked.jsonl"
tune() {
    name=$1
    shift
    [ -e "$out/$name/report.html" ] || $craton tune "$from/base" "$out/asked.jsonl" --out "$out/$name" --full --task $task --seed "$seed" --steps 60 --set tune.lr=5e-4 "$@"
}
tune off --method distill --teacher "$from/reasoner" --set tune.policy=off --set tune.rows=16 --set tune.max_tokens=56
tune on --method distill --teacher "$from/reasoner" --set tune.rows=64 --set tune.max_tokens=56
tune control --set tune.rows=16
for name in off on control; do
    ${PYTHON:-python3} "$here/../score.py" "$out/$name"
done
