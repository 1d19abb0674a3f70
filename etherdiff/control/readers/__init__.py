"""How datasets lie on the disk: one file per layout, each of which lists what it finds and what is wrong with it."""
