"""What became of the sources: how much of each was kept, what which rule dropped, what was passed over."""

from collections import Counter
from typing import Any

import numpy as np

from craton.base import amount, count, say
from craton.corpus.clean import Dropped
from craton.corpus.sources import Reading

LOUD = 0.2  # of a source's bytes, that are dropped
_ROWS = 10  # sources that are named one by one


def by_source(
    names: list[str], kept: np.ndarray, dropped: dict[str, Dropped], read: Counter[str]
) -> list[dict[str, Any]]:
    """For each source: documents, bytes kept, bytes read (without markup) and dropped, by rule. kept: INDEX rows."""
    first = kept[np.concatenate([[True], np.diff(kept["name"]) != 0])] if len(kept) else kept
    documents = np.bincount(first["source"].astype(np.int64), minlength=len(names))
    size = np.bincount(kept["source"].astype(np.int64), kept["bytes"].astype(np.float64), minlength=len(names))
    out = []
    for i, name in enumerate(names):
        rules = {why: d.sources[str(i)] for why, d in dropped.items() if str(i) in d.sources}
        facts = {"name": name, "documents": int(documents[i]), "bytes": int(size[i]), "read_bytes": read[str(i)]}
        out.append({**facts, "dropped": dict(sorted(rules.items(), key=lambda x: -x[1]))})
    return out


def passed_over(reading: Reading) -> dict[str, Any]:
    """What was not read, or not as it was written."""
    unnamed = [entry for entry in reading.passed if ": no text in this record" in entry]
    others = [entry for entry in reading.passed if entry not in unnamed]
    types = Counter(entry.rpartition(": ")[2] for entry in others)
    return {
        "files": len(others),
        "types": dict(types.most_common(20)),
        "names": others[:5],
        "without_text_field": len(unnamed),
        "without_text_field_names": unnamed[:5],
        "bad": len(reading.bad),
        "examples": reading.bad[:5],
        "encodings": dict(reading.encodings),
        "replaced": dict(reading.replaced.most_common(5)),
        "replaced_files": len(reading.replaced),
        "empty": len(reading.empty),
        "empty_names": reading.empty[:5],
    }


def why_none(dropped: dict[str, Dropped], reading: Reading) -> str:
    """The rest of a sentence on why nothing was kept, with what would help."""
    most = sorted(dropped.items(), key=lambda x: -x[1].documents)[:4]
    if not most:
        return f": nothing could be read ({reading.bad[0]})" if reading.bad else ": the sources hold no text"
    reasons = ", ".join(f"{why} {d.documents}" for why, d in most)
    rules = [why for why, _ in most if why.startswith(("gopher", "c4", "fineweb", "code"))]
    fix = "; --rules own keeps them" if rules else ""
    if "contaminated" in dropped:
        fix = "; they are in the --decontaminate files"
    return f" ({reasons}){fix}"


def say_summary(manifest: dict[str, Any]) -> None:
    """How much of each source was kept; loud where much was not."""
    sources = manifest["sources"]
    for source in sorted(sources, key=lambda s: -s["read_bytes"])[:_ROWS]:
        sizes = f"{amount(source['bytes'], 'B')} of {amount(source['read_bytes'], 'B')}"
        say(f"kept     {_short(source['name'])}: {sizes}{_rules(source)}")
    if len(sources) > _ROWS:
        rest = sorted(sources, key=lambda s: -s["read_bytes"])[_ROWS:]
        kept, read = (count(sum(s[k] for s in rest)) for k in ("bytes", "read_bytes"))
        say(f"kept     {len(rest)} more sources: {kept}B of {read}B")
    if line := encodings(manifest):
        say(f"read     {line}")
    for line in warnings(manifest):
        say(f"WARNING  {line}")


def encodings(manifest: dict[str, Any]) -> str:
    """Which files were not UTF-8; '' if none."""
    found = [f"{n} in {name}" for name, n in manifest["passed_over"].get("encodings", {}).items()]
    return f"files that are not UTF-8, by their declaration or content: {', '.join(found)}" if found else ""


def _short(name: str) -> str:
    return "stdin" if name == "-" else name if len(name) <= 60 else f"...{name[-57:]}"


def _rules(source: dict[str, Any]) -> str:
    """', dropped: near duplicate 12 %, ...' of a source."""
    read = max(1, source["read_bytes"])
    shares = [f"{why.replace('_', ' ')} {100 * n / read:.3g} %" for why, n in list(source["dropped"].items())[:3]]
    return f"; dropped: {', '.join(shares)}" if shares else ""


def warnings(manifest: dict[str, Any]) -> list[str]:
    """What a person has to know of a build, a line each."""
    out = []
    passed = manifest["passed_over"]
    described = [s for s in manifest["sources"] if "read_bytes" in s]  # those of before are not
    loud = [s for s in described if sum(s["dropped"].values()) > LOUD * max(1, s["read_bytes"])]
    for source in loud[:_ROWS]:
        share = sum(source["dropped"].values()) / max(1, source["read_bytes"])
        rules = ", ".join(why.replace("_", " ") for why in list(source["dropped"])[:3])
        fix = "'craton corpus show' has examples" + (
            "; --rules own keeps what web rules drop" if _by_web_rules(source) else ""
        )
        out.append(f"{_short(source['name'])}: {100 * share:.0f} % was dropped ({rules}); {fix}")
    if len(loud) > _ROWS:
        out.append(f"{len(loud) - _ROWS} more sources lost over {100 * LOUD:.0f} %")
    if passed["files"] and passed.get("names"):
        first = passed["names"][0].rpartition(": ")[0]
        types = ", ".join(f"{n} {kind}" for kind, n in list(passed["types"].items())[:6])
        out.append(f"{passed['files']} files or folders were passed over ({types}), such as {first}")
    if passed.get("without_text_field"):
        many, first = passed["without_text_field"], passed["without_text_field_names"][0]
        out.append(
            f"{many} files of records were passed over, such as {first}; --text-field names the field that is text"
        )
    if passed["bad"]:
        out.append(f"{passed['bad']} unreadable files or records were passed over, such as {passed['examples'][0]}")
    if passed.get("replaced_files"):
        name, lost = next(iter(passed["replaced"].items()))
        where = f"{passed['replaced_files']} files" if passed["replaced_files"] > 1 else "a file"
        out.append(
            f"bytes that are no text in {where} became U+FFFD, {lost} in {name}; --encoding NAME if it is misread"
        )
    if (lost := manifest.get("lost_by_tokenizer") or {}).get("texts"):
        out.append(
            f"the given tokenizer does not give texts back as they were ({lost['texts']} of at most 200 differ, such "
            f"as {lost['examples'][0]}): what it loses cannot be learned"
        )
    if nothing := [s for s in described if not s["read_bytes"]]:
        others = f", and {len(nothing) - 1} more sources do" if len(nothing) > 1 else ""
        out.append(f"{_short(nothing[0]['name'])}: holds no text{others}")
    return out


def _by_web_rules(source: dict[str, Any]) -> bool:
    return any(why.startswith(("gopher", "c4", "fineweb", "code")) for why in source["dropped"])
