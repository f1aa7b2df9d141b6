"""Folders in compressed-tensors' forms, packed and read back by that library, beside transformers on dense weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from craton.base import UserError
from craton.model.packed import PackedLinear
from craton.weights.folder import load_network
from tests.weights.families import make

IDS = torch.tensor([[5, 60, 71, 8, 9, 33, 2]])


def packed(w, bits, size):
    """What a folder holds of a matrix, and the values that the library reads from it."""
    lib = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    rows, cols = w.shape
    size = size if size and cols % size == 0 else 32 if size else cols
    grouped, most = w.view(rows, -1, size), 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(-1) / most).half().float()
    q = (grouped / scale[..., None]).round().clamp(-most - 1, most).to(torch.int8).view(rows, cols)
    words = lib.pack_to_int32(q, bits)
    back = lib.unpack_from_int32(words, bits, torch.Size(w.shape))
    dense = (back.float().view(rows, -1, size) * scale[..., None]).view(rows, cols)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(w.shape)}, dense


def eighth(w, rows):
    """The same in 8-bit floats, one scale for the matrix or for each row."""
    scale = (w.abs().amax(1, keepdim=True) if rows else w.abs().amax()[None]) / 448
    q = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, (q.float() * scale).bfloat16().float()


KINDS = {
    "4 bits in 32": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=32)),
    "4 bits in 64": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=64)),
    "8 bits by rows": ("pack-quantized", dict(num_bits=8, type="int", strategy="channel", group_size=None)),
    "fp8 by rows": ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
    "fp8": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
}


def write(folder, kind):
    """A folder of this kind in the place of a dense one; returns transformers' logits on the values in it."""
    form, weights = KINDS[kind]
    make("llama2", folder)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = tensors.pop(name).float()
        if form == "pack-quantized":
            parts, dense[name] = packed(w, weights["num_bits"], weights["group_size"])
        else:
            parts, dense[name] = eighth(w, weights["strategy"] == "channel")
        tensors |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in parts.items()}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.load_state_dict({**reference.state_dict(), **dense})
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        return reference(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_beside_transformers(kind, tmp_path):
    wanted, network = write(tmp_path / "m", kind), load_network(tmp_path / "m")
    assert any(isinstance(m, PackedLinear) for m in network.modules()) == (KINDS[kind][0] == "pack-quantized")
    with torch.no_grad():
        logits = network.float()(IDS)
    assert float((logits - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    "change",
    [{"symmetric": False}, {"group_size": 48}, {"num_bits": 3}, {"actorder": "group"}, {"strategy": "tensor_group"}],
)
def test_what_would_change_the_values_is_refused(change, tmp_path):
    write(tmp_path / "m", "4 bits in 32")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantization_config: of compressed-tensors only"):
        load_network(tmp_path / "m")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_forms_without_a_comparison_are_refused_by_name(method, tmp_path):
    make("llama2", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"quant_method '{method}' is not supported"):
        load_network(tmp_path / "m")


def test_a_quantised_folder_keeps_what_stands_beside_the_weights(model_folder, tmp_path):
    """Templates by name, settings of sampling, and that a base model is one."""
    import shutil

    from craton.engine.converse import open_talker
    from craton.weights.quantize import quantise_folder

    source = tmp_path / "m"
    shutil.copytree(model_folder, source)
    (source / "generation_config.json").write_text('{"temperature": 0.3}')
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    quantise_folder(source, tmp_path / "q", 8)
    before, after = (open_talker("m", str(folder)) for folder in (source, tmp_path / "q"))
    assert after.pretrained_only and before.pretrained_only
    assert after.defaults == before.defaults == {"temperature": 0.3}
    assert set(after.tokenizer.chat_templates) == {"default", "tool_use"}
