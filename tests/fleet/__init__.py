"""What the rooms beside the core promise."""
