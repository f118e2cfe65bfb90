"""What is fetched is whole and verified, or not there."""

import hashlib
import http.server
import threading

import pytest

from fairseq_dsq.download import download

CONTENT = b"some data\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing":
                self.send_error(404)
                return
            if self.path == "/cut":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort")
                return
            if self.path == "/garbage":
                self.wfile.write(b"garbage\r\n")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:-10] if self.path == "/short" else CONTENT)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server, tmp_path):
    path = tmp_path / "new/data"
    assert download(f"{server}/data", path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert download(f"{server}/missing", path, SHA256) == path


@pytest.mark.parametrize(
    ("name", "sha256", "error", "expected"),
    [
        ("missing", None, OSError, "HTTP Error 404: Not Found (do this)"),
        ("short", None, OSError, f"got {len(CONTENT) - 10} bytes, expected {len(CONTENT)} (do this)"),
        ("cut", None, OSError, "IncompleteRead(0 bytes read) (do this)"),
        ("garbage", None, OSError, "garbage (do this)"),
        ("data", "0" * 64, ValueError, f"got sha256 {SHA256}, expected {'0' * 64}"),
    ],
)
def test_nothing_is_left_of_a_failure(server, tmp_path, name, sha256, error, expected):
    with pytest.raises(error) as stop:
        download(f"{server}/{name}", tmp_path / "data", sha256, hint="do this")
    assert str(stop.value) == f"{server}/{name}: {expected}"
    assert not list(tmp_path.iterdir())
