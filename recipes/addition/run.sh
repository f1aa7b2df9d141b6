#!/bin/sh
# A model that has read sums of two and three digits learns longer ones, by an adapter and by all weights (arXiv
# 2307.03381): of seven digits, written column by column; of four, last digit first; and of seven at once, which is the
# control and does not get there.
#
#     sh recipes/addition/run.sh OUT [SEED]        13 to 25 minutes on one core
set -eu
out=$1 seed=${2:-0}
here=$(dirname "$0")
craton=${CRATON:-craton}
mkdir -p "$out/rows"
for task in addition addition:reversed addition:scratchpad; do
    for digits in 2 3; do
        file=$out/rows/${task#addition:}-$digits.jsonl
        [ -e "$file" ] || $craton tasks rows "$task=$digits" --n 10000 --shots 0 --seed "$seed" --out "$file"
    done
done
# A tokenizer made of letters keeps digits apart; with digits in pairs the carry is hard to learn.
[ -e "$out/letters.jsonl" ] || $craton tasks rows sorting=5 --n 3000 --shots 0 --out "$out/letters.jsonl"
[ -e "$out/letters/manifest.json" ] || $craton corpus build "$out/letters.jsonl" --skip near --vocab-size 300 --out "$out/letters"
[ -e "$out/corpus/manifest.json" ] || $craton corpus build "$out"/rows/*.jsonl --skip near --tokenizer "$out/letters/tokenizer" --out "$out/corpus"
[ -e "$out/base/report.html" ] || $craton train "$out/corpus" --out "$out/base" --recipe "$here/pretrain.toml" --seed "$seed"
tune() {
    name=$1 learned=$2
    shift 2
    [ -e "$out/$name.jsonl" ] || $craton tasks rows "$learned" --n 10000 --seed "$((seed + 9))" --out "$out/$name.jsonl"
    [ -e "$out/$name/report.html" ] || $craton tune "$out/base" "$out/$name.jsonl" --out "$out/$name" --task "$learned" --seed "$seed" --steps 400 --set tune.rows=16 --set run.evaluate_every=200 "$@"
}
for task in scratchpad=7 reversed=4; do
    tune ${task%=*}-full addition:$task --full --set tune.lr=1e-3
    tune ${task%=*}-lora addition:$task --lora 16 --set tune.lr=3e-3
done
tune control-full addition=7 --full --set tune.lr=1e-3
tune control-lora addition=7 --lora 16 --set tune.lr=3e-3
for name in scratchpad-full scratchpad-lora reversed-full reversed-lora control-full control-lora; do
    ${PYTHON:-python3} "$here/../score.py" "$out/$name"
done
