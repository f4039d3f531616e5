"""What ota_server.py promises."""
