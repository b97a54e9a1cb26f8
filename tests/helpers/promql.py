"""A reader of PromQL: what a dashboard asks for, or why Prometheus would refuse it.

Of the language it knows selectors, ranges, functions, aggregations, arithmetic and parentheses; what it does not know it refuses.
"""

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<duration>\d+(?:ms|[smhdwy]))|(?P<number>\d+(?:\.\d+)?)'
    r"|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<sign>=~|!~|!=|[=(){}\[\],+\-*/]))"
)
OVER_A_RANGE = ("rate", "irate", "increase", "delta", "avg_over_time", "max_over_time", "min_over_time")
OF_A_VECTOR = ("abs", "ceil", "floor", "ln", "sqrt")
AGGREGATIONS = ("sum", "avg", "min", "max", "count")


@dataclass(frozen=True)
class Selector:
    """A metric's name and its matchers: label -> (operator, value)."""

    name: str
    matchers: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What an expression selects, and the labels that are left of it; None for all."""

    selectors: list[Selector]
    labels: frozenset[str] | None


def parse(text: str) -> Query:
    """An expression whose value is a vector of the present, as a panel needs it.

    Raises:
        ValueError: Prometheus would refuse it, or it is beyond this reader.
    """
    reader = _Reader(text)
    kind, labels = reader.expression()
    if reader.left:
        raise ValueError(f"{text}: {reader.left[0][1]} is unexpected")
    if kind != "vector":
        raise ValueError(f"{text}: is a {kind}")
    return Query(reader.selectors, labels)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.selectors, self.left = text, [], []
        at = 0
        while at < len(text.rstrip()):
            if not (found := TOKEN.match(text, at)):
                raise ValueError(f"{text}: {text[at:]} is no PromQL")
            self.left.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()

    def next(self, *wanted: str) -> str:
        """Take the next token, which must be of one of these kinds, or be one of these signs or words."""
        kind, token = self.left[0] if self.left else ("the end", "")
        if wanted and kind not in wanted and token not in wanted:
            raise ValueError(f"{self.text}: {token or kind} where {' or '.join(wanted)} should be")
        self.left.pop(0)
        return token

    def sees(self, *tokens: str) -> bool:
        return bool(self.left) and self.left[0][1] in tokens

    def expression(self) -> tuple[str, frozenset[str] | None]:
        kind, labels = self.term()
        while self.sees("+", "-", "*", "/"):
            self.next()
            other, _ = self.term()
            if "range" in (kind, other):
                raise ValueError(f"{self.text}: arithmetic with a range")
            kind = "vector" if "vector" in (kind, other) else kind
        return kind, labels

    def term(self) -> tuple[str, frozenset[str] | None]:
        if self.sees("("):
            return self.in_parentheses()
        if self.left and self.left[0][0] == "number":
            self.next()
            return "number", None
        name = self.next("name")
        if name in AGGREGATIONS:
            by = self.grouping()
            kind, _ = self.in_parentheses()
            by = by if by is not None else self.grouping()
            if kind != "vector":
                raise ValueError(f"{self.text}: {name} of a {kind}")
            return "vector", by or frozenset()
        if self.sees("("):
            kind, labels = self.in_parentheses()
            if (kind == "range" and name in OVER_A_RANGE) or (kind == "vector" and name in OF_A_VECTOR):
                return "vector", labels
            raise ValueError(f"{self.text}: {name} is no function of a {kind}")
        return self.selector(name)

    def in_parentheses(self) -> tuple[str, frozenset[str] | None]:
        self.next("(")
        inner = self.expression()
        self.next(")")
        return inner

    def grouping(self) -> frozenset[str] | None:
        if not self.sees("by"):
            return None
        self.next()
        self.next("(")
        labels = {self.next("name")}
        while self.next(",", ")") == ",":
            labels.add(self.next("name"))
        return frozenset(labels)

    def selector(self, name: str) -> tuple[str, None]:
        matchers = {}
        if self.sees("{"):
            self.next()
            while not self.sees("}"):
                label, operator, value = self.next("name"), self.next("=", "=~", "!=", "!~"), self.next("string")[1:-1]
                if "~" in operator:
                    re.compile(value)
                matchers[label] = (operator, value)
                if not self.sees("}"):
                    self.next(",")
            self.next("}")
        self.selectors.append(Selector(name, matchers))
        if not self.sees("["):
            return "vector", None
        self.next()
        self.next("duration")
        self.next("]")
        return "range", None
