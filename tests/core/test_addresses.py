"""Addresses in settings: what they mean, and that no error shows a password."""

import pytest

from mlops_dagster.core.addresses import masked, masked_in, mlflow_server, online_store, s3_place
from mlops_dagster.core.errors import DeclarationError


def test_a_place_in_a_bucket():
    assert s3_place("MLOPS_LAKE_URL", "s3://lake-1/team/a/") == ("lake-1", "team/a")
    assert s3_place("MLOPS_LAKE_URL", "s3://lake-1") == ("lake-1", "")


def test_online_stores_keep_their_passwords_apart():
    assert online_store("O", "sqlite", "S").section == {"type": "sqlite", "path": "online.db"}
    plain = online_store("O", "redis://h", "S")
    assert (plain.section["connection_string"], plain.secrets) == ("h:6379,db=0", {})
    redis = online_store("O", "rediss://u:p%40ss@h:1/2", "S")
    assert redis.section["connection_string"] == "h:1,db=2,username=u,password=${S},ssl=true"
    assert redis.secrets == {"S": "p@ss"}
    assert "p@ss" not in repr(redis)
    postgres = online_store("O", "postgresql://u:se%23cret@h/db?sslmode=require", "S")
    assert (postgres.section["host"], postgres.section["port"], postgres.section["database"]) == ("h", 5432, "db")
    assert (postgres.section["sslmode"], postgres.section["password"]) == ("require", "${S}")
    assert postgres.secrets == {"S": "se#cret"}


@pytest.mark.parametrize(
    ("check", "address", "words"),
    [
        (s3_place, "lake", "use s3://BUCKET/PREFIX"),
        (s3_place, "s3://", "use s3://BUCKET/PREFIX"),
        (s3_place, "s3://key:hunter2@bucket/lake", "credentials from AWS_"),
        (s3_place, "https://h/bucket", "endpoint comes from AWS_ENDPOINT_URL"),
        (online_store, "mysql://u:hunter2@h/db", "use sqlite, redis://"),
        (online_store, "redis://:hunter2@h:port", "use sqlite, redis://"),
        (online_store, "redis://:hunter2@h/zero", "at most /NUMBER"),
        (online_store, "redis://:hunter2,x@h", "password without one"),
        (online_store, "postgresql://u:hunter2@h", "use sqlite, redis://"),
        (online_store, "postgresql://u:hunter2@h/db?ssl=1", "there are sslmode and schema"),
        (mlflow_server, "h:5000", "use http(s)://HOST:PORT"),
        (mlflow_server, "ftp://u:hunter2@h", "use http(s)://HOST:PORT"),
    ],
)
def test_a_wrong_address_names_setting_value_and_remedy_but_no_password(check, address, words):
    with pytest.raises(DeclarationError) as raised:
        check("MLOPS_THIS", address, *(["S"] if check is online_store else []))
    told = str(raised.value)
    assert told.startswith(f"MLOPS_THIS is {masked(address)!r}: ")
    assert words in told
    assert "hunter2" not in told


def test_masking_hides_what_lies_between_colon_and_the_last_at():
    assert masked("postgresql://u:a@b:c@h/db") == "postgresql://u:***@h/db"
    assert masked("redis://:secret@h:6379/0") == "redis://:***@h:6379/0"
    assert masked("redis://:ab/cd@ef@h") == "redis://:***@h"
    assert masked("u:secret@h") == "***@h"
    assert masked("http://h:5000/x") == "http://h:5000/x"


def test_addresses_of_mlflow():
    for address in ("http://h:5000", "https://h", "postgresql+psycopg://u:p@h/db", "sqlite:////tmp/mlflow.db"):
        assert mlflow_server("M", address) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no answer of http://u:hunter2@h:1/api: retry", "no answer of http://u:***@h:1/api: retry"),
        ("'http://:hunter2@h' and s3://key:hunter2@bucket/x", "'http://:***@h' and s3://key:***@bucket/x"),
        ("at odd://u:hunter/2 x@h/path", "at odd://u:***@h/path"),
        ("http://h:80/a@b, http://u@h and anna@h", "http://h:80/a@b, http://u@h and anna@h"),
    ],
)
def test_passwords_in_a_text_are_masked(text: str, said: str):
    assert masked_in(text, "odd://u:hunter/2 x@h/") == said
