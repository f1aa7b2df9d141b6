"""`craton corpus build`: documents to a corpus, in four stages that each leave their work where a later run finds it.

1. clean    batches of about 1 MB go to worker processes: repair, rules, decontamination, MinHash  -> .work/clean-*
2. dedup    in this process, over a few hundred bytes a document
3. tokenizer trained on a sample of what is left, or the given one
4. encode   batches again, tokens into shards; the manifest is written last and makes the corpus exist
"""

import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from craton import __version__
from craton.base.console import Progress, count, say, span
from craton.base.errors import UserError, nearest
from craton.base.files import claim, digest, read_json, remove_inside, sha256, write_json
from craton.corpus import sources
from craton.corpus.clean import INDEX, STEPS, Dropped, Evaluation, clean, evaluation_grams, read_batch
from craton.corpus.dedup import exact_copies, near_copies
from craton.corpus.shards import Shards
from craton.corpus.store import manifest_digest
from craton.text.tokenizer import Tokenizer, choose_vocab_size, train_tokenizer

BATCH_CHARACTERS = 1 << 20
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


class _Pool:
    """Worker processes with a bounded number of batches in flight."""

    def __init__(self) -> None:
        self.workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        self.executor = ProcessPoolExecutor(self.workers, multiprocessing.get_context(method))
        self.pending: set[Future[Any]] = set()

    def submit(self, *call: Any) -> None:
        """A call in a worker; waits while enough are on their way. Raises what an earlier one raised."""
        while len(self.pending) >= 2 * self.workers:
            self._collect(FIRST_COMPLETED)
        self.pending.add(self.executor.submit(*call))

    def _collect(self, when: str) -> None:
        done, self.pending = wait(self.pending, return_when=when)
        for future in done:
            future.result()

    def finish(self) -> None:
        """Wait for all."""
        self._collect("ALL_COMPLETED")

    def close(self) -> None:
        """No more workers."""
        self.executor.shutdown(cancel_futures=True)


def _check(options: BuildOptions) -> None:
    for name in options.skip:
        if name not in STEPS:
            raise UserError(f"--skip {name}: no such step{nearest(name, STEPS)}; steps: {', '.join(STEPS)}")
    size = options.vocab_size
    if size is not None and options.tokenizer:
        raise UserError("--vocab-size and --tokenizer exclude each other: a given tokenizer has its own size")
    if size is not None and not 300 <= size <= 1_000_000:
        raise UserError(f"--vocab-size {size}: must be between 300 (256 bytes and the special tokens) and 1000000")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _strings(v)


def _evaluation(paths: list[str]) -> Evaluation | None:
    """Every string in the given evaluation files."""
    if not paths:
        return None
    items: list[str] = []
    files, _ = sources.find(paths)
    for file in files:
        if file.kind == "jsonl":
            with sources.open_binary(file.path) as f:
                for number, line in enumerate(f, 1):
                    try:
                        items += _strings(json.loads(line) if line.strip() else "")
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
        if size >= BATCH_CHARACTERS or len(batch) >= 4096:
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


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.open(folder)


def heldout_documents(index: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(n,) True for the parts of held-out documents: whole documents, in order of their hash, up to HELDOUT_SHARE of
    the bytes. Parts of a document lie together in the index; a document of which a part were trained on would not be
    held out."""
    chosen, kept = np.zeros(len(index), bool), np.flatnonzero(keep)
    if not len(kept):
        return chosen
    first = np.concatenate([[0], np.flatnonzero(np.diff(index["name"][kept])) + 1])  # of each document, in kept
    parts = np.split(kept, first[1:])
    size = np.add.reduceat(index["bytes"][kept].astype(np.int64), first)
    room = min(HELDOUT_MOST, HELDOUT_SHARE * int(size.sum()))
    for document in np.argsort(index["exact"][kept[first], 0], kind="stable"):
        if size[document] <= room:
            chosen[parts[document]] = True
            room -= int(size[document])
    if not chosen.any() and len(parts) > 1:
        chosen[parts[int(np.argmin(size))]] = True
    return chosen


def build(options: BuildOptions, out: Path) -> dict[str, Any]:
    """Build the corpus and return its manifest. Raises UserError for bad input, leaving nothing behind; what was done
    before a full disk or a kill is taken up by the next call."""
    _check(options)
    files, passed = sources.find(options.sources)
    evaluation = None if "decontaminate" in options.skip else _evaluation(options.decontaminate)
    given = None
    if options.tokenizer:
        given = Tokenizer.open(Path(options.tokenizer))
        given.document_id  # noqa: B018 (refuses a tokenizer without a document token now, not after an hour)
    mark = _fingerprint(options, files)
    if (out / "manifest.json").exists():
        manifest: dict[str, Any] = read_json(out / "manifest.json")
        if manifest.get("fingerprint") == mark:
            say(f"{out} is already built from these sources with these options; nothing to do")
            return manifest
        raise UserError(f"{out}: already holds another corpus; give another --out, or remove it first", field="out")
    with claim(out, ".work", resume=True):
        work = out / ".work"
        state = work / "fingerprint"
        if state.exists() and state.read_text() != mark:
            remove_inside(work, {".lock"})
        state.write_text(mark)
        job = _Build(options, out, files, passed, evaluation, given, mark)
        try:
            return job.run()
        except UserError:  # what is wrong is the input: nothing of this is of use
            job.pool.close()
            remove_inside(work, {".lock"})
            raise
        except OSError as error:
            problem = f"{out}: cannot write ({error.strerror}); mend it and run the same command again, it will go on"
            raise UserError(problem, code="cannot_write") from None
        finally:
            job.pool.close()


@dataclass
class _Build:
    """One build, stage by stage. Each stage leaves its work in .work, and adds to what is known of the parts."""

    options: BuildOptions
    out: Path
    files: list[sources.SourceFile]
    passed: list[Path]
    evaluation: Evaluation | None
    given: Tokenizer | None
    mark: str

    def __post_init__(self) -> None:
        self.work = self.out / ".work"
        self.began, self.progress, self.pool = time.monotonic(), Progress(), _Pool()
        self.counts: Counter[str] = Counter()
        self.dropped: dict[str, Dropped] = {}
        self.bad: list[str] = []
        self.batches: list[Path] = []
        self.cleaned: list[np.ndarray] = []  # INDEX rows of each batch

    def run(self) -> dict[str, Any]:
        """All stages; returns the manifest."""
        self.clean()
        self.index = np.concatenate(self.cleaned) if self.cleaned else np.empty(0, INDEX)
        self.offsets = np.cumsum([0] + [len(c) for c in self.cleaned])
        size, seconds = count(self.counts["bytes"]), span(time.monotonic() - self.began)
        say(f"clean    {self.counts['documents']} documents, {size}B in {seconds}; {len(self.index)} parts left")
        self.dedup()
        self.learn_tokenizer()
        self.encode()
        return self.publish()

    # ---- 1 ----

    def clean(self) -> None:
        """Every document through the per-document steps, in batches."""
        size = found_before = 0
        documents = sources.read(self.files, self.options.skip_bad, self.bad.append)
        for number, batch in enumerate(_batches(documents)):
            path = self.work / f"clean-{number:06d}"
            self.batches.append(path)
            size += sum(len(d.text) for d in batch)
            if path.with_suffix(".json").exists():
                found_before += 1
            else:
                skip, personal = frozenset(self.options.skip), self.options.mask_personal
                self.pool.submit(clean, batch, skip, personal, self.evaluation, path)
            speed = size / 1e6 / (time.monotonic() - self.began)
            self.progress.show(f"clean    {count(size)}B read, {speed:.1f} MB/s, {batch[-1].name}")
        self.pool.finish()
        self.progress.clear()
        if found_before:
            say(f"went on from an earlier run: {found_before} of {len(self.batches)} batches were already clean")
        for path in self.batches:
            part = read_json(path.with_suffix(".json"))
            self.counts.update(part["counts"])
            for why, facts in part["dropped"].items():
                self.dropped.setdefault(why, Dropped()).merge(Dropped(**facts))
            self.cleaned.append(np.load(path.with_suffix(".npy"), allow_pickle=False))

    # ---- 2 ----

    def dedup(self) -> None:
        """Which parts are kept, and which of those are held out. UserError if none is kept."""
        skip, index = self.options.skip, self.index
        none = np.zeros(len(index), bool)
        copy = exact_copies(index["exact"]) if "exact" not in skip else none
        near = near_copies(index["bands"]) & ~copy if "near" not in skip else none
        self.keep = ~(copy | near)
        copies = {"exact_duplicate": copy, "near_duplicate": near}
        for why, which in copies.items():
            if which.any():
                self.dropped[why] = Dropped(int(which.sum()), int(index["bytes"][which].sum()))
        self._show_copies(copies)
        if not self.keep.any():
            most = sorted(self.dropped.items(), key=lambda x: -x[1].documents)[:4]
            reasons = ", ".join(f"{why} {d.documents}" for why, d in most) or "no text"
            where = self.options.sources[0]
            raise UserError(f"{where}: no document is left after the filters ({reasons}); --skip quality keeps them")
        self.held = heldout_documents(index, self.keep)
        kept, held = self.keep.sum(), self.held.sum()
        say(f"dedup    {copy.sum()} exact and {near.sum()} near duplicates dropped, {kept} kept, {held} held out")
        if not self.held.any():
            say("dedup    nothing is held out, since there is one document only: give several to have a held-out loss")

    def _show_copies(self, copies: dict[str, np.ndarray]) -> None:
        """A few examples of what was dropped."""
        for why, which in copies.items():
            for at in np.flatnonzero(which)[:3]:
                number = int(np.searchsorted(self.offsets, at, "right")) - 1
                document = read_batch(self.batches[number])[at - self.offsets[number]]
                text = " ".join(document["text"][:400].split())[:160]
                self.dropped[why].examples.append({"document": document["name"], "text": text})

    # ---- 3 ----

    def learn_tokenizer(self) -> None:
        """The given tokenizer, or one that is trained on what is kept."""
        folder = self.work / "tokenizer"
        self.kept_bytes = int(self.index["bytes"][self.keep].sum())
        if self.given is not None:
            folder.mkdir(exist_ok=True)
            self.given.save(folder)
        elif not (folder / "tokenizer_config.json").exists():
            vocab, start = self.options.vocab_size or choose_vocab_size(self.kept_bytes), time.monotonic()
            folder.mkdir(exist_ok=True)
            self.progress.show("tokenizer")
            tokenizer = train_tokenizer(self._sample(), vocab)
            tokenizer.save(folder)
            say(f"tokenizer {tokenizer.vocab_size} tokens learned in {span(time.monotonic() - start)}")
        self.tokenizer = Tokenizer.open(folder)
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 65_536 else "uint32"

    def _sample(self) -> Iterator[str]:
        """Texts for the tokenizer: every part that is trained on, or every k-th where that is enough."""
        use, step = self.keep & ~self.held, max(1, -(-self.kept_bytes // TOKENIZER_SAMPLE))
        for n, path in enumerate(self.batches):
            for i, document in enumerate(read_batch(path)):
                at = int(self.offsets[n]) + i
                if use[at] and at % step == 0:
                    yield document["text"]

    # ---- 4 ----

    def encode(self) -> None:
        """Tokens of every batch."""
        index, keep, held, start = self.index, self.keep, self.held, time.monotonic()
        same = (index["name"][1:] == index["name"][:-1]) & (index["part"][1:] == index["part"][:-1] + 1)
        self.follows = np.concatenate([[False], same & keep[:-1] & (held[1:] == held[:-1])])
        for n, path in enumerate(self.batches):
            part = slice(self.offsets[n], self.offsets[n + 1])
            tokens = path.with_name(f"tokens-{n:06d}.npy")
            if not tokens.exists():
                fresh = ~self.follows[part][keep[part]]
                self.pool.submit(_encode, path, keep[part], fresh, self.work / "tokenizer", self.dtype, tokens)
            self.progress.show(f"encode   batch {n + 1} of {len(self.batches)}")
        self.pool.finish()
        self.progress.clear()
        self.encoded_in = time.monotonic() - start

    def publish(self) -> dict[str, Any]:
        """Shards, rows and names, and last the manifest, which makes the corpus exist."""
        writer = Shards(self.out, self.dtype)
        writer.write(self.batches, self.offsets, self.index, self.keep, self.held, self.follows)
        manifest = writer.describe(self.tokenizer)
        seconds = time.monotonic() - self.began
        tokens = sum(s["tokens"] for s in manifest["splits"].values())
        say(f"encode   {count(tokens)} tokens in {span(self.encoded_in)}")
        manifest |= self._facts(writer.licenses, seconds)
        manifest = json.loads(json.dumps(manifest))
        manifest["digest"] = manifest_digest(manifest)
        write_json(self.out / "manifest.json", manifest)
        shutil.rmtree(self.work)
        size = self.counts["bytes"]
        say(f"{self.out}: {count(size)}B in {span(seconds)} ({size / 1e6 / seconds:.1f} MB/s)")
        return manifest

    def _facts(self, licenses: dict[int, set[str]], seconds: float) -> dict[str, Any]:
        """The manifest's account of what was done."""
        each = []
        for i, name in enumerate(self.options.sources):
            kept = self.keep & (self.index["source"] == i)
            facts = {"documents": int(kept.sum()), "bytes": int(self.index["bytes"][kept].sum())}
            each.append({"name": name, **facts, "license": sorted(licenses.get(i, set()))})
        looked, types = self.evaluation, Counter(p.suffix or "(none)" for p in self.passed)
        passed = dict(files=len(self.passed), types=types, bad=len(self.bad), examples=self.bad[:5])
        return {
            "fingerprint": self.mark,
            "craton": __version__,
            "options": asdict(self.options),
            "counts": {**self.counts, "kept": int(self.keep.sum()), "kept_bytes": self.kept_bytes},
            "dropped": {why: asdict(d) for why, d in sorted(self.dropped.items())},
            "passed_over": passed,
            "evaluation": {"items": looked.items, "too_short": looked.too_short} if looked else None,
            "sources": each,
            "seconds": round(seconds, 2),
        }
