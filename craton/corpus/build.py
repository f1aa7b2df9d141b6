"""`craton corpus build`: documents to a corpus, in four stages that each leave their work where a later run finds it.

1. clean    batches of about 1 MB go to worker processes: repair, rules, decontamination, MinHash  -> .work/clean-*
2. dedup    in this process, over a few hundred bytes a document
3. tokenizer trained on a sample of what is left, or the given one
4. encode   batches again, tokens into shards; the manifest is written last and makes the corpus exist
"""

import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from craton import __version__
from craton.base import (
    Progress,
    UserError,
    amount,
    claim,
    count,
    digest,
    nearest,
    read_json,
    remove_inside,
    say,
    sha256,
    span,
    write_json,
)
from craton.corpus import account, sources
from craton.corpus.clean import INDEX, STEPS, Cleaning, Dropped, clean, example, read_batch, split_part
from craton.corpus.decode import known
from craton.corpus.dedup import exact_copies, near_copies
from craton.corpus.evaluation import Evaluation, read_evaluation
from craton.corpus.shards import FORMAT, NOT_STATED, Shards
from craton.corpus.store import manifest_digest
from craton.corpus.workers import Killed, Pool
from craton.text.tokenizer import Tokenizer, choose_vocab_size, train_tokenizer

BATCH_CHARACTERS = 1 << 20
TOKENIZER_SAMPLE = 48 << 20  # characters that a tokenizer is trained on
HELDOUT_SHARE, HELDOUT_MOST = 0.02, 2 << 20  # of the bytes, and at most
HELDOUT_DOCUMENTS = 5  # percent of the documents, at most: else small ones would be held out rather than large ones
HELDOUT_LARGEST = 0.1  # of the bytes, that one document may be
HELDOUT_END = 8 << 10  # bytes of the end of a document, at least, where no whole one can be held out


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
    rules: str | None = None  # 'web': judge every document as a page of the web; 'own': none; None: hub datasets only
    text_fields: tuple[str, ...] = ()  # of records, that are their text
    encoding: str | None = None  # of text files; None: told from each
    title: str | None = None  # all sources count as one of this name
    for_run: bool = False  # made by 'craton train' for a run, which may make it again


def _check(options: BuildOptions) -> None:
    for name in options.skip:
        if name not in STEPS:
            raise UserError(f"--skip {name}: no such step{nearest(name, STEPS)}; steps: {', '.join(STEPS)}")
    if options.rules not in (None, "web", "own"):
        raise UserError(f"--rules {options.rules}: web (as pages of the web) or own (as documents of one's own)")
    if options.encoding is not None:
        known(options.encoding)
    size = options.vocab_size
    if size is not None and options.tokenizer:
        raise UserError("--vocab-size and --tokenizer exclude each other: a given tokenizer has its own size")
    if size is not None and not 300 <= size <= 1_000_000:
        raise UserError(f"--vocab-size {size}: must be between 300 (256 bytes and the special tokens) and 1000000")


def _fingerprint(options: BuildOptions, files: list[sources.SourceFile]) -> str:
    """Changes when the same command would not give the same corpus."""
    held = sources.find(options.decontaminate)[0] if options.decontaminate else []
    given = sha256(Path(options.tokenizer) / "tokenizer.json") if options.tokenizer else None
    return digest([__version__, asdict(options), [_facts(f) for f in files], [_facts(f) for f in held], given])


def _facts(file: sources.SourceFile) -> Any:
    """What tells whether a file is still the same."""
    if file.kind == "hub":
        return str(file.path)
    if str(file.path) == "-":
        return time.time_ns()  # cannot be read again
    stat = file.path.stat()
    return (str(file.path), file.kind, stat.st_size, stat.st_mtime_ns)


def _batches(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
    batch: list[sources.Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += BATCH_CHARACTERS // 8 if document.path else len(document.text)
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
    held out. None where every document is too large a part of all."""
    chosen, kept = np.zeros(len(index), bool), np.flatnonzero(keep)
    if not len(kept):
        return chosen
    first = np.concatenate([[0], np.flatnonzero(np.diff(index["name"][kept])) + 1])  # of each document, in kept
    parts = np.split(kept, first[1:])
    size = np.add.reduceat(index["bytes"][kept].astype(np.int64), first)
    whole = int(size.sum())
    room, many = heldout_bytes(whole), -(-len(parts) * HELDOUT_DOCUMENTS // 100)
    for document in np.argsort(index["exact"][kept[first], 0], kind="stable"):
        if many and size[document] <= room:
            chosen[parts[document]] = True
            room, many = room - int(size[document]), many - 1
    smallest = int(np.argmin(size))
    if not chosen.any() and len(parts) > 1 and size[smallest] <= HELDOUT_LARGEST * whole:
        chosen[parts[smallest]] = True
    return chosen


def heldout_bytes(whole: int) -> int:
    """Bytes to hold out of so many."""
    return int(min(HELDOUT_MOST, max(HELDOUT_SHARE * whole, min(HELDOUT_END, HELDOUT_LARGEST * whole))))


def build(options: BuildOptions, out: Path) -> dict[str, Any]:
    """Build the corpus and return its manifest. Raises UserError for bad input, leaving nothing behind; what was done
    before a full disk or a kill is taken up by the next call."""
    _check(options)
    files, passed = sources.find(options.sources)
    if options.title:
        files = [replace(f, source=0) for f in files]
    evaluation = None if "decontaminate" in options.skip else read_evaluation(options.decontaminate)
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
    with claim(out, ".work", resume=True) as lock:
        work = out / ".work"
        state = work / "fingerprint"
        if state.exists() and state.read_text() != mark:
            remove_inside(work, {".lock"})
        state.write_text(mark)
        job = _Build(options, out, files, passed, evaluation, given, mark, lock)
        try:
            return job.run()
        except UserError:  # what is wrong is the input: nothing of this is of use
            job.pool.close()
            remove_inside(work, {".lock"})
            raise
        except OSError as error:
            fix = "mend it and run the same command again, it will go on"
            problem = f"{out}: cannot write ({error.strerror or error}); {fix}"
            raise UserError(problem, code="cannot_write") from None
        except Killed:
            problem = "a worker process was killed, as systems do that run out of memory"
            raise UserError(f"{out}: {problem}; run the same command again, it will go on", code="killed") from None
        finally:
            job.pool.close()


def remove_corpus(out: Path, options: BuildOptions) -> None:
    """Make room for a corpus of these options where a run's other one lies, file by file of its own. UserError if what
    lies there is not a run's."""
    path = out / "manifest.json"
    manifest = read_json(path) if path.exists() else {}
    if not manifest or manifest.get("fingerprint") == _fingerprint(options, sources.find(options.sources)[0]):
        return
    if manifest.get("format") != FORMAT or not manifest.get("options", {}).get("for_run"):
        fix = f"train on it ('craton train {out}'), or give another --out"
        raise UserError(f"{out}: there is a corpus already, which this command did not make; {fix}", field="out")
    names = manifest["files"]
    path.unlink()
    for name in names:
        (out / name).unlink(missing_ok=True)
    if (out / "tokenizer").is_dir() and not any((out / "tokenizer").iterdir()):
        (out / "tokenizer").rmdir()


@dataclass
class _Build:
    """One build, stage by stage. Each stage leaves its work in .work, and adds to what is known of the parts."""

    options: BuildOptions
    out: Path
    files: list[sources.SourceFile]
    passed: list[str]
    evaluation: Evaluation | None
    given: Tokenizer | None
    mark: str
    lock: int | None

    def __post_init__(self) -> None:
        o = self.options
        self.work = self.out / ".work"
        self.began, self.progress, self.pool = time.monotonic(), Progress(), Pool(self.lock)
        self.reading = sources.Reading(o.skip_bad, list(o.text_fields), o.encoding, o.rules, passed=self.passed)
        self.counts: Counter[str] = Counter()
        self.read_bytes: Counter[str] = Counter()  # by number of the source, after markup was taken away
        self.dropped: dict[str, Dropped] = {}
        self.batches: list[Path] = []

    def run(self) -> dict[str, Any]:
        """All stages; returns the manifest."""
        self.clean()
        self._load_index()
        size, seconds = count(self.counts["bytes"]), span(time.monotonic() - self.began)
        say(f"clean    {self.counts['documents']} documents, {size}B in {seconds}; {len(self.index)} parts left")
        self.dedup()
        self.learn_tokenizer()
        self.encode()
        return self.publish()

    def _load_index(self) -> None:
        """What is known of the parts that are left, batch after batch."""
        cleaned = [np.load(path.with_suffix(".npy"), allow_pickle=False) for path in self.batches]
        self.index = np.concatenate(cleaned) if cleaned else np.empty(0, INDEX)
        self.offsets = np.cumsum([0] + [len(c) for c in cleaned])

    # ---- 1 ----

    def clean(self) -> None:
        """Every document through the per-document steps, in batches."""
        size = found_before = 0
        documents = sources.read(self.files, self.reading)
        options = self.options
        cleaning = Cleaning(frozenset(options.skip), options.mask_personal, self.evaluation, options.skip_bad)
        for number, batch in enumerate(_batches(documents)):
            path = self.work / f"clean-{number:06d}"
            self.batches.append(path)
            size += sum(len(d.text) for d in batch)
            if path.with_suffix(".json").exists():
                found_before += 1
            else:
                self.pool.submit(clean, batch, cleaning, path)
            speed = size / 1e6 / (time.monotonic() - self.began)
            self.progress.show(f"clean    {amount(size, 'B')} read, {speed:.1f} MB/s, {batch[-1].name}")
        self.pool.finish()
        self.progress.clear()
        if found_before:
            say(f"went on from an earlier run: {found_before} of {len(self.batches)} batches were already clean")
        for path in self.batches:
            part = read_json(path.with_suffix(".json"))
            self.counts.update(part["counts"])
            self.read_bytes.update(part["sources"])
            self.reading.bad += part["bad"]
            for why, facts in part["dropped"].items():
                self.dropped.setdefault(why, Dropped()).merge(Dropped(**facts))

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
                self.dropped[why] = dropped = Dropped(int(which.sum()), int(index["bytes"][which].sum()))
                size = np.bincount(index["source"][which].astype(np.int64), index["bytes"][which].astype(np.float64))
                dropped.sources = {str(i): int(size[i]) for i in np.flatnonzero(size).tolist()}
        self._show_copies(copies)
        if not self.keep.any():
            raise UserError(
                f"{self.options.sources[0]}: no document is left{account.why_none(self.dropped, self.reading)}"
            )
        self.held = heldout_documents(index, self.keep)
        wanted = heldout_bytes(int(index["bytes"][self.keep].sum())) - int(index["bytes"][self.held].sum())
        if wanted > 0.75 * heldout_bytes(int(index["bytes"][self.keep].sum())):
            self._hold_out_an_end(wanted)
        kept, held = self.keep.sum(), self.held.sum()
        say(f"dedup    {copy.sum()} exact and {near.sum()} near duplicates dropped, {kept} kept, {held} held out")

    def _hold_out_an_end(self, wanted: int) -> None:
        """The documents are few and large: about so many bytes at the end of the largest are held out, cut off where
        need be."""
        index, kept = self.index, np.flatnonzero(self.keep & ~self.held)
        if not len(kept):
            return
        names, inverse = np.unique(index["name"][kept], return_inverse=True)
        size = np.bincount(inverse, index["bytes"][kept].astype(np.float64))
        last = int(kept[np.flatnonzero(inverse == int(size.argmax()))[-1]])
        if index["bytes"][last] > 2 * wanted:
            number = int(np.searchsorted(self.offsets, last, "right")) - 1
            cut = self.work / f"cut-{number:06d}"  # beside the batch: a build that goes on decides on the same parts
            if not split_part(self.batches[number], last - int(self.offsets[number]), wanted, cut):
                if not self.held.any():
                    say("dedup    nothing is held out: the one document is too short to be cut")
                return
            self.batches[number] = cut
            self._load_index()
            self.keep, self.held = np.insert(self.keep, last, True), np.insert(self.held, last, False)
            last += 1
        elif inverse.max() == 0 and len(kept) == 1:
            return  # a single part stays for training
        self.held[last] = True
        say(f"dedup    held out is the end of the largest document, {amount(int(self.index['bytes'][last]), 'B')}")

    def _show_copies(self, copies: dict[str, np.ndarray]) -> None:
        """A few examples of what was dropped."""
        for why, which in copies.items():
            for at in np.flatnonzero(which)[:3]:
                number = int(np.searchsorted(self.offsets, at, "right")) - 1
                document = read_batch(self.batches[number])[at - self.offsets[number]]
                self.dropped[why].examples.append(example(document["name"], document["text"]))

    # ---- 3 ----

    def learn_tokenizer(self) -> None:
        """The given tokenizer, or one that is trained on what is kept."""
        folder = self.work / "tokenizer"
        self.kept_bytes = int(self.index["bytes"][self.keep].sum())
        self.lost_by_tokenizer: list[str] = []
        if self.given is not None:
            folder.mkdir(exist_ok=True)
            self.given.save(folder)
            self.lost_by_tokenizer = self._lossy(self.given)
        elif not (folder / "tokenizer_config.json").exists():
            vocab, start = self.options.vocab_size or choose_vocab_size(self.kept_bytes), time.monotonic()
            folder.mkdir(exist_ok=True)
            self.progress.show("tokenizer")
            tokenizer = train_tokenizer(self._sample(), vocab)
            tokenizer.save(folder)
            say(f"tokenizer {tokenizer.vocab_size} tokens learned in {span(time.monotonic() - start)}")
        self.tokenizer = Tokenizer.open(folder)
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 65_536 else "uint32"

    def _lossy(self, tokenizer: Tokenizer) -> list[str]:
        """What a given tokenizer makes of texts that it does not give back as they were: 'before -> after'."""
        lost = []
        for text in itertools.islice(self._sample(), 200):
            some = text[:2000]
            back = tokenizer.decode(tokenizer.encode(some))
            if back.strip() != some.strip():
                at = next(
                    (i for i, (a, b) in enumerate(zip(some, back, strict=False)) if a != b), min(len(some), len(back))
                )
                lost.append(f"{some[max(0, at - 10) : at + 15]!r} -> {back[max(0, at - 10) : at + 15]!r}")
        return lost

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
        account.say_summary(manifest)
        size = self.counts["bytes"]
        say(f"{self.out}: {amount(size, 'B')} in {span(seconds)} ({size / 1e6 / seconds:.1f} MB/s)")
        return manifest

    def _facts(self, licenses: dict[int, set[str]], seconds: float) -> dict[str, Any]:
        """The manifest's account of what was done."""
        looked = self.evaluation
        names = [self.options.title] if self.options.title else self.options.sources
        each = account.by_source(names, self.index[self.keep], self.dropped, self.read_bytes)
        for i, facts in enumerate(each):
            facts["license"] = sorted(found if (found := licenses.get(i, set())) != {NOT_STATED} else [])
        return {
            "fingerprint": self.mark,
            "craton": __version__,
            "options": asdict(self.options),
            "counts": {**self.counts, "kept": int(self.keep.sum()), "kept_bytes": self.kept_bytes},
            "dropped": {why: asdict(d) for why, d in sorted(self.dropped.items())},
            "passed_over": account.passed_over(self.reading),
            "lost_by_tokenizer": {"texts": len(self.lost_by_tokenizer), "examples": self.lost_by_tokenizer[:3]},
            "evaluation": {"items": looked.items, "too_short": looked.too_short} if looked else None,
            "sources": each,
            "seconds": round(seconds, 2),
        }
