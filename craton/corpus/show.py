"""`craton corpus show`: what was kept, what was dropped and why."""

from pathlib import Path
from typing import Any

from craton.base import count, say, span
from craton.corpus.quality import ENGLISH_ONLY
from craton.corpus.store import Corpus


def show(folder: Path, examples: int) -> dict[str, Any]:
    """Print a corpus's manifest for a reader; returns its numbers. UserError if the corpus is damaged."""
    corpus = Corpus(folder)
    m = corpus.manifest
    counts, options = m["counts"], m["options"]
    say(f"{folder}: {counts['documents']} documents, {count(counts['bytes'])}B read in {span(m['seconds'])}")
    for split, s in m["splits"].items():
        rate = f", {s['bytes'] / s['tokens']:.2f} bytes a token" if s["tokens"] else ""
        say(f"  {split:9} {count(s['tokens'])} tokens, {s['documents']} documents, {count(s['bytes'])}B{rate}")
    origin = "given" if options["tokenizer"] else "trained here"
    say(f"  tokenizer {m['vocab_size']} ids, {origin}; stored as {m['dtype']}")
    say("\nsources")
    for s in m["sources"]:
        licence = ", ".join(s["license"]) or "not stated"
        say(f"  {s['name']}: {s['documents']} kept, {count(s['bytes'])}B, licence {licence}")
    say("\nsteps")
    repaired, prose, code = (counts.get(k, 0) for k in ("repaired", "prose", "code"))
    say(f"  repaired encoding or characters of {repaired}; told {prose} prose and {code} code apart")
    if options["mask_personal"]:
        say(f"  masked {counts.get('personal_masked', 0)} e-mail addresses, IP addresses and phone numbers")
    if e := m["evaluation"]:
        say(f"  looked for {e['items']} evaluation items; {e['too_short']} under 8 words could not be looked for")
    else:
        say("  no evaluation files were given, so nothing was decontaminated (--decontaminate FILE)")
    if options["skip"]:
        say(f"  left out: {', '.join(options['skip'])}")
    passed = m["passed_over"]
    if passed["files"]:
        types = ", ".join(f"{n} {t}" for t, n in passed["types"].items())
        say(f"  passed over {passed['files']} files that are not text: {types}")
    if passed["bad"]:
        say(f"  passed over {passed['bad']} unreadable files or lines, such as {passed['examples'][0]}")
    say("\ndropped")
    for why, d in sorted(m["dropped"].items(), key=lambda x: -x[1]["bytes"]):
        note = " (fits English only)" if why in ENGLISH_ONLY else ""
        say(f"  {why.replace('_', ' ')}{note}: {d['documents']}, {count(d['bytes'])}B")
        for e in d["examples"][: min(examples, 3)]:
            say(f"      {e['document']}: {e['text'][:100]}")
    if not m["dropped"]:
        say("  nothing")
    keys = ("counts", "splits", "sources", "vocab_size", "digest", "passed_over", "seconds")
    return {k: m[k] for k in keys} | {"dropped": corpus.dropped()}
