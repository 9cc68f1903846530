from __future__ import annotations

from dataclasses import replace

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.placement import HostStats, Placement

IDLE = HostStats(
    num_starting=0,
    num_running=0,
    num_started=0,
    num_failed=0,
    mean_start_s=1.0,
    max_starts=4,
    num_cpus=8,
    mean_pull_s=10.0,
)
GIB = 2**30


def placement_of(*stats: HostStats) -> Placement:
    placement = Placement(len(stats))
    for host, report in enumerate(stats):
        placement.report(host, report)
    return placement


def place(placement: Placement, program: str, image: str = "a:latest") -> int:
    return placement.place(program, image, disk_bytes=GIB)


def test_the_host_that_has_the_image_is_chosen() -> None:
    placement = placement_of(IDLE, IDLE, replace(IDLE, images=("a:latest",)))
    assert place(placement, "p") == 2


def test_load_outweighs_an_image_in_the_end_and_balances_hosts_that_both_have_it() -> None:
    placement = placement_of(IDLE, replace(IDLE, images=("a:latest",)))
    hosts = [place(placement, f"p{i}") for i in range(30)]
    first = hosts.index(0)
    assert 5 <= first <= 10, "a pull takes as long as the load of eight programs on eight CPUs"
    assert hosts.count(0) == hosts.count(1)


def test_an_image_on_its_way_to_a_host_counts_as_there() -> None:
    placement = placement_of(IDLE, IDLE, IDLE)
    assert len({place(placement, f"p{i}") for i in range(4)}) == 1


def test_queued_starts_count() -> None:
    placement = placement_of(replace(IDLE, num_starting=40, mean_start_s=5.0), IDLE)
    assert {place(placement, f"p{i}", f"i{i}") for i in range(4)} == {1}


def test_more_cpus_take_more_programs() -> None:
    placement = placement_of(IDLE, replace(IDLE, num_cpus=24))
    hosts = [place(placement, f"p{i}", f"i{i}") for i in range(40)]
    assert 28 <= hosts.count(1) <= 32


def test_a_host_without_disk_comes_last() -> None:
    full = replace(IDLE, images=("a:latest",), free_disk_bytes=GIB // 2)
    placement = placement_of(full, replace(IDLE, free_disk_bytes=2 * GIB))
    assert place(placement, "p") == 1
    placement.lose(1)
    assert place(placement, "q") == 0


def test_a_full_host_comes_after_those_with_room_and_before_none() -> None:
    full = replace(IDLE, images=("a:latest",), max_sandboxes=2)
    placement = placement_of(full, replace(IDLE, max_sandboxes=3), replace(IDLE, free_disk_bytes=0))
    assert [place(placement, f"p{i}") for i in range(5)] == [0, 0, 1, 1, 1]
    assert place(placement, "waits") == 0, "both are full: where it will wait least"
    placement.forget("p2")
    assert place(placement, "q") == 1


def test_a_program_keeps_its_place_until_it_is_forgotten() -> None:
    placement = placement_of(IDLE, IDLE)
    first = place(placement, "p")
    for i in range(20):
        place(placement, f"q{i}")
    assert place(placement, "p") == first
    assert placement.forget("p") == first
    assert placement.forget("p") is None


def test_nothing_is_placed_on_a_lost_host_and_its_programs_are_lost() -> None:
    placement = placement_of(IDLE, replace(IDLE, images=("a:latest",)))
    assert place(placement, "p") == 1
    placement.lose(1)
    placement.lose(1)
    placement.report(1, IDLE)
    assert placement.hosts == [0]
    assert place(placement, "p") == 1, "what it had is gone: a new place would hide that"
    assert placement.forget("p") is None
    assert place(placement, "p again") == 0
    placement.lose(0)
    with pytest.raises(SandboxFailed, match="no sandbox host is left"):
        place(placement, "q")


def test_each_image_has_one_home_and_homes_move_only_off_a_lost_host() -> None:
    placement = placement_of(IDLE, IDLE, IDLE)
    images = [f"i{i}" for i in range(60)]
    placement.expect(images * 2)
    shares = placement.shares()
    assert sorted(image for share in shares.values() for image in share) == sorted(images * 2)
    assert all(10 < len(set(share)) < 30 for share in shares.values())
    before = {image: placement.home(image) for image in images}
    placement.lose(1)
    for image, home in before.items():
        assert placement.home(image) == home or home == 1


def test_a_sample_that_began_is_no_longer_to_come() -> None:
    placement = placement_of(IDLE)
    placement.expect(["a", "b", "a", "c"])
    placement.started("a")
    placement.started("nobody told")
    assert placement.shares() == {0: ["b", "a", "c"]}
    placement.started("a")
    assert placement.shares() == {0: ["b", "c"]}
