"""What names a person, a machine or a place is not in what the kit writes."""

import os
import socket
from pathlib import Path

import pytest

from moeport.kit.private import VARIABLES, Scrubber, kept_variables

ENVIRONMENT = {
    "HOME": "/home/planted-user",
    "USER": "planted-user",
    "HOSTNAME": "planted-host.cluster.example",
    "API_TOKEN": "planted-secret-0123456789",
    "PROJECT": "planted project of ours",
    "MASTER_ADDR": "planted-master",
    "OMP_NUM_THREADS": "3",
    "HCCL_DETERMINISTIC": "planted-but-kept",
    "EDITOR": "/usr/bin/vi",
    "LEVEL": "12345678",
}

PRIVATE = {
    "home": ('File "/home/planted-user/code/planted-dir/train.py", line 3', 'File "~/…/train.py", line 3'),
    "another's home": ("see /data/planted-dir/planted-run/log.txt", "see <path>/log.txt"),
    "user": ("owned by planted-user", "owned by <user>"),
    "user in capitals": ("owned by PLANTED-USER:", "owned by <user>:"),
    "host": ("planted-host.cluster.example is down", "<host> is down"),
    "first part of the host": ("connect to planted-host:29500", "connect to <host>:29500"),
    "secret": ("token=planted-secret-0123456789", "token=<variable>"),
    "value of words": ("in planted project of ours.", "in <variable>."),
    "value of a launcher": ("cannot reach planted-master", "cannot reach <variable>"),
    "IPv4": ("rank 0 at 10.11.12.13:29500", "rank 0 at <address>:29500"),
    "IPv6": ("listens at [fe80::a1b2:c3d4] now", "listens at [<address>] now"),
    "IPv6 with an interface": ("at fe80::1%eth0", "at <address>"),
    "MAC": ("eth0 is 02:42:ac:11:00:02", "eth0 is <address>"),
    "web address": ("get https://token@planted.example/x?y=1 failed", "get <url> failed"),
    "mail address": ("ask planted.person@planted.example", "ask <mail>"),
    "path after a colon": ("error:/srv/planted-dir/file.yaml: missing", "error:<path>/file.yaml: missing"),
}


@pytest.mark.parametrize("case", PRIVATE)
def test_what_is_private_is_replaced(case):
    given, wanted = PRIVATE[case]
    got = Scrubber(ENVIRONMENT).text(given)
    assert got == wanted
    assert "planted" not in got


HARMLESS = (
    "listens at 127.0.0.1 and ::1",
    "torch 2.13.0+cpu, CANN 8.3.RC2, at 12:34:56 on 2026-11-28",
    "/usr/local/Ascend/driver/version.info, /dev/davinci0, /proc/self/maps",
    "ends with SIGABRT: std::runtime_error, 3/4 of 1e-05, a/b",
    "/usr/bin/vi and 12345678",
    "planted-but-kept",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_alike_everywhere_stays(text):
    assert Scrubber(ENVIRONMENT).text(text) == text


def test_this_machine_is_not_named(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-name.example")
    scrubber = Scrubber()
    text = f"{Path.home()}/x and {os.getcwd()}/planted on planted-name and planted-name.example"
    assert scrubber.text(text).count("planted") == 1  # a name below the current folder, which is not replaced
    assert os.getcwd() not in scrubber.text(text)


def test_values_are_cleaned_throughout():
    value = {"planted-user": [{"x": "planted-secret-0123456789", "n": 3, "none": None}], "flag": True}
    assert Scrubber(ENVIRONMENT).value(value) == {"<user>": [{"x": "<variable>", "n": 3, "none": None}], "flag": True}


def test_folders_of_the_kit_get_a_name():
    assert Scrubber({}, {"/srv/kit-1": "<kit>"}).text("cd /srv/kit-1/probe-0") == "cd <kit>/probe-0"


def test_only_listed_variables_are_kept():
    assert kept_variables(ENVIRONMENT) == {"OMP_NUM_THREADS": "3", "HCCL_DETERMINISTIC": "planted-but-kept"}
    assert not [
        name for name in VARIABLES if any(word in name for word in ("ADDR", "PORT", "IFNAME", "IP", "PATH", "TOKEN"))
    ]
