"""Claims on a real PostgreSQL."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from qa_platform.contract import FileStatus, FileVersion
from qa_platform.errors import TransientError
from qa_platform.ledger import Ledger
from qa_platform.ledger import connection as ledger_connection
from qa_platform.ledger.restoring import AnsweredVersion
from qa_platform.settings import PostgresSettings
from qa_platform_tests.ledger.helpers import A1, A2, B1, EXPIRED, HELD, known


def test_a_claim_makes_an_unknown_version_known_and_pending(ledger: Ledger) -> None:
    assert ledger.claim([A1], owner="run", lease_seconds=HELD) == [A1]
    found = known(ledger, A1)
    assert (found.version, found.status, found.claim_owner, found.place, found.load_id) == (
        *(A1, FileStatus.PENDING, "run", "incoming/a.csv", 1),
    )
    assert ledger.claimed() == {"a.csv": "run"}


def test_a_name_is_claimed_whatever_the_generation(ledger: Ledger) -> None:
    ledger.claim([A1], owner="one", lease_seconds=HELD)
    assert ledger.claim([A2, B1], owner="two", lease_seconds=HELD) == [B1]
    assert ledger.claimed() == {"a.csv": "one", "b.csv": "two"}


def test_an_expired_claim_is_taken(ledger: Ledger) -> None:
    ledger.claim([A1], owner="one", lease_seconds=EXPIRED)
    assert ledger.claimed() == {}
    assert ledger.claim([A1], owner="two", lease_seconds=HELD) == [A1]
    assert ledger.renew("one", HELD) == 0
    assert ledger.claimed() == {"a.csv": "two"}


def test_the_same_owner_claims_again_and_may_move_to_a_newer_generation(ledger: Ledger) -> None:
    assert ledger.claim([A1, B1], owner="run", lease_seconds=HELD) == [A1, B1]
    assert ledger.claim([A1, B1], owner="run", lease_seconds=HELD) == [A1, B1]
    assert ledger.claim([A2], owner="run", lease_seconds=HELD) == [A2]
    assert (known(ledger, A1).claim_owner, known(ledger, A2).claim_owner) == ("", "run")


def test_of_two_generations_in_one_claim_the_newest_is_claimed(ledger: Ledger) -> None:
    assert ledger.claim([A2, B1, A1], owner="run", lease_seconds=HELD) == [A2, B1]


@pytest.mark.parametrize("done", ["finished", "loaded", "rejected", "unchanged", "superseded", "failed"])
def test_what_is_done_or_parked_is_not_claimed(ledger: Ledger, connection: psycopg.Connection, done: str) -> None:
    ledger.claim([A1], owner="one", lease_seconds=EXPIRED)
    connection.execute("UPDATE question_file SET status = %s", [done])
    assert ledger.claim([A1], owner="two", lease_seconds=HELD) == []
    assert [r.status for r in ledger.take_over([A1], token="x", owner="two", lease_seconds=HELD)] == [done]


def test_a_takeover_passes_on_what_the_token_holds_and_what_is_free(ledger: Ledger) -> None:
    other = FileVersion("c.csv", 1)
    ledger.claim([A1], owner="token", lease_seconds=HELD)
    ledger.claim([other], owner="stranger", lease_seconds=HELD)

    owned = ledger.take_over([B1, other, A1], token="token", owner="run", lease_seconds=HELD)

    assert [record.version for record in owned] == [B1, A1]
    assert {record.claim_owner for record in owned} == {"run"}
    assert ledger.claimed() == {"a.csv": "run", "b.csv": "run", "c.csv": "stranger"}


def test_a_claim_is_renewed_by_its_owner_only(ledger: Ledger) -> None:
    ledger.claim([A1, B1], owner="run", lease_seconds=EXPIRED)
    assert ledger.renew("stranger", HELD) == 0
    assert ledger.renew("run", HELD) == 2
    assert ledger.claimed() == {"a.csv": "run", "b.csv": "run"}


def test_claims_of_several_owners_are_kept_together_where_half_of_their_lease_is_over(
    ledger: Ledger, connection: psycopg.Connection
) -> None:
    fresh, other = FileVersion("c.csv", 1), FileVersion("d.csv", 1)
    ledger.claim([A1], owner="expired", lease_seconds=EXPIRED)
    ledger.claim([B1], owner="half over", lease_seconds=HELD // 2 - 1)
    ledger.claim([fresh], owner="fresh", lease_seconds=HELD * 3 // 4)
    ledger.claim([other], owner="stranger", lease_seconds=EXPIRED)
    assert ledger.renew_expiring(["expired", "half over", "fresh", "unknown"], HELD) == 2
    assert ledger.claimed() == {"a.csv": "expired", "b.csv": "half over", "c.csv": "fresh"}
    lasting = "SELECT source_file FROM question_file WHERE claim_until > now() + make_interval(secs => %s) ORDER BY 1"
    assert connection.execute(lasting, [HELD * 7 // 8]).fetchall() == [("a.csv",), ("b.csv",)]


def test_a_release_gives_back_ones_own_and_what_ran_waits_with_its_batch(ledger: Ledger) -> None:
    ledger.claim([A1], owner="run", lease_seconds=HELD)
    ledger.claim([B1], owner="other", lease_seconds=HELD)
    ledger.start("run", [A1], run_id="run", batch_id="batch")

    ledger.release("run")

    found = known(ledger, A1)
    assert (found.status, found.claim_owner, found.batch_id, found.attempts) == (FileStatus.PENDING, "", "batch", 0)
    assert ledger.claimed() == {"b.csv": "other"}


def test_a_release_of_some_names_keeps_the_others(ledger: Ledger) -> None:
    ledger.claim([A1, B1], owner="run", lease_seconds=HELD)
    ledger.release("run", ["a.csv"])
    assert ledger.claimed() == {"b.csv": "run"}


def test_of_many_that_claim_the_same_files_at_once_each_file_has_one_owner(migrated: PostgresSettings, ledger: Ledger) -> None:
    versions = [FileVersion(f"{n}.csv", 1) for n in range(30)]

    def claim(owner: int) -> list[FileVersion]:
        with Ledger(migrated) as own:
            some = versions[owner::2] + versions[::3] if owner % 2 else list(reversed(versions[owner:]))
            return own.claim(some, owner=str(owner), lease_seconds=HELD)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(claim, range(6)))

    taken = [version for versions in won for version in versions]
    assert len(taken) == len(set(taken))
    assert ledger.claimed() == {version.name: str(owner) for owner, versions in enumerate(won) for version in versions}


@pytest.mark.parametrize(
    "step",
    [
        lambda ledger: ledger.claim([A1], owner="run", lease_seconds=HELD),
        lambda ledger: ledger.take_over([A1], token="token", owner="run", lease_seconds=HELD),
        lambda ledger: ledger.renew("run", HELD),
        lambda ledger: ledger.renew_expiring(["run"], HELD),
        lambda ledger: ledger.release("run"),
        lambda ledger: ledger.request_retries(["a.csv"]),
        lambda ledger: ledger.restore([AnsweredVersion(A1, "processed/a.csv/1.csv")]),
        lambda ledger: ledger.forget("a.csv", [1]),
    ],
    ids=["claim", "take over", "renew", "keep", "release", "retry", "restore", "forget"],
)
def test_claims_wait_for_each_other(migrated: PostgresSettings, connection: psycopg.Connection, step: Callable[[Ledger], object]) -> None:
    name = sql.Identifier(migrated.dbname)
    connection.execute(sql.SQL("ALTER DATABASE {} SET lock_timeout = '100ms'").format(name))
    try:
        with Ledger(migrated) as ledger, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [ledger_connection._CLAIM_LOCK])
            with pytest.raises(TransientError, match="lock timeout"):
                step(ledger)
    finally:
        connection.execute(sql.SQL("ALTER DATABASE {} RESET lock_timeout").format(name))


_ACTIONS = st.one_of(
    st.tuples(
        st.just("claim"), st.sampled_from("xyz"), st.lists(st.sampled_from([A1, A2, B1]), max_size=3), st.sampled_from([HELD, EXPIRED])
    ),
    st.tuples(st.just("take_over"), st.sampled_from("xyz"), st.lists(st.sampled_from([A1, A2, B1]), max_size=3), st.sampled_from("xyz")),
    st.tuples(st.just("release"), st.sampled_from("xyz")),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(_ACTIONS, max_size=12))
def test_whatever_is_claimed_in_whatever_order_nobody_loses_a_live_claim_but_by_its_token(
    ledger: Ledger, connection: psycopg.Connection, actions: list[tuple]
) -> None:
    connection.execute("DELETE FROM question_file")
    owners: dict[str, str] = {}
    for action, who, *rest in actions:
        if action == "claim":
            won = ledger.claim(rest[0], owner=who, lease_seconds=rest[1])
            newest = {version.name: version for version in sorted(rest[0])}
            assert set(won) == {version for name, version in newest.items() if owners.get(name, who) == who}
            for version in won:
                owners.pop(version.name, None)
                if rest[1] == HELD:
                    owners[version.name] = who
        elif action == "take_over":
            owned = ledger.take_over(rest[0], token=rest[1], owner=who, lease_seconds=HELD)
            assert {r.version.name for r in owned} == {v.name for v in rest[0] if owners.get(v.name, who) in (who, rest[1])}
            owners.update({record.version.name: who for record in owned})
        else:
            ledger.release(who)
            owners = {name: owner for name, owner in owners.items() if owner != who}
        assert ledger.claimed() == owners
