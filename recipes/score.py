"""A task's score before and after a run: python recipes/score.py RUN..."""

import json
import sys
from pathlib import Path

for run in sys.argv[1:]:
    summary = json.loads(Path(run, "record.json").read_text(encoding="utf-8"))["summary"]
    before, after = summary["before"], summary["after"]
    more = ", ".join(f"{k} {before[k]:.3f} -> {after[k]:.3f}" for k in after if k.startswith("pass@") and k in before)
    print(f"{Path(run).name}: {before['score']:.3f} -> {after['score']:.3f}{', ' if more else ''}{more}")
