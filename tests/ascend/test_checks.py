"""Each thing that is wrong with a machine is said, with how to mend it, and nothing else is."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from moeport.ascend import installed
from moeport.ascend.checks import findings, fits
from moeport.ascend.installed import Package, machine
from moeport.ascend.report import lines, report
from moeport.ascend.table import DETERMINISM, PAIRS, VARIABLES
from tests import optional
from tests.ascend.machines import (
    CANN,
    MINDSPORE,
    OLD_CANN,
    SICK,
    TORCH,
    TORCH_NPU,
    put_cann,
    put_driver,
    put_smi,
    sourced,
)


@pytest.fixture
def look(tmp_path, monkeypatch):
    """A machine on which everything fits, but for what the test changes."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")

    def build(cann=CANN, version="9.1.0", npus=2, environment=None, packages=(TORCH, TORCH_NPU), cuda=None, smi=None):
        names = dict(zip(("torch", "torch-npu", "mindspore"), packages, strict=False))
        monkeypatch.setattr(installed, "package", names.get)
        monkeypatch.setattr(installed, "torch_cuda", lambda: cuda)
        if cann:
            put_cann(tmp_path, cann, version)
        if npus:
            put_driver(tmp_path, npus=npus)
        put_smi(tmp_path, *(smi or ()))
        return machine(sourced(tmp_path, cann or CANN) if environment is None else environment, tmp_path)

    return build


def said(found):
    return [f"{each.severity}: {each}" for each in findings(found)]


def with_variables(found, **variables):
    return replace(found, environment={**found.environment, **variables})


def test_nothing_is_wrong_with_a_good_machine(look):
    assert said(look()) == []
    assert said(look(packages=(None, None, MINDSPORE))) == []
    assert said(with_variables(look(), **DETERMINISM)) == []


def test_nothing_is_said_of_a_machine_without_npus(look):
    assert said(replace(look(cann=None, npus=0, environment={}, packages=(TORCH,)), smi=None)) == []


VALUES = {
    "TASK_QUEUE_ENABLE": ("3", "0, 1 or 2"),
    "MULTI_STREAM_MEMORY_REUSE": ("4", "0, 1, 2 or 3"),
    "HCCL_CONNECT_TIMEOUT": ("60", "120 to 7200"),
    "HCCL_BUFFSIZE": ("0", "megabytes, 1 or more"),
    "HCCL_DETERMINISTIC": ("yes", "true, false or strict"),
    "CPU_AFFINITY_CONF": ("on", "0, 1 or 2, then such as npu0:0-19 or npu_affine:1"),
    "ASCEND_RT_VISIBLE_DEVICES": ("npu0", "numbers such as 0,1,2"),
    "TORCH_NPU_FALLBACK_CPU_DISABLE": ("true", "0 or 1"),
}


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values(look, name):
    value, expected = VALUES[name]
    assert said(with_variables(look(), **{name: value})) == [
        f"wrong: {name}: expected {expected} (got {value!r}); correct it, or unset it"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HCCL_CONNECT_TIMEOUT", "120"),
        ("HCCL_CONNECT_TIMEOUT", "1800"),
        ("HCCL_CONNECT_TIMEOUT", "7200"),
        ("CPU_AFFINITY_CONF", "1,npu0:0-1,npu1:2-5"),
        ("HCCL_DETERMINISTIC", "True"),
        ("ASCEND_RT_VISIBLE_DEVICES", "1,0"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True"),
    ],
)
def test_right_values(look, name, value):
    assert said(with_variables(look(), **{name: value})) == []


@pytest.mark.parametrize("value", ["119", "7201", "8000", "99", "10000", "1e3"])
def test_times_that_hccl_refuses(look, value):
    assert "expected 120 to 7200" in said(with_variables(look(), HCCL_CONNECT_TIMEOUT=value))[0]


CONTRADICTIONS = {
    "both names of the allocator": (
        {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
        "wrong: PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF: both are set, which torch-npu refuses; "
        "unset PYTORCH_ALLOC_CONF",
    ),
    "options of the allocator": (
        {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True, max_split_size_mb:64"},
        "wrong: PYTORCH_NPU_ALLOC_CONF: expandable_segments excludes max_split_size_mb; leave out one of the two",
    ),
    "a queue that is off": (
        {"ASCEND_LAUNCH_BLOCKING": "1", "TASK_QUEUE_ENABLE": "2"},
        "doubtful: ASCEND_LAUNCH_BLOCKING: operators run one at a time, and TASK_QUEUE_ENABLE has no effect; "
        "unset it except to find errors",
    ),
    "two interfaces": (
        {"HCCL_IF_IP": "10.0.0.1", "HCCL_SOCKET_IFNAME": "=eth0"},
        "doubtful: HCCL_SOCKET_IFNAME: it has no effect, since HCCL_IF_IP is set too; unset one of the two",
    ),
    "no determinism": (
        {"HCCL_DETERMINISTIC": "false"},
        "doubtful: HCCL_DETERMINISTIC: it is false, so two runs may differ even with backend.deterministic: true, the "
        "default; unset it, and moeport sets it",
    ),
    "an event that waits less than a collective": (
        {"HCCL_EXEC_TIMEOUT": "3600"},
        "doubtful: HCCL_EVENT_TIMEOUT: 1868 s is not more than HCCL_EXEC_TIMEOUT (3600 s), so a slow collective is "
        "reported as a stuck device; export HCCL_EVENT_TIMEOUT=3632",
    ),
    "an event that waits less than a collective without limit": (
        {"HCCL_EXEC_TIMEOUT": "0"},
        "doubtful: HCCL_EVENT_TIMEOUT: 1868 s is not more than HCCL_EXEC_TIMEOUT (no limit), so a slow collective is "
        "reported as a stuck device; export HCCL_EVENT_TIMEOUT=0",
    ),
    "no autoload": (
        {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        "doubtful: TORCH_DEVICE_BACKEND_AUTOLOAD: it is 0, so PyTorch does not load torch-npu and sees no NPU; "
        "unset it to use NPUs",
    ),
    "an NPU that is not there": (
        {"ASCEND_RT_VISIBLE_DEVICES": "0,4,7"},
        "wrong: ASCEND_RT_VISIBLE_DEVICES: there is no NPU 4, 7: the system lists 2; correct it",
    ),
    "an NPU twice": (
        {"ASCEND_RT_VISIBLE_DEVICES": "1,1"},
        "wrong: ASCEND_RT_VISIBLE_DEVICES: a number is given twice (1,1); correct it",
    ),
    "a folder that is not there": (
        {"ASCEND_HOME_PATH": "/missing"},
        f"wrong: ASCEND_HOME_PATH: there is no folder /missing; unset ASCEND_HOME_PATH and source {CANN}/set_env.sh",
    ),
    "no library path": (
        {"LD_LIBRARY_PATH": "/opt/other"},
        f"wrong: LD_LIBRARY_PATH: no folder of {CANN} is in it; source {CANN}/set_env.sh",
    ),
    "the library path of a CANN whose name begins alike": (
        {"LD_LIBRARY_PATH": f"{CANN}-8.5.0/lib64"},
        f"wrong: LD_LIBRARY_PATH: no folder of {CANN} is in it; source {CANN}/set_env.sh",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(look, name):
    variables, expected = CONTRADICTIONS[name]
    assert expected in said(with_variables(look(), **variables))
    others = [line for line in said(with_variables(look(), **variables)) if line != expected]
    assert others == [] or name == "a folder that is not there"


def test_timeouts_that_agree(look):
    assert said(with_variables(look(), HCCL_EXEC_TIMEOUT="3600", HCCL_EVENT_TIMEOUT="3632")) == []
    assert said(with_variables(look(), HCCL_EXEC_TIMEOUT="0", HCCL_EVENT_TIMEOUT="0")) == []


def test_cann_that_is_not_in_effect(look):
    assert said(look(environment={"HOME": "/root", "PATH": ""})) == [
        f"wrong: CANN: {CANN} is there, but ASCEND_HOME_PATH is not set; source {CANN}/set_env.sh"
    ]


def test_two_canns(look, tmp_path):
    put_cann(tmp_path, OLD_CANN, "8.3.RC1")
    found = look(environment=sourced(tmp_path, ASCEND_TOOLKIT_HOME=OLD_CANN))
    assert said(found) == [
        f"doubtful: CANN: two are set: ASCEND_HOME_PATH is {CANN} and ASCEND_TOOLKIT_HOME is {OLD_CANN}; "
        f"start a new shell and source {CANN}/set_env.sh, the one you want"
    ]


@pytest.mark.parametrize("path", [f"{CANN}/lib64", f"/x:{CANN}/x86_64-linux/devlib:", "LINK/lib64"])
def test_the_library_path_may_name_cann_by_a_link(look, tmp_path, path):
    (tmp_path / "link").symlink_to(tmp_path / CANN[1:])
    found = with_variables(look(), LD_LIBRARY_PATH=path.replace("LINK", str(tmp_path / "link")))
    if "LINK" in path:
        found = replace(found, cann=(replace(found.cann[0], folder=str(tmp_path / CANN[1:])),))
    assert [each for each in findings(found) if each.subject == "LD_LIBRARY_PATH"] == []


def test_no_cann(look):
    assert said(look(cann=None, environment={"PATH": ""})) == [
        "wrong: CANN: none is found, and torch-npu 2.12.0.post3 needs it; install the toolkit and the kernels of CANN, "
        "and source its set_env.sh in every shell that trains"
    ]


PIP = "pip install torch==2.12.0+cpu --index-url https://download.pytorch.org/whl/cpu"


def test_torch_npu_beside_a_build_for_cuda(look):
    assert said(look(packages=(Package("2.12.0+cu130"), TORCH_NPU), cuda="13.0")) == [
        "wrong: torch: torch 2.12.0+cu130 is a build for CUDA 13.0, beside which torch-npu ends the process "
        f"(SIGABRT); {PIP}"
    ]


def test_torch_npu_beside_another_torch(look):
    assert said(look(packages=(Package("2.13.0+cpu"), TORCH_NPU))) == [
        f"wrong: torch: torch-npu 2.12.0.post3 is for torch 2.12.0, and this is 2.13.0+cpu; {PIP}"
    ]
    assert said(look(packages=(None, TORCH_NPU))) == [
        f"wrong: torch: it is missing, and torch-npu 2.12.0.post3 needs it; {PIP}"
    ]


def test_on_arm_the_build_without_cuda_has_the_plain_name(look, monkeypatch):
    found = look(packages=(Package("2.13.0"), TORCH_NPU))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert said(found)[0].endswith("; pip install torch==2.12.0 --index-url https://download.pytorch.org/whl/cpu")


@pytest.mark.parametrize(
    ("version", "pin", "same"),
    [
        ("2.11.0+cpu", "2.11.0+cpu", True),
        ("2.11.0", "2.11.0+cpu", False),
        ("2.12.0+cpu", "2.12.0", True),
        ("2.12.1", "2.12.0", False),
        ("2.13.0+cpu", "2.13.0.*", True),
        ("2.14.1", "2.14.0.*", False),
        ("2.13.01", "2.13.0.*", False),
    ],
)
def test_versions_that_fit_a_pin(version, pin, same):
    assert fits(version, pin) is same


def test_cann_of_another_release(look):
    assert said(look(version="8.1.RC1")) == [
        "doubtful: torch-npu: torch-npu 2.12.0.post3 is known to work with CANN 8.5, 9.0, 9.1 (release notes and table "
        "of versions of torch-npu 26.1), and this is 8.1.RC1; install one of these"
    ]
    assert said(look(version="9.2.0", packages=(None, None, MINDSPORE))) == [
        "doubtful: mindspore: mindspore 2.10.0 is known to work with CANN 8.2, 8.3, 8.5, 9.0, 9.1 (the check in "
        "MindSpore 2.10 itself), and this is 9.2.0; install one of these"
    ]


def test_a_release_of_which_nothing_is_known(look):
    packages = (Package("2.13.0+cpu"), Package("2.13.0", ("torch==2.13.0.*",)))
    assert said(look(packages=packages)) == [
        "doubtful: torch-npu: it is not known which CANN goes with torch-npu 2.13.0; this one is 9.1.0; "
        "look it up in the table of versions in its documentation"
    ]


@pytest.mark.skipif(not optional.installed("mindspore"), reason="needs mindspore, which is not installed")
def test_the_rows_on_mindspore_are_those_of_its_own_check():
    text = Path(find_spec("mindspore").origin).with_name("run_check").joinpath("_check_version.py").read_text()
    (pair,) = [pair for pair in PAIRS if pair.package == "mindspore"]
    assert f"self.version = {list(pair.cann)}".replace("'", '"') in text


def test_no_npus(look):
    assert said(look(npus=0)) == [
        "wrong: NPUs: the system lists none: there is no /dev/davinci0; install the driver and the firmware; "
        "in a container, pass --device /dev/davinci0 and the like"
    ]


def test_an_npu_that_is_not_well(look):
    assert said(look(smi=[SICK])) == ["wrong: NPU 1 (910B3): its health is Alarm; see npu-smi info -t health"]


def test_npus_that_nothing_can_use(look):
    assert said(look(packages=(TORCH,))) == [
        "wrong: frameworks: neither torch-npu nor mindspore is installed, so nothing can use the NPUs; "
        "install PyTorch without CUDA and then pip install 'moeport[npu]', or pip install 'moeport[mindspore]'; "
        "see docs/ascend.md"
    ]


def test_what_is_wrong_comes_first(look):
    found = with_variables(look(), HCCL_DETERMINISTIC="false", TASK_QUEUE_ENABLE="9")
    assert [line.partition(":")[0] for line in said(found)] == ["wrong", "doubtful"]


def test_the_report(look):
    found = report(with_variables(look(), TASK_QUEUE_ENABLE="9", LD_LIBRARY_PATH=f"{CANN}/lib64" + ":/x" * 80))
    text = [str(line) for line in lines(found)]
    for line in (
        "Ascend",
        f"  CANN 9.1.0 in {CANN}, named by ASCEND_HOME_PATH",
        "  driver 25.5.0, firmware 7.8.0.5.216",
        "  npu-smi 25.5.0: 910B3 (OK), 910B3 (OK)",
        "  NPUs that the system lists: 2",
        "  packages: torch 2.12.0+cpu, torch-npu 2.12.0.post3",
        "  TASK_QUEUE_ENABLE=9",
        "  wrong: TASK_QUEUE_ENABLE: expected 0, 1 or 2 (got '9'); correct it, or unset it",
    ):
        assert line in text
    assert max(map(len, text)) < 130


def test_the_report_on_an_npu_smi_that_fails(look):
    text = [str(line) for line in lines(report(look(smi=["dcmi module initialize failed.\n", 255])))]
    assert "  npu-smi: exit code 255: dcmi module initialize failed." in text


def test_each_variable_says_what_is_right():
    assert [
        name
        for name, each in VARIABLES.items()
        if not each.use or (each.pattern == ".+") != (each.expected == "a value")
    ] == []
