"""The commands, one file each: its options, and what it runs. `kernelmeta.cli` puts them together."""
