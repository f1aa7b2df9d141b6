"""Published models from a hub (huggingface.co, or what HF_ENDPOINT names) into a folder. Weights as safetensors
only."""

from pathlib import Path
from typing import Any

from craton.base import UserError, count, say
from craton.weights.folder import Stored, read_config

WANTED = (
    "*.safetensors *.safetensors.index.json config.json generation_config.json tokenizer* tekken.json *.model "
    "special_tokens_map.json added_tokens.json vocab.json merges.txt *.jinja LICENSE* README.md USE_POLICY*"
).split()
UNWANTED = ["consolidated*", "original/*", "*/*"]  # the same weights again in other layouts


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def pull(name: str, out: Path, revision: str | None = None) -> dict[str, Any]:
    """Download ORG/NAME into `out`; interrupted, the same call goes on where it stopped. UserError if there is no such
    model, it has no safetensors, it needs consent, or the network fails."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name.count("/") != 1:
        raise UserError(f"{name}: give a model as ORG/NAME")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = {f.rfilename: f.size or 0 for f in info.siblings or []}
        if not any(f.endswith(".safetensors") for f in files):
            raise UserError(
                f"{name}: no safetensors there; weights in other formats can run code when they are opened and are "
                "not taken"
            )
        say(
            f"{name} at {(info.sha or 'unknown')[:12]}: "
            f"{count(sum(s for f, s in files.items() if f.endswith('.safetensors')))}B of weights"
        )
        snapshot_download(
            name, revision=info.sha or revision, local_dir=out, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except GatedRepoError:
        raise UserError(
            f"{name}: its publisher asks for consent; accept the licence on its page and set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(
            f"{name}: no such model"
            + (f" or revision {revision}" if revision else "")
            + ", or it is private (set HF_TOKEN)"
        ) from None
    except HFValidationError:
        raise UserError(f"{name}: not a model name; give ORG/NAME") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: the download failed ({_line(error)}); run the same command again to go on") from None
    except Exception as error:  # the HTTP library's own
        if not type(error).__module__.startswith(("http", "requests", "urllib3")):
            raise
        raise UserError(
            f"{name}: the hub cannot be reached ({_line(error)}); run the same command again to go on"
        ) from None
    config = read_config(out)
    Stored(out)  # every file of the index is there and whole
    say(f"{out}: {config.model_type}, {count(config.parameters)} parameters")
    return {
        "model": name,
        "out": str(out),
        "revision": info.sha,
        "parameters": config.parameters,
        "model_type": config.model_type,
    }
