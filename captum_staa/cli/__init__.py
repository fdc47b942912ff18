"""The command line: argument parsing (:mod:`.parser`) and the commands explain, stream, compare, inspect and demo.

Only ``captum_staa/__main__.py`` imports this package; the rest of the library does not depend on it.
"""

INTERRUPTED = 130  # exit code that a shell reports for a program that was ended by Ctrl-C
