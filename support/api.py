"""A model behind an OpenAI-style API as a player for evaluate.py.

    replies.jsonl    in --out: every reply as it came, under the digest of its request; also what
                     the server said where it gave none
    eval.jsonl       in --out: the rows, as in a run folder

A request may fail for its own sake, such as a dialogue that is too long. Then its reply counts as
failed, and the others go on. A fault of the whole service, such as a wrong key, stops the
evaluation. How the two are told apart stands at `ApiModel.settle`.
"""
import asyncio
import base64
import contextlib
import datetime
import email.utils
import hashlib
import io
import json
import os
import re
import threading
import zlib
from pathlib import Path

from huggingface_hub.utils import httpx   # comes with transformers

from support import run_folder, running
from support.logs import without_twins

MAX_BYTES = 10_000_000      # of an answer, unpacked
MAX_WAIT = 600              # seconds that a server may ask us to wait
OF_A_REQUEST = (400, 413, 422)              # refusals that say nothing of other requests
TOO_SLOW = (408, 504, 524)                  # a gateway waits no longer for this answer
TRY_AGAIN = (409, 425, 429)                 # and all from 500
OUR_HEADERS = ("accept-encoding", "content-length", "content-type", "transfer-encoding")
FAILED = "failed: "         # what the ending of a reply begins with that is not the model's


class NoReply(Exception):
    """A try of a request that gave no reply.

    ending    a short word for a fault of this request; "" if the whole service is at fault
    tries     of how many tries of the request it may be the last
    wait      the seconds that the server asked for before the next try
    """

    def __init__(self, words, ending="", tries=6, wait=0.0):
        super().__init__(words)
        self.ending, self.tries, self.wait = ending, tries, wait


# ---- The player --------------------------------------------------------------------------------

class ApiModel:
    """A model behind an API as a player; a reply that is known is not asked for again.

    Requests run in a thread of their own, in which one loop waits for all answers. So Ctrl-C ends
    the program at once, whatever a server does.
    """

    pause = 1.0      # seconds before the second try; then twice as long each time
    patience = 8     # failed requests without an answered one between them

    def __init__(self, config):
        """Check the options, open --out and read its replies; ValueError names what is wrong."""
        self.config = config
        self.secrets = [read_key()]
        headers = self.read_headers()
        check_options(config, self.hide_key)
        self.url = completions_url(config.api_url)
        self.extra = read_extra(config.api_extra)
        if config.top_p < 1:
            self.extra = {"top_p": config.top_p, **self.extra}
        self.client = self.open_client(headers)

        out = Path(config.out)
        self.path = out / "replies.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        run_folder.hold(out, "evaluating")
        rows = running.read_jsonl(self.path, "request", "reply")
        running.write_jsonl(self.path, rows)   # without a torn last line
        self.known = {}   # digest of a request -> (text, ending)
        for row in rows:
            self.known[row["request"]] = (row["reply"], row.get("ending", "stop"))

        self.fault = None        # why the service as a whole has failed
        self.answered = None     # the messages of a request that was answered
        self.held = []           # (digest, NoReply) of those that failed since the last answer
        self.told = set()        # endings of failed replies that were printed
        self.places = asyncio.Semaphore(config.api_workers)
        self.stopping = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        # A daemon: a server that hangs does not keep the program from ending.
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def read_headers(self):
        """All headers of a request. What stands in --api-header for $NAME becomes a secret."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        given = {}
        for text in self.config.api_header:
            name, value, secrets = read_header(text)
            given[name] = value
            self.secrets += secrets
        if not any(re.search(r"\$API_KEY\b", text) for text in self.config.api_header):
            headers["Authorization"] = f"Bearer {self.secrets[0]}"
        return headers | given

    def open_client(self, headers):
        """The client; it follows no redirect, so that the key goes nowhere else."""
        try:
            client = httpx.AsyncClient(
                headers=headers, timeout=httpx.Timeout(None, connect=30),
                limits=httpx.Limits(max_connections=None))
            client.build_request("POST", self.url)
        except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
            # The fault may also be that of a proxy in the environment.
            raise ValueError(f"--api-url {self.config.api_url!r}: {error}") from None
        return client

    def hide_key(self, text):
        """The text without the key and other secrets, which a server may repeat.

        A secret of at most 7 characters, or of 20 without a digit, is a word for a server that asks
        for none. It stays, since a reply may hold that word.
        """
        for secret in self.secrets:
            if len(secret) > 20 or len(secret) > 7 and re.search(r"\d", secret):
                # As it is, and as JSON may spell it.
                spelled = json.dumps(secret)[1:-1]
                for form in (secret, spelled, spelled.replace("/", "\\/")):
                    text = text.replace(form, "API_KEY")
        return text

    def reply(self, of, split, seed, turn, conversations):
        """The next replies, as `LocalModel.reply` in evaluate.py gives them.

        A reply that cannot be had is empty, and its ending begins with FAILED. ValueError if the
        service as a whole does not answer.
        """
        requests = {}
        for i, (messages, _) in conversations.items():
            messages = [message | {"content": api_content(message["content"])}
                        for message in messages]
            requests[self.digest(split, seed, i, turn, messages)] = messages
        missing = {}
        for digest, messages in requests.items():
            if digest not in self.known:
                missing[digest] = messages
            elif not self.known[digest][1].startswith(FAILED):
                self.answered = messages
        with running.progress(total=len(missing), desc=f"turn {turn + 1}", nested=True) as bar:
            asking = self.ask_all(missing, bar.update)
            asyncio.run_coroutine_threadsafe(asking, self.loop).result()
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

    # What runs in the thread of the loop.

    async def ask_all(self, requests, finished):
        """Get and keep the replies to {digest: messages}; ValueError if the service is at fault.

        `finished` is called after each. With a fault no more is asked, but what is on its way
        still comes in.
        """
        async def ask(digest, messages):
            async with self.places:
                if not self.fault:
                    await self.ask(digest, messages)
            finished()

        await asyncio.gather(*[ask(*request) for request in requests.items()])
        if self.held and not self.fault:
            await self.settle()
        if self.fault:
            raise ValueError(f"--api-url {self.config.api_url}, model {self.config.api_model}: "
                             f"{self.fault}; replies so far are in {self.path}")

    async def ask(self, digest, messages):
        """Get one reply and keep it, or hold the failure back until it is known whose it is."""
        try:
            text, ending = await self.try_for_reply(messages)
        except NoReply as failure:
            if not failure.ending:
                return self.stop(str(failure))
            self.held.append((digest, failure))
            if len(self.held) == self.patience:
                await self.settle()
        else:
            self.answered = messages
            self.keep(digest, self.hide_key(text), one_line(self.hide_key(ending)))
            self.keep_failures()

    async def settle(self):
        """Decide about the requests that failed since the last answer.

        A request that was answered before is sent again. If it is answered, the service works, and
        the others failed for their own sake. If not, or if none ever was, the service is at fault.
        """
        num = len(self.held)
        try:
            if self.answered is None:
                raise self.held[-1][1]
            await self.try_for_reply(self.answered)
        except NoReply as failure:
            self.stop(f"the last requests ({num}) had no reply: {failure}")
        else:
            self.keep_failures()

    def stop(self, words):
        """The service as a whole is at fault; the first fault is the one that is told."""
        self.fault = self.fault or words
        self.stopping.set()

    def keep_failures(self):
        """The service works: what failed since the last answer counts as failed replies."""
        for digest, failure in self.held:
            self.keep(digest, "", FAILED + failure.ending, why=str(failure))
            if failure.ending not in self.told:
                self.told.add(failure.ending)
                running.print0(f"{self.config.api_model}: a reply counts as failed: {failure}")
        self.held = []

    def keep(self, digest, text, ending, **more):
        self.known[digest] = (text, ending)
        running.log_jsonl(self.path, request=digest, reply=text, ending=ending, **more)

    async def try_for_reply(self, messages):
        """(text, ending) of the reply to these messages; NoReply after the last try."""
        request = {"model": self.config.api_model, "messages": messages,
                   "temperature": self.config.temperature,
                   "max_tokens": self.config.max_new_tokens, **self.extra}
        request = {name: value for name, value in request.items() if value is not None}
        content = json.dumps(request).encode()
        pause, attempt = self.pause, 1
        while True:
            try:
                return read_reply(*await self.post(content))
            except NoReply as failure:
                last = attempt >= failure.tries or failure.wait > MAX_WAIT
                if last or await self.stopped_within(max(pause, failure.wait)):
                    words = one_line(self.hide_key(str(failure)))
                    raise NoReply(words, failure.ending) from None
            pause, attempt = 2 * pause, attempt + 1

    async def stopped_within(self, seconds):
        """Wait so long; True, and sooner, if the service turns out to be at fault."""
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.stopping.wait(), seconds)
        return False

    async def post(self, content):
        """(response, its body, unpacked) of one request; NoReply if there is none."""
        limit = self.config.api_timeout
        try:
            async with asyncio.timeout(limit):
                async with self.client.stream("POST", self.url, content=content) as response:
                    return response, await read_body(response)
        except TimeoutError:
            raise NoReply(f"no whole answer within --api-timeout {limit:g} seconds", "time-out",
                          tries=2) from None
        except (httpx.ReadError, httpx.RemoteProtocolError) as error:   # this request may break it
            raise NoReply(str(error) or type(error).__name__, "connection lost") from None
        except (httpx.HTTPError, ValueError, OSError) as error:
            raise NoReply(str(error) or type(error).__name__) from None


# ---- Options -----------------------------------------------------------------------------------

def read_key():
    """The key, from the environment; ValueError if there is none that can be sent."""
    key = os.environ.get("API_KEY", "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError("--api-url needs a key of plain characters in the environment variable "
                         "API_KEY; any word will do for a server that asks for none")
    return key


def read_header(text):
    """(name, value, secrets) of a header "NAME: VALUE"; ValueError if it is none.

    $NAME in the value is the environment variable of that name, a secret.
    """
    name, colon, value = (part.strip() for part in text.partition(":"))
    secrets = []

    def put_in(found):
        secret = os.environ.get(found[1], "").strip()
        if not secret:
            raise ValueError(f"--api-header {name!r}: the environment variable {found[1]} is empty")
        secrets.append(secret)
        return secret

    if not colon or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
        # The text may hold a secret, and is not shown.
        raise ValueError("--api-header: expected NAME: VALUE, such as 'api-key: $API_KEY'")
    if name.lower() in OUR_HEADERS:
        raise ValueError(f"--api-header {name!r}: the program sets {', '.join(OUR_HEADERS)} itself")
    value = re.sub(r"\$(\w+)", put_in, value, flags=re.ASCII)
    if not value.isascii() or not value.isprintable():
        raise ValueError(f"--api-header {name!r}: its value must be of plain characters")
    return name, value, secrets


def check_options(config, hide_key):
    """ValueError if an option cannot be used; hide_key(text) is the text without the key."""
    if hide_key(" ".join(config.api_header)) != " ".join(config.api_header):
        raise ValueError("the key stands in --api-header: write '$API_KEY' there, in single "
                         "quotes, and it is put in later")
    given = f"{config.api_url} {config.api_model} {config.api_extra}"
    if hide_key(given) != given:
        raise ValueError("the key stands in --api-url, --api-model or --api-extra, which are "
                         "written to files: it belongs in API_KEY alone")
    address = r"https?://([\w.-]+|\[[\dA-Fa-f:.]+\])(:(?P<port>\d+))?(/\S*)?"
    found = re.fullmatch(address, config.api_url)
    if not found or int(found["port"] or 0) > 65535:
        raise ValueError(f"--api-url {config.api_url!r}: expected an address such as "
                         "https://host/v1")


def read_extra(text):
    """The fields of --api-extra, {} if it is not given; ValueError if they are none."""
    try:
        extra = json.loads(text or "{}", object_pairs_hook=without_twins)
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


async def read_body(response):
    """The body of a response, unpacked; NoReply if it is too large.

    In place of a body that cannot be unpacked stand words that say so.
    """
    too_large = NoReply(f"an answer of more than {MAX_BYTES // 1_000_000} MB", "too large", tries=2)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_BYTES:
            raise too_large
    packed = response.headers.get("content-encoding", "identity").lower()
    if packed in ("gzip", "deflate"):
        try:
            body = zlib.decompressobj(wbits=47).decompress(body, MAX_BYTES + 1)   # 47: either one
        except zlib.error as error:
            body = f"an answer that is no {packed}: {error}".encode()
        if len(body) > MAX_BYTES:
            raise too_large
    elif packed != "identity":
        body = f"an answer packed as {packed!r}, which was not asked for".encode()
    return bytes(body)


def read_reply(response, body):
    """(text, ending) of a chat completion, the ending in the server's word.

    No content is an empty text: reasoning models that are cut while they think give none, with the
    ending "length". NoReply, with the server's words, if the response is no chat completion.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    status = response.status_code
    if response.is_success:
        reply = read_completion(answer)
        if reply is not None:
            return reply
    if response.has_redirect_location:
        raise NoReply(f"HTTP {status}: redirects to {response.headers['location']}", tries=1)
    text = body[:20_000].decode(errors="replace").strip()    # cut shorter once the key is hidden
    words = find_words(answer) or text or "an empty answer"
    which = ", which is no chat completion" if response.is_success else ""
    words = f"HTTP {status} from {response.url}{which}: {words}"
    if response.is_success:
        raise NoReply(words, "no completion")
    if status in OF_A_REQUEST:
        raise NoReply(words, f"http {status}", tries=1)
    if status in TOO_SLOW:
        raise NoReply(words, f"http {status}", tries=2)
    if status < 500 and status not in TRY_AGAIN:
        raise NoReply(words, tries=1)
    # 502 and 503 speak of the service. 500 may also come of this one request.
    wait = seconds_to_wait(response.headers.get("retry-after", ""))
    if wait > MAX_WAIT:
        words = f"{words} (it asks to wait for {wait:.0f} seconds)"
    raise NoReply(words, "http 500" if status == 500 else "", wait=wait)


def seconds_to_wait(text):
    """The seconds of a Retry-After header, which holds seconds or a date; 0 if it holds neither.

    >>> seconds_to_wait("45")
    45.0
    """
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text.strip(), re.ASCII):
        return float(text)
    try:
        then = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    now = datetime.datetime.now(datetime.UTC if then.tzinfo else None)
    return max(0.0, (then - now).total_seconds())


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
    # No half characters.
    return content.encode("utf-8", "replace").decode(), ending.encode("utf-8", "replace").decode()


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
    printable = "".join(c if c.isprintable() else " " for c in text[:10_000])
    return " ".join(printable.split())[:300]
