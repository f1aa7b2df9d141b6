"""Indexes on a server: searched and asked, by several at once, and wrong requests named."""

from concurrent.futures import ThreadPoolExecutor

from craton.retrieval.index import build
from tests.serve.conftest import Running


def test_search_and_answers(model_folder, tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(20):
        (tmp_path / "d" / f"{i}.txt").write_text(
            f"The keeper of tower {i} is called Anna Beck{i}.\n\nBirds sing there.\n"
        )
    build([str(tmp_path / "d")], tmp_path / "towers")
    server = Running(f"base={model_folder}", "--index", str(tmp_path / "towers"))
    try:

        def ask(i):
            answer = server.post("/v1/ask", json={"question": f"Who is the keeper of tower {i}?"}).json()
            return answer["found"] and f"Beck{i}." in answer["answer"] and answer["citations"][0]["supports"]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(20)))
        found = server.post(
            "/v1/search", json={"query": "keeper tower 17", "index": "towers", "max_num_results": 3}
        ).json()
        assert len(found["results"]) == 3 and found["results"][0]["document"].endswith("17.txt")
        none = server.post("/v1/ask", json={"question": "Who is the mayor of Atlantis?"}).json()
        assert none == {"answer": "Not in the documents.", "found": False, "citations": []}
        for body, status in (({"query": "x", "index": "other"}, 404), ({"query": ""}, 400), ({"query": " "}, 400)):
            wrong = server.post("/v1/search", json=body)
            assert wrong.status_code == status and wrong.json()["error"]["message"]
        assert "/v1/ask" in server.client.get("/openapi.json").json()["paths"]
    finally:
        server.stop()


def test_without_an_index(model_folder):
    server = Running(f"base={model_folder}")
    try:
        wrong = server.post("/v1/ask", json={"question": "who?"})
        assert wrong.status_code == 404 and "--index" in wrong.json()["error"]["message"]
    finally:
        server.stop()
