"""Every kind of problem: where it is reported, in what words, with which nearest name. All are found at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.config import ConfigError, Problem, load

URL = "http://localhost:8000/v1"


def problems(environ: dict[str, str], **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load({"HOME": "/home/x", **environ}, **options)
    return caught.value.problems


def provider(**changes: Any) -> dict[str, Any]:
    """A provider that is right, with `changes`; a change to ... removes the key."""
    entry = {"provider": "p", "baseUrl": URL, "models": [{"apiName": "m"}], **changes}
    return {key: value for key, value in entry.items() if value is not ...}


def model(**changes: Any) -> dict[str, Any]:
    return provider(models=[{"apiName": "m", **changes}])


SCALARS = [
    ("GATEWAY_LISTEN", "localhost", "host:port", "localhost:8700"),
    ("GATEWAY_LISTEN", "http://localhost:8700/", "without a scheme", "localhost:8700"),
    ("GATEWAY_LISTEN", "*:8700", "must name an address", "0.0.0.0:8700"),
    ("GATEWAY_LISTEN", "127.0.0.1:65536", "0 to 65535", ""),
    ("GATEWAY_LISTEN", "127.0.0.1:-1", "host:port", ""),
    ("GATEWAY_LISTEN", "300.0.0.1:80", "not an address", ""),
    ("GATEWAY_LISTEN", "::1:8700", "brackets", ""),
    ("GATEWAY_LISTEN", "[::zz]:8700", "not an address", ""),
    ("GATEWAY_LISTEN", "-x:80", "not an address", ""),
    ("GATEWAY_METRICS_LISTEN", "of", "host:port", "off"),
    ("GATEWAY_METRICS_LISTEN", "127.0.0.1", "host:port", "127.0.0.1:9464"),
    ("GATEWAY_METRICS_LISTEN", "127.0.0.1:8700", "both 127.0.0.1:8700", ""),
    ("GATEWAY_TOOLS_UNSUPPORTED", "rejct", "strip, reject", "reject"),
    ("GATEWAY_LOG_LEVEL", "warn", "one of", "warning"),
    ("GATEWAY_DEMO", "maybe", "auto, on, off", ""),
    ("GATEWAY_ACCESS_LOG", "ja", "true or false", ""),
    ("LOCAL_LLM_ENABLE_PULL", "enabled", "true or false", ""),
    ("GATEWAY_MAX_BODY_BYTES", "0", "whole number", ""),
    ("GATEWAY_MAX_BODY_BYTES", "64MB", "whole number", ""),
    ("GATEWAY_MAX_BODY_BYTES", "1.5", "whole number", ""),
    ("GATEWAY_MIN_BODY_RATE", "-1", "whole number", ""),
    ("GATEWAY_BODY_TIMEOUT_S", "0", "greater than 0", ""),
    ("GATEWAY_BODY_TIMEOUT_S", "nan", "a number", ""),
    ("GATEWAY_KEEPALIVE_TIMEOUT_S", "9999999", "at most", ""),
    ("GATEWAY_SHUTDOWN_S", "-1", "0 or more", ""),
    ("GATEWAY_UPSTREAM_IDLE_S", "soon", "a number", ""),
    ("GATEWAY_DATA_DIR", "\x07", "path of a directory", ""),
    ("GATEWAY_DATA_DIR", "~nobody-has-this-name/x", "home directory", ""),
    ("OLLAMA_BASE_URL", "localhost:11434/api", "no scheme", "http://localhost:11434/api"),
    ("GATEWAY_LISTNE", "x", "unknown variable", "GATEWAY_LISTEN"),
    ("GATEWAY_PULL", "8700", "unknown variable", ""),
]


@pytest.mark.parametrize(("variable", "text", "message", "nearest"), SCALARS)
def test_a_wrong_scalar_names_its_variable(variable: str, text: str, message: str, nearest: str) -> None:
    [problem] = problems({variable: text})
    assert problem.path == variable
    assert problem.origin == "environment"
    assert message in f"{problem.message} {problem.hint}"
    if nearest:
        assert problem.nearest == nearest


PROVIDERS: list[tuple[Any, str, str, str]] = [
    ({"provider": "p"}, "", "must be an array", ""),
    (["p"], "[0]", "must be an object", ""),
    ([provider(provider=...)], "[0].provider", "is missing", ""),
    ([provider(provider=...), provider(), provider()], "[2].provider", "already the name of", ""),
    ([provider(provider="")], "[0].provider", "must not be empty", ""),
    ([provider(provider="a\nb")], "[0].provider", "printable", ""),
    ([provider(provider=1)], "[0].provider", "text in quotes", ""),
    ([provider(provider=" p")], "[0].provider", "begin or end with a space", ""),
    ([provider(provider="p" * 201)], "[0].provider", "at most 200", ""),
    ([provider(baseURL=URL)], "[0].baseURL", "unknown key", "baseUrl"),
    ([provider(name="p")], "[0].name", "unknown key", "provider"),
    ([provider(zzz=1)], "[0].zzz", "unknown key", ""),
    ([provider(base_url=URL)], "[0].base_url", "given twice, also as baseUrl", ""),
    ([provider(runtime="vlm")], "[0].runtime", "unknown runtime", "vllm"),
    ([provider(runtime="llama.cpp")], "[0].runtime", "unknown runtime", "llamacpp"),
    ([provider(runtime=3)], "[0].runtime", "unknown runtime", ""),
    ([provider(weight=0)], "[0].weight", "whole number from 1", ""),
    ([provider(maxInFlight=0)], "[0].maxInFlight", "whole number from 1", ""),
    ([provider(models=[{"apiName": "m", "continue": "yes"}])], "[0].models[0].continue", 'true, false or "auto"', ""),
    ([provider(weight=1.5)], "[0].weight", "whole number from 1", ""),
    ([provider(weight=True)], "[0].weight", "whole number from 1", ""),
    ([provider(apiKey=["k"])], "[0].apiKey", "text in quotes", ""),
    ([provider(apiKey="a b")], "[0].apiKey", "visible ASCII", ""),
    ([provider(apiKey="a\r\nX: y")], "[0].apiKey", "visible ASCII", ""),
    ([provider(apiKey="env:MY_KEI")], "[0].apiKey", "MY_KEI is not set", "env:MY_KEY"),
    ([provider(apiKey="env:")], "[0].apiKey", "name of a variable", ""),
    ([provider(baseUrl=...)], "[0].baseUrl", "is missing", ""),
    ([provider(baseUrl=..., baseUrls=[])], "[0].baseUrl", "is missing", ""),
    ([provider(baseUrls="http://a/v1")], "[0].baseUrls", "must be an array", ""),
    ([provider(baseUrls=[URL + "/"])], "[0].baseUrls[0]", "same address as baseUrl", ""),
    ([provider(baseUrl=..., baseUrls=[URL, "http://LOCALHOST:8000/v1"])], "[0].baseUrls[1]", "same address", ""),
    ([provider(models={"apiName": "m"})], "[0].models", "must be an array", ""),
    ([provider(models=["m"])], "[0].models[0]", "must be an object", ""),
    ([provider(models=[{}])], "[0].models[0].apiName", "is missing", ""),
    ([provider(models=[{"apiName": "m"}, {"apiName": "m"}])], "[0].models[1].apiName", "already the model", ""),
    ([model(name="m")], "[0].models[0].name", "unknown key", "apiName"),
    ([model(supportTools=True)], "[0].models[0].supportTools", "unknown key", "supportsTools"),
    ([model(supportsTools="false")], "[0].models[0].supportsTools", "without quotes", "false"),
    ([model(uiName=1)], "[0].models[0].uiName", "text in quotes", ""),
    ([model(aliases="x")], "[0].models[0].aliases", "must be an array", ""),
    ([model(aliases=["x", 1])], "[0].models[0].aliases[1]", "text in quotes", ""),
    ([model(aliases=["m"])], "[0].models[0].aliases[0]", "already the name or an alias", ""),
    ([model(aliases=["x", "x"])], "[0].models[0].aliases[1]", "already the name or an alias", ""),
    (
        [provider(models=[{"apiName": "a", "aliases": ["b"]}, {"apiName": "b"}])],
        "[0].models[0].aliases[0]",
        "already the name or an alias",
        "",
    ),
    ([model(contextWindow=0)], "[0].models[0].contextWindow", "whole number", ""),
    ([model(price=1)], "[0].models[0].price", "must be an object", ""),
    ([model(price={"input": -1})], "[0].models[0].price.input", "0 or more", ""),
    ([model(price={"inputs": 1})], "[0].models[0].price.inputs", "unknown key", "input"),
    ([provider(timeouts=5)], "[0].timeouts", "must be an object", ""),
    ([provider(timeouts={"connect": None, "idle": 0})], "[0].timeouts.idle", "greater than 0", ""),
    ([provider(timeouts={"firstbyte": 3})], "[0].timeouts.firstbyte", "unknown key", "firstByte"),
]


@pytest.mark.parametrize(("data", "path", "message", "nearest"), PROVIDERS)
def test_a_wrong_provider_names_the_path(data: Any, path: str, message: str, nearest: str) -> None:
    found = problems({"OPENAI_COMPATIBLE_DATA": json.dumps(data), "MY_KEY": "k"})
    problem = next((problem for problem in found if problem.path == f"OPENAI_COMPATIBLE_DATA{path}"), None)
    assert problem is not None, found
    assert message in f"{problem.message} {problem.hint}"
    assert problem.nearest == nearest
    assert len(found) == 1 + (len(data) == 3)  # in the case of three, the first has its own problem


URLS = [
    ("localhost:8000/v1", "no scheme", "http://localhost:8000/v1"),
    ("gpu1.lan/v1", "no scheme", "http://gpu1.lan/v1"),
    ("ftp://h/v1", "http:// or https://", ""),
    ("htp://h/v1", "http:// or https://", "http"),
    ("http://", "no valid host", ""),
    ("http://h:0/v1", "no valid host and port", ""),
    ("http://h:99999/v1", "cannot be read", ""),
    ("http://[::1/v1", "cannot be read", ""),
    ("http://h h/v1", "without spaces", ""),
    ("http://h\r\n/v1", "without spaces", ""),
    ("http://bücher/v1", "ASCII", ""),
    ("http://h/v1/../x", "dotted", ""),
    ("http://h//v1", "empty", ""),
    ("http://h/%76%31", "escaped", ""),
    ("http://h/v1?x=1", "no query", ""),
    ("http://h/v1#x", "no fragment", ""),
    ("http://user:pass@h/v1", "credentials", ""),
    ("http://h/v1/chat/completions", "the base", "http://h/v1"),
    ("http://h/v1/models/", "the base", "http://h/v1"),
    (8000, "a URL in quotes", ""),
]


@pytest.mark.parametrize(("url", "message", "nearest"), URLS)
def test_a_wrong_base_url(url: object, message: str, nearest: str) -> None:
    [problem] = problems({"OPENAI_COMPATIBLE_DATA": json.dumps([provider(baseUrl=url)])})
    assert problem.path == "OPENAI_COMPATIBLE_DATA[0].baseUrl"
    assert message in problem.message
    assert problem.nearest == nearest
    assert "pass" not in str(problem)
    assert "x=1" not in str(problem)


JSON = [
    ('[{"provider": "p",}]', "at line 1, column 19"),
    ('[\n{"provider" "p"}]', "at line 2, column 13"),
    ('[{"provider": "p", "provider": "q"}]', "key 'provider' twice"),
    ('[{"weight": NaN}]', "NaN is no number"),
    ("[" * 100_000, "too deep"),
    ("[" + "9" * 5000 + "]", "too long"),
]


@pytest.mark.parametrize(("text", "message"), JSON)
def test_json_that_cannot_be_read(text: str, message: str) -> None:
    [problem] = problems({"OPENAI_COMPATIBLE_DATA": text})
    assert problem.path == "OPENAI_COMPATIBLE_DATA"
    assert message in problem.message


API_KEYS = [
    ("alice", "entry 1", "name=key"),
    ("alice=abcdefghijklmnop,", "entry 2", "name=key"),
    ("alice=short", "entry 1", "at least 16"),
    ("abcdefghijklmnop=alice", "entry 1", "swapped"),
    ("al ice=abcdefghijklmnop", "entry 1", "A-Z a-z"),
    (" alice=abcdefghijklmnop", "entry 1", "space"),
    ("alice=abcdefghijklmnop ", "entry 1", "space"),
    ("a=abcdefghijklmnop, b=bbcdefghijklmnop", "entry 2", "space"),
    ("a=abcdefghijklmnop,a=bbcdefghijklmnop", "entry 2", "name is already taken"),
    ("a=abcdefghijklmnop,b=abcdefghijklmnop", "entry 2", "key is already"),
    ("a=abcdefgh ijklmnop", "entry 1", "visible ASCII"),
    ("a=" + "k" * 513, "entry 1", "at most 512"),
    ("a=env:NOT_THERE_AT_ALL", "entry 1", "NOT_THERE_AT_ALL is not set"),
    ("a=llmgw_" + "a" * 10 + "_" + "b" * 51, "entry 1", "wrong checksum"),
]


@pytest.mark.parametrize(("text", "entry", "message"), API_KEYS)
def test_wrong_client_keys(text: str, entry: str, message: str) -> None:
    [problem] = problems({"GATEWAY_API_KEYS": text})
    assert problem.path == f"GATEWAY_API_KEYS {entry}"
    assert message in f"{problem.message} {problem.hint}"
    assert "bcdefgh" not in str(problem)


TOML = [
    ("listen = ", "", "is not TOML"),
    ('lisen = ":1"', "lisen", "unknown key"),
    ('OLLAMA_BASE_URL = "http://h"', "OLLAMA_BASE_URL", "unknown key"),
    ("listen = true", "listen", "host:port"),
    ("enable_pull = 1", "enable_pull", "true or false"),
    ("shutdown_s = [1]", "shutdown_s", "a number"),
    ("body_timeout_s = inf", "body_timeout_s", "greater than 0"),
    ("api_keys = 3", "api_keys", "name=key pairs"),
    ("[api_keys]\nalice = 3", "api_keys entry 1", "text in quotes"),
    ("[providers]\nprovider = 'p'", "providers", "array"),
    ("[[providers]]\nprovider = 'p'\nbase_url = 'h'", "providers[0].base_url", "no scheme"),
]


@pytest.mark.parametrize(("text", "path", "message"), TOML)
def test_a_wrong_toml_file(tmp_path: Path, text: str, path: str, message: str) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    [problem] = problems({}, toml_file=file)
    assert problem.path == (path or str(file))
    assert problem.origin == str(file)
    assert message in problem.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    found = problems({}, env_file=tmp_path / "none.env", toml_file=binary)
    assert [(problem.path, problem.message) for problem in found] == [
        (str(tmp_path / "none.env"), "cannot be read: No such file or directory"),
        (str(binary), "cannot be read: it is not UTF-8 text"),
    ]


def test_a_line_of_the_env_file_that_cannot_be_read_is_named_without_its_text(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("GATEWAY_LISTEN=:1\n\nGATEWAY_API_KEYS='a=canary-canary-canary\n")
    [problem] = problems({}, env_file=file)
    assert problem.path == f"{file}:3"
    assert "canary" not in str(problem)


def test_every_problem_of_every_source_at_once(tmp_path: Path) -> None:
    env_file, toml_file = tmp_path / ".env", tmp_path / "gateway.toml"
    env_file.write_text("\n# two\nGATEWAY_DEMO=x\n")
    toml_file.write_text("shutdown_s = -1\n[[providers]]\nprovider = 1\nweight = 0\nbase_url = 2\n")
    found = problems(
        {"GATEWAY_ACCESS_LOG": "x", "GATEWAY_WHAT": "1"},
        env_file=env_file,
        toml_file=toml_file,
        flags={"listen": "nowhere"},
    )
    assert {(problem.path, problem.origin) for problem in found} == {
        ("--listen", "command line"),
        ("GATEWAY_ACCESS_LOG", "environment"),
        ("GATEWAY_WHAT", "environment"),
        ("GATEWAY_DEMO", f"{env_file}:3"),
        ("shutdown_s", str(toml_file)),
        ("providers[0].provider", str(toml_file)),
        ("providers[0].weight", str(toml_file)),
        ("providers[0].base_url", str(toml_file)),
    }


def test_the_ollama_name_is_taken_by_another_address() -> None:
    data = json.dumps([provider(provider="ollama")])
    [problem] = problems({"OPENAI_COMPATIBLE_DATA": data, "OLLAMA_BASE_URL": "http://h:11434"})
    assert problem.path == "OLLAMA_BASE_URL"
    assert "another provider" in problem.message


def test_the_text_of_a_problem() -> None:
    problem = Problem("A[0].b", "unknown runtime", "'vlm'", "valid: vllm", "vllm", "environment")
    assert str(problem) == "A[0].b = 'vlm': unknown runtime; did you mean vllm? (valid: vllm)"
