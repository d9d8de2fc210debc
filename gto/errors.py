"""Bad input ends with one clear line and exit status 2, never with a traceback."""
import sys


class UserError(Exception):
    """Something the user can mend: the message says what is wrong and what to do."""


def main_guard(main):
    """Run `main()` as a program: a UserError becomes one line on stderr and exit status 2."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; finished stages and checkpoints are kept", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)
