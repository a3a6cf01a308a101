"""The rules of the console's door: foreign requests, tokens, failed attempts, headers."""

from __future__ import annotations

import pytest

from lapis.console import door


@pytest.mark.parametrize(
    ("headers", "changes", "let_in"),
    [
        ({}, False, True),  # a person who types the address
        ({"sec-fetch-site": "none"}, False, True),
        ({"sec-fetch-site": "cross-site"}, False, True),  # a link; it changes nothing
        ({"origin": "https://evil.example"}, False, False),
        ({}, True, False),  # every browser says where a change comes from
        ({"origin": "http://lapis.example:8000"}, True, True),
        ({"origin": "https://console.example"}, True, True),  # where people see it, before a proxy
        ({"origin": "http://lapis.example:9000"}, True, False),
        ({"origin": "http://evil.example"}, True, False),
        ({"origin": "null"}, True, False),  # a sandboxed frame
        ({"origin": ""}, True, False),
        ({"origin": "http://[::1"}, True, False),
        ({"sec-fetch-site": "same-origin"}, True, True),
        ({"sec-fetch-site": "same-site"}, True, False),  # a neighbour below the same domain
        ({"sec-fetch-site": "cross-site", "origin": "http://lapis.example:8000"}, True, False),
        ({"sec-fetch-site": "none", "origin": "http://lapis.example:8000"}, True, False),
    ],
)
def test_what_comes_from_another_site_is_refused(
    headers: dict[str, str], changes: bool, let_in: bool
) -> None:
    headers = {"host": "lapis.example:8000", **headers}
    assert (door.foreign(headers, changes, "https://console.example/") == "") is let_in


def test_without_a_public_address_only_the_host_counts() -> None:
    assert door.foreign({"host": "a", "origin": "http://a"}, True) == ""
    assert door.foreign({"host": "a", "origin": "null"}, True)
    assert door.foreign({"origin": "null"}, True)


def test_a_form_token_is_one_session_s() -> None:
    assert door.csrf_token("one") != door.csrf_token("other")
    assert "one" not in door.csrf_token("one")
    assert door.same(door.csrf_token("one"), door.csrf_token("one"))
    assert not door.same("", "")
    assert not door.same("a", "b")


def test_after_many_failures_an_address_waits_and_others_do_not() -> None:
    now = [100.0]
    throttle = door.Throttle(lambda: now[0])
    for _ in range(door.ATTEMPTS):
        assert throttle.wait("10.0.0.1") == 0
        throttle.failed("10.0.0.1")
        now[0] += 1
    assert throttle.wait("10.0.0.1") == pytest.approx(door.WINDOW_SECONDS - door.ATTEMPTS)
    assert throttle.wait("10.0.0.2") == 0
    now[0] += door.WINDOW_SECONDS
    assert throttle.wait("10.0.0.1") == 0


def test_the_throttle_forgets_rather_than_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MOST_ADDRESSES", 3)
    throttle = door.Throttle(lambda: 0.0)
    for number in range(10):
        throttle.failed(str(number))
    assert len(throttle._failures) == 3


def test_transport_security_is_asked_for_over_https_only() -> None:
    assert "strict-transport-security" not in door.security_headers("", https=False)
    assert "strict-transport-security" in door.security_headers("", https=True)
