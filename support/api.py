"""A model behind an OpenAI-style API as a player for evaluate.py."""
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

from huggingface_hub import InferenceClient, constants   # comes with transformers
from huggingface_hub.utils import httpx

from support import running


class ApiModel:
    """A model behind an API as a player. Replies go to replies.jsonl as they come, each under the digest of its
    request, and are not asked for again."""

    retries, pause = 6, 1.0   # tries of one request, and seconds before the second; then twice as long each time

    def __init__(self, config):
        key = os.environ.get("API_KEY", "").strip()   # without one the client would send the user's Hugging Face token
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError("--api-url needs a key of plain characters in the environment variable API_KEY; any word "
                             "will do for a server that asks for none")
        if running.WORLD > 1:
            raise ValueError("--api-url runs in one process, with --api-workers requests at the same time")
        if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/\S*)?", config.api_url):
            raise ValueError(f"--api-url {config.api_url!r}: expected an address such as https://host/v1")
        if constants.HF_HUB_OFFLINE:
            raise ValueError("--api-url: HF_HUB_OFFLINE is set, which closes the network for huggingface_hub")
        if not config.api_model or not config.out:
            raise ValueError("--api-url needs --api-model and --out")
        out = Path(config.out)
        if out.exists() and not out.is_dir() or (out / "config.json").exists():
            raise ValueError(f"--out {config.out}: must be a new folder or one of an earlier evaluation, not "
                             f"{'a run folder' if out.is_dir() else 'a file'}")
        self.client = InferenceClient(base_url=config.api_url, api_key=key, timeout=120)
        self.config, self.path = config, out / "replies.jsonl"
        known = running.read_jsonl(self.path)
        out.mkdir(parents=True, exist_ok=True)
        running.write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in known))   # without a torn last line
        self.known, self.lock = {row["request"]: row["reply"] for row in known}, Lock()

    def reply(self, of, split, seed, turn, conversations):
        """As LocalModel.reply in evaluate.py; ValueError if the API refuses, or does not answer in several tries."""
        requests = {}
        for i, (messages, _) in conversations.items():
            messages = [message | {"content": api_content(message["content"])} for message in messages]
            key = json.dumps([self.config.api_url, self.config.api_model, self.config.temperature,
                              self.config.max_new_tokens, split, seed, i, turn, messages])
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
        """Get one reply; no content is an empty reply. Refusals are final; busy or failing servers, lost connections
        and answers that are none are tried again."""
        for attempt in range(self.retries):
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                answer = self.client.chat_completion(messages, model=self.config.api_model,
                                                     temperature=self.config.temperature,
                                                     max_tokens=self.config.max_new_tokens)
                content = answer.choices[0].message.content or ""
                if not isinstance(content, str):
                    raise TypeError(f"content is no text but {content!r}")
                self.known[digest] = content.encode("utf-8", "replace").decode()
                with self.lock:
                    return running.log_jsonl(self.path, request=digest, reply=self.known[digest])
            except httpx.HTTPError as error:                       # also lost connections and no answer in time
                fault, status = error, getattr(getattr(error, "response", None), "status_code", 0)
                if 400 <= status < 500 and status not in (408, 409, 425, 429):
                    break
            except (ValueError, TypeError, LookupError, AttributeError) as error:   # not a chat completion
                fault = f"the answer is not a chat completion: {error}"
        fault = " ".join(str(fault).split())[:300]
        raise ValueError(f"--api-url {self.config.api_url}, model {self.config.api_model}: {fault}; replies so far are "
                         f"in {self.path}")


def api_content(content):
    """The content of a chat message as APIs take it, its picture as a data URL."""
    if isinstance(content, str):
        return content
    png = io.BytesIO()
    content[0]["image"].save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, content[1]]
