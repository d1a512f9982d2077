"""Chunks of an exchange beside the experts: closed forms, schedules by hand, bounds."""

import pytest

from moeport.comm.exchange import EXCHANGES, loads
from moeport.comm.load import Demand, Layout, Load, ranks_sharing
from moeport.plan.cost import Link, Links
from moeport.plan.overlap import overlapped
from moeport.plan.routes import expected_routes

LINKS = Links(Link(20e-6, 1.5e9), Link(50e-6, 24e6, 30e6, 40e6), Link(100e-9, 4e9))


def exchange(name, shares, backward):
    layout, demand = Layout(2, 4), Demand(256, 4, 32, 512, backward)
    return loads(name, layout, demand, expected_routes(layout, demand), ranks_sharing(shares, layout))


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("shares", ["nothing", "cluster"])
@pytest.mark.parametrize("backward", [False, True])
def test_one_chunk_takes_the_sum(name, shares, backward):
    found = exchange(name, shares, backward)
    total = LINKS.cost(found).total + 0.02
    assert overlapped(LINKS, found, 0.02, 1, shares == "cluster") == pytest.approx(total)


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("shares", ["nothing", "cluster"])
@pytest.mark.parametrize("experts", [0.0, 0.01, 0.1, 1.0])
def test_no_number_of_chunks_beats_what_is_busiest(name, shares, experts):
    found = exchange(name, shares, True)
    inter = [load for load in found if load.inter_bytes]
    copies = LINKS.cost([load for load in found if load.stage == "copies"]).total
    link = sum(between - inside * (shares == "cluster") for inside, between in map(LINKS.transfers, inter))
    total = LINKS.cost(found).total + experts
    for chunks in (1, 2, 4, 8, 64):
        seconds = overlapped(LINKS, found, experts, chunks, shares == "cluster")
        assert seconds >= copies + max(experts, link)
        messages = (chunks - 1) * sum(LINKS.cost([load]).latency for load in found)
        assert seconds <= total + messages + 1e-12


def test_schedules_by_hand():
    """2 s there, 3 s of experts and 2 s back; in two chunks the experts have one while the other travels."""
    links = Links(Link(0, 1), Link(0, 1))
    there = [Load("dispatch", inter_bytes=2), Load("combine", inter_bytes=2)]
    assert overlapped(links, there, 3.0, 1, False) == 7.0
    # there 0-1, 1-2; experts 1-2.5, 2.5-4; back 2.5-3.5, 4-5
    assert overlapped(links, there, 3.0, 2, False) == 5.0
    # many chunks: the link never waits; or the experts do so for the first and the last alone
    assert overlapped(links, there, 3.0, 100, False) == pytest.approx(4.0)
    assert overlapped(links, there, 6.0, 100, False) == pytest.approx(6.0 + 0.02 + 0.02)
    # experts that take no time hide nothing
    assert overlapped(links, there, 0.0, 2, False) == 4.0


def test_each_chunk_has_all_messages():
    links = Links(Link(0, 1), Link(0.5, 1))
    there = [Load("dispatch", inter_messages=1), Load("combine", inter_messages=1)]
    assert [overlapped(links, there, 0.0, chunks, False) for chunks in (1, 2, 4)] == [1.0, 2.0, 4.0]


def test_what_a_shared_processor_carries_hides_nothing():
    links = Links(Link(0.5, 1), Link(0, 1))
    there = [Load("dispatch", intra_messages=2, intra_bytes=2), Load("combine", intra_bytes=2)]
    assert overlapped(links, there, 3.0, 1, True) == 8.0
    assert overlapped(links, there, 3.0, 2, True) == 9.0  # one more second of messages
    assert overlapped(links, there, 3.0, 2, False) < 8.0


def test_links_inside_and_between_nodes_carry_at_once():
    """A rail and a node stage of 2 s each way: the second chunk is on the rail while the first is inside the node."""
    links = Links(Link(0, 1), Link(0, 1))
    there = [Load("dispatch", inter_bytes=2), Load("dispatch", intra_bytes=2)]
    assert overlapped(links, [*there, Load("combine")], 0.0, 1, False) == 4.0
    assert overlapped(links, [*there, Load("combine")], 0.0, 2, False) == 3.0


def test_the_backward_pass_computes_twice_as_long_the_other_way_round():
    """Forward 1 s there and 4 s back, backward the 4 s first; experts 1 s and 2 s; 2 s of copies."""
    links = Links(Link(0, 1), Link(0, 1), Link(0, 1))
    forward = [Load("dispatch", inter_bytes=1), Load("combine", inter_bytes=4)]
    backward = [Load(load.stage, inter_bytes=load.inter_bytes, is_backward=True) for load in forward]
    both = [*forward, *backward, Load("copies", copied_bytes=2)]
    assert overlapped(links, both, 3.0, 1, False) == 15.0
    # forward: there 0-0.5, 0.5-1, experts 0.5-1, 1-1.5, back 1-3, 3-5
    # backward: there 0-2, 2-4, experts 2-3, 4-5, back 4-4.5, 5-5.5
    assert overlapped(links, both, 3.0, 2, False) == 5.0 + 5.5 + 2.0
