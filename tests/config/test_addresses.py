"""Where a provider's hosts come from: addresses, names that stand for several, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Config, ConfigError, Lookup, load


def read(entry: dict[str, Any], **variables: str) -> Config:
    data = json.dumps([{"provider": "p", "models": [{"apiName": "m"}], **entry}])
    return load({"HOME": "/home/x", "OPENAI_COMPATIBLE_DATA": data, **variables})


def refused(entry: dict[str, Any], **variables: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(entry, **variables)
    return [(one.path, str(one).partition(": ")[2]) for one in caught.value.problems]


def test_names_that_stand_for_several_hosts() -> None:
    urls = ["dns+http://workers.internal:8000/v1/", "http://fixed/v1", "srv+https://_llm._tcp.internal/v1"]
    (provider,) = read({"baseUrls": urls}).providers
    assert provider.base_urls == ("http://fixed/v1",)
    assert provider.lookups == (
        Lookup("host", "http://workers.internal:8000/v1"),
        Lookup("srv", "https://_llm._tcp.internal/v1"),
    )
    assert [str(one) for one in provider.lookups] == [urls[0].rstrip("/"), urls[2]]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("srv+http://_llm._tcp.internal:8000/v1", "has a port"),
        ("srv+http://_llm._tcp.internal:8000/v1", "did you mean srv+http://_llm._tcp.internal/v1?"),
        ("dns+workers.internal:8000", "has no scheme"),
        ("dns+http://user:secret@h/v1", "must not hold credentials"),
        ("dsn+http://h/v1", "must begin with http:// or https://"),
    ],
)
def test_what_is_wrong_with_one(url: str, said: str) -> None:
    ((path, text),) = refused({"baseUrl": url})
    assert path == "OPENAI_COMPATIBLE_DATA[0].baseUrl"
    assert said in text
    assert "secret" not in text


def test_twice_the_same_name_is_told() -> None:
    assert (
        "the same address as baseUrl" in refused({"baseUrl": "dns+http://h/v1", "baseUrls": ["dns+http://h/v1"]})[0][1]
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hosts.json", '["http://a/v1", "http://b/v1", "http://a/v1/"]'),
        ("hosts.json", '{"baseUrls": ["http://a/v1", "http://b/v1"]}'),
        ("hosts.toml", 'baseUrls = ["http://a/v1", "http://b/v1"]'),
    ],
)
def test_a_file_of_addresses(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    config = read({"baseUrl": "http://first/v1", "baseUrlsFile": str(file)})
    assert config.providers[0].base_urls == ("http://first/v1", "http://a/v1", "http://b/v1")
    assert list(config.files) == [file]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["http://a/v1", ', "is not JSON"),
        ("{}", "must hold `baseUrls` and nothing else"),
        ('"http://a/v1"', "must hold an array"),
        ('["a", 7]', "has no scheme"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(text)
    found = refused({"baseUrlsFile": str(file)})
    assert said in found[0][1]
    assert found[0][0].startswith(str(file))
    assert len(found) == (2 if "7" in text else 1), "each element"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read({"baseUrlsFile": str(tmp_path / "none.json")})
    assert [one.message for one in caught.value.problems] == ["cannot be read: No such file or directory"]
    assert dict(caught.value.files) == {tmp_path / "none.json": None}, "it is followed until it is there"


def test_further_providers_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "more.toml"
    file.write_text('[[providers]]\nprovider = "q"\nbase_url = "http://q/v1"\nmodels = [{ api_name = "n" }]\n')
    config = read({"baseUrl": "http://p/v1"}, GATEWAY_PROVIDERS_FILE=str(file))
    assert [one.name for one in config.providers] == ["p", "q"]
    assert config.providers[1].origin == f"{file}[0]"
    file.write_text('[[providers]]\nprovider = "p"\nbase_url = "http://q/v1"\n')
    assert (
        "already the name of OPENAI_COMPATIBLE_DATA[0]"
        in refused({"baseUrl": "http://p/v1"}, GATEWAY_PROVIDERS_FILE=str(file))[0][1]
    )


@pytest.mark.parametrize(
    ("text", "listen"),
    [("10.0.0.1", "10.0.0.1:53"), ("127.0.0.1:8600", "127.0.0.1:8600"), ("[::1]:53", "[::1]:53"), ("off", "None")],
)
def test_the_dns_server(text: str, listen: str) -> None:
    assert str(read({"baseUrl": "http://p/v1"}, GATEWAY_DNS_SERVER=text).dns_server) == listen


def test_a_dns_server_is_no_name() -> None:
    assert "IP address" in refused({"baseUrl": "http://p/v1"}, GATEWAY_DNS_SERVER="dns.internal:53")[0][1]
