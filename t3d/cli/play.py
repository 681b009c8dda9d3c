"""Open a page on this machine that shows models answering the same question side by side.

    t3d play                                     the embedded teacher and its student
    t3d play models/my-teacher --student DIR     your own models; --student may be given several times

Each pane has its own model and decode settings, and its blocks fill as they are decoded. The page loads nothing from
elsewhere and sends nothing elsewhere. It answers on 127.0.0.1 only, unless --host names another address.
"""

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence

from t3d.blocks.settings import DecodeSettings
from t3d.cli.speaker import Speaker, warmed
from t3d.common import paths
from t3d.common.errors import UserError, run_main

TEACHER, STUDENT = "models/embedded-teacher", "models/embedded-student"
PORT = 8310


def labels(sources: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, or the whole path where the last parts are equal.

    Raises:
        UserError: a model is given twice.
    """
    if twice := next((source for source in sources if sources.count(source) > 1), None):
        raise UserError(f"--student={twice}: given twice; a pane can show any model", "--student")
    short = [paths.model_name(source) for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def load(name: str, source: str, key: str, max_token: int) -> Speaker:
    """A model of the page. Its settings are the ones that a pane starts with."""
    from t3d.models.decoder import load_decoder

    decoder = load_decoder(source, key=key, max_active=1)
    block = decoder.model.config.block_size
    settings = DecodeSettings(block, block, temperature=0.0, max_token=max_token)
    return warmed(Speaker.of(name, decoder, settings), decoder)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on this address. Raises UserError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--port={port}: cannot listen on {host} ({error.strerror}); give another", "--port") from error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="t3d play", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="the teacher: a folder or a hub id; default the embedded models")
    add("--student", action="append", default=[], metavar="DIR", help="a further model; may be given several times")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; default 127.0.0.1")
    add("--port", type=int, default=PORT, metavar="N", help=f"port to listen on; default {PORT}, 0 = any free one")
    add("--max-token", type=int, default=2000, metavar="N", help="most tokens of an answer; default 2000")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port {args.port}: give 0 to 65535")
    if args.max_token < 1:
        parser.error(f"--max-token {args.max_token}: give 1 or more")
    return args


def sources_of(args: argparse.Namespace) -> list[str]:
    """The models to load, the teacher first: the ones given, or those of the embedded models that are here.

    Raises:
        UserError: no model is given and none is here.
    """
    if args.model is not None:
        return [args.model, *args.student]
    teacher, student = (paths.resolve(name) for name in (TEACHER, STUDENT))
    if not teacher.is_dir():
        raise UserError(f"model={teacher}: no such folder; name a model, or start in a checkout of T3D", "model")
    return [str(teacher), *([str(student)] if student.is_dir() else []), *args.student]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `t3d play`."""
    args = parse(argv)
    try:
        from aiohttp import web

        from t3d.cli.playground.server import LOOPBACK, Playground
    except ModuleNotFoundError as error:
        raise UserError(f"t3d play: {error}; pip install 't3d[play]'", "play") from error
    sources = sources_of(args)
    with listening(args.host, args.port) as server:
        speakers: list[Speaker] = []
        for name, source in zip(labels(sources), sources, strict=True):
            print(f"loading {source}", file=sys.stderr, flush=True)
            speakers.append(load(name, source, "--student" if speakers else "model", args.max_token))
        local = args.host in LOOPBACK
        host = f"[{args.host}]" if ":" in args.host else args.host
        app = Playground(speakers, LOOPBACK if local else ()).app()
        with contextlib.suppress(KeyboardInterrupt):
            print(f"http://{host}:{server.getsockname()[1]}   Ctrl-C ends it", flush=True)
            web.run_app(app, sock=server, print=None, handler_cancellation=True, shutdown_timeout=1)


if __name__ == "__main__":
    run_main(main)
