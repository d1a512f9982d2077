"""A corpus of real size, ingested: memory of all processes, and tokens per second beside the tokenizers library alone.

    python benchmarks/ingest.py [--gigabytes 2] [--tokenizer bpe|byte] [--workers N] [--folder FOLDER]

The corpus is made of the Python sources of at most 1 MB that are installed here, each again and again with its lines in
another order, so that no two documents are alike. (The memory of a worker depends on the longest document.) It is
written to FOLDER and deleted afterwards. Memory is the largest sum of the peaks (VmHWM) of the processes that run
at the same time, so pages that they share count several times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

FILE_BYTES = 100e6
LONGEST_BYTES = 1e6
SAMPLE_BYTES = 16e6
ALONE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = json.load(open(sys.argv[2]))
size = sum(len(text.encode()) for text in texts)
start = time.perf_counter()
tokens = sum(len(encoding.ids) for first in range(0, len(texts), 100) for encoding in tokenizer.encode_batch_fast(
    texts[first : first + 100], add_special_tokens=False))
seconds = time.perf_counter() - start
print(json.dumps([tokens / seconds, size / seconds / 1e6]))
"""
"""Encodes texts by the library in all its threads, and says how many tokens and megabytes per second."""


def main() -> None:
    """Make the corpus, ingest it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tokenizer", choices=("bpe", "byte"), default="bpe")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size, documents = write_corpus(folder, options.gigabytes * 1e9)
        print(f"corpus: {size / 1e9:.2f} GB, {documents:,} documents, {options.workers} workers", flush=True)
        config = folder / "config.yaml"
        tokenizer = "{name: byte}" if options.tokenizer == "byte" else "{name: bpe, vocab_size: 16384}"
        config.write_text(
            f"data: {{source: {{name: files, paths: [{folder}/*.jsonl]}}, tokenizer: {tokenizer}, "
            f"cache_dir: {folder}/cache}}\n"
        )
        ingest = [sys.executable, "-m", "moeport", "data", "ingest", str(config), "--workers", str(options.workers)]
        seconds, memory, lines = watched(ingest)
        again, memory_again, _ = watched(ingest)
        (entry,) = (path.parent for path in folder.glob("cache/*/compression.json"))
        metadata = json.loads((entry / "train.json").read_text())
        alone = [measured_alone(folder, entry / "tokenizer.json") for _ in range(2)]
    for at, line in lines:
        print(f"  {at:7.1f} s  {line}")
    encoding = sum(end - start for what, start, end in phases(lines) if what == "encoding")
    tokens = metadata["num_tokens"]
    print(f"{'':34s} {'seconds':>8s} {'tokens/s':>10s} {'memory':>8s}")
    row("ingest, all of it", seconds, tokens, sum(memory))
    print("  peaks: " + ", ".join(f"{peak:.0f} MB" for peak in memory))
    row("  of which encoding", encoding, tokens, None)
    row("again, from the cache", again, None, sum(memory_again))
    for number, (tokens_per_second, megabytes) in enumerate(alone):
        print(f"{f'tokenizers alone, {megabytes:.1f} MB/s ({number + 1})':34s} {'':8s} {tokens_per_second:10,.0f}")


def row(name: str, seconds: float, tokens: int | None, memory: float | None) -> None:
    """Print a row of the table."""
    speed = f"{tokens / seconds:10,.0f}" if tokens else f"{'':10s}"
    print(f"{name:34s} {seconds:8.1f} {speed} {f'{memory:5.0f} MB' if memory else ''}")


def write_corpus(folder: Path, size: float) -> tuple[int, int]:
    """Write files of rows until there are `size` bytes of text; returns the bytes and the documents."""
    written, documents, file = 0, 0, None
    for text in texts():
        if file is None or file.tell() > FILE_BYTES:
            if file:
                file.close()
            file = (folder / f"{documents:09d}.jsonl").open("w")
        file.write(json.dumps({"text": text}) + "\n")
        written += len(text.encode())
        documents += 1
        if written >= size:
            break
    assert file
    file.close()
    return written, documents


def texts() -> Iterator[str]:
    """Python sources, and then each of them again with other lines first, without end."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    found = {path for root in roots for path in root.rglob("*.py")}
    paths = sorted(path for path in found if path.stat().st_size <= LONGEST_BYTES)
    turn = 0
    while True:
        for path in paths:
            try:
                lines = path.read_text().splitlines(keepends=True)
            except (OSError, UnicodeDecodeError):
                continue
            first = turn * 37 % max(1, len(lines))
            yield f"# {path.name}, version {turn}\n" + "".join(lines[first:] + lines[:first])
        turn += 1


def watched(command: list[str]) -> tuple[float, list[float], list[tuple[float, str]]]:
    """Seconds, the peaks of all processes in MB when their sum was highest, and the printed lines with their times."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout
    os.set_blocking(process.stdout.fileno(), False)
    highest: list[float] = []
    lines: list[tuple[float, str]] = []
    while process.poll() is None:
        highest = max(highest, [peak(pid) for pid in family(process.pid)], key=sum)
        lines += [(time.perf_counter() - start, line.rstrip()) for line in process.stdout.readlines()]
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}")
    lines += [(time.perf_counter() - start, line.rstrip()) for line in process.stdout.readlines()]
    return time.perf_counter() - start, highest, lines


def family(pid: int) -> list[int]:
    """A process and those that it started, and so on."""
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(child))]


def peak(pid: int) -> float:
    """VmHWM of a process in MB; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 * 1.024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def phases(lines: list[tuple[float, str]]) -> Iterator[tuple[str, float, float]]:
    """The first word of each line, when it was printed, and when the next one was."""
    for (start, line), (end, _) in pairwise(lines):
        yield line.split()[0], start, end


def measured_alone(folder: Path, tokenizer: Path) -> tuple[float, float]:
    """Tokens and megabytes per second of the library alone."""
    sample, size = [], 0
    for text in texts():
        sample.append(text)
        size += len(text)
        if size > SAMPLE_BYTES:
            break
    (folder / "sample.json").write_text(json.dumps(sample))
    command = [sys.executable, "-c", ALONE, str(tokenizer), str(folder / "sample.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    tokens, megabytes = json.loads(done.stdout)
    return tokens, megabytes


if __name__ == "__main__":
    main()
