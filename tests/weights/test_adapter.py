"""Adapters against PEFT itself."""

import json

import pytest
import torch

import craton
from craton.base import UserError
from craton.weights.adapter import merge
from craton.weights.folder import load_network

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    out = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(out)
    return out


def adapter(base, out, seed=0, **more):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 24,
            "target_modules": ["q_proj", "down_proj"],
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
            **more,
        }
    )
    tuned = peft.get_peft_model(model, config).eval()
    tuned.save_pretrained(out)
    return tuned


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"model.layers.0.self_attn.q_proj": 7}},
        {"target_modules": "all-linear"},
    ],
)
def test_same_as_peft(base, tmp_path, more):
    tuned, network = adapter(base, tmp_path, **more), load_network(base)
    ids = torch.arange(40)[None] % 64
    before = network(ids)
    assert merge(network, tmp_path) > 3
    with torch.no_grad():
        expected = tuned(ids).logits
    assert (network(ids) - expected).abs().max() < 1e-4 < (before - expected).abs().max()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"r": 3}, "rank 4"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_refused(base, tmp_path, config, words):
    adapter(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(UserError, match=words):
        merge(load_network(base), tmp_path)


def test_one_that_changes_nothing_is_refused(base, tmp_path):
    adapter(base, tmp_path, init_lora_weights=True)  # B is zero until it is trained
    with pytest.raises(UserError, match="changes nothing"):
        merge(load_network(base), tmp_path)


def test_one_for_another_model_is_refused(base, tmp_path, model_folder):
    adapter(base, tmp_path)
    with pytest.raises(UserError, match="do not fit|no plain linear"):
        merge(craton.load(str(model_folder)).network, tmp_path)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
def test_one_that_changed_the_model_itself_is_refused(base, tmp_path, how):
    adapter(base, tmp_path / "a", init_lora_weights=how)
    with pytest.raises(UserError, match=f"init_lora_weights is '{how}'"):
        merge(load_network(base), tmp_path / "a")


def test_the_head_alone_where_it_is_tied(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tuned = adapter(tmp_path / "base", tmp_path / "a", target_modules=["lm_head"])
    network, ids = load_network(tmp_path / "base"), torch.tensor([[5, 60, 7, 8]])
    merge(network, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(network(ids), tuned(ids).logits, atol=1e-4, rtol=0)
