"""Files that are made to hang, to fill the memory or to crash whatever reads them, and the readers that meet them.

As a program it gives every file to every reader and prints the most processor time that one took, in seconds, and the
memory that all of them together added, in MiB.
"""

import copy
import gzip
import hashlib
import json
import math
import os
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from moeport.cli.parity import _names
from moeport.comm.exchange import EXCHANGES
from moeport.config import load_config
from moeport.config.data import DataConfig, FilesSource
from moeport.data.packed import PackedTokens
from moeport.data.sources import read_documents
from moeport.data.tokenizer import Tokenizer, load_tokenizer
from moeport.errors import MoeportError
from moeport.parity.bundle import load_bundle, save_bundle
from moeport.parity.recording import Recording, Statistics, Step, TensorRecord
from moeport.plan.fit import fit, read_samples
from moeport.plan.routes import routes
from moeport.plan.traffic import read_choices
from moeport.training.checkpoint import read_meta
from moeport.training.metrics import read_metrics
from moeport.training.side_files import read_summary


def read_text(path):
    source = FilesSource(paths=(str(path),), text_suffixes=("*",))
    return read_documents(DataConfig(source=source))


READERS = {
    "config": ("c.yaml", load_config),
    "text": ("a.txt", read_text),
    "rows": ("a.jsonl", read_text),
    "packed text": ("a.txt.gz", read_text),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "token metadata": ("train.json", lambda path: PackedTokens(path.with_suffix(".tokens"), 8)),
    "checkpoint": ("step-000001/meta.json", lambda path: read_meta(path.parent)),
    "bundle": ("bundle/manifest.json", lambda path: load_bundle(path.parent)),
    "benchmark": ("a.json", lambda path: read_samples(path, routes)),
    "traffic": ("a.npy", lambda path: read_choices(path, 8, 2, 2)),
    "names": ("names.yaml", _names),
    "metrics": ("metrics.jsonl", read_metrics),
    "summary": ("summary.json", lambda path: read_summary(path.parent)),
}
"""By name, the file that a reader is given and the reader."""
TOLERANT = ("text", "rows", "packed text", "metrics")
"""Any text is right for them; the last line of the metrics may be half of a record."""


def socket_at(path):
    """A socket; its name may be too long for the file system, so it is made where names are short."""
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as own:
        own.bind(f"{short}/s")
        os.link(f"{short}/s", path) if os.stat(short).st_dev == path.parent.stat().st_dev else os.mkfifo(path)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(100 * 2**30)


def written(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


NO_FILES = {
    "nothing": lambda path: None,
    "a pipe": lambda path: os.mkfifo(path),
    "a socket": socket_at,
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
"""No reader can read them."""
CONTENTS = {
    "100 GiB of zeros": sparse,
    "empty": written(b""),
    "zeros": written(bytes(5000)),
    "random bytes": written(np.random.default_rng(0).bytes(5000)),
    "utf-16": written("{}".encode("utf-16")),
    "not utf-8": written(b'{"a": "\xff"}'),
    "a string": written('"x"'),
    "a number": written("3"),
    "null": written("null"),
    "a list": written("[]"),
    "an object": written("{}"),
    "lists of lists": written("[" * 5_000),
    "objects of objects": written('{"a":' * 3_000 + "1" + "}" * 3_000),
    "a deep value": written('{"text": ' + "[" * 5_000 + "]" * 5_000 + "}"),
    "digits without end": written('{"step": ' + "9" * 5000 + "}"),
    "numbers beyond numbers": written('{"step": 1e999, "ranks": NaN, "nodes": -Infinity}'),
    "a key given often": written('{"a": 1,' * 1 + ",".join(['"a": 1'] * 4_000) + "}"),
    "half a surrogate pair": written('{"text": "\\ud800", "format": "\\udfff"}'),
    "markup and escapes": written('{"[red]\\u001b[31m": "\\u202e"}'),
    "a bomb of aliases": written(
        "a: &a [x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
        )
    ),
    "a packed bomb": lambda path: path.write_bytes(gzip.compress(bytes(2**20), 9) * 100),
    "a pickle": written(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."),
    "an array of 10^15": lambda path: path.write_bytes(npy_header((10**15, 2))),
    "an array of 2^62": lambda path: path.write_bytes(npy_header((2**62, 2))),
    "an array of objects": written(b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1, 2)}\n"),
}


def npy_header(shape):
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def read_hostile(reader, make, folder):
    """What a reader says about a hostile file: an error's message and exit code, or None if it takes it."""
    name, read = READERS[reader]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    try:
        read(path)
    except MoeportError as error:
        return str(error), error.exit_code
    return None


def tokenizer_json():
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 4, "content": "<|endoftext|>", **flags}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "u",
            "continuing_subword_prefix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {"a": 0, "b": 1, "ab": 2, "u": 3},
            "merges": [["a", "b"]],
        },
    }


def benchmark_json():
    rows = [{"operation": name, "size": 4096, "type": "float32", "time_us": 9.5} for name in (*EXCHANGES, "all_reduce")]
    about = {"ranks": 4, "nodes": [0, 0, 1, 1], "emulated": False, "device": "cuda:0", "traffic": "local:0.5"}
    return about | {"experts": 8, "top_k": 2, "width": 32, "backward": False, "rows": rows}


def metadata_json():
    digest = hashlib.sha256(b"").hexdigest()
    numbers = {"format_version": 1, "vocab_size": 9, "num_tokens": 2, "num_documents": 1, "num_bytes": 1}
    return numbers | {"tokenizer_fingerprint": "a", "source_fingerprint": "b", "sha256": digest}


def bundle_json(folder):
    record = TensorRecord("x", "activation", "float32", (2,), 0, "linear", (), "full", np.ones(2, np.float32))
    other = TensorRecord("y", "activation", "float32", (9,), keep="statistics", statistics=Statistics(1.0, 2.0))
    step = Step(1, 2.0, 2.0, 1.0, 1.0, 0.0, 0.1, [[0.5, 0.5]])
    save_bundle(Recording("a", "float32", {"x": record, "y": other}, [step]), folder / "bundle")
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    return {key: value for key, value in manifest.items() if key != "sha256"}


def use_tokenizer(path):
    tokenizer = load_tokenizer(path)
    (ids,) = tokenizer.encode_batch(["aab <|endoftext|> aaaaab"])
    tokenizer.decode(ids)


def use_benchmark(path):
    fit(read_samples(path, routes))


def write_json(path, value):
    path.write_text(json.dumps(value))


def write_manifest(path, value):
    digest = hashlib.sha256(json.dumps(value, indent=1).encode()).hexdigest()
    path.write_text(json.dumps(value | {"sha256": digest} if isinstance(value, dict) else value))


FORMATS = {
    "tokenizer": ("tokenizer.json", lambda folder: tokenizer_json(), write_json, use_tokenizer),
    "benchmark": ("a.json", lambda folder: benchmark_json(), write_json, use_benchmark),
    "token metadata": ("train.json", lambda folder: metadata_json(), write_json, READERS["token metadata"][1]),
    "bundle": ("bundle/manifest.json", bundle_json, write_manifest, READERS["bundle"][1]),
}
"""By reader: its file, a right value for it, how that is written, and what reads and uses it."""
OTHERS = (None, True, -1, 0, 1e308, math.nan, 2**31, 2**63, "", "x", [], [[]], {"a": 1})
"""What stands in turn where a right value should."""


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutated(value):
    """Right values with one part exchanged or, for the key of an object, missing."""
    for path in places(value):
        for other in OTHERS:
            yield path, other, _with(value, path, other)
        if path and isinstance(path[-1], str):
            yield path, "missing", _with(value, path, None, missing=True)


def _with(value, path, other, *, missing=False):
    if not path:
        return other
    whole = copy.deepcopy(value)
    node = whole
    for key in path[:-1]:
        node = node[key]
    if missing:
        del node[path[-1]]
    else:
        node[path[-1]] = other
    return whole


def measure():
    """The most processor time of one reading, and the memory that all of them added."""
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, SimpleNamespace(seconds=0.0, what="")
    for reader in READERS:
        for name, make in (NO_FILES | CONTENTS).items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                read_hostile(reader, make, Path(folder))
                seconds = time.process_time() - started
                if seconds > slowest.seconds:
                    slowest = SimpleNamespace(seconds=seconds, what=f"{reader}, {name}")
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": slowest.seconds, "slowest": slowest.what, "added_mib": added}))


if __name__ == "__main__":
    limit = int(sys.argv[1]) * 2**20
    Tokenizer  # noqa: B018  # imported before memory is limited
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    measure()
