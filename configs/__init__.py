"""Presets: what an edit changes from the defaults, one file per published experiment. See `csd_2d.load_preset`."""
