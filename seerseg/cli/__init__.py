"""The commands: one file per verb. The only place that prints or exits. Nothing heavy is imported before a command runs."""
