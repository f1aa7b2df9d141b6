"""Adapters beside a base on one server: named in requests, listed, loaded and dropped while it runs."""

from craton.model.lora import LoraSpec
from tests.adapters import made_up
from tests.serve.conftest import Running


def test_adapters_on_a_server(model_folder, tmp_path):
    """Each name answers as itself; what is wrong is said in the dialect's words."""
    for i in range(2):
        made_up(model_folder, tmp_path / f"a{i}", LoraSpec(4, 8.0), i, 0.3)
    server = Running(f"base={model_folder}", "--adapter", f"one={tmp_path / 'a0'}")

    def said(name):
        body = {"model": name, "prompt": "the river", "max_tokens": 8, "temperature": 0}
        return server.post("/v1/completions", json=body)

    def text(name):
        return said(name).json()["choices"][0]["text"]

    try:
        listed = {m["id"]: m["parent"] for m in server.client.get("/v1/models").json()["data"]}
        assert listed == {"base": None, "one": "base"}
        assert text("one") != text("base")
        new = {"lora_name": "two", "lora_path": str(tmp_path / "a1")}
        assert said("two").status_code == 404
        assert server.post("/v1/load_lora_adapter", json=new).status_code == 200
        assert len({text("base"), text("one"), text("two")}) == 3
        assert server.post("/v1/load_lora_adapter", json=new).status_code == 400  # there is one of this name
        bad = server.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(tmp_path)})
        assert bad.status_code == 400 and "adapter_config.json" in bad.json()["error"]["message"]
        assert server.post("/v1/load_lora_adapter", json={**new, "lora_name": "base"}).status_code == 400
        assert server.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 200
        assert said("two").status_code == 404 and text("one") != text("base")
    finally:
        server.stop()
