"""The plan: for any history of uploads, overwrites, failures and crashes, every remaining file is answered once and none is missed."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_platform.batches.plan import Limits, Plan, batch_id, plan
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.ledger.states import DONE, Known

LIMITS = Limits(files=3, bytes=1000, batches=100)


def version(name: str, generation: int = 1, size: int = 10, crc32c: str = "") -> FileVersion:
    return FileVersion(name, generation, size, crc32c or f"crc-{name}-{generation}")


def planned(found: Plan) -> list[FileVersion]:
    return [v for batch in found.batches for v in batch.versions]


def test_new_files_are_batched_oldest_first_within_the_limits() -> None:
    listing = [version(f"f{i}", generation=100 - i) for i in range(7)]
    found = plan(listing, {}, set(), LIMITS)
    assert [len(batch.versions) for batch in found.batches] == [3, 3, 1]
    assert [v.generation for v in planned(found)] == sorted(v.generation for v in listing)


def test_a_batch_may_be_as_large_as_the_limit() -> None:
    found = plan([version("a", 1, 400), version("b", 2, 600), version("c", 3, 1)], {}, set(), LIMITS)
    assert [[v.name for v in batch.versions] for batch in found.batches] == [["a", "b"], ["c"]]


def test_a_file_larger_than_a_batch_goes_alone() -> None:
    found = plan([version("a", 1, 900), version("b", 2, 5000), version("c", 3, 50)], {}, set(), LIMITS)
    assert [[v.name for v in batch.versions] for batch in found.batches] == [["a"], ["b"], ["c"]]


def test_an_overwritten_file_is_new_work_although_its_old_generation_is_done() -> None:
    found = plan([version("a", 2)], {("a", 1): Known(FileStatus.FINISHED)}, set(), LIMITS)
    assert planned(found) == [version("a", 2)]


def test_equal_content_is_unchanged_and_not_answered_again() -> None:
    answered = {"a": replace(version("a", 1, crc32c="same"), md5="same")}
    found = plan([replace(version("a", 2, crc32c="same"), md5="same")], {}, set(), LIMITS, answered=answered)
    assert (found.unchanged, found.batches, found.alike) == ((version("a", 2, crc32c="same"),), (), ())


@pytest.mark.parametrize(("before", "now", "alike"), [("same", "other", 0), ("", "same", 1), ("same", "", 1), ("", "", 1)])
def test_equal_size_and_checksum_without_an_equal_md5_are_answered(before: str, now: str, alike: int) -> None:
    answered = {"a": replace(version("a", 1, crc32c="same"), md5=before)}
    found = plan([replace(version("a", 2, crc32c="same"), md5=now)], {}, set(), LIMITS, answered=answered)
    assert (found.unchanged, len(found.batches), len(found.alike)) == ((), 1, alike)


def test_a_retry_is_work_although_the_content_is_answered() -> None:
    answered = {"a": replace(version("a", 1, crc32c="same"), md5="same")}
    known = {("a", 2): Known(FileStatus.PENDING, load_id=2)}
    assert planned(plan([replace(version("a", 2, crc32c="same"), md5="same")], known, set(), LIMITS, answered=answered))


def test_an_upload_that_is_known_and_was_not_begun_may_be_unchanged_too() -> None:
    answered = {"a": replace(version("a", 1, crc32c="same"), md5="same")}
    known = {("a", 2): Known(FileStatus.PENDING)}
    found = plan([replace(version("a", 2, crc32c="same"), md5="same")], known, set(), LIMITS, answered=answered)
    assert (found.unchanged, found.batches) == ((version("a", 2, crc32c="same"),), ())


@pytest.mark.parametrize(("upload", "before"), [((2, ""), (1, "")), ((2, "same"), (2, "same")), ((2, "same"), (1, "other"))])
def test_an_upload_without_a_checksum_or_of_the_same_generation_or_another_sum_is_not_unchanged(
    upload: tuple[int, str], before: tuple[int, str]
) -> None:
    new, old = (FileVersion("a", generation, 10, crc32c, "md5") for generation, crc32c in (upload, before))
    found = plan([new], {}, set(), LIMITS, answered={"a": old})
    assert (planned(found), found.unchanged) == ([new], ())


def test_a_file_that_waits_uncharged_is_batched_with_the_new_ones() -> None:
    known = {("b", 1): Known(FileStatus.PENDING)}
    found = plan([version("a"), version("b"), version("c")], known, set(), LIMITS)
    assert [[v.name for v in batch.versions] for batch in found.batches] == [["a", "b", "c"]]


def test_a_first_file_that_is_larger_than_a_batch_leaves_no_empty_batch_before_it() -> None:
    found = plan([version("a", 1, 5000), version("b", 2, 50)], {}, set(), LIMITS)
    assert [[v.name for v in batch.versions] for batch in found.batches] == [["a"], ["b"]]


def test_a_charged_file_goes_alone_and_the_others_are_batched_without_it() -> None:
    known = {("b", 1): Known(FileStatus.PENDING, attempts=1)}
    found = plan([version("a"), version("b"), version("c")], known, set(), LIMITS)
    assert sorted([v.name for v in batch.versions] for batch in found.batches) == [["a", "c"], ["b"]]


def test_no_kind_of_file_waits_for_all_of_another() -> None:
    kinds = {
        "left": Known(FileStatus.RUNNING, batch_id="left"),
        "failed": Known(FileStatus.PENDING, attempts=1),
        "new": None,
        "again": Known(FileStatus.PENDING, load_id=2),
    }
    files = {kind: [version(f"{kind}{i}", i) for i in range(1, 99)] for kind in kinds}
    known = {
        (v.name, v.generation): replace(state, batch_id=state.batch_id and v.name)
        for kind, state in kinds.items()
        if state
        for v in files[kind]
    }
    listing = [v for versions in files.values() for v in versions]
    found = plan(listing, known, set(), Limits(files=2, bytes=1000, batches=5))
    names = [[v.name for v in batch.versions] for batch in found.batches]
    assert names == [["left1"], ["failed1"], ["new1", "new2"], ["again1", "again2"], ["left2"]]


def test_large_files_that_are_answered_again_do_not_cut_the_batches_of_new_ones() -> None:
    again = [version(f"again{i}", i, size=900) for i in range(1, 99)]
    new = [version(f"new{i}", 100 + i) for i in range(3)]
    known = {(v.name, v.generation): Known(FileStatus.PENDING, load_id=2) for v in again}
    found = plan([*again, *new], known, set(), LIMITS)
    assert found.batches[0].versions == tuple(new)


def test_a_charged_file_waits_until_it_is_due() -> None:
    found = plan([version("a")], {("a", 1): Known(FileStatus.PENDING, attempts=1, due=False)}, set(), LIMITS)
    assert (found.batches, found.waiting) == ((), 1)


def test_a_parked_file_does_not_hold_the_others() -> None:
    known = {("a", 1): Known(FileStatus.FAILED, attempts=3)}
    assert planned(plan([version("a"), version("b", 2)], known, set(), LIMITS)) == [version("b", 2)]


def test_what_a_vanished_run_left_comes_again_under_its_old_batch_id() -> None:
    known = {("a", 1): Known(FileStatus.RUNNING, batch_id="old"), ("b", 1): Known(FileStatus.PENDING, batch_id="old")}
    found = plan([version("a"), version("b"), version("c")], known, set(), LIMITS)
    assert {batch.id: sorted(v.name for v in batch.versions) for batch in found.batches}["old"] == ["a", "b"]


def test_a_batch_id_depends_on_generation_and_load_id_but_not_on_order() -> None:
    a, b = (version("a"), 1), (version("b"), 1)
    assert batch_id([a, b]) == batch_id([b, a])
    assert len({batch_id([a]), batch_id([b]), batch_id([(version("a"), 2)]), batch_id([(version("a", 2), 1)])}) == 4


NAMES = st.sampled_from(["a.csv", "b.csv", "ü/..csv", "c.csv", "d.csv"])
STATES = st.builds(
    Known,
    st.sampled_from(FileStatus),
    attempts=st.integers(0, 3),
    load_id=st.integers(1, 3),
    batch_id=st.sampled_from(["", "x", "y"]),
    due=st.booleans(),
)


@given(
    st.dictionaries(NAMES, st.integers(1, 3)),
    st.dictionaries(st.tuples(NAMES, st.integers(1, 3)), STATES),
    st.sets(NAMES),
    st.builds(Limits, files=st.integers(1, 3), bytes=st.integers(1, 40), batches=st.integers(100, 200)),
)
def test_everything_that_is_not_done_claimed_or_delayed_is_planned_exactly_once(
    live: dict[str, int], known: dict[tuple[str, int], Known], claimed: set[str], limits: Limits
) -> None:
    listing = [version(name, generation) for name, generation in live.items()]
    found = plan(listing, known, claimed, limits)

    def waits(v: FileVersion) -> bool:
        state = known.get((v.name, v.generation))
        return v.name not in claimed and (state is None or (state.status not in DONE and state.due))

    assert sorted(planned(found)) == sorted(v for v in listing if waits(v))
    assert not claimed & {v.name for v in planned(found)}


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("upload"), NAMES),
            st.tuples(st.just("delete"), NAMES),
            st.tuples(st.just("tick"), st.sampled_from(["succeed", "crash", "fail"])),
        ),
        max_size=40,
    )
)
def test_after_any_history_the_newest_generation_of_every_file_that_stays_is_answered(history: list[tuple[str, str]]) -> None:
    live: dict[str, FileVersion] = {}
    known: dict[tuple[str, int], Known] = {}
    answers: list[FileVersion] = []
    generation = 0

    def tick(outcome: str) -> None:
        for batch in plan(live.values(), known, set(), LIMITS).batches:
            for v in batch.versions:
                if outcome == "succeed":
                    known[v.name, v.generation] = Known(FileStatus.FINISHED)
                    answers.append(v)
                elif outcome == "crash":
                    known[v.name, v.generation] = Known(FileStatus.RUNNING, batch_id=batch.id)
                else:
                    known[v.name, v.generation] = Known(FileStatus.PENDING, attempts=1)

    for action, subject in history:
        if action == "upload":
            generation += 1
            live[subject] = version(subject, generation)
        elif action == "delete":
            live.pop(subject, None)
        else:
            tick(subject)
    tick("succeed")
    assert set(live.values()) <= set(answers)
    assert len(answers) == len(set(answers))


ACTIONS = st.one_of(
    # Contents are few, so that the same is uploaded again; the clock stands still now and then, so that times are equal.
    st.tuples(st.just("upload"), NAMES, st.sampled_from(["one", "two"]), st.integers(0, 1)),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("retry"), NAMES),
    st.tuples(st.just("tick"), st.sampled_from(["succeed", "crash", "fail", "part", "work", "put off"])),
    st.tuples(st.just("lease runs out")),
    st.tuples(st.just("time passes")),
)


class World:
    """A bucket, what is recorded of it, and the runs that are at work: a model of everything around the plan."""

    def __init__(self) -> None:
        self.clock = 0
        self.live: dict[str, FileVersion] = {}
        self.known: dict[tuple[str, int], Known] = {}
        self.claimed: set[str] = set()
        self.in_table: dict[str, FileVersion] = {}
        self.answers: list[tuple[FileVersion, int]] = []

    def upload(self, name: str, content: str, elapsed: int) -> None:
        self.clock += elapsed
        before = [generation for known_name, generation in self.known if known_name == name]
        before += [self.live[name].generation] if name in self.live else []
        self.live[name] = version(name, max([self.clock, *(generation + 1 for generation in before)]), crc32c=content)

    def retry(self, name: str) -> None:
        found = self.live.get(name)
        if found and (state := self.known.get((name, found.generation))) and name not in self.claimed:
            self.known[name, found.generation] = Known(FileStatus.PENDING, load_id=state.load_id + 1)

    def tick(self, outcome: str) -> None:
        found = plan(self.live.values(), self.known, self.claimed, LIMITS, answered=self.in_table)
        for v in found.unchanged:
            self.known[v.name, v.generation] = Known(FileStatus.UNCHANGED)
        for batch in found.batches:
            for number, v in enumerate(batch.versions):
                state = self.known.get((v.name, v.generation), Known(FileStatus.PENDING))
                if outcome == "succeed" or (outcome == "part" and number == 0):
                    self.answers.append((v, state.load_id))
                    self.in_table[v.name] = v
                    state = replace(state, status=FileStatus.FINISHED)
                elif outcome == "fail":
                    state = replace(state, status=FileStatus.PENDING, attempts=state.attempts + 1, batch_id="", due=False)
                elif outcome == "put off":
                    state = replace(state, status=FileStatus.PENDING, batch_id=batch.id if number else "", due=False)
                else:
                    state = replace(state, status=FileStatus.RUNNING, batch_id=batch.id)
                    self.claimed |= {v.name} if outcome == "work" else set()
                self.known[v.name, v.generation] = state

    def all_is_due(self) -> None:
        self.known = {key: replace(state, due=True) for key, state in self.known.items()}


@settings(max_examples=300)
@given(st.lists(ACTIONS, max_size=50))
def test_after_any_history_what_stays_is_answered_once_per_request_or_equals_what_was(history: list[tuple[Any, ...]]) -> None:
    world = World()
    for action, *subject in history:
        if action == "upload":
            world.upload(*subject)
        elif action == "delete":
            world.live.pop(subject[0], None)
        elif action == "retry":
            world.retry(*subject)
        elif action == "tick":
            world.tick(*subject)
        elif action == "lease runs out":
            world.claimed.clear()
        else:
            world.all_is_due()
    world.claimed.clear()
    world.all_is_due()
    world.tick("succeed")
    assert len(world.answers) == len(set(world.answers)), "answered twice for one request"
    for v in world.live.values():
        shown = world.in_table[v.name]
        assert shown == v or shown.crc32c == v.crc32c, "the table holds an older content than the bucket"
    assert not plan(world.live.values(), world.known, set(), LIMITS, answered=world.in_table).batches
