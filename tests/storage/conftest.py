"""Fixtures of the tests of storage."""

import uuid

import boto3
import pytest


@pytest.fixture
def s3(s3_server, s3_settings):
    """A new folder in a bucket of moto's server."""
    s3_settings(s3_server)
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="cells")  # there already is fine
    return f"s3://cells/{uuid.uuid4().hex}"


@pytest.fixture(params=["disk", "s3"])
def root(request, tmp_path):
    """A folder that is not there yet, on disk and in object storage."""
    return str(tmp_path / "root") if request.param == "disk" else request.getfixturevalue("s3")
