from types import SimpleNamespace

import pytest
import torch

from moeport.ascend.checks import Finding
from moeport.ascend.table import DETERMINISM
from moeport.backends import get_backend
from moeport.backends.torch import backend, device
from moeport.backends.torch.device import describe_device, matmul_flops_per_second, resolve_device
from moeport.config.training import BackendConfig
from moeport.errors import BackendUnavailableError
from tests.support import hide_framework

CPU = torch.device("cpu")


def accelerator(monkeypatch, kind):
    """Make PyTorch see an accelerator of this kind, or none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))


def test_the_cpu_can_always_be_had(monkeypatch):
    accelerator(monkeypatch, "cuda")
    assert resolve_device("cpu") == CPU


def test_auto_is_the_accelerator_or_else_the_cpu(monkeypatch):
    accelerator(monkeypatch, "cuda")
    assert resolve_device("auto") == torch.device("cuda")
    accelerator(monkeypatch, None)
    assert resolve_device("auto") == CPU


def test_the_named_accelerator_is_used(monkeypatch):
    accelerator(monkeypatch, "cuda")
    assert resolve_device("cuda") == torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "present", "found"),
    [
        ("cuda", None, "it sees no accelerator"),
        ("cuda", "xpu", "its accelerator is xpu"),
    ],
)
def test_an_absent_accelerator_is_refused(monkeypatch, name, present, found):
    accelerator(monkeypatch, present)
    with pytest.raises(BackendUnavailableError) as caught:
        get_backend(BackendConfig(name="torch", device=name))
    assert str(caught.value) == (
        f"backend.device: {name} is not usable: this is PyTorch {torch.__version__} and {found}; "
        f"set backend.device to auto, or install a PyTorch build and driver for {name}"
    )


@pytest.mark.parametrize(
    ("wrong", "autoload", "mend"),
    [
        ([], None, "install torch-npu, CANN and the driver, as docs/ascend.md describes"),
        ([], "0", "as docs/ascend.md describes; unset TORCH_DEVICE_BACKEND_AUTOLOAD"),
        (
            [Finding("doubtful", "torch-npu", "x", "y"), Finding("wrong", "CANN", "none is found", "install it")],
            None,
            "fix what keeps torch-npu from it: CANN: none is found; install it",
        ),
    ],
)
def test_an_absent_npu_is_refused_with_what_is_wrong(monkeypatch, wrong, autoload, mend):
    accelerator(monkeypatch, None)
    monkeypatch.setattr(device, "findings", lambda machine: wrong)
    monkeypatch.setattr(device.os, "environ", {device.AUTOLOAD: autoload} if autoload else {})
    monkeypatch.setattr(device, "machine", lambda: None)
    with pytest.raises(BackendUnavailableError) as caught:
        resolve_device("npu")
    assert str(caught.value).startswith("backend.device: npu is not usable: this is PyTorch ")
    assert str(caught.value).endswith(mend)


def test_measured_speed_is_that_of_a_product():
    """Between a megaflop and an exaflop a second: the unit is FLOP/s."""
    assert 1e6 < matmul_flops_per_second(CPU, torch.float32, seconds=0.01) < 1e18


@pytest.mark.parametrize("kind", ["cpu", "npu"])
@pytest.mark.parametrize("took", [1e-7, 1e-5, 1e-3, 0.05, 3.0])
def test_a_measurement_ends_when_its_time_is_up(monkeypatch, kind, took):
    """`took`: the time of the smallest product, which others need in proportion to their work."""
    clock, sizes = SimpleNamespace(now=0.0), []

    def product(x):
        sizes.append(len(x))
        clock.now += took * (len(x) / 256) ** 3
        return took * (len(x) / 256) ** 3

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **kind: ones(*shape, device="meta", **kind))
    monkeypatch.setattr(device, "_product_seconds", product)
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock.now)
    found = matmul_flops_per_second(SimpleNamespace(type=kind), torch.float32, 0.1)
    assert found == pytest.approx(2 * 256**3 / took)
    assert clock.now <= took + max(0.13, took)
    assert len(sizes) >= 2
    largest = {"cpu": {1e-7: 1024, 1e-5: 1024}, "npu": {1e-7: 8192, 1e-5: 2048}}[kind]
    assert max(sizes) == {1e-3: 512, **largest}.get(took, 256)


def test_words():
    assert describe_device(CPU) == f"cpu ({torch.get_num_threads()} threads)"


def test_missing_framework_comes_with_the_command_that_installs_it(monkeypatch):
    hide_framework(monkeypatch, "torch")
    with pytest.raises(BackendUnavailableError) as caught:
        get_backend(BackendConfig(name="torch"))
    assert str(caught.value) == (
        "backend.name: torch needs torch, which is not installed; install it with: pip install 'moeport[torch]'"
    )


@pytest.mark.parametrize(("kind", "names"), [("cpu", []), ("cuda", ["CUBLAS_WORKSPACE_CONFIG"]), ("npu", DETERMINISM)])
def test_switches_of_the_libraries_are_set_but_those_that_the_user_has_set(monkeypatch, kind, names):
    given = {"PATH": "", **dict.fromkeys(list(names)[:1], "mine")}
    environment = dict(given)
    monkeypatch.setattr(backend.os, "environ", environment)
    backend._set_switches(kind)
    assert environment.keys() == {"PATH", *names}
    assert given.items() <= environment.items()


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_is_what_the_config_says(deterministic):
    try:
        get_backend(BackendConfig(name="torch", device="cpu", deterministic=deterministic))
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.use_deterministic_algorithms(True)
