"""Batches: every token once an epoch, weights exact, any batch the same whenever and wherever it is made."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.base import UserError
from craton.corpus.batches import PATTERN, Batches, _Stream, heldout_rows
from craton.corpus.store import Corpus


def test_an_epoch_holds_every_document_but_the_tail(corpus):
    opened = Corpus(corpus)
    stream = _Stream(opened, "train", 64, 0)
    for epoch in (0, 1):
        seen = Counter()
        for n in range(stream.per_epoch):
            for document, offset, take in stream.pieces(epoch * stream.per_epoch + n):
                seen.update((document, offset + i) for i in range(take))
        total = opened.length("train")
        assert len(seen) >= total - 64 and len(seen) > 0.99 * total
        # Only the token that ends one row and begins the next is seen twice.
        assert max(seen.values()) <= 2 and sum(v - 1 for v in seen.values()) <= stream.per_epoch
    assert [d for d, *_ in stream.pieces(0)] != [d for d, *_ in stream.pieces(stream.per_epoch)]


def test_rows_are_the_documents(corpus):
    opened = Corpus(corpus)
    batches = Batches([opened], [1.0], 64, 4, 0, True)
    rows = opened.rows("train")
    by_digest = {f"{r['digest'][0]:016x}{r['digest'][1]:016x}": r for r in rows}
    batch = batches.batch(5)
    rebuilt = [[] for _ in range(4)]
    for item in batches.documents(5):
        start = int(by_digest[item["digest"]]["start"]) + item["first_token"]
        rebuilt[item["row"]] += opened.read("train", start, item["tokens"]).tolist()
    full = torch.cat([batch.ids, batch.target[:, -1:]], 1)
    assert full.tolist() == rebuilt
    assert torch.equal(batch.ids[:, 1:], batch.target[:, :-1]) and (batch.weight == 1).all()
    for ids, start in zip(batch.ids, batch.document_start, strict=True):
        begins = (ids == opened.manifest["document_id"]).nonzero().flatten().tolist()
        assert sorted(set(start.tolist()) - {0}) == [b for b in begins if b]


@settings(deadline=None, max_examples=20)
@given(number=st.integers(0, 10_000), world=st.sampled_from([1, 2, 4]))
def test_processes_share_a_batch(corpus, number, world):
    opened = Corpus(corpus, verify=False)
    whole = Batches([opened], [1.0], 32, 8, 3, True).batch(number)
    parts = [Batches([opened], [1.0], 32, 8, 3, True).batch(number, r, world) for r in range(world)]
    for name in ("ids", "target", "weight", "document_start"):
        joined = torch.stack([getattr(p, name) for p in parts], 1).flatten(0, 1)
        assert torch.equal(joined, getattr(whole, name))


def test_seeds_differ(corpus):
    opened = Corpus(corpus)
    a, b = (Batches([opened], [1.0], 64, 4, s, False).batch(0) for s in (0, 1))
    assert not torch.equal(a.ids, b.ids) and a.document_start is None


def test_weights_come_out_exactly(corpus, tmp_path):
    opened = Corpus(corpus)
    batches = Batches([opened, opened, opened], [1, 2, 5], 32, 8, 0, False)
    sources = np.array([batches._place(i)[0] is batches.streams[2] for i in range(2 * PATTERN)])
    assert sources[:PATTERN].sum() == sources[PATTERN:].sum() == PATTERN * 5 // 8
    for s in range(3):  # each source's rows in order, none left out
        numbers = [n for st_, n in map(batches._place, range(3 * PATTERN)) if st_ is batches.streams[s]]
        assert numbers == list(range(len(numbers)))


def test_held_out_rows(corpus):
    opened = Corpus(corpus)
    rows = heldout_rows([opened], 64, 1000, True)
    assert 1 <= len(rows) <= 15 and all(r.batch.ids.shape == (1, 64) for r in rows)
    assert all(len(r.source) == len(r.seen) == 64 and r.seen[0] >= 1 for r in rows)


def test_too_little_text(corpus):
    with pytest.raises(UserError, match="fewer than one row"):
        Batches([Corpus(corpus)], [1.0], 10**8, 1, 0, False)
