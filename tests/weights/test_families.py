"""Every family against transformers: logits, cached decoding, greedy text, and the folder written back."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from craton.model.cache import PagedCache, one_sequence
from craton.weights.folder import load_network, write_network
from tests.weights.families import FAMILIES, make


def stored(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    theirs = make(name, tmp_path / "theirs", max_shard_size="100KB")
    ours = load_network(tmp_path / "theirs")
    ids = torch.randint(3, 128, (2, 60))
    with torch.inference_mode():
        whole = ours(ids)
        torch.testing.assert_close(whole, theirs(ids).logits, atol=1e-4, rtol=0)
        cache = PagedCache(ours.config, 4)
        pieces = [ours(ids[:1, a:b], one_sequence(cache, a, b - a)) for a, b in ((0, 20), (20, 21), (21, 37), (37, 60))]
        torch.testing.assert_close(torch.cat(pieces, 1), whole[:1], atol=1e-4, rtol=0)
        made = theirs.generate(ids[:1, :9], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, 9:
        ].tolist()
        cache, at, token, mine = PagedCache(ours.config, 5), 0, ids[:1, :9], []
        for _ in range(64):
            logits = ours(token, one_sequence(cache, at, token.shape[1]))
            at, token = at + token.shape[1], logits[:, -1:].argmax(-1)
            mine.append(int(token))
        assert mine == made
    assert ours.config.parameters == sum(p.numel() for p in ours.parameters())
    write_network(tmp_path / "ours", ours)
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    with torch.inference_mode():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
