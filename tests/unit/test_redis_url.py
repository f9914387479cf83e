"""REDIS_URL: logins and TLS of Redis and of its Sentinels; an option without effect is refused."""

from __future__ import annotations

import pytest

from worker.contract.urls import mask_url
from worker.redis.address import RedisAddress, SentinelLogin, parse_redis_url
from worker.redis.connection import connect

SENTINELS = "redis+sentinel://:pw@a:1,[::2],c/mymaster/4"


@pytest.mark.parametrize("verify", ["none", "NONE", "CERT_NONE", "cert_none"])
def test_each_spelling_of_no_verification_is_accepted(verify: str) -> None:
    assert parse_redis_url(f"rediss://h?ssl_cert_reqs={verify}").options == {"ssl_cert_reqs": "none"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rediss://h?ssl_cert_reqs=never", "ssl_cert_reqs must be none, optional or required"),
        ("rediss://h?ssl_check_hostname=perhaps", "ssl_check_hostname must be true or false"),
        ("rediss://h?ssl_cert_reqs=none&ssl_ca_certs=/ca.pem", "ssl_ca_certs has no effect"),
        ("rediss://h?ssl_cert_reqs=none&ssl_check_hostname=true", "ssl_check_hostname has no effect"),
        ("rediss://h?ssl_keyfile=/key.pem", "ssl_keyfile has no effect"),
        ("redis://h?ssl_ca_certs=/ca.pem", "ssl_ca_certs has no effect without TLS"),
        ("unix:///run/redis.sock?ssl_cert_reqs=none", "ssl_cert_reqs has no effect without TLS"),
        ("redis+sentinel://h/m?ssl_ca_certs=/ca.pem", "ssl_ca_certs has no effect without TLS"),
        ("redis://h?sentinel_password=x", "need redis+sentinel://"),
        ("redis+sentinel://h/m?sentinel_tls=perhaps", "sentinel_tls must be true or false"),
        ("redis://a,b", "several hosts need redis+sentinel://"),
        ("redis://h?surprise=1", "unknown option 'surprise'"),
        ("http+sentinel://h/m", "the scheme must be one of redis"),
    ],
)
def test_option_that_would_be_ignored_or_is_wrong_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        parse_redis_url(url)
    assert message in str(caught.value)


def asked(address: RedisAddress) -> tuple[dict[str, object], dict[str, object]]:
    """The library's options for Redis and for the last Sentinel."""
    client, sentinels = connect(address, 1.0, 1.0)
    return client.connection_pool.connection_kwargs, sentinels[-1].connection_pool.connection_kwargs


def test_sentinels_have_a_login_of_their_own() -> None:
    redis, sentinel = asked(parse_redis_url(f"{SENTINELS}?sentinel_username=watcher&sentinel_password=other"))
    assert (redis["username"], redis["password"]) == (None, "pw")
    assert (sentinel["username"], sentinel["password"]) == ("watcher", "other")
    assert asked(parse_redis_url(SENTINELS))[1]["password"] is None


def test_sentinels_are_asked_with_tls_where_redis_is_unless_the_url_says_otherwise() -> None:
    def encrypted(url: str) -> tuple[bool, bool]:
        client, sentinels = connect(parse_redis_url(url), 1.0, 1.0)
        kinds = [made.connection_pool.connection_class.__name__ for made in (client, sentinels[0])]
        return "SSL" in kinds[0], "SSL" in kinds[1]

    assert encrypted("redis+sentinel://h/m") == (False, False)
    assert encrypted("rediss+sentinel://h/m?ssl_ca_certs=/ca.pem") == (True, True)
    assert encrypted("rediss+sentinel://h/m?sentinel_tls=false") == (True, False)
    assert encrypted("redis+sentinel://h/m?sentinel_tls=true&ssl_cert_reqs=none") == (False, True)
    redis, sentinel = asked(parse_redis_url("rediss+sentinel://h/m?ssl_ca_certs=/ca.pem"))
    assert redis["ssl_ca_certs"] == sentinel["ssl_ca_certs"] == "/ca.pem"


def test_password_of_the_sentinels_is_never_shown() -> None:
    url = f"{SENTINELS}?sentinel_username=watcher&sentinel_password=hunter2"
    assert "hunter2" not in mask_url(url) + repr(parse_redis_url(url))


def test_url_wins_over_the_settings_for_the_sentinels() -> None:
    address = parse_redis_url(f"{SENTINELS}?sentinel_username=watcher")
    assert address.with_sentinel_login("setting", "secret", True).sentinel == SentinelLogin("watcher", "secret", True)


def test_user_and_password_may_be_parameters() -> None:
    address = parse_redis_url("redis://h?username=u&password=p")
    assert (address.user, address.password) == ("u", "p")
