"""Firmware images for the tests, and the program that makes them."""
