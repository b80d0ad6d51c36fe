"""The naive paths that every shortcut is compared with."""
