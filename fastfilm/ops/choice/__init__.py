"""The choice of the backend and the route that serve a call, with the reason where one cannot."""

from ..launchers.available import interpreting, why_not_architecture
from .choosing import (
    EAGER,
    UNMEASURED,
    automatic,
    backend,
    choose,
    exporting,
    for_pass,
    forget,
    measured,
    state,
    traced,
    watched,
    why_not_plan,
)
from .registry import (
    BACKENDS,
    ROUTES,
    Backend,
    Fused,
    Request,
    describe,
    why_not_backend,
    why_not_fused,
)
