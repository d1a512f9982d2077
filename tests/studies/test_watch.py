"""`moeport watch`: what it reads of runs, what the page shows, and what a reader of its port cannot do."""

import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeport.cli.main import main
from moeport.errors import UserError
from moeport.studies.watch import parts
from moeport.studies.watch import tail as tails
from moeport.studies.watch.followed import CELLS, POINTS, Followed, followed
from moeport.studies.watch.parts import Page
from moeport.studies.watch.server import WatchServer
from moeport.studies.watch.tail import Tail
from moeport.training.lock import LOCK_FILE, RunLock
from moeport.training.metrics import EvaluationMetrics, MetricsLog, iterate_metrics
from moeport.training.metrics_table import StepMetrics
from moeport.training.run_metrics import RunMetrics, drawn
from moeport.training.starts import record_start
from tests.training.metrics_examples import STEP, SUMMARY, write_run

CONFIG = "training: {steps: 40}\nmodel:\n  num_layers: 4\n"


@pytest.fixture
def run_dir(tmp_path):
    """A run in the middle."""
    folder = tmp_path / "mine"
    write_run(folder, 30, summary=None, config=CONFIG)
    return folder


def next_step(step, **values):
    """A step of the same model."""
    return replace(STEP, step=step, expert_load=[[0.125] * 8] * 4, drop_rate_per_layer=[0.1] * 4, **values)


@contextmanager
def served(*folders):
    with WatchServer(Page(followed(list(folders)))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path, method="GET", **headers):
    """Status, headers and text of an answer; the path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def state(server, have=0):
    status, _, body = ask(server, f"/{server.token}/state?have={have}")
    assert status == 200
    return json.loads(body)


class TestTail:
    def test_lines_come_once_and_whole(self, tmp_path):
        tail = Tail(tmp_path, "log")
        assert tail.read() == (False, [])
        path = tmp_path / "log"
        path.write_bytes(b"one\ntw")
        assert tail.read() == (True, [b"one"])
        with path.open("ab") as file:
            file.write(b"o\nthree\n")
        assert tail.read() == (False, [b"two", b"three"])
        assert tail.read() == (False, [])

    def test_a_file_in_its_place_begins_anew(self, tmp_path):
        tail, path = Tail(tmp_path, "log"), tmp_path / "log"
        path.write_bytes(b"one\ntwo\n")
        tail.read()
        (tmp_path / "other").write_bytes(b"one\ntwo\nthree\n")
        (tmp_path / "other").replace(path)
        assert tail.read() == (True, [b"one", b"two", b"three"])
        path.write_bytes(b"four\n")  # cut, and the same file
        assert tail.read() == (True, [b"four"])
        path.unlink()
        assert tail.read() == (True, [])

    def test_a_file_that_has_grown_in_its_place_begins_anew(self, tmp_path):
        """As where the number of the old file was given to the new one."""
        tail, path = Tail(tmp_path, "log"), tmp_path / "log"
        path.write_bytes(b"one\ntwo\n")
        tail.read()
        path.write_bytes(b"four\nfive\nsix\n")
        assert tail.read() == (True, [b"four", b"five", b"six"])
        assert tail.read() == (False, [])

    def test_a_large_file_is_read_piece_by_piece(self, tmp_path):
        (tmp_path / "log").write_bytes(b"".join(b"%03d\n" % i for i in range(100)))
        tail, found, behind = Tail(tmp_path, "log", most=50), [], []
        for _ in range(10):
            found += tail.read()[1]
            behind.append(tail.is_behind)
        assert found == [b"%03d" % i for i in range(100)]
        assert behind == [True] * 8 + [False] * 2

    def test_a_line_that_does_not_fit_and_a_link_that_leads_out_are_refused(self, tmp_path):
        (tmp_path / "inside").mkdir()
        (tmp_path / "secret").write_bytes(b"secret\n")
        (tmp_path / "inside" / "log").symlink_to(tmp_path / "secret")
        with pytest.raises(OSError, match="a link that leads out of the folder"):
            Tail(tmp_path / "inside", "log").read()
        (tmp_path / "long").write_bytes(b"x" * 100)
        with pytest.raises(OSError, match="has a line of more than 50 bytes"):
            Tail(tmp_path, "long", most=50).read()


class TestFollowed:
    def same(self, run, path):
        """Whether a run that was followed has what reading the file at once has."""
        whole = RunMetrics(POINTS, CELLS)
        for record in iterate_metrics(path):
            whole.add(record)
        assert (repr(run.metrics.last), run.metrics.num_steps) == (repr(whole.last), whole.num_steps)  # it has NaN
        for kind in (StepMetrics, EvaluationMetrics):
            for name in drawn(kind):
                a, b = run.metrics.series(kind, name), whole.series(kind, name)
                np.testing.assert_array_equal(a.y, b.y)
                np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(run.metrics.loads.mean, whole.loads.mean)

    def test_a_run_that_is_resumed_meanwhile_is_as_if_read_at_once(self, run_dir):
        run = Followed(run_dir, "mine")
        assert (run.steps, run.total) == (30, 40)
        self.same(run, run_dir / "metrics.jsonl")
        assert not run.refresh()
        with MetricsLog(run_dir, resume_step=20) as log:
            for step in range(21, 24):
                log.step(next_step(step, loss=1.0))
        assert run.refresh()
        assert run.steps == 23
        self.same(run, run_dir / "metrics.jsonl")

    def test_lines_that_are_no_records_are_counted(self, run_dir):
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('rubbish\n{"step": 31}\n[[[[\n\xff\n')
        run = Followed(run_dir, "mine")
        assert (run.unreadable, run.steps) == (4, 30)
        card = parts.card(run)
        assert card.faults == ["4 lines of its metrics are not records and are left out"]

    def test_records_that_no_run_writes_do_no_harm(self, run_dir):
        path = run_dir / "metrics.jsonl"
        steps = [line for line in path.read_text().splitlines() if "val_loss" not in line]
        wrong: dict[str, list[Any]] = {
            "loss": [10**400, True, []],
            "step_time": [10**400],
            "expert_load": [[1], [[1]], [[1], [1, 2]], [[10**400] * 8] * 4, {}],
            "drop_rate_per_layer": [[10**400], [[0.1]], [0.1] * 5],
            "capacity_per_layer": [[None], [[1]]],
            "exchanged_bytes_per_layer": [[1], [None], [[1]]],
            "loss_by_objective": [{"a": 10**400}],
        }
        harmless: dict[str, list[Any]] = {
            "loss": [1e308, None],
            "mfu": [1e308],
            "grad_norm": [1e308],
            "expert_load": [[[]]],
        }
        with path.open("a") as file:
            for key, values in [*wrong.items(), *harmless.items()]:
                for value in values:
                    file.write(json.dumps({**json.loads(steps[-1]), "step": 31, key: value}) + "\n")
        run = Followed(run_dir, "mine")
        assert run.unreadable == sum(map(len, wrong.values()))
        assert run.steps == 31
        assert Page([run]).changes(0)["parts"].keys() >= {"runs", "chart Loss Loss", "layers 0 loads"}

    def test_a_fault_that_has_passed_is_forgotten(self, run_dir):
        path = run_dir / "metrics.jsonl"
        run = Followed(run_dir, "mine")
        path.rename(run_dir / "aside")
        path.mkdir()
        run.refresh()
        assert parts.card(run).faults == ["Its metrics cannot be read: it is a folder, not a file"]
        path.rmdir()
        (run_dir / "aside").rename(path)
        run.refresh()
        assert (parts.card(run).faults, run.steps) == ([], 30)

    def test_the_time_left_is_that_of_the_recent_steps(self, run_dir):
        assert Followed(run_dir, "mine").seconds_left == pytest.approx(10 * 0.66)

    def test_a_longer_config_is_noticed(self, run_dir):
        run = Followed(run_dir, "mine")
        (run_dir / "config.yaml").write_text(CONFIG.replace("40", "4000"))
        assert run.refresh()
        assert run.total == 4000

    def test_memory_is_bounded(self, tmp_path, monkeypatch):
        folder = tmp_path / "long"
        folder.mkdir()
        line = json.dumps({**json.loads(first_line(tmp_path)), "expert_load": [[0.125] * 64] * 8})
        with (folder / "metrics.jsonl").open("w") as file:
            for step in range(1, 1001):
                file.write(line.replace('"step": 1', f'"step": {step}', 1) + "\n")
        monkeypatch.setattr(tails, "MOST_BYTES", 2**20)
        run = Followed(folder, "long")
        assert run.is_behind
        while run.is_behind:
            run.refresh()
        assert run.steps == 1000
        assert len(run.metrics.series(StepMetrics, "loss").x) <= POINTS
        assert run.metrics.loads.mean.size <= CELLS

    def test_states(self, run_dir):
        run = Followed(run_dir, "mine")
        assert run.state() == ("stopped", "No process trains in the folder; continue with --resume")
        with RunLock(run_dir, print):
            assert run.state()[0] == "training"
            assert f"process {os.getpid()} on host" in run.state()[1]
            held = json.loads((run_dir / LOCK_FILE).read_text())
        (run_dir / LOCK_FILE).write_text(json.dumps(held | {"started": "0"}))
        assert run.state()[0] == "dead"
        assert run.state()[1].endswith("has ended and left its lock behind; continue with --resume")
        (run_dir / LOCK_FILE).write_text(json.dumps(held | {"host": "elsewhere"}))
        assert run.state()[0] == "training"
        os.utime(run_dir / LOCK_FILE, (1, 1))
        assert run.state()[0] == "dead"
        (run_dir / LOCK_FILE).unlink()
        (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"steps": 30}))
        assert run.state()[0] == "stopped"  # the summary of a shorter run
        (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {"steps": 40}))
        assert run.state() == ("finished", "")

    def test_a_run_that_has_not_begun_its_first_step(self, tmp_path):
        (tmp_path / "config.yaml").write_text(CONFIG)
        with RunLock(tmp_path, print):
            card = parts.card(Followed(tmp_path, "new"))
        assert (card.state, card.steps, card.figures) == ("starting", "no step yet", [])


def first_line(tmp_path):
    write_run(tmp_path / "first", 1, evaluations=0)
    return (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[0]


class TestPage:
    def test_only_what_has_changed_is_sent(self, run_dir, monkeypatch):
        monkeypatch.setattr(parts, "REFRESH_SECONDS", 0.0)
        monkeypatch.setattr(parts, "HEAT_SECONDS", 0.0)
        page = Page(followed([run_dir]))
        first = page.changes(0)
        keys = [key for key, _ in first["order"]]
        assert set(first["parts"]) == set(keys)
        assert {"runs", "chart Loss Loss", "chart Routing Drop rate", "layers 0 loads", "layers 0 drops"} <= {*keys}
        again = page.changes(first["version"])
        assert set(again["parts"]) <= {"runs"}
        with MetricsLog(run_dir, resume_step=30) as log:
            log.step(next_step(31))
        after = page.changes(again["version"])
        assert "chart Loss Loss" in after["parts"]
        assert "chart Loss Validation bits per byte" in after["parts"]  # its axis has grown
        assert set(page.changes(first["version"])["parts"]) >= set(after["parts"])

    def test_heat_maps_catch_up_although_nothing_else_comes(self, run_dir, monkeypatch):
        monkeypatch.setattr(parts, "REFRESH_SECONDS", 0.0)
        page = Page(followed([run_dir]))
        page.changes(0)
        with MetricsLog(run_dir, resume_step=30) as log:
            log.step(next_step(31))
        version = page.changes(0)["version"]
        assert "layers 0 drops" not in page.changes(version)["parts"]
        monkeypatch.setattr(parts, "HEAT_SECONDS", 0.0)
        assert "layers 0 drops" in page.changes(version)["parts"]

    def test_readers_that_ask_often_do_not_read_the_disk_more_often(self, run_dir):
        page = Page(followed([run_dir]))
        version = page.changes(0)["version"]
        with MetricsLog(run_dir, resume_step=30) as log:
            log.step(next_step(31))
        assert page.changes(version) == page.changes(version) | {"version": version, "parts": {}}

    def test_several_runs_share_charts(self, run_dir, tmp_path):
        write_run(tmp_path / "other", 20, summary=None, drop=0.0)
        found = Page(followed([run_dir, tmp_path / "other"])).changes(0)
        loss = found["parts"]["chart Loss Loss, training"]
        assert loss.count('data-run="mine"') == loss.count('data-run="other"') == 2
        assert "chart Loss Loss, validation" in found["parts"]
        groups = dict(map(tuple, found["order"]))
        assert groups["layers 1 loads"] == "Expert load by layer of other"
        assert "layers 1 drops" not in groups
        assert found["parts"]["runs"].count("<article") == 2

    def test_names_and_notes_are_text(self, tmp_path):
        folder = tmp_path / "<img src=x>"
        write_run(folder, 3)
        page = Page(followed([folder]))
        assert "<img src=x>" not in page.html() + page.changes(0)["parts"]["runs"]
        assert "&lt;img src=x&gt;" in page.html()

    def test_runs_of_one_name_are_told_apart(self, tmp_path):
        for parent in ("a", "b"):
            write_run(tmp_path / parent / "run", 2)
        runs = followed([tmp_path / "a" / "run", tmp_path / "b" / "run"])
        assert [run.name for run in runs] == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]
        with pytest.raises(UserError, match="is given twice; expected each run once"):
            followed([tmp_path / "a" / "run", tmp_path / "a" / ".." / "a" / "run"])


class TestServer:
    def test_the_page_and_its_parts(self, run_dir):
        with served(run_dir) as server:
            assert server.address == f"http://127.0.0.1:{server.server_port}/{server.token}/"
            status, headers, body = ask(server, f"/{server.token}/")
            assert status == 200
            assert b"<title>mine" in body
            assert b"http://" not in body.replace(b"http-equiv", b"")
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
            assert state(server)["version"] == 1
            _, headers, body = ask(server, f"/{server.token}/state?have=0", **{"Accept-Encoding": "gzip"})
            assert headers["Content-Encoding"] == "gzip"
            assert "runs" in json.loads(gzip.decompress(body))["parts"]
            assert ask(server, f"/{server.token}")[1]["Location"] == f"/{server.token}/"
            status, headers, body = ask(server, f"/{server.token}/", "HEAD")
            assert (status, body) == (200, b"")
            assert int(headers["Content-Length"]) > 1000

    def test_without_the_token_nothing_is_told(self, run_dir):
        with served(run_dir) as server:
            token = server.token
            assert len(token) >= 32
            for path in (
                "/",
                "/favicon.ico",
                f"/{token[:-1]}/",
                f"/{token}x/",
                f"/{token.swapcase()}/",
                "//",
            ):
                status, _, body = ask(server, path)
                assert (status, body) == (403, b"403: the address lacks the token that moeport watch has printed\n")
        with served(run_dir) as other:
            assert other.token != token

    def test_a_token_that_is_no_ascii_is_a_wrong_one(self, run_dir):
        with served(run_dir) as server, socket.create_connection(("127.0.0.1", server.server_port), 30) as connection:
            connection.sendall(b"GET /\xe9\xff/ HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert connection.recv(64).startswith(b"HTTP/1.0 403")

    def test_names_that_may_be_an_attackers_are_refused_in_the_host_header(self, run_dir):
        with served(run_dir) as server:
            for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.x"):
                assert ask(server, f"/{server.token}/", Host=host)[0] == 403, host
            for host in ("localhost", "LOCALHOST:9", "127.0.0.1:1", "[::1]:8000", "192.168.0.7:80"):
                assert ask(server, f"/{server.token}/", Host=host)[0] == 200, host

    def test_other_methods_are_refused(self, run_dir):
        with served(run_dir) as server:
            for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
                status, headers, _ = ask(server, f"/{server.token}/", method)
                assert (status, headers["Allow"]) == (405, "GET, HEAD"), method

    def test_no_path_leads_to_a_file(self, run_dir):
        (run_dir.parent / "secret").write_text("a secret")
        (run_dir / "link").symlink_to(run_dir.parent / "secret")
        with served(run_dir) as server:
            for rest in (
                "metrics.jsonl",
                "link",
                "../secret",
                "..%2fsecret",
                "%2e%2e/secret",
                "..%252fsecret",
                "..\\secret",
                f"/{run_dir.parent}/secret",
                f"{run_dir.parent}/secret",
                "%2fetc%2fpasswd",
                "state/../../secret",
                "state",
                "state?have=",
                "state?have=-1",
                "state?have=1&have=2",
                "state?have=" + "9" * 30,
                "state%00?have=0",
                "./",
            ):
                status, _, body = ask(server, f"/{server.token}/{rest}")
                assert (status, body) == (404, b"404: there is nothing here\n"), rest
            for path in (f"{run_dir.parent}/secret", "../secret", f"file://{run_dir.parent}/secret"):
                assert ask(server, path)[0] in (400, 403)

    def test_links_out_of_the_folder_are_not_followed(self, tmp_path):
        outside, inside = tmp_path / "outside", tmp_path / "inside"
        write_run(outside, 5, config="model: {num_layers: 9}\n", summary=SUMMARY | {"steps": 5})
        inside.mkdir()
        record_start(outside, 3, 1, "text")
        assert Followed(outside, "outside").resumed == [3]
        for name in ("metrics.jsonl", "config.yaml", "summary.json", "starts.jsonl"):
            (inside / name).symlink_to(outside / name)
        write_run(tmp_path / "partly", 5)
        (tmp_path / "partly" / "starts.jsonl").symlink_to(outside / "starts.jsonl")
        assert Followed(tmp_path / "partly", "partly").resumed == []
        with served(inside) as server:
            found = state(server)
        assert [key for key, _ in found["order"]] == ["runs"]
        text = found["parts"]["runs"]
        assert "is a link that leads out of the folder" in text
        assert "layers of width" not in text
        assert "finished" not in text

    def test_a_port_that_is_taken_is_a_users_error(self, run_dir):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(
                UserError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: .*choose another --port"
            ):
                WatchServer(Page(followed([run_dir])), port=port)
        with pytest.raises(UserError, match=r"^cannot listen on an empty address: [^;]+; name an address of this"):
            WatchServer(Page(followed([run_dir])), "")


def test_the_command_serves_until_a_signal_and_leaves_the_run_as_it_was(run_dir):
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-m", "moeport", "watch", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().split()[-1]
        host, _, rest = address.removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", f"/{rest}state?have=0")
        assert b"step 30 of 40" in connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGTERM)  # as Ctrl-C does, which a run in the background ignores
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, error) == (130, "error: interrupted by SIGTERM\n")
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before


def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for folder, message in (("none", "no such folder"), ("empty", "not a run folder: it has no config.yaml")):
        monkeypatch.setattr(sys, "argv", ["moeport", "watch", str(tmp_path / folder)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert (exit_.value.code, f"{tmp_path / folder}: {message}" in capsys.readouterr().err) == (2, True)
