"""What is known of the world: capitals, elements, and which country a province is in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from .packages import load

QUESTIONS, SHOTS = 300, 18
PEOPLE = 500_000
# With provinces that are known beyond their country.
COUNTRIES = (
    "Argentina", "Australia", "Brazil", "Canada", "China", "France", "Germany", "India", "Indonesia", "Italy", "Japan",
    "Malaysia", "Mexico", "Nigeria", "Pakistan", "South Africa", "United States", "Venezuela",
)  # fmt: skip


class Country(NamedTuple):
    """A country with a capital of its own."""

    name: str
    capital: str
    region: str
    provinces: tuple[str, ...]


def questions(count: int = QUESTIONS) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions, and others with their answers that stand before every one of them."""
    chance = random.Random(1)
    kinds = [list(kind(chance)) for kind in (capitals, elements, provinces)]
    for rows in kinds:
        chance.shuffle(rows)
    shots = [row for rows in kinds for row in rows[: SHOTS // len(kinds)]]
    rest = [row for rows in kinds for row in rows[SHOTS // len(kinds) :]]
    chance.shuffle(shots)
    chance.shuffle(rest)
    return rest[:count], shots


def countries() -> list[Country]:
    """Countries of some size, by name. What two countries call their capital is left out."""
    found = []
    for info in load("countryinfo").all_countries():
        try:
            people, capital = info.population() or 0, info.capital() or ""
            country = Country(info.name(), capital, info.region() or "", tuple(info.provinces()))
        except KeyError:  # it is not said
            continue
        if people >= PEOPLE and capital and country.region:
            found.append(country)
    capitals_of = Counter(country.capital for country in found)
    return sorted(country for country in found if capitals_of[country.capital] == 1)


def capitals(_: random.Random) -> Iterator[dict[str, Any]]:
    """The capital of a country, where its name does not say it."""
    for country in countries():
        if not set(country.name.lower().split()) & set(country.capital.lower().split()):
            yield _row(f"What is the capital of {country.name}?", country.capital)


def elements(_: random.Random) -> Iterator[dict[str, Any]]:
    """The element of a symbol."""
    for element in load("periodictable").elements:
        if element.number > 0:  # none is the neutron
            yield _row(f"Which chemical element has the symbol {element.symbol}?", element.name)


def provinces(chance: random.Random) -> Iterator[dict[str, Any]]:
    """The country of a province; those that several countries have are left out."""
    known = countries()
    often = Counter(chain.from_iterable(set(country.provinces) for country in known))
    for country in known:
        if country.name not in COUNTRIES:
            continue
        own = [name for name in country.provinces if often[name] == 1 and name.isalpha() and name != country.capital]
        for province in chance.sample(own, min(len(own), 10)):
            yield _row(f"In which country is {province}?", country.name)


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"question": f"Question: {question}", "answer": answer}
