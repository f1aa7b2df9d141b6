#!/bin/sh
# Five models from nothing, from 1 x 32 to 4 x 64, and a control; then what each can do, as one page. 18 to 31
# minutes on one thread beside other work.
#
#     sh recipes/ladder/run.sh OUT [SEED [STEPS [SIZES]]]
#
# They learn from made-up tables: to look something up in the context (maps, from the shots), and to follow a table
# three steps on, at once or with the steps written (hops, hops:scratchpad); mixed with source code of this Python. The
# control has read as much of the same kind, but its shots follow no function and its steps are never written.
set -eu
out=$1 seed=${2:-0} steps=${3:-1500} sizes=${4:-"1x32 1x64 2x32 2x64 4x64"}
here=$(dirname "$0")
craton=${CRATON:-craton}
mkdir -p "$out"
text=$(${PYTHON:-python3} -c "import asyncio, email, os; print(os.path.dirname(email.__file__), os.path.dirname(asyncio.__file__))")

rows() { # TASK, shots, file
    [ -e "$out/$3" ] || $craton tasks rows "$1" --n 60000 --shots "$2" --seed "$seed" --out "$out/$3"
}
rows maps 32 maps.jsonl
rows hops:scratchpad 5 steps.jsonl
rows hops 5 direct.jsonl
rows maps:unrelated 32 unrelated.jsonl
[ -e "$out/corpus/manifest.json" ] || $craton corpus build "$out/maps.jsonl" "$out/steps.jsonl" "$out/direct.jsonl" $text \
    --skip near --vocab-size 512 --out "$out/corpus"
[ -e "$out/control-corpus/manifest.json" ] || $craton corpus build "$out/unrelated.jsonl" "$out/direct.jsonl" $text \
    --skip near --tokenizer "$out/corpus/tokenizer" --out "$out/control-corpus"

rung() { # NAME, size, corpus
    [ -e "$out/$1/report.html" ] && return
    $craton train "$3" --out "$out/$1" --recipe "$here/ladder.toml" --seed "$seed" --set run.steps="$steps" \
        --set model.num_hidden_layers="${2%x*}" --set model.hidden_size="${2#*x}" \
        --set run.evaluate_tasks=maps,hops,hops:scratchpad
}
models=""
for size in $sizes; do
    rung "$size" "$size" "$out/corpus"
    models="$models $out/$size"
done
last=${sizes##* }
rung control "$last" "$out/control-corpus"
$craton emerge $models "$out/control" --tasks maps,maps:unrelated,hops,hops:scratchpad --shots 0,1,4,16 --samples 1,4,16 --out "$out/emergence"
