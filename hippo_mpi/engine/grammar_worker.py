"""A process that validates grammars with llguidance; grammar_check.py starts it, and kills it if it takes too long.

Reads grammars from standard input, one JSON string per line; writes mistakes and warnings, one JSON list per line. Its
argument is the CPU time in seconds that one grammar may take; beyond it the system ends the process, even if nobody is
left to kill it. Imports little, to start quickly.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys

from llguidance import LLMatcher

_NICE = 10  # ranks of this machine come first


def main() -> None:
    """Answer each line of standard input with one line on standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that started this one
    limit_s = float(sys.argv[1])
    os.nice(_NICE)
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = math.ceil(used.ru_utime + used.ru_stime + limit_s)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            _, mistakes = LLMatcher.validate_grammar_with_warnings(json.loads(line))
        except (ValueError, TypeError) as error:
            mistakes = [str(error)]
        sys.stdout.write(json.dumps(mistakes) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
