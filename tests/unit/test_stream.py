"""How an answer's parts get from the engine's thread to their reader: joined, and no sooner than they are wanted."""

from __future__ import annotations

import asyncio

from lapis.inference.request import Output
from lapis.inference.stream import Channel, wake


def part(number: int, last: bool = False) -> Output:
    return Output(f"{number} ", (number,), finish_reason="stop" if last else None, completion_tokens=number)


def read(channel: Channel, tokens: int, parts: list[Output]) -> tuple[Output | None, list[int]]:
    """What a reader takes that waits before the parts come, and after which of them it was woken."""
    woken = []

    async def run() -> Output | None:
        reader = asyncio.create_task(channel.take(tokens))
        await asyncio.sleep(0)
        for output in parts:
            if (waiter := channel.put(output)) is not None:
                woken.append(output.completion_tokens)
                wake([waiter])
        return await reader

    return asyncio.run(run()), woken


def test_a_reader_is_woken_by_the_first_part() -> None:
    output, woken = read(Channel(), 0, [part(1), part(2)])
    assert woken == [1]
    assert output is not None and output.text == "1 2 "  # what has piled up comes as one


def test_who_wants_more_at_once_is_woken_when_it_is_there() -> None:
    output, woken = read(Channel(), 3, [part(n) for n in range(1, 5)])
    assert woken == [3]
    assert output is not None and output.token_ids == (1, 2, 3, 4)


def test_the_end_wakes_whoever_waits() -> None:
    output, woken = read(Channel(), 64, [part(1), part(2, last=True)])
    assert woken == [2]
    assert output is not None and output.finish_reason == "stop" and output.text == "1 2 "


def test_what_is_there_already_is_taken_without_waiting() -> None:
    channel = Channel()
    for number in (1, 2):
        channel.put(part(number))
    output = asyncio.run(channel.take(2))
    assert output is not None and output.completion_tokens == 2
    channel.put(part(3, last=True))
    last = asyncio.run(channel.take(66))
    assert last is not None and last.text == "3 "
    assert asyncio.run(channel.take()) is None


def test_the_first_part_has_its_time_however_late_it_is_taken() -> None:
    channel = Channel()
    assert channel.first_at is None
    channel.put(part(1))
    first = channel.first_at
    channel.put(part(2))
    assert first is not None and channel.first_at == first


def test_who_leaves_takes_what_is_there() -> None:
    channel = Channel()
    assert channel.take_now() is None
    for number in (1, 2):
        channel.put(part(number))
    rest = channel.take_now()
    assert rest is not None and rest.completion_tokens == 2
    assert channel.take_now() is None
