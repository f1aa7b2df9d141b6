"""The chat page in a real browser: what a person does, by mouse and by keyboard, and that nothing leaves the origin."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from conftest import Running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no browser here"),
    pytest.mark.skipif(
        not (Path(__file__).parents[2] / "craton/serve/static/app.js").exists(), reason="the page was not built"
    ),
]
INPUT = "textarea[aria-label=Message]"
SHEET = "textarea.sheet"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield b
        b.close()


class Visit:
    """A page of a fresh browser profile, with what it asked for and complained of."""

    def __init__(self, browser, url: str, wide: bool = True, **more: object):
        self.context = browser.new_context(
            viewport={"width": 1200, "height": 800} if wide else {"width": 390, "height": 800},
            accept_downloads=True,
            **more,
        )
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page, self.url = self.context.new_page(), url
        self.page.set_default_timeout(15_000)
        self.problems: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on(
            "request",
            lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.problems.append(f"asked {r.url}"),
        )
        self.page.goto(url)
        self.page.wait_for_selector("body.ready")

    def send(self, text: str, wait: bool = True) -> None:
        self.page.fill(INPUT, text)
        self.page.keyboard.press("Enter")
        if wait:
            self.done()

    def done(self) -> None:
        self.page.wait_for_selector("body:not(.busy)")

    def answers(self) -> list[str]:
        return [e.inner_text() for e in self.page.query_selector_all(".message.assistant .prose")]


@pytest.fixture
def visit(browser, server):
    v = Visit(browser, server.url)
    yield v
    assert v.problems == []
    v.context.close()


def test_size(server):
    sizes = {}
    for name in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg", "/page/Temml.woff2"):
        got = server.client.get(name, headers={"accept-encoding": "gzip"})
        sizes[name] = int(got.headers["content-length"])
        assert (
            got.status_code == 200
            and got.headers.get("content-encoding") == "gzip"
            and "default-src 'none'" in got.headers["content-security-policy"]
        )
    assert sum(sizes.values()) < 300_000, sizes


def test_send_and_meter(visit):
    visit.send("Count from 1 to 5.")
    assert visit.answers() == [
        "One, two, three, four, five: I can count, and here is bold and code. That is all I know."
    ]
    assert (
        visit.page.query_selector(".prose strong").inner_text() == "bold"
        and visit.page.query_selector(".prose code").inner_text() == "code"
    )
    thought = visit.page.query_selector("details.thinking")
    assert not thought.evaluate("e => e.open")
    thought.query_selector("summary").click()
    assert tiny.THOUGHT in thought.inner_text()
    meter = visit.page.query_selector(".message .meter").inner_text()
    assert "tokens ·" in meter and "tok/s" in meter and "first after" in meter and "prompt" in meter
    visit.send("Count from 1 to 5.")
    assert "cached" in visit.page.query_selector_all(".message .meter")[1].inner_text()


def test_stop(visit):
    visit.page.evaluate("localStorage.setItem('craton.model', '\"base\"')")
    visit.page.reload()
    visit.page.wait_for_selector("body.ready")
    assert "only pretrained" in visit.page.query_selector(".notice").inner_text()
    visit.page.keyboard.press("Control+,")
    visit.page.fill("[aria-label='Most tokens']", "100000")
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Escape")
    visit.page.route(
        "**/v1/completions",
        lambda route: route.continue_(
            post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True})
        ),
    )
    visit.page.fill(SHEET, "import os")
    visit.page.click("text=Continue")
    visit.page.wait_for_selector("body.busy")
    visit.page.wait_for_selector(".mirror mark")
    visit.page.keyboard.press("Escape")
    visit.done()
    assert visit.page.input_value(SHEET).startswith("import os")


def base(v, text=""):
    """A fresh notebook of the base model."""
    v.page.evaluate("localStorage.setItem('craton.model', '\"base\"')")
    v.page.reload()
    v.page.wait_for_selector("body.ready")
    if text:
        v.page.fill(SHEET, text)


def test_a_base_model_has_a_notebook(visit):
    base(visit, "import os\nimport sys\n")
    assert not visit.page.query_selector(INPUT).is_visible()
    visit.page.keyboard.press("Control+Enter")
    visit.done()
    first = visit.page.input_value(SHEET)
    assert first.startswith("import os\nimport sys\n") and len(first) > 25
    assert visit.page.query_selector(".mirror mark").inner_text().strip() in first
    assert "tokens" in visit.page.query_selector(".notebook .meter").inner_text()
    visit.page.keyboard.type("# mine\n")
    visit.page.click("text=Continue")
    visit.done()
    assert visit.page.input_value(SHEET).startswith(first + "# mine\n")
    marks = [m.inner_text() for m in visit.page.query_selector_all(".mirror mark")]
    assert len(marks) == 2 and "# mine" not in "".join(marks)
    visit.page.click("[aria-label='Undo (Ctrl Z)']")
    assert visit.page.input_value(SHEET) == first + "# mine\n"
    visit.page.focus(SHEET)
    visit.page.keyboard.press("Control+z")
    assert visit.page.input_value(SHEET) == first
    visit.page.click("[aria-label='Token probabilities']")
    assert len(visit.page.query_selector_all(".scores .token")) > 5
    visit.page.wait_for_timeout(800)
    visit.page.reload()
    visit.page.wait_for_selector("body.ready")
    assert visit.page.input_value(SHEET) == first and "import os" in visit.page.query_selector(".list").inner_text()
    visit.page.keyboard.press("Control+,")
    assert not visit.page.query_selector("[aria-label='System prompt']")
    assert visit.page.get_attribute("[aria-label='Most tokens']", "placeholder") == "256"


CODE = "def __init__(self):\n    # *not bold*\n\tself.x = 1  # <b>\n"


def test_what_is_typed_is_shown_as_typed(visit):
    visit.page.fill(INPUT, "  " + CODE)
    visit.page.keyboard.press("Enter")
    visit.done()
    assert visit.page.evaluate("document.querySelector('.bubble').textContent") == "  " + CODE
    assert not visit.page.query_selector(".bubble strong, .bubble em, .bubble b")
    visit.page.reload()
    visit.page.wait_for_selector(".bubble")
    assert visit.page.evaluate("document.querySelector('.bubble').textContent") == "  " + CODE


def event(text, finish=None):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return "data: " + json.dumps({"choices": [choice]}) + "\n\n"


def stream(visit, *events):
    """Answers are these events from now on."""
    head = {"content-type": "text/event-stream"}
    visit.page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, headers=head, body="".join(events)))


def below(visit):
    return visit.page.evaluate("(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.querySelector('main'))")


def test_the_end_stays_in_view_unless_the_reader_goes_up(visit):
    stream(visit, *[event(f"Line {i}.\n\n") for i in range(120)], event("", "stop"))
    visit.send("go")
    visit.page.wait_for_timeout(200)
    assert below(visit) < 5
    visit.page.mouse.move(600, 400)
    visit.page.mouse.wheel(0, -600)
    visit.page.wait_for_timeout(200)
    assert below(visit) > 300 and visit.page.query_selector(".to-end").is_visible()
    visit.page.evaluate("document.querySelector('.thread').style.paddingBottom = '400px'")  # something grows
    visit.page.wait_for_timeout(200)
    assert below(visit) > 600
    visit.page.click(".to-end")
    assert below(visit) < 5 and not visit.page.query_selector(".to-end").is_visible()


def test_a_stream_that_breaks_off_is_told(visit):
    stream(visit, event("Half an ans"))
    visit.send("go")
    assert "before it was complete" in visit.page.query_selector(".error").inner_text()
    assert "Half an ans" in visit.page.query_selector(".message.assistant").inner_text()


def test_a_server_that_dies_in_the_middle(browser, model_folder, tmp_path):
    r = Running(f"base={model_folder}", cwd=tmp_path)
    v = Visit(browser, r.url)
    v.page.route(
        "**/v1/completions",
        lambda route: route.continue_(
            post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True, "max_tokens": 900})
        ),
    )
    v.page.fill(SHEET, "import os")
    v.page.click("text=Continue")
    v.page.wait_for_selector(".mirror mark")
    r.process.kill()
    r.process.wait()
    v.page.wait_for_selector(".error >> text=The connection to the server broke")
    assert len(v.page.input_value(SHEET)) > len("import os")
    v.context.close()


def test_an_answer_that_was_cut_off_goes_on(visit):
    visit.page.keyboard.press("Control+,")
    visit.page.fill("[aria-label='Most tokens']", "30")
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Escape")
    visit.send("Count from 1 to 5.")
    (cut,) = visit.answers()
    visit.page.click(".note >> text=Continue")
    visit.done()
    assert len(visit.page.query_selector_all(".message.assistant")) == 1
    assert visit.answers()[0].startswith(cut[:10]) and len(visit.answers()[0]) > len(cut)


def test_deleting_can_be_undone(visit):
    visit.send("Tell me a joke.")
    visit.send("Count from 1 to 5.")
    visit.page.click("[aria-label='Delete from here'] >> nth=0")
    assert len(visit.page.query_selector_all(".message")) == 1
    visit.page.click("#toast >> text=Undo")
    assert len(visit.page.query_selector_all(".message")) == 4
    visit.page.reload()
    visit.page.wait_for_selector("body.ready")
    assert len(visit.page.query_selector_all(".message")) == 4


def test_likeliest_tokens_come_first_whatever_their_names(visit):
    scores = {"7": -3.0, "1": -2.0, "a": -0.2}
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.2], "top_logprobs": [scores], "text_offset": [0]}
    chunk = {"choices": [{"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": "stop"}]}
    body = "data: " + json.dumps(chunk) + "\n\ndata: [DONE]\n\n"
    visit.page.route("**/v1/completions", lambda r: r.fulfill(status=200, body=body))
    base(visit, "x")
    visit.page.evaluate("localStorage.setItem('craton.scores', 'true')")
    visit.page.click("text=Continue")
    visit.page.wait_for_selector(".scores .token")
    visit.page.hover(".scores .token")
    assert [e.inner_text() for e in visit.page.query_selector_all(".tip code")] == ["a", "1", "7"]


def test_edit_branch_regenerate(visit):
    visit.send("Tell me a joke.")
    visit.page.hover(".message.user")
    visit.page.click("[aria-label='Edit and ask again']")
    visit.page.fill("textarea.edit", "Count from 1 to 5.")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector(".turns")
    visit.done()
    assert visit.answers()[0].startswith("One, two") and "2/2" in visit.page.query_selector(".turns").inner_text()
    visit.page.click("[aria-label='Previous version']")
    assert visit.answers() == [tiny.SHORT]
    visit.page.click("[aria-label='Answer again']")
    visit.page.wait_for_function("() => document.querySelectorAll('.turns').length == 2")
    visit.done()
    assert visit.answers() == [tiny.SHORT]
    visit.page.reload()
    visit.page.wait_for_selector(".message.assistant")
    assert visit.page.query_selector_all(".turns")[1].inner_text().split() == ["2/2"]


def test_history_search_export_import(visit, tmp_path):
    for text in ("Tell me a joke.", "Count from 1 to 5."):
        visit.page.keyboard.press("Control+Shift+O")
        visit.send(text)
    assert [e.inner_text() for e in visit.page.query_selector_all(".list .title")] == [
        "Count from 1 to 5.",
        "Tell me a joke.",
    ]
    visit.page.keyboard.press("Control+k")
    visit.page.keyboard.type("there, FRIEND")
    rows = visit.page.query_selector_all(".list .title")
    assert len(rows) == 1 and rows[0].query_selector("mark").inner_text() == "there, friend"
    rows[0].click()
    assert visit.answers() == [tiny.SHORT]
    visit.page.fill("[aria-label='Search conversations']", "")
    visit.page.click("[aria-label='Export this conversation']")
    with visit.page.expect_download() as got:
        visit.page.click("dialog >> button:has-text('Markdown')")
    assert "## user\n\nTell me a joke." in Path(got.value.path()).read_text()
    with visit.page.expect_download() as got:
        visit.page.click("text=Export all")
    saved = tmp_path / "all.json"
    saved.write_bytes(Path(got.value.path()).read_bytes())
    assert len(json.loads(saved.read_text())) == 2
    visit.page.set_input_files("input[type=file]", str(saved))
    visit.page.wait_for_function("() => document.querySelectorAll('.list .row').length == 4")
    visit.page.hover(".list .row >> nth=0")
    visit.page.click(".list .row >> nth=0 >> .icon")
    visit.page.click("dialog >> button:has-text('Delete')")
    visit.page.wait_for_function("() => document.querySelectorAll('.list .row').length == 3")
    (tmp_path / "bad.json").write_text("[{}]")
    visit.page.set_input_files("input[type=file]", str(tmp_path / "bad.json"))
    visit.page.wait_for_selector("#toast.shown >> text=no conversations")


def test_probabilities(visit):
    visit.send("Count from 1 to 5.")
    visit.page.click("[aria-label='Token probabilities']")
    tokens = visit.page.query_selector_all(".token")
    assert "".join(t.inner_text() for t in tokens).startswith("One, two") and len(tokens) > 10
    tokens[2].hover()
    rows = visit.page.query_selector_all(".tip .row")
    assert len(rows) == 5 and "%" in rows[0].inner_text()
    tokens[0].focus()
    visit.page.keyboard.press("ArrowRight")
    assert (
        visit.page.evaluate("document.activeElement.dataset.i") == "1"
        and not visit.page.query_selector(".tip").is_hidden()
    )


def test_blind_vote(visit, server):
    visit.page.click("[aria-label='Side by side']")
    visit.page.select_option("[aria-label='Contender 2: model']", "chat")
    visit.page.click(".contender >> nth=1 >> text=Settings")
    visit.page.fill("dialog [aria-label=Temperature]", "1.5")
    visit.page.click("dialog >> text=Done")
    visit.send("Tell me a joke.")
    visit.page.wait_for_selector(".vote")
    assert [e.inner_text() for e in visit.page.query_selector_all(".side header b")] == ["A", "B"]
    visit.page.click("text=B is better")
    visit.page.wait_for_selector(".side.won")
    assert sorted(e.inner_text() for e in visit.page.query_selector_all(".side header b")) == [
        "chat",
        "chat, temperature 1.5",
    ]
    with visit.page.expect_download() as got:
        visit.page.click("text=Votes")
    vote = json.loads(Path(got.value.path()).read_text().splitlines()[-1])
    assert (
        vote["vote"] == "right"
        and vote["messages"] == [{"role": "user", "content": "Tell me a joke."}]
        and {1.5, None} == {vote[s]["settings"].get("temperature") for s in ("left", "right")}
    )
    kept = next(Path(a) for a in server.process.args if str(a).endswith("votes.jsonl"))
    assert json.loads(kept.read_text().splitlines()[-1])["right"] == vote["right"]
    visit.send("Count from 1 to 5.")
    assert len(visit.page.query_selector_all(".round")) == 2
    visit.page.wait_for_selector(".vote")
    assert visit.page.evaluate("document.querySelector('.vote').getBoundingClientRect().bottom < innerHeight")
    visit.page.reload()
    visit.page.wait_for_selector("body.ready")
    visit.page.click("[aria-label='Side by side']")
    assert len(visit.page.query_selector_all(".round")) == 2


def test_tools(visit):
    visit.page.keyboard.press("Control+,")
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get current weather for a location.",
            "parameters": {
                "type": "object",
                "properties": {"location": {"type": "string", "description": "City name"}},
                "required": ["location"],
            },
        },
    }
    visit.page.fill("[aria-label=Tools]", "{")
    visit.page.keyboard.press("Tab")
    assert visit.page.query_selector(".wrong >> text=not JSON")
    visit.page.fill("[aria-label=Tools]", json.dumps([tool]))
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Escape")
    visit.send("What is the weather in Rome?")
    assert (
        "get_weather" in visit.page.query_selector(".call").inner_text()
        and "Rome" in visit.page.query_selector(".call pre").inner_text()
    )
    visit.page.fill("[aria-label='Result of get_weather']", "sunny")
    visit.page.click("text=Give result")
    visit.page.wait_for_function("() => document.querySelectorAll('.message.assistant').length == 2")
    visit.done()
    assert visit.answers() == ["It is sunny in Rome."]


def test_markdown_is_rendered_and_harmless(visit):
    """Code with a copy button, maths, tables; scripts, pictures and frames do nothing."""
    text = '# Title\n\n```python\ndef f(x):\n    return x  # note\n```\n\n$$\\int_0^1 x^2\\,dx = \\frac13$$ and $e^{i\\pi}$ but $5 and $6\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> ![p](http://evil.example/p.png) [l](javascript:window.hacked=1) <iframe src="http://evil.example"></iframe>'
    visit.page.evaluate("localStorage.setItem('craton.hack', '0')")
    stream(visit, event(text), event("", "stop"))
    visit.send("go")
    box = visit.page.query_selector(".message.assistant .prose")
    assert (
        box.query_selector("h1").inner_text() == "Title"
        and len(box.query_selector_all("math")) == 2
        and box.query_selector("td").inner_text() == "1"
    )
    assert box.query_selector(".hljs-keyword").inner_text() == "def" and "$5 and $6" in box.inner_text()
    box.query_selector(".copy").click()
    assert visit.page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return x  # note"
    assert (
        visit.page.evaluate("window.hacked") is None
        and not box.query_selector_all("img, script, iframe")
        and not box.query_selector("a[href^=javascript]")
    )


def test_dark_and_settings_know_the_defaults(visit, browser, server):
    assert visit.page.evaluate("document.documentElement.dataset.theme") == "light"
    visit.page.click("[aria-label='Light or dark']")
    assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 27, 26)"
    visit.page.reload()
    visit.page.wait_for_selector("body.ready")
    assert visit.page.evaluate("document.documentElement.dataset.theme") == "dark"
    visit.page.keyboard.press("Control+,")
    assert visit.page.input_value("[aria-label=Temperature]") == "0"  # the model's generation_config.json
    visit.page.select_option("[aria-label=Model]", "base")
    assert visit.page.input_value("[aria-label=Temperature]") == "1"
    dark = Visit(browser, server.url, color_scheme="dark")
    assert dark.page.evaluate("document.documentElement.dataset.theme") == "dark" and not dark.problems
    dark.context.close()


def test_keyboard_only(visit):
    """Write, send, stop, search, open, settings, without a mouse; focus is always visible."""
    keyboard = visit.page.keyboard
    keyboard.type("Tell me a joke.")
    keyboard.press("Shift+Enter")
    keyboard.type("Please.")
    assert visit.page.input_value(INPUT) == "Tell me a joke.\nPlease."
    keyboard.press("Enter")
    visit.page.wait_for_selector(".message.assistant .meter")
    keyboard.press("ArrowUp")
    assert visit.page.evaluate("document.activeElement.className") == "edit"
    keyboard.press("Escape")
    keyboard.press("Control+k")
    keyboard.press("Tab")
    keyboard.press("Enter")
    reached = set()
    for _ in range(40):
        keyboard.press("Tab")
        reached.add(
            visit.page.evaluate(
                "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
            )
        )
    assert {
        "Message",
        "Model",
        "Settings",
        "Side by side",
        "Copy",
        "Answer again",
        "Token probabilities",
        "Search conversations",
    } <= reached, reached
    visit.page.focus(INPUT)
    keyboard.press("Control+,")
    assert visit.page.evaluate("document.activeElement.getAttribute('aria-label')") == "System prompt"
    keyboard.press("Escape")
    assert visit.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Message"


def test_phone(browser, server):
    v = Visit(browser, server.url, wide=False)
    v.send("Count from 1 to 5.")
    assert v.page.evaluate("document.documentElement.scrollWidth") <= 390
    v.page.click("[aria-label=History]")
    v.page.click("text=New chat")
    assert v.page.query_selector(".empty") and v.problems == []
    v.context.close()


def test_key_and_restart(browser, chat_folder, tmp_path):
    """A server that wants a key is asked with one; killed and started again, the history is still there."""
    key = "secret-0123456789"
    r = Running(f"chat={chat_folder}", env={"CRATON_API_KEY": key}, cwd=tmp_path)
    context = browser.new_context()
    page = context.new_page()
    page.goto(r.url)
    page.fill("dialog input[type=password]", key)
    page.click("dialog >> text=Keep")
    page.wait_for_function("() => document.querySelector('.picker').value == 'chat'")
    page.fill(INPUT, "Tell me a joke.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .meter")
    port = r.url.rsplit(":", 1)[1]
    r.process.kill()
    r.process.wait()
    page.fill(INPUT, "Count from 1 to 5.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".error >> text=cannot be reached")
    again = Running(f"chat={chat_folder}", port=port, env={"CRATON_API_KEY": key}, cwd=tmp_path)
    page.reload()
    page.wait_for_selector("body.ready")
    assert [e.inner_text() for e in page.query_selector_all(".message.user .bubble")] == [
        "Tell me a joke.",
        "Count from 1 to 5.",
    ]
    page.click("[aria-label='Answer again'] >> nth=-1")
    page.wait_for_selector(".message.assistant .prose >> text=One, two")
    again.process.kill()
    context.close()
