"""A model behind an OpenAI-style API as a player for evaluate.py.

    replies.jsonl    in --out: every reply as it came, under the digest of its request
    eval.jsonl       in --out: the rows, as in a run folder
"""
import base64
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


# ---- The player --------------------------------------------------------------------------------

class ApiModel:
    """A model behind an API as a player; a reply that is known is not asked for again."""

    retries = 6   # tries of one request
    pause = 1.0   # seconds before the second try; then twice as long each time

    def __init__(self, config):
        """Check the options, open --out and read its replies; ValueError names what is wrong."""
        self.config = config
        self.key = read_key()
        check_options(config, self.hide_key)
        self.url = completions_url(config.api_url)
        self.extra = read_extra(config.api_extra)
        if config.top_p < 1:
            self.extra = {"top_p": config.top_p, **self.extra}
        self.client = self.open_client()

        out = Path(config.out)
        self.path = out / "replies.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        run_folder.hold(out, "evaluating")
        rows = running.read_jsonl(self.path, "request", "reply")
        running.write_jsonl(self.path, rows)   # without a torn last line
        self.known = {}   # digest of a request -> (text, ending)
        for row in rows:
            self.known[row["request"]] = (row["reply"], row.get("ending", "stop"))
        self.lock = Lock()
        self.fault = None   # why a request failed for good

    def open_client(self):
        """The client; it follows no redirect, so that the key goes nowhere else."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            client = httpx.Client(headers=headers, timeout=120)
            client.build_request("POST", self.url)
        except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
            # The fault may also be that of a proxy in the environment.
            raise ValueError(f"--api-url {self.config.api_url!r}: {error}") from None
        return client

    def hide_key(self, text):
        """The text without the key, which a server may repeat.

        A key of at most 7 characters is a word for a server that asks for none, and stays.
        """
        return text.replace(self.key, "API_KEY") if len(self.key) > 7 else text

    def reply(self, of, split, seed, turn, conversations):
        """The next replies, as `LocalModel.reply` in evaluate.py gives them.

        ValueError if the API refuses a request, or does not answer it in several tries.
        """
        requests = {}
        for i, (messages, _) in conversations.items():
            messages = [message | {"content": api_content(message["content"])}
                        for message in messages]
            requests[self.digest(split, seed, i, turn, messages)] = messages
        missing = [digest for digest in requests if digest not in self.known]
        with ThreadPoolExecutor(self.config.api_workers) as pool:
            asked = pool.map(lambda digest: self.ask(digest, requests[digest]), missing)
            bar = running.progress(asked, total=len(missing), desc=f"turn {turn + 1}", nested=True)
            try:
                for _ in bar:
                    pass
            finally:
                pool.shutdown(cancel_futures=True)   # those on their way still come in
        return [self.known[digest] for digest in requests]

    def digest(self, split, seed, episode, turn, messages):
        """What a reply is kept under; as part of the file format it stays as it is."""
        key = [self.config.api_url, self.config.api_model, self.config.temperature,
               self.config.max_new_tokens, split, seed, episode, turn, messages]
        if self.extra:
            key.append(self.extra)
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def forget(self, of):
        """Nothing: all replies are kept."""

    def ask(self, digest, messages):
        """Get one reply, and keep it.

        A refusal is final. Busy or failing servers, lost connections and answers that are no chat
        completion are tried again.
        """
        request = {"model": self.config.api_model, "messages": messages,
                   "temperature": self.config.temperature,
                   "max_tokens": self.config.max_new_tokens, **self.extra}
        request = {name: value for name, value in request.items() if value is not None}
        content = json.dumps(request)
        for attempt in range(self.retries):
            if self.fault:   # another request failed for good: this one would as well
                raise ValueError(self.fault)
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            status = 0
            try:
                response = self.client.post(self.url, content=content)
                status = response.status_code
                text, ending = read_reply(response)
            except (httpx.HTTPError, ValueError) as error:   # also lost connections and time-outs
                fault = str(error) or type(error).__name__
                if 300 <= status < 500 and status not in (408, 409, 425, 429):
                    break
            else:
                text, ending = self.hide_key(text), self.hide_key(ending)
                self.known[digest] = (text, ending)
                with self.lock:
                    running.log_jsonl(self.path, request=digest, reply=text, ending=ending)
                return
        self.fault = (f"--api-url {self.config.api_url}, model {self.config.api_model}: "
                      f"{one_line(self.hide_key(fault))}; replies so far are in {self.path}")
        raise ValueError(self.fault)


# ---- Options -----------------------------------------------------------------------------------

def read_key():
    """The key, from the environment; ValueError if there is none that can be sent."""
    key = os.environ.get("API_KEY", "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError("--api-url needs a key of plain characters in the environment variable "
                         "API_KEY; any word will do for a server that asks for none")
    return key


def check_options(config, hide_key):
    """ValueError if an option cannot be used; hide_key(text) is the text without the key."""
    given = f"{config.api_url} {config.api_model} {config.api_extra}"
    if hide_key(given) != given:
        raise ValueError("the key stands in --api-url, --api-model or --api-extra, which are "
                         "written to files: it belongs in API_KEY alone")
    if running.WORLD > 1:
        raise ValueError("--api-url runs in one process, with --api-workers requests at the same "
                         "time")
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/\S*)?", config.api_url):
        raise ValueError(f"--api-url {config.api_url!r}: expected an address such as "
                         "https://host/v1")
    if not config.api_model or not config.out:
        raise ValueError("--api-url needs --api-model and --out")
    out = Path(config.out)
    if out.exists() and not out.is_dir() or (out / "config.json").exists():
        raise ValueError(f"--out {config.out}: must be a new folder or one of an earlier "
                         f"evaluation, not {'a run folder' if out.is_dir() else 'a file'}")


def read_extra(text):
    """The fields of --api-extra, {} if it is not given; ValueError if they are none."""
    try:
        extra = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--api-extra {text!r}: {error}") from None
    if not isinstance(extra, dict) or "messages" in extra:
        raise ValueError(f"--api-extra {text!r}: expected a JSON object with fields of the "
                         "request, other than messages, such as "
                         '{"max_tokens": null, "max_completion_tokens": 4096}')
    return extra


def completions_url(address):
    """Where requests go: the address with /chat/completions, and /v1 before that if it has no path.

    >>> completions_url("https://host/?version=1")
    'https://host/v1/chat/completions?version=1'
    """
    address, mark, query = address.partition("?")
    address = address.rstrip("/")
    if address.count("/") == 2:
        address += "/v1"
    if not address.endswith("/chat/completions"):
        address += "/chat/completions"
    return address + mark + query


# ---- Requests and answers ----------------------------------------------------------------------

def api_content(content):
    """The content of a chat message as APIs take it, its picture as a data URL."""
    if isinstance(content, str):
        return content
    picture, text = content
    png = io.BytesIO()
    picture["image"].save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, text]


def read_reply(response):
    """(text, ending) of a chat completion, the ending in the server's word.

    No content is an empty text: reasoning models that are cut while they think give none, with the
    ending "length". ValueError, with the server's words, if the response is no chat completion.
    """
    try:
        answer = json.loads(response.content)
    except (ValueError, RecursionError):
        answer = None
    if response.is_success:
        reply = read_completion(answer)
        if reply is not None:
            return reply
    if response.has_redirect_location:
        raise ValueError(f"HTTP {response.status_code}: redirects to "
                         f"{response.headers['location']}")
    words = find_words(answer) or response.content.decode(errors="replace") or "an empty answer"
    which = ", which is no chat completion" if response.is_success else ""
    raise ValueError(f"HTTP {response.status_code} from {response.url}{which}: {words}")


def read_completion(answer):
    """(text, ending) of a chat completion as JSON, or None if the answer is none."""
    try:
        choice = answer["choices"][0]
        if answer.get("error") or choice.get("error"):
            return None
        content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        if isinstance(content, list):   # parts, among which there may be thoughts
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (LookupError, TypeError, AttributeError):
        return None
    if content is None:
        content = refusal or ""
    ending = "refusal" if refusal else choice.get("finish_reason") or "stop"
    if not isinstance(content, str) or not isinstance(ending, str):
        return None
    return content.encode("utf-8", "replace").decode(), one_line(ending)   # no half characters


def find_words(answer):
    """What a server says of an error, in {"error": {"message": ...}} or the like; else ""."""
    while answer and isinstance(answer, (dict, list)):
        if isinstance(answer, list):
            answer = answer[0]
            continue
        inner = [answer[name] for name in ("error", "message", "detail", "choices")
                 if answer.get(name)]
        answer = inner[0] if inner else None
    return answer if isinstance(answer, str) else ""


def one_line(text):
    """The first 300 characters of a foreign text, without line breaks and unprintable ones."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:300]


# ---- Rows --------------------------------------------------------------------------------------

def read_rows(config):
    """The rows of eval.jsonl in --out that are of this model."""
    rows = running.read_jsonl(Path(config.out) / "eval.jsonl",
                              "checkpoint", "split", "seed", "settings")
    return [row for row in rows if row["checkpoint"] == config.api_model]


def append_row(config, row):
    """Put a row behind those of eval.jsonl; the file is written anew, without a torn last line."""
    path = Path(config.out) / "eval.jsonl"
    running.write_jsonl(path, [*running.read_jsonl(path), row])
