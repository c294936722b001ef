"""Deferred feature maps: raw maps with a pending affine and a view that consumers apply while they read."""

from .deferred import DeferredMap, Joined, Map, defer, deferrable, plain, readable
from .torch_functions import interpolate, join, max_pool, unwritten
