from moeport.comm.traffic import Traffic, Volume


def test_what_stays_is_not_counted():
    traffic = Traffic(rank=1, nodes=(0, 0, 1, 1))
    traffic.add("all_to_all", [1, 10, 100, 1000], row_bytes=8)
    traffic.add("all_to_all", [0, 0, 0, 2], row_bytes=8)
    traffic.add("broadcast", [0, 0, 0, 0], row_bytes=8)
    assert traffic.volumes == {
        "all_to_all": Volume(2, intra_node_rows=1, inter_node_rows=1102, intra_node_bytes=8, inter_node_bytes=8 * 1102),
        "broadcast": Volume(calls=1),
    }


def test_a_snapshot_stays_as_it_is():
    traffic = Traffic(rank=0, nodes=(0, 0))
    traffic.add("all_gather", [3, 3], row_bytes=4)
    snapshot = traffic.snapshot()
    traffic.add("all_gather", [3, 3], row_bytes=4)
    assert snapshot == {"all_gather": Volume(1, 3, 0, 12, 0)}
    traffic.reset()
    assert traffic.snapshot() == {}
    assert snapshot == {"all_gather": Volume(1, 3, 0, 12, 0)}
