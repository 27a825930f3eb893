"""`loramill adapters`: what people and machines are told of every adapter."""

import json

import pytest
from aiohttp import web

from adapters_sync import show
from adapters_sync.errors import SettingsError
from adapters_sync.layout import AdapterState, BaseModel, resolve, write_base_model
from adapters_sync.management import check_url
from adapters_sync.survey import survey
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, config, weights, write_folder
from tests.sync.test_base_model import BASE, adapter

INVALID, PENDING, READY = AdapterState.INVALID, AdapterState.PENDING, AdapterState.READY


def lines(world):
    return {line.name: line for line in survey(world.adapters_dir).adapters}


def test_a_mirrored_folder_is_told_with_what_the_mirror_thinks(world):
    world.bucket.put_adapter("a", fill=1, r=8)
    world.bucket.put_adapter("b", fill=2)
    world.bucket.put(f"half/{CONFIG}", config())
    world.bucket.put_adapter("ill", {CONFIG: config(r=0), WEIGHTS: weights()})
    world.sync()
    old = resolve(world.adapters_dir, "b").version
    world.bucket.put_adapter("b", {CONFIG: b"nope", WEIGHTS: weights()})
    world.sync()
    found = lines(world)
    a = found["a"]
    assert (a.version, a.rank, a.tier, a.state, a.reason) == (
        resolve(world.adapters_dir, "a").version, 8, "disk", READY, None,
    )  # fmt: skip
    assert a.bytes == sum(map(len, adapter_files(r=8).values()))
    assert (found["b"].version, found["b"].tier, found["b"].state) == (old, "disk", INVALID)
    assert "is not a JSON object" in found["b"].reason
    assert (found["half"].version, found["half"].tier, found["half"].state) == (None, None, PENDING)
    assert (found["ill"].version, found["ill"].tier, found["ill"].state) == (None, None, INVALID)
    assert survey(world.adapters_dir).source == world.bucket.uri
    assert list(found) == sorted(found)


def test_the_disk_is_believed_before_the_state_file(world):
    for name in "ab":
        world.bucket.put_adapter(name)
    world.sync()
    (world.adapters_dir / "a").unlink()
    (resolve(world.adapters_dir, "b").path / WEIGHTS).unlink()
    found = lines(world)
    assert (found["a"].version, found["a"].tier) == (None, None)
    assert (found["b"].state, found["b"].reason) == (PENDING, "its version on disk is not whole")
    world.paths.state_file.unlink()
    assert lines(world)["b"].state is PENDING


def test_a_plain_folder_is_checked_where_it_lies(tmp_path):
    folder = tmp_path / "adapters"
    write_folder(folder / "good", adapter_files(r=8))
    write_folder(folder / "ill", adapter_files(r=0))
    good, ill = survey(folder).adapters
    assert good.version == resolve(folder, "good").version
    assert (good.rank, good.tier, good.state) == (8, "disk", READY)
    assert (ill.version, ill.tier, ill.state) == (None, None, INVALID)
    assert "r is 0" in ill.reason


def test_a_plain_folder_is_checked_against_the_base_model_where_that_is_known(world):
    write_folder(world.adapters_dir / "a", adapter())
    assert lines(world)["a"].state is READY
    write_base_model(world.paths, BaseModel(modules={}))
    assert "the base model does not have" in lines(world)["a"].reason
    write_base_model(world.paths, BASE)
    assert lines(world)["a"].state is READY


def test_the_state_of_a_neighbouring_folder_is_not_taken_for_its_own(world):
    world.bucket.put_adapter("a")
    world.sync()
    write_folder(world.adapters_dir.with_name("plain") / "b")
    found = survey(world.adapters_dir.with_name("plain"))
    assert [line.name for line in found.adapters] == ["b"]
    assert found.source is None


def test_a_failed_pass_is_told(s3_world, cli, monkeypatch):
    s3_world.bucket.put_adapter("a")
    s3_world.sync()
    for path in s3_world.bucket.paths():
        s3_world.bucket.remove(path)
    s3_world.bucket.client.delete_bucket(Bucket=s3_world.bucket.name)
    s3_world.sync()
    result = cli("adapters", "--adapters-dir", s3_world.adapters_dir)
    assert result.exit_code == 0
    assert result.stdout.startswith("a\t")
    assert "the mirror's last pass failed: cannot list" in result.stderr


# The command


def test_lines_are_columns_between_tabs(world, cli):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("ill", {CONFIG: config(r=0), WEIGHTS: weights()})
    world.sync()
    result = cli("adapters", "--adapters-dir", world.adapters_dir)
    assert result.exit_code == 0
    version = resolve(world.adapters_dir, "a").version[:12]
    size = sum(map(len, adapter_files().values()))
    assert result.stdout.splitlines() == [
        f"a\t{version}\t4\t{size}\tdisk\tready\t-",
        "ill\t-\t-\t-\t-\tinvalid\tadapter_config.json: r is 0; it must be 1 or more",
    ]


def test_json_has_whole_versions(world, cli, monkeypatch):
    world.bucket.put_adapter("a")
    world.sync()
    monkeypatch.setenv("LORAMILL_ADAPTERS_DIR", str(world.adapters_dir))
    found = json.loads(cli("adapters", "--json").stdout)
    assert found["source"] == world.bucket.uri
    (line,) = found["adapters"]
    assert line["version"] == resolve(world.adapters_dir, "a").version
    assert line["state"] == "ready"


def test_a_terminal_gets_a_table(world, monkeypatch, capsys):
    world.bucket.put_adapter("a")
    world.bucket.put("[red]x/y.json", b"{}")
    world.sync()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    show.show_survey(survey(world.adapters_dir))
    printed = capsys.readouterr().out
    header, *rows = printed.splitlines()
    assert header.split() == list(show.COLUMNS)
    assert any(row.split()[:2] == ["a", resolve(world.adapters_dir, "a").version[:12]] for row in rows)
    assert "[red]x" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--adapters-dir", "/nowhere/at/all"), "/nowhere/at/all is not a folder"),
        ((), "nothing to list"),
        (("--url", "localhost:8080"), "is not an http://host:port address"),
        (("--url", "http://host:x/"), "is not an http://host:port address"),
        (("--nonsense",), ""),
    ],
)
def test_misuse_is_exit_code_2(cli, args, message):
    result = cli("adapters", *args)
    assert result.exit_code == 2
    assert message in result.stderr


# With a worker


@pytest.fixture
def worker(serve):
    """A management API with some adapters, two a page, that asks for the token `secret`; its address."""
    told = []

    async def adapters(request):
        if request.headers.get("Authorization") != "Bearer secret":
            return web.Response(status=401)
        start = int(request.query.get("next_page_token", 0))
        page = {
            "adapters": [{"name": n, "version": v, "tier": t, "src": "x"} for n, v, t in told[start:][:2]]
        }
        if start + 2 < len(told):
            page["nextPageToken"] = str(start + 2)
        return web.json_response(page)

    return serve(adapters), told


def test_a_worker_tells_the_tier_of_the_version_that_it_has(world, cli, worker):
    url, told = worker
    for name in ("cold", "hot", "other", "warm"):
        world.bucket.put_adapter(name)
    world.sync()
    version = resolve(world.adapters_dir, "hot").version
    told += [
        ("elsewhere", "e" * 64, "gpu"), ("hot", version, "gpu"), ("other", "0" * 64, "gpu"),
        ("warm", version, "cpu"), ("cold", version, "disk"),
    ]  # fmt: skip
    where = ("--adapters-dir", world.adapters_dir, "--url", f"{url}/")
    result = cli("adapters", *where, "--token", "secret", "--json")
    assert result.exit_code == 0, result.output
    tiers = {line["name"]: line["tier"] for line in json.loads(result.stdout)["adapters"]}
    assert tiers == {"cold": "disk", "elsewhere": "gpu", "hot": "gpu", "other": "disk", "warm": "cpu"}


def test_a_worker_alone_can_be_asked_and_the_token_may_be_in_the_environment(cli, worker, monkeypatch):
    url, told = worker
    told.append(("a", "1" * 64, "gpu"))
    monkeypatch.setenv("LORAMILL_HTTP_TOKEN", "secret")
    assert cli("adapters", "--url", url).stdout == "a\t111111111111\t-\t-\tgpu\tready\t-\n"


def test_a_worker_that_wants_a_token_says_so_in_one_line(cli, worker):
    url, _ = worker
    result = cli("adapters", "--url", url)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"loramill: {url}/adapters asks for a token: give --token or LORAMILL_HTTP_TOKEN"
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (web.Response(status=503, text="loading"), "answered 503: 'loading'"),
        (web.Response(text="<html>"), "is not a worker's"),
        (web.json_response({"adapters": [{"tier": "gpu"}]}), "is not a worker's"),
        (web.json_response({"adapters": [], "nextPageToken": "x"}), "the page token 'x' twice"),
        (web.Response(status=302, headers={"Location": "http://127.0.0.1:9/"}), "answered 302"),
    ],
)
def test_what_no_worker_would_say_is_one_line_and_exit_code_1(cli, serve, answer, message):
    async def adapters(request):
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    result = cli("adapters", "--url", serve(adapters))
    assert result.exit_code == 1
    assert message in result.stderr


def test_nobody_at_the_address_is_one_line_and_exit_code_1(cli):
    result = cli("adapters", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "cannot ask http://127.0.0.1:9/adapters" in result.stderr


def test_addresses_are_checked_before_anything_is_sent():
    assert check_url("https://host/base/") == "https://host/base"
    for url in ("", "host:80", "ftp://host", "http://", "http://host:99999"):
        with pytest.raises(SettingsError):
            check_url(url)
