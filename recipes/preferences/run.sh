#!/bin/sh
# A preference learned by each method from the same pairs, and what it cost in divergence from the base.
#
#     sh recipes/preferences/run.sh BASE OUT [SEED]        BASE: the base that recipes/parity makes
#
# The base writes the steps of one sum in five. The pairs prefer them. The control's pairs prefer either, by chance.
set -eu
base=$1 out=$2 seed=${3:-0}
here=$(dirname "$0")
craton=${CRATON:-craton}
python=${PYTHON:-python3}
mkdir -p "$out"
[ -e "$out/steps.jsonl" ] || $craton tasks rows parity:scratchpad=24 --n 1000 --seed "$((seed + 7))" --out "$out/steps.jsonl"
[ -e "$out/direct.jsonl" ] || $craton tasks rows parity=24 --n 1000 --seed "$((seed + 7))" --out "$out/direct.jsonl"
$python "$here/pairs.py" "$out/steps.jsonl" "$out/direct.jsonl" "$out/pairs.jsonl"
$python "$here/pairs.py" "$out/steps.jsonl" "$out/direct.jsonl" "$out/chance.jsonl" 0.5
tune() {
    name=$1 data=$2
    shift 2
    [ -e "$out/$name/report.html" ] || $craton tune "$base" "$out/$data.jsonl" --out "$out/$name" --lora 16 --steps 60 --seed "$seed" --set tune.rows=16 --set tune.lr=5e-4 --set run.evaluate_every=60 "$@"
}
for method in dpo ipo kto orpo simpo; do
    tune $method pairs --method $method
done
tune control chance --method dpo
$python "$here/gained.py" parity:scratchpad=24 "$base" "$out/dpo" "$out/ipo" "$out/kto" "$out/orpo" "$out/simpo" "$out/control" | tee "$out/table.txt"
