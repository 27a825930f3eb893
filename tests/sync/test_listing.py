"""Pages of listings: what is read of them here, what is left to the SDK, and what is not read twice."""

import asyncio

import pytest

from adapters_sync.inventory import RemoteFile
from adapters_sync.listing import Pages
from adapters_sync.remote import connect

ITEM = (
    "<Contents><Key>m/{key}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
    "<ETag>&quot;{etag}&quot;</ETag><Size>7</Size><StorageClass>STANDARD</StorageClass></Contents>"
)
REST = "<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
QUOTED = "<EncodingType>url</EncodingType>"


def page(*items, token="t", more=""):
    text = f"<Name>b</Name>{''.join(items)}{REST.format(token=token)}{more}"
    return f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3/">{text}</ListBucketResult>'.encode()


def item(key, etag="e"):
    return ITEM.format(key=key, etag=etag)


def test_a_page_is_its_objects_and_a_rest_for_the_sdk():
    objects, rest = Pages("m/").take(page(item("a/x.json"), item("a/y.json", etag="f")))
    assert objects == [
        RemoteFile(path="a/x.json", size=7, etag='"e"', modified=1767323045.0),
        RemoteFile(path="a/y.json", size=7, etag='"f"', modified=1767323045.0),
    ]
    assert rest == page()


@pytest.mark.parametrize(("more", "path"), [(QUOTED, "a b+/ä"), ("", "a+b%2B/%C3%A4")])
def test_keys_are_unquoted_when_the_server_says_that_it_quoted_them(more, path):
    objects, _ = Pages("m/").take(page(item("a+b%2B/%C3%A4"), more=more))
    assert [one.path for one in objects] == [path]


def test_what_a_page_said_at_the_last_listing_is_not_read_again():
    pages = Pages("m/")
    pages.begin()
    first, _ = pages.take(page(item("a/x.json")))
    pages.begin()
    again, rest = pages.take(page(item("a/x.json"), token="another"))
    assert again is first
    assert b"another" in rest
    changed, _ = pages.take(page(item("a/x.json", etag="changed")))
    assert changed[0].etag == '"changed"'


def test_a_page_that_was_not_in_the_last_listing_is_forgotten():
    pages = Pages("m/")
    first, _ = pages.take(page(item("a/x.json")))
    pages.begin()
    pages.begin()
    again, _ = pages.take(page(item("a/x.json")))
    assert again == first
    assert again is not first


@pytest.mark.parametrize(
    "odd",
    [
        page(),
        page(item("a/x.json"), "<IsTruncated>true</IsTruncated>", item("a/y.json")),
        page(item("a/x.json").replace("<Size>7</Size>", "")),
        page(item("a/x.json").replace("7", "seven")),
        page(item("a/x.json").replace("2026-01-02T03", "once")),
        page(item("a/x.json")).replace(b"Contents>", b"s3:Contents>"),
        page(item("a/x.json")).replace(b"</Key>", b""),
        b"<Error><Code>InternalError</Code></Error>",
        b"",
    ],
)
def test_a_page_in_any_other_form_is_the_sdks_to_read(odd):
    assert Pages("m/").take(odd) is None


def test_a_server_lists_the_same_with_the_sdk_alone(bucket, monkeypatch):
    for path in ("a/x.json", "a/plus+and space.json", "a/ä&<é>.json", "b/~.json"):
        bucket.put(path, path.encode())

    async def main():
        async with connect(bucket.source) as remote:
            ours = await remote.list()
            monkeypatch.setattr(Pages, "take", lambda self, page: None)
            assert await remote.list() == ours
            return ours

    assert sorted(one.path for one in asyncio.run(main())) == sorted(bucket.paths())
