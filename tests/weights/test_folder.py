"""Model folders: what transformers writes loads here, what is written here loads there, damage is refused."""

import contextlib
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from craton.base import UserError
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder, initialise
from craton.weights.folder import load_network, read_config, released, write_config, write_tensors


@pytest.mark.parametrize("tied", [False, True])
def test_folders_of_transformers(tmp_path, tied):
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied, rope_theta=5e5, max_position_embeddings=99))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_network(tmp_path)
    assert ours.config.rope_theta == 5e5
    ids = torch.randint(300, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_through_transformers(tmp_path, tied):
    config = ModelConfig(300, 64, 96, 2, 4, 2, 16, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, rope_theta=12345.0)
    network = Decoder(config)
    initialise(network, 3)
    write_config(tmp_path, config)
    write_tensors(tmp_path / "model.safetensors", released(network))
    assert read_config(tmp_path) == config
    again = load_network(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(300, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(network(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def damaged(tmp_path):
    config = ModelConfig(300, 64, 96, 1, 4, 2, 16)
    network = Decoder(config)
    initialise(network, 3)
    write_config(tmp_path, config)
    write_tensors(tmp_path / "model.safetensors", released(network))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_key_value_heads": 3}, "multiple of"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"hidden_size": 128}, "shape"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"vocab_size": "many"}, "mistyped"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, message):
    folder = damaged(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_network(folder)


def test_damaged_weights_are_refused(tmp_path):
    folder = damaged(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="safetensors|missing"):
            load_network(folder)
    r = random.Random(0)
    for _ in range(50):  # a flipped bit in the header either reads as another tensor list or not at all
        at = r.randrange(8, 600)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << r.randrange(8))]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            load_network(folder)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_network(folder)
    with pytest.raises(UserError, match="no such model folder"):
        load_network(folder / "absent")
