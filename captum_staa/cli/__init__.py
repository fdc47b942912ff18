"""What the command line does, as functions: explain a video file, compare methods, follow a stream, and the demo.
``captum_staa/__main__.py`` reads the arguments; nothing else imports this room."""
