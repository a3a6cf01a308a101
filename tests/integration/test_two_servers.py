"""Two server processes on one database: limits hold exactly across both, for many clients at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI, RateLimitError

from lapis.audit import AuditLog
from lapis.db import open_database
from lapis.home import Home
from lapis.tenants.keys import ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import UsageLedger
from tests.fake_process import server_processes

CLIENTS = 32
TRIES = 2  # of each
TOKENS = 9  # of an answer


def test_two_servers_share_a_limit_to_the_token(home: Home) -> None:
    db = open_database(home.database_url)
    key = ApiKeys(db).create("many", "test")[1]
    with server_processes(home, 2) as urls:

        def ask(client: OpenAI) -> int:
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=TOKENS
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == TOKENS
            return answer.usage.total_tokens

        def work(number: int) -> list[int]:
            used = []
            with client_of(urls[number % 2]) as client:
                for _ in range(TRIES):
                    try:
                        used.append(ask(client))
                    except RateLimitError as error:
                        assert "tokens per day" in error.message
            return used

        def client_of(url: str) -> OpenAI:
            return OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True)

        with client_of(urls[0]) as first, client_of(urls[1]) as second:
            size = ask(first)
            assert ask(second) == size
        room = 40  # more requests than one server's half, fewer than all
        Tenants(db).set_quota("default", Quota(tokens_per_day=(2 + room) * size + size - 1), "test")
        with ThreadPoolExecutor(CLIENTS) as pool:
            used = [tokens for each in pool.map(work, range(CLIENTS)) for tokens in each]
        assert used == [size] * room
    balance = UsageLedger(db).balance("default")
    assert (balance.used, balance.open, balance.balanced) == ((2 + room) * size, 0, True)
    AuditLog(db).verify()
    db.dispose()
