"""Rewards for recipes/grpo.toml. A reward is a plain function of prompt, answer and the example's other fields."""

from __future__ import annotations

import re


def number_alone(prompt: object, answer: str, fields: dict[str, str]) -> float:
    """1 for the right number and nothing else, 0.2 for another number alone, less the more other text there is."""
    text = answer.strip()
    if text == fields["answer"]:
        return 1.0
    if re.fullmatch(r"-?\d+", text):
        return 0.2
    digits = sum(character.isdigit() for character in text)
    return 0.1 * digits / max(1, len(text))
