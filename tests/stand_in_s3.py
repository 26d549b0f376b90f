"""A stand-in of S3 (moto) in this process, which s3fs asks for whatever is read from there on."""

from __future__ import annotations

import os
from pathlib import Path

import s3fs
from moto.server import ThreadedMotoServer


def stand_in_s3(source: str | Path) -> tuple[ThreadedMotoServer, s3fs.S3FileSystem]:
    """Start it with a folder's files in ``s3://bucket/train``; return it and its file system."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="none",
        AWS_SECRET_ACCESS_KEY="none",
        AWS_DEFAULT_REGION="us-east-1",
    )
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    for path in sorted(Path(source).iterdir()):
        store.put_file(str(path), f"bucket/train/{path.name}")
    return server, store
