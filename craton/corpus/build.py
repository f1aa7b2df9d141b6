"""`craton corpus build`: documents to a corpus, in four stages that each leave their work where a later run finds it.

1. clean    batches of about 1 MB go to worker processes: repair, rules, decontamination, MinHash  -> .work/clean-*
2. dedup    in this process, over a few hundred bytes a document
3. tokenizer trained on a sample of what is left, or the given one
4. encode   batches again, tokens into shards; the manifest is written last and makes the corpus exist
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from craton import __version__
from craton.base import Progress, UserError, count, digest, fsync, nearest, read_json, say, sha256, span, write_json
from craton.corpus import sources
from craton.corpus.clean import INDEX, STEPS, Dropped, Evaluation, clean, evaluation_grams, read_batch
from craton.corpus.dedup import exact_copies, near_copies
from craton.corpus.store import DOCUMENT, SPLITS, manifest_digest
from craton.text.tokenizer import Tokenizer, choose_vocab_size, train_tokenizer

BATCH_BYTES = 1 << 20
SHARD_TOKENS = 128 << 20
TOKENIZER_SAMPLE = 48 << 20  # characters that a tokenizer is trained on
HELDOUT_SHARE, HELDOUT_MOST = 0.02, 2 << 20  # of the bytes, and at most


@dataclass(frozen=True)
class BuildOptions:
    """What `craton corpus build` was asked for."""

    sources: list[str]
    skip: list[str]  # steps left out, of clean.STEPS
    decontaminate: list[str]  # evaluation files
    mask_personal: bool = False
    tokenizer: str | None = None  # a tokenizer folder; None trains one
    vocab_size: int | None = None  # None: by corpus size
    skip_bad: bool = False
    seed: int = 0


class _Pool:
    """Worker processes with a bounded number of batches in flight."""

    def __init__(self) -> None:
        self.workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self.executor = ProcessPoolExecutor(self.workers, multiprocessing.get_context(method))
        self.pending: set[Future[Any]] = set()

    def submit(self, *call: Any) -> None:
        while len(self.pending) >= 2 * self.workers:
            self._collect(FIRST_COMPLETED)
        self.pending.add(self.executor.submit(*call))

    def _collect(self, when: str) -> None:
        done, self.pending = wait(self.pending, return_when=when)
        for future in done:
            future.result()

    def finish(self) -> None:
        self._collect("ALL_COMPLETED")

    def close(self) -> None:
        self.executor.shutdown(cancel_futures=True)


def _check(options: BuildOptions) -> None:
    for name in options.skip:
        if name not in STEPS:
            raise UserError(f"--skip {name}: no such step{nearest(name, STEPS)}; steps: {', '.join(STEPS)}")
    if options.vocab_size is not None and options.tokenizer:
        raise UserError("--vocab-size and --tokenizer exclude each other: a given tokenizer has its own size")
    if options.vocab_size is not None and not 300 <= options.vocab_size <= 1_000_000:
        raise UserError(
            f"--vocab-size {options.vocab_size}: must be between 300 (256 bytes and the special tokens) and 1000000"
        )


def _evaluation(paths: list[str]) -> Evaluation | None:
    """Every string in the given evaluation files."""
    if not paths:
        return None
    items: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            items.append(value)
        elif isinstance(value, dict):
            for v in value.values():
                collect(v)
        elif isinstance(value, list):
            for v in value:
                collect(v)

    files, _ = sources.find(paths)
    for file in files:
        if file.kind == "jsonl":
            with sources.open_binary(file.path) as f:
                for number, line in enumerate(f, 1):
                    try:
                        collect(json.loads(line) if line.strip() else "")
                    except ValueError as error:
                        raise UserError(f"{file.path}:{number}: broken JSON line ({error})") from None
        else:
            items += [d.text for d in sources.read([file], False, lambda _: None)]
    found = evaluation_grams(items)
    if not found.grams:
        raise UserError(f"{paths[0]}: no evaluation item of 8 words or more to look for")
    return found


def _fingerprint(options: BuildOptions, files: list[sources.SourceFile]) -> str:
    """Changes when the same command would not give the same corpus."""
    facts = [
        (str(f.path), f.kind, (s := f.path.stat()).st_size, s.st_mtime_ns) if f.kind != "hub" else str(f.path)
        for f in files
    ]
    checks = [sha256(Path(p)) if Path(p).is_file() else p for p in options.decontaminate]
    return digest([__version__, asdict(options), facts, checks])


def _batches(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
    batch: list[sources.Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) >= 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: Path, keep: np.ndarray, fresh: np.ndarray, tokenizer: Path, dtype: str, out: Path) -> None:
    """Tokens of a batch's kept documents (fresh: preceded by the document token) and how many each has."""
    tok = _tokenizer(tokenizer)
    texts = [d["text"] for d, k in zip(read_batch(batch), keep, strict=True) if k]
    ids: list[int] = []
    lengths = []
    for encoded, start in zip(tok.encode_documents(texts), fresh, strict=True):
        before = len(ids)
        if start:
            ids.append(tok.document_id)
        ids += encoded
        lengths.append(len(ids) - before)
    with open(out.with_suffix(".tmp"), "wb") as f:
        np.save(f, np.array(lengths, np.uint32))
        np.save(f, np.array(ids, np.dtype(dtype)))
    out.with_suffix(".tmp").rename(out)


_OPENED: dict[Path, Tokenizer] = {}


def _tokenizer(folder: Path) -> Tokenizer:
    if folder not in _OPENED:
        _OPENED[folder] = Tokenizer.open(folder)
    return _OPENED[folder]


def _heldout(index: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(n,) True for the held-out documents: in order of their hash, up to HELDOUT_SHARE of the bytes."""
    chosen = np.zeros(len(index), bool)
    kept = np.flatnonzero(keep)
    room = min(HELDOUT_MOST, HELDOUT_SHARE * int(index["bytes"][kept].sum()))
    for i in kept[np.argsort(index["exact"][kept, 0], kind="stable")]:
        if index["bytes"][i] <= room:
            chosen[i] = True
            room -= int(index["bytes"][i])
    if not chosen.any() and len(kept) > 1:
        chosen[kept[np.argmin(index["bytes"][kept])]] = True
    return chosen


def build(options: BuildOptions, out: Path) -> dict[str, Any]:
    """Build the corpus and return its manifest. Raises UserError for bad input, leaving nothing behind."""
    _check(options)
    files, passed = sources.find(options.sources)
    evaluation = None if "decontaminate" in options.skip else _evaluation(options.decontaminate)
    given = None
    if options.tokenizer:
        given = Tokenizer.open(Path(options.tokenizer))
        given.document_id  # noqa: B018 (refuses a tokenizer without a document token now, not after an hour)
    mark = _fingerprint(options, files)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for --out")
    if (out / "manifest.json").exists():
        manifest = read_json(out / "manifest.json")
        if manifest.get("fingerprint") == mark:
            say(f"{out} is already built from these sources with these options; nothing to do")
            return manifest
        raise UserError(f"{out}: already holds another corpus; give another --out, or remove it first")
    work, made = out / ".work", not out.exists()
    if out.exists() and any(out.iterdir()) and not work.exists():
        raise UserError(f"{out}: folder in use (not empty); give another --out")
    work.mkdir(parents=True, exist_ok=True)
    lock = open(work / "lock", "w")  # noqa: SIM115 (held until the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{out}: folder in use: another build is writing it") from None
    pool = _Pool()
    try:
        state = work / "fingerprint"
        if state.exists() and state.read_text() != mark:
            for path in work.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        state.write_text(mark)
        return _build(options, out, work, files, passed, evaluation, given, mark, pool)
    except UserError:
        pool.close()
        shutil.rmtree(out if made else work)
        raise
    except OSError as error:
        raise UserError(
            f"{out}: cannot write ({error.strerror}); mend it and run the same command again, it will go on"
        ) from None
    finally:
        pool.close()
        lock.close()


def _build(
    options: BuildOptions,
    out: Path,
    work: Path,
    files: list[sources.SourceFile],
    passed: list[Path],
    evaluation: Evaluation | None,
    given: Tokenizer | None,
    mark: str,
    pool: _Pool,
) -> dict[str, Any]:
    began, progress = time.monotonic(), Progress()
    counts: Counter[str] = Counter()
    dropped: dict[str, Dropped] = {}
    bad: list[str] = []

    # 1. clean
    batches: list[Path] = []
    size = found_before = 0
    for number, batch in enumerate(_batches(sources.read(files, options.skip_bad, bad.append))):
        path = work / f"clean-{number:06d}"
        batches.append(path)
        size += sum(len(d.text) for d in batch)
        if path.with_suffix(".json").exists():
            found_before += 1
        else:
            pool.submit(clean, batch, frozenset(options.skip), options.mask_personal, evaluation, path)
        progress.show(
            f"clean    {count(size)}B read, {size / 1e6 / (time.monotonic() - began):.1f} MB/s, {batch[-1].name}"
        )
    pool.finish()
    progress.clear()
    if found_before:
        say(f"went on from an earlier run: {found_before} of {len(batches)} batches were already clean")
    cleaned = []
    for path in batches:
        part = read_json(path.with_suffix(".json"))
        counts.update(part["counts"])
        for why, facts in part["dropped"].items():
            dropped.setdefault(why, Dropped()).merge(Dropped(**facts))
        cleaned.append(np.load(path.with_suffix(".npy"), allow_pickle=False))
    index = np.concatenate(cleaned) if cleaned else np.empty(0, INDEX)
    cleaned_in = time.monotonic() - began
    say(
        f"clean    {counts['documents']} documents, {count(counts['bytes'])}B in {span(cleaned_in)}; {len(index)} "
        "parts left"
    )

    # 2. dedup
    copy = exact_copies(index["exact"]) if "exact" not in options.skip else np.zeros(len(index), bool)
    near = near_copies(index["bands"]) & ~copy if "near" not in options.skip else np.zeros(len(index), bool)
    keep = ~(copy | near)
    for why, which in (("exact_duplicate", copy), ("near_duplicate", near)):
        if which.any():
            dropped[why] = Dropped(int(which.sum()), int(index["bytes"][which].sum()))
    _dedup_examples(batches, cleaned, {"exact_duplicate": copy, "near_duplicate": near}, dropped)
    if not keep.any():
        reasons = ", ".join(
            f"{why} {d.documents}" for why, d in sorted(dropped.items(), key=lambda x: -x[1].documents)[:4]
        )
        raise UserError(
            f"{options.sources[0]}: no document is left after the filters ({reasons or 'no text'}); --skip quality "
            "keeps them"
        )
    held = _heldout(index, keep)
    say(
        f"dedup    {int(copy.sum())} exact and {int(near.sum())} near duplicates dropped, {int(keep.sum())} kept, "
        f"{int(held.sum())} held out"
    )

    # 3. tokenizer
    folder, kept_bytes = work / "tokenizer", int(index["bytes"][keep].sum())
    offsets = np.cumsum([0] + [len(c) for c in cleaned])
    if given is None and not (folder / "tokenizer_config.json").exists():
        vocab, start = options.vocab_size or choose_vocab_size(kept_bytes), time.monotonic()
        folder.mkdir(exist_ok=True)
        progress.show("tokenizer")
        tokenizer = train_tokenizer(_sample(batches, offsets, keep & ~held, kept_bytes), vocab)
        tokenizer.save(folder)
        say(f"tokenizer {tokenizer.vocab_size} tokens learned in {span(time.monotonic() - start)}")
    elif given is not None:
        folder.mkdir(exist_ok=True)
        given.save(folder)
    tokenizer = Tokenizer.open(folder)
    dtype = "uint16" if tokenizer.vocab_size <= 65_536 else "uint32"

    # 4. encode
    same = (index["name"][1:] == index["name"][:-1]) & (index["part"][1:] == index["part"][:-1] + 1)
    follows = np.concatenate([[False], same & keep[:-1] & (held[1:] == held[:-1])])
    began_encoding = time.monotonic()
    for n, path in enumerate(batches):
        part = slice(offsets[n], offsets[n + 1])
        tokens = path.with_name(f"tokens-{n:06d}.npy")
        if not tokens.exists():
            pool.submit(_encode, path, keep[part], ~follows[part][keep[part]], folder, dtype, tokens)
        progress.show(f"encode   batch {n + 1} of {len(batches)}")
    pool.finish()
    progress.clear()
    manifest = _write(options, out, work, batches, offsets, index, keep, held, follows, tokenizer, dtype)
    seconds = time.monotonic() - began
    say(
        f"encode   {count(sum(s['tokens'] for s in manifest['splits'].values()))} tokens in "
        f"{span(time.monotonic() - began_encoding)}"
    )
    licenses = manifest.pop("licenses")
    manifest |= {
        "fingerprint": mark,
        "craton": __version__,
        "options": asdict(options),
        "counts": {**counts, "kept": int(keep.sum()), "kept_bytes": kept_bytes},
        "dropped": {why: asdict(d) for why, d in sorted(dropped.items())},
        "passed_over": {
            "files": len(passed),
            "types": Counter(p.suffix or "(none)" for p in passed),
            "bad": len(bad),
            "examples": bad[:5],
        },
        "evaluation": {"items": evaluation.items, "too_short": evaluation.too_short} if evaluation else None,
        "sources": [
            {
                "name": name,
                "documents": int((kept := keep & (index["source"] == i)).sum()),
                "bytes": int(index["bytes"][kept].sum()),
                "license": sorted(licenses.get(i, set())),
            }
            for i, name in enumerate(options.sources)
        ],
        "seconds": round(seconds, 2),
    }
    manifest = json.loads(json.dumps(manifest))
    manifest["digest"] = manifest_digest(manifest)
    write_json(out / "manifest.json", manifest)
    shutil.rmtree(work)
    say(f"{out}: {count(counts['bytes'])}B in {span(seconds)} ({counts['bytes'] / 1e6 / seconds:.1f} MB/s)")
    return manifest


def _dedup_examples(
    batches: list[Path], cleaned: list[np.ndarray], copies: dict[str, np.ndarray], dropped: dict[str, Dropped]
) -> None:
    for why, which in copies.items():
        at = np.flatnonzero(which)[:3]
        offset = 0
        for path, rows in zip(batches, cleaned, strict=True):
            mine = at[(at >= offset) & (at < offset + len(rows))] - offset
            if len(mine):
                documents = read_batch(path)
                for i in mine:
                    d = documents[i]
                    dropped[why].examples.append(
                        {"document": d["name"], "text": " ".join(d["text"][:400].split())[:160]}
                    )
            offset += len(rows)


def _sample(batches: list[Path], offsets: np.ndarray, use: np.ndarray, total: int) -> Iterator[str]:
    """Texts for the tokenizer: every document, or every k-th where that is enough."""
    step = max(1, -(-total // TOKENIZER_SAMPLE))
    for n, path in enumerate(batches):
        for i, document in enumerate(read_batch(path)):
            at = int(offsets[n]) + i
            if use[at] and at % step == 0:
                yield document["text"]


def _write(
    options: BuildOptions,
    out: Path,
    work: Path,
    batches: list[Path],
    offsets: np.ndarray,
    index: np.ndarray,
    keep: np.ndarray,
    held: np.ndarray,
    follows: np.ndarray,
    tokenizer: Tokenizer,
    dtype: str,
) -> dict[str, Any]:
    """Shards, document rows, names and tokenizer; returns the part of the manifest that describes them."""
    for stale in [*out.glob("*.bin"), *out.glob("documents.npy")]:
        stale.unlink()
    shards: dict[str, list[str]] = {s: [] for s in SPLITS}
    length = dict.fromkeys(SPLITS, 0)
    rows = []
    licenses: dict[int, set[str]] = {}
    open_shards: dict[str, Any] = {}
    with open(out / "names.bin", "wb") as names:
        for n, path in enumerate(batches):
            with open(path.with_name(f"tokens-{n:06d}.npy"), "rb") as f:
                lengths, ids = np.load(f, allow_pickle=False), np.load(f, allow_pickle=False)
            at, taken = 0, 0
            for i, document in enumerate(read_batch(path)):
                g = int(offsets[n]) + i
                if not keep[g]:
                    continue
                split = SPLITS[int(held[g])]
                piece = ids[at : at + int(lengths[taken])]
                at, taken = at + len(piece), taken + 1
                if split not in open_shards or length[split] // SHARD_TOKENS >= len(shards[split]):
                    if split in open_shards:
                        open_shards[split].close()
                    shards[split].append(f"{split}-{len(shards[split]):05d}.bin")
                    open_shards[split] = open(out / shards[split][-1], "wb")  # noqa: SIM115
                open_shards[split].write(piece.tobytes())
                label = document["name"].encode("utf-8", "replace")[:65_535]
                rows.append(
                    (
                        SPLITS.index(split),
                        follows[g],
                        index["source"][g],
                        length[split],
                        len(piece),
                        index["bytes"][g],
                        names.tell(),
                        len(label),
                        index["exact"][g],
                    )
                )
                names.write(label)
                length[split] += len(piece)
                if document["license"]:
                    licenses.setdefault(int(index["source"][g]), set()).add(document["license"])
    for shard in open_shards.values():
        shard.close()
    table = np.array(rows, DOCUMENT)
    with open(out / "documents.npy", "wb") as rows_file:
        np.save(rows_file, table)
    (out / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(out / "tokenizer")
    paths = [
        out / "documents.npy",
        out / "names.bin",
        *(out / s for names_ in shards.values() for s in names_),
        *sorted((out / "tokenizer").iterdir()),
    ]
    for path in paths:
        fsync(path)
    return {
        "format": "craton-corpus-1",
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "document_id": tokenizer.document_id,
        "splits": {
            s: {
                "tokens": length[s],
                "documents": int((table["split"] == i).sum()),
                "bytes": int(table["bytes"][table["split"] == i].sum()),
                "shards": shards[s],
            }
            for i, s in enumerate(SPLITS)
        },
        "files": {str(p.relative_to(out)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths},
        "licenses": licenses,
    }
