"""What `moeport emulate` refuses before it makes a node or starts a rank."""

import pytest
import typer.testing

from moeport.cli import emulate
from moeport.cli.emulate import check_command, check_framework
from moeport.cli.main import app
from moeport.errors import MoeportError, UserError
from moeport.launch import emulation
from moeport.launch.emulation import EmulatedCluster


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    def refuse():
        raise AssertionError("the emulation began")

    monkeypatch.setattr(emulation, "require", refuse)
    monkeypatch.setattr(emulate, "check_framework", lambda launcher: None)


def run(*arguments):
    return typer.testing.CliRunner().invoke(app, ["emulate", *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "benchh"], "'benchh' is not a command to emulate; expected train, "),
        (["--", "bench"], "'nothing' is not a command to emulate; expected moe, comm"),
        (["--", "bench", "com"], "'com' is not a command to emulate; expected moe, comm"),
        (["--", "emulate", "--", "probe"], "'emulate' is not a command to emulate"),
        (["--", "launch", "a.yaml"], "'launch' is not a command to emulate"),
        (["--inter", "fast", "--", "probe"], "rate 'fast': expected"),
        (["--inter", "\N{SUPERSCRIPT TWO}mbit", "--", "probe"], "mbit': expected a number of bits per second"),
        (["--latency", "soon", "--", "probe"], "latency 'soon': expected a time such as 200us or 1.5ms"),
        (["--nodes", "251", "--", "probe"], "--nodes 251: expected at most 250"),
    ],
)
def test_a_wrong_usage_is_said_first(arguments, said):
    done = run(*arguments)
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "comm", "--iter", "3"], "No such option: --iter"),
        (["bench", "comm", "-f", "1"], "Invalid value for"),
        (["probe", "extra"], "unexpected extra argument"),
        (["train"], "Missing argument 'CONFIG'"),
    ],
)
def test_a_wrong_usage_of_the_command_is_said_by_the_command(arguments, said):
    done = run("--", *arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_help_of_the_command_needs_no_cluster():
    done = run("--", "bench", "comm", "--help")
    assert done.exit_code == 0
    assert "--minbytes" in done.output


@pytest.mark.parametrize(
    "command", [["probe"], ["--debug", "probe"], ["bench", "comm", "flat", "-b", "4K"], ["train", "a.yaml", "--resume"]]
)
def test_a_right_usage_goes_on(command):
    check_command(command)


@pytest.mark.parametrize("latency", ["200us", "1.5ms", "0.1s"])
def test_latencies(latency):
    assert EmulatedCluster(2, "1.5gbit", latency).latency == latency


def test_a_missing_framework_is_said_first(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MoeportError) as caught:
        check_framework("msrun")
    assert str(caught.value) == (
        "--launcher msrun: needs mindspore, which is not installed; install it with: pip install 'moeport[mindspore]'"
    )
