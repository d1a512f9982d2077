"""A run on several sources."""

import json

from rich.console import Console

from moeport.training.run import train
from tests.training.test_run import contents, last, stop_after
from tests.training.tiny import LINES, tiny_config

QUIET = Console(quiet=True)


def test_a_run_on_a_mixture_resumes_and_says_what_it_drew(tmp_path):
    sources = []
    for name, weight, lines in (("first", 3, LINES[:80]), ("second", 1, LINES[80:])):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.txt").write_text("".join(lines[number::4]))
        source = {"name": "files", "paths": [str(tmp_path / name)]}
        sources.append({"name": name, "weight": weight, "source": source})
    config = tiny_config(
        tmp_path, data={"source": {"name": "stdlib"}, "sources": sources}, training={"skip_steps": ["2-3"]}
    )
    summary = train(config, console=QUIET)
    tokens = [drawn["tokens"] for drawn in summary.sources.values()]
    assert sum(tokens) == 4 * 4 * 32  # 4 steps of 4 sequences of 32
    assert all(drawn["epochs"] > 0 for drawn in summary.sources.values())
    assert json.loads((config.run.dir / "summary.json").read_text())["sources"] == summary.sources
    whole = contents(last(config))
    stop_after(config, 4)
    again = train(config, resume=True, console=QUIET)
    assert contents(last(config)) == whole
    assert again.sources == summary.sources
