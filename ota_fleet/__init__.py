"""The rooms beside the core: what a fleet needs and one file does not have to hold.

They import `ota_server`, never the reverse, except through its two doors: the operator's commands
and, later, a memory of devices. Copied alone, the core runs without any of them.
"""
