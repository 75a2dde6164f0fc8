"""Which addresses and URLs may be fetched, without any network."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import FetchRefused
from tidegate.upstream.fetch import MAX_URI_CHARS, check_uri, is_public

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "93.184.216.34",
    "172.15.255.255",
    "172.32.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "192.0.1.1",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2001:4860:4860::8888",
    "2a00:1450:4001:81b::200e",
]
CLOSED = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "127.0.0.1", "127.255.255.254"),
    *("100.64.0.1", "100.127.255.255", "100.100.100.200", "168.63.129.16"),
    *("169.254.0.1", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255"),
    *("192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1"),
    *("198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255"),
    *("240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8"),
    *("64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::a9fe:a9fe", "100::1"),
    *("2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:10::1", "2001:db8::1"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:808:808::1", "3fff::1", "5f00::1"),
    *("fc00::1", "fd00:ec2::254", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1"),
    *("ff02::1", "ff0e::1", "2a00:1450::5efe:a00:1", "2a00:1450::200:5efe:7f00:1"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", CLOSED)
def test_any_other_address_is_not(address: str) -> None:
    assert not is_public(ip_address(address))


@given(st.ip_addresses())
def test_nothing_that_python_knows_to_be_special_is_public(address: IPv4Address) -> None:
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast


@given(st.ip_addresses(v=4))
def test_no_ipv6_address_that_wraps_an_ipv4_address_is_public(inner: IPv4Address) -> None:
    number = int(inner)
    wrapped = [
        number,
        0xFFFF << 32 | number,
        0x64_FF9B << 96 | number,
        0x64_FF9B_0001 << 80 | number,
        0x2002 << 112 | number << 80 | 1,
        0x2001_0000 << 96 | (number ^ 0xFFFF_FFFF),
    ]
    for value in wrapped:
        assert not is_public(ip_address(value.to_bytes(16, "big")))


@pytest.mark.parametrize(
    "uri",
    [
        "https://example.com/a.png",
        "http://example.com",
        "HTTPS://EXAMPLE.com:443/a?b=c#d",
        "http://example.com:8080/a.png",
        "https://8.8.8.8/a.png",
        "https://[2606:4700:4700::1111]/a.png",
        "https://bücher.example/ä.png",
        "https://1.example.com/",
    ],
)
def test_a_public_url_passes(uri: str) -> None:
    assert check_uri(uri).host


@pytest.mark.parametrize(
    "uri",
    [
        *("", "a.png", "/a.png", "//example.com/a.png", "http:", "http://", "http:///a.png"),
        *("file:///etc/passwd", "ftp://example.com/", "gopher://example.com/", "data:image/png,x"),
        *("javascript:alert(1)", "gs://bucket/a.png", "unix:/run/docker.sock"),
        *("http://127.0.0.1/", "http://127.0.0.1:8000/", "http://0.0.0.0/", "http://10.1.2.3/"),
        *("http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]/"),
        *("http://[::ffff:7f00:1]/", "http://[::1]/", "http://[::]/", "http://[fd00:ec2::254]/"),
        *("http://[fe80::1%25eth0]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/"),
        *("http://2130706433/", "http://0177.0.0.1/", "http://0x7f000001/", "http://0x7f.1/"),
        *(
            "http://127.1/",
            "http://127.0.0.1./",
            "http://127。0。0。1/",
            "http://\uff11\uff12\uff17.0.0.1/",
        ),
        *("http://017700000001/", "http://8.8.8/", "http://08.8.8.8/"),
        *("http://localhost/", "http://LOCALHOST./", "http://a.localhost/", "http://metadata/"),
        *("http://metadata.google.internal/computeMetadata/v1/",),
        *("http://user@example.com/", "http://user:pass@example.com/", "http://@example.com/"),
        *("http://:p@example.com/", "http://example.com:22/", "http://example.com:25/"),
        *("http://example.com:0/", "http://example.com:70000/", "http://example.com:x/"),
        *("http://exa mple.com/", "http://example.com/a b", "http://example.com\\@127.0.0.1/"),
        *("http://example.com/\r\nX-A: b", "http://example.com/\0", " http://example.com/"),
        *("http://[::1", "http://[v1.x]/", "http://example.com%00.evil/", "http://a..b/"),
        "https://example.com/" + "x" * MAX_URI_CHARS,
        "http://" + "a" * 64 + ".example/",
    ],
)
def test_a_url_that_is_not_of_a_public_host_is_refused(uri: str) -> None:
    with pytest.raises(FetchRefused) as refusal:
        check_uri(uri)
    assert refusal.value.field == "image_uri"
    assert refusal.value.allowed


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://[", "http://x@"]))
def test_any_text_is_either_a_url_or_refused(text: str, start: str) -> None:
    try:
        url = check_uri(start + text)
    except FetchRefused:
        return
    assert url.scheme in ("http", "https")
    assert url.raw_host
