"""A decoder's step on a GPU: few kernels, and for decoding CUDA graphs, so that the host does next to nothing.

Graphs hold pointers to the network's own parameters: what trains changes what they compute. A graph serves a padded
number of sequences and a padded length; several steps run one after the other on the device, each with the tokens that
the one before chose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.base import UserError
from craton.model.cache import PagedCache, TokenBatch
from craton.model.decoder import MLP, Attention, Decoder, Linear
from craton.model.fused import fits_gpu
from craton.model.gpu.attention import TILE, decode_attention, prompt_attention, split_of, tiles_of
from craton.model.gpu.choose import advance, choose_tokens
from craton.model.gpu.layers import add_rms_norm, gated_activation, one_row, rope_store
from craton.model.gpu.low_rank import add_low_rank
from craton.model.gpu.packed import packed_row, packed_rows
from craton.model.grouped import GroupedMatrix, joined
from craton.model.lora import LoraLinear, LowRank, shape_of
from craton.model.packed import PackedEmbedding, PackedLinear
from craton.model.paging import AHEAD, BLOCK

_MOST_GRAPHS = 256  # that are kept
_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_FEW = 1  # rows up to which our own product is used, with all around it joined; measured beside the library's

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


def fits(network: Decoder) -> bool:
    """Whether a decoder's steps can be made of these kernels: families as of fused.py, weights as they are or grouped,
    and adapters but for DoRA's."""
    found = 0
    for module in network.modules():
        if isinstance(module, LoraLinear) and module.adapter.lora_magnitude is not None:
            return False
        packed = isinstance(module, PackedLinear) and isinstance(module.packed, GroupedMatrix)
        found += packed or isinstance(module, Linear)
    return fits_gpu(network.config) and found == 7 * network.config.num_hidden_layers + 1


class CudaGraphs:
    """Makes CUDA graphs, which run one after the other and so share their memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Replay:
        """A graph of what body does; kernels are compiled by a run before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            body()
        return graph.replay


@dataclass
class _Held:
    """The inputs and outputs of one graph, at fixed places."""

    whole: Tensor  # int32: all below it up to tables
    numbers: Tensor  # fp64: temperature, min_p, top_k, top_p, u, and (AHEAD + 1, rows) of u to come
    out: Tensor  # int32 (2, AHEAD, rows): tokens, and their log-probabilities as fp32
    replay: Replay
    rows: int
    blocks: int


@dataclass(frozen=True)
class _Kind:
    """What a graph can do, beside its sizes."""

    filters: bool  # top_k and top_p
    adapters: bool


@dataclass
class _Low:
    """The adapters of a layer, by number: a (numbers, rank, inputs), b (numbers, outputs, rank) with the scale."""

    a: Tensor
    b: Tensor


class DeviceStep:
    """Holds no copies of the network's weights. trash: a block of the cache for rows that are padding."""

    def __init__(
        self,
        network: Decoder,
        cache: PagedCache,
        context: int,
        trash: int,
        dtype: torch.dtype,
        capture: Capture | None = None,
    ):
        c = self.config = network.config
        self.network, self.cache, self.trash, self.dtype = network, cache, trash, dtype
        self.capture = capture or CudaGraphs()
        self.device, self.context = cache.keys.device, context
        self.graphs: dict[tuple[int, int, _Kind], _Held] = {}
        self.adapters: dict[int, Mapping[str, LowRank]] = {}
        self.lows: dict[nn.Module, _Low] = {}  # by the layers that they change
        self.which: Tensor | None = None  # the rows' adapters, while a step is made that has some
        self.joined: dict[nn.Module, tuple[GroupedMatrix, Tensor | None]] = {}  # by the first of the layers
        for block in network.model.layers:
            attention, mlp = block.self_attn, block.mlp
            assert isinstance(attention, Attention) and isinstance(mlp, MLP)
            self._join([attention.q_proj, attention.k_proj, attention.v_proj])
            self._join([mlp.gate_proj, mlp.up_proj])
        self.offset = c.norm_unit_offset
        with torch.no_grad():
            positions = torch.arange(context + AHEAD + 1, device=self.device)
            turned = network.model.ropes(positions)
        made: dict[int, tuple[Tensor, Tensor]] = {}
        self.ropes: list[tuple[Tensor, Tensor] | None] = []
        for i, own in enumerate(turned):
            which = 1 if c.rope_local_theta is not None and c.window(i) else 0
            if own is not None and which not in made:
                made[which] = own[0].float().contiguous(), own[1].float().contiguous()
            self.ropes.append(None if own is None else made[which])

    # ---- the layers ----

    def _join(self, layers: Sequence[nn.Module]) -> None:
        """Packed matrices that are multiplied with the same become one."""
        plain = [_base(layer) for layer in layers]
        if all(isinstance(layer, PackedLinear) for layer in plain):
            biases = [layer.bias for layer in plain]
            bias = torch.cat([b.to(self.device) for b in biases]) if biases[0] is not None else None
            self.joined[layers[0]] = joined([layer.packed for layer in plain]), bias

    def _norm(self, x: Tensor, delta: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        total, y = torch.empty_like(x), torch.empty_like(x)
        add_rms_norm(x, delta, norm.weight, total, y, self.config.rms_norm_eps, self.offset)
        return total, y

    def _product(
        self, x: Tensor, layers: Sequence[Any], delta: Tensor | None = None, norm: Any = None, gate: str = ""
    ) -> tuple[Tensor, Tensor]:
        """(x + delta, the layers' products with its norm side by side; gated, the activation of the two)."""
        sizes = [shape_of(_base(layer))[0] for layer in layers]
        if x.shape[0] <= _FEW and (self.which is None or not any(layer in self.lows for layer in layers)):
            out, total = x.new_empty(x.shape[0], sizes[0] if gate else sum(sizes)), x
            more: dict[str, Any] = {"gate": gate}
            if norm is not None:
                total = torch.empty_like(x)
                more |= {"norm": norm.weight, "total": total, "delta": delta}
                more |= {"eps": self.config.rms_norm_eps, "offset": self.offset}
            if self._at_once(x, layers, out, more):
                return total, out
        total, y = (x, x) if norm is None else self._norm(x, delta, norm)
        out = self._apart(y, layers, sizes)
        if not gate:
            return total, out
        both, out = out, x.new_empty(x.shape[0], sizes[0])
        gated_activation(both, gate, out)
        return total, out

    def _at_once(self, x: Tensor, layers: Sequence[Any], out: Tensor, more: dict[str, Any]) -> bool:
        """Products of a row, with all around them, in one kernel; False where it takes several."""
        plain = [_base(layer) for layer in layers]
        if all(isinstance(layer, Linear) for layer in plain):
            biases = None if plain[0].bias is None else [layer.bias for layer in plain]
            one_row(x, [layer.weight for layer in plain], out, biases=biases, **more)
            return True
        alone = (plain[0].packed, plain[0].bias) if len(layers) == 1 else None
        matrix, bias = self.joined.get(layers[0], alone) or (None, None)
        if matrix is not None:
            packed_row(x, matrix, out, bias=bias, **more)
        return matrix is not None

    def _apart(self, y: Tensor, layers: Sequence[Any], sizes: list[int]) -> Tensor:
        """Products of any number of rows, side by side, with the rows' adapters."""
        out = y.new_empty(y.shape[0], sum(sizes))
        parts = out.split(sizes, 1)
        whole = self.joined.get(layers[0])
        if whole is not None:
            packed_rows(y, whole[0], out, whole[1])
        for layer, part in zip(layers, parts, strict=True):
            plain = _base(layer)
            if isinstance(plain, Linear):
                torch.mm(y, plain.weight.to(y.dtype).t(), out=part)
                if plain.bias is not None:
                    part += plain.bias.to(y.dtype)
            elif whole is None:
                packed_rows(y, plain.packed, part, plain.bias)
            if self.which is not None and layer in self.lows:
                low = self.lows[layer]
                add_low_rank(y, low.a, low.b, self.which, part)
        return out

    def _blocks(self, ids: Tensor, places: list[Tensor], attend: Callable[..., None]) -> tuple[Tensor, Tensor | None]:
        """x and the addition still pending on it, after all blocks."""
        c, backbone = self.config, self.network.model
        embedding = backbone.embed_tokens
        packed = isinstance(embedding, PackedEmbedding)
        x = (embedding(ids) if packed else F.embedding(ids, embedding.weight)).to(self.dtype)
        if c.embedding_scale != 1.0:
            x = x * torch.tensor(c.embedding_scale, dtype=self.dtype)
        tokens = ids.shape[0]
        delta: Tensor | None = None
        for i, block in enumerate(backbone.layers):
            attention, mlp = block.self_attn, block.mlp
            assert isinstance(attention, Attention) and isinstance(mlp, MLP)
            three = [attention.q_proj, attention.k_proj, attention.v_proj]
            x, qkv = self._product(x, three, delta, block.input_layernorm)
            q = x.new_empty(tokens, c.num_attention_heads, c.head_dim)
            norms: tuple[Tensor, Tensor] | None = None
            if attention.q_norm is not None and attention.k_norm is not None:
                norms = attention.q_norm.weight, attention.k_norm.weight
            pool = self.cache.keys[i], self.cache.values[i]
            rope_store(qkv, norms, self.ropes[i], places[0], places[1], pool, q, eps=c.rms_norm_eps, offset=self.offset)
            o = torch.empty_like(q)
            attend(q, pool, o, attention.spec)
            delta = self._product(o.view(tokens, -1), [attention.o_proj])[1]
            before_mlp = block.post_attention_layernorm
            if c.norm_placement == "both":
                delta, before_mlp = self._norm(delta, None, before_mlp)[1], block.pre_feedforward_layernorm
            x, hidden = self._product(x, [mlp.gate_proj, mlp.up_proj], delta, before_mlp, gate=c.hidden_act)
            delta = self._product(hidden, [mlp.down_proj])[1]
            if c.norm_placement == "both":
                delta = self._norm(delta, None, block.post_feedforward_layernorm)[1]
        return x, delta

    # ---- any batch ----

    @torch.no_grad()
    def run(self, ids: Tensor, batch: TokenBatch, rows: Tensor, want_logits: bool) -> tuple[Tensor | None, Tensor]:
        """As FusedStep.run, on the device."""
        tiles = torch.tensor(tiles_of(batch.starts.tolist(), TILE), dtype=torch.int32, device=self.device)
        self.which = None if batch.adapters is None else batch.adapters.to(self.device)

        def attend(q: Tensor, pool: tuple[Tensor, Tensor], o: Tensor, spec: Any) -> None:
            prompt_attention(q, pool, batch.places, tiles, o, scale=spec.scale, window=spec.window)

        x, delta = self._blocks(ids, batch.places, attend)
        picked = rows.long()
        _, hidden = self._norm(x[picked], None if delta is None else delta[picked], self.network.model.norm)
        logits = self._product(hidden, [self.network.lm_head])[1] if want_logits else None
        return logits, hidden

    # ---- one token of each sequence, again and again ----

    def _graph(self, rows: int, length: int, kind: _Kind) -> _Held:
        split = split_of(length)
        key = rows, split[0] * split[1], kind
        held = self.graphs.pop(key, None)
        if held is None:
            if len(self.graphs) == _MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]  # not used for the longest time
            held = self._captured(rows, split, kind)
        self.graphs[key] = held
        return held

    def _captured(self, rows: int, split: tuple[int, int], kind: _Kind) -> _Held:
        blocks = split[0] * split[1] // BLOCK
        whole = torch.zeros(rows * (5 + blocks) + 1, dtype=torch.int32, device=self.device)
        ids, positions, slots, lengths, which, tables, turn = whole.split([*[rows] * 5, rows * blocks, 1])
        tables = tables.view(rows, blocks)
        numbers = torch.zeros(5 + AHEAD + 1, rows, dtype=torch.float64, device=self.device)
        temperature, min_p, top_k, top_p, u = numbers[:5]
        filters = (top_k, top_p) if kind.filters else None
        out = torch.zeros(2, AHEAD, rows, dtype=torch.int32, device=self.device)
        said, scores = out[0], out[1].view(torch.float32)
        places = [positions, slots, slots, lengths, tables]

        def attend(q: Tensor, pool: tuple[Tensor, Tensor], o: Tensor, spec: Any) -> None:
            decode_attention(q, pool, lengths, tables, o, split=split, scale=spec.scale, window=spec.window)

        def body() -> None:
            self.which = which if kind.adapters else None
            x, delta = self._blocks(ids, places, attend)
            _, logits = self._product(x, [self.network.lm_head], delta, self.network.model.norm)
            tokens = torch.empty(rows, dtype=torch.int64, device=self.device)
            logprobs = torch.empty(rows, dtype=torch.float32, device=self.device)
            choose_tokens(logits, temperature, min_p, u, tokens, logprobs, filters)
            advance((tokens, logprobs), ids, places, turn, numbers[5:], u, (said, scores))

        columns = [[0] * rows, [0] * rows, [self.trash * BLOCK] * rows, [1] * rows, [-1] * rows]
        self._fill(whole, columns, [], rows, blocks)
        return _Held(whole, numbers, out, self.capture(body), rows, blocks)

    def _fill(self, whole: Tensor, columns: list[list[int]], tables: list[list[int]], rows: int, blocks: int) -> None:
        flat: list[int] = []
        for column in columns:
            flat += column
        for table in tables:
            flat += table + [self.trash] * (blocks - len(table))
        flat += [self.trash] * ((rows - len(tables)) * blocks) + [0]
        whole.copy_(torch.tensor(flat, dtype=torch.int32))

    @torch.inference_mode()
    def decode(
        self,
        ids: list[int],
        positions: list[int],
        tables: list[list[int]],
        filters: list[tuple[float, float, int, float]],
        numbers: list[list[float]],
        adapters: list[int],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Goes on with sequences, len(numbers) steps of a token each, at most AHEAD. ids: their last tokens, at
        positions; tables: the blocks of each, enough for what comes, or the rest is lost. filters: temperature, min_p,
        top_k and top_p. numbers: (steps, sequences) in [0, 1). adapters: their numbers, below 0: none. Returns tokens
        and log-probabilities, each (steps, sequences)."""
        count, steps = len(ids), len(numbers)
        rows = next((b for b in _BATCHES if b >= count), count)
        kind = _Kind(any(f[2] or f[3] < 1 for f in filters), any(a >= 0 for a in adapters))
        held = self._graph(rows, max(positions) + steps, kind)
        more = rows - count
        slots = [t[p // BLOCK] * BLOCK + p % BLOCK for t, p in zip(tables, positions, strict=True)]
        columns = [ids + [0] * more, positions + [0] * more, slots + [self.trash * BLOCK] * more]
        columns += [[p + 1 for p in positions] + [1] * more, adapters + [-1] * more]
        self._fill(held.whole, columns, [t[: held.blocks] for t in tables], rows, held.blocks)
        each = [*zip(*filters, strict=True), numbers[0], *numbers]
        lines = [[*line, *[0.0] * more] for line in each]
        held.numbers[: len(lines)].copy_(torch.tensor(lines, dtype=torch.float64))
        for _ in range(steps):
            held.replay()
        out = held.out[:, :steps, :count].cpu()
        return out[0].tolist(), out[1].view(torch.float32).tolist()

    # ---- adapters ----

    @torch.no_grad()
    def put_adapter(self, number: int, parts: Mapping[str, LowRank]) -> None:
        """Make an adapter known by a number; parts by the names of layers. An adapter that is changed is put again.
        UserError where the memory does not hold it; the others stay as they are."""
        known = self.adapters | {number: parts}
        layers = {self.network.get_submodule(name) for own in known.values() for name in own}
        rank = _power_of_two(max(16, *(low.lora_A.shape[0] for own in known.values() for low in own.values())))
        many = _power_of_two(max(known) + 1)
        held = next(iter(self.lows.values()), None)
        if held is not None and held.a.shape[0] >= many and held.a.shape[1] >= rank and layers <= self.lows.keys():
            self._copy(self.lows, number, parts)
            self.adapters = known
            return
        try:
            made = {layer: self._room(layer, many, rank) for layer in layers}
            for other, own in known.items():
                self._copy(made, other, own)
        except torch.OutOfMemoryError:
            raise UserError(f"no memory for {len(known)} adapters of rank {rank}; drop one, or give --cache") from None
        self.adapters, self.lows = known, made
        self.graphs.clear()  # they point to what was there

    def _room(self, layer: nn.Module, many: int, rank: int) -> _Low:
        outputs, inputs = shape_of(_base(layer))
        a = torch.zeros(many, rank, inputs, dtype=self.dtype, device=self.device)
        return _Low(a, torch.zeros(many, outputs, rank, dtype=self.dtype, device=self.device))

    def _copy(self, lows: Mapping[nn.Module, _Low], number: int, parts: Mapping[str, LowRank]) -> None:
        for low in lows.values():
            low.a[number].zero_()
            low.b[number].zero_()
        for name, part in parts.items():
            low, rank = lows[self.network.get_submodule(name)], part.lora_A.shape[0]
            low.a[number, :rank].copy_(part.lora_A)
            low.b[number, :, :rank].copy_(part.lora_B * part.scale)

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter; nothing may use it any more."""
        self.adapters.pop(number, None)


def _base(layer: Any) -> Any:
    """A layer without its own adapter."""
    return layer.base if isinstance(layer, LoraLinear) else layer


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
