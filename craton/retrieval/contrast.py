"""An encoder of one's own: `craton tune ENCODER --method contrastive`, on questions and the passages that answer them.

The loss is that of arXiv 1807.03748 (InfoNCE): a question's passage against the other questions' and against passages
that search by words takes for answers (arXiv 2004.04906). A batch is one group of rows, since each is the others'
negative.
"""

import copy
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.adapt.opened import Given
from craton.base import Progress, UserError, amount, claim, count, digest, read_json, say, sha256, write_json
from craton.corpus import records, sources
from craton.corpus.decode import Decoder
from craton.model import kernels
from craton.model.encoder import Encoder, layout, pooled
from craton.retrieval.documents import read_queries
from craton.retrieval.encode import TextEncoder
from craton.retrieval.index import best
from craton.retrieval.lexical import Words, language_of
from craton.retrieval.search import read_qrels
from craton.train import machine
from craton.train.distributed import Processes, open_processes
from craton.train.job import Cost, Job, Looked, Losses, on
from craton.train.loop import Run
from craton.train.recipe import Recipe, as_dict
from craton.weights.encoder import write_encoder

TEMPERATURE = 0.05
_ROWS = 24  # questions of a batch
_MINED = (2, 40)  # ranks of the passages, that search by words finds, among which negatives are drawn
_TOKENS = 160  # of a passage while training
_HELD = 64  # questions that are not learned from, at most, and at most a tenth
_LR = 3e-5
_QUESTIONS, _PASSAGES = ("question", "query", "anchor"), ("passage", "positive", "answer", "text", "document")


@dataclass
class Pairs:
    """relevant: for each question the numbers of its passages."""

    questions: list[str]
    passages: list[str]
    relevant: list[list[int]]


@dataclass
class PairBatch:
    """questions (rows, time); passages (rows, 1 + negatives, time), a row's own first; known (rows, all passages):
    those that answer a row's question too, and are no negatives."""

    questions: Tensor
    question_lengths: Tensor
    passages: Tensor
    passage_lengths: Tensor
    known: Tensor


def read_pairs(paths: Sequence[str]) -> Pairs:
    """JSON lines with a question and its passage, or folders in BEIR's layout (corpus.jsonl, queries.jsonl and
    qrels/train.tsv). UserError naming file, line and field."""
    out, places = Pairs([], [], []), dict[str, int]()

    def place(text: str) -> int:
        if text not in places:
            places[text] = len(out.passages)
            out.passages.append(text)
        return places[text]

    asked: dict[str, int] = {}
    for path in map(Path, paths):
        for question, text in _beir(path, place) if path.is_dir() else _rows(path):
            if text not in places:
                place(text)
            if question not in asked:
                asked[question] = len(out.questions)
                out.questions.append(question)
                out.relevant.append([])
            own = out.relevant[asked[question]]
            if places[text] not in own:
                own.append(places[text])
    if len(out.passages) < 2 * _ROWS:
        raise UserError(f"{', '.join(paths)}: {len(out.passages)} passages; at least {2 * _ROWS} are needed")
    if len(out.questions) < 2 * _ROWS:
        raise UserError(
            f"{', '.join(paths)}: {len(out.questions)} questions with a passage; at least {2 * _ROWS} are needed"
        )
    return out


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    with sources.open_binary(path) as f:
        for number, line in enumerate(records.lines(Decoder(str(path), kind="jsonl").pieces(f)), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON ({error})") from None


def _rows(path: Path) -> Iterable[tuple[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    for number, row in _lines(path):
        row = row if isinstance(row, dict) else {}
        pair = [next((row[k] for k in keys if isinstance(row.get(k), str)), None) for keys in (_QUESTIONS, _PASSAGES)]
        if pair[0] is None or pair[1] is None:
            wanted = f"{' or '.join(_QUESTIONS)}, and {' or '.join(_PASSAGES)}"
            raise UserError(f"{path}:{number}: needs {wanted}; it has {', '.join(map(str, row))}")
        yield pair[0], pair[1]


def _beir(folder: Path, place: Any) -> Iterable[tuple[str, str]]:
    """All passages of a corpus are placed: those that answer nothing are negatives."""
    found = {n: next(iter(sorted(folder.glob(f"{n}.jsonl*"))), None) for n in ("corpus", "queries")}
    qrels = next((p for n in ("train", "dev", "test") if (p := folder / "qrels" / f"{n}.tsv").is_file()), None)
    if None in found.values() or qrels is None:
        raise UserError(f"{folder}: not in BEIR's layout: corpus.jsonl, queries.jsonl and qrels/train.tsv")
    texts = {}
    for _, row in _lines(found["corpus"]):  # type: ignore[arg-type]
        if not isinstance(row, dict) or "_id" not in row:
            raise UserError(f"{found['corpus']}: a row without _id")
        texts[str(row["_id"])] = f"{row.get('title') or ''} {row.get('text') or ''}".strip()
        place(texts[str(row["_id"])])
    relevant = read_qrels(qrels)
    for number, question in read_queries(found["queries"]):  # type: ignore[arg-type]
        for name, score in relevant.get(number, {}).items():
            if score > 0 and texts.get(name):
                yield question, texts[name]


def mined(pairs: Pairs) -> list[list[int]]:
    """For each question, passages that share its words and do not answer it, as far as is known."""
    import bm25s

    words, progress = Words(language_of(pairs.passages[:64])), Progress()
    made = bm25s.BM25(method="lucene")
    made.index((list(words.ids(pairs.passages)), words.tokenizer.get_vocab_dict()), show_progress=False)
    out, numbers = [], dict(words.tokenizer.get_vocab_dict())  # which grows with the questions' words
    for done, (question, own) in enumerate(zip(pairs.questions, pairs.relevant, strict=True), 1):
        known = [numbers[w] for w in words.of(question) if w in numbers]
        scores = made.get_scores_from_ids(known) if known else np.zeros(len(pairs.passages), np.float32)
        found = best(scores, _MINED[1] + len(own))[_MINED[0] :]
        out.append(
            [int(p) for p in found if int(p) not in own] or [p for p in range(len(pairs.passages)) if p not in own][:50]
        )
        progress.show(f"mining: {amount(done, '')} of {amount(len(pairs.questions), '')} questions")
    progress.clear()
    return out


class PairSource:
    """Batches of questions with their passages and one mined negative each."""

    rows = together = _ROWS

    def __init__(self, pairs: Pairs, negatives: list[list[int]], learned: list[int], encoder: TextEncoder, seed: int):
        self.pairs, self.negatives, self.learned, self.seed, self.encoder = pairs, negatives, learned, seed, encoder
        self.encoder.tokenizer.enable_truncation(min(_TOKENS, encoder.settings.max_length))

    def batch(self, number: int, share: int, shares: int, network: nn.Module) -> PairBatch:
        """As of Source; no two rows share a passage."""
        draw, taken, rows = random.Random(f"{self.seed} {number}"), set[int](), list[tuple[int, int, int]]()
        for question in draw.sample(self.learned, min(len(self.learned), 4 * _ROWS)):
            positive, negative = draw.choice(self.pairs.relevant[question]), draw.choice(self.negatives[question])
            if positive not in taken and negative not in taken and len(rows) < _ROWS:
                taken |= {positive, negative}
                rows.append((question, positive, negative))
        return self.of(rows)

    def of(self, rows: list[tuple[int, int, int]]) -> PairBatch:
        """A batch of these: question, passage, negative."""
        settings = self.encoder.settings
        questions = [settings.query_prefix + self.pairs.questions[q] for q, _, _ in rows]
        order = [p for _, a, b in rows for p in (a, b)]
        passages = [settings.passage_prefix + self.pairs.passages[p] for p in order]
        (a, a_lengths), (b, b_lengths) = self._tokens(questions), self._tokens(passages)
        known = torch.zeros(len(rows), len(order), dtype=torch.bool)
        for i, (question, own, _) in enumerate(rows):
            for j, passage in enumerate(order):
                known[i, j] = passage in self.pairs.relevant[question] and passage != own
        return PairBatch(a, a_lengths, b.view(len(rows), 2, -1), b_lengths.view(len(rows), 2), known)

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self.encoder.tokenizer.encode_batch_fast(texts)
        lengths = torch.tensor([len(e.ids) for e in encoded])
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        for i, e in enumerate(encoded):
            ids[i, : len(e.ids)] = torch.tensor(e.ids)
        return ids, lengths

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "questions": len(self.pairs.questions),
            "passages": len(self.pairs.passages),
            "learned": len(self.learned),
        }


def scores_of(network: Any, batch: PairBatch, how: str) -> Tensor:
    """(rows, all passages): cosines of questions and passages."""
    q = pooled(network(batch.questions, batch.question_lengths), batch.question_lengths, how, True)
    ids, lengths = batch.passages.flatten(0, 1), batch.passage_lengths.flatten()
    return q @ pooled(network(ids, lengths), lengths, how, True).t()


class EncoderFolder:
    """An encoder that is trained further, and its folder."""

    weights_file = "model.safetensors"

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self.first = {n: p.detach().clone() for n, p in encoder.network.named_parameters()}

    def build(self) -> Encoder:
        """The network with its weights, all of them trained."""
        return copy.deepcopy(self.encoder.network).float().requires_grad_(True)

    def rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """As they are in the folder."""
        return self.first[name][first : first + count]

    def units(self, network: Any) -> list[list[nn.Module]]:
        """Each block."""
        return [[block] for block in network.blocks]

    def forwards(self, network: Any) -> Iterable[tuple[nn.Module, str]]:
        """None but forward."""
        return ()

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Under the names of the folder."""
        return dict(part for name, t in tensors.items() for part in layout(name, t))

    def write_rest(self, out: Path) -> None:
        """Tokenizer and settings; the weights come later in the place of these."""
        write_encoder(self.encoder.network, self.encoder.folder, out)


def _kind(name: str, p: nn.Parameter) -> str:
    if name.startswith(("words", "positions", "types")):
        return "embedding"
    return "matrix" if p.ndim == 2 else "norm"


def tune(given: Given) -> dict[str, Any]:
    """Returns the record's summary. UserError, Interrupted."""
    kernels.keep_freed_memory()
    encoder = TextEncoder(Path(given.model), exact=True)
    if not encoder.settings.normalise:
        raise UserError(f"{given.model}: its vectors are not of length 1, which the loss takes them to be")
    pairs = read_pairs(given.data)
    with (
        open_processes(machine.device()) as processes,
        claim(given.out, "training", resume=given.resume, hint="add --resume"),
    ):
        if processes.world > 1:
            raise UserError("--method contrastive runs in one process: a batch is one group", field="method")
        return _tuned(given, encoder, pairs, processes)


def _tuned(given: Given, encoder: TextEncoder, pairs: Pairs, processes: Processes) -> dict[str, Any]:
    recipe, how = given.recipe, encoder.settings.pooling
    asked = {"recipe": as_dict(recipe), "encoder": encoder.hash, "data": [_hash(Path(p)) for p in given.data]}
    held = random.Random(0).sample(range(len(pairs.questions)), min(_HELD, len(pairs.questions) // 10))
    learned = [i for i in range(len(pairs.questions)) if i not in set(held)]
    negatives = mined(pairs)
    source = PairSource(pairs, negatives, learned, encoder, recipe.run.seed)
    looked_at = source.of([(i, pairs.relevant[i][0], negatives[i][0]) for i in held])

    def objective(network: Any, batch: PairBatch) -> Losses:
        scores = scores_of(network, batch, how).masked_fill(batch.known, -torch.inf) / TEMPERATURE
        target = 2 * torch.arange(len(scores), device=scores.device)
        total = F.cross_entropy(scores, target, reduction="sum")
        right = (scores.detach().argmax(1) == target).sum()
        rows = torch.tensor(float(len(scores)), device=scores.device)
        return Losses(total, rows, {"right": (right, rows)})

    def look(network: Any, _: Processes) -> Looked:
        batch = on(looked_at, next(network.parameters()).device.type)
        with torch.no_grad():
            scores = scores_of(network, batch, how).masked_fill(batch.known, -torch.inf)
        own = scores[torch.arange(len(scores)), 2 * torch.arange(len(scores))]
        rank = (scores > own[:, None]).sum(1) + 1
        mrr = float((1 / rank.float()).mean())
        return Looked({"held_out_mrr": mrr}, f"held-out MRR {mrr:.4f}")

    _settle(recipe, len(learned))
    parameters = sum(p.numel() for p in encoder.network.parameters())
    tokens = source.rows * (32 + 2 * _TOKENS)
    cost = Cost("questions", 1, 6.0 * parameters * tokens / source.rows, 6.0 * parameters * tokens / source.rows)
    job = Job("contrastive", source, objective, EncoderFolder(encoder), cost, _kind, look)
    before = look(encoder.network, processes)
    again = (given.out / "training" / "recipe.json").is_file()
    if again and read_json(given.out / "training" / "recipe.json")["digest"] != digest(asked):
        raise UserError(f"{given.out}: the run was started with another encoder, data or settings", field="resume")
    write_json(given.out / "training" / "recipe.json", {"digest": digest(asked), "recipe": as_dict(recipe)})
    say(f"plan     {len(learned)} questions, {len(pairs.passages)} passages, {recipe.run.steps} steps of {source.rows}")
    say(f"before   {before.line}")
    job.store.write_rest(given.out)
    peak = machine.gemm_peak(processes.device, torch.float32)
    run = Run(given.out, job, recipe, processes, peak)
    if any((given.out / "training").glob("step-*")):
        run.restore()
    run.train()
    return _finish(given, encoder, run, before, look(run.network, processes), source.facts())


def _finish(
    given: Given, encoder: TextEncoder, run: Run, before: Looked, after: Looked, facts: dict[str, Any]
) -> dict[str, Any]:
    say(f"after    {after.line}")
    read = TextEncoder(given.out, exact=True).network.state_dict()
    same = all(torch.equal(read[n], t.cpu()) for n, t in run.network.state_dict().items())
    if not same:
        raise UserError(f"{given.out}: the folder holds other weights than those that were trained")
    summary: dict[str, Any] = {
        "out": str(given.out),
        "status": "finished",
        "method": "contrastive",
        "steps": run.state.step,
    }
    summary |= {"before": before.figures, "after": after.figures, "seconds": round(run.state.seconds, 1), **facts}
    record = {"format": "craton-record-1", "objective": "contrastive", "summary": summary, "command": given.command}
    write_json(given.out / "record.json", record | {"base": str(encoder.folder), "environment": machine.facts("cpu")})
    done = f"{count(facts['learned'])} questions in {run.state.step} steps"
    say(f"{given.out}: {done}; an encoder for craton index --encoder")
    return summary


def _hash(path: Path) -> str:
    if path.is_dir():
        return digest([sha256(p) for p in sorted(path.rglob("*")) if p.is_file()])
    return sha256(path)


def _settle(recipe: Recipe, questions: int) -> None:
    """What was not asked for: about twenty passes, all weights at one rate by AdamW."""
    run, rate = recipe.run, recipe.tune.lr or _LR
    recipe.tune.lr, recipe.optimizer.name = rate, "adamw"
    if "optimizer.weight_decay" not in recipe.given:
        recipe.optimizer.weight_decay = 0.01
    for name in ("matrix_lr", "embedding_lr", "head_lr", "norm_lr"):
        if getattr(recipe.optimizer, name) is None:
            setattr(recipe.optimizer, name, rate)
    run.precision = run.precision or "fp32"
    run.steps = run.steps or int(np.clip(20 * questions // _ROWS, 40, 2000))
    recipe.schedule.warmup_steps = recipe.schedule.warmup_steps or max(1, run.steps // 10)
    recipe.schedule.decay_share = 0.9
    run.checkpoint_every = run.checkpoint_every or max(10, run.steps // 4)
    run.evaluate_every = run.evaluate_every or max(10, run.steps // 8)
    recipe.data.sequence_length, recipe.data.batch_tokens = 1, _ROWS
    recipe.data.micro_tokens = _ROWS
