import pytest

from moeport.ascend import installed
from moeport.ascend.installed import Cann, Smi, find_cann, machine, npu_smi, torch_cuda
from tests.ascend.machines import CANN, OLD_CANN, SICK, put_cann, put_driver, put_smi, sourced, write


@pytest.mark.parametrize(
    "file",
    [
        "x86_64-linux/ascend_toolkit_install.info",
        "aarch64-linux/ascend_nnae_install.info",
        "ascend_toolkit_install.info",
        "compiler/version.info",
        "runtime/version.info",
        "version.cfg",
    ],
)
@pytest.mark.parametrize("version", ["8.3.RC1", "9.1.0"])
def test_the_version_of_cann_is_read_from_each_of_its_files(tmp_path, file, version):
    put_cann(tmp_path, version=version, file=file)
    (found,) = find_cann({}, tmp_path)
    assert found == Cann(CANN, version, None, f"{CANN}/set_env.sh")
    assert found.release == version[:3]


def test_the_cann_that_the_environment_names_comes_first(tmp_path):
    put_cann(tmp_path)
    put_cann(tmp_path, OLD_CANN, "8.2.RC1")
    put_cann(tmp_path, "/opt/cann", "9.0.0")
    put_cann(tmp_path, "/home/user/Ascend/cann", "8.5.0")
    found = list(find_cann(sourced(tmp_path, "/opt/cann"), tmp_path))
    assert [(cann.folder, cann.version, cann.named_by) for cann in found] == [
        ("/opt/cann", "9.0.0", "ASCEND_HOME_PATH"),
        (CANN, "9.1.0", None),
        (OLD_CANN, "8.2.RC1", None),
        ("/home/user/Ascend/cann", "8.5.0", None),
    ]
    assert found[2].script == "/usr/local/Ascend/ascend-toolkit/set_env.sh"


def test_a_folder_that_several_names_reach_is_one_cann(tmp_path):
    put_cann(tmp_path, "/usr/local/Ascend/cann-9.1.0")
    (tmp_path / "usr/local/Ascend/cann").symlink_to("cann-9.1.0")
    (found,) = find_cann(sourced(tmp_path, "/usr/local/Ascend/cann-9.1.0"), tmp_path)
    assert found.named_by == "ASCEND_HOME_PATH"


def test_a_cann_without_a_version_is_found_too(tmp_path):
    write(tmp_path, f"{CANN}/x86_64-linux/ascend_toolkit_install.info", "\0\xff nothing\n")
    (found,) = find_cann({}, tmp_path)
    assert (found.version, found.release, found.script) == (None, None, None)


def test_a_whole_machine(tmp_path):
    put_cann(tmp_path)
    put_driver(tmp_path, npus=8)
    put_smi(tmp_path)
    found = machine(sourced(tmp_path, TASK_QUEUE_ENABLE="2", EDITOR="vi"), tmp_path)
    assert found.is_ascend
    assert (found.driver, found.firmware) == ("25.5.0", "7.8.0.5.216")
    assert found.devices == tuple(f"davinci{number}" for number in range(8))
    assert found.smi.version == "25.5.0"
    assert found.smi.chips == (("910B3", "OK"), ("910B3", "OK"))
    assert found.environment["TASK_QUEUE_ENABLE"] == "2"
    assert not {"EDITOR", "HOME", "PATH"} & found.environment.keys()


def test_the_driver_is_where_the_system_says(tmp_path):
    put_driver(tmp_path, folder="/data/npu")
    write(tmp_path, "/etc/ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/data/npu\n")
    assert machine({}, tmp_path).driver == "25.5.0"


def test_an_ordinary_machine_has_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "package", lambda name: None)
    found = machine({"PATH": "", "HOME": "/root"}, tmp_path)
    assert not found.is_ascend
    assert found == installed.Machine((), None, None, None, (), {}, found.torch_cuda, {})


def test_npu_smi_that_fails(tmp_path):
    put_smi(tmp_path, "DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\ndcmi module initialize failed.\n", code=255)
    found = npu_smi({"PATH": ""}, tmp_path)
    assert found.problem == "exit code 255: DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)"
    assert found.chips == ()


def test_npu_smi_that_hangs(tmp_path, monkeypatch):
    put_smi(tmp_path)
    monkeypatch.setattr(installed, "SECONDS", 0.2)
    write(tmp_path, "/usr/local/sbin/npu-smi", "#!/bin/sh\nexec sleep 60\n")
    path = str(tmp_path / "usr/local/sbin/npu-smi")
    assert npu_smi({"PATH": ""}, tmp_path) == Smi(path, problem="does not answer within 0.2 s")


def test_health_of_each_npu(tmp_path):
    put_smi(tmp_path, SICK)
    assert npu_smi({"PATH": ""}, tmp_path).chips == (("910B3", "OK"), ("910B3", "Alarm"))


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("cuda: Optional[str] = None", None),
        ("hip: Optional[str] = '6.3'", None),
    ],
)
def test_the_build_of_pytorch_is_read_without_importing_it(tmp_path, monkeypatch, line, cuda):
    write(tmp_path, "torch/__init__.py", "raise SystemExit('imported')")
    write(tmp_path, "torch/version.py", f"__version__ = '2.14.0'\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert torch_cuda() == cuda


def test_versions_for_the_records_of_a_run(tmp_path, monkeypatch):
    put_cann(tmp_path)
    found = list(find_cann(sourced(tmp_path), tmp_path))
    installed.current_cann.cache_clear()
    monkeypatch.setattr(installed, "find_cann", lambda: found)
    assert installed.versions("torch-npu", "no-such-package") == {"CANN": "9.1.0"} | (
        {"torch_npu": installed.package("torch-npu").version} if installed.package("torch-npu") else {}
    )
    installed.current_cann.cache_clear()
    monkeypatch.setattr(installed, "find_cann", lambda: found[1:])
    assert installed.versions() == {}
    installed.current_cann.cache_clear()
