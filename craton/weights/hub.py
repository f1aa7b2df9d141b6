"""Published models from a hub (huggingface.co, or what HF_ENDPOINT names) into a folder. Weights as safetensors
only."""

from pathlib import Path
from typing import Any

from craton.base import UserError, amount, count, say
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
    from huggingface_hub import HfApi, errors, snapshot_download

    if name.count("/") != 1:
        raise UserError(f"{name}: give a model as ORG/NAME")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        weights = [f.size or 0 for f in info.siblings or [] if f.rfilename.endswith(".safetensors")]
        if not weights:
            raise UserError(f"{name}: no safetensors there; other formats can run code when opened and are not taken")
        say(f"{name} at {(info.sha or 'unknown')[:12]}: {amount(sum(weights), 'B')} of weights")
        snapshot_download(
            name, revision=info.sha or revision, local_dir=out, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: its publisher asks for consent; accept the licence on its page and set HF_TOKEN"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        what = f"model or revision {revision}" if revision else "model"
        raise UserError(f"{name}: no such {what}, or it is private (set HF_TOKEN)") from None
    except errors.HFValidationError:
        raise UserError(f"{name}: not a model name; give ORG/NAME") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: the download failed ({_line(error)}); run the same command again to go on") from None
    except Exception as error:  # the HTTP library's own
        if not type(error).__module__.startswith(("http", "requests", "urllib3")):
            raise
        raise UserError(f"{name}: the hub cannot be reached ({_line(error)}); run the same command again") from None
    config = read_config(out)
    Stored(out)  # every file of the index is there and whole
    kind, parameters = config.model_type, config.parameters
    say(f"{out}: {kind}, {count(parameters)} parameters")
    return {"model": name, "out": str(out), "revision": info.sha, "parameters": parameters, "model_type": kind}
