"""The catalog: configuration and discoveries compiled into a table that is swapped whole."""

from __future__ import annotations

from time import monotonic
from typing import Any

from gateway.catalog import Catalog, nearest
from gateway.config import Model, Provider
from gateway.routing.eligible import eligible


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


# -- fallbacks ------------------------------------------------------------------------------------------------------


def tiers(catalog: Catalog, name: str, provider: str = "") -> list[list[str]]:
    pools = catalog.table.by_provider[provider] if provider else catalog.table.pools
    return [[f"{offer.model.name}@{offer.upstream.name}" for offer in tier] for tier in pools.tiers[name]]


def model(name: str, *fallbacks: str, aliases: tuple[str, ...] = ()) -> Model:
    return Model(name, name, aliases=aliases, fallbacks=fallbacks)


def test_the_tiers_are_a_models_pool_then_those_it_falls_back_on() -> None:
    one = provider("one", models=(model("big", "middle", "other"), model("other")))
    two = provider("two", models=(model("m", "small", aliases=("middle",)), model("small", "other")))
    catalog = Catalog([one, two])
    assert tiers(catalog, "big") == [["big@one"], ["m@two"], ["other@one"], ["small@two"]], "own ones, then theirs"
    assert tiers(catalog, "middle") == [["m@two"], ["small@two"], ["other@one"]]
    assert tiers(catalog, "other") == [["other@one"]]
    assert tiers(catalog, "big", "one") == [["big@one"], ["other@one"]], "a provider that was named is not left"


def test_a_circle_of_fallbacks_ends_and_no_offer_comes_twice() -> None:
    one = provider("one", models=(model("a", "b", "chat"), model("b", "a", aliases=("chat",))))
    two = provider("two", models=(model("a"),))
    assert tiers(Catalog([one, two]), "a") == [["a@one", "a@two"], ["b@one"]]


def test_a_model_that_a_host_no_longer_has_leaves_the_pool() -> None:
    catalog = Catalog([provider("one", "http://h1/v1", "http://h2/v1", discover=True)])
    first, second = catalog.upstreams
    first.models = second.models = ("m", "x")
    catalog.rebuild()
    assert names(catalog)["m"] == ["m@one@h1", "m@one@h2"]
    second.models = ("x",)
    catalog.rebuild()
    assert names(catalog)["m"] == ["m@one@h1"]
    first.models = ()
    catalog.rebuild()
    assert "m" not in catalog.table.pools


def test_a_host_that_asked_to_be_left_alone_is_left_alone_by_the_next_table_too() -> None:
    catalog = Catalog([provider("one", "http://h1/v1", "http://h2/v1", models=(model("m"), model("x")))])
    catalog.table.pools["m"][1].quiet_until = 99.0
    catalog.rebuild()
    assert [offer.quiet_until for name in ("m", "x") for offer in catalog.table.pools[name]] == [0.0, 99.0, 0.0, 0.0]


def test_a_request_that_was_resolved_before_its_host_was_removed_prefers_another() -> None:
    urls = ("http://h1/v1", "http://h2/v1")
    catalog = Catalog([provider("one", *urls, models=(model("m"),))])
    first, second = pool = catalog.table.pools["m"]
    first.upstream.lease()
    catalog.configure([provider("one", urls[1], models=(model("m"),))])
    assert [offer.upstream for offer in eligible(pool, (), monotonic())] == [second.upstream]
    assert eligible((first,), (), monotonic()) == (first,), "and is not refused where there is nobody else"
    catalog.configure([provider("one", *urls, models=(model("m"),))])
    assert catalog.upstreams == (first.upstream, second.upstream)
    assert first.upstream.breaker.state == "closed"
