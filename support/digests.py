"""What tells files from others that had the same names: digests of what is in them.

A run and a row of eval.jsonl belong to what was read when they were made: weights, the texts of a
model's folder, and the files that settings name. All may change under the same path later.
"""
import hashlib
import os
from pathlib import Path

from support import logs

PIECE = 16384        # bytes of a file of weights, of which `weights_of` reads some
# Files of a model folder that decide how a dialogue becomes tokens and what reads them.
TEXTS = ("added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
         "merges.txt", "preprocessor_config.json", "processor_config.json",
         "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "vocab.json")
# What rows tell of a model, in words, and the names that inputs.json has for that of a start.
WORDS_OF = {"weights": "weights", "texts": "tokenizer, template or configs"}
OF_START = {"start": "weights", "start_texts": "texts"}
NAME_FILES = ("prompt_file", "root", "card_dir")         # settings of environments
CITY = ("route_infos.json", "gps_pano_mapping.pkl")      # of a data folder of V-IRL
PICTURES = (".jpg", ".png", ".json")                     # cards, street views and their metadata


def shorten(digest):
    return digest.hexdigest()[:16]


def of_file(path):
    """A digest of a file; "" if none is named."""
    if not path:
        return ""
    with open(path, "rb") as file:
        return shorten(hashlib.file_digest(file, "sha256"))


def weights_of(folder):
    """A digest of the weights of a model folder: of pieces of their files.

    The files are too large to be read whole. The pieces stand at equal distances, so a part that
    was not trained, such as a vision tower, does not hide one that was.
    """
    digest = hashlib.sha256()
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
    for path in files:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for start in (*range(0, size, max(PIECE, size // 256)), max(0, size - PIECE)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return shorten(digest)


def add_files(digest, paths):
    """Add names and contents of those of these files that are there."""
    for path in paths:
        if path.is_file():
            digest.update(f"{path.name} {of_file(path)} ".encode())


def texts_of(folder):
    """A digest of what a model folder holds beside its weights: tokenizer, template, configs."""
    digest = hashlib.sha256()
    add_files(digest, [Path(folder) / name for name in TEXTS])
    return shorten(digest)


def of_start(folder):
    """What inputs.json tells of a start: digests of its weights and of its other files."""
    return {"start": weights_of(folder), "start_texts": texts_of(folder)}


def changed_of_start(began, folder):
    """In words, which files of a start are not those that a run began with; "" if none.

    `began` is what the run's inputs.json holds; one of an earlier version does not tell.
    """
    for name, digest in of_start(folder).items():
        if began.get(name, digest) != digest:
            return WORDS_OF[OF_START[name]]
    return ""


def is_start(run, folder):
    """Whether a folder holds the start of a run, wherever it lay then. A run of an earlier version
    does not tell."""
    began = logs.read_object(Path(run) / "inputs.json")
    return bool(began.get("start") and Path(folder).is_dir()
                and not changed_of_start(began, folder))


def check_files(run, began, files):
    """ValueError if files behind a run's settings changed; `began` is what inputs.json holds."""
    if began.get("files", files) != files:
        raise ValueError(f"{run}: a prompt file, city or card_dir of its settings is not what it "
                         "was when the run began: put it back, or choose another --out")


def files_of(environments):
    """A digest of the files that the settings of environments name; "" if they name none.

    A prompt file and the routes of a city are read whole. Of pictures and what is told of each,
    which are many, names and sizes count. What else lies beside them, such as .DS_Store, does not.
    """
    digest, found = hashlib.sha256(), False
    for env in environments:
        paths, pictures = [], []
        if prompt_file := env.settings.get("prompt_file"):
            paths.append(Path(prompt_file))
        if folder := getattr(env, "folder", None):
            paths += [folder / name for name in CITY]
            pictures.append(folder / "street_views")
        if card_dir := env.settings.get("card_dir"):
            pictures.append(Path(card_dir))
        add_files(digest, paths)
        for folder in pictures if env.vision else ():
            sizes = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    counts = Path(entry.name).suffix in PICTURES and entry.name[0] != "."
                    if counts and entry.is_file():
                        sizes.append((entry.name, entry.stat().st_size))
            sizes.sort()
            digest.update(repr(sizes).encode())
        found = found or bool(paths or pictures)
    return shorten(digest) if found else ""
