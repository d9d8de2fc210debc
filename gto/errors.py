"""Bad input ends with one clear line and exit status 2, never with a traceback."""
import argparse
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


def argument_parser(command, description):
    """An ArgumentParser whose complaints are UserErrors. command: how the program is called, "python train.py"."""
    parser = argparse.ArgumentParser(prog=command, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):
        raise UserError(f"{message} ({command} --help shows all flags)")

    parser.error = error
    return parser
