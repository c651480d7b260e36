"""Programs that show ditc at work."""
