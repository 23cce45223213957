"""bitsandbytes, imported without its note that an optional package of kernels is not installed."""

import logging


def _is_news(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)

from bitsandbytes import functional, matmul_4bit  # noqa: E402

__all__ = ["functional", "matmul_4bit"]
