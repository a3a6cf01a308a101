"""`0.6 * name + max(a, b) ^ 2`: the formula of a multi grader, read by a parser of its own. Nothing is executed."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Set

from lapis.errors import InputError, nearest

LENGTH = 2000  # characters of a formula
DEPTH = 50  # of parentheses, calls and signs
_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(.))", re.DOTALL
)

Value = Callable[[Mapping[str, float]], float]
Operation = Callable[[float, float], float]
ONE: dict[str, Callable[[float], float]] = {
    "abs": abs,
    "floor": lambda x: float(math.floor(x)),
    "ceil": lambda x: float(math.ceil(x)),
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
MANY: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max}
SUMS = {"+": operator.add, "-": operator.sub}
PRODUCTS = {"*": operator.mul, "/": operator.truediv}


class Formula:
    """Arithmetic over the rewards of graders, by name: + - * / ^, parentheses, min, max, abs, floor, ceil, exp,
    sqrt, log (natural). `^` binds closest, to the right, and before a sign: -2 ^ 2 is -4.
    """

    def __init__(self, text: str, names: Set[str]) -> None:
        """Read a formula that may use these names. Raises InputError naming what is wrong."""
        if len(text) > LENGTH:
            raise InputError(f"The formula is longer than {LENGTH:,} characters.")
        self._text, self._names = text, names
        self._tokens = [
            (match[match.lastindex or 0], match.start(match.lastindex or 0))
            for match in _TOKEN.finditer(text.rstrip())
        ]
        self._place = self._depth = 0
        self.used: set[str] = set()
        self._value = self._sum()
        if self._place < len(self._tokens):
            raise self._wrong()

    def __call__(self, rewards: Mapping[str, float]) -> float:
        """The result. Raises InputError where it is no finite number, such as a division by zero."""
        try:
            result = self._value(rewards)
            if isinstance(result, complex) or not math.isfinite(result):
                raise ValueError("the result is no finite number")
        except (ArithmeticError, ValueError) as error:
            raise InputError(f"The formula {self._text!r} has no value here: {error}.") from error
        return float(result)

    def _sum(self) -> Value:
        return self._chain(SUMS, self._product)

    def _product(self) -> Value:
        return self._chain(PRODUCTS, self._signed)

    def _chain(self, signs: Mapping[str, Operation], part: Callable[[], Value]) -> Value:
        first, rest = part(), []
        while self._peek() in signs:
            rest.append((signs[self._take()], part()))

        def value(rewards: Mapping[str, float]) -> float:
            total = first(rewards)
            for operation, other in rest:
                total = operation(total, other(rewards))
            return total

        return value if rest else first

    def _signed(self) -> Value:
        if self._peek() not in SUMS:
            return self._power()
        negative = self._take() == "-"
        self._enter()
        value = self._signed()
        self._depth -= 1
        return (lambda rewards: -value(rewards)) if negative else value

    def _power(self) -> Value:
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        self._enter()
        exponent = self._signed()
        self._depth -= 1
        return lambda rewards: _power(base(rewards), exponent(rewards))

    def _atom(self) -> Value:
        token = self._peek()
        if token[:1].isdigit() or (token[:1] == "." and token[1:]):
            number = float(self._take())
            return lambda rewards: number
        if token == "(":
            return self._parenthesis()[0]
        if not _TOKEN.match(token) or not (token[:1].isalpha() or token[:1] == "_"):
            raise self._wrong()
        name = self._take()
        if self._peek() == "(":
            return self._call(name)
        if name not in self._names:
            raise InputError(
                f"The formula names {name!r}, which is no grader. {nearest(name, self._names)}".strip()
            )
        self.used.add(name)
        return lambda rewards: rewards[name]

    def _call(self, name: str) -> Value:
        if name not in ONE and name not in MANY:
            raise InputError(f"The formula calls {name!r}. {nearest(name, (*ONE, *MANY))}".strip())
        arguments = self._parenthesis(many=True)
        if name in MANY:
            return lambda rewards: MANY[name]([argument(rewards) for argument in arguments])
        if len(arguments) != 1:
            raise InputError(f"The formula gives {len(arguments)} arguments to {name}, which takes one.")
        return lambda rewards: ONE[name](arguments[0](rewards))

    def _parenthesis(self, many: bool = False) -> list[Value]:
        self._take()
        self._enter()
        values = [self._sum()]
        while many and self._peek() == ",":
            self._take()
            values.append(self._sum())
        if self._peek() != ")":
            raise self._wrong()
        self._take()
        self._depth -= 1
        return values

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > DEPTH:
            raise InputError(f"The formula is nested deeper than {DEPTH} levels.")

    def _peek(self) -> str:
        return self._tokens[self._place][0] if self._place < len(self._tokens) else ""

    def _take(self) -> str:
        self._place += 1
        return self._tokens[self._place - 1][0]

    def _wrong(self) -> InputError:
        if self._place >= len(self._tokens):
            return InputError(f"The formula {self._text!r} ends too early.")
        token, at = self._tokens[self._place]
        return InputError(f"The formula {self._text!r} cannot be read at {token!r} (character {at + 1}).")


def _power(base: float, exponent: float) -> float:
    return math.pow(base, exponent)  # floats only: an integer's power could be of any size
