"""Changes to a module from outside: sharding, compilation, precision, initial values."""
