"""What libraries and user functions say through `warnings` and `logging`: it reaches stderr as our own errors do,
cleaned and without credentials. For the command line only; a program that imports fastrlhf keeps its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

from fastrlhf.runtime.console import clean, redact


def make_safe() -> None:
    """Change how this process formats warnings and log records, from here on."""
    warnings.formatwarning = _safe_warning(warnings.formatwarning)
    logging.setLogRecordFactory(_safe_record(logging.getLogRecordFactory()))


def _safe_warning(formatted: Callable[..., str]) -> Callable[..., str]:
    return lambda *args, **kwargs: redact(clean(formatted(*args, **kwargs)))


def _safe_record(made: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def record_of(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        try:
            record.msg, record.args = redact(clean(record.getMessage())), ()
        except (TypeError, ValueError, LookupError):  # arguments that do not fit: logging itself says so
            return record
        if record.exc_info:
            record.exc_text = redact(clean(logging.Formatter().formatException(record.exc_info)))
        return record

    return record_of
