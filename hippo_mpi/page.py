"""hippo_mpi.page: a page in the browser for a server: a chat, and what each rank does.

hippo_mpi.serve --model M &
hippo_mpi.page                                  # http://127.0.0.1:7860
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any, NoReturn

from hippo_mpi import config
from hippo_mpi.errors import HippoError, UserError, install_hint, print_error
from hippo_mpi.serving.page.cluster_view import ClusterView

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ASK_S = 5.0


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--url", default="http://127.0.0.1:8080", help=f"of hippo_mpi.serve; its key from {config.API_KEYS}"
    )
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=config.positive, default=7860, help="port to listen on")
    parser.add_argument("--insecure", action="store_true", help="listen on other addresses, where anyone may ask")
    return parser


def show(argv: list[str]) -> int:
    """Serve the page until a signal ends it.

    Raises:
        UserError: the server doesn't answer, or the page can't be shown.
    """
    arguments = make_parser().parse_args(argv)
    if arguments.address not in _LOOPBACK and not arguments.insecure:
        raise UserError(f"others could reach {arguments.address}, and the page asks for no password: give --insecure")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import openai

        from hippo_mpi.serving.page.web_page import CSS, make_page, theme
    except ImportError as missing:
        raise UserError(f"hippo_mpi.page needs {missing.name}: {install_hint('page')}") from None
    key = os.environ.get(config.API_KEYS, "").split(",")[0].strip() or "none"
    url = arguments.url.rstrip("/")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    try:
        models = [model.id for model in client.with_options(timeout=_ASK_S, max_retries=0).models.list()]
    except openai.OpenAIError as error:
        raise UserError(f"no server answers at {url}: {error} (start hippo_mpi.serve, or give --url)") from None
    page = make_page(client, models, ClusterView(lambda: _status(url, key)))
    try:
        page.launch(
            server_name=arguments.address, server_port=arguments.port, prevent_thread_lock=True, quiet=True, theme=theme(),
            css=CSS, ssr_mode=False, footer_links=[],
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"can't listen on {arguments.address}:{arguments.port}: {error}") from None
    sys.stderr.write(f"page: http://{arguments.address}:{arguments.port}\n")
    sys.stderr.flush()
    page.block_thread()
    return 0


def _status(url: str, key: str) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/ready", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=_ASK_S) as answer:
            return dict(json.loads(answer.read()))
    except urllib.error.HTTPError as error:  # 503: not ready, and why
        return dict(json.loads(error.read()))


def main() -> NoReturn:
    try:
        sys.exit(show(sys.argv[1:]))
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
