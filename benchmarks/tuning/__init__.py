"""Tools that measure this machine and rewrite the tables of settings inside `fla_ops`."""
