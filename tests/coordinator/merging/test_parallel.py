"""Modules side by side: in order, few at a time, one BLAS thread each, equal bytes on any number of cores."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

from coordinator.merging import aggregation, parallel
from coordinator.merging.aggregation import aggregate
from coordinator.merging.parallel import in_order
from coordinator.merging.sources import Addend, StartVersion
from coordinator.storage.blobs import Blobs
from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.messages import Base, Federation
from tests.coordinator.devices import FINGERPRINT, SCALING, SHAPES, random_adapter


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    """The first item finishes last: the others wait for it."""
    others = threading.Barrier(min(workers, 3))

    def work(item: int) -> int:
        if item < min(workers, 3):
            others.wait(10)  # as many at a time as there are workers
        return item * item

    assert list(in_order(work, range(9), workers)) == [n * n for n in range(9)]


def test_no_more_is_begun_than_can_be_worked_on_and_one() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = in_order(work, iter(range(100)), 2)
    assert next(results) == 0
    assert len(begun) <= 3
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 3


def test_an_error_comes_where_its_result_would_have() -> None:
    def work(item: int) -> float:
        return 1 / (2 - item)

    results = in_order(work, range(5), 2)
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_has_one_thread_while_modules_are_side_by_side() -> None:
    before = blas_threads()
    assert list(in_order(lambda _: blas_threads(), range(3), 2)) == [{1}] * 3
    assert blas_threads() == before


def test_a_version_has_the_same_bytes_on_any_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base("made of numpy", FINGERPRINT, SHAPES)
    federation = Federation("f", base, "flexlora", (8,), 12, SCALING, "balanced")
    addends = []
    for seed in range(3):
        path = tmp_path / f"{seed}.safetensors"
        path.write_bytes(encode(random_adapter(8, seed), SCALING))
        addends.append(Addend(str(seed), 1 / 3, path, 8))
    digests = set()
    for workers in (1, 2, 4):
        monkeypatch.setattr(aggregation, "cores", lambda workers=workers: workers)
        write = Blobs(tmp_path / str(workers)).write
        digests.add(aggregate(federation, 1.0, StartVersion(0), addends, write).digest)
    assert len(digests) == 1


def test_there_is_a_core_to_work_on() -> None:
    assert parallel.cores() >= 1
