"""Model folders: what transformers writes loads here, what is written here loads there, damage is refused."""

import contextlib
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from craton.base import UserError
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initialise
from craton.weights.folder import load_network, published, read_config, write_config, write_tensors
from craton.weights.stored import from_mxfp4
from tests.weights.families import make


@pytest.mark.parametrize("tied", [False, True])
def test_folders_of_transformers(tmp_path, tied):
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=tied,
            rope_theta=5e5,
            max_position_embeddings=99,
        )
    )
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_network(tmp_path)
    assert ours.config.rope_theta == 5e5
    ids = torch.randint(300, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_through_transformers(tmp_path, tied):
    config = ModelConfig(
        300, 64, 96, 2, 4, 2, 16, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, rope_theta=12345.0
    )
    network = Decoder(config)
    initialise(network, 3)
    write_config(tmp_path, config)
    write_tensors(tmp_path / "model.safetensors", published(config, network.state_dict()))
    assert read_config(tmp_path) == config
    again = load_network(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(300, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(network(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def damaged(tmp_path):
    config = ModelConfig(300, 64, 96, 1, 4, 2, 16)
    network = Decoder(config)
    initialise(network, 3)
    write_config(tmp_path, config)
    write_tensors(tmp_path / "model.safetensors", published(config, network.state_dict()))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_sizes": 64}, "hidden_sizes is not known for qwen3.*hidden_size"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "multiple of"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"hidden_size": 128}, "shape"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor of rope_scaling"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 99,
                    "wavy": 1,
                }
            },
            "wavy",
        ),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 10**15}, "hidden_size"),
        ({"intermediate_size": 1.5}, "intermediate_size"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": None, "vocab_size": None}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "magic"}}, "magic"),
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
    for _ in range(50):  # one in the values is found by their hash
        at = r.randrange(2000, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << r.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(UserError, match="damaged"):
            load_network(folder)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="pickle"):
        load_network(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: weights in a pickle file"):
        load_network(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        load_network(folder)
    with pytest.raises(UserError, match="no such model folder"):
        load_network(folder / "absent")


def test_shards_that_are_refused(tmp_path):
    make("llama2", tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = next(iter(good["weight_map"]))
    for name, message in (("../model.safetensors", "not the name"), ("model-00099.safetensors", "no such file")):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {first: name}}))
        with pytest.raises(UserError, match=message):
            load_network(tmp_path)
    index.write_text(json.dumps(good))
    (tmp_path / good["weight_map"][first]).unlink()
    with pytest.raises(UserError, match="no such file"):
        load_network(tmp_path)


def test_nan_weights_are_refused(tmp_path):
    theirs = make("llama2", tmp_path)
    theirs.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("inf")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds NaN or infinity"):
        load_network(tmp_path)


PUBLISHED = {
    "deepseek-ai/DeepSeek-V3": (
        671_026_404_352,
        dict(
            model_type="deepseek_v3",
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            n_shared_experts=1,
            n_routed_experts=256,
            ep_size=1,
            routed_scaling_factor=2.5,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_rope_head_dim=64,
            v_head_dim=128,
            qk_nope_head_dim=128,
            topk_method="noaux_tc",
            n_group=8,
            topk_group=4,
            num_experts_per_tok=8,
            moe_layer_freq=1,
            first_k_dense_replace=3,
            norm_topk_prob=True,
            scoring_func="sigmoid",
            num_nextn_predict_layers=1,
            hidden_act="silu",
            max_position_embeddings=163840,
            rms_norm_eps=1e-6,
            attention_bias=False,
            rope_theta=10000,
            rope_scaling=dict(
                beta_fast=32,
                beta_slow=1,
                factor=40,
                mscale=1.0,
                mscale_all_dim=1.0,
                original_max_position_embeddings=4096,
                type="yarn",
            ),
            quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]),
        ),
    ),
    "meta-llama/Llama-3.1-405B": (
        405_853_388_800,
        dict(
            model_type="llama",
            vocab_size=128256,
            hidden_size=16384,
            intermediate_size=53248,
            num_hidden_layers=126,
            num_attention_heads=128,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            hidden_act="silu",
            rope_scaling=dict(
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
        ),
    ),
    "meta-llama/Llama-3.1-8B": (
        8_030_261_248,
        dict(
            model_type="llama",
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        46_702_792_704,
        dict(
            model_type="mixtral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        dict(
            model_type="mistral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            sliding_window=4096,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name, tmp_path):
    parameters, raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    with torch.device("meta"):
        network = Decoder(config)
    assert sum(p.numel() for p in network.parameters()) == config.parameters == parameters
    kinds = dict(model_type=raw["model_type"])
    theirs_config = AutoConfig.for_model(
        **kinds, **{k: v for k, v in raw.items() if k not in ("model_type", "quantization_config")}
    )
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(theirs_config)
    assert sum(p.numel() for p in theirs.parameters()) == parameters


def test_fp8_blocks(tmp_path):
    """DeepSeek V3's storage: e4m3 values and one scale for 128 by 128 of them."""
    theirs = make("deepseek_v3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, w in list(tensors.items()):
        if name.endswith("_proj.weight") and "layers" in name:
            blocks = (
                torch.nn.functional.pad(w, (0, -w.shape[1] % 128, 0, -w.shape[0] % 128))
                .unfold(0, 128, 128)
                .unfold(1, 128, 128)
            )
            scale = blocks.abs().amax((-1, -2)) / 448
            wide = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
            tensors[name], tensors[name + "_scale_inv"] = (w / wide).to(torch.float8_e4m3fn), scale
            theirs.get_parameter(name).data.copy_(
                (tensors[name].float() * wide).bfloat16()
            ) if "experts" not in name or "shared" in name else None
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
        )
    )
    ours = load_network(tmp_path, dtype=torch.float32)
    own = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if "experts.gate_up" in name or "experts.down" in name:
            torch.testing.assert_close(tensor, own[name], atol=0.1, rtol=0.07)  # rounded to three bits
        else:
            assert torch.equal(tensor, own[name]) or "layers" not in name


def test_mxfp4_blocks():
    """gpt-oss's storage, against transformers' own conversion."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(118, 134, (3, 10, 4), dtype=torch.uint8)
    assert torch.equal(from_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("old_names", [False, True])
def test_text_part_of_a_model_that_sees(old_names, tmp_path):
    import transformers as t

    torch.manual_seed(0)
    text = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=9,
        query_pre_attn_scalar=32,
        max_position_embeddings=256,
    )
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    theirs = t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=127,
            boi_token_index=126,
            eoi_token_index=125,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    if old_names:  # as Gemma 3 was published
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(
            {
                (
                    "language_model.model." + n.removeprefix("model.language_model.")
                    if n.startswith("model.language_model.")
                    else n.removeprefix("model.")
                ): v
                for n, v in tensors.items()
            },
            tmp_path / "model.safetensors",
        )
    ours = load_network(tmp_path)
    ids = torch.randint(3, 120, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, atol=1e-4, rtol=0)


def test_end_tokens_of_generation_config(tmp_path):
    folder = damaged(tmp_path)
    assert read_config(folder).eos_token_ids == ()
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_config(folder).eos_token_ids == (7, 9)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 999]}')
    with pytest.raises(UserError, match="generation_config.json: eos_token_id"):
        read_config(folder)


def test_equal_contents_are_equal_files(tmp_path):
    tensors = {f"t{i}": torch.arange(i + 3.0) for i in range(9)}
    for i in range(12):
        write_tensors(tmp_path / str(i), tensors)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(12)}) == 1
