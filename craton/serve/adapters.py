"""Adapters that come and go while the server runs, by the endpoints that vLLM has for it."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from craton.base import UserError
from craton.serve import shapes
from craton.serve.reply import State
from craton.serve.schema import LoadAdapterRequest, UnloadAdapterRequest
from craton.serve.served import ApiError, load_adapter


def routes(state: State) -> APIRouter:
    """Load one from a folder of this machine, and drop it."""
    router = APIRouter()

    @router.post(**state.route("/v1/load_lora_adapter", "Serve an adapter from a folder of this machine", shapes.DONE))
    async def load(body: LoadAdapterRequest) -> Response:
        base, known = state.base(), state.models.get(body.lora_name)
        if (known is not None and known.parent is None) or body.lora_name in state.settings.aliases:
            raise ApiError(400, f"lora_name: {body.lora_name!r} is a model that is served", "lora_name")
        if known is not None and not body.load_inplace:
            raise ApiError(400, f"lora_name: {body.lora_name!r} is loaded already; drop it first", "lora_name")
        try:
            state.models[body.lora_name] = await load_adapter(base, body.lora_name, Path(body.lora_path))
        except UserError as error:
            raise ApiError(400, str(error), "lora_path") from None
        return JSONResponse({"status": f"Success: LoRA adapter '{body.lora_name}' added successfully."})

    @router.post(**state.route("/v1/unload_lora_adapter", "Drop an adapter; its answers are finished", shapes.DONE))
    async def unload(body: UnloadAdapterRequest) -> Response:
        served = state.models.get(body.lora_name)
        if served is None or served.parent is None:
            raise ApiError(404, f"lora_name: there is no adapter {body.lora_name!r}", "lora_name")
        del state.models[body.lora_name]
        await served.worker.between_steps(lambda: served.talker.engine.drop_adapter(body.lora_name))
        return JSONResponse({"status": f"Success: LoRA adapter '{body.lora_name}' removed successfully."})

    return router
