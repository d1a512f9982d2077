"""Machines to look at: files as CANN, the driver and npu-smi leave them, below a folder that stands for /."""

import os
from pathlib import Path

from moeport.ascend.installed import Package

CANN = "/usr/local/Ascend/cann"
OLD_CANN = "/usr/local/Ascend/ascend-toolkit/latest"
TORCH = Package("2.12.0+cpu")
TORCH_NPU = Package("2.12.0.post3", ("torch==2.12.0", "numpy", "pyyaml"))
MINDSPORE = Package("2.10.0")
HEALTHY = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.0                   Version: 25.5.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 93.6        42                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3388 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | OK            | 91.3        43                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3387 / 65536         |
+===========================+===============+====================================================+
"""
SICK = "Alarm".join(HEALTHY.rsplit("OK   ", 1))


def write(root, path, text):
    """A file below the root, with the folders above it."""
    file = Path(root) / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def put_cann(root, folder=CANN, version="9.1.0", file="x86_64-linux/ascend_toolkit_install.info"):
    """CANN, whose version stands in a file of this name."""
    texts = {"version.cfg": f"# version: 1.0\nruntime_running_version=[7.3.0.1.231:{version}]\n"}
    other = f"Version={version}\nversion_dir=x\n" if file.endswith("version.info") else None
    info = f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001C23\npath={folder}\n"
    write(root, f"{folder}/{file}", texts.get(file) or other or info)
    write(root, f"{folder}/lib64/libascendcl.so", "")
    script = Path(folder).parent if folder.endswith("latest") else Path(folder)
    write(root, f"{script}/set_env.sh", "export ASCEND_HOME_PATH=...\n")


def put_driver(root, folder="/usr/local/Ascend", npus=2):
    """Driver, firmware and the device files of NPUs."""
    write(root, f"{folder}/driver/version.info", "Version=25.5.0\nascendhal_version=7.35.23\npackage_version=25.5.0\n")
    write(root, f"{folder}/firmware/version.info", "Version=7.8.0.5.216\nfirmware_version=1.0\n")
    for number in range(npus):
        write(root, f"/dev/davinci{number}", "")
    write(root, "/dev/davinci_manager", "")


def put_smi(root, text=HEALTHY, code=0):
    """npu-smi, which prints this."""
    write(root, "/says", text)
    file = write(root, "/usr/local/sbin/npu-smi", f"#!/bin/sh\ncat {root}/says\nexit {code}\n")
    os.chmod(file, 0o755)


def sourced(root, folder=CANN, **more):
    """The environment after `source set_env.sh`."""
    found = {"HOME": "/home/user", "PATH": "", "ASCEND_HOME_PATH": folder, "ASCEND_TOOLKIT_HOME": folder}
    return found | {"LD_LIBRARY_PATH": f"{folder}/lib64:/opt/other"} | more
