"""A model behind an API: what is asked, what its answers count as, and what is said of those that are none."""
import base64
import http.server
import io
import json
import threading

import pytest
from PIL import Image

import evaluate
from support import running


class Server:
    """A chat-completions server on this machine that follows a script: for each request a status, or a status and
    an answer; at the end 200."""

    def __init__(self, statuses=()):
        self.statuses, self.requests, self.keys = list(statuses), [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, request))
                    outer.keys.append(self.headers["Authorization"])
                    status = outer.statuses.pop(0) if outer.statuses else 200
                    status, answer = status if isinstance(status, tuple) else (status, None)
                text = json.dumps({"cards": ["A"], "formula": request["messages"][-1]["role"]})
                body = {"id": "0", "object": "chat.completion", "created": 0, "model": request["model"], "system_fingerprint": "",
                        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
                content = json.dumps(body if status == 200 else {"error": f"status {status}"}).encode()
                content = content if answer is None else answer.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.lock, self.http = threading.Lock(), http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def api(monkeypatch, tmp_path):
    """api(statuses, **knobs): evaluate against a Server; returns it and the rows of eval.jsonl."""
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(evaluate.ApiModel, "pause", 0.01)

    def run(statuses=(), server=None, **knobs):
        server = server or Server(statuses)
        server.statuses = list(statuses)
        evaluate.main(evaluate.Config(**{"api_url": server.url, "api_model": "org/some-model", "out": str(tmp_path / "api"), "episodes": 3,
                                         "env": ("verify_iter=2",), "splits": ("id",), "api_workers": 2, **knobs}))
        return server, running.read_jsonl(tmp_path / "api" / "eval.jsonl")
    return run


def test_a_model_behind_an_api_is_asked_with_the_whole_dialogue_and_its_picture(api):
    server, rows = api(task="gp-vl", env=("resolution=60", "verify_iter=2"), max_new_tokens=77)
    assert len(server.requests) == 6 and set(server.keys) == {"Bearer secret"}
    path, request = server.requests[0]
    assert path == "/v1/chat/completions" and request["model"] == "org/some-model"
    assert request["max_tokens"] == 77 and request["temperature"] == 0
    picture, text = request["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (60, 60) and text["text"].startswith("Make 24")
    second = next(request for _, request in server.requests if len(request["messages"]) == 3)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert rows[0]["checkpoint"] == "org/some-model" and rows[0]["replies"] == 6 and rows[0]["statuses"] == {"illegal_formula": 6}


def test_a_stopped_api_evaluation_asks_only_for_what_is_missing(api, tmp_path, capsys):
    server = Server()
    with pytest.raises(SystemExit):                               # the third request is refused for good
        api([200, 200, 401], server, api_workers=1)
    err = capsys.readouterr().err
    assert "401" in err and "org/some-model" in err and "replies so far" in err and err.count("error:") == 1
    assert len(server.requests) == 3 and len(running.read_jsonl(tmp_path / "api" / "replies.jsonl")) == 2
    _, rows = api((), server, api_workers=1)
    assert len(server.requests) == 3 + 4 and rows[0]["replies"] == 6
    assert api((), server)[1] == rows and len(server.requests) == 7                 # nothing is left to ask
    _, rows = api((), server, seeds="0,1")                        # another seed is; what is known stays known
    assert len(server.requests) == 7 + 6 and [row["seed"] for row in rows] == [0, 1]


def test_a_busy_or_failing_server_is_asked_again_and_a_dead_one_named(api, capsys, monkeypatch):
    server, rows = api([429, 503, 200, 500])
    assert len(server.requests) == 6 + 3 and rows[0]["replies"] == 6
    with pytest.raises(SystemExit):
        api([503] * 99, seeds="5", api_workers=1)
    assert "503" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        api(api_url="http://127.0.0.1:9/v1", seeds="6")
    assert "--api-url http://127.0.0.1:9/v1" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["<html>", "", "[1]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 3}}]}'])
def test_an_answer_that_is_none_is_asked_for_again_and_then_named(api, capsys, answer, tmp_path):
    server, rows = api([200, (200, answer), 200])
    assert len(server.requests) == 7 and rows[0]["replies"] == 6
    with pytest.raises(SystemExit):
        api([(200, answer)] * 99, seeds="5", api_workers=1)
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "org/some-model: " in err and "Traceback" not in err
    with pytest.raises(SystemExit):
        api([(402, '{"error": "no money left"}')] * 99, server, seeds="6", api_workers=1)
    assert len(server.requests) <= 9 and "402" in capsys.readouterr().err     # a refusal is final; one was on its way


def test_half_a_character_and_no_content_are_replies(api, tmp_path):
    for answer in ('{"choices": [{"message": {"role": "assistant", "content": "\\ud800"}}]}',
                   '{"choices": [{"message": {"role": "assistant", "content": null}}]}'):
        server, rows = api([(200, answer)] * 6, out=str(tmp_path / str(len(answer))))
        assert len(server.requests) == 6
        api((), server, out=str(tmp_path / str(len(answer))), seeds="0,1")
        assert len(server.requests) == 12


def test_settings_of_an_api_that_do_not_fit_are_refused_and_no_key_is_shown(api, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for knobs, told in ((dict(api_url="127.0.0.1:9/v1"), "'127.0.0.1:9/v1': expected an address such as https://host/v1"),
                        (dict(api_url="http://[bad"), "expected an address"), (dict(out=str(tmp_path / "file")), "not a file"),
                        (dict(out=str(tmp_path / "run")), "not a run folder")):
        with pytest.raises(SystemExit):
            api(**knobs)
        assert told in capsys.readouterr().err
    for key in ("sekret\x01key", "sekrét"):
        monkeypatch.setenv("API_KEY", key)
        with pytest.raises(SystemExit):
            api()
        assert "plain characters" in (err := capsys.readouterr().err) and key not in err
    monkeypatch.setenv("API_KEY", "secret\n")
    assert set(api()[0].keys) == {"Bearer secret"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        api(seeds="3")
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_another_address_is_another_model_and_a_torn_row_is_played_again(api, tmp_path):
    first, rows = api()
    second, rows = api()
    assert len(second.requests) == 6 and len(rows) == 2
    path = tmp_path / "api" / "eval.jsonl"
    path.write_text(path.read_text()[:-9])
    server, rows = api(server=second)
    assert len(second.requests) == 6 and len(rows) == 2             # the row again, its replies are known


def test_no_request_leaves_without_a_key_of_its_own(api, capsys, monkeypatch):
    """With an empty key the client would send the user's Hugging Face token to the server."""
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    for key in ("", None):
        monkeypatch.delenv("API_KEY") if key is None else monkeypatch.setenv("API_KEY", key)
        server = Server()
        with pytest.raises(SystemExit):
            api((), server)
        assert not server.requests and "API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("API_KEY", "x")
    with pytest.raises(SystemExit):
        api(out="")
    assert "--api-url needs --api-model and --out" in capsys.readouterr().err
