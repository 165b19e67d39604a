"""How good an edit is: how close to its answer, and how consistent."""
