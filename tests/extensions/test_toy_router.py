"""The router of docs/architecture.md, added to a copy as a file, an entry and a YAML; everything else follows."""

import json
import re
import textwrap

import pytest
import yaml

from tests.extensions.copies import REPOSITORY, Row, extended_copy
from tests.training.tiny import tiny_values

GUIDE = (REPOSITORY / "docs" / "architecture.md").read_text()
TOPK = (REPOSITORY / "configs" / "routers" / "topk.yaml").read_text()
TRAIN = """
import torch
from moeport.torch import MoE
layer = MoE(8, 4, 6, router="sigma", router_options={"top_k": 2}, init_std=0.3)
x, target = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
losses = []
for _ in range(30):
    loss = (layer(x) - target).square().mean()
    (loss + layer.auxiliary_loss).backward()
    assert layer.router.weight.grad.abs().max() > 0
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(losses[-1] < 0.8 * losses[0])
"""


def source():
    """The module that the guide shows."""
    (block,) = re.findall(r"    ```python\n(.*?SigmaRouter.*?)    ```\n", GUIDE, flags=re.DOTALL)
    return textwrap.dedent(block)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy with the router, after `make generate`."""
    lines = ("name: topk", "top_k: 2", "softmax: before", "normalize_gates: true", "num_groups: 1", "top_groups: 1")
    options = "\n      ".join([*lines, "noise_std: 0.0"]) + "\n"
    assert options in TOPK
    files = {
        "moeport/routers/sigma.py": source(),
        "configs/routers/sigma.yaml": TOPK.replace("runs/routers/topk", "runs/routers/sigma").replace(
            options, "name: sigma\n      top_k: 2\n"
        ),
    }
    imported = Row(
        "moeport/routers/__init__.py",
        "from moeport.routers.rre import RRERouter",
        "from moeport.routers.sigma import SigmaRouter",
    )
    entry = Row("moeport/routers/__init__.py", "MaskMoERouter,", "    SigmaRouter,")
    copy = extended_copy(tmp_path_factory.mktemp("sigma"), files, (imported, entry))
    done = copy.python("docs/generate")
    assert set(done.stdout.split()[::2]) == {"README.md:", "docs/configuration.md:", "docs/routers.md:"}, done.stderr
    return copy


def test_it_takes_three_places(copy):
    assert copy.places == 3


def test_the_command_line_lists_it(copy):
    assert "arXiv 2310.10837" in copy.moeport("routers").stdout
    one = copy.moeport("routers", "sigma").stdout
    assert one.startswith("sigma\n")
    assert "Experts per token: top_k" in one


def test_its_file_is_a_sound_config(copy):
    done = copy.moeport("config", "check", "configs/routers/sigma.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    wrong = copy.moeport("config", "check", "configs/routers/sigma.yaml", "--set", "model.moe.router.name=sgima")
    assert wrong.returncode == 2
    assert "did you mean sigma?" in wrong.stderr


def test_the_documentation_has_it(copy):
    pages = {name: (copy.root / name).read_text() for name in ("README.md", "docs/routers.md", "docs/configuration.md")}
    assert "`sigma`" in pages["README.md"]
    row = "| [`sigma`](configuration.md#modelmoerouter-name-sigma) | `top_k` | Top-k of sigmoids; "
    assert row in pages["docs/routers.md"]
    assert "### `model.moe.router`, `name: sigma`\n" in pages["docs/configuration.md"]


def test_the_layer_for_other_models_trains_with_it(copy):
    pytest.importorskip("torch")
    done = copy.python("-c", TRAIN)
    assert done.stdout == "True\n", done.stderr


def test_a_run_trains_with_it(copy, tmp_path):
    pytest.importorskip("torch")
    moe = {"moe": {"router": {"name": "sigma", "top_k": 2}}}
    values = tiny_values(tmp_path, model=moe, training={"steps": 3}, run={"dir": str(tmp_path / "run")})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    codes, output = copy.with_torch("train", str(tmp_path / "tiny.yaml"))
    assert codes == [0], output
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(step["step"] for step in steps) == 3


def test_the_tests_of_all_routers_run_it(copy):
    files = ("tests/routers/test_routers_on_backends.py", "tests/routers/test_router_configs.py")
    done = copy.pytest(*files, "-k", "sigma and not mindspore")
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 10
