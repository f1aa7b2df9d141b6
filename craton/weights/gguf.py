"""GGUF, llama.cpp's file format: reading and writing, by the `gguf` package.

Q8_0 and Q4_0 have the values of our own packed weights and stay as they are, value for value; the other compressed
types are written out in fp32. Llama's q and k rows lie in another order there (pairs instead of halves rotate).
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from craton.base import Progress, UserError, count, publish, say
from craton.model import rope
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder, Linear
from craton.model.packed import GROUP, PackedLinear, can_pack, replace
from craton.text import formats
from craton.text.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # our family -> GGUF's
_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_PACKED = {Type.Q8_0: 8, Type.Q4_0: 4}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {  # GGUF's names of pre-tokenizers
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    "gpt-2": formats._GPT2,
    "tekken": _TEKKEN,
}


def _name(architecture: str, layers: int, ours: str) -> str:
    """GGUF's name of one of the network's tensors."""
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    base, _, kind = ours.rpartition(".")
    found = gguf.get_tensor_name_map(arch, layers).get_name(base)
    if found is None:
        raise UserError(f"GGUF has no name for {ours} in {architecture}")
    return f"{found}.{kind}"


def _paired(t: Any, heads: int, back: bool) -> Any:
    """Rows of q or k from halves to pairs, or back. t: array or tensor with the rows first."""
    shape, half = t.shape, t.shape[0] // heads // 2
    t = t.reshape(heads, half, 2, *shape[1:]) if back else t.reshape(heads, 2, half, *shape[1:])
    return t.swapaxes(1, 2).reshape(shape)


def _heads(architecture: str, name: str, config: ModelConfig) -> int:
    """Heads whose rows lie in pairs there; 0 for none."""
    if architecture != "llama":
        return 0
    return config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads if ".k_proj." in name else 0


# ---- reading ----------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[Decoder, Tokenizer]:
    """Network and tokenizer of a GGUF file. UserError if it is damaged, or of a kind that is not read here."""
    try:
        with open(path, "rb") as f:
            if f.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file")
        reader = GGUFReader(path)
        fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # the library asserts and indexes
        raise UserError(
            f"{path}: damaged GGUF file ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None
    tensors = {t.name: t for t in reader.tensors}
    size = path.stat().st_size
    for t in reader.tensors:
        if t.data_offset + t.n_bytes > size:
            raise UserError(f"{path}: truncated: tensor {t.name} ends after the file does")
    architecture: Any = fields.get("general.architecture")
    if architecture not in ARCHITECTURES.values():
        raise UserError(
            f"{path}: architecture {architecture!r} is not read from GGUF; read: "
            f"{', '.join(sorted(set(ARCHITECTURES.values())))}"
        )
    try:
        config, spoken = _config(path, architecture, fields, tensors), _tokenizer(path, fields)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a setting is missing or mistyped ({error})") from None
    with torch.device("meta"):
        network = Decoder(config)
    progress, seen, wide, made = Progress(), 0, set[str](), dict[str, Tensor]()
    parameters = dict(network.state_dict(keep_vars=True))
    names = [n for n in parameters if not (n == "lm_head.weight" and config.tie_word_embeddings)]
    for name, parameter in parameters.items():
        stored = _name(architecture, config.num_hidden_layers, name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            t = tensors["token_embd.weight"]
            if t.tensor_type in _PACKED and can_pack(*parameter.shape):  # the head stays packed, the embedding does not
                replace(network, "lm_head", PackedLinear(*_values(t.data, t.tensor_type), _PACKED[t.tensor_type]))
            continue
        if stored not in tensors:
            raise UserError(f"{path}: tensor {stored} is missing")
        t = tensors[stored]
        shape = tuple(int(n) for n in reversed(t.shape))
        if shape != tuple(parameter.shape):
            raise UserError(
                f"{path}: tensor {stored} has shape {shape}, the file's own settings say {tuple(parameter.shape)}"
            )
        data, kind, heads = t.data, t.tensor_type, _heads(architecture, name, config)
        data = _paired(data, heads, True) if heads else data
        module = name.rpartition(".")[0]
        if kind in _PACKED and isinstance(network.get_submodule(module), Linear) and can_pack(*shape):
            bias = name.replace(".weight", ".bias")
            held = (
                tensors.get(_name(architecture, config.num_hidden_layers, bias))
                if bias in dict(network.named_parameters())
                else None
            )
            b = (
                None
                if held is None
                else torch.from_numpy(np.array(_paired(held.data, heads, True) if heads else held.data)).float()
            )
            made.pop(bias, None)
            replace(network, module, PackedLinear(*_values(data, kind), _PACKED[kind], b))
        elif name.endswith(".bias") and isinstance(network.get_submodule(module), PackedLinear):
            continue
        else:
            if kind not in _PLAIN:
                wide.add(kind.name)
            made[name] = _plain(data, kind, shape, path)
        seen += t.n_bytes
        progress.show(f"reading {path}: {count(seen)}B")
    progress.clear()
    used = {_name(architecture, config.num_hidden_layers, name) for name in names} | {"rope_freqs.weight"}
    if surplus := set(tensors) - used:
        raise UserError(f"{path}: tensor {min(surplus)} is not known for {architecture}; it could change every answer")
    if wide:
        say(f"{path}: tensors of type {', '.join(sorted(wide))} are written out in fp32")
    missing, _ = network.load_state_dict(made, assign=True, strict=False)
    if config.tie_word_embeddings and isinstance(network.lm_head, Linear):
        network.tie()
    assert not [m for m in missing if m != "lm_head.weight"], missing
    return network.eval(), Tokenizer(*spoken)


def _values(data: np.ndarray, kind: Type) -> tuple[Tensor, Tensor]:
    """Rows of blocks (rows, bytes) -> values and scales as PackedLinear takes them."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = torch.from_numpy(np.array(data)).view(data.shape[0], -1, size)
    scales, body = blocks[..., :2].contiguous().view(torch.float16)[..., 0], blocks[..., 2:]
    if kind == Type.Q8_0:
        return (body.contiguous().view(torch.int8).to(torch.int16) + 128).to(torch.uint8).flatten(1), scales
    low, high = body & 15, body >> 4  # columns 0-15 and 16-31
    columns = torch.cat([low, high], -1)
    return (columns[..., 0::2] | (columns[..., 1::2] << 4)).flatten(1), scales


def _plain(data: np.ndarray, kind: Type, shape: tuple[int, ...], path: Path) -> Tensor:
    if kind in _PLAIN:
        return torch.from_numpy(np.array(data)).view(_PLAIN[kind]).view(shape)
    try:
        return torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32, copy=False)).view(shape)
    except NotImplementedError:
        raise UserError(f"{path}: tensors of type {kind.name} cannot be read") from None


def _config(path: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, Any]) -> ModelConfig:
    def get(key: str, default: Any = ...) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        if value is ...:
            raise UserError(f"{path}: {architecture}.{key} is missing")
        return value

    if get("expert_count", 0):
        raise UserError(f"{path}: models with experts are not read from GGUF; use the safetensors folder")
    if get("attention.sliding_window", 0) and architecture == "llama":
        raise UserError(f"{path}: sliding windows are not read from GGUF; use the safetensors folder")
    heads, theta = get("attention.head_count"), get("rope.freq_base", 10_000.0)
    if isinstance(heads, list) or isinstance(get("attention.head_count_kv", 1), list):
        raise UserError(f"{path}: head counts that differ between layers are not supported")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: rotary positions on a part of a head are not supported")
    if (kind := get("rope.scaling.type", "none")) not in ("none", "linear", "yarn"):
        raise UserError(
            f"{path}: {architecture}.rope.scaling.type {kind!r} is not supported; supported: 'none', 'linear', 'yarn'"
        )
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    elif kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        }
        scaling |= {
            beta: get(f"rope.scaling.yarn_{beta}")
            for beta in ("beta_fast", "beta_slow")
            if get(f"rope.scaling.yarn_{beta}", None)
        }
    elif "rope_freqs.weight" in tensors:
        given = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data)).float()
        base = rope.frequencies(head_dim, theta)[0]
        for original in (8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16384):
            scaling = {
                "rope_type": "llama3",
                "factor": float(given.max()),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            if torch.allclose(base / rope.frequencies(head_dim, theta, scaling)[0], given, rtol=1e-3):
                break
        else:
            raise UserError(f"{path}: rope_freqs.weight is not the scaling of Llama 3.1; use the safetensors folder")
    try:
        return ModelConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=get("context_length"),
            rope_theta=theta,
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            qk_norm="head" if architecture == "qwen3" else "",
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
            model_type=architecture,
            rope_scaling=scaling,
            attention_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
            attention_out_bias="blk.0.attn_output.bias" in tensors,
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}") from None


def _tokenizer(path: Path, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens or [])
    if not tokens:
        raise UserError(f"{path}: it holds no tokenizer")
    vocab = {t: i for i, t in enumerate(tokens)}
    if kind == "gpt2":
        pre = str(fields.get("tokenizer.ggml.pre"))
        pattern = fields.get("craton.tokenizer.pattern") or _PATTERNS.get(pre)
        if pattern is None:
            raise UserError(f"{path}: pre-tokenizer {pre!r} is not known; known: {', '.join(_PATTERNS)}")
        merges = [tuple(m.split(" ", 1)) for m in fields.get("tokenizer.ggml.merges") or []]
        backend = Backend(models.BPE(vocab, merges, ignore_merges=pre in ("llama-bpe", "tekken")))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
    elif kind == "llama":
        scores = fields["tokenizer.ggml.scores"]
        known = {t: s for t, s, k in zip(tokens, scores, types, strict=True) if k == 1}
        unk = next((t for t, k in zip(tokens, types, strict=True) if k == 2), None)
        backend = Backend(formats.sentencepiece_bpe(vocab, known, unk, True))
        prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
        backend.normalizer = normalizers.Sequence(
            [*([normalizers.Prepend(" ")] if prefix else []), normalizers.Replace(" ", "\u2581")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if prefix else []),
            ]
        )
    else:
        raise UserError(f"{path}: tokenizer model {kind!r} is not supported; supported: 'gpt2', 'llama'")
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types, strict=True) if k in (2, 3)]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == 4])
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name in ("bos", "eos"):
        if (i := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None and i < len(tokens):
            config[f"{name}_token"] = tokens[i]
    begins = kind == "llama" or fields.get("tokenizer.ggml.pre") in ("llama-bpe", "tekken")
    if fields.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in config:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, vocab[bos])]
        )
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return backend, config


# ---- writing ----------------------------------------------------------------------------------------------------


def write(
    path: Path,
    network: Decoder,
    tokenizer: Tokenizer,
    name: str,
    kind: str = "f16",
    packed: dict[str, tuple[Tensor, Tensor, int]] | None = None,
) -> dict[str, Any]:
    """A GGUF file of a network. kind: "f32", "f16" or "bf16", of the matrices; vectors are fp32. packed: for each
    projection that is stored in 4 or 8 bits, its values, scales and bits as they lie in the folder; it keeps them.

    UserError if GGUF cannot say what the model is, or fp16 cannot hold a value.
    """
    c = network.config
    architecture = ARCHITECTURES.get(c.model_type)
    if architecture is None:
        raise UserError(f"models of type {c.model_type} are not written as GGUF; written: {', '.join(ARCHITECTURES)}")
    if c.sliding_window is not None or c.mlp_bias or c.attention_out_bias:
        raise UserError("GGUF's Llama has no sliding window and no such biases")
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    with publish(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        writer.add_name(name)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_block_count(c.num_hidden_layers)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_vocab_size(c.vocab_size)
        writer.add_file_type(
            {
                "f32": gguf.LlamaFileType.ALL_F32,
                "f16": gguf.LlamaFileType.MOSTLY_F16,
                "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            }[kind]
        )
        scaling = c.rope_scaling
        if scaling and scaling["rope_type"] == "llama3":
            factors = (
                rope.frequencies(c.head_dim, c.rope_theta)[0] / rope.frequencies(c.head_dim, c.rope_theta, scaling)[0]
            )
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        elif scaling:
            if "attention_factor" in scaling or scaling.get("mscale") or not scaling.get("truncate", True):
                raise UserError("rope_scaling: GGUF cannot say these factors")
            writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
            writer.add_rope_scaling_factor(scaling["factor"])
            if scaling["rope_type"] == "yarn":
                writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
                for beta, add in (
                    ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                    ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
                ):
                    if scaling.get(beta):
                        add(float(scaling[beta]))
        _write_tokenizer(writer, tokenizer, c)
        packed = packed or {}
        for ours, tensor in network.state_dict().items():
            module = ours.rpartition(".")[0]
            if (ours == "lm_head.weight" and c.tie_word_embeddings) or (module in packed and ours.endswith(".weight")):
                continue
            heads = _heads(architecture, ours, c)
            tensor = _paired(tensor, heads, False) if heads else tensor
            stored = _name(architecture, c.num_hidden_layers, ours)
            if tensor.ndim == 1:
                writer.add_tensor(stored, tensor.float().numpy())
            else:
                out = tensor.to(dtype)
                if not out.isfinite().all():
                    raise UserError(f"tensor {ours} has values that fp16 cannot hold; use --type bf16")
                raw = (
                    out.contiguous().view(torch.int16).numpy().view(np.uint8)
                    if dtype == torch.bfloat16
                    else out.contiguous().numpy()
                )
                writer.add_tensor(stored, raw, raw_dtype=Type.BF16 if dtype == torch.bfloat16 else None)
        for module, (values, scales, bits) in packed.items():
            heads = _heads(architecture, f"{module}.weight", c)
            if heads:
                values, scales = _paired(values, heads, False), _paired(scales, heads, False)
            bias = getattr(network.get_submodule(module), "bias", None)
            if bias is not None:
                bias = _paired(bias, heads, False) if heads else bias
                writer.add_tensor(_name(architecture, c.num_hidden_layers, f"{module}.bias"), bias.float().numpy())
            writer.add_tensor(
                _name(architecture, c.num_hidden_layers, f"{module}.weight"),
                _blocks(values, scales, bits),
                raw_dtype=Type.Q8_0 if bits == 8 else Type.Q4_0,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
    return {"file": str(path), "bytes": path.stat().st_size, "architecture": architecture}


def _blocks(values: Tensor, scales: Tensor, bits: int) -> np.ndarray:
    """The inverse of _values: (rows, bytes) uint8."""
    rows, groups = scales.shape
    head = scales.half().contiguous().view(rows, groups, 1).view(torch.uint8)
    if bits == 8:
        body = (values.view(rows, groups, GROUP).to(torch.int16) - 128).to(torch.int8).view(torch.uint8)
    else:
        columns = torch.stack([values & 15, values >> 4], -1).view(rows, groups, GROUP)
        body = columns[..., :16] | (columns[..., 16:] << 4)
    return torch.cat([head, body], -1).view(rows, -1).numpy()


def _write_tokenizer(writer: Any, tokenizer: Tokenizer, config: ModelConfig) -> None:
    import json

    state = json.loads(tokenizer.backend.to_str())
    model, added = state["model"], {t["id"]: t for t in state["added_tokens"]}
    if model["type"] != "BPE":
        raise UserError(
            f"tokenizers of type {model['type']} are not written as GGUF; byte-level BPE and SentencePiece BPE are"
        )
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [5] * config.vocab_size  # unused
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    for token, i in vocab.items():
        tokens[i], types[i] = token, 1
    for i, token in added.items():
        types[i] = 3 if token["special"] else 4
    level = "ByteLevel" in json.dumps(state["pre_tokenizer"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if level:
        patterns = [
            p["pattern"]["Regex"] for p in (state["pre_tokenizer"].get("pretokenizers") or []) if p["type"] == "Split"
        ]
        own = patterns[0] if len(patterns) == 1 else None
        pre = next((name for name, pattern in _PATTERNS.items() if pattern == own), None)
        if pre is None:
            say(
                "llama.cpp knows no pre-tokenizer like this model's: written as 'qwen2'; there, numbers of several "
                "digits are cut into other tokens"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or "qwen2")
        if pre is None and own:
            writer.add_string("craton.tokenizer.pattern", own)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    else:
        for i, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and types[i] == 1:
                types[i] = 6
        if model.get("unk_token") is not None:
            types[vocab[model["unk_token"]]] = 2
        rank = {"".join(m.split(" ", 1)): i for i, m in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(
            [
                -float(rank[t]) if t in rank else -1e6 if types[i] == 1 and len(t) == 1 else 0.0
                for i, t in enumerate(tokens)
            ]
        )
        writer.add_token_types(types)
        writer.add_add_space_prefix("Prepend" in json.dumps(state["normalizer"]))
    bos = config.bos_token_id if config.bos_token_id is not None else tokenizer.bos_id
    eos = next(iter(config.eos_token_ids), tokenizer.eos_id)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    first = tokenizer.encode("x")
    writer.add_add_bos_token(tokenizer.bos_id is not None and first[:1] == [tokenizer.bos_id])
    if isinstance(template := tokenizer.config.get("chat_template"), str):
        writer.add_chat_template(template)
