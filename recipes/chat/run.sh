#!/bin/sh
# A model that chats, from nothing: ten minutes of text, then five of instructions, and what it says.
#
#     sh recipes/chat/run.sh TEXT INSTRUCTIONS OUT [SEED]
#
# TEXT: a file or folder, as for craton corpus build. INSTRUCTIONS: a file of conversations or prompts with answers. The
# control is the same text with no instructions. At this size answers have the form of answers and little sense in them.
set -eu
text=$1 instructions=$2 out=$3 seed=${4:-0}
here=$(dirname "$0")
craton=${CRATON:-craton}
mkdir -p "$out"
[ -e "$out/corpus/manifest.json" ] || $craton corpus build "$text" --out "$out/corpus"
[ -e "$out/base/report.html" ] || $craton train "$out/corpus" --out "$out/base" --budget 10m --seed "$seed"
[ -e "$out/chat/report.html" ] || $craton tune "$out/base" "$instructions" --out "$out/chat" --full --budget 5m --seed "$seed"
${PYTHON:-python3} "$here/say.py" "$out/base" "$out/chat"
