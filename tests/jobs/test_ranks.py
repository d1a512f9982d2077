"""Who asks for a rank gets that rank, also when several ask at a time."""

import threading

from tests.jobs.ranks import Forker, settings

SCRIPT = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))"


def test_each_request_gets_its_own_rank(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    forker, ranks = Forker(["json"], settings()), {}

    def start(number):
        file = str(tmp_path / str(number))
        ranks[number] = forker.start([str(script), file], settings(), f"{file}.log")

    threads = [threading.Thread(target=start, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = [rank.wait(60) for rank in ranks.values()]
    forker.process.stdin.close()
    forker.process.wait(30)
    assert codes == [0] * 40
    assert all(int((tmp_path / str(number)).read_text()) == rank.pid for number, rank in ranks.items())
