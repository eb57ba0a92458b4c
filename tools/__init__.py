"""Programs for finished runs and for data: `python -m tools.NAME --help`. No script imports them."""

import argparse
import json
import os
import sys
from pathlib import Path

from common import cli
from common.cli import Refused


def parser(name, doc):
    """For `python -m tools.NAME`; its errors are Refused."""
    layout = argparse.RawDescriptionHelpFormatter
    return cli.Parser(prog=f"python -m tools.{name}", description=doc, formatter_class=layout)


def run(main):
    """What a program does when it is started. Where the user can mend something: one line and exit code 2."""
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files may hold any bytes
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        cli.say("stopped")
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        line = cli.one_line(error)
        if line is None:
            raise
        cli.show(line, sys.stderr)
        sys.exit(2)


def read_result(folder):
    """The result of the finished run in `folder`."""
    try:
        result = json.loads(Path(folder, "result.json").read_text())
        dict(result["args"])
        return result
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused(f"{folder}: holds no finished run (result.json); finish it, or name another") from None


def save_picture(figure, file):
    """Write matplotlib's figure to the file that --output names."""
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        message = f"--output {file}: cannot be written ({error}); name another file, such as x.png"
        raise Refused(message) from None
    cli.say(f"drew {file}")
