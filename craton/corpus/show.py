"""`craton corpus show`: what was kept, what was dropped and why."""

from pathlib import Path
from typing import Any

from craton.base import count, say, span
from craton.corpus.quality import ENGLISH_ONLY
from craton.corpus.store import Corpus


def show(folder: Path, examples: int) -> dict[str, Any]:
    """Print a corpus's manifest for a reader; returns its numbers. UserError if the corpus is damaged."""
    m = Corpus(folder).manifest
    counts, options = m["counts"], m["options"]
    say(f"{folder}: {counts['documents']} documents, {count(counts['bytes'])}B read in {span(m['seconds'])}")
    for split, s in m["splits"].items():
        say(
            f"  {split:9} {count(s['tokens'])} tokens, {s['documents']} documents, {count(s['bytes'])}B"
            + (f", {s['bytes'] / s['tokens']:.2f} bytes a token" if s["tokens"] else "")
        )
    say(
        f"  tokenizer {m['vocab_size']} ids, {'given' if options['tokenizer'] else 'trained here'}; stored as "
        f"{m['dtype']}"
    )
    say("\nsources")
    for s in m["sources"]:
        say(
            f"  {s['name']}: {s['documents']} kept, {count(s['bytes'])}B, licence "
            f"{', '.join(s['license']) or 'not stated'}"
        )
    say("\nsteps")
    say(
        f"  repaired encoding or characters of {counts.get('repaired', 0)}; told {counts.get('prose', 0)} prose and "
        f"{counts.get('code', 0)} code apart"
    )
    if options["mask_personal"]:
        say(f"  masked {counts.get('personal_masked', 0)} e-mail addresses, IP addresses and phone numbers")
    if m["evaluation"]:
        say(
            f"  looked for {m['evaluation']['items']} evaluation items; {m['evaluation']['too_short']} under 8 words "
            "could not be looked for"
        )
    else:
        say("  no evaluation files were given, so nothing was decontaminated (--decontaminate FILE)")
    if options["skip"]:
        say(f"  left out: {', '.join(options['skip'])}")
    passed = m["passed_over"]
    if passed["files"]:
        say(
            f"  passed over {passed['files']} files that are not text: "
            f"{', '.join(f'{n} {t}' for t, n in passed['types'].items())}"
        )
    if passed["bad"]:
        say(f"  passed over {passed['bad']} unreadable files or lines, such as {passed['examples'][0]}")
    say("\ndropped")
    for why, d in sorted(m["dropped"].items(), key=lambda x: -x[1]["bytes"]):
        say(
            f"  {why.replace('_', ' ')}{' (fits English only)' if why in ENGLISH_ONLY else ''}: {d['documents']}, "
            f"{count(d['bytes'])}B"
        )
        for e in d["examples"][: min(examples, 3)]:
            say(f"      {e['document']}: {e['text'][:100]}")
    if not m["dropped"]:
        say("  nothing")
    return {k: m[k] for k in ("counts", "splits", "sources", "vocab_size", "digest", "passed_over", "seconds")} | {
        "dropped": {k: {"documents": v["documents"], "bytes": v["bytes"]} for k, v in m["dropped"].items()}
    }
