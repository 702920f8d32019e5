"""A model behind an OpenAI-style API as a player for evaluate.py."""
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from huggingface_hub.utils import httpx   # comes with transformers

from support import run_folder, running


class ApiModel:
    """A model behind an API as a player. Replies go to replies.jsonl as they come, each under the digest of its
    request, and are not asked for again."""

    retries, pause = 6, 1.0   # tries of one request, and seconds before the second; then twice as long each time

    def __init__(self, config):
        self.key = os.environ.get("API_KEY", "").strip()
        if not self.key or not self.key.isascii() or not self.key.isprintable():
            raise ValueError("--api-url needs a key of plain characters in the environment variable API_KEY; any word "
                             "will do for a server that asks for none")
        given = f"{config.api_url} {config.api_model} {config.api_extra}"
        if self.hide_key(given) != given:
            raise ValueError("the key stands in --api-url, --api-model or --api-extra, which are written to files: it "
                             "belongs in API_KEY alone")
        if running.WORLD > 1:
            raise ValueError("--api-url runs in one process, with --api-workers requests at the same time")
        if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/\S*)?", config.api_url):
            raise ValueError(f"--api-url {config.api_url!r}: expected an address such as https://host/v1")
        if not config.api_model or not config.out:
            raise ValueError("--api-url needs --api-model and --out")
        out = Path(config.out)
        if out.exists() and not out.is_dir() or (out / "config.json").exists():
            raise ValueError(f"--out {config.out}: must be a new folder or one of an earlier evaluation, not "
                             f"{'a run folder' if out.is_dir() else 'a file'}")
        self.config, self.url, self.extra = config, completions_url(config.api_url), read_extra(config.api_extra)
        self.extra = {"top_p": config.top_p, **self.extra} if config.top_p < 1 else self.extra
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            self.client = httpx.Client(headers=headers, timeout=120)   # follows no redirect: the key goes nowhere else
            self.client.build_request("POST", self.url)
        except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:    # of a proxy in the environment, too
            raise ValueError(f"--api-url {config.api_url!r}: {error}") from None
        self.path = out / "replies.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        run_folder.hold(out, "evaluating")
        known = running.read_jsonl(self.path, "request", "reply")
        running.write_jsonl(self.path, known)                      # without a torn last line
        self.known = {row["request"]: (row["reply"], row.get("ending", "stop")) for row in known}
        self.lock, self.fault = Lock(), None

    def hide_key(self, text):
        """The text without the key, which a server may repeat. A short one is a word for a server that asks for none."""
        return text.replace(self.key, "API_KEY") if len(self.key) > 7 else text

    def reply(self, of, split, seed, turn, conversations):
        """As LocalModel.reply in evaluate.py; ValueError if the API refuses, or does not answer in several tries."""
        requests = {}
        for i, (messages, _) in conversations.items():
            messages = [message | {"content": api_content(message["content"])} for message in messages]
            key = json.dumps([self.config.api_url, self.config.api_model, self.config.temperature,
                              self.config.max_new_tokens, split, seed, i, turn, messages,
                              *([self.extra] if self.extra else [])])
            requests[hashlib.sha256(key.encode()).hexdigest()] = messages
        missing = [digest for digest in requests if digest not in self.known]
        with ThreadPoolExecutor(self.config.api_workers) as pool:
            asked = pool.map(lambda digest: self.ask(digest, requests[digest]), missing)
            try:
                for _ in running.progress(asked, total=len(missing), desc=f"turn {turn + 1}", nested=True):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)                 # those on their way still come in
        return [self.known[digest] for digest in requests]

    def forget(self, of):
        """Nothing: all replies are kept."""

    def ask(self, digest, messages):
        """Get one reply. Refusals are final; busy or failing servers, lost connections and answers that are none are
        tried again."""
        request = {"model": self.config.api_model, "messages": messages, "temperature": self.config.temperature,
                   "max_tokens": self.config.max_new_tokens, **self.extra}
        request = json.dumps({name: value for name, value in request.items() if value is not None})
        for attempt in range(self.retries):
            if self.fault:                                         # of another request: this one would meet it as well
                raise ValueError(self.fault)
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            status = 0
            try:
                response = self.client.post(self.url, content=request)
                status = response.status_code
                text, ending = map(self.hide_key, read_reply(response))
            except (httpx.HTTPError, ValueError) as error:         # also lost connections and no answer in time
                fault = str(error) or type(error).__name__
                if 300 <= status < 500 and status not in (408, 409, 425, 429):
                    break
            else:
                self.known[digest] = text, ending
                with self.lock:
                    return running.log_jsonl(self.path, request=digest, reply=text, ending=ending)
        self.fault = (f"--api-url {self.config.api_url}, model {self.config.api_model}: "
                      f"{one_line(self.hide_key(fault))}; replies so far are in {self.path}")
        raise ValueError(self.fault)


def read_extra(text):
    """The fields of --api-extra, {} if it is not given; ValueError if they are none."""
    try:
        extra = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--api-extra {text!r}: {error}") from None
    if not isinstance(extra, dict) or "messages" in extra:
        raise ValueError(f"--api-extra {text!r}: expected a JSON object with fields of the request, other than messages, "
                         'such as {"max_tokens": null, "max_completion_tokens": 4096}')
    return extra


def completions_url(address):
    """Where requests go: the address with /chat/completions behind it, and /v1 before that if it has no path."""
    address, mark, query = address.partition("?")
    address = address.rstrip("/")
    if address.count("/") == 2:
        address += "/v1"
    if not address.endswith("/chat/completions"):
        address += "/chat/completions"
    return address + mark + query


def read_reply(response):
    """(text, ending) of a chat completion, the ending in the server's word; ValueError has what it says instead.

    No content is an empty text: reasoning models that are cut while they think say so by the ending "length".
    """
    try:
        answer = json.loads(response.content)
    except (ValueError, RecursionError):
        answer = None
    with contextlib.suppress(LookupError, TypeError, AttributeError):                      # of what is no chat completion
        choice = answer["choices"][0]
        if response.is_success and not answer.get("error") and not choice.get("error"):
            content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            if isinstance(content, list):                          # parts, among which there may be thoughts
                content = "".join(part["text"] for part in content if part["type"] == "text")
            content = (refusal or "") if content is None else content
            ending = "refusal" if refusal else choice.get("finish_reason") or "stop"
            if isinstance(content, str) and isinstance(ending, str):
                return content.encode("utf-8", "replace").decode(), one_line(ending)           # no half characters
    if response.has_redirect_location:
        raise ValueError(f"HTTP {response.status_code}: redirects to {response.headers['location']}")
    words = find_words(answer) or response.content.decode(errors="replace") or "an empty answer"
    raise ValueError(f"HTTP {response.status_code} from {response.url}"
                     f"{', which is no chat completion' if response.is_success else ''}: {words}")


def find_words(answer):
    """What a server says of an error, in {"error": {"message": ...}} or one of its cousins; "" if nothing there."""
    while answer and isinstance(answer, (dict, list)):
        answer = answer[0] if isinstance(answer, list) else next(
            (answer[name] for name in ("error", "message", "detail", "choices") if answer.get(name)), None)
    return answer if isinstance(answer, str) else ""


def one_line(text):
    """The first 300 characters of a foreign text, without line breaks and others that cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def api_content(content):
    """The content of a chat message as APIs take it, its picture as a data URL."""
    if isinstance(content, str):
        return content
    png = io.BytesIO()
    content[0]["image"].save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, content[1]]


def read_rows(config):
    """The rows of eval.jsonl in --out that are of this model."""
    rows = running.read_jsonl(Path(config.out) / "eval.jsonl",
                              "checkpoint", "split", "seed", "settings")
    return [row for row in rows if row["checkpoint"] == config.api_model]


def append_row(config, row):
    """Put a row behind those of eval.jsonl; the file is written anew, without a torn last line."""
    path = Path(config.out) / "eval.jsonl"
    running.write_jsonl(path, [*running.read_jsonl(path), row])
