"""Differential test: drawn streams get one answer a request, directly and behind proxies."""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.http.connection.proxies import OF_THE_PAGE, PROXIES, proxied
from tests.http.connection.streams import Stream, draw, segments
from tests.http.connection.wire import ANSWER_SECONDS, Answer, Wire
from tests.support.service import Served

#: Senders at once: an answer that goes astray goes to another one of them.
SENDERS = 6
#: Of the streams, and of the cuts into segments.
QUICK, SLOW, ALL = range(60), range(60, 260), range(2_000)
#: Of the streams, at least, get all their answers through a proxy.
COMPLETE_SHARE = 0.75
#: Behind the last answer that a proxy must give: it may wait for more of a request that contradicts
#: itself. The service refuses such a request at once.
QUIET_SECONDS = 0.3
OWN = re.compile(r"own-\d{6}-\d+")


def sent(url: str, seed: int, quiet_seconds: float) -> list[Answer]:
    """All answers that one sender gets to one stream, until its connection ends.

    Args:
        url: of the service or of a proxy.
        seed: draws the stream.
        quiet_seconds: the wait for the refusal of a malformed request.
    """
    stream = draw(seed)
    wire = Wire(url)
    try:
        # It may be refused, and closed, before all of it is sent; the judge knows whether it may.
        with suppress(ConnectionError):
            wire.send_pieces(segments(stream.data, seed), pause=0.0005 if seed % 4 == 0 else 0.0)
        return list(received(wire, stream, quiet_seconds))
    finally:
        wire.close()


def received(wire: Wire, stream: Stream, quiet_seconds: float) -> Iterator[Answer]:
    """All bytes up to the end of the connection."""
    count = 0
    with suppress(EOFError, ConnectionError):
        while True:
            if count >= len(stream.answers):
                wire.socket.settimeout(quiet_seconds if stream.refused else ANSWER_SECONDS)
            try:
                answer = wire.answer()
            except TimeoutError:
                if stream.refused and count >= len(stream.answers):
                    return
                raise AssertionError(f"no answer {count} to {stream.data!r}") from None
            if answer.status != 100:
                count += 1
                yield answer


def ids_of(answers: list[Answer]) -> list[str]:
    """The ids that answers carry, but for those that a refusal drew."""
    ids = [answer.headers.get("x-request-id", "") for answer in answers]
    return [its_id for its_id in ids if its_id.startswith(("own-", "smuggled"))]


def judged_directly(stream: Stream, answers: list[Answer]) -> bool:
    """Each request has its answer, and the first that is malformed ends the stream."""
    asked = [(its_id, status) for its_id, status in stream.answers]
    good = [(a.headers["x-request-id"], a.status) for a in answers[: len(asked)]]
    assert good == asked
    refusals = answers[len(asked) :]
    assert len(refusals) == stream.refused
    for refusal in refusals:
        status, code = refusal.problem
        assert (status, code) in {
            (400, "malformed_request"),
            (501, "not_implemented"),
            (505, "http_version_not_supported"),
        }
    return True


def judged_behind_a_proxy(stream: Stream, answers: list[Answer]) -> bool:
    """A proxy may refuse more, and forgive some; it must not mix up any. True if all answered.

    A proxy may end a connection at a request that is unusual and allowed.
    """
    asked = [its_id for its_id, _ in stream.answers]
    ids = ids_of(answers)
    seen = [its_id for its_id in ids if OWN.fullmatch(its_id)]
    assert seen == asked[: len(seen)]
    assert ids[: len(seen)] == seen
    assert not ids[len(seen) :] or (stream.refused and len(seen) == len(asked))
    statuses = dict(stream.answers)
    for answer in answers:
        its_id = answer.headers.get("x-request-id", "")
        assert statuses.get(its_id, answer.status) == answer.status
    return len(seen) == len(asked)


def judged_behind_the_page(stream: Stream, answers: list[Answer]) -> bool:
    """The same, and no request for a path of the operators reaches the service."""
    public = [answer for answer in stream.answers if answer[0] not in stream.inward]
    return judged_behind_a_proxy(msgspec.structs.replace(stream, answers=public), answers)


def judge_behind(proxy: str) -> Any:
    return judged_behind_the_page if proxy == OF_THE_PAGE else judged_behind_a_proxy


def play(url: str, seeds: range, judge: Any) -> Counter[int]:
    """Send them all, several at a time; how often each status was seen."""
    quiet_seconds = ANSWER_SECONDS if judge is judged_directly else QUIET_SECONDS
    with ThreadPoolExecutor(SENDERS) as senders:
        found = list(senders.map(lambda seed: (seed, sent(url, seed, quiet_seconds)), seeds))
    statuses: Counter[int] = Counter()
    complete = 0
    for seed, answers in found:
        assert not [i for i in ids_of(answers) if i.startswith("smuggled")], seed
        mine = f"own-{seed:06d}-"
        assert all(its_id.startswith(mine) for its_id in ids_of(answers)), seed
        try:
            complete += judge(draw(seed), answers)
        except AssertionError as error:
            raise AssertionError(f"stream {seed}: {draw(seed).data!r}") from error
        statuses.update(answer.status for answer in answers)
    assert complete >= COMPLETE_SHARE * len(seeds), (complete, statuses)
    return statuses


def test_a_sample_of_request_streams_is_framed_correctly(edge: Served) -> None:
    statuses = play(edge.url, QUICK, judged_directly)
    assert {200, 400, 401, 404} <= set(statuses)


@pytest.mark.parametrize("proxy", ["nginx with websocket lines", OF_THE_PAGE])
def test_a_sample_of_request_streams_is_framed_behind_a_proxy(
    edges: Any, tmp_path: Path, proxy: str
) -> None:
    with proxied(proxy, edges("on").url, tmp_path) as url:
        play(url, QUICK, judge_behind(proxy))


@pytest.mark.slow
def test_many_request_streams_are_framed_correctly(edge: Served) -> None:
    play(edge.url, SLOW, judged_directly)


@pytest.mark.slow
@pytest.mark.parametrize("proxy", PROXIES)
def test_many_request_streams_are_framed_behind_a_proxy(
    edges: Any, tmp_path: Path, proxy: str
) -> None:
    with proxied(proxy, edges("on").url, tmp_path) as url:
        play(url, SLOW, judge_behind(proxy))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_all_request_streams_are_framed_correctly(edge: Served) -> None:
    play(edge.url, ALL, judged_directly)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("proxy", PROXIES)
def test_all_request_streams_are_framed_behind_a_proxy(
    edge: Served, tmp_path: Path, proxy: str
) -> None:
    with proxied(proxy, edge.url, tmp_path) as url:
        play(url, ALL, judge_behind(proxy))
