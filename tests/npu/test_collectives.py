"""`hccl` over gloo between two processes."""

from tests.jobs.ranks import start_all

CHECKS = ("exchange", "empty_parts", "lists", "reductions", "copies", "refusals", "sharded")


def test_collectives_of_two_ranks(tmp_path):
    commands = [["-m", "tests.npu.exchanges", str(rank), f"file://{tmp_path}/meeting"] for rank in range(2)]
    job = start_all("torch", commands, [{}, {}], tmp_path)
    try:
        code = job.wait(120)
    finally:
        job.kill()
    said = [(tmp_path / f"worker_{rank}.log").read_text() for rank in range(2)]
    assert code == 0, said
    for text in said:
        assert [line.split()[1] for line in text.splitlines() if line.startswith("ok ")] == list(CHECKS)
