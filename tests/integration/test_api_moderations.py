"""Moderation: OpenAI's shape around a moderator that says what it is and can be replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import openai
import pytest

from lapis.errors import ConfigError
from lapis.gateway.moderation import CATEGORIES, PHRASES, PhraseModerator
from lapis.home import Home
from lapis.server import RunningServer
from tests.served import fake_server


@pytest.fixture
def server(home: Home) -> Iterator[RunningServer]:
    with fake_server(home, load=False) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def test_every_text_gets_every_category(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.moderations.create(input=["A quiet river.", "I will kill you."])
    quiet, loud = answer.results
    assert answer.model == server.services.moderator.name
    assert answer.model.startswith("lapis-phrases-")
    assert not quiet.flagged
    assert loud.flagged
    assert (loud.categories.harassment_threatening, loud.categories.violence) == (True, True)
    assert (loud.category_scores.violence, loud.category_scores.sexual) == (1.0, 0.0)
    assert loud.category_applied_input_types.hate == ["text"]
    for facts in (loud.categories, loud.category_scores, loud.category_applied_input_types):
        assert set(facts.model_dump(by_alias=True)) == set(CATEGORIES)
    server.services.meter.flush()
    assert server.services.meter._ledger.balance().used == 7


def test_parts_are_judged_together_and_images_are_refused(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "I want to"}, {"type": "text", "text": "kill myself"}]
    assert client.moderations.create(input=parts, model="omni-moderation-latest").results[0].flagged  # type: ignore[arg-type]
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(openai.BadRequestError, match="images are not judged"):
        client.moderations.create(input=[image])  # type: ignore[list-item]
    with pytest.raises(openai.NotFoundError, match="for moderation"):
        client.moderations.create(input="x", model="tiny")
    with pytest.raises(openai.BadRequestError):
        client.moderations.create(input=[])


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_short_list_has_something_for_each_category(category: str) -> None:
    examples = {
        "harassment": "Nobody likes you", "harassment/threatening": "I'm going to hurt her",
        "hate": "all immigrants are vermin", "hate/threatening": "shoot all immigrants",
        "illicit": "how to launder money", "illicit/violent": "How do I build a bomb",
        "self-harm": "suicide", "self-harm/intent": "i want to die", "self-harm/instructions": "how to hang myself",
        "sexual": "porn", "sexual/minors": "child porn", "violence": "strangle him",
        "violence/graphic": "a pool of his own blood",
    }  # fmt: skip
    assert PhraseModerator(PHRASES).scores(examples[category])[category] == 1.0
    assert not any(PhraseModerator(PHRASES).scores("How do I kill the process in my terminal?").values())


def test_a_list_of_ones_own_takes_its_place(home: Home) -> None:
    home.root.mkdir(parents=True, exist_ok=True)
    home.moderation.write_text('"hate" = ["purple (rain|snow)"]\n')
    with (
        fake_server(home, load=False) as server,
        openai.OpenAI(base_url=server.url, api_key="x", _strict_response_validation=True) as client,
    ):
        answer = client.moderations.create(input="PURPLE SNOW and I will kill you")
        assert answer.results[0].categories.hate
        assert not answer.results[0].categories.violence
        assert answer.model not in (PhraseModerator(PHRASES).name, "")

        class Model:
            name = "my-classifier-3"

            def scores(self, text: str) -> Mapping[str, float]:
                return {"violence": 0.7, "hate": 0.2}

        server.services.moderator = Model()
        judged = client.moderations.create(input="x", model="my-classifier-3")
        assert (judged.model, judged.results[0].categories.violence) == ("my-classifier-3", True)
        assert judged.results[0].category_scores.hate == 0.2
        assert not judged.results[0].categories.hate


@pytest.mark.parametrize(
    "text", ['"hat" = ["x"]', '"hate" = ["("]', '"hate" = "x"', '"hate" = [""]', "hate = ["]
)
def test_a_list_that_cannot_be_used_is_named_at_the_start(home: Home, text: str) -> None:
    home.root.mkdir(parents=True, exist_ok=True)
    home.moderation.write_text(text)
    with pytest.raises(ConfigError, match="hat"), fake_server(home, load=False):
        pass
