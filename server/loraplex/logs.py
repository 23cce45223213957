"""Log lines on stderr: time, level, where, then key=value facts. Never a prompt's text."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def set_up_logging(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, format=FORMAT, level=level.upper())
    for chatty in ("asyncio", "urllib3", "httpx", "filelock", "huggingface_hub", "grpc"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
