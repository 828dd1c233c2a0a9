"""The estimate of the time left."""

from qa_platform.batches.pace import Pace


def test_the_time_left_follows_from_the_rows_done_since_the_first_count() -> None:
    pace = Pace()
    assert pace.seconds_left(100, 400, at=50.0) is None
    assert pace.seconds_left(200, 400, at=60.0) == 20.0
    assert pace.seconds_left(200, 400, at=70.0) == 40.0
    assert pace.seconds_left(400, 400, at=80.0) == 0.0


def test_there_is_no_estimate_while_nothing_was_done() -> None:
    pace = Pace()
    assert [pace.seconds_left(done, 9, at=at) for done, at in ((5, 0.0), (5, 60.0), (3, 90.0))] == [None] * 3
