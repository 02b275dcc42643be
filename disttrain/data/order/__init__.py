"""The training order: a pure function of data, seed, epoch and step."""
