"""Damaged files of every kind that moeport reads."""

import json
import random
import shutil
from dataclasses import dataclass

from tests.faults.outcome import SMALL
from tests.faults.runs import NOTHING, Try, config
from tests.faults.tally import Tally
from tests.plan.test_planner import measured

FLIP = bytes(range(255, -1, -1))


def flipped(place):
    """One byte, at this part of the file, has all its bits turned over."""

    def damage(data):
        at = min(int(place * len(data)), len(data) - 1)
        return data[:at] + data[at : at + 1].translate(FLIP) + data[at + 1 :]

    return damage


def retyped(data):
    """Every value in JSON has another type."""

    def other(value):
        if isinstance(value, dict):
            return {key: other(child) for key, child in value.items()}
        if isinstance(value, list):
            return {"0": [other(child) for child in value]}
        return str(value) if isinstance(value, int | float) else [value]

    lines = data.decode().splitlines() if b"\n{" in data else [data.decode()]
    return "\n".join(json.dumps(other(json.loads(line))) for line in lines).encode()


DAMAGES = {
    "empty": lambda data: b"",
    "first half": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "without its first byte": lambda data: data[1:],
    "a flipped byte early": flipped(0.02),
    "a flipped byte in the middle": flipped(0.5),
    "a flipped byte late": flipped(0.97),
    "zeros": lambda data: bytes(len(data)),
    "twice": lambda data: data + data,
    "noise": lambda data: random.Random(0).randbytes(2000),
    "null": lambda data: b"null",
    "a list": lambda data: b"[]",
    "a huge number": lambda data: b"1e999",
    "another object": lambda data: b'{"a": 1}',
    "not UTF-8": lambda data: b"\xff\xfe{\x00",
    "nested deeply": lambda data: b"[" * 100_000,
    "other types": retyped,
    "missing": None,
    "a folder": None,
    "a dangling link": None,
}


def damage(file, name):
    """Damage a file; returns whether that kind of damage exists for it."""
    data = file.read_bytes()
    if name == "other types":
        try:
            damaged = retyped(data)
        except ValueError:
            return False
    file.unlink()
    if name == "a folder":
        file.mkdir()
    elif name == "a dangling link":
        file.symlink_to(file.parent / "nowhere")
    elif name == "other types":
        file.write_bytes(damaged)
    elif name != "missing":
        file.write_bytes(DAMAGES[name](data))
    return True


@dataclass(frozen=True)
class Victim:
    """A file, and a command that reads it."""

    file: str
    """Where it lies in the stage; `*` matches one folder."""
    command: tuple[str, ...]
    """Paths are relative to the stage."""
    leaves: str = ""
    """Folder whose run must be as the reference if the command ends well; empty: none."""
    allowed: tuple[int, ...] = (0, 2)


RESUME = ("train", "stopped/config.yaml", "--resume")
PREPARE = ("train", "fresh/config.yaml")
AGAIN = ("train", "done/config.yaml", "--resume")
GENERATE = ("generate", "done/run", "--prompt", "def", "--max-tokens", "2")
CAPACITY = ("capacity", "done/run", "--output", "page.html")
COMPARE = ("parity", "compare", "bundle", "bundle")
LATEST, FINAL = "stopped/run/checkpoints/step-000002", "done/run/checkpoints/step-000004"
FILES = [*(f"{kind}-00000-of-00001.safetensors" for kind in ("model", "optimizer")), "index-00000-of-00001.json"]
VICTIMS = [
    *(Victim(f"{LATEST}/{name}", RESUME, "stopped") for name in FILES),
    Victim(f"{LATEST}/meta.json", RESUME, "stopped"),
    *(Victim(f"stopped/run/{name}", RESUME, "stopped") for name in ("config.yaml", "tokenizer.json", "metrics.jsonl")),
    *(Victim(f"done/run/{name}", AGAIN) for name in ("summary.json", "config.yaml", "metrics.jsonl", "report.html")),
    *(Victim(f"fresh/cache/*/{name}.tokens", PREPARE, "fresh") for name in ("train", "validation")),
    *(Victim(f"fresh/cache/*/{name}.json", PREPARE, "fresh") for name in ("train", "tokenizer", "compression")),
    *(Victim(f"{FINAL}/{name}", GENERATE) for name in (FILES[0], FILES[2], "meta.json")),
    *(Victim(f"done/run/{name}", GENERATE) for name in ("tokenizer.json", "config.yaml")),
    *(Victim(f"done/run/{name}", CAPACITY) for name in ("metrics.jsonl", "config.yaml")),
    *(Victim(f"bundle/{name}", COMPARE) for name in ("manifest.json", "tensors.safetensors")),
    Victim("names.yaml", (*COMPARE, "--names", "names.yaml"), allowed=(0, 1, 2)),
    Victim("bench.json", ("plan", "--from", "bench.json", "--nodes", "1", "--ranks-per-node", "4")),
    Victim("done/config.yaml", ("config", "check", "done/config.yaml")),
]


def build_stage(folder):
    """Files of every kind: a finished run, one that stopped after step 2, text that is prepared, and so on."""
    for name in ("done", "stopped", "fresh"):
        place = folder / name
        place.mkdir(parents=True)
        small = SMALL | {"checkpoint": {"interval": 1, "keep_last": 5}} if name == "stopped" else SMALL
        values = {"run": {"dir": f"{name}/run"}, "data": {"cache_dir": f"{name}/cache"}}
        file = config(place, **values, **small)
        _run(folder, ["train", file.relative_to(folder)])
        file.write_text(file.read_text().replace(str(folder) + "/", "").replace("keep_last: 5", "keep_last: 2"))
    run = folder / "stopped" / "run"
    for path in (run / "summary.json", run / "report.html"):
        path.unlink()
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    shutil.rmtree(folder / "fresh" / "run")
    little = ["--variant", "numpy", "--steps", "0", "--tokens", "8"]
    _run(folder, ["parity", "record", "done/config.yaml", "-o", "bundle", *little])
    (folder / "names.yaml").write_text("a: b\n")
    measured(folder / "bench.json")


def of_every_kind(tries, folder, reference, seed=0):
    """Damaged files, in an order by chance: a command refuses them in one sentence, or does right without them."""
    stage = folder / "stage"
    build_stage(stage)
    tally = Tally("damaged files")
    pairs = [(victim, name) for victim in VICTIMS for name in DAMAGES]
    random.Random(seed).shuffle(pairs)
    for number, (victim, kind) in enumerate(pairs):
        if tally.tries >= tries:
            break
        place = folder / f"damage-{number}"
        shutil.copytree(stage, place, symlinks=True)
        (file,) = place.glob(victim.file)
        if damage(file, kind):
            tally.tries += 1
            _judge(tally, f"{' '.join(victim.command)} with {victim.file}: {kind}", victim, place, reference)
        shutil.rmtree(place)
    return tally


def _judge(tally, name, victim, place, reference):
    run = Try(NOTHING, victim.command, place / "log", place)
    code = tally.ended(name, run, victim.allowed)
    if code == 2 and run.said().count("error:") != 1:
        tally.tracebacks.append(f"{name}: not one sentence: {run.said()[-600:]}")
    if code == 0 and victim.leaves:
        tally.right(name, reference.differences(place / victim.leaves))


def _run(folder, arguments):
    run = Try(NOTHING, arguments, folder / "log", folder)
    assert run.wait() == 0, run.said()
