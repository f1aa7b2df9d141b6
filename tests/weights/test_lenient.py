"""What transformers, its converters and other programs write opens; what would change an answer is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from craton.base import UserError
from craton.engine.model import load_model
from craton.text.tokenizer import Tokenizer
from craton.weights.folder import load_network
from craton.weights.tensorfile import read_tensors, write_tensors
from tests.weights.families import make


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


INERT = [
    {"unk_token_id": 0, "sep_token_id": None, "decoder_start_token_id": 1},
    {"sliding_window": None, "use_sliding_window": False, "max_window_layers": None},
    {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_new_tokens": 20, "repetition_penalty": 1.1},
    {"max_sequence_length": 4096, "finetuned": True, "finetuning_task": "chat"},
    {"something_new": None, "another": False, "third": [], "fourth": {}},
]


@pytest.mark.parametrize("changes", INERT, ids=str)
def test_what_computes_nothing_is_passed_over(tmp_path, changes):
    make("llama2", tmp_path)
    before = load_network(tmp_path)
    after = load_network(edited(tmp_path, **changes))
    assert after.config == before.config


@pytest.mark.parametrize(
    "changes", [{"something_new": 3}, {"rope_scalling": None}, {"sliding_window": 8}, {"mlp_bais": False}], ids=str
)
def test_what_might_is_refused_by_name(tmp_path, changes):
    make("llama2", tmp_path)
    with pytest.raises(UserError, match=next(iter(changes))):
        load_network(edited(tmp_path, **changes))


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_beside_tied_embeddings(tmp_path, differs, capsys):
    make("llama2", tmp_path)
    edited(tmp_path, tie_word_embeddings=True)
    tensors = read_tensors(tmp_path / "model.safetensors")
    if not differs:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tmp_path / "model.safetensors", tensors)
    ids = torch.tensor([[5, 60, 71, 8]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        ours = load_network(tmp_path)
        torch.testing.assert_close(ours(ids), theirs, atol=1e-4, rtol=0)
    assert ours.config.tie_word_embeddings is not differs
    assert ("a head of other values" in capsys.readouterr().out) is differs


def test_an_added_token_without_a_row(model_folder, tmp_path):
    """It opens; the token is refused where it is used."""
    shutil.copytree(model_folder, tmp_path / "m")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs.add_tokens(["<picture>"])
    theirs.save_pretrained(tmp_path / "m")
    ours = load_model(str(tmp_path / "m"))
    assert ours.tokenizer.vocab_size == ours.network.config.vocab_size + 1
    assert ours.generate("import os", 3, 0.0) == load_model(str(model_folder)).generate("import os", 3, 0.0)
    with pytest.raises(UserError, match=str(ours.network.config.vocab_size)):
        ours.generate("import <picture>", 3, 0.0)


def test_long_texts_do_not_hold_the_interpreter(model_folder):
    """The same ids by either way."""
    tokenizer = Tokenizer.open(model_folder)
    text = "import os\n" * 3000
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
    rendered = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_rendered(text) == rendered
