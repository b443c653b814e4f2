"""What `load` makes of right input: values, precedence, origins, warnings; and that wrong input never escapes it."""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Config, ConfigError, Listen, Model, Price, Secret, load
from gateway.config.model import Tenant
from gateway.config.settings import SETTINGS
from gateway.identity.keys import KeyRing
from gateway.upstreams.upstream import Timeouts

HOME = {"HOME": "/home/x"}
ROOT = Path(__file__).parents[2]


def loaded(environ: dict[str, str] | None = None, **options: Any) -> Config:
    return load({**HOME, **(environ or {})}, **options)


def test_nothing_configured_is_the_defaults() -> None:
    config = loaded()
    assert config == Config(data_dir=Path("/home/x/.local/share/local-llm-gateway"))
    assert config.listen == Listen("127.0.0.1", 8700)
    assert config.metrics_listen == Listen("127.0.0.1", 9464)
    assert config.enable_pull is False
    assert config.warnings == ()
    assert set(config.origins.values()) == {"default"}


def test_data_directory_follows_the_xdg_specification() -> None:
    assert loaded({"XDG_DATA_HOME": "/data"}).data_dir == Path("/data/local-llm-gateway")
    assert loaded({"XDG_DATA_HOME": "data"}).data_dir == Path("/home/x/.local/share/local-llm-gateway")


def test_the_design_documents_example() -> None:
    config = loaded(
        {
            "OPENAI_COMPATIBLE_DATA": """[
  {"provider":"LocalVLLM","models":[{"apiName":"deepseek-r1-distill-qwen-7b","uiName":"DeepSeek R1 7B Local",
   "supportsTools":false}],"apiKey":"","baseUrl":"http://localhost:8000/v1"}
]""",
            "OLLAMA_BASE_URL": "http://localhost:11434/api",
            "LOCAL_LLM_ENABLE_PULL": "true",
        }
    )
    vllm, ollama = config.providers
    assert (vllm.name, vllm.base_urls, vllm.runtime) == ("LocalVLLM", ("http://localhost:8000/v1",), "")
    assert vllm.models == (Model("deepseek-r1-distill-qwen-7b", "DeepSeek R1 7B Local", False),)
    assert not vllm.api_key
    assert not vllm.discover
    assert vllm.origin == "environment OPENAI_COMPATIBLE_DATA[0]"
    assert (ollama.name, ollama.base_urls) == ("ollama", ("http://localhost:11434/v1",))
    assert (ollama.runtime, ollama.discover) == ("ollama", True)
    assert config.ollama_base_url == "http://localhost:11434"
    assert config.enable_pull is True
    assert config.warnings == ()


FULL = {
    "provider": "fleet",
    "runtime": "vllm",
    "baseUrl": "HTTP://GPU1:8000/v1/",
    "baseUrls": ["http://gpu2:8000/v1", "https://[2001:DB8::1]/v1"],
    "apiKey": "env:UPSTREAM_KEY",
    "weight": 3,
    "maxInFlight": 32,
    "cacheTokens": 500_000,
    "timeouts": {"connect": 1, "firstByte": 2.5, "idle": None, "total": "off"},
    "models": [
        {
            "apiName": "big",
            "aliases": ["b", "large"],
            "contextWindow": 32768,
            "continue": False,
            "price": {"input": 0.1, "cachedInput": 0, "gpuSecond": 2},
        }
    ],
}


def test_a_provider_with_everything(tmp_path: Path) -> None:
    [provider] = loaded({"OPENAI_COMPATIBLE_DATA": json.dumps([FULL]), "UPSTREAM_KEY": "sk-secret"}).providers
    assert provider.base_urls == ("http://gpu1:8000/v1", "http://gpu2:8000/v1", "https://[2001:db8::1]/v1")
    assert provider.api_key.value == "sk-secret"
    assert provider.weight == 3
    assert (provider.max_in_flight, provider.cache_tokens) == (32, 500_000)
    assert provider.timeouts == Timeouts(1.0, 2.5, None, None)
    price = Price(0.1, 0.0, None, 2.0)
    assert provider.models == (Model("big", "big", True, ("b", "large"), 32768, price, continues=False),)


def test_null_and_missing_are_the_same_but_for_timeouts() -> None:
    entry = {"provider": "p", "baseUrl": "http://h/v1", "apiKey": None, "models": None, "weight": None}
    [provider] = loaded({"OPENAI_COMPATIBLE_DATA": json.dumps([entry])}).providers
    assert provider.discover
    assert provider.weight == 1
    assert provider.timeouts == Timeouts()


def test_toml_takes_camel_case_and_snake_case_and_native_types(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(
        """
listen = 8701
metrics_listen = "off"
access_log = false
shutdown_s = 2.5
max_body_bytes = 1_000
demo = "off"
[api_keys]
alice = "env:ALICE"
[[providers]]
provider = "p"
base_url = "http://h/v1"
models = [{ api_name = "a", supports_tools = false }, { apiName = "b", uiName = "B" }]
timeouts = { first_byte = 3, total = "off" }
"""
    )
    config = loaded({"ALICE": "alice-alice-alice"}, toml_file=file)
    assert config.listen == Listen("127.0.0.1", 8701)
    assert config.metrics_listen is None
    assert (config.access_log, config.shutdown_s, config.max_body_bytes) == (False, 2.5, 1000)
    assert config.api_keys == (("alice", Secret("alice-alice-alice")),)
    [provider] = config.providers
    assert provider.models == (Model("a", "a", False), Model("b", "B"))
    assert provider.timeouts == Timeouts(first_byte_s=3.0, total_s=None)
    assert provider.origin == f"{file}:providers[0]"
    assert config.origins["shutdown_s"] == f"{file}:shutdown_s"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8700", "127.0.0.1", 8700),
        (":8700", "127.0.0.1", 8700),
        ("8700", "127.0.0.1", 8700),
        ("0.0.0.0:80", "0.0.0.0", 80),
        ("[::1]:8700", "::1", 8700),
        ("localhost:0", "localhost", 0),
    ],
)
def test_listen(text: str, host: str, port: int) -> None:
    listen = loaded({"GATEWAY_LISTEN": text}).listen
    assert listen == Listen(host, port)
    assert loaded({"GATEWAY_LISTEN": str(listen)}).listen == listen


@pytest.mark.parametrize(
    "text", ["http://H:11434", "http://h:11434/", "http://h:11434/api", "http://h:11434/api/", "http://h:11434/v1"]
)
def test_ollama_base_url_in_every_form(text: str) -> None:
    config = loaded({"OLLAMA_BASE_URL": text})
    assert config.ollama_base_url == "http://h:11434"
    assert config.providers[0].base_urls == ("http://h:11434/v1",)


def test_ollama_declared_as_a_provider_is_not_added_twice() -> None:
    data = [{"provider": "mine", "baseUrl": "http://h:11434/v1", "models": [{"apiName": "m"}]}]
    config = loaded({"OPENAI_COMPATIBLE_DATA": json.dumps(data), "OLLAMA_BASE_URL": "http://h:11434/api"})
    [provider] = config.providers
    assert (provider.name, provider.runtime, provider.discover) == ("mine", "ollama", False)
    assert config.origins["providers[0].runtime"] == "environment OLLAMA_BASE_URL"


def test_an_ollama_provider_may_be_given_by_its_native_address() -> None:
    data = [{"provider": "o", "runtime": "ollama", "baseUrl": "http://h:11434/api"}]
    assert loaded({"OPENAI_COMPATIBLE_DATA": json.dumps(data)}).providers[0].base_urls == ("http://h:11434/v1",)


@pytest.mark.parametrize("word", ["true", "1", "yes", "on", "TRUE"])
def test_switch_on(word: str) -> None:
    assert loaded({"LOCAL_LLM_ENABLE_PULL": word}).enable_pull is True


@pytest.mark.parametrize("word", ["false", "0", "no", "off", "False", "", "  "])
def test_switch_off(word: str) -> None:
    assert loaded({"LOCAL_LLM_ENABLE_PULL": word}).enable_pull is False


def test_precedence_and_origins(tmp_path: Path) -> None:
    """Five sources set one value more each: every value comes from the highest that has it."""
    env_file, toml_file = tmp_path / ".env", tmp_path / "gateway.toml"
    toml_file.write_text('log_level = "error"\ndemo = "off"\nlisten = ":1"\nshutdown_s = 1\n')
    env_file.write_text(f"# a\nGATEWAY_CONFIG={toml_file}\nGATEWAY_DEMO=on\nGATEWAY_LISTEN=:2\nGATEWAY_SHUTDOWN_S=2\n")
    environ = {"GATEWAY_LISTEN": ":3", "GATEWAY_SHUTDOWN_S": "3", "GATEWAY_DEMO": ""}
    config = loaded(environ, env_file=env_file, flags={"shutdown_s": "4"})
    assert (config.log_level, config.demo, config.listen.port, config.shutdown_s) == ("error", "on", 3, 4.0)
    assert {name: config.origins[name] for name in ("log_level", "demo", "listen", "shutdown_s", "access_log")} == {
        "log_level": f"{toml_file}:log_level",
        "demo": f"{env_file}:3",
        "listen": "environment GATEWAY_LISTEN",
        "shutdown_s": "--shutdown-s",
        "access_log": "default",
    }


def test_the_toml_file_of_the_command_line_replaces_that_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("")
    assert loaded({"GATEWAY_CONFIG": "/does/not/exist.toml"}, toml_file=file) == loaded()


def test_the_env_file_expands_nothing_and_takes_several_lines(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "export GATEWAY_API_KEYS=alice=a$HOME${HOME}-long-enough\nOTHER=x\n"
        'OPENAI_COMPATIBLE_DATA=\'[\n {"provider":"p","baseUrl":"http://h/v1"}\n]\'\nGATEWAY_DEMO=off\n'
    )
    config = loaded(env_file=file)
    assert config.api_keys[0][1].value == "a$HOME${HOME}-long-enough"
    assert config.providers[0].origin == f"{file}:3[0]"
    assert config.origins["demo"] == f"{file}:6"


def test_warnings_name_the_key() -> None:
    data = [
        {"provider": "a", "baseUrl": "http://h/v1", "models": []},
        {"provider": "b", "baseUrl": "http://h/v1"},
    ]
    config = loaded({"OPENAI_COMPATIBLE_DATA": json.dumps(data), "GATEWAY_UPSTREAM_IDLE_S": "5", "LOCAL_LLM_PULL": "1"})
    assert [warning.path for warning in config.warnings] == [
        "LOCAL_LLM_PULL",
        "OPENAI_COMPATIBLE_DATA[0].models",
        "OPENAI_COMPATIBLE_DATA",
        "GATEWAY_UPSTREAM_IDLE_S",
    ]
    assert config.providers[0].models == ()
    assert config.providers[0].discover is False
    assert config.providers[1].discover is True


def test_providers_of_two_sources_are_not_merged_and_that_is_said(tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text('[[providers]]\nprovider = "t"\nbase_url = "http://t/v1"\n')
    config = loaded({"OPENAI_COMPATIBLE_DATA": "[]"}, toml_file=file)
    assert config.providers == ()
    assert f"{file}:providers" in config.warnings[0].message


def test_variables_that_kubernetes_sets_for_a_service_named_gateway_are_not_ours() -> None:
    links = {
        "GATEWAY_SERVICE_HOST": "10.0.0.1",
        "GATEWAY_SERVICE_PORT": "8700",
        "GATEWAY_SERVICE_PORT_HTTP": "8700",
        "GATEWAY_PORT": "tcp://10.0.0.1:8700",
        "GATEWAY_PORT_8700_TCP": "tcp://10.0.0.1:8700",
        "GATEWAY_PORT_8700_TCP_ADDR": "10.0.0.1",
        "GATEWAY_METRICS_SERVICE_HOST": "10.0.0.2",
        "GATEWAY_METRICS_PORT": "tcp://10.0.0.2:1",
    }
    assert loaded(links) == loaded()


def test_a_generated_key_may_be_configured(tmp_path: Path) -> None:
    key, _ = KeyRing.open(tmp_path).make_key("x")
    assert loaded({"GATEWAY_API_KEYS": f"x={key}"}).api_keys == (("x", Secret(key)),)


CANARY = "canary7Q4mZ1xW8vT2sR5pK9nJ3hG6fD0"


@pytest.mark.parametrize(
    "environ",
    [
        {"GATEWAY_API_KEYS": f"a={CANARY}"},
        {"GATEWAY_API_KEYS": CANARY},
        {"GATEWAY_API_KEYS": f"{CANARY}=b"},
        {"GATEWAY_API_KEYS": f"a={CANARY},a={CANARY}"},
        {"GATEWAY_API_KEYS": f" {CANARY}= x"},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": "http://h/v1", "apiKey": CANARY}])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": "http://h/v1", "apiKey": [CANARY]}])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": "http://h/v1", "apiKey": f" {CANARY}"}])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": "http://h/v1", "apikey": CANARY}])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": f"http://x:{CANARY}@h/v1"}])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": f"http://h/v1?key={CANARY}"}])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": CANARY, "apiKey": "http://h/v1"}])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps({"apiKey": CANARY})},
        {"OPENAI_COMPATIBLE_DATA": json.dumps({"apiKey": CANARY})[:-1]},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([[{"apiKey": CANARY}]])},
        {"OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": {"apiKey": CANARY}}])},
        {
            "OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": "http://h/v1", "apiKey": "env:K"}]),
            "K": CANARY,
        },
        {
            "OPENAI_COMPATIBLE_DATA": json.dumps([{"provider": "p", "baseUrl": "http://h/v1", "apiKey": "env:K"}]),
            "K": f"{CANARY} x",
        },
    ],
)
def test_a_secret_appears_in_no_problem_and_no_repr(environ: dict[str, str]) -> None:
    try:
        config = loaded(environ)
    except ConfigError as error:
        text = f"{error} {error!r} {error.problems!r}"
    else:
        text = f"{config} {config!r} {[str(w) for w in config.warnings]}"
    assert CANARY not in text
    assert CANARY[:12] not in text


def test_masks() -> None:
    assert repr(Secret("sk-" + "a" * 30 + "9f3c")) == "Secret('sk-…9f3c')"
    assert str(Secret("a" * 30 + "9f3c")) == "…9f3c"
    assert str(Secret("short-secret")) == "…"
    assert str(Secret("")) == ""
    assert f"{Secret(CANARY)}" == "…6fD0"
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    with pytest.raises(AttributeError):
        Secret("a").value = "b"


# --- the documentation cannot go stale ---------------------------------------------------------------------------


def test_every_field_is_a_setting() -> None:
    assert [setting.field for setting in SETTINGS if setting.field not in {f.name for f in fields(Config)}] == []
    assert {f.name for f in fields(Config)} - {s.field for s in SETTINGS} == {"warnings", "origins", "files"}


def test_the_example_env_file_names_every_variable_with_its_default() -> None:
    text = (ROOT / ".env.example").read_text()
    shown = dict(re.findall(r"^#([A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert set(shown) == {setting.variable for setting in SETTINGS} | {"GATEWAY_CONFIG"}
    defaults = {field.name: field for field in fields(Config)}
    without_default = {"providers", "providers_file", "api_keys", "limits", "ollama_base_url", "data_dir", "redis_url"}
    without_default.add("tenants")
    without_default |= {f"oidc_{name}" for name in ("issuer", "audience", "jwks_url", "group_claim", "grants")}
    for setting in SETTINGS:
        if setting.field not in without_default:
            default = defaults[setting.field].default
            assert default is not MISSING
            assert setting.parse(shown[setting.variable]) == default, setting.variable
    assert shown["GATEWAY_DATA_DIR"] == "~/.local/share/local-llm-gateway"
    timeouts = re.search(r'\{"connect".*?\}', text)
    assert timeouts is not None
    data = f'[{{"provider":"p","baseUrl":"http://h/v1","timeouts":{timeouts[0]}}}]'
    assert loaded({"OPENAI_COMPATIBLE_DATA": data}).providers[0].timeouts == Timeouts()


def test_the_example_files_are_valid(tmp_path: Path) -> None:
    uncommented = re.sub(r"^#(?=[A-Z_]+=|  \{|\])", "", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)
    env_file = tmp_path / ".env"
    for line in ("GATEWAY_CONFIG=gateway.toml", "GATEWAY_PROVIDERS_FILE=providers.json"):
        uncommented = uncommented.replace(line, "")
    env_file.write_text(uncommented)
    config = loaded(env_file=env_file)
    assert [provider.name for provider in config.providers] == ["LocalVLLM", "ollama"]
    assert config.warnings == ()
    example = loaded(toml_file=ROOT / "deploy" / "gateway.toml.example")
    assert [provider.name for provider in example.providers] == ["gpu-fleet", "spare", "ollama"]
    assert example.warnings == ()


# --- whatever comes in, a Config or a ConfigError comes out --------------------------------------------------------

_words = st.sampled_from(["provider", "baseUrl", "baseUrls", "models", "apiName", "apiKey", "timeouts", "price", "x"])
_texts = st.one_of(st.text(max_size=20), st.sampled_from(["http://h/v1", "http://[", "env:HOME", "off", "vllm"]))
_junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_words | _texts, inner, max_size=5)),
    max_leaves=20,
)
_variables = st.dictionaries(
    st.sampled_from([setting.variable for setting in SETTINGS]) | st.text(max_size=12).map(lambda t: f"GATEWAY_{t}"),
    st.one_of(st.text(max_size=30), _junk.map(json.dumps)),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(environ=_variables, data=_junk)
def test_junk_in_the_environment(environ: dict[str, str], data: Any) -> None:
    environ.setdefault("OPENAI_COMPATIBLE_DATA", json.dumps(data))
    try:
        assert isinstance(loaded(environ), Config)
    except ConfigError as error:
        str(error).encode()  # what is shown can be printed


@settings(max_examples=100, deadline=None)
@given(junk=st.one_of(st.text(max_size=60), st.binary(max_size=60), _words.map(lambda w: f"[[providers]]\n{w} = ")))
def test_junk_in_files(junk: str | bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "junk"
    file.write_bytes(junk if isinstance(junk, bytes) else junk.encode("utf-8", "surrogatepass"))
    for options in ({"env_file": file}, {"toml_file": file}):
        try:
            loaded({}, **options)
        except ConfigError as error:
            str(error).encode()


def test_tenants_from_json_and_from_toml(tmp_path: Path) -> None:
    expected = (Tenant("research", 3.0), Tenant("ops", 0.5))
    assert loaded({"GATEWAY_TENANTS": '{"research": {"weight": 3}, "ops": {"weight": 0.5}}'}).tenants == expected
    file = tmp_path / "gateway.toml"
    file.write_text("[tenants]\nresearch = {weight = 3}\n[tenants.ops]\nweight = 0.5\n")
    assert loaded(toml_file=file).tenants == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be an object of groups"),
        ('{"a b": {"weight": 1}}', "1 to 64"),
        ('{"a": 3}', "must be an object of groups"),
        ('{"a": {"wait": 3}}', "must be an object of groups"),
        ('{"a": {"weight": 0}}', "0.01 to 1000"),
    ],
)
def test_tenants_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded({"GATEWAY_TENANTS": text})


def test_what_another_source_replaces_is_looked_at_too(tmp_path: Path) -> None:
    """A mistake in it stops nothing, and is told: it would stop the gateway on the day when the other goes."""
    toml = tmp_path / "gateway.toml"
    toml.write_text("""
limits_share = 7.0
api_keys = "short=x"
[[providers]]
provider = "p"
baseUrl = "localhost:8000"
""")
    good = '[{"provider": "q", "baseUrl": "http://h/v1"}]'
    environ = {"OPENAI_COMPATIBLE_DATA": good, "GATEWAY_LIMITS_SHARE": "0.5", "GATEWAY_API_KEYS": "a=" + "k" * 20}
    config = load({"HOME": "/home/x", **environ}, toml_file=toml)
    assert [provider.name for provider in config.providers] == ["q"]
    told = {warning.path: warning.hint for warning in config.warnings if "not used now" in warning.hint}
    assert set(told) == {"limits_share", "api_keys entry 1", "providers[0].baseUrl"}
    assert not [path for path in config.origins if "gateway.toml" in config.origins[path]]
    with pytest.raises(ConfigError) as caught:
        load({"HOME": "/home/x"}, toml_file=toml)
    assert {problem.path for problem in caught.value.problems} == set(told)
