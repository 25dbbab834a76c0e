"""Linear attention without decay, optionally normalised by the running sum of its keys."""
