"""Pretraining as a job: the next token of a corpus's documents."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from craton.base import UserError
from craton.corpus.batches import Batch, Batches, heldout_rows
from craton.corpus.store import Corpus
from craton.engine.model import greedy
from craton.model.config import ModelConfig
from craton.model.decoder import Decoder
from craton.model.initialise import initial_rows
from craton.tasks.find import find_tasks
from craton.tasks.live import Probe
from craton.text.tokenizer import Tokenizer
from craton.train.distributed import Processes, stored_buffers
from craton.train.job import Cost, Job, Looked, Losses, on
from craton.train.recipe import Recipe
from craton.weights.folder import published, write_config


def next_token(network: Any, batch: Batch) -> Losses:
    """Cross-entropy of the next token, in nats."""
    total, _ = network.weighted_nll(batch.ids, batch.target, batch.weight, batch.document_start)
    return Losses(total, batch.weight.sum())


def decoder_units(network: Any) -> list[list[nn.Module]]:
    """The embedding, each block, and the head, which is the embedding's own matrix where they are tied."""
    if network.config.tie_word_embeddings:
        return [[network.model.embed_tokens, network.lm_head], *([b] for b in network.model.layers)]
    return [[network.model.embed_tokens], *([b] for b in network.model.layers), [network.lm_head]]


def decoder_forwards(network: Any) -> Iterable[tuple[nn.Module, str]]:
    """The losses of a decoder and of its head."""
    for method in ("weighted_nll", "token_nll"):
        yield network, method
        yield network.lm_head, method


class ModelFolder:
    """A decoder that is trained from random weights, and its folder in the Hugging Face layout."""

    weights_file = "model.safetensors"

    def __init__(self, config: ModelConfig, seed: int, tokenizer: Tokenizer | None = None):
        self.config, self.seed, self.tokenizer = config, seed, tokenizer

    def build(self) -> Decoder:
        """The decoder on the meta device."""
        with torch.device("meta"):
            return Decoder(self.config)

    def rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """Drawn from the seed."""
        return initial_rows(self.config, self.seed, name, shape, first, count)

    def units(self, network: Any) -> list[list[nn.Module]]:
        """See decoder_units."""
        return decoder_units(network)

    def forwards(self, network: Any) -> Iterable[tuple[nn.Module, str]]:
        """See decoder_forwards."""
        return decoder_forwards(network)

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the family's checkpoints name them."""
        return published(self.config, tensors)

    def write_rest(self, out: Path) -> None:
        """Configuration and tokenizer."""
        assert self.tokenizer is not None
        write_config(out, self.config)
        self.tokenizer.config["model_max_length"] = self.config.max_position_embeddings
        self.tokenizer.save(out)


class Continued(ModelFolder):
    """A decoder that is trained from the weights that it has, in fp32 meanwhile. load: opens the model anew."""

    def __init__(self, load: Callable[[], Decoder], config: ModelConfig, tokenizer: Tokenizer):
        super().__init__(config, 0, tokenizer)
        self.load, self.read = load, dict[str, Tensor]()

    def rows(self, name: str, shape: tuple[int, ...], first: int, count: int) -> Tensor:
        """As they were before. The model is opened for as long as it is copied."""
        if name not in self.read:
            network = self.load()
            self.read = {n: t.detach() for n, t in [*network.named_parameters(), *stored_buffers(network)]}
        return self.read.pop(name)[first : first + count].float()

    def write_rest(self, out: Path) -> None:
        """Configuration and tokenizer."""
        assert self.tokenizer is not None
        write_config(out, self.config)
        self.tokenizer.save(out)


def kind(name: str, p: nn.Parameter) -> str:
    """What a decoder's parameter is to the optimizers."""
    if p.ndim == 1 or name.endswith("bias"):
        return "norm"
    return "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else "matrix"


class Heldout:
    """Loss on fixed rows of the held-out documents, by source and by place too, and a greedy continuation of the first
    of them."""

    def __init__(self, corpora: list[Corpus], recipe: Recipe, config: ModelConfig, device: str):
        length, mask = recipe.data.sequence_length or 1, bool(recipe.data.document_mask)
        self.rows = heldout_rows(corpora, length, recipe.run.evaluate_tokens or 1, mask)
        self.config, self.device, self.bf16 = config, device, recipe.run.precision == "bf16"
        self.tokenizer = corpora[0].tokenizer
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes())
        asked = recipe.run.evaluate_tasks
        self.probe = Probe(find_tasks(asked), self.tokenizer, config.max_position_embeddings) if asked else None

    def __call__(self, network: Any, processes: Processes) -> Looked:
        """Rows are shared out; where there are too few, some are computed twice and counted once."""
        if not self.rows:
            return Looked({})
        length = self.rows[0].batch.ids.shape[1]
        nats = torch.zeros(-(-len(self.rows) // processes.world), length, dtype=torch.float64)
        context = torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)
        with torch.no_grad(), context:
            for i in range(len(nats)):
                row = self.rows[min(i * processes.world + processes.rank, len(self.rows) - 1)]
                batch = on(row.batch, self.device)
                _, nll = network.weighted_nll(batch.ids, batch.target, batch.weight, batch.document_start)
                nats[i] = nll.double().flatten().cpu()
        each = processes.stack(nats.to(self.device)).cpu().transpose(0, 1).flatten(0, 1)[: len(self.rows)]
        total, size = float(each.sum()), sum(int(self.token_bytes[r.batch.target].sum()) for r in self.rows)
        tokens = sum(r.batch.target.numel() for r in self.rows)
        loss, bits, sample = total / tokens, total / math.log(2) / max(1, size), self.sample(network, processes)
        figures = {"heldout_loss": loss, "heldout_bits_per_byte": bits, "sample": sample}
        figures |= {"by_source": self._by_source(each), "by_position": self._by_position(each)}
        tasks = self._tasks(network, processes)
        said = "".join(f"  {name} {value:.3f}" for name, value in tasks.items())
        figures |= {"tasks": tasks} if tasks else {}
        return Looked(figures, f"held-out {bits:.4f} bits/byte, loss {loss:.4f}{said}  {sample[:100]!r}")

    def _tasks(self, network: Any, processes: Processes) -> dict[str, float]:
        """Scores of the tasks that are asked for; none where the network is sharded."""
        if self.probe is None or processes.mesh is not None:
            return {}
        return self.probe(network)

    def _by_source(self, nats: Tensor) -> dict[str, float]:
        """Bits per byte of each source; nats: (rows, time)."""
        sums: dict[str, list[float]] = {}
        for row, values in zip(self.rows, nats.numpy(), strict=True):
            size = self.token_bytes[row.batch.target[0]].numpy()
            for number in np.unique(row.source).tolist():
                here = row.source == number
                pair = sums.setdefault(row.names[number] if number < len(row.names) else str(number), [0.0, 0.0])
                pair[0] += float(values[here].sum())
                pair[1] += float(size[here].sum())
        return {name: nll / math.log(2) / max(1.0, size) for name, (nll, size) in sums.items()}

    def _by_position(self, nats: Tensor) -> list[list[float]]:
        """[tokens of the document that came before, mean loss], in powers of two."""
        seen = np.concatenate([row.seen for row in self.rows])
        values = nats.flatten().numpy()
        out = []
        for low in (2**k for k in range(int(seen.max()).bit_length())):
            here = (seen >= low) & (seen < 2 * low)
            if here.any():
                out.append([float(seen[here].mean()), float(values[here].mean())])
        return out

    def sample(self, network: Any, processes: Processes, tokens: int = 48) -> str:
        """'' where the network is sharded."""
        if processes.mesh is not None:
            return ""
        prompt = self.rows[0].batch.ids[0, :12].tolist()
        out = greedy(network, prompt, min(tokens, self.config.max_position_embeddings - 13))
        return f"{self.tokenizer.decode(prompt)}|{self.tokenizer.decode(out)}"


def pretraining(corpora: list[Corpus], weights: list[float], recipe: Recipe, config: ModelConfig, device: str) -> Job:
    """The job of a resolved recipe. UserError if a corpus is too small for it."""
    d = recipe.data
    length = d.sequence_length or 1
    rows = (d.batch_tokens or 0) // length
    source = Batches(corpora, weights, length, rows, recipe.run.seed, bool(d.document_mask))
    size = sum(c.manifest["splits"]["train"]["bytes"] for c in corpora)
    bytes_per_token = size / max(1, sum(c.length("train") for c in corpora))

    def further(means: dict[str, float]) -> dict[str, float]:
        return {"bits_per_byte": means["loss"] / math.log(2) / bytes_per_token}

    cost = Cost("tokens", length, config.flops_per_token(length) * length, 6 * config.matrix_parameters * length)
    store, look = ModelFolder(config, recipe.run.seed, corpora[0].tokenizer), Heldout(corpora, recipe, config, device)
    return Job("pretraining", source, next_token, store, cost, kind, look, further)


def check_shares(rows: int, world: int, length: int) -> None:
    """UserError unless each process gets rows of a batch."""
    if rows < world:
        few = f"{rows} rows, too few for {world} processes"
        raise UserError(f"data.batch_tokens is {few}; set it to at least {world * length}", field="data.batch_tokens")
