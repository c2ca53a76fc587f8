"""A real HTTP server in the place of a model's, on a free port of this machine."""

import http.server
import json
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """What `do_POST` of a test's own handler is written with."""

    protocol_version = "HTTP/1.1"

    def body(self):
        """The request."""
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status, content, kind="application/json"):
        """Send bytes, or what is not bytes as JSON."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        """Nothing on the screen."""


class Server:
    """Serves at `url` for the time of a `with`."""

    def __init__(self, handler):
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
