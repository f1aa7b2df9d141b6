"""`craton corpus show`: what was kept, what was dropped and why."""

from pathlib import Path
from typing import Any

from craton.base import amount, count, say, span
from craton.corpus import account
from craton.corpus.quality import LANGUAGE_RULES
from craton.corpus.store import Corpus


def show(folder: Path, examples: int) -> dict[str, Any]:
    """Print a corpus's manifest for a reader; returns its numbers. UserError if the corpus is damaged."""
    corpus = Corpus(folder)
    m = corpus.manifest
    counts, options = m["counts"], m["options"]
    say(f"{folder}: {counts['documents']} documents, {amount(counts['bytes'], 'B')} read in {span(m['seconds'])}")
    for split, s in m["splits"].items():
        rate = f", {s['bytes'] / s['tokens']:.2f} bytes a token" if s["tokens"] else ""
        say(f"  {split:9} {count(s['tokens'])} tokens, {s['documents']} documents, {amount(s['bytes'], 'B')}{rate}")
    origin = "given" if options["tokenizer"] else "trained here"
    say(f"  tokenizer {m['vocab_size']} ids, {origin}; stored as {m['dtype']}")
    say("\nsources")
    for s in m["sources"][:20]:
        licence = ", ".join(s["license"]) or "not stated"
        read = f" of {amount(s['read_bytes'], 'B')}" if "read_bytes" in s else ""
        say(f"  {s['name']}: {s['documents']} documents kept, {amount(s['bytes'], 'B')}{read}, licence {licence}")
    if len(m["sources"]) > 20:
        say(f"  and {len(m['sources']) - 20} more")
    say("\nsteps")
    say(f"  repaired encoding or characters of {counts.get('repaired', 0)} parts")
    if judged := counts.get("prose", 0) + counts.get("code", 0):
        say(f"  judged {judged} parts by the rules for web pages, {counts.get('code', 0)} of them as code")
    else:
        say("  judged nothing by rules for web pages (--rules web does)")
    if options["mask_personal"]:
        say(f"  masked {counts.get('personal_masked', 0)} e-mail addresses, IP addresses and phone numbers")
    if e := m["evaluation"]:
        say(f"  looked for {e['items']} evaluation items; {e['too_short']} under 8 words could not be looked for")
    else:
        say("  no evaluation files were given, so nothing was decontaminated (--decontaminate FILE)")
    if options["skip"]:
        say(f"  left out: {', '.join(options['skip'])}")
    for line in filter(None, [account.encodings(m), *account.warnings(m)]):
        say(f"  {line}")
    say("\ndropped")
    for why, d in sorted(m["dropped"].items(), key=lambda x: -x[1]["bytes"]):
        note = " (by language)" if why in LANGUAGE_RULES else ""
        many = f"{d['documents']}, " if d["documents"] else ""
        say(f"  {why.replace('_', ' ')}{note}: {many}{amount(d['bytes'], 'B')}")
        for e in d["examples"][: min(examples, 3)]:
            say(f"      {e['document']}: {e.get('measured', '')}{': ' if 'measured' in e else ''}{e['text'][:100]}")
    if not m["dropped"]:
        say("  nothing")
    keys = ("counts", "splits", "sources", "vocab_size", "digest", "passed_over", "seconds")
    return {k: m[k] for k in keys} | {"dropped": corpus.dropped()}
