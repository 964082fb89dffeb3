"""The S3 server of the tests is as strict and as durable as the product relies on."""

import hashlib
import urllib.error
import urllib.request
from base64 import b64encode

import pytest
from botocore.exceptions import ClientError

from fakes.seaweed import ADMIN, BUCKET, READER, SERVICE, Identity, SeaweedFS

REFUSALS = {
    "a wrong secret": (Identity(SERVICE.access_key, "wrong", ()), {}, "SignatureDoesNotMatch"),
    "an unknown key": (Identity("nobody", "wrong", ()), {}, "InvalidAccessKeyId"),
    "a bucket that may only be read": (READER, {}, "AccessDenied"),
    "a bucket of others": (SERVICE, {"Bucket": "others"}, "AccessDenied"),
    "a bucket that does not exist": (ADMIN, {"Bucket": "none"}, "NoSuchBucket"),
    "a false checksum": (
        SERVICE,
        {"ChecksumSHA256": b64encode(hashlib.sha256(b"other").digest()).decode()},
        "BadDigest",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_write_is_refused(seaweed: SeaweedFS, what: str) -> None:
    identity, options, code = REFUSALS[what]
    asks = {"Bucket": BUCKET, "Key": "refused", "Body": b"content"} | options
    with pytest.raises(ClientError) as caught:
        seaweed.client(identity).put_object(**asks)
    assert caught.value.response["Error"]["Code"] == code
    with pytest.raises(ClientError, match="404"):
        seaweed.client().head_object(Bucket=BUCKET, Key="refused")


def test_a_forged_address_is_refused(seaweed: SeaweedFS) -> None:
    client = seaweed.client()
    for key in ("allowed", "forbidden"):
        client.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    where = {"Bucket": BUCKET, "Key": "allowed"}
    address = client.generate_presigned_url("get_object", where, ExpiresIn=60)
    with urllib.request.urlopen(address) as answer:
        assert answer.read() == b"allowed"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(address.replace("allowed", "forbidden"))


def test_acknowledged_objects_survive_a_kill(seaweed: SeaweedFS) -> None:
    client = seaweed.client()
    for number in range(20):
        client.put_object(Bucket=BUCKET, Key=f"kept/{number}", Body=bytes(50_000))
    seaweed.kill()
    seaweed.start()
    assert len(seaweed.names(f"s3://{BUCKET}/kept")) == 20
    assert client.get_object(Bucket=BUCKET, Key="kept/7")["Body"].read() == bytes(50_000)
