"""What is set before a call: environment variables, a forced backend, kernels left out, tables of fast plans."""

from .forced import force, forced
