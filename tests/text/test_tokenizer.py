"""The tokenizer: the fast path gives the library's ids, text survives, folders open in transformers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from craton.base import UserError
from craton.text.tokenizer import END, Tokenizer, choose_vocab_size, train_tokenizer
from tests.conftest import STDLIB
from tests.text.chatml import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [(STDLIB / f).read_text() for f in ("argparse.py", "typing.py", "ast.py")]
    return train_tokenizer(texts + ["naïve café “quoted” 日本語 🙂"], 1500)


@pytest.fixture(scope="module")
def library(tokenizer) -> Backend:
    """The same tokenizer, to which the name of a special token is ordinary text."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True
    return backend


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=200))
def test_fast_ids_equal_the_library_and_text_survives(tokenizer, library, text):
    ids = next(tokenizer.encode_documents([text]))
    assert tokenizer._fast is not None
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_special_tokens_in_documents_are_text(tokenizer):
    ids = next(tokenizer.encode_documents([f"a {END} b <|im_start|>"]))
    assert tokenizer.document_id not in ids
    assert tokenizer.backend.token_to_id("<|im_start|>") not in ids
    assert tokenizer.decode(ids) == f"a {END} b <|im_start|>"


def test_numbers_are_split_in_threes_at_most(tokenizer):
    pieces = [tokenizer.decode([i]) for i in next(tokenizer.encode_documents(["1234567890"]))]
    assert all(len(p) <= 3 for p in pieces)


def test_folder_opens_in_transformers(tokenizer, tmp_path):
    assert tokenizer.chat_template is None
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.config | {"chat_template": CHAT_TEMPLATE})
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return x ** 2  # 12345 naïve\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text) and tokenizer.encode(text)[0] == tokenizer.document_id
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == tokenizer.render_chat(
        messages
    )


def test_a_tokenizer_of_another_kind_uses_the_library(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        ["some words are here " * 50],
        trainers.UnigramTrainer(
            vocab_size=40, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    other = Tokenizer(backend, {"eos_token": "</s>"})
    assert other._fast is None
    assert next(other.encode_documents(["some words"])) == backend.encode("some words").ids
    assert other.document_id == backend.token_to_id("</s>")


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer file"):
        Tokenizer.open(tmp_path)


def test_vocabulary_grows_with_the_corpus():
    sizes = [choose_vocab_size(b) for b in (10**5, 10**7, 10**8, 10**10, 10**13)]
    assert sizes == sorted(sizes) and sizes[1] == 4096 and sizes[2] == 8192 and sizes[-1] == 65_536


def test_bytes_of_added_tokens(tokenizer):
    """0 for special ones alone: added tokens that are text counted as nothing once, and bits a byte came out wrong."""
    backend = Tokenizer(tokenizer.backend.from_str(tokenizer.backend.to_str()), dict(tokenizer.config)).backend
    backend.add_tokens(["<tool>", "   "])
    backend.add_special_tokens(["<|secret|>"])
    grown = Tokenizer(backend, dict(tokenizer.config))
    sizes, text = grown.token_bytes(), "a <tool>   b"
    ids = grown.encode_rendered(text)
    assert backend.token_to_id("<tool>") in ids and sizes[ids].sum() == len(text)
    assert sizes[backend.token_to_id("<|secret|>")] == 0


def test_encoding_documents_leaves_the_tokenizer_as_it_was(tokenizer):
    """A flag stayed set once, and names of special tokens were text from then on, for whoever shared it."""
    slow = Tokenizer(tokenizer.backend, dict(tokenizer.config))
    slow.__dict__["_fast"] = None
    name = tokenizer.backend.id_to_token(tokenizer.document_id)
    before = slow.encode_rendered(name)
    some = slow.encode_documents([f"a {name} b", "c"])
    assert tokenizer.document_id not in next(some)
    assert slow.encode_rendered(name) == before == [tokenizer.document_id]  # in between, too
