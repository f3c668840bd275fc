"""One folder per backend: ``reference`` (plain torch, the specification), ``cpu`` (C++) and ``cuda`` (CUDA C++)."""
