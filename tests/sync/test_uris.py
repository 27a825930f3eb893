import pytest

from adapters_sync.errors import InvalidUri
from adapters_sync.uris import S3Prefix, parse_prefix, parse_push_target


@pytest.mark.parametrize("uri", ["s3://bucket/m/adapters", "s3://bucket/m/adapters/"])
def test_a_prefix_ends_with_a_slash_whether_it_was_said_or_not(uri):
    assert parse_prefix(uri) == S3Prefix("bucket", "m/adapters/")
    assert str(parse_prefix(uri)) == "s3://bucket/m/adapters/"


@pytest.mark.parametrize(
    "uri",
    ["", "bucket/m", "http://bucket/m", "s3://bucket", "s3://bucket/", "s3:///m", "s3://Bad_Bucket/m", "s3://bucket/a//b",
     "s3://bucket/../m", "s3://bucket/a\\b"],
)  # fmt: skip
def test_other_addresses_are_refused(uri):
    with pytest.raises(InvalidUri):
        parse_prefix(uri)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/m/adapters/", "folder"),
        ("s3://bucket/m/adapters", "folder"),
        ("s3://bucket/adapters/", "folder"),
        ("s3://bucket/m/adapters/sql", "sql"),
        ("s3://bucket/m/adapters/sql/", "sql"),
        ("s3://bucket/m/adapters/adapters", "adapters"),
    ],
)
def test_a_missing_or_extra_slash_never_moves_a_push(uri, name):
    prefix, found = parse_push_target(uri, "folder")
    assert prefix.prefix.endswith("adapters/")
    assert found == name


@pytest.mark.parametrize(
    "uri", ["s3://bucket/m/", "s3://bucket/m/adapters/a/b", "s3://bucket/m/adapters/-bad"]
)
def test_a_push_elsewhere_is_refused(uri):
    with pytest.raises(InvalidUri):
        parse_push_target(uri, "folder")


def test_a_folder_whose_name_is_no_adapter_name_needs_a_name_in_the_address():
    with pytest.raises(InvalidUri, match="does not match"):
        parse_push_target("s3://bucket/m/adapters/", "my folder")
    assert parse_push_target("s3://bucket/m/adapters/mine", "my folder")[1] == "mine"
