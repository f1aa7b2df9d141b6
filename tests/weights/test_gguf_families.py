"""GGUF of every family, and every pre-tokenizer's name, beside llama.cpp."""

import ctypes
import json
import shutil

import numpy as np
import pytest
import torch

import craton
from craton.base import UserError
from craton.engine.model import load_model
from craton.model.packed import PackedLinear
from craton.weights.export import export_gguf
from craton.weights.folder import load_network


@pytest.fixture(scope="session")
def llama_cpp():
    return pytest.importorskip("llama_cpp", exc_type=ImportError)


EVERY = {
    "mixtral": {},
    "qwen3_moe": dict(mlp_only_layers=[]),
    "qwen3-yarn": {},
    "gemma2": dict(query_pre_attn_scalar=64, head_dim=64),
    "gemma3": dict(query_pre_attn_scalar=64, head_dim=64),
    "olmo2": {},
    "smollm3": {},
    "deepseek_v2": dict(num_hidden_layers=27, rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    "deepseek_v3": {},
    # llama.cpp rounds YaRN's bounds, which gpt-oss as published does not.
    "gpt_oss": dict(head_dim=64, rope_parameters=dict(rope_type="default", rope_theta=150000.0)),
}
IDS = [5, 6, 7, *range(20, 50), 17, 18, 19, 20, 21]


@pytest.fixture
def family_folder(request, model_folder, tmp_path):
    """A random model of any family, of sizes that llama.cpp quantises, with a trained tokenizer."""
    import transformers as t

    from tests.weights import families

    name = request.param
    model = families.FAMILIES[name]()
    config = model.config.to_dict() | dict(
        vocab_size=craton.load(str(model_folder)).network.config.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        eos_token_id=0,
        bos_token_id=0,
        layer_types=None,
        **EVERY[name],
    )
    if "moe_intermediate_size" in config:
        config["moe_intermediate_size"] = 256
    torch.manual_seed(0)
    made = type(model)(type(model.config)(**{k: v for k, v in config.items() if k not in ("model_type", "dtype")}))
    for key, p in made.float().state_dict().items():
        if p.ndim == 1 and p.is_floating_point():
            p.add_(torch.randn_like(p) * (0.02 if "correction" in key else 0.2))
    made.save_pretrained(tmp_path / "m")
    assert t.AutoConfig.from_pretrained(tmp_path / "m").model_type == model.config.model_type
    for f in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / f, tmp_path / "m")
    return tmp_path / "m"


def logits_there(llama_cpp, path):
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False, logits_all=True, type_k=0, type_v=0)
    model.eval(IDS)
    return torch.tensor(np.array(model.scores[: len(IDS)]))


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family_folder", EVERY, indirect=True)
def test_every_family(llama_cpp, family_folder, tmp_path):
    """What is written gives llama.cpp the same logits, and comes back as it was; what llama.cpp makes of it in 4 bits
    is read value for value, experts packed."""
    from craton.model.decoder import Experts

    export_gguf(family_folder, tmp_path / "m.gguf", "f32")
    with torch.inference_mode():
        own = load_network(family_folder).float()(torch.tensor([IDS]))[0]
        again = load_model(str(tmp_path / "m.gguf"))
        assert torch.equal(again.network(torch.tensor([IDS]))[0], own)
    assert distance(own, logits_there(llama_cpp, tmp_path / "m.gguf")) < 5e-4
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = 2
    names = (str(tmp_path / n).encode() for n in ("m.gguf", "q.gguf"))
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(parameters)) == 0
    packed = load_model(str(tmp_path / "q.gguf")).network
    with torch.inference_mode():
        logits = packed(torch.tensor([IDS]))[0]
    assert distance(logits, logits_there(llama_cpp, tmp_path / "q.gguf")) < 0.3 * distance(logits, own)
    experts = [m for m in packed.modules() if isinstance(m, Experts)]
    assert all(set(m.packed) == {"gate_up_proj", "down_proj"} for m in experts)
    assert any(isinstance(m, PackedLinear) for m in packed.modules())


@pytest.mark.parametrize("family_folder", ["gemma2"], indirect=True)
def test_what_gguf_cannot_say_is_not_written(family_folder, tmp_path):
    config = json.loads((family_folder / "config.json").read_text())
    (family_folder / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 24}))
    with pytest.raises(UserError, match="query_pre_attn_scalar"):
        export_gguf(family_folder, tmp_path / "m.gguf", "f32")


HARD_LINES = [
    "12345 6.7 x1y22 don'T WE'LL It's",
    "  a\tb\n\n c\r\n d   ",
    "price: $5, £3+2=5 ~ | ` ^ CamelCase HTTPServer",
    "日本語とEnglish混在 한국어 русский язык ελληνικά",
    "🙂🙃 naïve “quotes” ½ ﬁ",
    "def f(x):\n    return x[1:2]  # ok",
]


def test_pre_tokenizers(llama_cpp, tmp_path):
    """Each name that is known cuts text as llama.cpp does. tekken and gpt-4o are cut as published, which differs from
    llama.cpp's for scripts with combining marks."""
    import gguf
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    from craton.text import formats
    from craton.weights.gguf_file import open_gguf
    from craton.weights.gguf_tokenizer import _PATTERNS, read_tokenizer

    backend = Backend(models.BPE())
    formats.byte_level_text(backend, r"\s?\S+")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(HARD_LINES * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    for name in _PATTERNS:
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t == "<s>" else 1 for t in tokens])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
        writer.add_bos_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        ours = read_tokenizer(path, open_gguf(path)[0])
        for line in HARD_LINES:
            assert ours.encode(line) == theirs.tokenize(line.encode(), add_bos=False, special=False), (name, line)
