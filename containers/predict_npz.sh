#!/bin/sh
# Made by seerseg_challenge dockerize.
# Answers /workspace/inputs into /workspace/outputs. A scan that cannot be used gets an empty answer, the reason goes to stderr, and the exit code stays 0:
# a crash would cost the submission.
set -eu
if [ -f /opt/ml/model/manifest.json ]; then
    set -- -m /opt/ml/model "$@"
fi
exec python -m seerseg.cli.challenge predict --convention npz --never_fail "$@"
