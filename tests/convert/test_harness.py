"""`moeport eval --tasks`: a task of a local file by lm-evaluation-harness, where it is installed."""

import json
from typing import Any

import lm_eval  # noqa: F401  (this file is skipped without it)
import numpy as np
import pytest
import torch
import transformers

from moeport.convert.evaluation import TaskOptions, evaluate_tasks
from moeport.convert.from_hf import from_hf
from moeport.errors import UserError
from tests.convert.folders import hub_folder

ROWS: list[dict[str, Any]] = [
    {"text": f"question {number}", "choices": [" yes", " no", " maybe"], "gold": number % 3} for number in range(9)
]
TASK = """\
task: moeport_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choices.yaml").write_text(TASK.format(file=file))
    return folder


def accuracy(hub):
    """The share of the rows whose most likely choice, by transformers, is the right one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hub).eval()
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([[*row["text"].encode(), *choice.encode()]])
            with torch.no_grad():
                logs = model(ids).logits.double().log_softmax(-1)[0]
            first = len(row["text"])
            scores.append(sum(float(logs[place - 1, ids[0, place]]) for place in range(first, ids.shape[1])))
        right += int(np.argmax(scores) == row["gold"])
    return right / len(ROWS)


@pytest.mark.slow
def test_a_run_and_the_folder_it_comes_from_give_what_transformers_gives(tmp_path, tasks):
    hub = hub_folder(tmp_path / "hub", "qwen3_moe")
    from_hf(hub, tmp_path / "run")
    options = TaskOptions(include_path=tasks)
    expected = pytest.approx(accuracy(hub))
    for place in (hub, tmp_path / "run"):
        assert evaluate_tasks(place, ["moeport_choices"], options=options)["moeport_choices"]["acc,none"] == expected


@pytest.mark.slow
def test_an_unknown_task(tmp_path, tasks):
    with pytest.raises(UserError, match=r"^--tasks: lm-evaluation-harness has no task moeport_none; "):
        evaluate_tasks(hub_folder(tmp_path / "hub"), ["moeport_none"], options=TaskOptions(include_path=tasks))
