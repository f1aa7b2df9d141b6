"""GGUF against llama.cpp: what is written here runs there with the same greedy text, what it quantised loads here."""

import ctypes
import json
import shutil

import numpy as np
import pytest
import torch

import craton
from craton.base import UserError
from craton.engine.model import load_model
from craton.engine.request import Sampling
from craton.model.packed import PackedLinear
from craton.weights.export import export_gguf
from craton.weights.folder import load_network, write_network
from craton.weights.quantize import quantise_folder
from tests.weights.families import make

FAMILIES = ["llama2", "llama3.1", "llama3.2", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="session")
def llama_cpp():
    return pytest.importorskip("llama_cpp", exc_type=ImportError)


@pytest.fixture(params=FAMILIES)
def folder(request, model_folder, tmp_path):
    """A random model of a family, with a trained tokenizer; sizes that every quantisation of llama.cpp accepts."""
    from tests.weights import families

    sizes = dict(
        vocab_size=craton.load(str(model_folder)).network.config.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    before = families.BASE.copy()
    families.BASE.update(sizes)
    try:
        make(request.param, tmp_path / "m")
    finally:
        families.BASE.clear()
        families.BASE.update(before)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, tmp_path / "m")
    return tmp_path / "m"


def greedy_there(llama_cpp, path, prompts, count=32):
    """Token ids that llama.cpp continues with. One context a prompt: its cache changes results otherwise."""
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False, logits_all=True, type_k=0, type_v=0)
    out = []
    for prompt in prompts:
        model.reset()
        ids = list(prompt)
        model.eval(ids)
        made = []
        for _ in range(count):
            token = int(np.argmax(model.scores[model.n_tokens - 1]))
            made.append(token)
            model.eval([token])
        out.append(made)
    return out


def test_f16_files_run_in_llama_cpp(llama_cpp, folder, tmp_path):
    network = load_network(folder)
    write_network(tmp_path / "half", network.half(), folder)  # the same values in both programs
    export_gguf(tmp_path / "half", tmp_path / "m.gguf", "f16")
    prompts = [[5, 6, 7], list(range(20, 50)), [100]]
    ours = load_model(str(tmp_path / "half")).engine.generate(prompts, Sampling(32, 0.0, ignore_eos=True))
    agree(
        load_network(tmp_path / "half").float(),
        prompts,
        greedy_there(llama_cpp, tmp_path / "m.gguf", prompts),
        [a[0].token_ids for a in ours],
    )
    again = load_model(str(tmp_path / "m.gguf"))
    assert [a[0].token_ids for a in again.engine.generate(prompts, Sampling(32, 0.0, ignore_eos=True))] == [
        a[0].token_ids for a in ours
    ]
    text = "def f(x):\n    return x  # naïve 🙂"
    there = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    assert (
        there.tokenize(text.encode(), add_bos=True, special=False)
        == again.tokenizer.encode(text)
        == craton.load(str(tmp_path / "half")).tokenizer.encode(text)
    )


def agree(network, prompts, theirs, ours):
    """The same tokens; or, since llama.cpp rounds activations to fp16, at the first difference two that are as good as
    equally likely, after which the texts part. Most texts must be the same to the end."""
    same = 0
    for prompt, a, b in zip(prompts, theirs, ours, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        same += at is None
        if at is not None:
            with torch.no_grad():
                logits = network(torch.tensor([prompt + b[:at]]))[0, -1]
            assert abs(float(logits[a[at]] - logits[b[at]])) < 0.01 * float(logits.std()), (prompt, at)
    assert same * 2 > len(prompts)


def test_trained_model_in_llama_cpp(llama_cpp, model_folder, tmp_path):
    write_network(tmp_path / "half", load_network(model_folder).half(), model_folder)
    export_gguf(tmp_path / "half", tmp_path / "m.gguf", "f16")
    ours = load_model(str(tmp_path / "half"))
    prompts = [ours.tokenizer.encode(t) for t in ("def ", "import os\n", "class A:\n    def", "return self", "# The")]
    answers = ours.engine.generate(prompts, Sampling(32, 0.0, ignore_eos=True))
    theirs = greedy_there(llama_cpp, tmp_path / "m.gguf", prompts)
    agree(ours.network.float(), prompts, theirs, [a[0].token_ids for a in answers])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"])
def test_files_that_llama_cpp_quantised(llama_cpp, folder, kind, tmp_path):
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q6_K": 18}[kind]
    assert (
        llama_cpp.llama_model_quantize(
            str(tmp_path / "m.gguf").encode(), str(tmp_path / "q.gguf").encode(), ctypes.byref(parameters)
        )
        == 0
    )
    ours = load_model(str(tmp_path / "q.gguf"))
    packed = [m for m in ours.network.modules() if isinstance(m, PackedLinear)]
    assert packed or kind not in ("Q8_0", "Q4_0")
    ids = list(range(20, 60))
    answer = ours.engine.generate([ids], Sampling(1, 0.0, prompt_logprobs=0))[0][0]
    there = llama_cpp.Llama(str(tmp_path / "q.gguf"), n_ctx=256, n_threads=2, verbose=False, logits_all=True)
    there.eval(ids)
    theirs = torch.from_numpy(there.scores[: len(ids)].copy()).log_softmax(-1)
    want = [float(theirs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    got = [s.logprob for s in answer.prompt_logprobs[1:]]
    # Activations are rounded to 8 bits there, and partly here; a wrong order of rows would give differences of 3.
    assert np.abs(np.array(got) - want).mean() < 0.1 * np.std(want)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_folders(llama_cpp, folder, bits, tmp_path):
    """compressed-tensors' layout: read back here bit for bit, and by GGUF with the same values."""
    result = quantise_folder(folder, tmp_path / "q", bits)
    assert result["bytes_after"] < result["bytes_before"] * (0.62 if bits == 4 else 0.75) and result["weight_error"] < (
        0.09 if bits == 4 else 0.006
    )
    prompts = [[5, 6, 7], list(range(20, 50))]
    ours = load_model(str(tmp_path / "q")).engine.generate(prompts, Sampling(16, 0.0, ignore_eos=True))
    export_gguf(tmp_path / "q", tmp_path / "q.gguf", "f32")
    again = load_model(str(tmp_path / "q.gguf"))
    assert [a[0].token_ids for a in again.engine.generate(prompts, Sampling(16, 0.0, ignore_eos=True))] == [
        a[0].token_ids for a in ours
    ]
    there = greedy_there(llama_cpp, tmp_path / "q.gguf", prompts, 1)
    assert len(there) == 2
    with pytest.raises(UserError, match="packed already"):
        quantise_folder(tmp_path / "q", tmp_path / "q2", bits)
    with pytest.raises(UserError, match="not empty"):
        quantise_folder(folder, tmp_path / "q", bits)


def test_damaged_gguf(folder, tmp_path):
    path = tmp_path / "m.gguf"
    export_gguf(folder, path, "f16")
    whole = path.read_bytes()
    for cut in (0, 3, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="GGUF|truncated|damaged"):
            load_model(str(path))
    with pytest.raises(UserError, match="No such file"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match="ends in .gguf"):
        export_gguf(folder, tmp_path / "x.bin", "f16")
    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] == "mistral":
        (folder / "config.json").write_text(json.dumps(raw | {"sliding_window": 16}))
        with pytest.raises(UserError, match="sliding window"):
            export_gguf(folder, tmp_path / "w.gguf", "f16")
        assert not (tmp_path / "w.gguf").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "int-quantized"},
        {"config_groups": {}},
        {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 128}}}},
    ],
)
def test_other_compressed_layouts_are_refused(folder, change, tmp_path):
    quantise_folder(folder, tmp_path / "q", 4)
    path = tmp_path / "q" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"quantization_config": raw["quantization_config"] | change}))
    with pytest.raises(UserError, match="compressed-tensors"):
        load_network(tmp_path / "q")


def test_packed_folders_that_are_refused(folder, tmp_path):
    """Parts that do not fit, and parts that would be passed over."""
    from safetensors.torch import load_file, save_file

    quantise_folder(folder, tmp_path / "q", 4)
    path, first = tmp_path / "q" / "model.safetensors", "model.layers.0.self_attn.q_proj"
    tensors = load_file(path)
    changes = {
        "unknown tensor": {f"{first}.weight_g_idx": torch.zeros(256, dtype=torch.int32)},
        "is missing": {f"{first}.weight_scale": None},
        "rows and|shape": {
            f"{first}.weight_packed": tensors[f"{first}.weight_packed"][:-3],
            f"{first}.weight_scale": tensors[f"{first}.weight_scale"][:-3],
            f"{first}.weight_shape": tensors[f"{first}.weight_shape"] - torch.tensor([3, 0]),
        },
        "NaN": {f"{first}.weight_scale": tensors[f"{first}.weight_scale"] * float("nan")},
        "bias": {f"{first}.bias": torch.full((3,), float("nan"))},
    }
    for message, change in changes.items():
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, path, {"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_network(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="compressed-tensors"):
        load_network(tmp_path / "q")


def test_tied_models_with_an_odd_vocabulary(tmp_path):
    from tests.weights import families

    families.BASE["vocab_size"] = 100
    try:
        make("llama3.2", tmp_path / "m")
    finally:
        families.BASE["vocab_size"] = 128
    quantise_folder(tmp_path / "m", tmp_path / "q", 4)
    assert load_network(tmp_path / "q").config.tie_word_embeddings


def test_yarn_in_gguf(model_folder, tmp_path):
    import dataclasses

    from craton.weights import gguf, gguf_write

    model = craton.load(str(model_folder))
    network = model.network
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    }
    network.config = network.model.config = dataclasses.replace(network.config, rope_scaling=scaling)
    gguf_write.write(tmp_path / "y.gguf", network, model.tokenizer, "y", "f32")
    assert gguf.read(tmp_path / "y.gguf")[0].config.rope_scaling == scaling


IDS = [5, 6, 7, *range(20, 50), 17, 18, 19, 20, 21]


def test_split_files(folder, tmp_path):
    """Parts as the gguf package writes them, in their folder; one that is missing is named."""
    import gguf

    export_gguf(folder, tmp_path / "m.gguf", "f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    (tmp_path / "parts").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "parts" / "m.gguf", "llama", split_max_tensors=7)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                field.name, field.contents(), kind, sub_type=field.types[-1] if len(field.types) > 1 else None
            )
    writer.arch = reader.fields["general.architecture"].contents()
    writer.add_string("general.architecture", writer.arch)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(parts) > 2
    ids = torch.tensor([IDS])
    whole = load_model(str(tmp_path / "m.gguf")).network(ids)
    for path in (parts[0], tmp_path / "parts"):
        assert torch.equal(load_model(str(path)).network(ids), whole)
    with pytest.raises(UserError, match="give the first of the"):
        load_model(str(parts[1]))
    parts[1].unlink()
    with pytest.raises(UserError, match=f"{parts[1].name}: No such file"):
        load_model(str(parts[0]))


def test_what_other_commands_say_of_a_gguf_file(folder, tmp_path):
    from craton.report.inspect import inspect

    export_gguf(folder, tmp_path / "m.gguf", "f32")
    facts, whole = inspect(tmp_path / "m.gguf", 64, 1), inspect(folder, 64, 1)
    assert facts["parameters"] == whole["parameters"] and facts["cache_bytes"] == whole["cache_bytes"]
    assert abs(facts["stored_bytes"] / (4 * facts["parameters"]) - 1) < 0.01
    for source in (tmp_path / "m.gguf", tmp_path):
        with pytest.raises(UserError, match="this needs the folder it was made from"):
            quantise_folder(source, tmp_path / "out", 4)
