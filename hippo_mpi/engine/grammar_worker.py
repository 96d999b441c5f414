"""A process that tells what llguidance has against a grammar: grammar_check.py starts it, and ends it if it takes too long.

Reads grammars from standard input, a JSON text a line; writes mistakes and warnings, a JSON list a line. Its argument is
how many seconds of CPU time one may take: then the system ends it, whoever is left. Imports little, to be there soon.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys

from llguidance import LLMatcher


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who has started it
    limit_s = float(sys.argv[1])
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = math.ceil(used.ru_utime + used.ru_stime + limit_s)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            _, found = LLMatcher.validate_grammar_with_warnings(json.loads(line))
        except (ValueError, TypeError) as error:
            found = [str(error)]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
