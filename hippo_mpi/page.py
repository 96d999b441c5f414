"""hippo_mpi.page: show a server's web page: a chat, and what each rank does.

hippo_mpi.serve --model M &
hippo_mpi.page                                  # http://127.0.0.1:7860
hippo_mpi.page --config hippo.yaml              # of the server with that file
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hippo_mpi.cluster.top.server_answers import fetch_status, own_key
from hippo_mpi.config import checks
from hippo_mpi.config.parser import Once, OptionsParser, option
from hippo_mpi.config.serve_options import API_KEYS, ServeOptions
from hippo_mpi.config.yaml_file import read_config, words_of
from hippo_mpi.errors import HippoError, UserError, install_hint, print_error
from hippo_mpi.serving.addresses import TRUST_HINT, is_loopback, is_untrusted, url_of, url_to_ask
from hippo_mpi.serving.page.cluster_view import ClusterView

_REQUEST_TIMEOUT_S = 5.0
_URL = url_of(ServeOptions.address, ServeOptions.port)


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """All options of hippo_mpi.page."""

    url: str | None = option(
        None, f"of hippo_mpi.serve (default: that of --config, or {_URL}); its key from {API_KEYS}"
    )
    config: Path | None = option(None, "the server's YAML file, which says where it listens", action=Once, check=Path)
    address: str = option("127.0.0.1", "address to listen on")
    port: int = option(7860, "port to listen on", check=checks.port)
    insecure: bool = option(False, "allow other addresses than localhost: anyone who can connect may use the page")


def make_parser() -> OptionsParser[PageOptions]:
    """Return the parser of the command's options."""
    return OptionsParser(PageOptions, prog="hippo_mpi.page", description=(__doc__ or "").splitlines()[0])


def show(argv: list[str]) -> int:
    """Serve the page until a signal ends the process; return the exit status.

    Raises:
        UserError: the server doesn't answer, or the page can't be shown.
    """
    options = make_parser().read(argv)
    if not is_loopback(options.address) and not options.insecure:
        raise UserError(
            f"others could reach {options.address}, and the page has no password: give --insecure to allow it"
        )
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import openai

        from hippo_mpi.serving.page.web_page import CSS, make_page, theme
    except ImportError as missing:
        raise UserError(f"hippo_mpi.page needs {missing.name}: {install_hint('page')}") from None
    url = (options.url or (url_of_server(options.config) if options.config else _URL)).rstrip("/")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=own_key())
    try:
        models = [model.id for model in client.with_options(timeout=_REQUEST_TIMEOUT_S, max_retries=0).models.list()]
    except openai.OpenAIError as error:
        advice = TRUST_HINT if is_untrusted(error) else "start hippo_mpi.serve, or give --url"
        raise UserError(f"can't use the server at {url}: {error} ({advice})") from None
    page = make_page(client, models, ClusterView(lambda: fetch_status(url)))
    try:
        page.launch(
            server_name=options.address, server_port=options.port, prevent_thread_lock=True, quiet=True, theme=theme(),
            css=CSS, ssr_mode=False, footer_links=[],
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"can't listen on {options.address}:{options.port}: {error}") from None
    sys.stderr.write(f"page: {url_of(options.address, options.port)}\n")
    sys.stderr.flush()
    page.block_thread()
    return 0


def url_of_server(path: Path) -> str:
    """Return the URL of a server with this file.

    Raises:
        UserError: the file is wrong.
    """
    server = OptionsParser(ServeOptions).read(words_of(read_config(path).settings, ServeOptions))
    return url_to_ask(url_of(server.address, server.port, server.ssl_certfile is not None))


def main() -> NoReturn:
    """Run the command and exit with its status."""
    try:
        sys.exit(show(sys.argv[1:]))
    except HippoError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
