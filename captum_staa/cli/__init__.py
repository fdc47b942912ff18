"""What the command line does, as functions: explain a video file, and the demo. ``captum_staa/__main__.py`` reads the
arguments; nothing else imports this room."""
