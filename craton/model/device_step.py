"""A decoder's step on a GPU: few kernels, and for decoding CUDA graphs, so that the host does next to nothing.

Graphs hold pointers to the network's own parameters: what trains changes what they compute. A graph serves a padded
number of sequences and a padded length; several steps run one after the other on the device, each with the tokens that
the one before chose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.model import fused, triton_kernels
from craton.model.cache import PagedCache, TokenBatch
from craton.model.decoder import MLP, Attention, Decoder, Linear
from craton.model.lora import LoraLinear
from craton.model.paging import AHEAD, BLOCK
from craton.model.triton_kernels import TILE, split_of, tiles_of

_MOST_GRAPHS = 64  # that are kept
_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_FEW = 1  # rows up to which our own product is used, with all around it joined; measured beside the library's

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


def fits(network: Decoder) -> bool:
    """Whether a decoder's steps can be made of these kernels: families as of fused.py, with weights as they are."""
    c = network.config
    layers = [m for m in network.modules() if isinstance(m, Linear)]
    adapted = any(isinstance(m, LoraLinear) for m in network.modules())
    plain = len(layers) == 7 * c.num_hidden_layers + 1 and not adapted  # and none is packed
    return fused.fits(c) and plain and c.num_attention_heads <= 16 * c.num_key_value_heads


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
    numbers: Tensor  # fp64: temperature, min_p, u, and (AHEAD + 1, rows) of u to come
    out: Tensor  # int32 (2, AHEAD, rows): tokens, and their log-probabilities as fp32
    replay: Replay
    rows: int
    blocks: int


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
        self.graphs: dict[tuple[int, int], _Held] = {}
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

    def _norm(self, x: Tensor, delta: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        total, y = torch.empty_like(x), torch.empty_like(x)
        triton_kernels.add_rms_norm(x, delta, norm.weight, total, y, self.config.rms_norm_eps, self.offset)
        return total, y

    def _product(
        self, x: Tensor, layers: Sequence[Linear], delta: Tensor | None = None, norm: Any = None, gate: str = ""
    ) -> tuple[Tensor, Tensor]:
        """(x + delta, the layers' products with its norm side by side; gated, the activation of the two)."""
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] | None = None
        if layers[0].bias is not None:
            biases = [layer.bias for layer in layers if layer.bias is not None]
        width = weights[0].shape[0] if gate else sum(w.shape[0] for w in weights)
        if x.shape[0] <= _FEW:
            out, total = x.new_empty(x.shape[0], width), x if norm is None else torch.empty_like(x)
            more: dict[str, Any] = {}
            if norm is not None:
                more = {"norm": norm.weight, "total": total, "delta": delta}
                more |= {"eps": self.config.rms_norm_eps, "offset": self.offset}
            triton_kernels.one_row(x, weights, out, biases=biases, gate=gate, **more)
            return total, out
        total, y = (x, x) if norm is None else self._norm(x, delta, norm)
        out, at = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights)), 0
        for i, w in enumerate(weights):
            part = out[:, at : at + w.shape[0]]
            torch.mm(y, w.to(x.dtype).t(), out=part)
            if biases is not None:
                part += biases[i].to(x.dtype)
            at += w.shape[0]
        if not gate:
            return total, out
        both, out = out, x.new_empty(x.shape[0], width)
        triton_kernels.gated_activation(both, gate, out)
        return total, out

    def _blocks(self, ids: Tensor, places: list[Tensor], attend: Callable[..., None]) -> tuple[Tensor, Tensor | None]:
        """x and the addition still pending on it, after all blocks."""
        c, backbone = self.config, self.network.model
        x = F.embedding(ids, backbone.embed_tokens.weight).to(self.dtype)
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
            triton_kernels.rope_store(
                qkv, norms, self.ropes[i], places[0], places[1], pool, q, eps=c.rms_norm_eps, offset=self.offset
            )
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

        def attend(q: Tensor, pool: tuple[Tensor, Tensor], o: Tensor, spec: Any) -> None:
            triton_kernels.prompt_attention(q, pool, batch.places, tiles, o, scale=spec.scale, window=spec.window)

        x, delta = self._blocks(ids, batch.places, attend)
        picked = rows.long()
        _, hidden = self._norm(x[picked], None if delta is None else delta[picked], self.network.model.norm)
        logits = self._product(hidden, [self.network.lm_head])[1] if want_logits else None
        return logits, hidden

    # ---- one token of each sequence, again and again ----

    def _graph(self, rows: int, length: int) -> _Held:
        split = split_of(length)
        key = rows, split[0] * split[1]
        if key not in self.graphs:
            if len(self.graphs) == _MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]  # the oldest
            self.graphs[key] = self._captured(rows, split)
        return self.graphs[key]

    def _captured(self, rows: int, split: tuple[int, int]) -> _Held:
        blocks = split[0] * split[1] // BLOCK
        whole = torch.zeros(rows * (4 + blocks) + 1, dtype=torch.int32, device=self.device)
        ids, positions, slots, lengths, tables, turn = whole.split([*[rows] * 4, rows * blocks, 1])
        tables = tables.view(rows, blocks)
        numbers = torch.zeros(3 + AHEAD + 1, rows, dtype=torch.float64, device=self.device)
        temperature, min_p, u = numbers[:3]
        out = torch.zeros(2, AHEAD, rows, dtype=torch.int32, device=self.device)
        said, scores = out[0], out[1].view(torch.float32)
        places = [positions, slots, slots, lengths, tables]

        def attend(q: Tensor, pool: tuple[Tensor, Tensor], o: Tensor, spec: Any) -> None:
            triton_kernels.decode_attention(
                q, pool, lengths, tables, o, split=split, scale=spec.scale, window=spec.window
            )

        def body() -> None:
            x, delta = self._blocks(ids, places, attend)
            _, logits = self._product(x, [self.network.lm_head], delta, self.network.model.norm)
            tokens = torch.empty(rows, dtype=torch.int64, device=self.device)
            logprobs = torch.empty(rows, dtype=torch.float32, device=self.device)
            triton_kernels.choose_tokens(logits, temperature, min_p, u, tokens, logprobs)
            triton_kernels.advance((tokens, logprobs), ids, places, turn, numbers[3:], u, (said, scores))

        self._fill(whole, numbers, [[0] * rows, [0] * rows, [self.trash * BLOCK] * rows, [1] * rows], [], rows, blocks)
        return _Held(whole, numbers, out, self.capture(body), rows, blocks)

    def _fill(
        self, whole: Tensor, numbers: Tensor, columns: list[list[int]], tables: list[list[int]], rows: int, blocks: int
    ) -> None:
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
        filters: list[tuple[float, float]],
        numbers: list[list[float]],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Goes on with sequences, len(numbers) steps of a token each, at most AHEAD. ids: their last tokens, at
        positions; tables: the blocks of each, enough for what comes, or the rest is lost. filters: temperature and
        min_p. numbers: (steps, sequences) in [0, 1). Returns tokens and log-probabilities, each (steps, sequences)."""
        count, steps = len(ids), len(numbers)
        rows = next((b for b in _BATCHES if b >= count), count)
        held = self._graph(rows, max(positions) + steps)
        more = rows - count
        slots = [t[p // BLOCK] * BLOCK + p % BLOCK for t, p in zip(tables, positions, strict=True)]
        columns = [ids + [0] * more, positions + [0] * more, slots + [self.trash * BLOCK] * more]
        columns.append([p + 1 for p in positions] + [1] * more)
        self._fill(held.whole, held.numbers, columns, [t[: held.blocks] for t in tables], rows, held.blocks)
        t, m = zip(*filters, strict=True)
        lines = [[*t, *[0.0] * more], [*m, *[0.0] * more], numbers[0] + [0.0] * more]
        lines += [n + [0.0] * more for n in numbers]
        held.numbers[: len(lines)].copy_(torch.tensor(lines, dtype=torch.float64))
        for _ in range(steps):
            held.replay()
        out = held.out[:, :steps, :count].cpu()
        return out[0].tolist(), out[1].view(torch.float32).tolist()
