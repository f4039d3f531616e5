"""Tests of the OTA update server."""
