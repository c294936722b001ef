"""What users and measurements set before a call: environment variables, the backend that is forced, kernels that
are left out, and the tables of the fastest plans and tiles."""

from .forced import force, forced
