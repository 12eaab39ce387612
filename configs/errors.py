"""What a user can cause ends in one clear line and exit code 2, never in a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FILE_ERRORS = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """Bad input from outside: the message says what was expected, what was got and what to do."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 or its return value; 2 with one line for what a user can cause."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        advice = "free some space or choose another folder" if error.errno in FULL else "expected a path that can be used"
        print(f"error: {where}{error.strerror}; {advice}", file=sys.stderr)
        code = EXIT_USER_ERROR
    sys.exit(code)
