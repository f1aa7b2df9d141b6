"""Real documents, where they are at hand: a person's own are kept, pages of the web are judged as before."""

import sysconfig
from pathlib import Path

import pytest

from craton.corpus.build import BuildOptions, build
from craton.corpus.store import Corpus
from tests.conftest import craton

DATA = Path(__file__).parents[3] / "shared" / "data" / "text"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="the real texts are not here")]
COPIES = {"exact_duplicate", "near_duplicate", "empty"}


@pytest.mark.parametrize(
    "name", ["rust_book.jsonl.xz", "python_peps.jsonl.xz", "udhr_multilingual.jsonl.xz", "tinyshakespeare", "stdlib"]
)
def test_own_documents_are_kept(tmp_path, name):
    source = sysconfig.get_path("stdlib") + "/email" if name == "stdlib" else str(DATA / name)
    manifest = build(BuildOptions([source], [], []), tmp_path / "c")
    (facts,) = manifest["sources"]
    assert set(manifest["dropped"]) <= COPIES
    copies = sum(manifest["dropped"].get(why, {"bytes": 0})["bytes"] for why in COPIES)
    assert facts["bytes"] >= 0.98 * (facts["read_bytes"] - copies)
    corpus = Corpus(tmp_path / "c")
    names = [{corpus.name_of(r) for r in corpus.rows(s)} for s in ("train", "heldout")]
    assert names[1] and (not names[0] & names[1] or len(names[0] | names[1]) == 1)


def test_pages_of_the_web_are_judged_as_before(tmp_path):
    manifest = build(BuildOptions([str(DATA / "c4_sample.jsonl.xz")], [], [], rules="web"), tmp_path / "c")
    dropped = {why: d["documents"] for why, d in manifest["dropped"].items()}
    expected = {"gopher_repeated_ngrams": 6, "gopher_stop_words": 1, "gopher_symbols": 1, "gopher_under_50_words": 22}
    assert dropped == expected and manifest["counts"]["kept"] == 210


def test_languages_are_judged_by_their_own_rules(tmp_path):
    """English rules kept 27 of 388 translations of one declaration."""
    manifest = build(BuildOptions([str(DATA / "udhr_multilingual.jsonl.xz")], [], [], rules="web"), tmp_path / "c")
    assert manifest["counts"]["kept"] >= 350


def test_ids_addresses_and_labels_are_not_text(tmp_path):
    flags = ("--text-field", "name", "--skip-bad")  # six countries have no name
    done = craton("corpus", "build", DATA / "world_factbook.jsonl.xz", *flags, "--out", tmp_path / "c")
    assert done.returncode == 0 and "212 documents" in done.stdout and "6 unreadable" in done.stdout
