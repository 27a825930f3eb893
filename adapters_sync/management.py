"""What a worker says of its adapters over its management API, `GET /adapters`."""

from urllib.parse import urlsplit

import aiohttp
import msgspec

from adapters_sync.errors import SettingsError, SyncError
from adapters_sync.names import shown
from adapters_sync.survey import AdapterLine

PAGE = 100
_SECONDS = 10.0


class _Adapter(msgspec.Struct, frozen=True):
    name: str
    version: str | None = None
    rank: int | None = None
    bytes: int | None = None
    tier: str | None = None


class _Page(msgspec.Struct, frozen=True, rename={"next_page_token": "nextPageToken"}):
    adapters: tuple[_Adapter, ...] = ()
    next_page_token: str | None = None


def check_url(url: str) -> str:
    """The address of a worker without its last slash. Raises SettingsError when it is none."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise SettingsError([f"url: {shown(url)} is not an http://host:port address"])
    return url.rstrip("/")


async def ask_worker(url: str, token: str | None) -> dict[str, AdapterLine]:
    """Every adapter that the worker at `url` knows, by name, page by page.

    Raises SettingsError for an address that is none, and SyncError when the worker cannot be asked.
    """
    address = f"{check_url(url)}/adapters"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    found: dict[str, AdapterLine] = {}
    query, seen = {"limit": str(PAGE)}, set[str]()
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        while True:
            page = await _page(session, address, query)
            found |= {one.name: AdapterLine(**msgspec.structs.asdict(one)) for one in page.adapters}
            following = page.next_page_token
            if not following:
                return found
            if following in seen:
                raise SyncError(f"cannot ask {address}: it gave the page token {shown(following)} twice")
            seen.add(following)
            query["next_page_token"] = following


async def _page(session: aiohttp.ClientSession, address: str, query: dict[str, str]) -> _Page:
    try:
        async with session.get(address, params=query, allow_redirects=False) as answer:
            body = await answer.read()
    except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
        raise SyncError(f"cannot ask {address}: {error or type(error).__name__}") from error
    if answer.status in {401, 403}:
        raise SyncError(f"{address} asks for a token: give --token or LORAMILL_HTTP_TOKEN")
    if answer.status != 200:
        said = shown(body[:200].decode(errors="replace").strip())
        raise SyncError(f"cannot ask {address}: it answered {answer.status}: {said}")
    try:
        return msgspec.json.decode(body, type=_Page)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SyncError(f"{address} is not a worker's: {error}") from error
