"""A model behind an API: what is asked, what answers count as, what is said of odd ones."""
import base64
import contextlib
import email.utils
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import socket
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest
from PIL import Image

import envs
import evaluate
from conftest import tiny_folder
from support import api as api_file
from support import running
from test_run_folder import held

SMALL = tiny_folder()


class Server:
    """A chat-completions server on this machine that follows a script.

    For each request it has a status, or a status, an answer and headers; at the end 200. `rule`, a
    function of the request, decides instead where it gives one of these. A function of the handler
    in their place writes the answer itself.
    """

    def __init__(self, statuses=(), rule=None, host="127.0.0.1"):
        self.statuses, self.requests, self.keys = list(statuses), [], []
        self.rule, self.headers = rule, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, request))
                    outer.keys.append(self.headers["Authorization"])
                    outer.headers.append(dict(self.headers))
                    status = outer.statuses.pop(0) if outer.statuses else 200
                status = outer.rule and outer.rule(request) or status
                if callable(status):
                    with contextlib.suppress(OSError):   # the client has gone
                        status(self)
                    return
                status, answer, headers = outer.unpack(status)
                text = json.dumps({"cards": ["A"], "formula": request["messages"][-1]["role"]})
                body = {
                    "id": "0", "object": "chat.completion", "created": 0,
                    "model": request["model"], "system_fingerprint": "",
                    "choices": [{"index": 0, "finish_reason": "stop",
                                 "message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
                if status != 200:
                    body = {"error": f"status {status}"}
                content = (json.dumps(body) if answer is None else answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.lock = threading.Lock()
        kind = type("Http", (http.server.ThreadingHTTPServer,), {
            "address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
        self.http = kind((host, 0), Handler)
        host = f"[{host}]" if ":" in host else host
        self.url = f"http://{host}:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @staticmethod
    def unpack(step):
        """A step of the script as (status, answer or None, headers)."""
        if not isinstance(step, tuple):
            return step, None, {}
        status, answer, *headers = step
        return status, answer, headers[0] if headers else {}


@pytest.fixture
def api(monkeypatch, tmp_path):
    """api(statuses, **knobs): evaluate against a Server; returns it and the rows of eval.jsonl."""
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setattr(api_file.ApiModel, "pause", 0)

    def run(statuses=(), server=None, **knobs):
        server = server or Server(statuses)
        server.statuses = list(statuses)
        defaults = {"api_url": server.url, "api_model": "org/some-model",
                    "out": str(tmp_path / "api"), "episodes": 3, "env": ("verify_iter=2",),
                    "splits": ("id",), "api_workers": 2}
        evaluate.main(evaluate.Config(**{**defaults, **knobs}))
        return server, running.read_jsonl(tmp_path / "api" / "eval.jsonl")
    return run


def test_a_model_behind_an_api_is_asked_with_the_whole_dialogue_and_its_picture(api):
    server, rows = api(task="gp-vl", env=("resolution=60", "verify_iter=2"), max_new_tokens=77)
    assert len(server.requests) == 6 and set(server.keys) == {"Bearer secret"}
    path, request = server.requests[0]
    assert path == "/v1/chat/completions" and request["model"] == "org/some-model"
    assert request["max_tokens"] == 77 and request["temperature"] == 0 and "top_p" not in request
    picture, text = request["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (60, 60) and text["text"].startswith("Make 24")
    second = next(request for _, request in server.requests if len(request["messages"]) == 3)
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert rows[0]["checkpoint"] == "org/some-model" and rows[0]["replies"] == 6
    assert rows[0]["statuses"] == {"illegal_formula": 6}


def test_a_stopped_api_evaluation_asks_only_for_what_is_missing(api, tmp_path, capsys):
    server = Server()
    with pytest.raises(SystemExit):   # the third request is refused for good
        api([200, 200, 401], server, api_workers=1)
    err = capsys.readouterr().err
    assert "401" in err and "org/some-model" in err and "replies so far" in err
    assert err.count("error:") == 1
    assert len(server.requests) == 3
    assert len(running.read_jsonl(tmp_path / "api" / "replies.jsonl")) == 2
    _, rows = api((), server, api_workers=1)
    assert len(server.requests) == 3 + 4 and rows[0]["replies"] == 6
    assert api((), server)[1] == rows and len(server.requests) == 7   # nothing is left to ask
    _, rows = api((), server, seeds="0,1")   # another seed is; what is known stays known
    assert len(server.requests) == 7 + 6 and [row["seed"] for row in rows] == [0, 1]


def test_two_evaluations_of_one_folder_are_refused(api, tmp_path, capsys):
    (tmp_path / "api").mkdir()
    log = tmp_path / "api" / "eval.jsonl"
    log.write_text('{"checkpoint"')        # a row that the other one is writing
    server = Server()
    with held(tmp_path / "api" / ".evaluating.lock") as pid:
        with pytest.raises(SystemExit):
            api((), server)
    assert f"api: process {pid} is evaluating here; wait for its end" in capsys.readouterr().err
    assert not server.requests and log.read_text() == '{"checkpoint"'
    assert len(api((), server)[1]) == 1


def test_a_busy_or_failing_server_is_asked_again_and_a_dead_one_named(api, capsys, monkeypatch):
    server, rows = api([429, 503, 200, 500])
    assert len(server.requests) == 6 + 3 and rows[0]["replies"] == 6
    with pytest.raises(SystemExit):
        api([503] * 99, seeds="5", api_workers=1)
    assert "503" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        api(api_url="http://127.0.0.1:9/v1", seeds="6")
    assert "--api-url http://127.0.0.1:9/v1" in capsys.readouterr().err


def completion(content, ending="stop", **message):
    message = {"role": "assistant", "content": content, **message}
    return 200, json.dumps({"choices": [{"finish_reason": ending, "message": message}]})


@pytest.mark.parametrize("answer", [
    "<html>", "", "[1]", "{}", "3", "null", '"text"', "[" * 100_000,
    '{"choices": []}', '{"choices": {}}', '{"choices": "x"}', '{"choices": [null]}',
    '{"choices": [{"message": null}]}', '{"choices": [{"message": {"content": 3}}]}',
    '{"error": [[]]}',
    *(completion(content)[1] for content in (
        False, {}, [3], ["x"], [{"text": "x"}], [{"type": "text", "text": None}])),
    completion("x", ending=3)[1], completion("x", ending={"a": 1})[1],
    completion(None, refusal=3)[1], '{"error": "\\ud800\\u001b"}',
    '{"choices": [{"error": {"message": "x"}, "finish_reason": "error", '
    '"message": {"content": ""}}]}'])
def test_an_answer_that_is_none_is_asked_for_again_and_then_named(api, capsys, answer, tmp_path):
    server, rows = api([200, (200, answer), 200])
    assert len(server.requests) == 7 and rows[0]["replies"] == 6
    with pytest.raises(SystemExit):
        api([(200, answer)] * 99, seeds="5", api_workers=1)
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "org/some-model: " in err and "Traceback" not in err
    assert err.endswith("\n") and err[:-1].isprintable()
    assert len(running.read_jsonl(tmp_path / "api" / "replies.jsonl")) == 6
    with pytest.raises(SystemExit):
        api([(402, '{"error": "no money left"}')] * 99, server, seeds="6", api_workers=1)
    # a refusal is final, for the others too
    assert len(server.requests) == 8 and "402" in capsys.readouterr().err


def test_half_a_character_and_no_content_are_replies(api, tmp_path):
    for answer in ('{"choices": [{"message": {"role": "assistant", "content": "\\ud800"}}]}',
                   '{"choices": [{"message": {"role": "assistant", "content": null}}]}'):
        server, rows = api([(200, answer)] * 6, out=str(tmp_path / str(len(answer))))
        assert len(server.requests) == 6
        api((), server, out=str(tmp_path / str(len(answer))), seeds="0,1")
        assert len(server.requests) == 12


def test_settings_of_an_api_that_do_not_fit_are_refused_and_no_key_is_shown(
        api, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for knobs, told in (
            (dict(api_url="127.0.0.1:9/v1"),
             "'127.0.0.1:9/v1': expected an address such as https://host/v1"),
            (dict(api_url="http://[bad"), "expected an address"),
            (dict(out=str(tmp_path / "file")), "not a file"),
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
    assert len(api(seeds="3")[0].requests) == 6   # that is about the hub, not about this address


def test_another_address_is_another_model_and_a_torn_row_is_played_again(api, tmp_path):
    first, rows = api()
    second, rows = api()
    assert len(second.requests) == 6 and len(rows) == 2
    path = tmp_path / "api" / "eval.jsonl"
    path.write_text(path.read_text()[:-9])
    server, rows = api(server=second)
    assert len(second.requests) == 6 and len(rows) == 2   # the row again, its replies are known


def test_no_request_leaves_without_a_key_of_its_own(api, capsys, monkeypatch):
    """Nor does the user's Hugging Face token."""
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


def test_replies_that_were_cut_refused_filtered_or_empty_are_counted_and_said(
        api, capsys, tmp_path):
    answers = [completion(None, "length"), completion("{", "length"),
               completion("", "content_filter"), completion(None, refusal="I can't"),
               completion(" \n", None), completion("all of it")]
    server, rows = api(answers, api_workers=1)
    counted = {"content_filter": 1, "length": 2, "refusal": 1, "stop": 2}
    assert rows[0]["endings"] == counted and rows[0]["replies_empty"] == 3
    told = ("org/some-model, id, seed 0: of 6 replies, 1 ended with content_filter, 2 cut at "
            "--max-new-tokens 256 or the server's own limit, 1 ended with refusal, 3 empty\n")
    assert told in capsys.readouterr().out
    kept = running.read_jsonl(tmp_path / "api" / "replies.jsonl")
    assert [row["ending"] for row in kept] == [
        "length", "length", "content_filter", "refusal", "stop", "stop"]
    assert kept[3]["reply"] == "I can't"
    (tmp_path / "api" / "eval.jsonl").unlink()
    # known again, and counted again
    assert api((), server)[1] == rows and told in capsys.readouterr().out
    api([200] * 6, server, seeds="1")
    assert "replies" not in capsys.readouterr().out   # all well: nothing to say


def test_replies_kept_without_an_ending_are_known_and_count_as_whole(api, tmp_path):
    """The digest is part of the file format: no later version pays for a reply again."""
    messages, _ = envs.make_env("gp-l", "id", verify_iter=1).reset(seed="0/evaluate/0", episode=0)
    request = json.dumps(
        ["http://127.0.0.1:9/v1", "org/some-model", 0.0, 256, "id", 0, 0, 0, messages])
    (tmp_path / "api").mkdir()
    digest = hashlib.sha256(request.encode()).hexdigest()
    running.log_jsonl(tmp_path / "api" / "replies.jsonl", request=digest, reply="")
    _, rows = api(api_url="http://127.0.0.1:9/v1", episodes=1, env=("verify_iter=1",))
    assert rows[0]["endings"] == {"stop": 1} and rows[0]["replies_empty"] == 1


def test_a_local_reply_that_was_cut_is_told_from_one_that_ended(monkeypatch, tmp_path, capsys):
    config = evaluate.Config(device="cpu", dtype="float32", max_new_tokens=3)
    pending = {4: ([{"role": "user", "content": "hello"}], True),
               7: ([{"role": "user", "content": "again"}], True)}
    player = evaluate.LocalModel(SMALL, False, config, tmp_path / "kept")
    eos = player.policy.eos_id
    monkeypatch.setattr(player.policy, "generate", lambda *_: [([9, eos], None), ([9, 9, 9], None)])
    replies = player.reply("of", "id", 0, 0, pending)
    assert [ending for _, ending in replies] == ["stop", "length"]
    # from the ids that were kept
    again = evaluate.LocalModel(SMALL, False, config, tmp_path / "kept")
    monkeypatch.setattr(again.policy, "generate", None)
    assert again.reply("of", "id", 0, 0, pending) == replies

    monkeypatch.setattr(evaluate, "LocalModel", lambda *_: SimpleNamespace(
        reply=lambda of, split, seed, turn, pending: [("", "length") for _ in pending],
        forget=lambda of: None))
    rows = []
    config = evaluate.Config(task="gp-l", splits=("id",), episodes=2, env=("verify_iter=2",))
    evaluate.evaluate_model("x", "x", [], config, lambda row, said: rows.append(row))
    assert rows[0]["endings"] == {"length": 4} and rows[0]["replies_empty"] == 4
    told = "x, id, seed 0: of 4 replies, 4 cut at --max-new-tokens 256, 4 empty\n"
    assert told in capsys.readouterr().out


def test_top_p_is_sent_where_it_is_given(api):
    server, _ = api(top_p=0.9, temperature=0.6)
    assert all(request["top_p"] == 0.9 for _, request in server.requests)
    requests = len(server.requests)
    # Without it: another evaluation.
    assert len(api((), server, temperature=0.6)[0].requests) == 2 * requests


def test_fields_of_the_request_are_added_and_left_out(api, capsys):
    extra = ('{"max_tokens": null, "temperature": null, "max_completion_tokens": 4096, '
             '"reasoning_effort": "low"}')
    server, rows = api([completion("", "length")], api_extra=extra)
    for _, request in server.requests:
        assert sorted(request) == ["max_completion_tokens", "messages", "model", "reasoning_effort"]
        assert request["max_completion_tokens"] == 4096 and request["reasoning_effort"] == "low"
    assert rows[0]["settings"]["api_extra"] == json.loads(extra)
    # which is not --max-new-tokens
    assert "1 cut at their limit, 1 empty" in capsys.readouterr().out
    assert len(api((), server, api_extra=extra.replace(": ", ":"))[1]) == 1
    assert len(server.requests) == 6
    _, rows = api((), server)   # without it: another evaluation
    assert len(rows) == 2 and "api_extra" not in rows[1]["settings"] and len(server.requests) == 12
    for text, told in (
            ("{", "Expecting"), ("[1]", "expected a JSON object"),
            ("3", "expected a JSON object"), ("null", "expected a JSON object"),
            ('{"messages": []}', "other than messages"), ("[" * 100_000, "recursion")):
        with pytest.raises(SystemExit):
            api((), server, api_extra=text)
        err = capsys.readouterr().err
        assert "--api-extra '" in err and told in err and err.count("\n") == 1
    assert len(server.requests) == 12


@pytest.mark.parametrize("address, url", [
    ("https://host", "https://host/v1/chat/completions"),
    ("http://host:8000/", "http://host:8000/v1/chat/completions"),
    ("https://host/v1", "https://host/v1/chat/completions"),
    ("https://host/v1/", "https://host/v1/chat/completions"),
    ("https://host/v1beta/openai", "https://host/v1beta/openai/chat/completions"),
    ("https://host/api/v4/", "https://host/api/v4/chat/completions"),
    ("https://host/v1/chat/completions", "https://host/v1/chat/completions"),
    ("https://host/a%2Fb/chat/completions?api-version=1",
     "https://host/a%2Fb/chat/completions?api-version=1"),
    ("https://host/openai?api-version=1", "https://host/openai/chat/completions?api-version=1")])
def test_requests_go_to_the_address_as_it_is_written(address, url):
    assert api_file.completions_url(address) == url


def test_an_address_that_does_not_end_in_v1_is_asked_there(api):
    server = Server()
    api((), server, api_url=server.url.replace("/v1", "/v1beta/openai"))
    assert {path for path, _ in server.requests} == {"/v1beta/openai/chat/completions"}


@pytest.mark.parametrize("status, answer, told", [
    (400, '{"error": {"message": "Unsupported parameter:\\n max_tokens", "code": null}}',
     "HTTP 400 from {url}: Unsupported parameter: max_tokens;"),
    (404, '[{"error": {"code": 404, "message": "no such model"}}]',
     "HTTP 404 from {url}: no such model;"),
    (401, '{"error": "no\\u2028money"}', "HTTP 401 from {url}: no money;"),
    (422, '{"detail": [{"message": "bad"}]}', "HTTP 422 from {url}: bad;"),
    (403, "<b>Forbidden</b>", "HTTP 403 from {url}: <b>Forbidden</b>;"),
    (405, "", "HTTP 405 from {url}: an empty answer;"),
    (503, '{"object": "error", "message": "too busy"}', "HTTP 503 from {url}: too busy;"),
    (200, '{"error": {"message": "quota is used up"}}',
     "HTTP 200 from {url}, which is no chat completion: quota is used up;"),
    (200, '{"choices": [{"error": {"message": "upstream fell"}}]}',
     "HTTP 200 from {url}, which is no chat completion: upstream fell;")])
def test_the_servers_own_words_are_in_the_error(api, capsys, status, answer, told):
    server = Server()
    with pytest.raises(SystemExit):
        api([(status, answer)] * 99, server, api_workers=1)
    assert told.format(url=f"{server.url}/chat/completions") in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_a_refusal_that_is_packed_in_its_own_way_is_a_refusal_all_the_same(api, capsys):
    for status, words, packing in (
            (403, "an answer packed as 'br', which was not asked for", "br"),
            (404, "an answer that is no gzip: Error -3 while decompressing data", "gzip")):
        server = Server()
        with pytest.raises(SystemExit):
            api([(status, "packed", {"Content-Encoding": packing})], server, api_workers=1)
        assert f"HTTP {status} from {server.url}/chat/completions: {words}" in (
            capsys.readouterr().err)
        assert len(server.requests) == 1


def test_content_in_parts_is_joined_without_the_thoughts(api, tmp_path):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
             {"type": "text", "text": "one "},
             {"type": "reasoning", "text": "hm"}, {"type": "text", "text": "two"}]
    _, rows = api([completion(parts), completion([])], api_workers=1)
    kept = running.read_jsonl(tmp_path / "api" / "replies.jsonl")
    assert [row["reply"] for row in kept][:2] == ["one two", ""]
    assert rows[0]["replies_empty"] == 1


def test_the_key_is_in_no_message_and_no_file_and_follows_no_redirect(
        api, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("API_KEY", "sk-a/b+c123456")
    other = Server()
    for status in (301, 302, 307, 308):
        with pytest.raises(SystemExit):
            api([(status, "", {"Location": f"{other.url}/sk-a/b+c123456"})] * 9, api_workers=1)
        assert f"HTTP {status}: redirects to {other.url}/API_KEY;" in capsys.readouterr().err
    assert not other.requests
    with pytest.raises(SystemExit):
        api([completion("it is sk-a/b+c123456", "sk-a/b+c123456"),
             (401, '{"error": "wrong key sk-a\\/b+c123456"}')], api_workers=1)
    assert "wrong key API_KEY;" in (err := capsys.readouterr().err) and "sk-a" not in err
    kept = (tmp_path / "api" / "replies.jsonl").read_text()
    assert "it is API_KEY" in kept and "sk-a" not in kept
    for knobs in (dict(api_url="https://host/v1?key=sk-a/b+c123456"),
                  dict(api_extra='{"key": "sk-a/b+c123456"}')):
        with pytest.raises(SystemExit):
            api(**knobs)
        assert "belongs in API_KEY alone" in (err := capsys.readouterr().err) and "sk-a" not in err


def test_an_address_or_a_proxy_that_cannot_be_used_is_one_line(api, capsys, monkeypatch):
    for address in ("http://1.2.3.999/v1", "http://127.0.0.1:99999/v1", "http://a..b/v1",
                    "http://host/\x01"):
        with pytest.raises(SystemExit):
            api(api_url=address)
        err = capsys.readouterr().err
        assert f"--api-url {address}," in err or f"--api-url {address!r}:" in err
        assert err.count("\n") == 1
    for proxy in ("socks9://127.0.0.1:9", "socks5://127.0.0.1:9", "http://127.0.0.1:x"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        with pytest.raises(SystemExit):
            api(api_url="http://127.0.0.1:9/v1")
        assert "--api-url" in (err := capsys.readouterr().err) and err.count("\n") == 1


# ---- Replies that cannot be had ------------------------------------------------------------------

def outgrown(request):
    """400 for a dialogue that has gone on."""
    if len(request["messages"]) > 1:
        return 400, '{"error": {"message": "longer than 512 tokens"}}'


def test_a_reply_that_cannot_be_had_counts_as_failed_and_the_rest_goes_on(api, tmp_path, capsys):
    server, rows = api(server=Server(rule=outgrown), env=("verify_iter=3",))
    row = rows[0]
    assert row["endings"] == {"failed: http 400": 6, "stop": 3} and row["replies"] == 9
    # they are wrong, but the model neither said nothing nor said it again
    assert row["success"] == row["replies_empty"] == row["repeats"] == 0
    out = capsys.readouterr().out
    assert out.count("org/some-model: a reply counts as failed: HTTP 400 from ") == 1
    assert "longer than 512 tokens\n" in out
    assert "id, seed 0: of 9 replies, 6 not the model's (failed: http 400)\n" in out
    kept = running.read_jsonl(tmp_path / "api" / "replies.jsonl")
    failed = [row for row in kept if row["ending"] == "failed: http 400"]
    assert len(failed) == 6 and {row["reply"] for row in failed} == {""}
    assert all("longer than 512 tokens" in row["why"] for row in failed)
    # each request once, and after each turn of failures one that was answered before
    assert len(server.requests) == 9 + 2
    (tmp_path / "api" / "eval.jsonl").unlink()
    assert api((), server, env=("verify_iter=3",))[1] == rows and len(server.requests) == 11


@pytest.mark.parametrize("status, ending, tries", [
    (413, "http 413", 1), (422, "http 422", 1), (500, "http 500", 6),
    (408, "http 408", 2), (504, "http 504", 2), (lambda handler: None, "connection lost", 6),
    ((200, "<html>"), "no completion", 6), (completion(3), "no completion", 6),
    ((200, "{}", {"Content-Encoding": "br"}), "no completion", 6),
    ((200, "{}", {"Content-Encoding": "gzip"}), "no completion", 6)])
def test_how_often_a_failing_request_is_tried_and_what_it_counts_as(api, status, ending, tries):
    server, rows = api([200, *[status] * tries, 200], api_workers=1)
    assert len(server.requests) == 6 + tries - 1
    assert rows[0]["endings"] == {f"failed: {ending}": 1, "stop": 5}


def test_an_option_that_no_request_can_have_stops_all_and_nothing_counts_as_failed(
        api, tmp_path, capsys):
    server = Server(rule=lambda request: (400, '{"error": "no such field: top_k"}'))
    with pytest.raises(SystemExit):
        api((), server, episodes=50)
    err = capsys.readouterr().err
    assert "the last requests (8) had no reply: HTTP 400 from" in err and "top_k;" in err
    assert 8 <= len(server.requests) <= 10
    assert not running.read_jsonl(tmp_path / "api" / "replies.jsonl")


def test_a_service_that_ends_half_way_stops_all_whatever_it_calls_that(api, tmp_path, capsys):
    """As one does that says 400 when the money is spent."""
    server = Server()
    spent = [(400, '{"error": "your credit is too low"}')]
    with pytest.raises(SystemExit):
        api([200] * 12 + spent * 99, server, episodes=50, api_workers=1)
    assert "(8) had no reply: HTTP 400" in capsys.readouterr().err
    assert len(server.requests) == 12 + 8 + 1   # one that had been answered was tried at last
    assert len(running.read_jsonl(tmp_path / "api" / "replies.jsonl")) == 12
    _, rows = api((), server, episodes=50, api_workers=1)
    assert rows[0]["endings"] == {"stop": 100}


def test_a_stopped_evaluation_knows_from_its_replies_that_the_service_works(api, tmp_path):
    """Else one that stopped before a turn in which all have outgrown the context never ended."""
    server = Server()
    with pytest.raises(SystemExit):
        api([200] * 3 + [401] * 9, server)
    assert len(running.read_jsonl(tmp_path / "api" / "replies.jsonl")) == 3
    server.rule = outgrown
    _, rows = api((), server)
    assert rows[0]["endings"] == {"failed: http 400": 3, "stop": 3}


def test_a_server_that_asks_to_wait_is_given_that_time(api, capsys):
    start = time.monotonic()
    server, _ = api([(429, "", {"Retry-After": "0.4"})], api_workers=1)
    assert 0.4 < time.monotonic() - start < 5 and len(server.requests) == 7
    with pytest.raises(SystemExit):
        api([(429, '{"error": "for today"}', {"Retry-After": "86400"})], server, seeds="1",
            api_workers=1)
    assert "for today (it asks to wait for 86400 seconds);" in capsys.readouterr().err
    assert len(server.requests) == 8
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < api_file.seconds_to_wait(in_a_minute) <= 60
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert [api_file.seconds_to_wait(text) for text in ("45", past, "", "soon", "-3", "nan")] == [
        45, 0, 0, 0, 0, 0]


# ---- Headers and addresses -----------------------------------------------------------------------

def test_a_header_holds_a_secret_that_stands_in_no_file_and_no_message(
        api, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("API_KEY", "sk-0123456789")
    monkeypatch.setenv("OTHER_KEY", "other-0123456789")
    server, _ = api(api_header=("api-key: $API_KEY", "X-Other: a $OTHER_KEY b"))
    for headers in server.headers:
        assert headers["api-key"] == "sk-0123456789" and "Authorization" not in headers
        assert headers["X-Other"] == "a other-0123456789 b"
    for path in (tmp_path / "api").iterdir():
        assert "0123456789" not in path.read_text()
    server, _ = api(api_header=("X-Title: a: b",), seeds="1")   # the usual header stays
    assert server.headers[0]["X-Title"] == "a: b"
    assert server.headers[0]["Authorization"] == "Bearer sk-0123456789"
    capsys.readouterr()
    told = "is it sk-0123456789 or other-0123456789?"
    with pytest.raises(SystemExit):
        api([(401, json.dumps({"error": told}))] * 9, seeds="2",
            api_header=("api-key: $API_KEY", "x: $OTHER_KEY"))
    assert "is it API_KEY or API_KEY?;" in (err := capsys.readouterr().err)
    assert "0123456789" not in err


def test_a_word_for_a_server_that_asks_for_no_key_is_left_in_replies(monkeypatch):
    for key, hidden in (("observation", False), ("lm-studio", False), ("sk-0123456789", True)):
        client = SimpleNamespace(secrets=[key])
        text = f'{{"current {key}": 1}}'
        assert (api_file.ApiModel.hide_key(client, text) != text) == hidden


@pytest.mark.parametrize("header, told", [
    ("api-key: sk-0123456789", "write '$API_KEY' there, in single quotes"),
    ("api-key: $NOT_SET", "--api-header 'api-key': the environment variable NOT_SET is empty"),
    ("sekret", "expected NAME: VALUE, such as 'api-key: $API_KEY'"),
    ("a b: sekret", "expected NAME: VALUE"), (": sekret", "expected NAME: VALUE"),
    ("Content-Length: 3", "'Content-Length': the program sets accept-encoding, content-length"),
    ("x: sekr\u00e9t", "--api-header 'x': its value must be of plain characters"),
    ("x: sekret\ny: z", "must be of plain characters")])
def test_a_header_that_cannot_be_sent_is_refused_without_its_value(
        api, capsys, monkeypatch, header, told):
    monkeypatch.setenv("API_KEY", "sk-0123456789")
    server = Server()
    with pytest.raises(SystemExit):
        api((), server, api_header=(header,))
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and not server.requests
    assert "sekr" not in err and "0123456789" not in err


def test_an_address_of_ip_version_6_is_asked(api, capsys):
    with contextlib.suppress(OSError):   # a machine may have none
        server = Server(host="::1")
        assert len(api((), server, temperature=0.6)[0].requests) == 6
    for address in ("http://[::1/v1", "http://[host]/v1", "http://[::1]:99999/v1"):
        with pytest.raises(SystemExit):
            api(api_url=address)
        assert "expected an address" in capsys.readouterr().err


# ---- Servers that do not end -----------------------------------------------------------------

def hang(handler):
    time.sleep(20)


def slow_headers(handler):
    for letter in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 400:
        handler.wfile.write(bytes([letter]))
        time.sleep(0.05)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(400):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


BOMB = gzip.compress(b" " * 60_000_000, 1)


def bomb(handler):
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(BOMB)


@pytest.mark.parametrize("behaviour, told, seconds", [
    (hang, "no whole answer within --api-timeout 0.15 seconds", 0.15),
    (slow_headers, "no whole answer within --api-timeout 0.15 seconds", 0.15),
    (drip, "no whole answer within --api-timeout 0.15 seconds", 0.15),
    (endless, "an answer of more than 10 MB", 20), (bomb, "an answer of more than 10 MB", 20)])
def test_an_answer_has_a_limit_of_time_and_of_size(api, capsys, behaviour, told, seconds):
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises(SystemExit):
        api([behaviour] * 99, episodes=1, api_timeout=seconds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert time.monotonic() - start < 10 and peak < 40e6
    # one that does so among others counts as failed, after two tries
    server, rows = api([200, behaviour, behaviour], episodes=2, api_timeout=seconds, api_workers=1)
    ending = "failed: time-out" if seconds < 1 else "failed: too large"
    assert rows[0]["endings"] == {ending: 1, "stop": 3} and len(server.requests) == 6


@pytest.mark.parametrize("behaviour, number", [
    (hang, signal.SIGINT), (drip, signal.SIGTERM), (slow_headers, signal.SIGINT),
    (endless, signal.SIGTERM), ((429, "", {"Retry-After": "60"}), signal.SIGINT)])
def test_a_signal_ends_it_at_once_and_what_came_is_kept(
        api, monkeypatch, tmp_path, capsys, behaviour, number):
    """With no thread left that the end of the program waits for."""
    def leave(status):
        raise SystemExit(status)

    def send():
        replies, deadline = tmp_path / "api" / "replies.jsonl", time.monotonic() + 10
        while time.monotonic() < deadline:         # both good answers must have come
            if replies.exists() and replies.read_text().count("\n") == 2:
                break
            time.sleep(0.05)
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    before, sent = set(threading.enumerate()), []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(running, "parse_config", lambda cls: None)
    monkeypatch.setattr(api_file, "MAX_BYTES", 10 ** 12)   # of `endless`, no other limit ends it
    was = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server = Server()
    timer = threading.Timer(0.3, send)
    timer.start()
    try:
        with pytest.raises(SystemExit) as end:
            running.run(lambda _: api([200, 200] + [behaviour] * 99, server), evaluate.Config)
    finally:
        for each, handler in was.items():
            signal.signal(each, handler)
    assert time.monotonic() - sent[0] < 2
    assert end.value.code == (130 if number == signal.SIGINT else 143)
    assert "\nstopped; the same command goes on with what is saved\n" in capsys.readouterr().err
    assert len(running.read_jsonl(tmp_path / "api" / "replies.jsonl")) == 2
    mine = {thread for thread in threading.enumerate() if thread not in before}
    assert all(thread.daemon for thread in mine)


@pytest.mark.parametrize("body", [
    "x" * 960 + " sk-a/b+c\"123456789" + "x" * 100,                # a limit would cut the key
    json.dumps({"odd": "sk-a/b+c\"123456789"}),                     # as JSON spells it
    json.dumps({"odd": "sk-a/b+c\"123456789"}).replace("/", "\\/")])
def test_a_key_is_hidden_however_it_is_cut_or_spelled(api, monkeypatch, capsys, body):
    monkeypatch.setenv("API_KEY", "sk-a/b+c\"123456789")
    with pytest.raises(SystemExit):
        api([(401, body)] * 9, episodes=1)
    err = capsys.readouterr().err
    assert "HTTP 401" in err and "sk-a" not in err and "123456" not in err
