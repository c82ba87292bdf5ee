"""The command line: one file per subcommand that fills one, and what they share."""
