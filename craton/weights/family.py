"""What a published family is: how its `config.json` maps to ModelConfig and its tensor names to the network's.

A family file holds a Family or two. The maps are data, used in both directions; what cannot be said as data (layer
patterns, derived scales) is in its `derive` and `restore`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from craton.base import nearest
from craton.model.config import ModelConfig

# Keys of every family with ModelConfig's own names.
COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()
# Keys that do not change what the network computes, or that are read elsewhere.
INERT = (
    "architectures model_type torch_dtype dtype transformers_version auto_map use_cache initializer_range "
    "attention_dropout pretraining_tp rope_theta rope_scaling rope_parameters quantization_config "
    "output_router_logits router_aux_loss_coef router_jitter_noise cache_implementation unsloth_version "
    "unsloth_fixed return_dict output_hidden_states output_attentions id2label label2id problem_type "
    "chunk_size_feed_forward is_encoder_decoder tokenizer_class use_return_dict name_or_path "
    "rope_local_base_freq layer_types sliding_window_pattern transformers.js_config ep_size "
    # What generation alone reads, names of tokens, and records of how a model was made.
    "unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens temperature top_p top_k min_p typical_p "
    "do_sample num_beams num_beam_groups num_return_sequences repetition_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size length_penalty diversity_penalty early_stopping max_length min_length "
    "max_new_tokens remove_invalid_values exponential_decay_length_penalty output_scores return_dict_in_generate "
    "max_sequence_length model_max_length finetuned finetuning_task task_specific_params prefix tokenizer_file "
    "summary_type is_decoder torchscript tf_legacy_loss pruned_heads base_model "
    "license tags"
).split()
# Keys of other families that writers leave in, switched off; other names that are near to known ones may be misspelt.
OFF = "sliding_window use_sliding_window max_window_layers attention_bias mlp_bias use_qk_norm".split()
# What most families share: a family says of these only where it differs.
USUAL_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
USUAL_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
USUAL_ALWAYS: dict[str, Any] = {"qk_norm": ""}

# Keys of rope_scaling: what each kind needs, what one may have, and what may stand beside any.
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")}
_BESIDE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

Piece = tuple[str, Tensor, tuple[int, ...]]  # a tensor of the folder: its name, the part of ours it is, its shape there
Pieces = Callable[[str, Tensor], Iterator[Piece]]


def as_it_is(name: str, tensor: Tensor) -> Iterator[Piece]:
    yield name, tensor, tuple(tensor.shape)


def experts_apart(names: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")) -> Pieces:
    """The published layout of experts: three matrices each. names: of the block, and of gate, up and down."""
    block, gate, up, down = names

    def pieces(name: str, tensor: Tensor) -> Iterator[Piece]:
        if name.endswith(".mlp.experts.gate_up_proj"):
            base, size = name.removesuffix(".mlp.experts.gate_up_proj"), tensor.shape[1] // 2
            for e, (g, u) in enumerate((t[:size], t[size:]) for t in tensor):
                yield f"{base}.{block}.experts.{e}.{gate}.weight", g, tuple(g.shape)
                yield f"{base}.{block}.experts.{e}.{up}.weight", u, tuple(u.shape)
        elif name.endswith(".mlp.experts.down_proj"):
            base = name.removesuffix(".mlp.experts.down_proj")
            for e, d in enumerate(tensor):
                yield f"{base}.{block}.experts.{e}.{down}.weight", d, tuple(d.shape)
        else:
            yield name.replace(".mlp.gate.", f".{block}.gate."), tensor, tuple(tensor.shape)

    return pieces


def layer_types(raw: dict[str, Any], slides: Callable[[int], Any]) -> Any:
    """As the folder says; where it is silent, those layers slide for which `slides` is true."""
    layers = range(raw["num_hidden_layers"])
    return raw.get("layer_types") or ["sliding_attention" if slides(i) else "full_attention" for i in layers]


def _without_theta(rope: Any) -> Any:
    """Settings of rotary positions, in one spelling, but for what stands elsewhere too."""
    if not isinstance(rope, dict):
        return rope
    kind = rope.get("rope_type", rope.get("type"))
    return {"rope_type": kind} | {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta")}


@dataclass(frozen=True)
class Family:
    model_type: str
    architecture: str
    same: Sequence[str] = ()  # further keys with ModelConfig's names
    renamed: dict[str, str] = field(default_factory=dict)  # published key -> ModelConfig's
    defaults: dict[str, Any] = field(default_factory=dict)  # published keys that a folder may leave out
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # keys with the only values that are supported
    always: dict[str, Any] = field(default_factory=dict)  # ModelConfig fields that make the family
    inert: Sequence[str] = ()
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: {}  # published keys -> further fields
    restore: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}  # and back
    pieces: Pieces = as_it_is
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "defaults", USUAL_DEFAULTS | self.defaults)
        object.__setattr__(self, "fixed", USUAL_FIXED | self.fixed)
        object.__setattr__(self, "always", USUAL_ALWAYS | self.always)

    def read(self, raw: dict[str, Any]) -> ModelConfig:
        """ValueError, KeyError or TypeError names the key that is missing, unknown or cannot be honoured."""
        known = {*COMMON, *INERT, *self.same, *self.renamed, *self.defaults, *self.fixed, *self.inert}
        for key, value in raw.items():
            off = value is None or value is False or value in ([], {}, "")  # whatever it is, it is not used
            if (
                key not in known
                and not key.startswith("_")
                and not (off and (key in OFF or not get_close_matches(key, known, 1, 0.8)))
            ):
                raise ValueError(
                    f"{key} is not known for {self.model_type}{nearest(key, known)}; a setting that is not "
                    "understood could change every answer"
                )
        raw = {**self.defaults, **raw}
        for key, allowed in self.fixed.items():
            if key in raw and raw[key] not in allowed:
                choice = " or ".join(map(repr, allowed))
                raise ValueError(f"{key} is {raw[key]!r}; {self.model_type} is supported with {choice}")
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            n, most = raw.get(key), 1024 if key == "num_hidden_layers" else 1 << 24
            if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= most:
                raise ValueError(f"{key} is {n!r}, must be a whole number of at least 1 and no larger than any model's")
        values: dict[str, Any] = {key: raw[key] for key in (*COMMON, *self.same) if key in raw}
        values |= {ours: raw[key] for key, ours in self.renamed.items() if raw.get(key) is not None}
        if values.get("head_dim") is None:
            values["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = raw["num_attention_heads"]
        values |= self._rope(raw) | self.always | self.derive(raw) | {"model_type": self.model_type}
        for required in ("vocab_size", "intermediate_size"):
            if required not in values:
                raise KeyError(required)
        return ModelConfig(**values)

    def _rope(self, raw: dict[str, Any]) -> dict[str, Any]:
        rope, older = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
        if rope and older and _without_theta(rope) != _without_theta(older):
            raise ValueError("rope_parameters and rope_scaling say different things; remove the one that is wrong")
        rope = rope or older
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling is {rope!r}, must be an object")
        if "full_attention" in rope:  # one for each type of layer
            local, rope = rope.get("sliding_attention") or {}, rope["full_attention"] or {}
        else:
            local = {"rope_theta": raw["rope_local_base_freq"]} if "rope_local_base_freq" in raw else {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in self.ropes:
            raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(self.ropes)}")
        out: dict[str, Any] = {"rope_theta": rope.get("rope_theta", raw.get("rope_theta", self.theta))}
        if local:
            out["rope_local_theta"] = local.get("rope_theta", 10_000.0)
            if local.get("rope_type", "default") != "default":
                raise ValueError("sliding layers with scaled rotary positions are not supported")
        if kind != "default":
            needed, optional = _NEEDED[kind], _OPTIONAL.get(kind, ())
            for key in needed:
                if not isinstance(rope.get(key), int | float) or isinstance(rope[key], bool) or rope[key] <= 0:
                    raise ValueError(f"{key} of rope_scaling is {rope.get(key)!r}, must be a number above 0")
            if extra := set(rope) - {*_BESIDE, *needed, *optional}:
                raise ValueError(f"{sorted(extra)[0]} of rope_scaling is not known for rope_type {kind!r}")
            out["rope_scaling"] = {"rope_type": kind} | {k: rope[k] for k in (*needed, *optional) if k in rope}
        if rope.get("partial_rotary_factor", 1.0) != 1.0 or raw.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor other than 1.0 is not supported")
        return out

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The published form of a configuration; ValueError if the family cannot say it."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        out |= {key: getattr(config, key) for key in (*COMMON, *self.same)}
        out |= {key: getattr(config, ours) for key, ours in self.renamed.items()}
        out |= {"rope_theta": config.rope_theta}
        if config.rope_scaling:
            out["rope_scaling"] = config.rope_scaling
        if config.rope_local_theta is not None:
            out["rope_local_base_freq"] = config.rope_local_theta
        if config.layer_types is not None:
            out["layer_types"] = list(config.layer_types)
        out |= {key: values[0] for key, values in self.fixed.items()} | self.restore(config)
        out |= {"initializer_range": 0.02, "use_cache": True}
        out = {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}
        again = self.read(out)
        for f in fields(ModelConfig):
            if getattr(again, f.name) != getattr(config, f.name):
                raise ValueError(f"{f.name} is {getattr(config, f.name)!r}, which {self.model_type} cannot have")
        return out
