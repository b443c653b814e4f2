"""The catalog: configuration and discoveries compiled into a table that is swapped whole."""

from __future__ import annotations

from typing import Any

from gateway.catalog import Catalog, nearest
from gateway.config import Model, Provider


def provider(name: str, *urls: str, models: tuple[Model, ...] = (), **more: Any) -> Provider:
    return Provider(name, urls or (f"http://{name}:8000/v1",), models=models, origin=f"entry {name}", **more)


def names(catalog: Catalog) -> dict[str, list[str]]:
    return {
        name: [f"{offer.model.name}@{offer.upstream.name}" for offer in offers]
        for name, offers in catalog.table.pools.items()
    }


def test_a_model_at_several_providers_is_one_pool() -> None:
    one = provider("one", models=(Model("m", "M", aliases=("a",)), Model("x", "X")))
    two = provider("two", "http://h1/v1", "http://h2/v1", models=(Model("m", "M"),))
    catalog = Catalog([one, two])
    assert names(catalog) == {"m": ["m@one", "m@two@h1", "m@two@h2"], "a": ["m@one"], "x": ["x@one"]}
    assert set(catalog.table.by_provider["two"]) == {"m"}
    assert len(catalog.upstreams) == 3


def test_an_alias_may_name_the_same_as_a_model_elsewhere() -> None:
    one, two = provider("one", models=(Model("m", "M", aliases=("x",)),)), provider("two", models=(Model("x", "X"),))
    assert names(Catalog([one, two]))["x"] == ["m@one", "x@two"]


def test_discovered_models_are_offered_where_they_are() -> None:
    catalog = Catalog([provider("one", "http://h1/v1", "http://h2/v1", discover=True)])
    assert names(catalog) == {}
    assert "'one' was asked" in catalog.table.providers[0].hint
    first, second = catalog.upstreams
    first.models, second.models = ("a", "both", "smol:latest"), ("both", "b")
    assert names(catalog) == {}, "the table stands until it is rebuilt"
    old = catalog.table
    catalog.rebuild()
    assert catalog.table is not old
    assert catalog.upstreams == (first, second), "upstreams outlive every table"
    assert names(catalog) == {
        "a": ["a@one@h1"],
        "both": ["both@one@h1", "both@one@h2"],
        "smol:latest": ["smol:latest@one@h1"],
        "smol": ["smol:latest@one@h1"],
        "b": ["b@one@h2"],
    }
    assert catalog.table.providers[0].hint == ""


def test_no_models_is_a_hint_at_the_entry() -> None:
    (listed,) = Catalog([provider("one")]).table.providers
    assert "`models`" in listed.hint
    assert "entry one" in listed.hint


def test_nearest() -> None:
    known = ["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b", "sim"]
    assert nearest("llama3.1-8b", known)[0] == "llama-3.1-8b"
    assert nearest("sin", known) == ["sim"]
    assert nearest("zzzzzzzz", known) == []
    assert nearest("x" * 100_000, known) == []
