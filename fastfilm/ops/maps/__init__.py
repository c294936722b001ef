"""Feature maps that were not written yet, and what consumers see of them."""

from .deferred import DeferredMap, Joined, Map, defer, deferrable, plain, readable
from .torch_functions import interpolate, join, max_pool, unwritten
