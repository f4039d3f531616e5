"""Tests of what puts the server on a machine: install.sh, the systemd unit, the Dockerfile."""
