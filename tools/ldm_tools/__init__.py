"""The commands: one file each, about one screen: parse, call the library, write."""
