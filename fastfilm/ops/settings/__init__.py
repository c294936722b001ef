"""Settings before a call: environment variables, a forced backend, kernels left out, tables of measured plans."""

from .forced import force, forced
